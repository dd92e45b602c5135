"""The dynamic depthwise convolution of MHDLSA (paper): one declared operator.

`reference` is the definition, `shifted_taps` computes it with plain PyTorch on every device, and
`operator` declares it to PyTorch, so that autograd, torch.compile and FlopCounterMode see one
operator.
"""

from dlgsanet_arch.ops.operator import dynamic_dwconv

__all__ = ["dynamic_dwconv"]
