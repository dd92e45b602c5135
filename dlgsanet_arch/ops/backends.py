"""Which code computes the dynamic depthwise convolution: Triton kernels on a GPU, else PyTorch.

On a CPU that is MKL's sparse product where there is MKL, and a sum over shifted pictures elsewhere.

Each backend is a module with `forward`, `backward`, `projected_forward` and `projected_backward`,
as in `shifted_taps`, which serves every device and dtype.
"""

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch
from torch import Tensor

from dlgsanet_arch.ops import shifted_taps, sparse_product

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_LARGEST_KERNEL = 11


@functools.cache
def _has_triton() -> bool:
    # Asked once: it walks through the path, and operators are called hundreds of times a forward.
    return importlib.util.find_spec("triton") is not None


def why_not_triton(device: torch.device, dtype: torch.dtype, kernel: int) -> str:
    """Say why the Triton kernels cannot serve, or return an empty text where they can."""
    if device.type != "cuda":
        return f"there is no kernel for {device.type}"
    if not _has_triton():
        return "Triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"there is no kernel for {dtype}"
    if kernel > TRITON_LARGEST_KERNEL:
        return f"there is no kernel for filters over {TRITON_LARGEST_KERNEL} wide, got {kernel}"
    return ""


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"the dynamic depthwise convolution runs in plain PyTorch: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def choose(x: Tensor, kernel: int) -> ModuleType:
    """Return the backend for `x` (B, C, H, W) and filters of side `kernel`.

    Where a GPU or another accelerator gets the PyTorch form, that is said once, as a
    RuntimeWarning with the reason.
    """
    if sparse_product.can_serve(x):
        return sparse_product
    if x.device.type in ("cpu", "meta"):
        return shifted_taps
    reason = why_not_triton(x.device, x.dtype, kernel)
    if reason:
        _warn_once(reason)
        return shifted_taps
    return importlib.import_module("dlgsanet_arch.ops.triton_kernels")
