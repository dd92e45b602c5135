"""The dynamic depthwise convolution in plain PyTorch, as a sum over the K² shifted images.

No K²-fold copy of the input is made. Rows are taken in strips: on a CPU a strip's accumulator stays
in cache while all taps are added to it; projected filters are made for one strip at a time, in the
forward and once more in the backward, and their whole map never exists.
Sums are kept in float32 for half-precision inputs and have a fixed order: no atomic adds.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dlgsanet_arch.precision import widened

# Elements of a strip, at most: of its output on a CPU (in cache with what it is made of), of its
# filters on a GPU (256 MiB in float32), where strips bound memory alone.
_CPU_ELEMENTS = 1 << 18
_GPU_FILTER_ELEMENTS = 1 << 26


def _wide(values: Tensor) -> Tensor:
    """Return `values` in the dtype that sums are kept in."""
    return values.to(widened(values.dtype))


def _strips(x: Tensor, taps: int) -> Iterator[slice]:
    """Yield slices of the rows of `x`, whose pixels have filters of `taps` values."""
    batch, channels, height, width = x.shape
    on_cpu = x.device.type == "cpu"
    most = _CPU_ELEMENTS if on_cpu else _GPU_FILTER_ELEMENTS
    step = max(1, most // max(1, batch * width * (channels if on_cpu else taps)))
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def _padded(x: Tensor, groups: int, kernel: int) -> Tensor:
    """Copy (B, C, H, W) into (B, G, C // G, H + K - 1, W + K - 1) with a border of zeros."""
    padded = F.pad(_wide(x), (kernel // 2,) * 4)
    return padded.unflatten(1, (groups, x.shape[1] // groups))


def _windows(padded: Tensor, kernel: int, rows: slice) -> Iterator[Tensor]:
    """Yield the image's `rows` seen through each of the K² taps, row by row of the filter."""
    width = padded.shape[-1] - kernel + 1
    for i in range(kernel):
        for j in range(kernel):
            yield padded[..., rows.start + i : rows.stop + i, j : j + width]


def _taps(filters: Tensor) -> Iterator[Tensor]:
    """Yield (B, G, K, K, rows, W) as K² times (B, G, 1, rows, W)."""
    for tap in filters.flatten(2, 3).unbind(2):
        yield tap.unsqueeze(2)


def _convolve(padded: Tensor, filters: Tensor, rows: slice) -> Tensor:
    """Convolve `rows` with their `filters` (B, G, K, K, rows, W) to (B, C, rows, W)."""
    pairs = zip(_windows(padded, filters.shape[2], rows), _taps(filters), strict=True)
    window, tap = next(pairs)
    total = window * tap
    for window, tap in pairs:
        total.addcmul_(window, tap)
    return total.flatten(1, 2)


def _spread(
    grad: Tensor, padded: Tensor, filters: Tensor, rows: slice, padded_grad: Tensor
) -> Tensor:
    """Add to `padded_grad` what `rows` bring, and return the gradient of their filters.

    Args:
        grad: (B, C, rows, W), of the output.
        padded: The padded input.
        filters: (B, G, K, K, rows, W).
        rows: Where in the image.
        padded_grad: Of the padded input, in its shape.
    """
    kernel, grad = filters.shape[2], _wide(grad).unflatten(1, (filters.shape[1], -1))
    grad_filters = torch.empty_like(filters, memory_format=torch.contiguous_format)
    parts = zip(
        *(_windows(each, kernel, rows) for each in (padded, padded_grad)),
        *(_taps(each) for each in (filters, grad_filters)),
        strict=True,
    )
    for window, grad_window, tap, grad_tap in parts:
        grad_window.addcmul_(grad, tap)
        torch.sum(grad * window, 2, keepdim=True, out=grad_tap)
    return grad_filters


def _unpadded(padded: Tensor, like: Tensor, kernel: int) -> Tensor:
    """Copy the padded image without its border to a tensor like `like`."""
    border, (height, width) = kernel // 2, like.shape[2:]
    inner = padded[..., border : border + height, border : border + width]
    return torch.empty_like(like).copy_(inner.flatten(1, 2))


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the convolution; shapes as in `reference.dynamic_dwconv_reference`.

    Returns:
        (B, C, H, W) in the dtype and layout of `x`.
    """
    groups, kernel = weight.shape[1:3]
    padded, out = _padded(x, groups, kernel), torch.empty_like(x)
    for rows in _strips(x, groups * kernel**2):
        out[:, :, rows] = _convolve(padded, _wide(weight[..., rows, :]), rows)
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `x` and `weight` from `grad` (B, C, H, W).

    Returns:
        (B, C, H, W) and (B, G, K, K, H, W), in the dtypes and layouts of `x` and `weight`.
    """
    groups, kernel = weight.shape[1:3]
    padded, grad_weight = _padded(x, groups, kernel), torch.empty_like(weight)
    padded_grad = torch.zeros_like(padded)
    for rows in _strips(x, groups * kernel**2):
        filters = _wide(weight[..., rows, :])
        grad_weight[..., rows, :] = _spread(grad[:, :, rows], padded, filters, rows, padded_grad)
    return _unpadded(padded_grad, x, kernel), grad_weight


def _project(hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> Tensor:
    """Make the filters of some rows: (B, G, K, K, rows, W)."""
    features = _wide(hidden).flatten(2)
    filters = torch.baddbmm(
        _wide(bias)[:, None], _wide(weight).expand(len(hidden), -1, -1), features
    )
    groups = len(bias) // kernel**2
    return filters.view(len(hidden), groups, kernel, kernel, *hidden.shape[2:])


def projected_forward(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Compute the convolution; shapes as in `reference.projected_dwconv_reference`.

    Returns:
        (B, C, H, W) in the dtype and layout of `x`.
    """
    padded, out = _padded(x, len(bias) // kernel**2, kernel), torch.empty_like(x)
    for rows in _strips(x, len(bias)):
        filters = _project(hidden[:, :, rows], weight, bias, kernel)
        out[:, :, rows] = _convolve(padded, filters, rows)
    return out


def projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `x`, `hidden`, `weight` and `bias`.

    Returns:
        Each in the shape, dtype and layout of what it is the gradient of.
    """
    padded = _padded(x, len(bias) // kernel**2, kernel)
    padded_grad, grad_hidden = torch.zeros_like(padded), torch.empty_like(hidden)
    grad_weight, grad_bias = torch.zeros_like(_wide(weight)), torch.zeros_like(_wide(bias))
    for rows in _strips(x, len(bias)):
        filters = _project(hidden[:, :, rows], weight, bias, kernel)
        by_tap = _spread(grad[:, :, rows], padded, filters, rows, padded_grad).flatten(1, 3)
        grad_hidden[:, :, rows] = torch.einsum("od,bohw->bdhw", _wide(weight), by_tap)
        grad_weight += torch.einsum("bohw,bdhw->od", by_tap, _wide(hidden[:, :, rows]))
        grad_bias += by_tap.sum((0, 2, 3))
    return (
        _unpadded(padded_grad, x, kernel),
        grad_hidden,
        torch.empty_like(weight).copy_(grad_weight),
        torch.empty_like(bias).copy_(grad_bias),
    )
