"""1-bit all-gather: of a sharded ``FBILinear`` weight only the sign bits travel.

FSDP2 asks a parameter that is a tensor subclass what to gather (``fsdp_pre_all_gather``) and what to make of it
(``fsdp_post_all_gather``). A layer's forward and backward read nothing of its latent weight but the signs, so a
gathered weight is packed sign bits that pass for a matrix; the latent values and the optimiser's states stay on their
shards, and the gradient comes back to them by the usual reduce-scatter.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from bitkernels import pack_sign
from bitkernels.nn import FBILinear

aten = torch.ops.aten

# FSDP cuts and copies a weight with these; what they return is a weight still.
_KEEP = {
    aten.as_strided.default,
    aten.clone.default,
    aten.detach.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.view.default,
}


class LatentShard(Tensor):
    """A latent weight, or some rows of it, of which FSDP2 gathers the signs. Other operations see plain values."""

    @staticmethod
    def __new__(cls, data: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            device=data.device,
        )  # fmt: skip

    def __init__(self, data: Tensor):
        self.data_ = data

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = pytree.tree_map_only(cls, lambda t: t.data_, (args, kwargs or {}))
        out = function(*plain[0], **plain[1])
        if function in _KEEP:
            return pytree.tree_map_only(Tensor, cls, out)
        # An operation in place returns its argument.
        if function._schema.name.endswith("_") and args and isinstance(args[0], cls) and out is args[0].data_:
            return args[0]
        return out

    def __tensor_flatten__(self):
        return ["data_"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):
        return cls(inner["data_"])

    def __repr__(self):
        return f"LatentShard({self.data_!r})"

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        return (pack_sign(self.data_).view(torch.int32),), (outer_size[1],)

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        if out is None:  # else it reads the memory that outputs are gathered into
            words = outputs[0].view(torch.uint32)
            return GatheredSigns(words, metadata[0], param_dtype), (words,)


class GatheredSigns(Tensor):
    """A whole weight [N, K] of which there are sign bits alone: ``sign_linear`` takes it, and nothing else does."""

    @staticmethod
    def __new__(cls, words: Tensor, width: int, dtype: torch.dtype):
        return Tensor._make_wrapper_subclass(cls, (len(words), width), dtype=dtype, device=words.device)

    def __init__(self, words: Tensor, width: int, dtype: torch.dtype):
        self.words = words  # uint32 [N, ceil(K / 32)]

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __tensor_flatten__(self):
        return ["words"], (self.shape[1], self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):
        return cls(inner["words"], *meta)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.bitkernels.sign_linear.default:
            x, weight, *others = args
            return torch.ops.bitkernels.packed_linear(x, weight.words, *others), weight.words
        # FSDP and nn.Parameter take the same weight once more.
        if function is aten.detach.default or (function is aten.as_strided.default and list(args[0].shape) == args[1]):
            return cls(args[0].words, args[0].shape[1], args[0].dtype)
        raise NotImplementedError(f"{function} of a gathered weight, of which there are sign bits alone")

    def __repr__(self):
        return f"GatheredSigns({list(self.shape)}, {self.dtype})"


def gather_signs_(module: nn.Module, shards: int) -> list[str]:
    """Lets FSDP2 gather the signs alone of every ``FBILinear`` in ``module``, before ``fully_shard`` is called on it.

    Returns the names of weights it cannot serve, which are gathered whole: FSDP2 pads the last shard of rows that
    ``shards`` does not divide, and demands the padding of what is gathered.
    """
    whole = []
    for name, layer in module.named_modules():
        if not isinstance(layer, FBILinear):
            continue
        if layer.out_features % shards:
            whole.append(f"{name}.weight" if name else "weight")
        else:
            layer.weight = nn.Parameter(LatentShard(layer.weight.detach()), layer.weight.requires_grad)
    return whole


def plain(t: Tensor) -> Tensor:
    """The tensor with a latent shard's values instead of the shard; they share memory."""
    if not isinstance(t, DTensor) or not isinstance(t.to_local(), LatentShard):
        return t
    local = t.to_local().data_
    return DTensor.from_local(local, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())
