"""Training by several processes: torchrun, FSDP2, and what they agree on."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from bitkernels.models import BiMambaForCausalLM
from bitkernels.training.sign_gather import LatentShard, gather_signs_, plain


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes of ``torchrun``, if it started this one, and yields the device of this process."""
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the body alone, so that the others find what it leaves on disk."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def mean(t: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if world_size() > 1:
        t = t.clone()
        dist.all_reduce(t)
        t /= world_size()
    return t


def average_gradients_(model: nn.Module) -> None:
    """Makes each gradient its mean over the processes, in one all-reduce; they then are views of one tensor."""
    if world_size() == 1:
        return
    own = [p for p in model.parameters() if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in own])
    dist.all_reduce(flat)
    flat /= world_size()
    for p, gradient in zip(own, flat.split([p.numel() for p in own]), strict=True):
        p.grad = gradient.view_as(p)


def clip_gradients_(model: nn.Module, most: float) -> Tensor:
    """Scales the gradients down to a norm of ``most``, over all processes; returns the norm that they had.

    On the shards themselves: an operation on DTensors takes the host a while for each of them.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    square = torch.stack(torch._foreach_norm(shards)).square().sum()
    if is_sharded(model):
        dist.all_reduce(square)
    norm = square.sqrt()
    torch._foreach_mul_(shards, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def unique_mixers(model: BiMambaForCausalLM) -> list[nn.Module]:
    """The blocks in their order; one that layers share counts once."""
    return list(dict.fromkeys(layer.mixer for layer in model.layers))


def shard_(model: BiMambaForCausalLM, signs_alone: bool = True) -> list[str]:
    """Shards ``model`` over all processes with FSDP2, in place: each block on its own, and the rest together.

    Parameters, gradients and optimiser states are sharded in their own dtype, and products run in the autocast type.
    With ``signs_alone`` the latent weights of binary layers travel as sign bits, and blocks of such layers are gathered
    once for a forward and its backward, between which they keep them, a bit a weight; one that layers share is gathered
    again in the backward. All processes must then use the model together, also
    to evaluate it, and must hold equal weights before.

    Returns:
        The names of binary weights that are gathered whole (see ``gather_signs_``).
    """
    size = world_size()
    mesh = init_device_mesh(model.device.type, (size,))
    whole = gather_signs_(model, size) if signs_alone else []
    for mixer in unique_mixers(model):
        signs = all(isinstance(p.weight, LatentShard) for p in (mixer.in_proj, mixer.out_proj))
        fully_shard(mixer, mesh=mesh, reshard_after_forward=not signs)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden_states")
    return whole


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def reshard_(model: nn.Module) -> None:
    """Frees what a forward alone left gathered: the parameters are shards again, and the next use gathers them, which a
    graph must do in each replay."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_model(model: BiMambaForCausalLM) -> BiMambaForCausalLM:
    """``model`` itself, or where it is sharded a copy of it on the CPU with all weights; a call for every process."""
    if not is_sharded(model):
        return model
    with torch.device("meta"):
        copy = BiMambaForCausalLM(model.config)
    state = {}
    for name, t in model.state_dict().items():
        t = plain(t)
        state[name] = (t.full_tensor() if isinstance(t, DTensor) else t).cpu()
    copy.load_state_dict(state, assign=True)
    return copy.train(model.training)
