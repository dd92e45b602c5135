"""What PyTorch computes slowly on a CPU, in C with gradients: 1x1, depthwise and gate.

Each function is PyTorch's own operator with the same result. For eager float32 on a CPU it becomes
one declared operator of the C library, contiguous in and out; everywhere else, and for compilers,
autocast and exporters, it is the formula. Differentiable once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dlgsanet_arch import cpu
from dlgsanet_arch.cpu.library import LARGEST_KERNEL
from dlgsanet_arch.ops import c_backend

NORM_EPS = 1e-5  # of the paper's norms; of no other eps is there a kernel


def _can_run(x: Tensor, *weights: Tensor | None) -> bool:
    return x.dim() == 4 and x.numel() > 0 and cpu.can_run(x, *weights)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the 1x1 convolution of x (B, C, H, W) by weight (C', C, 1, 1), bias (C',).

    Returns:
        (B, C', H, W) in the dtype of `x`.
    """
    if _can_run(x, weight, bias) and _fits(x, weight, bias):
        return _pointwise(x, weight, bias, False)
    return F.conv2d(x, weight, bias)


def normed_pointwise(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute the 1x1 convolution of x normalised over its channels: conv(LN(x)).

    The norm's weight and bias act on the small weight of the convolution instead of the map, and
    the normalised map is never in memory.

    Args:
        x: (B, C, H, W).
        norm_weight: (C,).
        norm_bias: (C,).
        weight: (C', C, 1, 1).
        bias: (C',).

    Returns:
        (B, C', H, W) in the dtype of `x`.
    """
    if (
        _can_run(x, norm_weight, norm_bias, weight, bias)
        and _fits(x, weight, bias)
        and norm_weight.shape == norm_bias.shape == x.shape[1:2]
    ):
        shift = weight.flatten(1) @ norm_bias
        shift = shift if bias is None else shift + bias
        return _pointwise(x, weight * norm_weight[:, None, None], shift, True)
    return F.conv2d(layer_norm(x, norm_weight, norm_bias), weight, bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise each pixel of x (B, C, H, W) over its channels, then scale and shift by (C,).

    Biased variance, eps 1e-5; half precision is normalised in float32.
    """
    pixels = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, NORM_EPS)
    return pixels.permute(0, 3, 1, 2)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return weight.shape[1:] == (x.shape[1], 1, 1) and (
        bias is None or bias.shape == weight.shape[:1]
    )


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the depthwise convolution of x (B, C, H, W) by weight (C, 1, K, K), bias (C,).

    K is odd, and the border is K // 2 zeros.

    Returns:
        (B, C, H, W) in the dtype of `x`.
    """
    fits = (
        _can_run(x, weight, bias)
        and _are_filters(weight, x.shape[1])
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if fits:
        return _depthwise(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


def gated_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Compute gelu(a) · b, a and b being the halves of the depthwise convolution of x (paper, GDFN).

    Args:
        x: (B, 2e, H, W).
        weight: (2e, 1, K, K); K is odd, and the border is K // 2 zeros.

    Returns:
        (B, e, H, W) in the dtype of `x`.
    """
    if _can_run(x, weight) and _are_filters(weight, x.shape[1]) and x.shape[1] % 2 == 0:
        return _gated(x, weight)
    a, b = depthwise(x, weight).chunk(2, dim=1)
    return F.gelu(a) * b


def _are_filters(weight: Tensor, channels: int) -> bool:
    kernel = weight.shape[-1]
    return (
        weight.shape == (channels, 1, kernel, kernel)
        and kernel % 2 == 1
        and kernel <= LARGEST_KERNEL
    )


# ---- the operators, as PyTorch sees them


@torch.library.custom_op("dlgsanet::pointwise", mutates_args=(), device_types="cpu")
def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, normalise: bool) -> Tensor:
    return c_backend.pointwise(x, weight, bias, normalise)


@torch.library.custom_op("dlgsanet::pointwise_backward", mutates_args=(), device_types="cpu")
def _pointwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return c_backend.pointwise_backward(grad, x, weight, normalise)


@torch.library.custom_op("dlgsanet::depthwise", mutates_args=(), device_types="cpu")
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return c_backend.depthwise(x, weight, bias)


@torch.library.custom_op("dlgsanet::depthwise_backward", mutates_args=(), device_types="cpu")
def _depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return c_backend.depthwise_backward(grad, x, weight)


@torch.library.custom_op("dlgsanet::gated_depthwise", mutates_args=(), device_types="cpu")
def _gated(x: Tensor, weight: Tensor) -> Tensor:
    return c_backend.gated_depthwise(x, weight)


@torch.library.custom_op("dlgsanet::gated_depthwise_backward", mutates_args=(), device_types="cpu")
def _gated_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return c_backend.gated_depthwise_backward(grad, x, weight)


def _map(x: Tensor, channels: int) -> Tensor:
    return x.new_empty((len(x), channels, *x.shape[2:]))


@_pointwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, normalise: bool) -> Tensor:
    return _map(x, len(weight))


@_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _map(x, x.shape[1])


@_gated.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return _map(x, x.shape[1] // 2)


@_pointwise_backward.register_fake
@_depthwise_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *_: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _map(x, x.shape[1]), weight.new_empty(weight.shape), weight.new_empty(len(weight))


@_gated_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _map(x, x.shape[1]), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *rest = inputs
    ctx.rest = len(rest)
    ctx.has_bias = bool(rest) and rest[0] is not None
    ctx.settings = rest[1:]
    ctx.save_for_backward(x, weight)


def _differentiable(forward: Any, backward: Any) -> None:
    """Let autograd call `backward`, whose third result is the gradient of a bias, if there is one.

    The operators take x, weight, then perhaps a bias and settings, which `backward` takes too.
    """

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, *grad_bias = backward(grad, *ctx.saved_tensors, *ctx.settings)
        if not ctx.rest:
            return grad_x, grad_weight
        bias = grad_bias[0] if ctx.has_bias else None
        return grad_x, grad_weight, bias, *(None for _ in ctx.settings)

    forward.register_autograd(gradients, setup_context=_save)


_differentiable(_pointwise, _pointwise_backward)
_differentiable(_depthwise, _depthwise_backward)
_differentiable(_gated, _gated_backward)


# FlopCounterMode hands over shapes in place of tensors. Convolutions multiply every pixel by every
# entry of the weight; gates and norms are not counted, as PyTorch does not count its own.
def _flops(x: Any, weight: Any) -> int:
    return 2 * x[0] * x[2] * x[3] * torch.Size(weight).numel()


for _operator in ("pointwise", "depthwise", "gated_depthwise"):

    @register_flop_formula(getattr(torch.ops.dlgsanet, _operator))
    def _forward_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return _flops(x, weight)

    @register_flop_formula(getattr(torch.ops.dlgsanet, f"{_operator}_backward"))
    def _backward_flops(grad: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * _flops(x, weight)
