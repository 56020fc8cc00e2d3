"""What generation costs on this machine: tokens a second, memory, joules a token."""

import contextlib
import resource
import sys
import time
from dataclasses import dataclass

import torch

from bitkernels.inference.engine import Engine
from bitkernels.inference.memory import MemoryPlan
from bitkernels.inference.sampling import SamplingParams
from bitkernels.models import BiMambaConfig, BiMambaForCausalLM
from bitkernels.nn import PackedBitLinear, PackedLinear, pack_

# The Bi-Mamba paper, section 5.5: an A100 takes 300 W and does 312 TFLOP/s in 16 bits; in its table 8 a product with a
# low-bit weight counts as a sixteenth of that.
_PAPER_JOULES_PER_FLOP = 300 / 312e12
_PAPER_LOW_BIT_SHARE = 1 / 16

_WARM_UP = 4


@dataclass(frozen=True)
class Measured:
    plan: MemoryPlan
    prefill_rate: float  # tokens a second
    decode_rate: float
    step_ms: float
    peak_bytes: int  # of the device's allocator; of the process on a CPU
    joules: float  # a decoded token
    joules_from: str


def random_model(config: BiMambaConfig, device: torch.device, dtype: torch.dtype) -> BiMambaForCausalLM:
    """A packed model of random weights, the same in each layer. Never holds more than one latent layer."""
    with device:
        one = pack_(BiMambaForCausalLM(config.replace(n_layer=1))).set_activation_dtype_(dtype).state_dict()
    model = BiMambaForCausalLM.on_meta(config, packed=True)

    def of_first_layer(name: str) -> str:
        head, *rest = name.split(".")
        return ".".join([head, "0", *rest[1:]]) if head == "layers" else name

    model.load_state_dict({name: one[of_first_layer(name)].clone() for name in model.state_dict()}, assign=True)
    return model.eval()


def estimated_joules(model: BiMambaForCausalLM) -> float:
    """The paper's estimate for a token of ``model``; real machines decode at a fraction of their FLOP/s."""
    low_bit = sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear | PackedBitLinear)
    )
    full = model.config.vocab_size * model.config.d_model
    full += sum(m.weight.numel() for layer in model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear))
    return 2 * (low_bit * _PAPER_LOW_BIT_SHARE + full) * _PAPER_JOULES_PER_FLOP


class EnergyCounter:
    """Joules that NVML counted since the start, or None where it does not tell."""

    def __init__(self, device: torch.device):
        self._read = None
        if device.type == "cuda":
            with contextlib.suppress(Exception):  # no pynvml, no NVML, or a card that does not count
                import pynvml

                pynvml.nvmlInit()
                uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
                self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        self._begin = self._read() if self._read else None

    def joules(self) -> float | None:
        return self._read() - self._begin if self._read else None


def measure(
    model: BiMambaForCausalLM, batch: int, prompt: int, new_tokens: int, state_dtype: torch.dtype, **options
) -> Measured:
    """Reads ``batch`` random prompts, then decodes ``new_tokens`` tokens of as many requests; ``options`` of Engine."""
    if min(batch, prompt, new_tokens) < 1:
        raise ValueError(f"bench: batch, prompt and new tokens must be positive, got {batch}, {prompt}, {new_tokens}")
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    engine = Engine(model, batch, state_dtype, **options)

    def submit(length: int, count: int) -> None:
        for _ in range(batch):
            engine.submit(torch.randint(model.config.vocab_size, (length,)), SamplingParams(count, temperature=0))

    def run(steps: int | None = None) -> float:
        """Seconds for so many steps, or for all there is to do."""
        _synchronize(device)
        begin = time.perf_counter()
        while not engine.idle and steps != 0:
            engine.step()
            steps = None if steps is None else steps - 1
        _synchronize(device)
        return time.perf_counter() - begin

    submit(min(prompt, engine.prefill_chunk), 1)  # loads and compiles
    run()
    submit(prompt, 1)
    prefill = run()
    submit(1, _WARM_UP + new_tokens)
    run(_WARM_UP)
    energy = EnergyCounter(device)
    decode = run(new_tokens)
    joules, decoded = energy.joules(), batch * new_tokens
    run()
    return Measured(
        engine.memory,
        batch * prompt / prefill,
        decoded / decode,
        1e3 * decode / new_tokens,
        _peak_bytes(device),
        estimated_joules(model) if joules is None else joules / decoded,
        "estimate of the paper, not measured" if joules is None else "NVML",
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
