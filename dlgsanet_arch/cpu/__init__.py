"""Inference on a CPU in float32 by kernels in C, a layer in one pass over the picture.

`kernels.c` is compiled once for each instruction set when the package is installed, by setup.py;
`library` finds the one that this machine runs and calls it from several threads; `layers` declares
each kernel to PyTorch as an operator. Where there is none, or anything but float32 inference is
asked for, `network.py` takes the layers' plain form.
"""

from dlgsanet_arch.cpu.layers import (
    add_attention,
    add_gdfn,
    add_mhdlsa,
    convolve3x3,
    serves,
    serves_weights,
)
from dlgsanet_arch.cpu.library import LARGEST_KERNEL, why_not

__all__ = [
    "LARGEST_KERNEL",
    "add_attention",
    "add_gdfn",
    "add_mhdlsa",
    "convolve3x3",
    "serves",
    "serves_weights",
    "why_not",
]
