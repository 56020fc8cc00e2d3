"""A thin Bi-Mamba: the Mamba-2 language model with binary or ternary projections.

Each layer is ``residual + mixer(norm(residual))`` with the residual in fp32; the mixer is in_proj, a
causal convolution over x, B and C, the SSD scan, a gated RMSNorm, and out_proj.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels import causal_conv1d_step, gated_rms_norm, mamba2_mixer, ssd_step
from bitkernels.models.config import BiMambaConfig
from bitkernels.nn import BitLinear, FBILinear

_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 0.1, 1e-4
_A_RANGE = (1.0, 16.0)
_EMBEDDING_STD = 0.02


@dataclass
class BiMambaCache:
    """What generation remembers: per layer the last inputs of the convolution and the SSM state.

    Its size does not depend on how many tokens it has seen. Updated in place by ``prefill`` and ``step``.
    """

    conv: list[Tensor]  # [B, d_conv - 1, channels] each
    ssm: list[Tensor]  # [B, H, P, N] each
    tokens: int = 0

    @property
    def batch_size(self) -> int:
        return self.conv[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in (*self.conv, *self.ssm))


class RMSNorm(nn.Module):
    """RMSNorm of the fp32 residual; the result takes the type of ``dtype``."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).to(dtype)


def _projection(config: BiMambaConfig, in_features: int, out_features: int, low_bit: bool) -> nn.Module:
    if not low_bit:
        return nn.Linear(in_features, out_features, bias=False)
    if config.weight_format == "ternary":
        return BitLinear(in_features, out_features)
    return FBILinear(in_features, out_features, bias=False, scales=config.scales)


