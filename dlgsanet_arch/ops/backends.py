"""Which code computes the dynamic convolution: C on a CPU, Triton on a GPU, else PyTorch.

Each backend is a module with `projected_forward` and `projected_backward`. Those of `BACKENDS` are
asked in order, and each says why it cannot run; PyTorch's form runs everywhere.
"""

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch
from torch import Tensor

from dlgsanet_arch import cpu
from dlgsanet_arch.cpu.library import LARGEST_KERNEL
from dlgsanet_arch.ops import c_backend, pytorch_backend

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_LARGEST_KERNEL = 11


@functools.cache
def _has_triton() -> bool:
    # Asked once: it searches the path, and operators are called hundreds of times a forward.
    return importlib.util.find_spec("triton") is not None


def why_not_triton(device: torch.device, dtype: torch.dtype, kernel: int) -> str:
    """Say why the Triton kernels cannot run, or return an empty text where they can."""
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


def choose(kernel: int, *tensors: Tensor) -> ModuleType:
    """Return the backend for these tensors and filters of side `kernel`.

    Where a GPU or another accelerator gets the PyTorch form, that is said once, as a
    RuntimeWarning with the reason.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    if 0 in tensors[0].shape:
        return pytorch_backend
    if device.type in ("cpu", "meta"):
        runs_in_c = kernel <= LARGEST_KERNEL and cpu.can_run(*tensors)
        return c_backend if runs_in_c else pytorch_backend
    reason = why_not_triton(device, dtype, kernel)
    if reason:
        _warn_once(reason)
        return pytorch_backend
    return importlib.import_module("dlgsanet_arch.ops.triton_backend")
