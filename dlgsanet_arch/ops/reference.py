"""The dynamic depthwise convolution as its formula says: the judge of every faster form."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_dwconv_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each pixel's neighbourhood with that pixel's own filter.

    out[b, c, y, x] = Σ_ij weight[b, g(c), i, j, y, x] · in[b, c, y + i - K//2, x + j - K//2],
    zero outside the image, with g(c) = c // (C // G) and no softmax (paper, MHDLSA).
    Unfold makes the K² shifted copies of the input, all in memory at once.

    Args:
        x: (B, C, H, W).
        weight: (B, G, K, K, H, W), K odd, C divisible by G.

    Returns:
        (B, C, H, W).
    """
    batch, channels, height, width = x.shape
    groups, kernel = weight.shape[1:3]
    shifted = F.unfold(x, kernel, padding=kernel // 2)
    shifted = shifted.view(batch, groups, channels // groups, kernel, kernel, height, width)
    return (shifted * weight[:, :, None]).sum((3, 4)).view(batch, channels, height, width)


def projected_dwconv_reference(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Convolve each pixel's neighbourhood with a filter projected from hidden features.

    filter[b, g, i, j, y, x] = bias[o] + Σ_d weight[o, d] · hidden[b, d, y, x] with
    o = (g·K + i)·K + j: the last 1x1 convolution of the filter generator, then the convolution.

    Args:
        x: (B, C, H, W).
        hidden: (B, D, H, W).
        weight: (G·K², D), K odd, C divisible by G.
        bias: (G·K²,).
        kernel: K.

    Returns:
        (B, C, H, W).
    """
    filters = torch.einsum("od,bdhw->bohw", weight, hidden) + bias[:, None, None]
    return dynamic_dwconv_reference(x, filters.unflatten(1, (-1, kernel, kernel)))
