"""Half a layer in one pass, without gradients: on a CPU in float32, by the C library.

`network.py` asks `can_run` before each half of a layer, and otherwise takes the formula.
"""

import torch
from torch import Tensor, nn

from dlgsanet_arch import cpu
from dlgsanet_arch.as_built import is_as_built
from dlgsanet_arch.cpu.library import LARGEST_KERNEL
from dlgsanet_arch.fused.c_layers import add_attention, add_gdfn, add_mhdlsa, convolve3x3

__all__ = [
    "LARGEST_KERNEL",
    "add_attention",
    "add_gdfn",
    "add_mhdlsa",
    "can_convolve",
    "can_run",
    "convolve3x3",
]


def can_run(x: Tensor, *parts: nn.Module) -> bool:
    """Return whether a fused form can compute these modules, and all within them, for `x`.

    It can for eager float32 on a CPU without gradients, where every module is as it was built.
    """
    if torch.is_grad_enabled() or not cpu.can_run(x):
        return False
    weights = (weight for part in parts for weight in part.parameters())
    return is_as_built(*parts) and cpu.can_run(*weights)


def can_convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `convolve3x3` can compute this."""
    return not torch.is_grad_enabled() and x.dim() == 4 and cpu.can_run(x, weight, bias)
