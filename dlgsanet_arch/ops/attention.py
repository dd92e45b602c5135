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

from dlgsanet_arch import cpu
from dlgsanet_arch.ops import c_backend
from dlgsanet_arch.ops.declare import declare
from dlgsanet_arch.ops.shapes import parse, sizes
from dlgsanet_arch.precision import widened

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
    # Before the root, whose slope at 0 is infinite.
    q_norm, k_norm = squares.clamp_min(_NORM_FLOOR**2).sqrt().unbind(-3)
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
    q, k = q.to(widened(q.dtype)), k.to(widened(k.dtype))
    squares = torch.stack([each.square().sum(-1) for each in (q, k)], 1)
    weights = attention_weights(q @ k.mT, squares, temperature, activation)
    return (weights.to(v.dtype) @ v).flatten(1, 2).unflatten(2, qkv.shape[2:])


def _forward(
    qkv: Tensor, temperature: Tensor, heads: int, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and for the backward Σ q kᵀ (B, h, c, c), and Σ q² and Σ k² (B, 2C)."""
    _sizes(qkv, temperature, heads, activation)
    q, k, v = qkv.chunk(3, 1)
    squares = qkv.new_empty(len(q), 2 * q.shape[1])
    product = c_backend.head_products(q, k, heads, squares)
    by_head = squares.unflatten(1, (2, heads, -1))
    out = v.new_empty(v.shape)
    c_backend.head_apply(attention_weights(product, by_head, temperature, activation), v, out)
    return out, product, squares


_FORWARD = parse("qkv: B 3hc H W; temperature: h 1 1")
_BACKWARD = parse("qkv: B 3hc H W; grad: B hc H W; product: B h c c; squares: B 2hc")


def _sizes(qkv: Tensor, temperature: Tensor, heads: int, activation: str) -> list[int]:
    """Return B, c, H and W, and refuse what does not fit."""
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"channel_attention needs an activation of {known}; got {activation!r}")
    return sizes("channel_attention", _FORWARD, qkv, temperature, h=heads)


def _activation_backward(grad: Tensor, scaled: Tensor, weights: Tensor, activation: str) -> Tensor:
    """Return the gradient of what the activation was given, `scaled`, and made `weights` of."""
    if activation == "relu":
        return grad * (weights > 0)
    if activation == "sigmoid":
        return grad * weights * (1 - weights)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, scaled)
    return weights * (grad - (grad * weights).sum(-1, keepdim=True))


def _backward(
    grad: Tensor,
    qkv: Tensor,
    temperature: Tensor,
    heads: int,
    activation: str,
    product: Tensor,
    squares: Tensor,
) -> tuple[Tensor, Tensor]:
    _, share, *_ = _sizes(qkv, temperature, heads, activation)
    sizes("channel_attention_backward", _BACKWARD, qkv, grad, product, squares, h=heads)
    channels = heads * share
    qk, v = qkv.split([2 * channels, channels], 1)
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_qk, grad_v = grad_qkv.split([2 * channels, channels], 1)
    # The formulas of `attention_weights` once more, with lengths |q| |k|.
    norms = squares.sqrt().unflatten(1, (2, heads, -1))
    floored = norms.clamp_min(_NORM_FLOOR)
    lengths = floored[:, 0, :, :, None] * floored[:, 1, :, None, :]
    cosines = product / lengths
    scaled = cosines * temperature
    weights = ACTIVATIONS[activation](scaled)

    grad_weights = c_backend.head_products(grad, v, heads)
    grad_scaled = _activation_backward(grad_weights, scaled, weights, activation)
    grad_cosines = grad_scaled * temperature
    # cos = product / (|q| |k|), so that |q| gets -Σ cos / |q|, and q of |q| gets q / |q|.
    turns = -grad_cosines * cosines
    slopes = torch.stack([turns.sum(3), turns.sum(2)], 1) / floored.square()
    slopes = torch.where(norms >= _NORM_FLOOR, slopes, 0)
    # (q; k) gets [[diag, grad_product], [grad_productᵀ, diag]] (q; k).
    both = torch.diag_embed(slopes.transpose(1, 2).flatten(2))
    both[..., :share, share:] = grad_cosines / lengths
    both[..., share:, :share] = (grad_cosines / lengths).mT
    c_backend.head_apply(both, qk, grad_qk, maps=2)
    c_backend.head_apply(weights.mT, grad, grad_v)
    if not qkv.is_contiguous():
        grad_qkv = torch.empty_like(qkv).copy_(grad_qkv)
    return grad_qkv, (grad_scaled * cosines).sum((0, 2, 3)).view(heads, 1, 1)


def _result(
    qkv: Tensor, temperature: Tensor, heads: int, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    channels = qkv.shape[1] // 3
    return (
        qkv.new_empty(len(qkv), channels, *qkv.shape[2:]),
        qkv.new_empty(len(qkv), heads, channels // heads, channels // heads),
        qkv.new_empty(len(qkv), 2 * channels),
    )


def _flops(qkv: Any, temperature: Any, heads: int, activation: str) -> int:
    """Count two products of c multiply-adds for each channel and pixel."""
    batch, channels, height, width = qkv
    return 2 * 2 * batch * height * width * (channels // 3) * (channels // 3 // heads)


_attention = declare(
    "channel_attention",
    _forward,
    backward=_backward,
    result=_result,
    flops=_flops,
    device_types="cpu",
)
