"""The dynamic depthwise convolution declared to PyTorch as `dlgsanet::dynamic_dwconv`."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dlgsanet_arch.ops import shifted_taps
from dlgsanet_arch.ops.plain import dynamic_dwconv_plain


@torch.library.custom_op("dlgsanet::dynamic_dwconv", mutates_args=())
def _forward(x: Tensor, weight: Tensor) -> Tensor:
    return shifted_taps.forward(x, weight)


@torch.library.custom_op("dlgsanet::dynamic_dwconv_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return shifted_taps.backward(grad, x, weight)


@_forward.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.dlgsanet.dynamic_dwconv)
def _forward_flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    batch, channels, height, width = x_shape
    return 2 * batch * channels * height * width * weight_shape[2] * weight_shape[3]


@register_flop_formula(torch.ops.dlgsanet.dynamic_dwconv_backward)
def _backward_flops(_: Any, x_shape: Any, weight_shape: Any, *__: Any, **___: Any) -> int:
    return 2 * _forward_flops(x_shape, weight_shape)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4 or weight.dim() != 6:
        raise ValueError(
            "dynamic_dwconv takes x (B, C, H, W) and weight (B, G, K, K, H, W); "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    batch, groups, kernel, kernel_width, height, width = weight.shape
    if (batch, height, width) != (x.shape[0], x.shape[2], x.shape[3]):
        raise ValueError(
            "x and weight differ in batch or picture size: "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if kernel != kernel_width or kernel % 2 == 0:
        raise ValueError(f"the filters' side must be odd and square; got {kernel}x{kernel_width}")
    if x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} channels cannot be split into {groups} filter groups")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise TypeError(
            f"x and weight must have one floating dtype; got {x.dtype} and {weight.dtype}"
        )
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}")


def dynamic_dwconv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each pixel's neighbourhood with that pixel's own filter (paper, MHDLSA).

    out[b, c, y, x] = Σ_ij weight[b, g(c), i, j, y, x] · in[b, c, y + i - K//2, x + j - K//2],
    zero outside the picture, with g(c) = c // (C // G). Differentiable once. While a model is
    exported, the operator becomes a short graph of plain operators.

    Args:
        x: (B, C, H, W), any strides.
        weight: (B, G, K, K, H, W) in the dtype and on the device of `x`; K odd, C divisible
            by G.

    Returns:
        (B, C, H, W), contiguous, in the dtype of `x`; half precision is summed in float32.

    Raises:
        ValueError: For shapes or devices that do not fit together.
        TypeError: For dtypes that differ or are not floating.
    """
    _check(x, weight)
    if torch.compiler.is_exporting():
        return dynamic_dwconv_plain(x, weight)
    return _forward(x, weight)
