"""The dynamic depthwise convolution of MHDLSA (paper), declared to PyTorch.

Imports go downwards: `operator` declares it, so that autograd, torch.compile and FlopCounterMode
see one operator; `backends` chooses what computes it, `triton_kernels` or `shifted_taps`; `plain`
is its form in exported models. `reference` is the definition, used by tests and benchmarks alone.
"""

from dlgsanet_arch.ops.operator import dynamic_dwconv, projected_dwconv

__all__ = ["dynamic_dwconv", "projected_dwconv"]
