"""The peer of whole models: a bf16 Mamba-2 of random weights that reads and decodes as mamba_ssm does.

mamba_ssm's own model imports compiled extensions, so it is made here of the same kernels in the same order: its Triton
kernels for norms, scan and state, cuBLAS for projections and head. The convolution is one kernel of this package, as it
would be one of the extension causal-conv1d; without that, mamba_ssm launches six for a step.
"""

import peers
import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels import causal_conv1d, causal_conv1d_step
from bitkernels.models import BiMambaConfig

_DTYPE = torch.bfloat16
_SCAN_CHUNK = 256  # mamba_ssm's default


def missing(device: str) -> str | None:
    """Why it cannot be measured here."""
    modules = [peers.mamba_ssm(name, device) for name in ("layer_norm", "layernorm_gated", "selective_state_update")]
    return next((module for module in modules if isinstance(module, str)), None)


class MambaSSM:
    def __init__(self, config: BiMambaConfig, device: str):
        self.config = config
        names = "layer_norm", "layernorm_gated", "selective_state_update"
        norm, gated, state = (peers.mamba_ssm(name, device) for name in names)
        self.norm, self.gated, self.update = norm.layer_norm_fn, gated.rmsnorm_fn, state.selective_state_update
        c = config

        def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = _DTYPE) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype) * scale

        def layer() -> dict[str, Tensor]:
            return {
                "norm": 1 + random(c.d_model, scale=0.1),
                "in_proj": random(c.d_in_proj, c.d_model, scale=c.d_model**-0.5),
                "conv_weight": random(c.d_conv_channels, c.d_conv, scale=0.5),
                "conv_bias": random(c.d_conv_channels, scale=0.1),
                "A_log": random(c.nheads).abs(),
                "D": random(c.nheads, dtype=torch.float32),
                "dt_bias": random(c.nheads) - 4,
                "gated": 1 + random(c.d_inner, scale=0.1),
                "out_proj": random(c.d_model, c.d_inner, scale=c.d_inner**-0.5),
            }

        self.embedding = random(c.vocab_size, c.d_model, scale=0.02)
        self.layers = [layer() for _ in range(c.n_layer)]
        self.last_norm = 1 + random(c.d_model, scale=0.1)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.embedding, *(t for layer in self.layers for t in layer.values())))

    def new_states(self, batch: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """mamba_ssm's default is the model's type; fp32 is what its kernels compute in."""
        c = self.config
        like = self.embedding.new_empty
        return [
            (
                like(batch, c.d_conv - 1, c.d_conv_channels, dtype=dtype).zero_(),
                like(batch, c.nheads, c.headdim, c.d_state, dtype=dtype).zero_(),
            )
            for _ in range(c.n_layer)
        ]

    def _normed(self, hidden: Tensor, residual: Tensor | None, weight: Tensor, prenorm: bool):
        return self.norm(
            hidden, weight, None, residual, eps=self.config.norm_eps, prenorm=prenorm, residual_in_fp32=True,
            is_rms_norm=True,
        )  # fmt: skip

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return projected.split([self.config.d_inner, self.config.d_conv_channels, self.config.nheads], -1)

    def _split_conv(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        x, B, C = xbc.split([c.d_inner, *[c.ngroups * c.d_state] * 2], -1)
        groups = c.ngroups, c.d_state
        return x.unflatten(-1, (c.nheads, c.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    @torch.no_grad()
    def step(self, ids: Tensor, states: list[tuple[Tensor, Tensor]]) -> Tensor:
        """[B] -> logits [B, vocab_size]; ``states`` move on."""
        c = self.config
        heads = c.nheads, c.headdim
        hidden, residual = F.embedding(ids, self.embedding), None
        for own, (conv, ssm) in zip(self.layers, states, strict=True):
            hidden, residual = self._normed(hidden, residual, own["norm"], True)
            z, xbc, dt = self._split(F.linear(hidden, own["in_proj"]))
            x, B, C = self._split_conv(causal_conv1d_step(conv, xbc, own["conv_weight"], own["conv_bias"]))
            A = -torch.exp(own["A_log"].float())
            y = self.update(
                ssm, x, dt[..., None].expand(-1, *heads), A[:, None, None].expand(*heads, c.d_state), B, C,
                own["D"][:, None].expand(*heads), dt_bias=own["dt_bias"][:, None].expand(*heads), dt_softplus=True,
            ).flatten(1)  # fmt: skip
            y = self.gated(y, own["gated"], None, z, eps=c.norm_eps, norm_before_gate=False)
            hidden = F.linear(y, own["out_proj"])
        return F.linear(self._normed(hidden, residual, self.last_norm, False), self.embedding)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """[B, T] from empty states -> the last logits, [B, vocab_size]. Its scan tunes itself at the first call."""
        scan = peers.mamba_ssm("ssd_combined", ids.device.type).mamba_chunk_scan_combined
        hidden, residual = F.embedding(ids, self.embedding), None
        for own in self.layers:
            normed, residual = self._normed(hidden.flatten(0, 1), residual, own["norm"], True)
            z, xbc, dt = self._split(F.linear(normed.view_as(hidden), own["in_proj"]))
            x, B, C = self._split_conv(causal_conv1d(xbc, own["conv_weight"], own["conv_bias"]))
            A = -torch.exp(own["A_log"].float())
            y, _ = scan(
                x, dt, A, B, C, _SCAN_CHUNK, D=own["D"], dt_bias=own["dt_bias"], dt_softplus=True,
                return_final_states=True,
            )  # fmt: skip
            y = self.gated(y.flatten(2), own["gated"], None, z, eps=self.config.norm_eps, norm_before_gate=False)
            hidden = F.linear(y, own["out_proj"])
        last = residual.view_as(hidden)[:, -1]
        return F.linear(self._normed(hidden[:, -1], last, self.last_norm, False), self.embedding)
