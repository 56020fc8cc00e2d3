"""What an engine will hold, computed before it is allocated."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from bitkernels.inference.sampling import Sampler
from bitkernels.models import BiMambaForCausalLM

# Tokens of a chunk of the scan, which passes one float32 state of every head to the next.
_SCAN_CHUNK = 64


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. Weights, states and sampling stay; the workspace is an upper estimate of what a step needs besides."""

    weights: int
    states: int
    sampling: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in asdict(self).items())
        return f"{self.total / 1e6:,.1f} MB ({parts})"


def weight_bytes(model: nn.Module) -> int:
    """Memory of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def plan_memory(model: BiMambaForCausalLM, max_batch: int, state_dtype: torch.dtype, prefill_chunk: int) -> MemoryPlan:
    """The plan of an ``Engine`` with these arguments; ``model`` may be on the meta device."""
    c = model.config
    item, state_item = model.activation_dtype.itemsize, state_dtype.itemsize
    state = c.nheads * c.headdim * c.d_state
    conv = (c.d_conv - 1) * c.d_conv_channels
    states = c.n_layer * (max_batch * (state + conv) + conv) * state_item
    # In flight in a layer: residual, sum, norms and result in float32; the projections' inputs and outputs; x, B, C
    # after the convolution; y before and after the norm; float32 dt.
    token = 24 * c.d_model + item * (2 * c.d_model + c.d_in_proj + c.d_conv_channels + 2 * c.d_inner) + 12 * c.nheads
    prefill = prefill_chunk * token + (prefill_chunk // _SCAN_CHUNK + 4) * state * 4
    decode = max_batch * (2 * token + c.vocab_size * (item + Sampler.WORKSPACE))
    # Captured steps keep their memory while prompts are read.
    return MemoryPlan(weight_bytes(model), states, Sampler.nbytes(max_batch, c.vocab_size), prefill + decode)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None where it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def check_memory(plan: MemoryPlan, device: torch.device, limit: int | None = None, allocated: int = 0) -> None:
    """Raises ValueError where a plan, of which so many bytes are allocated, exceeds ``limit`` or what is free."""
    if limit is not None and plan.total > limit:
        raise ValueError(f"memory: needs {plan}, the limit is {limit / 1e6:,.1f} MB")
    free = free_memory(device)
    if free is not None and plan.total - allocated > free:
        raise ValueError(
            f"memory: needs {plan}, of which {allocated / 1e6:,.1f} MB are allocated; {free / 1e6:,.1f} MB are free"
        )
