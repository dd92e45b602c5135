"""The dynamic depthwise convolution declared to PyTorch, its filters given or projected."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dlgsanet_arch.ops import backends
from dlgsanet_arch.ops.plain import dynamic_dwconv_plain
from dlgsanet_arch.precision import AUTOCAST_DEVICES, full_precision


@torch.library.custom_op("dlgsanet::dynamic_dwconv", mutates_args=())
def _forward(x: Tensor, weight: Tensor) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    return backends.choose(x, weight.shape[2]).forward(x, weight)


@torch.library.custom_op("dlgsanet::dynamic_dwconv_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight)
    return backends.choose(x, weight.shape[2]).backward(grad, x, weight)


# Autocast is kept out of the backends: it would round the filters, which are float32 there.
@torch.library.custom_op("dlgsanet::projected_dwconv", mutates_args=())
def _projected(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    with full_precision(x.device.type):
        return backends.choose(x, kernel).projected_forward(x, hidden, weight, bias, kernel)


@torch.library.custom_op("dlgsanet::projected_dwconv_backward", mutates_args=())
def _projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return tuple(torch.zeros_like(each) for each in (x, hidden, weight, bias))
    backend = backends.choose(x, kernel)
    with full_precision(x.device.type):
        return backend.projected_backward(grad, x, hidden, weight, bias, kernel)


@_forward.register_fake
@_projected.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@_backward.register_fake
@_projected_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(each) for each in inputs if isinstance(each, Tensor))


def _save_given(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _save_projected(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kernel = inputs
    ctx.save_for_backward(*tensors)


def _given_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return _backward(grad, *ctx.saved_tensors)


def _projected_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_projected_backward(grad, *ctx.saved_tensors, ctx.kernel), None)


_forward.register_autograd(_given_gradients, setup_context=_save_given)
_projected.register_autograd(_projected_gradients, setup_context=_save_projected)


def _convolution_flops(x_shape: Any, kernel: int) -> int:
    batch, channels, height, width = x_shape
    return 2 * batch * channels * height * width * kernel**2


def _projection_flops(x_shape: Any, weight_shape: Any) -> int:
    batch, _, height, width = x_shape
    return 2 * batch * height * width * weight_shape[0] * weight_shape[1]


# FlopCounterMode hands over what the operators take, with shapes in place of tensors.
@register_flop_formula(torch.ops.dlgsanet.dynamic_dwconv)
def _forward_flops(x: Any, weight: Any, **_: Any) -> int:
    return _convolution_flops(x, weight[2])


@register_flop_formula(torch.ops.dlgsanet.dynamic_dwconv_backward)
def _backward_flops(grad: Any, x: Any, weight: Any, **_: Any) -> int:
    return 2 * _convolution_flops(x, weight[2])


@register_flop_formula(torch.ops.dlgsanet.projected_dwconv)
def _projected_flops(x: Any, hidden: Any, weight: Any, bias: Any, kernel: int, **_: Any) -> int:
    return _convolution_flops(x, kernel) + _projection_flops(x, weight)


@register_flop_formula(torch.ops.dlgsanet.projected_dwconv_backward)
def _projected_backward_flops(
    grad: Any, x: Any, hidden: Any, weight: Any, bias: Any, kernel: int, **_: Any
) -> int:
    # The filters are projected once more; their gradient goes to `hidden` and to `weight`.
    return 2 * _convolution_flops(x, kernel) + 3 * _projection_flops(x, weight)


def _describe(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())


def _require_one_kind(x: Tensor, **others: Tensor) -> None:
    """Refuse dtypes and devices that differ from those of `x`."""
    named = {"x": x, **others}
    if not x.is_floating_point() or any(t.dtype != x.dtype for t in others.values()):
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in named.items())
        raise ValueError(f"all must have one floating dtype; got {dtypes}")
    if any(t.device != x.device for t in others.values()):
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in named.items())
        raise ValueError(f"all must be on one device; got {devices}")


def _require_groups(x: Tensor, groups: int) -> None:
    if groups == 0 or x.shape[1] % groups:
        raise ValueError(
            f"{x.shape[1]} channels cannot be split into {groups} filter groups; "
            f"got {_describe(x=x)}"
        )


def dynamic_dwconv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each pixel's neighbourhood with that pixel's own filter (paper, MHDLSA).

    out[b, c, y, x] = Σ_ij weight[b, g(c), i, j, y, x] · in[b, c, y + i - K//2, x + j - K//2],
    zero outside the picture, with g(c) = c // (C // G). Differentiable once. While a model is
    exported, the operator becomes a short graph of plain operators.

    Args:
        x: (B, C, H, W), any strides; nothing in it gives an empty result.
        weight: (B, G, K, K, H, W) in the dtype and on the device of `x`; K odd, C divisible
            by G.

    Returns:
        (B, C, H, W) in the dtype and layout of `x`; half precision is summed in float32.

    Raises:
        ValueError: For shapes, dtypes or devices that do not fit together.
    """
    given = _describe(x=x, weight=weight)
    if x.dim() != 4 or weight.dim() != 6:
        raise ValueError(f"x must be (B, C, H, W) and weight (B, G, K, K, H, W); got {given}")
    batch, groups, kernel, kernel_width, height, width = weight.shape
    if (batch, height, width) != (x.shape[0], x.shape[2], x.shape[3]):
        raise ValueError(f"x and weight differ in batch or picture size; got {given}")
    if kernel != kernel_width or kernel % 2 == 0:
        raise ValueError(f"the filters' side must be odd and square; got {given}")
    _require_groups(x, groups)
    _require_one_kind(x, weight=weight)
    if torch.compiler.is_exporting():
        return dynamic_dwconv_plain(x, weight)
    return _forward(x, weight)


