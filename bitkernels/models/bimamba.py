"""A thin Bi-Mamba: the Mamba-2 language model with binary or ternary projections, embedding and head.

Each layer is ``residual + mixer(norm(residual))`` with the residual in fp32; the mixer is in_proj, a
causal convolution over x, B and C, the SSD scan, a gated RMSNorm, and out_proj.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitkernels import (
    add_rms_norm,
    causal_conv1d_step,
    dense_linear,
    head_step,
    mamba2_in_step,
    mamba2_mixer,
    mamba2_out_step,
    mamba2_prompt,
    mamba2_stack_step,
    mamba2_step,
    rms_norm,
    ssd_step,
)
from bitkernels.dense_linear import torch_is_slow
from bitkernels.mamba2_mixer import gated_mixer
from bitkernels.mamba2_prompt import moved_on
from bitkernels.mamba2_step import one_product
from bitkernels.models.config import BiMambaConfig
from bitkernels.nn import BitEmbedding, BitLinear, FBILinear, Int8Embedding, PackedLinear
from bitkernels.nn.common import activation_dtype
from bitkernels.nn.convert import empty_packed_

if TYPE_CHECKING:
    from bitkernels.inference import SamplingParams

_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 0.1, 1e-4
_A_RANGE = (1.0, 16.0)
_EMBEDDING_STD = 0.02
# Up to which dense_linear is faster than torch's product with the head on a CPU.
_FEW_TOKENS = 8
# Sets the keys of a request's layers apart; any odd number far from those that users choose.
_LAYER_SEED = 0x9E3779B97F4A7


@dataclass
class BiMambaCache:
    """What generation remembers: per position in the stack the last inputs of the convolution and the SSM state.

    Its size does not depend on how many tokens it has seen. Updated in place by ``prefill`` and ``step``.
    """

    conv: Tensor  # [n_layer, B, d_conv - 1, channels]
    ssm: Tensor  # [n_layer, B, H, P, N]
    tokens: int = 0

    @property
    def batch_size(self) -> int:
        return self.ssm.shape[1]

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.ssm.nbytes


class Slots(NamedTuple):
    """Which states of a cache a step's tokens belong to; int64 [B] each."""

    indices: Tensor  # distinct; a negative one is padding: it changes no state but the spare one of the convolution
    seed: Tensor | None = None  # with position: 16-bit states are rounded stochastically, as in ssd_step
    position: Tensor | None = None

    def of_layers(self, count: int) -> "list[Slots]":
        """Seeds differ from layer to layer. Made at once: a kernel between two layers costs more than its time."""
        if self.seed is None:
            return [self] * count
        seeds = self.seed + _LAYER_SEED * torch.arange(count, device=self.seed.device)[:, None]
        return [self._replace(seed=seed) for seed in seeds]


class Packed(NamedTuple):
    """Pieces of S sequences that are read at once: the rows of a batch where all are of one length, else one row.

    In one row the first may continue a sequence that was read before; the others start.
    """

    slots: Tensor  # int64 [S], the states of the cache; those of sequences that start are zero
    states: Tensor | slice  # the same, as a slice where they follow each other: a view then, not a copy
    # What follows is None where the pieces are rows.
    cu_seqlens: Tensor | None = None  # int32 [S + 1]
    # The last W - 1 inputs of the convolution: where in the row they are, or in what was there before.
    new: Tensor | None = None  # int64 [S, W - 1]
    old: Tensor | None = None  # int64 [S, W - 1, 1]
    is_old: Tensor | None = None  # bool [S, W - 1, 1]

    @classmethod
    def of(cls, lengths: Sequence[int], slots: Sequence[int], d_conv: int, device: torch.device) -> "Packed":
        """Pieces of ``lengths`` tokens each."""
        indices = to_device(torch.tensor(slots), device)
        states = consecutive(slots) or indices
        if len(set(lengths)) == 1:
            return cls(indices, states)
        counts, width = torch.tensor(lengths), d_conv - 1
        ends = counts.cumsum(0)
        # Of W - 1 + length inputs the last W - 1.
        offset = torch.arange(width) + counts[:, None]
        host = (
            F.pad(ends, (1, 0)).int(),
            (offset - width + (ends - counts)[:, None]).clamp(min=0),
            offset.clamp(max=max(width - 1, 0))[..., None],
            (offset < width)[..., None],
        )
        return cls(indices, states, *(to_device(tensor, device) for tensor in host))

    def rows(self, tokens: Tensor) -> Tensor:
        """The tokens of all pieces, one after another, as they are read: [S, T] or [1, T]."""
        return tokens[None] if self.cu_seqlens is not None else tokens.view(len(self.slots), -1)

    def last(self, hidden: Tensor) -> Tensor:
        """Of what was computed for ``rows`` that of each piece's last token, [S, ...]."""
        return hidden[:, -1] if self.cu_seqlens is None else hidden[0, self.cu_seqlens[1:] - 1]

    def conv_states(self, states: Tensor, xbc: Tensor) -> Tensor:
        """``states`` [S, W - 1, C] moved on by each piece's part of ``xbc`` [S, T, C] or [1, T, C]."""
        if self.cu_seqlens is None:
            return moved_on(states, xbc)
        read = xbc[0, self.new].to(states.dtype)
        return torch.where(self.is_old, states.gather(1, self.old.expand_as(states)), read)


