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
from dlgsanet_arch.precision import AUTOCAST_DEVICES, full_precision


def _given(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x) if x.numel() == 0 else pytorch_backend.forward(x, weight)


def _given_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight)
    return pytorch_backend.backward(grad, x, weight)


# Autocast is kept out of the backends: it would round the filters, which are float32 there.
def _projected(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    with full_precision(x.device.type):
        backend = backends.choose(kernel, x, hidden, weight, bias)
        return backend.projected_forward(x, hidden, weight, bias, kernel)


def _projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return tuple(torch.zeros_like(each) for each in (x, hidden, weight, bias))
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
    _given,
    backward=_given_backward,
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


def _refuse(problem: str, **tensors: Tensor) -> None:
    got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    raise ValueError(f"{problem}; got {got}")


def _require_one_kind(**tensors: Tensor) -> None:
    """Refuse dtypes and devices that differ."""
    first, *others = tensors.values()
    if not first.is_floating_point() or any(each.dtype != first.dtype for each in others):
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise ValueError(f"all must have one floating dtype; got {dtypes}")
    if any(each.device != first.device for each in others):
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all must be on one device; got {devices}")


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
    if x.dim() != 4 or weight.dim() != 6:
        _refuse("x must be (B, C, H, W) and weight (B, G, K, K, H, W)", x=x, weight=weight)
    batch, groups, kernel, kernel_width, height, width = weight.shape
    if (batch, height, width) != (x.shape[0], x.shape[2], x.shape[3]):
        _refuse("x and weight differ in batch or image size", x=x, weight=weight)
    if kernel != kernel_width or kernel % 2 == 0:
        _refuse("the filters' side must be odd and square", x=x, weight=weight)
    if groups == 0 or x.shape[1] % groups:
        _refuse(f"channels cannot be split into {groups} filter groups", x=x, weight=weight)
    _require_one_kind(x=x, weight=weight)
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
    given = {"x": x, "hidden": hidden, "weight": weight, "bias": bias}
    if x.dim() != 4 or hidden.dim() != 4 or weight.dim() != 2 or bias.dim() != 1:
        _refuse("x and hidden must be (B, C or D, H, W), weight (G·K², D), bias (G·K²,)", **given)
    if x.shape[0] != hidden.shape[0] or x.shape[2:] != hidden.shape[2:]:
        _refuse("x and hidden differ in batch or image size", **given)
    if weight.shape[1] != hidden.shape[1] or weight.shape[0] != bias.shape[0]:
        _refuse("weight does not fit hidden or bias", **given)
    if kernel < 1 or kernel % 2 == 0 or weight.shape[0] % kernel**2:
        _refuse(f"kernel {kernel} must be odd, and weight have K² rows a group", **given)
    groups = weight.shape[0] // kernel**2
    if groups == 0 or x.shape[1] % groups:
        _refuse(f"channels cannot be split into {groups} filter groups", **given)
    device = x.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, hidden, weight, bias = (
            each.to(dtype) if each.dtype != torch.float64 else each
            for each in (x, hidden, weight, bias)
        )
    _require_one_kind(x=x, hidden=hidden, weight=weight, bias=bias)
    if _is_plain():
        filters = F.conv2d(hidden, weight[:, :, None, None], bias)
        return dynamic_dwconv_plain(x, filters.unflatten(1, (-1, kernel, kernel)))
    return _projected_dwconv(x, hidden, weight, bias, kernel)
