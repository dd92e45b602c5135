"""The dynamic depthwise convolution as a short graph of plain operators, for exported models."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_dwconv_plain(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the convolution; shapes as in `reference.dynamic_dwconv_reference`.

    The K column shifts are stacked once, then each of the K filter rows is one product and one
    sum: about 4·K nodes in the graph where unrolled taps have 3·K², and a K-fold copy of the
    input where unfold makes a K²-fold one. Height, width and batch may be symbolic.

    Returns:
        (B, C, H, W) in the dtype of `x`.
    """
    groups, kernel = weight.shape[1:3]
    height, width = x.shape[2:]
    border = kernel // 2
    padded = F.pad(x, (border, border, border, border))
    columns = torch.stack([padded[..., j : j + width] for j in range(kernel)], 2)
    columns = columns.unflatten(1, (groups, -1))
    total = sum(
        (columns[..., i : i + height, :] * weight[:, :, None, i]).sum(3) for i in range(kernel)
    )
    return total.flatten(1, 2)
