"""Half a layer in one pass, without gradients: by the C library on a CPU, by Triton on a GPU.

`layers.add_mixed` asks `can_run` before each half of a layer, and otherwise takes the formula.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor, nn

from dlgsanet_arch import cpu
from dlgsanet_arch.as_built import is_as_built
from dlgsanet_arch.cpu.library import LARGEST_KERNEL
from dlgsanet_arch.fused import c_layers
from dlgsanet_arch.fused.c_layers import convolve3x3
from dlgsanet_arch.ops.dynamic import has_triton

__all__ = [
    "LARGEST_KERNEL",
    "add_attention",
    "add_gdfn",
    "add_mhdlsa",
    "can_convolve",
    "can_run",
    "convolve3x3",
]


def _forms(x: Tensor) -> ModuleType:
    """Return the module with the forms for the device of `x`."""
    if x.is_cuda and has_triton():
        return importlib.import_module("dlgsanet_arch.fused.triton_layers")
    return c_layers


def can_run(x: Tensor, *parts: nn.Module) -> bool:
    """Return whether a fused form can compute these modules, and all within them, for `x`.

    It can in eager mode without gradients, where every module is as it was built and all tensors
    have one dtype and sizes with kernels: float32 on a CPU, and float16 and bfloat16 on a GPU, too.
    """
    forms = _forms(x)
    if torch.is_grad_enabled() or not forms.can_run(x):
        return False
    weights = [weight for part in parts for weight in part.parameters()]
    return is_as_built(*parts) and forms.can_run(x, *weights)


def can_convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `convolve3x3` can compute this."""
    return not torch.is_grad_enabled() and x.dim() == 4 and cpu.can_run(x, weight, bias)


def add_gdfn(x: Tensor, norm: nn.Module, gdfn: nn.Module) -> Tensor:
    """Return x + GDFN(LN(x))."""
    return _forms(x).add_gdfn(x, norm, gdfn)


def add_mhdlsa(x: Tensor, norm: nn.Module, mhdlsa: nn.Module) -> Tensor:
    """Return x + MHDLSA(LN(x))."""
    return _forms(x).add_mhdlsa(x, norm, mhdlsa)


def add_attention(x: Tensor, norm: nn.Module, attention: nn.Module) -> Tensor:
    """Return x + SparseGSA(LN(x)), within windows in eval mode and their overlaps averaged."""
    return _forms(x).add_attention(x, norm, attention)
