"""The C library for CPUs: its sources, what loads it, and the threads that it runs in.

The sources are compiled once for each instruction set when the package is installed, by setup.py.
This package knows nothing of PyTorch's operators: `ops` has those with gradients, `fused` whole
layers without.
"""

from dlgsanet_arch.cpu.library import can_run, run, why_not

__all__ = ["can_run", "run", "why_not"]
