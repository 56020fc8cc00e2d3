"""A training step of the 780M model: fully binarised, against mamba_ssm in bf16 and the published simulation.

8 x 2048 tokens, float32 weights, products in bf16, gradients clipped, fused AdamW. Contenders follow one another, since
two do not fit a GPU. mamba_ssm takes its faster path, use_mem_eff_path=False, with fused norms; where causal-conv1d is
not installed, with this package's convolution, which is no slower. On a CPU a tiny model is trained, without peers.
"""

import gc
import itertools
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bench_sign_linear import Sign
from harness import device_of
from peers import mamba_ssm
from torch import nn

import bitkernels
from bitkernels.models import CONFIGS, BiMambaForCausalLM
from bitkernels.training import TrainConfig, train

WARM, TIMED = 4, 8
CASES = {"cuda": ("780m", 8, 2048), "cpu": ("tiny", 2, 64)}


def pytest_generate_tests(metafunc):
    metafunc.parametrize(("size", "B", "T"), [CASES[device_of(metafunc.config)]])


class Clock:
    """Called after every step."""

    def __init__(self, device: str):
        self.device, self.marks, self.losses = device, [], []

    def __call__(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.clone())
        if self.device == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)

    def summary(self) -> dict:
        """Of the steps after the first few, which compile, tune and capture."""
        assert torch.stack(self.losses).isfinite().all()
        pairs = itertools.pairwise(self.marks[WARM - 1 :])
        if self.device == "cuda":
            torch.cuda.synchronize()
            times = [1e3 * a.elapsed_time(b) for a, b in pairs]
        else:
            times = [1e6 * (b - a) for a, b in pairs]
        p20, median, p80 = torch.tensor(times).double().quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
        result = {"us": round(median, 1), "p20": round(p20, 1), "p80": round(p80, 1)}
        if self.device == "cuda":
            result["peak, MB"] = round(torch.cuda.max_memory_allocated() / 1e6)
        return result


def run_ours(config, B: int, T: int, device: str, capture: bool) -> tuple[dict, list[float]]:
    torch.manual_seed(0)
    with torch.device(device):
        model = BiMambaForCausalLM(config)
    tokens = torch.randint(config.vocab_size, (64 * B * T,), generator=torch.Generator().manual_seed(0))
    clock = Clock(device)
    plan = TrainConfig(WARM + TIMED, B, T, lr=2.5e-4, autocast=torch.bfloat16, capture=capture)
    train(model, tokens, plan, on_step=lambda step: clock(step.loss))
    return clock.summary(), [float(loss) for loss in clock.losses]


class Simulated(nn.Module):
    """FBI-Linear as published: a dense weight of signs is made, and multiplied."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        layer = bitkernels.nn.FBILinear.from_linear(linear)
        self.weight, self.alpha, self.beta = layer.weight, layer.alpha, layer.beta

    def forward(self, x):
        return F.linear(x, self.alpha * Sign.apply(self.weight) + self.beta)


class Peer(nn.Module):
    """mamba_ssm's blocks as its language model stacks them, with a tied head."""

    def __init__(self, config, modules, simulated: bool):
        super().__init__()
        mamba2, block, self.norms = modules
        if mamba2.causal_conv1d_fn is None:
            mamba2.causal_conv1d_fn = convolution
        c = config
        mixer = partial(
            mamba2.Mamba2,
            d_state=c.d_state,
            d_conv=c.d_conv,
            expand=c.expand,
            headdim=c.headdim,
            use_mem_eff_path=False,
        )
        norm = partial(self.norms.RMSNorm, eps=c.norm_eps)
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(
            block.Block(c.d_model, mixer, nn.Identity, norm_cls=norm, fused_add_norm=True, residual_in_fp32=True)
            for _ in range(c.n_layer)
        )
        self.norm = norm(c.d_model)
        if simulated:
            for layer in self.layers:
                layer.mixer.in_proj = Simulated(layer.mixer.in_proj)
                layer.mixer.out_proj = Simulated(layer.mixer.out_proj)

    def forward(self, ids):
        hidden, residual = self.embedding(ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        hidden = self.norms.layer_norm_fn(
            hidden, self.norm.weight, None, residual=residual, eps=self.norm.eps, residual_in_fp32=True,
            is_rms_norm=True,
        )  # fmt: skip
        return F.linear(hidden, self.embedding.weight)


def convolution(x, weight, bias, activation, seq_idx=None):
    """causal_conv1d_fn [B, C, T]."""
    return bitkernels.causal_conv1d(x.transpose(1, 2), weight, bias, seq_idx=seq_idx, activation=activation).transpose(
        1, 2
    )


def run_peer(config, modules, B: int, T: int, simulated: bool) -> dict:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Peer(config, modules, simulated)
        ids = torch.randint(config.vocab_size, (B, T + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.5e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    clock = Clock("cuda")
    for _ in range(WARM + TIMED):
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock(loss.detach())
    return clock.summary()


def alone(function, *args):
    """The result of a contender that finds the GPU empty."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return function(*args)


def rows_of(name: str, config, B: int, T: int, ours: dict[str, dict], peers: dict[str, dict]) -> list[dict]:
    """A row for each form of ours, by the suffix of its case."""
    weights = sum(p.numel() for p in BiMambaForCausalLM.on_meta(config).parameters())
    rows = []
    for suffix, times in ours.items():
        against = {
            peer: row if "absent" in row else {**row, "speedup": round(row["us"] / times["us"], 2)}
            for peer, row in peers.items()
        }
        memory = {
            f"{who}, MB": row["peak, MB"] for who, row in {"bitkernels": times, **peers}.items() if "peak, MB" in row
        }
        rows.append({
            "case": name + suffix, "shape": [B, T], "dtype": "bfloat16", **memory, **times,
            "GB/s": 0.0, "TFLOP/s": round(6 * weights * B * T / times["us"] / 1e6, 3),
            "tokens/s": round(1e6 * B * T / times["us"]), "peers": against, "headline": "peak, MB" in times,
        })  # fmt: skip
    return rows


def peer_modules(device: str) -> list:
    return [mamba_ssm(module, device, "") for module in ("modules.mamba2", "modules.block", "ops.triton.layer_norm")]


def test_training_step(size, B, T, device, benchmark, record, peer_cases):
    config, name = CONFIGS[size], f"{size}, B={B}, T={T}"
    first, losses = benchmark.pedantic(alone, (run_ours, config, B, T, device, False), rounds=1)
    ours = {"": first}
    if device == "cuda":
        ours[", captured"], captured_losses = alone(run_ours, config, B, T, device, True)
        assert captured_losses == pytest.approx(losses, rel=1e-3)
    found = peer_modules(device)
    absent = next((module for module in found if isinstance(module, str)), None)
    peers = {}
    for peer, simulated in (("mamba_ssm bf16", False), ("simulation", True)):
        if absent or peer_cases not in name:
            peers[peer] = {"absent": absent or "tunes itself"}
        else:
            peers[peer] = alone(run_peer, config, found, B, T, simulated)
    for row in rows_of(name, config, B, T, ours, peers):
        record(row)
