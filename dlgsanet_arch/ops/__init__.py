"""The operators of the network, with gradients, declared to PyTorch.

`dynamic` has the dynamic depthwise convolution of MHDLSA (paper), computed by `c_backend`,
`triton_backend` or `pytorch_backend`.
`convolutions` has what PyTorch computes slowly on a CPU, `attention` the attention over channels.
`reference` is the definition, used by tests and benchmarks alone.
"""

from dlgsanet_arch.ops.attention import attention_weights, channel_attention
from dlgsanet_arch.ops.convolutions import (
    depthwise,
    gdfn_gate,
    layer_norm,
    normed_pointwise,
    pointwise,
)
from dlgsanet_arch.ops.dynamic import dynamic_dwconv, projected_dwconv

__all__ = [
    "attention_weights",
    "channel_attention",
    "depthwise",
    "dynamic_dwconv",
    "gdfn_gate",
    "layer_norm",
    "normed_pointwise",
    "pointwise",
    "projected_dwconv",
]
