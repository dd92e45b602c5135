"""The dynamic depthwise convolution declared to PyTorch, its filters given or projected."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlgsanet_arch.cpu.library import is_transformed
from dlgsanet_arch.ops import backends, pytorch_backend
from dlgsanet_arch.ops.declare import declare
from dlgsanet_arch.ops.plain import dynamic_dwconv_plain
from dlgsanet_arch.ops.shapes import PROJECTED, parse, sizes
from dlgsanet_arch.precision import full_precision, is_autocast


# Autocast is kept out of the backends: it would round the filters, which are float32 there.
def _projected(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> Tensor:
    with full_precision(x.device.type):
        backend = backends.choose(kernel, x, hidden, weight, bias)
        return backend.projected_forward(x, hidden, weight, bias, kernel)


def _projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with full_precision(x.device.type):
        backend = backends.choose(kernel, grad, x, hidden, weight, bias)
        return backend.projected_backward(grad, x, hidden, weight, bias, kernel)


def _given_flops(x: Any, weight: Any) -> int:
    return 2 * math.prod(x) * weight[2] ** 2


def _projection_flops(x: Any, weight: Any) -> int:
    return 2 * x[0] * x[2] * x[3] * math.prod(weight)


def _projected_flops(x: Any, hidden: Any, weight: Any, bias: Any, kernel: int) -> int:
    return 2 * math.prod(x) * kernel**2 + _projection_flops(x, weight)


def _projected_backward_flops(x: Any, hidden: Any, weight: Any, bias: Any, kernel: int) -> int:
    # The filters are projected once more; their gradient goes to `hidden` and to `weight`.
    return 4 * math.prod(x) * kernel**2 + 3 * _projection_flops(x, weight)


_dynamic_dwconv = declare(
    "dynamic_dwconv",
    pytorch_backend.forward,
    backward=pytorch_backend.backward,
    result=lambda x, _: torch.empty_like(x),
    flops=_given_flops,
)
_projected_dwconv = declare(
    "projected_dwconv",
    _projected,
    backward=_projected_backward,
    result=lambda x, *_: torch.empty_like(x),
    flops=_projected_flops,
    backward_flops=_projected_backward_flops,
)


_GIVEN, _PROJECTED = parse("weight: B G K K H W; x: B GS H W"), parse(PROJECTED)


def _require(operator: str, kernel: int, x: Tensor) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{operator} needs filters of an odd side; got {kernel}")
    if not x.is_floating_point():
        raise ValueError(f"{operator} needs a floating dtype; got {x.dtype}")


def _is_plain() -> bool:
    if torch.compiler.is_exporting():
        return True
    return not torch.compiler.is_compiling() and is_transformed()


def dynamic_dwconv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each pixel's neighbourhood with that pixel's own filter (paper, MHDLSA).

    out[b, c, y, x] = Σ_ij weight[b, g(c), i, j, y, x] · in[b, c, y + i - K//2, x + j - K//2],
    zero outside the image, with g(c) = c // (C // G). Differentiable once. Plain PyTorch on every
    device: the network calls it where its filters come from a layer that is hooked or replaced.
    While a model is exported and under torch.func, the operator becomes a short graph of plain
    operators.

    Args:
        x: (B, C, H, W), any strides; an empty tensor gives an empty result.
        weight: (B, G, K, K, H, W) in the dtype and on the device of `x`; K odd, C divisible
            by G.

    Returns:
        (B, C, H, W) in the dtype and layout of `x`; half precision is summed in float32.

    Raises:
        ValueError: For shapes, dtypes or devices that do not fit together.
    """
    _, _, kernel, *_ = sizes("dynamic_dwconv", _GIVEN, weight, x)
    _require("dynamic_dwconv", kernel, x)
    if _is_plain():
        return dynamic_dwconv_plain(x, weight)
    return _dynamic_dwconv(x, weight)


def projected_dwconv(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Convolve each pixel's neighbourhood with a filter projected from hidden features.

    `dynamic_dwconv` with the filters weight · hidden + bias, the last 1x1 convolution of the
    filter generator (paper, MHDLSA). The map of filters, K²·G values a pixel, is never in memory:
    the forward makes a few rows of it at a time, and the backward makes them once more.
    Differentiable once. Under autocast all arguments take its dtype; while a model is exported
    and under torch.func, the operator becomes a short graph of plain operators.

    Args:
        x: (B, C, H, W), any strides; an empty tensor gives an empty result.
        hidden: (B, D, H, W), any strides, in the dtype and on the device of `x`.
        weight: (G·K², D); row (g·K + i)·K + j makes tap i, j of group g. C divisible by G.
        bias: (G·K²,).
        kernel: K, odd.

    Returns:
        (B, C, H, W) in the dtype and layout of `x`; half precision is summed in float32.

    Raises:
        ValueError: For shapes, dtypes or devices that do not fit together.
    """
    device = x.device.type
    if is_autocast(device):
        dtype = torch.get_autocast_dtype(device)
        x, hidden, weight, bias = (
            each.to(dtype) if each.dtype != torch.float64 else each
            for each in (x, hidden, weight, bias)
        )
    _require("projected_dwconv", kernel, x)
    sizes("projected_dwconv", _PROJECTED, weight, bias, hidden, x, K=kernel)
    if _is_plain():
        filters = F.conv2d(hidden, weight[:, :, None, None], bias)
        return dynamic_dwconv_plain(x, filters.unflatten(1, (-1, kernel, kernel)))
    return _projected_dwconv(x, hidden, weight, bias, kernel)
