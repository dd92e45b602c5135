"""Self-attention over channels: SparseGSA (paper), and with a softmax Restormer's MDTA.

act(q̂ k̂ᵀ · temperature) v for each head, with q̂ and k̂ of unit length over the pixels. The norms
divide the small product and not the maps. Products and norms are kept in float32 or wider, since
an image's sums overflow float16.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dlgsanet_arch import cpu
from dlgsanet_arch.ops import c_backend

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "softmax": functools.partial(F.softmax, dim=-1),
}
_NORM_FLOOR = 1e-12  # under the L2 norms of q and k, as in torch.nn.functional.normalize


def attention_weights(
    product: Tensor, squares: Tensor, temperature: Tensor, activation: str
) -> Tensor:
    """Return act(q̂ k̂ᵀ · temperature) from sums over pixels.

    Args:
        product: Σ q kᵀ, (..., h, c, c).
        squares: Σ q² and Σ k², (..., 2, h, c).
        temperature: (h, 1, 1).
        activation: A key of `ACTIVATIONS`.

    Returns:
        (..., h, c, c) in the dtype of `product`.
    """
    q_norm, k_norm = squares.sqrt().clamp_min(_NORM_FLOOR).unbind(-3)
    cosines = product / (q_norm[..., :, None] * k_norm[..., None, :])
    return ACTIVATIONS[activation](cosines * temperature.to(product.dtype))


def channel_attention(qkv: Tensor, temperature: Tensor, heads: int, activation: str) -> Tensor:
    """Attend over channels with sums over the whole map.

    Args:
        qkv: (B, 3C, H, W): q, k and v, C = h·c channels each.
        temperature: (h, 1, 1).
        heads: h.
        activation: A key of `ACTIVATIONS`.

    Returns:
        (B, C, H, W) in the dtype of `qkv`.
    """
    if qkv.numel() > 0 and temperature.numel() == heads and cpu.can_run(qkv, temperature):
        return _attention(qkv, temperature, heads, activation)[0]
    q, k, v = qkv.flatten(2).unflatten(1, (3, heads, -1)).unbind(1)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    squares = torch.stack([each.square().sum(-1) for each in (q, k)], 1)
    weights = attention_weights(q @ k.mT, squares, temperature, activation)
    return (weights.to(v.dtype) @ v).flatten(1, 2).unflatten(2, qkv.shape[2:])


# ---- the operator, as PyTorch sees it


@torch.library.custom_op("dlgsanet::channel_attention", mutates_args=(), device_types="cpu")
def _attention(
    qkv: Tensor, temperature: Tensor, heads: int, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and for the backward Σ q kᵀ (B, h, c, c), and Σ q² and Σ k² (B, 2C)."""
    _require(qkv, temperature, heads, activation)
    q, k, v = qkv.chunk(3, 1)
    squares = qkv.new_empty(len(q), 2 * q.shape[1])
    product = c_backend.head_products(q, k, heads, squares)
    weights = _weights(product, squares, temperature, activation)
    out = v.new_empty(v.shape)
    c_backend.head_apply(weights, v, out)
    return out, product, squares


def _require(qkv: Tensor, temperature: Tensor, heads: int, activation: str) -> None:
    cpu.require_shapes("channel_attention", (temperature, (heads, 1, 1)))
    if qkv.dim() != 4 or qkv.shape[1] % (3 * heads) or activation not in ACTIVATIONS:
        raise ValueError(
            "channel_attention needs qkv (B, 3C, H, W) with C divisible by heads, and an activation "
            f"of {', '.join(ACTIVATIONS)}; got {tuple(qkv.shape)}, {heads=}, {activation=}"
        )


def _weights(product: Tensor, squares: Tensor, temperature: Tensor, activation: str) -> Tensor:
    heads = product.shape[1]
    return attention_weights(product, squares.unflatten(1, (2, heads, -1)), temperature, activation)