def projected_dwconv(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Convolve each pixel's neighbourhood with a filter projected from hidden features.

    `dynamic_dwconv` with the filters weight · hidden + bias, the last 1x1 convolution of the
    filter generator (paper, MHDLSA). The map of filters, K²·G values a pixel, is never in memory:
    the forward makes a few rows of it at a time, and the backward makes them once more.
    Differentiable once. Under autocast all arguments take its dtype; while a model is exported,
    the operator becomes a short graph of plain operators.

    Args:
        x: (B, C, H, W), any strides; nothing in it gives an empty result.
        hidden: (B, D, H, W), any strides, in the dtype and on the device of `x`.
        weight: (G·K², D); row (g·K + i)·K + j makes tap i, j of group g. C divisible by G.
        bias: (G·K²,).
        kernel: K, odd.

    Returns:
        (B, C, H, W) in the dtype and layout of `x`; half precision is summed in float32.

    Raises:
        ValueError: For shapes, dtypes or devices that do not fit together.
    """
    given = _describe(x=x, hidden=hidden, weight=weight, bias=bias) + f", kernel {kernel}"
    if x.dim() != 4 or hidden.dim() != 4 or weight.dim() != 2 or bias.dim() != 1:
        raise ValueError(
            "x and hidden must be (B, C or D, H, W), weight (G·K², D) and bias (G·K²,); "
            f"got {given}"
        )
    if x.shape[0] != hidden.shape[0] or x.shape[2:] != hidden.shape[2:]:
        raise ValueError(f"x and hidden differ in batch or picture size; got {given}")
    if weight.shape[1] != hidden.shape[1] or weight.shape[0] != bias.shape[0]:
        raise ValueError(f"weight does not fit hidden or bias; got {given}")
    if kernel < 1 or kernel % 2 == 0 or weight.shape[0] % kernel**2:
        raise ValueError(f"kernel must be odd, and weight have K² rows a group; got {given}")
    _require_groups(x, weight.shape[0] // kernel**2)
    device = x.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, hidden, weight, bias = (
            each.to(dtype) if each.dtype != torch.float64 else each
            for each in (x, hidden, weight, bias)
        )
    _require_one_kind(x, hidden=hidden, weight=weight, bias=bias)
    if torch.compiler.is_exporting():
        filters = F.conv2d(hidden, weight[:, :, None, None], bias)
        return dynamic_dwconv_plain(x, filters.unflatten(1, (-1, kernel, kernel)))
    return _projected(x, hidden, weight, bias, kernel)
