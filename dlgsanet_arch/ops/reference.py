"""The dynamic depthwise convolution as its formula says: the judge of every faster form."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_dwconv_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each pixel's neighbourhood with that pixel's own filter, as `ops.dynamic_dwconv`.

    Unfold makes the K² shifted copies of the input, all in memory at once.
    """
    batch, channels, height, width = x.shape
    groups, kernel = weight.shape[1:3]
    shifted = F.unfold(x, kernel, padding=kernel // 2)
    shifted = shifted.view(batch, groups, channels // groups, kernel, kernel, height, width)
    return (shifted * weight[:, :, None]).sum((3, 4)).view(batch, channels, height, width)


def projected_dwconv_reference(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Convolve with a filter projected from hidden features, as `ops.projected_dwconv`.

    filter[b, g, i, j, y, x] = bias[o] + Σ_d weight[o, d] · hidden[b, d, y, x] with
    o = (g·K + i)·K + j: the last 1x1 convolution of the filter generator, then the convolution.
    """
    filters = torch.einsum("od,bdhw->bohw", weight, hidden) + bias[:, None, None]
    return dynamic_dwconv_reference(x, filters.unflatten(1, (-1, kernel, kernel)))
