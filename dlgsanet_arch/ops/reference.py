"""The dynamic depthwise convolution as its formula says: the judge of every faster form."""

import torch.nn.functional as F
from torch import Tensor


def dynamic_dwconv_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each pixel's neighbourhood with that pixel's own filter.

    out[b, c, y, x] = Σ_ij weight[b, g(c), i, j, y, x] · in[b, c, y + i - K//2, x + j - K//2],
    zero outside the picture, with g(c) = c // (C // G) and no softmax (paper, MHDLSA).
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
