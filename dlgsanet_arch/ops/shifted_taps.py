"""The dynamic depthwise convolution in plain PyTorch, as a sum over the K² shifted pictures.

No K²-fold copy of the input is made. On a CPU the rows are taken in strips, so that a strip's
accumulator stays in cache while all taps are added to it; only the filters stream from memory.
Sums are kept in float32 for half-precision inputs and have a fixed order: no atomic adds.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements (B · C · rows · W) of a strip: its accumulator and the input under it, in float32,
# together fill 4 MiB. Smaller strips cost more in calls, larger ones more in cache misses.
CPU_STRIP_ELEMENTS = 1 << 19


def _accumulable(values: Tensor) -> Tensor:
    """Return `values` in the dtype that sums are kept in, with neighbours in W side by side."""
    values = values.to(_sum_dtype(values))
    return values if values.stride(-1) == 1 else values.contiguous()


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """View (B, C, H, W) as (B, G, C // G, H, W)."""
    return x.unflatten(1, (groups, -1))


def _padded(x: Tensor, groups: int, kernel: int) -> Tensor:
    """Copy (B, C, H, W) into (B, G, C // G, H + K - 1, W + K - 1) with a border of zeros."""
    border = kernel // 2
    batch, channels, height, width = x.shape
    padded = x.new_zeros(
        (batch, channels, height + 2 * border, width + 2 * border), dtype=_sum_dtype(x)
    )
    padded[..., border : border + height, border : border + width] = x
    return _grouped(padded, groups)


def _strips(x: Tensor) -> Iterator[slice]:
    """Yield the rows to work on at a time: all of them, except on a CPU."""
    batch, channels, height, width = x.shape
    step = height
    if x.device.type == "cpu":
        step = max(1, CPU_STRIP_ELEMENTS // max(1, batch * channels * width))
    for start in range(0, height, max(1, step)):
        yield slice(start, min(start + step, height))


def _taps(padded: Tensor, kernel: int, rows: slice) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (i, j, the picture's `rows` seen through tap i, j) for each of the K² taps."""
    width = padded.shape[-1] - kernel + 1
    for i in range(kernel):
        for j in range(kernel):
            yield i, j, padded[..., rows.start + i : rows.stop + i, j : j + width]


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the convolution; shapes as in `reference.dynamic_dwconv_reference`.

    Returns:
        (B, C, H, W), contiguous, in the dtype of `x`.
    """
    groups, kernel = weight.shape[1:3]
    padded = _padded(x, groups, kernel)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grouped_out = _grouped(out, groups)
    for rows in _strips(x):
        filters = _accumulable(weight[..., rows, :])
        total = torch.zeros_like(grouped_out[..., rows, :], dtype=padded.dtype)
        for i, j, window in _taps(padded, kernel, rows):
            total.addcmul_(window, filters[:, :, None, i, j])
        grouped_out[..., rows, :] = total
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients with respect to `x` and `weight` from `grad` (B, C, H, W).

    Returns:
        (B, C, H, W) and (B, G, K, K, H, W), contiguous, in the dtypes of `x` and `weight`.
    """
    groups, kernel = weight.shape[1:3]
    padded = _padded(x, groups, kernel)
    padded_grad_x = torch.zeros_like(padded)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    grouped_grad = _grouped(grad, groups)
    for rows in _strips(x):
        filters = _accumulable(weight[..., rows, :])
        arriving = _accumulable(grouped_grad[..., rows, :])
        product = torch.empty_like(arriving)
        input_taps = _taps(padded, kernel, rows)
        grad_taps = _taps(padded_grad_x, kernel, rows)
        for (i, j, window), (_, _, grad_window) in zip(input_taps, grad_taps, strict=True):
            grad_window.addcmul_(arriving, filters[:, :, None, i, j])
            torch.mul(arriving, window, out=product)
            grad_weight[:, :, i, j, rows] = product.sum(2)
    border = kernel // 2
    height, width = x.shape[2:]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_x.copy_(
        padded_grad_x[..., border : border + height, border : border + width].flatten(1, 2)
    )
    return grad_x, grad_weight
