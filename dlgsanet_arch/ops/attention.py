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
from dlgsanet_arch.ops.shapes import Pattern, sizes
from dlgsanet_arch.precision import widened

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "softmax": functools.partial(F.softmax, dim=-1),
}
_NORM_FLOOR = 1e-12  # under the L2 norms of q and k, as in torch.nn.functional.normalize
_QKV = Pattern("qkv: B 3hc H W")


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

    Raises:
        ValueError: For shapes that do not fit together, or another activation.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"channel_attention needs an activation of {known}; got {activation!r}")
    _, share, *_ = sizes("channel_attention", _QKV, qkv, h=heads)
    if temperature.shape != (heads, 1, 1):
        got = tuple(temperature.shape)
        raise ValueError(f"channel_attention needs a temperature ({heads}, 1, 1); got {got}")
    qk, v = qkv.split([2 * heads * share, heads * share], 1)
    in_c = cpu.can_run(qkv, temperature)
    product, squares = _head_sums(qk, heads) if in_c else _sums(qk, heads)
    weights = attention_weights(product, squares.unflatten(1, (2, heads)), temperature, activation)
    if in_c:
        return _head_apply(weights, v)
    v = v.flatten(2).unflatten(1, (heads, share))
    return (weights.to(v.dtype) @ v).flatten(1, 2).unflatten(2, qkv.shape[2:])


def _sums(qk: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return Σ q kᵀ (B, h, c, c), and Σ q² and Σ k² (B, 2h, c), of qk (B, 2·h·c, H, W)."""
    qk = qk.to(widened(qk.dtype)).flatten(2).unflatten(1, (2 * heads, -1))
    q, k = qk.chunk(2, 1)
    return q @ k.mT, qk.square().sum(-1)


def _flops(maps: Any, share: int) -> int:
    """Count c multiply-adds for each channel and pixel of these maps."""
    batch, channels, height, width = maps
    return 2 * batch * height * width * channels * share


_head_sums = declare(
    "head_sums",
    c_backend.head_sums,
    c_backend.head_sums_backward,
    result=lambda qk, heads: (
        qk.new_empty(len(qk), heads, qk.shape[1] // 2 // heads, qk.shape[1] // 2 // heads),
        qk.new_empty(len(qk), 2 * heads, qk.shape[1] // 2 // heads),
    ),
    flops=lambda qk, heads: _flops(qk, qk[1] // 2 // heads) // 2,
    key="CPU",
)
_head_apply = declare(
    "head_apply",
    c_backend.head_apply,
    c_backend.head_apply_backward,
    result=lambda matrices, x: x.new_empty(x.shape),
    flops=lambda matrices, x: _flops(x, matrices[2]),
    key="CPU",
)