class Mixer(nn.Module):
    """The Mamba-2 block."""

    def __init__(self, config: BiMambaConfig):
        super().__init__()
        self.config = config
        heads, channels = config.nheads, config.d_conv_channels
        self.in_proj = _projection(config, config.d_model, config.d_in_proj, config.binarize != "none")
        self.conv_weight = nn.Parameter(torch.empty(channels, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.ones(config.d_inner))
        self.out_proj = _projection(config, config.d_inner, config.d_model, config.binarize == "all")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.config.d_conv**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        nn.init.uniform_(self.A_log, *_A_RANGE).log_()
        nn.init.uniform_(self.dt_bias, math.log(_DT_MIN), math.log(_DT_MAX)).exp_().clamp_(min=_DT_FLOOR)
        # The inverse of softplus, so that softplus(dt_bias) is log-uniform.
        self.dt_bias.add_(torch.log(-torch.expm1(-self.dt_bias)))
        # Many residual additions: scaled so that their sum keeps the variance of one.
        self.out_proj.weight.div_(math.sqrt(self.config.n_layer))
        if isinstance(self.out_proj, FBILinear):
            self.out_proj.reset_scales()

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [self.config.d_inner, self.config.d_conv_channels, self.config.nheads]
        return projected.split(sizes, dim=-1)

    def _split_conv(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., channels] -> x [..., H, P], B and C [..., G, N]."""
        c = self.config
        state = c.ngroups * c.d_state
        x, B, C = xbc.split([c.d_inner, state, state], dim=-1)
        groups = (c.ngroups, c.d_state)
        return x.unflatten(-1, (c.nheads, c.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    @property
    def A(self) -> Tensor:
        return -torch.exp(self.A_log.float())

    def forward(
        self,
        hidden: Tensor,  # [B, T, d_model]
        seq_idx: Tensor | None = None,  # int [B, T]
        conv_state: Tensor | None = None,  # [B, d_conv - 1, channels], updated in place
        ssm_state: Tensor | None = None,  # [B, H, P, N], updated in place
    ) -> Tensor:
        projected = self.in_proj(hidden)
        dtype = projected.dtype
        y, final = mamba2_mixer(
            projected, self.conv_weight.to(dtype), self.conv_bias.to(dtype), self.dt_bias, self.A, self.D,
            self.norm_weight.to(dtype), conv_state, ssm_state, seq_idx, ngroups=self.config.ngroups,
            chunk_size=self.config.chunk_size, norm_eps=self.config.norm_eps, return_final_states=True,
        )  # fmt: skip
        if conv_state is not None:
            xbc = self._split(projected)[1]
            conv_state.copy_(torch.cat([conv_state, xbc.to(conv_state.dtype)], 1)[:, xbc.shape[1] :])
            ssm_state.copy_(final)
        return self.out_proj(y)

    def step(self, hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token: [B, d_model] -> [B, d_model]; both states are updated in place."""
        z, xbc, dt = self._split(self.in_proj(hidden))
        weight, bias = self.conv_weight.to(xbc.dtype), self.conv_bias.to(xbc.dtype)
        x, B, C = self._split_conv(causal_conv1d_step(conv_state, xbc, weight, bias))
        y = ssd_step(ssm_state, x, dt, self.A, B, C, D=self.D, dt_bias=self.dt_bias, dt_softplus=True)
        y = gated_rms_norm(y.flatten(-2), z, self.norm_weight.to(z.dtype), self.config.norm_eps)
        return self.out_proj(y)


class Layer(nn.Module):
    def __init__(self, config: BiMambaConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config)


class BiMambaForCausalLM(nn.Module):
    """Token ids to next-token logits.

    The type of the embedding is the type of the activations between the layers' fp32 residuals.
    """

    # The tensors whose type set_activation_dtype_ changes.
    EMBEDDINGS = frozenset({"embedding.weight", "head.weight"})

    def __init__(self, config: BiMambaConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING_STD)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def set_activation_dtype_(self, dtype: torch.dtype) -> "BiMambaForCausalLM":
        """Casts embedding and head, and with them the activations; norms, scales and SSM parameters keep theirs."""
        self.embedding.to(dtype)
        if self.head is not None:
            self.head.to(dtype)
        return self

    def new_cache(self, batch_size: int, dtype: torch.dtype = torch.float32) -> BiMambaCache:
        """The zero state of ``batch_size`` sequences."""
        c = self.config
        conv, ssm = (batch_size, c.d_conv - 1, c.d_conv_channels), (batch_size, c.nheads, c.headdim, c.d_state)
        return BiMambaCache(
            [torch.zeros(conv, dtype=dtype, device=self.device) for _ in range(c.n_layer)],
            [torch.zeros(ssm, dtype=dtype, device=self.device) for _ in range(c.n_layer)],
        )

    def hidden_states(self, ids: Tensor, seq_idx: Tensor | None = None, cache: BiMambaCache | None = None) -> Tensor:
        """[B, T] -> the normalised output of the last layer, [B, T, d_model]."""
        hidden = self.embedding(ids)
        dtype, residual = hidden.dtype, hidden.float()
        for i, layer in enumerate(self.layers):
            states = (None, None) if cache is None else (cache.conv[i], cache.ssm[i])
            residual = residual + layer.mixer(layer.norm(residual, dtype), seq_idx, *states).float()
        return self.norm(residual, dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def forward(self, ids: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """[B, T] ids -> [B, T, vocab_size] logits.

        ``seq_idx`` (int [B, T]) packs several sequences into a row: where it changes, the state restarts.
        """
        self._check_ids(ids, 2, "[B, T]")
        return self.logits(self.hidden_states(ids, seq_idx))

    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: BiMambaCache) -> Tensor:
        """Reads [B, T] further tokens into ``cache``; returns the logits after the last, [B, vocab_size]."""
        self._check_ids(ids, 2, "[B, T]")
        if ids.shape[1] == 0:
            raise ValueError("prefill: ids must hold at least one token for each sequence")
        self._check_cache(ids, cache)
        hidden = self.hidden_states(ids, cache=cache)
        cache.tokens += ids.shape[1]
        return self.logits(hidden[:, -1])

    @torch.no_grad()
    def step(self, ids: Tensor, cache: BiMambaCache) -> Tensor:
        """Reads one token for each sequence, [B], into ``cache``; returns the next logits, [B, vocab_size]."""
        self._check_ids(ids, 1, "[B]")
        self._check_cache(ids, cache)
        hidden = self.embedding(ids)
        dtype, residual = hidden.dtype, hidden.float()
        for layer, conv, ssm in zip(self.layers, cache.conv, cache.ssm, strict=True):
            residual = residual + layer.mixer.step(layer.norm(residual, dtype), conv, ssm).float()
        cache.tokens += 1
        return self.logits(self.norm(residual, dtype))

    @staticmethod
    def _check_ids(ids: Tensor, dims: int, shape: str) -> None:
        if ids.dim() != dims or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids must be integers of shape {shape}, got {ids.dtype} {list(ids.shape)}")

    @staticmethod
    def _check_cache(ids: Tensor, cache: BiMambaCache) -> None:
        if cache.batch_size != ids.shape[0]:
            raise ValueError(f"cache holds {cache.batch_size} sequences, ids {ids.shape[0]}")
