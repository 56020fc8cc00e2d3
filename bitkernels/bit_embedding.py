"""``bit_embedding``: Slender-Mamba's ternary embedding in training."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels.quantize_int8 import fake_quantize_int8
from bitkernels.ternary_linear_ste import ternary_scale


def bit_embedding(ids: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-6) -> Tensor:
    """BitEmbedding (Slender-Mamba, section 3.3): ternary table, lookup, LayerNorm, int8 per token.

    The gradient of both quantisations is the identity. Only the rows looked up are quantised; the
    scale ``max(mean|W|, 1e-5)`` is the whole table's.

    Args:
        ids: int32 or int64 [...], token indices in [0, V).
        weight: [V, K] latent table, float32, bfloat16 or float16.
        norm_weight: [K], LayerNorm's gain.
        norm_bias: [K], LayerNorm's shift.
        eps: LayerNorm's epsilon.

    Returns:
        [..., K] in the table's dtype, values on the int8 grid of each token.

    Raises:
        ValueError: an argument's dtype or shape does not fit; the message names it.
        IndexError: an id out of range (on the CPU; CUDA reports a device-side assertion).
    """
    return torch.ops.bitkernels.bit_embedding(ids, weight, norm_weight, norm_bias, eps)


def _ternary_rows(ids: Tensor, weight: Tensor) -> Tensor:
    scale = ternary_scale(weight).to(weight.dtype)
    rows = F.embedding(ids, weight)
    return (rows * (1.0 / scale)).round().clamp(-1, 1) * scale


@torch.library.impl("bitkernels::bit_embedding", "CompositeExplicitAutograd")
def _(ids, weight, norm_weight, norm_bias, eps=1e-6):
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"bit_embedding: ids must be int32 or int64, got {ids.dtype}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"bit_embedding: weight must be a floating-point [V, K], got {weight.dtype} {list(weight.shape)}"
        )
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if t.shape != weight.shape[1:]:
            raise ValueError(f"bit_embedding: {name} must be [{weight.shape[1]}], got {list(t.shape)}")
    y = F.layer_norm(_ternary_rows(ids, weight), (weight.shape[1],), norm_weight, norm_bias, eps)
    return fake_quantize_int8(y)


@torch.library.register_fake("bitkernels::bit_embedding")
def _(ids, weight, norm_weight, norm_bias, eps=1e-6):
    return weight.new_empty(*ids.shape, weight.shape[1])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    ids, weight, norm_weight, norm_bias = ctx.saved_tensors
    shape = [weight.shape[1]]
    rows = _ternary_rows(ids, weight)
    _, mean, rstd = torch.ops.aten.native_layer_norm(rows, shape, norm_weight, norm_bias, ctx.eps)
    drows, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        grad, rows, shape, mean, rstd, norm_weight, norm_bias, [True, True, True]
    )
    dweight = torch.ops.aten.embedding_dense_backward(drows, ids, weight.shape[0], -1, False)
    return None, dweight, dnorm_weight, dnorm_bias, None


torch.library.register_autograd("bitkernels::bit_embedding", _backward, setup_context=_setup_context)