def _activation_backward(grad: Tensor, scaled: Tensor, weights: Tensor, activation: str) -> Tensor:
    """Return the gradient of what the activation was given, `scaled`, and made `weights` of."""
    if activation == "relu":
        return grad * (weights > 0)
    if activation == "sigmoid":
        return grad * weights * (1 - weights)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, scaled)
    return weights * (grad - (grad * weights).sum(-1, keepdim=True))


@torch.library.custom_op(
    "dlgsanet::channel_attention_backward", mutates_args=(), device_types="cpu"
)
def _attention_backward(
    grad: Tensor,
    qkv: Tensor,
    temperature: Tensor,
    product: Tensor,
    squares: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    heads = len(temperature)
    _require(qkv, temperature, heads, activation)
    q, k, v = qkv.chunk(3, 1)
    grad_qkv = qkv.new_empty(qkv.shape)
    # The formulas of `attention_weights` once more, with n = |q| |k|.
    norms = squares.sqrt().unflatten(1, (2, heads, -1))
    floored = norms.clamp_min(_NORM_FLOOR)
    n = floored[:, 0, :, :, None] * floored[:, 1, :, None, :]
    cosines = product / n
    scaled = cosines * temperature
    weights = ACTIVATIONS[activation](scaled)

    grad_weights = c_backend.head_products(grad, v, heads)
    grad_scaled = _activation_backward(grad_weights, scaled, weights, activation)
    grad_cosines = grad_scaled * temperature
    grad_product = grad_cosines / n
    # cos = product / (|q| |k|): d|q| = -Σ dcos cos / |q|, and dq of |q| is q / |q|.
    turns = -grad_cosines * cosines
    slopes = torch.stack([turns.sum(3), turns.sum(2)], 1) / floored.square()
    slopes = torch.where(norms >= _NORM_FLOOR, slopes, 0)
    # (q; k) gets [[diag, grad_product], [grad_productᵀ, diag]] (q; k).
    c = product.shape[-1]
    both = product.new_empty(len(product), heads, 2 * c, 2 * c)
    both[..., :c, :c] = torch.diag_embed(slopes[:, 0])
    both[..., :c, c:] = grad_product
    both[..., c:, :c] = grad_product.mT
    both[..., c:, c:] = torch.diag_embed(slopes[:, 1])
    channels = q.shape[1]
    c_backend.head_apply(both, qkv[:, : 2 * channels], grad_qkv[:, : 2 * channels], maps=2)
    c_backend.head_apply(weights.mT, grad, grad_qkv[:, 2 * channels :])
    return grad_qkv, (grad_scaled * cosines).sum((0, 2, 3)).view_as(temperature)


@_attention.register_fake
def _(
    qkv: Tensor, temperature: Tensor, heads: int, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = qkv.shape[0], qkv.shape[1] // 3
    share = channels // heads
    return (
        qkv.new_empty(batch, channels, *qkv.shape[2:]),
        qkv.new_empty(batch, heads, share, share),
        qkv.new_empty(batch, 2 * channels),
    )


@_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, temperature: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), temperature.new_empty(temperature.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, temperature, _, ctx.activation = inputs
    _, product, squares = output
    ctx.save_for_backward(qkv, temperature, product, squares)
    ctx.mark_non_differentiable(product, squares)


def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.activation), None, None


_attention.register_autograd(_gradients, setup_context=_save)


# Two products of c multiply-adds for each channel and pixel; the backward has twice as many.
def _flops(qkv: Any, temperature: Any) -> int:
    batch, channels, height, width = qkv
    return 2 * 2 * batch * height * width * (channels // 3) * (channels // 3 // temperature[0])


@register_flop_formula(torch.ops.dlgsanet.channel_attention)
def _forward_flops(qkv: Any, temperature: Any, *_: Any, **__: Any) -> int:
    return _flops(qkv, temperature)


@register_flop_formula(torch.ops.dlgsanet.channel_attention_backward)
def _backward_flops(grad: Any, qkv: Any, temperature: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(qkv, temperature)
