"""What PyTorch computes slowly on a CPU, in C with gradients: 1x1, depthwise and gate.

Each function is PyTorch's own operator with the same result, in the dtype of x. For eager float32
on a CPU it becomes one declared operator of the C library, contiguous in and out; everywhere else,
and for compilers, autocast and exporters, it is the formula. Differentiable once.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dlgsanet_arch import cpu
from dlgsanet_arch.cpu.library import LARGEST_KERNEL
from dlgsanet_arch.ops import c_backend
from dlgsanet_arch.ops.declare import declare
from dlgsanet_arch.ops.shapes import Pattern, sizes
from dlgsanet_arch.precision import cast, full_precision

NORM_EPS = 1e-5  # of the paper's norms; of no other eps is there a kernel


def _can_run(x: Tensor, *weights: Tensor | None) -> bool:
    return x.dim() == 4 and cpu.can_run(x, *weights)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the 1x1 convolution (B, C', H, W) of x (B, C, H, W) by weight (C', C, 1, 1)."""
    if _can_run(x, weight, bias) and weight.shape[2:] == (1, 1):
        return _pointwise(x, weight, bias, False)
    return F.conv2d(x, cast(weight), cast(bias))


def normed_pointwise(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return `pointwise` of `layer_norm`: conv(LN(x)).

    The norm's weight and bias act on the small weight of the convolution instead of the map, and
    the normalised map is never in memory.
    """
    if _can_run(x, norm_weight, norm_bias, weight, bias) and weight.shape[2:] == (1, 1):
        return _pointwise(x, *_folded(norm_weight, norm_bias, weight, bias), True)
    return F.conv2d(layer_norm(x, norm_weight, norm_bias), cast(weight), cast(bias))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise each pixel of x (B, C, H, W) over its channels, then scale and shift by (C,).

    Biased variance, eps 1e-5. Half precision is normalised in float32, within one kernel: autocast
    would cast the map to float32 before and its result back.
    """
    weight, bias = (cast(each).to(x.dtype) for each in (weight, bias))
    with full_precision(x.device.type):
        pixels = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, NORM_EPS)
    return pixels.permute(0, 3, 1, 2)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the depthwise convolution of x (B, C, H, W) by weight (C, 1, K, K), bias (C,).

    K is odd, and the border is K // 2 zeros.
    """
    if _can_run(x, weight, bias) and weight.shape[-1] <= LARGEST_KERNEL:
        return _depthwise(x, weight, bias)
    padding, groups = weight.shape[-1] // 2, len(weight)
    return F.conv2d(x, cast(weight), cast(bias), padding=padding, groups=groups)


def gdfn_gate(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, filters: Tensor
) -> Tensor:
    """Compute gelu(a) · b, (a, b) the halves of dwconv(project_in(LN(x))) (paper, GDFN).

    The expanded map, the widest of the network, is computed again in the backward instead of kept.

    Args:
        x: (B, C, H, W).
        norm_weight: (C,).
        norm_bias: (C,).
        weight: (2e, C, 1, 1), of project_in.
        filters: (2e, 1, K, K), of dwconv; K is odd, and the border is K // 2 zeros.

    Returns:
        (B, e, H, W) in the dtype of `x`.
    """
    runs = _can_run(x, norm_weight, norm_bias, weight, filters)
    if runs and weight.shape[2:] == (1, 1) and filters.shape[-1] <= LARGEST_KERNEL:
        return _gate(x, *_folded(norm_weight, norm_bias, weight), filters)
    expanded = normed_pointwise(x, norm_weight, norm_bias, weight)
    a, b = depthwise(expanded, filters).chunk(2, dim=1)
    return F.gelu(a) * b


_NORMED = Pattern("norm_weight: C; norm_bias: C; weight: O C 1 1; bias: O")


def _folded(
    norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the weight and bias that make of standardised pixels what these make of LN(x)."""
    sizes("normed_pointwise", _NORMED, norm_weight, norm_bias, weight, bias)
    shift = weight.flatten(1) @ norm_bias
    return weight * norm_weight[:, None, None], shift if bias is None else shift + bias


def _flops(x: Any, weight: Any, *_: Any) -> int:
    """Count a multiply-add of every pixel with every entry of the weight; gates are not counted."""
    return 2 * x[0] * x[2] * x[3] * math.prod(weight)


def _gate_flops(x: Any, weight: Any, bias: Any, filters: Any) -> int:
    return _flops(x, weight) + _flops(x, filters)


_pointwise = declare(
    "pointwise",
    c_backend.pointwise,
    c_backend.pointwise_backward,
    result=lambda x, weight, *_: x.new_empty((len(x), len(weight), *x.shape[2:])),
    flops=_flops,
    key="CPU",
)
_depthwise = declare(
    "depthwise",
    c_backend.depthwise,
    c_backend.depthwise_backward,
    result=lambda x, *_: x.new_empty(x.shape),
    flops=_flops,
    key="CPU",
)
_gate = declare(
    "gdfn_gate",
    c_backend.gdfn_gate,
    c_backend.gdfn_gate_backward,
    result=lambda x, weight, *_: x.new_empty((len(x), len(weight) // 2, *x.shape[2:])),
    flops=_gate_flops,
    backward_flops=lambda *given: 3 * _gate_flops(*given),  # the forward's maps are made once more
    key="CPU",
)
