"""The dynamic depthwise convolution declared to PyTorch, its filters given or projected.

C computes it on a CPU and Triton on a GPU where they can, else PyTorch's own operators. Each of
these backends is a module with `projected_forward` and `projected_backward`.
"""

import functools
import importlib
import importlib.util
import math
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlgsanet_arch import cpu
from dlgsanet_arch.cpu.library import LARGEST_KERNEL, is_transformed
from dlgsanet_arch.ops import c_backend, pytorch_backend
from dlgsanet_arch.ops.declare import declare
from dlgsanet_arch.ops.shapes import Pattern, sizes
from dlgsanet_arch.precision import full_precision, is_autocast

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_LARGEST_KERNEL = 11
_GIVEN = Pattern("weight: B G K K H W; x: B GS H W")
_PROJECTED = Pattern("weight: GKK D; bias: GKK; hidden: B D H W; x: B GS H W")


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    # Asked once: it searches the path, and operators are called hundreds of times a forward.
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"the dynamic depthwise convolution runs in plain PyTorch: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def choose_backend(kernel: int, *tensors: Tensor) -> ModuleType:
    """Return the backend for these tensors and filters of side `kernel`.

    Where an accelerator gets PyTorch's form, a RuntimeWarning gives the reason once.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    if kernel <= LARGEST_KERNEL and cpu.can_run(*tensors):
        return c_backend
    if device.type in ("cpu", "meta") or 0 in tensors[0].shape:
        return pytorch_backend
    if device.type != "cuda":
        reason = f"no kernel for {device.type}"
    elif not has_triton():
        reason = "Triton is not installed"
    elif dtype not in _TRITON_DTYPES:
        reason = f"no kernel for {dtype}"
    elif kernel > TRITON_LARGEST_KERNEL:
        reason = f"no kernel for filters over {TRITON_LARGEST_KERNEL} wide, got {kernel}"
    else:
        return importlib.import_module("dlgsanet_arch.ops.triton_backend")
    _warn_once(reason)
    return pytorch_backend


# Autocast is kept out of the backends: it would round the filters, which are float32 there.
def _projected(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> Tensor:
    with full_precision(x.device.type):
        backend = choose_backend(kernel, x, hidden, weight, bias)
        return backend.projected_forward(x, hidden, weight, bias, kernel)


def _projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with full_precision(x.device.type):
        backend = choose_backend(kernel, grad, x, hidden, weight, bias)
        return backend.projected_backward(grad, x, hidden, weight, bias, kernel)


def _convolution_flops(x: Any, kernel: int) -> int:
    return 2 * math.prod(x) * kernel**2


def _projection_flops(x: Any, weight: Any) -> int:
    return 2 * x[0] * x[2] * x[3] * math.prod(weight)


_dynamic_dwconv = declare(
    "dynamic_dwconv",
    pytorch_backend.forward,
    pytorch_backend.backward,
    result=lambda x, _: torch.empty_like(x),
    flops=lambda x, weight: _convolution_flops(x, weight[2]),
)
_projected_dwconv = declare(
    "projected_dwconv",
    _projected,
    _projected_backward,
    result=lambda x, *_: torch.empty_like(x),
    flops=lambda x, hidden, weight, bias, kernel: (
        _convolution_flops(x, kernel) + _projection_flops(x, weight)
    ),
    # The filters are projected once more; their gradient goes to `hidden` and to `weight`.
    backward_flops=lambda x, hidden, weight, bias, kernel: (
        2 * _convolution_flops(x, kernel) + 3 * _projection_flops(x, weight)
    ),
)


def _require(operator: str, kernel: int, x: Tensor) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{operator} needs filters of an odd side; got {kernel}")
    if not x.is_floating_point():
        raise ValueError(f"{operator} needs a floating dtype; got {x.dtype}")


def _is_plain() -> bool:
    """Return whether a short graph of plain operators is wanted: in exports, under torch.func."""
    exporting = torch.compiler.is_exporting()
    return exporting or (not torch.compiler.is_compiling() and is_transformed())


def dynamic_dwconv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each pixel's neighbourhood with that pixel's own filter (paper, MHDLSA).

    out[b, c, y, x] = Σ_ij weight[b, g(c), i, j, y, x] · in[b, c, y + i - K//2, x + j - K//2],
    zero outside the image, with g(c) = c // (C // G). Differentiable once. Plain PyTorch on every
    device: the network calls it where its filters come from a layer that is hooked or replaced.

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
    return pytorch_backend.plain(x, weight) if _is_plain() else _dynamic_dwconv(x, weight)


def projected_dwconv(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Convolve each pixel's neighbourhood with a filter projected from hidden features.

    `dynamic_dwconv` with the filters weight · hidden + bias, the last 1x1 convolution of the
    filter generator (paper, MHDLSA). The map of filters, K²·G values a pixel, is never in memory:
    the forward makes a few rows of it at a time, and the backward makes them once more.
    Differentiable once. Under autocast all arguments take its dtype.

    Args:
        x: (B, C, H, W), any strides; an empty tensor gives an empty result.
        hidden: (B, D, H, W), any strides, in the dtype and on the device of `x`.
        weight: (G·K², D); row (g·K + i)·K + j makes tap i, j of group g. C divisible by G.
        bias: (G·K²,).
        kernel: K, odd.

    Returns, raises:
        As `dynamic_dwconv`.
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
        return pytorch_backend.plain(x, filters.unflatten(1, (-1, kernel, kernel)))
    return _projected_dwconv(x, hidden, weight, bias, kernel)