def store(states: Tensor, where: Tensor | slice, new: Tensor) -> None:
    """``states[where] = new``, of any two types."""
    if isinstance(where, slice):
        states[where].copy_(new)  # casts as it copies
    else:
        states[where] = new.to(states.dtype)


def consecutive(slots: Sequence[int]) -> slice | None:
    """Slots that follow each other as a slice, by which indexing makes a view."""
    whole = slice(slots[0], slots[0] + len(slots))
    return whole if list(slots) == list(range(whole.start, whole.stop)) else None


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a small tensor for which nothing waits."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class RMSNorm(nn.Module):
    """RMSNorm of the fp32 residual; the result takes the type of ``dtype``."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).to(dtype)

    def after(self, residual: Tensor | None, branch: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The residual with a block's output, and its norm; None is the residual before the first, and an output that
        the residual has already."""
        if branch is None:
            return residual, rms_norm(residual, self.weight, self.eps, dtype)
        return add_rms_norm(residual, branch, self.weight, self.eps, dtype)


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
        self._kept_A = (None, None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.A_log.is_meta:  # where it would import torch's compiler
            return
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

    def kept_A(self) -> Tensor:
        """``A`` without a gradient, made again only when ``A_log`` may have changed: a step has no time for it.

        It stays in its memory, from which graphs of steps read it.
        """
        A_log = self._parameters["A_log"]
        # Fused optimisers and replays of graphs count no version.
        key = None if self.training or A_log.is_inference() else (A_log.data_ptr(), A_log._version)
        if key is None or self._kept_A[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                A, kept = self.A, self._kept_A[1]
                self._kept_A = key, A if kept is None or kept.device != A.device else kept.copy_(A)
        return self._kept_A[1]

    def train(self, mode: bool = True) -> "Mixer":
        self._kept_A = (None, self._kept_A[1])
        return super().train(mode)

    def forward(
        self,
        hidden: Tensor,  # [B, T, d_model]
        seq_idx: Tensor | None = None,  # int [B, T]
        conv_state: Tensor | None = None,  # [B, d_conv - 1, channels], updated in place
        ssm_state: Tensor | None = None,  # [B, H, P, N], updated in place
        packed: Packed | None = None,  # what hidden holds; states are those of all slots
    ) -> Tensor:
        projected, config = self.in_proj(hidden), self.config
        states, initial_conv, initial_ssm, cu_seqlens = self._initial(conv_state, ssm_state, packed)
        A = self.A if conv_state is None else self.kept_A()
        y, final = mamba2_mixer(
            projected, self.conv_weight, self.conv_bias, self.dt_bias, A, self.D, self.norm_weight, initial_conv,
            initial_ssm, seq_idx, cu_seqlens, config.ngroups, config.chunk_size, norm_eps=config.norm_eps,
            return_final_states=True,
        )  # fmt: skip
        if conv_state is not None:
            self._store(projected, conv_state, ssm_state, packed, states, initial_conv, final)
        return self.out_proj(y)

    def add_(
        self,
        residual: Tensor,  # fp32 [B, T, d_model], updated in place
        norm: RMSNorm,  # that goes before
        dtype: torch.dtype,  # of the activations
        conv_state: Tensor,  # as of forward, and what follows
        ssm_state: Tensor,
        packed: Packed | None = None,
    ) -> None:
        """``residual += self(norm(residual))``, norms and sum within the products: see ``one_product``."""
        of, config, into = self._parameters, self.config, self.in_proj.packed()
        if packed is None or (packed.cu_seqlens is None and isinstance(packed.states, slice)):
            whose = slice(None) if packed is None else packed.states
            mamba2_prompt(
                residual, norm.weight, *into, conv_state[whose], of["conv_weight"], of["conv_bias"], ssm_state[whose],
                self.kept_A(), of["D"], of["dt_bias"], of["norm_weight"], *self.out_proj.packed(), dtype, norm.eps,
                config.norm_eps,
            )  # fmt: skip
            return
        rows, (w_packed, alpha, beta, bias) = residual.view(-1, residual.shape[-1]), into
        projected = mamba2_in_step(rows, norm.weight, w_packed, alpha, beta, None, None, None, 0, dtype, bias, norm.eps)
        projected = projected.view(*residual.shape[:-1], -1)
        states, initial_conv, initial_ssm, cu_seqlens = self._initial(conv_state, ssm_state, packed)
        y, final = gated_mixer(
            projected, of["conv_weight"], of["conv_bias"], of["dt_bias"], self.kept_A(), of["D"], initial_conv,
            initial_ssm, cu_seqlens, config.ngroups, config.chunk_size,
        )  # fmt: skip
        self._store(projected, conv_state, ssm_state, packed, states, initial_conv, final)
        y = y.view(-1, y.shape[-1])
        mamba2_out_step(rows, y, of["norm_weight"], *self.out_proj.packed(), config.norm_eps)

    def can_add(self, tokens: int, dtype: torch.dtype) -> bool:
        packs = isinstance(self.in_proj, PackedLinear) and isinstance(self.out_proj, PackedLinear)
        return packs and one_product(tokens, dtype, self.A_log.device)

    @staticmethod
    def _initial(conv_state: Tensor | None, ssm_state: Tensor | None, packed: Packed | None):
        """Whose the states are, the states, and where sequences end."""
        if packed is None:
            return slice(None), conv_state, ssm_state, None
        return packed.states, conv_state[packed.states], ssm_state[packed.states], packed.cu_seqlens

    def _store(self, projected, conv_state, ssm_state, packed, states, initial_conv, final) -> None:
        xbc = self._split(projected)[1]
        store(conv_state, states, (moved_on if packed is None else packed.conv_states)(initial_conv, xbc))
        store(ssm_state, states, final)


class Layer(nn.Module):
    def __init__(self, config: BiMambaConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config)

    def read(
        self,
        residual: Tensor | None,  # fp32 [B, T, d_model], updated in place; None before the first layer
        branch: Tensor | None,  # [B, T, d_model] that is still to be added to it, if any
        dtype: torch.dtype,
        *states,  # conv_state, ssm_state and packed of the mixer
    ) -> tuple[Tensor, Tensor | None]:
        """Many tokens, without a gradient: residual and branch after this layer."""
        known = residual if branch is None else branch
        tokens = known.numel() // known.shape[-1]
        if self.mixer.can_add(tokens, dtype):
            if branch is not None:
                residual = branch.float() if residual is None else residual.add_(branch)
            self.mixer.add_(residual, self.norm, dtype, *states)
            return residual, None
        residual, normed = self.norm.after(residual, branch, dtype)
        return residual, self.mixer(normed, None, *states)

    def step(
        self,
        residual: Tensor,  # fp32 [B, d_model]; may be updated in place
        dtype: torch.dtype,  # of the activations
        conv_state: Tensor,  # [B, d_conv - 1, channels], updated in place
        ssm_state: Tensor,  # [B, H, P, N], updated in place
        slots: Slots | None = None,
    ) -> Tensor:
        """One token: the residual after this layer. ``slots`` says whose the states are."""
        mixer, config = self.mixer, self.mixer.config
        indices, seed, position = slots or (None, None, None)
        into, out = mixer.in_proj, mixer.out_proj
        if isinstance(into, PackedLinear) and isinstance(out, PackedLinear):
            of = mixer._parameters  # as attributes they would take longer than the call, on a CPU
            mamba2_step(
                residual, self.norm.weight, *into.packed(), conv_state, of["conv_weight"], of["conv_bias"], ssm_state,
                mixer.kept_A(), of["D"], of["dt_bias"], of["norm_weight"], *out.packed(), dtype, self.norm.eps,
                config.norm_eps, indices, seed, position,
            )  # fmt: skip
            return residual
        projected = self._step_in(residual, dtype, conv_state, indices)
        z, xbc, dt = mixer._split(projected)
        x, B, C = mixer._split_conv(xbc)
        y = ssd_step(
            ssm_state, x, dt, mixer.kept_A(), B, C, D=mixer.D, z=z.unflatten(-1, x.shape[1:]), dt_bias=mixer.dt_bias,
            dt_softplus=True, state_indices=indices, seed=seed, position=position,
        ).flatten(-2)  # fmt: skip
        y = F.rms_norm(y, y.shape[-1:], mixer.norm_weight.to(y.dtype), config.norm_eps)
        return residual + out(y).float()

    def _step_in(self, residual: Tensor, dtype: torch.dtype, conv_state: Tensor, indices: Tensor | None) -> Tensor:
        """The input projection with x, B and C convolved, [B, d_in_proj]."""
        mixer, proj, start = self.mixer, self.mixer.in_proj, self.mixer.config.d_inner
        if isinstance(proj, PackedLinear):
            return mamba2_in_step(
                residual, self.norm.weight, proj.w_packed, proj.alpha, proj.beta, conv_state, mixer.conv_weight,
                mixer.conv_bias, start, dtype, proj.bias, self.norm.eps, indices,
            )  # fmt: skip
        projected = proj(self.norm(residual, dtype))
        xbc = projected[:, start : start + mixer.config.d_conv_channels]
        own = conv_state if indices is None else conv_state[indices]
        xbc.copy_(causal_conv1d_step(own, xbc, mixer.conv_weight.to(xbc.dtype), mixer.conv_bias.to(xbc.dtype)))
        if indices is not None:
            conv_state[indices] = own
        return projected


class Stack(nn.ModuleList):
    """The layers of a model. It holds each once, and iterates over the positions: a shared layer comes again."""

    def __init__(self, config: BiMambaConfig):
        super().__init__()
        self.order = config.layer_order
        for i in range(max(self.order) + 1):
            self.add_module(str(i), Layer(config))

    def __iter__(self) -> Iterator[Layer]:
        return iter([self._modules[str(i)] for i in self.order])

    def __len__(self) -> int:
        return len(self.order)

    def step_parameters(self) -> list[tuple[Tensor | None, ...]] | None:
        """Of every position, those of ``mamba2_stack_step``; None where a projection is not packed."""
        mixers = [layer.mixer for layer in self]
        if not all(isinstance(p, PackedLinear) for m in mixers for p in (m.in_proj, m.out_proj)):
            return None
        return [
            (layer.norm.weight, *m.in_proj.packed(), m.conv_weight, m.conv_bias, m.kept_A(), m.D, m.dt_bias,
             m.norm_weight, *m.out_proj.packed())
            for layer, m in zip(self, mixers, strict=True)
        ]  # fmt: skip

    def __getitem__(self, position: int) -> Layer:
        return self._modules[str(self.order[position])]


class _Uninitialised(TorchFunctionMode):
    """Skips ``torch.nn.init``, which on the meta device imports torch's compiler, and that takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class BiMambaForCausalLM(nn.Module):
    """Token ids to next-token logits.

    Layers that share weights have states of their own: a cache has one state for each position of the stack.
    """

    def __init__(self, config: BiMambaConfig):
        super().__init__()
        self.config = config
        rounded = Int8Embedding if config.int8_embedding else BitEmbedding if config.ternary_embedding else None
        self.embedding = (rounded or nn.Embedding)(config.vocab_size, config.d_model)
        if not config.int8_embedding:
            nn.init.normal_(self.embedding.weight, std=_EMBEDDING_STD)
        self.layers = Stack(config)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None
        if not config.tie_embeddings:
            head = BitLinear if config.ternary_head else nn.Linear
            self.head = head(config.d_model, config.vocab_size, bias=False)

    def set_config_(self, config: BiMambaConfig) -> None:
        """Says what the model is now, after its layers were replaced."""
        self.config = config
        for layer in self.layers:
            layer.mixer.config = config

    @classmethod
    def on_meta(cls, config: BiMambaConfig, packed: bool = False) -> "BiMambaForCausalLM":
        """A model without memory, packed or latent, to load a checkpoint into or to plan with."""
        with torch.device("meta"), _Uninitialised():
            model = cls(config)
        return empty_packed_(model) if packed else model

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def activation_dtype(self) -> torch.dtype:
        """The type of the embedding's output, and so of what passes between the layers' fp32 residuals."""
        embedding = self.embedding
        if isinstance(embedding, nn.Embedding):
            return embedding.weight.dtype
        return embedding.out_dtype or embedding.norm_weight.dtype

    def set_activation_dtype_(self, dtype: torch.dtype) -> "BiMambaForCausalLM":
        """Casts embedding, head and full-precision projections, and with them the activations; what is low-bit, norms,
        scales and SSM parameters keep their types."""
        for module in self._dense().values():
            module.to(dtype)
        if not isinstance(self.embedding, nn.Embedding):
            self.embedding.out_dtype = dtype
        return self

    def round_embedding_(self) -> "BiMambaForCausalLM":
        """Rounds a tied embedding to int8, for inference: half the bytes that a decode step reads as its head."""
        if self.head is not None or not isinstance(self.embedding, nn.Embedding):
            raise ValueError("round_embedding_: the embedding must be full-precision and tied to the head")
        self.embedding = Int8Embedding.from_embedding(self.embedding)
        self.set_config_(self.config.replace(int8_embedding=True))
        return self

    def _dense(self) -> dict[str, nn.Module]:
        return {name: m for name, m in self.named_modules() if isinstance(m, nn.Embedding | nn.Linear)}

    @property
    def dense_weights(self) -> list[str]:
        """The names of the full-precision matrices, which are stored in 16 bits when the others are packed."""
        return [f"{name}.weight" for name in self._dense()]

    def new_cache(self, batch_size: int, dtype: torch.dtype = torch.float32, padding: bool = False) -> BiMambaCache:
        """The zero state of ``batch_size`` sequences; ``padding`` adds the spare row that padded slots need."""
        c = self.config
        conv = (c.n_layer, batch_size + padding, c.d_conv - 1, c.d_conv_channels)
        ssm = (c.n_layer, batch_size, c.nheads, c.headdim, c.d_state)
        return BiMambaCache(*(torch.zeros(shape, dtype=dtype, device=self.device) for shape in (conv, ssm)))

    def hidden_states(self, ids: Tensor, seq_idx: Tensor | None = None, cache: BiMambaCache | None = None) -> Tensor:
        """[B, T] -> the normalised output of the last layer, [B, T, d_model]."""
        residual, branch = None, self.embedding(ids)
        dtype = activation_dtype(branch)
        for i, layer in enumerate(self.layers):
            if cache is not None:
                residual, branch = layer.read(residual, branch, dtype, cache.conv[i], cache.ssm[i])
                continue
            residual, normed = layer.norm.after(residual, branch, dtype)
            branch = layer.mixer(normed, seq_idx)
        return self.norm.after(residual, branch, dtype)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(hidden)
        if isinstance(self.embedding, Int8Embedding):
            return self.embedding.logits(hidden)
        return F.linear(hidden, self.embedding.weight)

    def next_logits(self, hidden: Tensor) -> Tensor:
        """``logits`` of a few tokens [B, d_model], without a gradient."""
        head = self.embedding if self.head is None else self.head
        few = hidden.shape[0] <= _FEW_TOKENS or torch_is_slow(hidden)
        few = few and isinstance(head, nn.Embedding | nn.Linear)
        return dense_linear(hidden, head.weight) if few else self.logits(hidden)

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
        return self.next_logits(hidden[:, -1])

    @torch.no_grad()
    def prefill_packed(self, ids: Tensor, packed: Packed, cache: BiMambaCache) -> Tensor:
        """Reads pieces of S sequences, int [tokens], into their slots; returns the logits after each, [S, V]."""
        residual, branch = None, self.embedding(packed.rows(ids))
        dtype = branch.dtype
        for layer, conv, ssm in zip(self.layers, cache.conv, cache.ssm, strict=True):
            residual, branch = layer.read(residual, branch, dtype, conv, ssm, packed)
        residual = packed.last(residual)
        return self._logits_after(residual if branch is None else residual + packed.last(branch), dtype)

    @torch.no_grad()
    def step(self, ids: Tensor, cache: BiMambaCache, slots: Slots | None = None) -> Tensor:
        """Reads one token for each sequence, [B], into ``cache``; returns the next logits, [B, vocab_size].

        ``slots`` says which sequences of the cache those are, where they are not all of it in order.
        """
        self._check_ids(ids, 1, "[B]")
        if slots is None:
            self._check_cache(ids, cache)
        hidden = self.embedding(ids)
        dtype, residual = hidden.dtype, hidden.float()
        residual = self._step_layers(residual, dtype, cache, slots)
        cache.tokens += 1
        return self._logits_after(residual, dtype)

    def _logits_after(self, residual: Tensor, dtype: torch.dtype) -> Tensor:
        """``next_logits`` of the norm of the last residual, [B, d_model]."""
        head = self.embedding if self.head is None else self.head
        if residual.is_cuda and isinstance(head, nn.Embedding | nn.Linear) and head.weight.dtype == dtype:
            return head_step(residual, self.norm.weight, head.weight, self.norm.eps)
        return self.next_logits(self.norm(residual, dtype))

    def _step_layers(self, residual: Tensor, dtype: torch.dtype, cache: BiMambaCache, slots: Slots | None) -> Tensor:
        # On a CPU the stack's step is that of its layers.
        rounds_to_nearest = slots is None or slots.seed is None
        parameters = self.layers.step_parameters() if residual.is_cuda and rounds_to_nearest else None
        if parameters is not None:
            eps, indices = self.config.norm_eps, slots and slots.indices
            mamba2_stack_step(residual, parameters, cache.conv, cache.ssm, dtype, eps, eps, indices)
            return residual
        each = slots.of_layers(len(self.layers)) if slots else [None] * len(self.layers)
        for layer, conv, ssm, own in zip(self.layers, cache.conv, cache.ssm, each, strict=True):
            residual = layer.step(residual, dtype, conv, ssm, own)
        return residual

    def stream(
        self,
        prompts: Tensor | Sequence[Sequence[int] | Tensor],  # int [B, T], or B prompts of any lengths
        sampling: "SamplingParams | Sequence[SamplingParams] | None" = None,
        **options,
    ) -> Iterator[tuple[int, int]]:
        """Yields (index of the prompt, its next token) as tokens come.

        ``sampling`` is for all prompts or a list of one for each; ``options`` are fields of ``SamplingParams`` where it
        is not given, and arguments of ``Engine``.
        """
        from bitkernels.inference.generate import stream

        return stream(self, prompts, sampling, **options)

    def generate(
        self,
        prompts: Tensor | Sequence[Sequence[int] | Tensor],
        sampling: "SamplingParams | Sequence[SamplingParams] | None" = None,
        **options,
    ) -> list[list[int]]:
        """The new tokens of each prompt; arguments as of ``stream``."""
        from bitkernels.inference.generate import generate

        return generate(self, prompts, sampling, **options)

    @staticmethod
    def _check_ids(ids: Tensor, dims: int, shape: str) -> None:
        if ids.dim() != dims or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids must be integers of shape {shape}, got {ids.dtype} {list(ids.shape)}")

    @staticmethod
    def _check_cache(ids: Tensor, cache: BiMambaCache) -> None:
        if cache.batch_size != ids.shape[0]:
            raise ValueError(f"cache holds {cache.batch_size} sequences, ids {ids.shape[0]}")
