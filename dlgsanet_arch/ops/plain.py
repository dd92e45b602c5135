"""The dynamic depthwise convolution as a short graph of plain operators, for exported models."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_dwconv_plain(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the convolution; shapes as in `reference.dynamic_dwconv_reference`.

    One depthwise convolution with filters of zeros and a one lays the K column shifts side by
    side, then each of the K filter rows is one product and one sum. That is about 5·K nodes in
    the graph where unrolled taps have 3·K², and a K-fold copy of the input where unfold, or
    filters for all K² taps, make a K²-fold one. Height, width and batch may be symbolic: no
    number in the graph depends on them.

    Returns:
        (B, C, H, W) in the dtype of `x`.
    """
    groups, kernel = weight.shape[1:3]
    channels = x.shape[1]
    shifts = torch.eye(kernel, dtype=x.dtype, device=x.device).view(kernel, 1, 1, kernel)
    columns = F.conv2d(
        x, shifts.repeat(channels, 1, 1, 1), padding=kernel // 2, groups=channels
    ).unflatten(1, (groups, -1, kernel))
    rows = (slice(i, i - kernel + 1 or None) for i in range(kernel))
    total = sum((columns[..., row, :] * weight[:, :, None, i]).sum(3) for i, row in enumerate(rows))
    return total.flatten(1, 2)
