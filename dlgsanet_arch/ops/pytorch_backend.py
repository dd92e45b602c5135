"""The dynamic depthwise convolution in plain PyTorch, as a sum over the K² shifted pictures.

No K²-fold copy of the input is made. On a CPU the rows are taken in strips, so that a strip's
accumulator stays in cache while all taps are added to it. Filters that are given stream from
memory; filters that are projected are made for one strip at a time, in the forward and once more
in the backward, and their whole map never exists.
Sums are kept in float32 for half-precision inputs and have a fixed order: no atomic adds.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements (B · C · rows · W) of a strip: its accumulator and the input under it, in float32,
# together fill 4 MiB. Smaller strips cost more in calls, larger ones more in cache misses.
CPU_STRIP_ELEMENTS = 1 << 19
# The same where the filters of the strip are made on the spot: they want cache, too.
CPU_PROJECTED_STRIP_ELEMENTS = 1 << 18
# On a GPU strips bound memory alone: the filters of a strip fill 256 MiB in float32.
GPU_FILTER_ELEMENTS = 1 << 26


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _accumulable(values: Tensor) -> Tensor:
    """Return `values` in the dtype that sums are kept in, with neighbours in W side by side."""
    values = values.to(_sum_dtype(values))
    return values if values.stride(-1) == 1 else values.contiguous()


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


def _strips(height: int, row_elements: int, most_elements: int) -> Iterator[slice]:
    """Yield slices of rows, each of at most `most_elements` and of a row at least."""
    step = max(1, most_elements // max(1, row_elements))
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def _windows(padded: Tensor, kernel: int, rows: slice) -> list[Tensor]:
    """List the picture's `rows` seen through each of the K² taps, row by row of the filter."""
    width = padded.shape[-1] - kernel + 1
    under = padded[..., rows.start : rows.stop + kernel - 1, :]
    seen = under.unfold(3, rows.stop - rows.start, 1).unfold(4, width, 1)
    return [window for row in seen.unbind(3) for window in row.unbind(3)]


def _by_tap(filters: Tensor) -> list[Tensor]:
    """View (B, G, K, K, rows, W) as K² times (B, G, 1, rows, W), for any strides."""
    return [tap.unsqueeze(2) for row in filters.unbind(2) for tap in row.unbind(2)]


def _convolve(padded: Tensor, filters: Tensor, rows: slice) -> Tensor:
    """Convolve `rows` with their `filters` (B, G, K, K, rows, W) to (B, G, C // G, rows, W)."""
    windows = _windows(padded, filters.shape[2], rows)
    taps = _by_tap(filters)
    total = windows[0] * taps[0]
    for window, tap in zip(windows[1:], taps[1:], strict=True):
        total.addcmul_(window, tap)
    return total


def _spread(
    grad: Tensor,
    padded: Tensor,
    filters: Tensor,
    rows: slice,
    padded_grad: Tensor,
    grad_filters: Tensor,
) -> None:
    """Add to `padded_grad`, and write to `grad_filters`, what arrives at `rows`.

    Args:
        grad: (B, G, C // G, rows, W), of the output.
        padded: The padded input.
        filters: (B, G, K, K, rows, W).
        rows: Where in the picture.
        padded_grad: Of the padded input, in its shape.
        grad_filters: Of the filters, in their shape.
    """
    kernel = filters.shape[2]
    product = torch.empty_like(grad)
    for window, grad_window, tap, grad_tap in zip(
        _windows(padded, kernel, rows),
        _windows(padded_grad, kernel, rows),
        _by_tap(filters),
        _by_tap(grad_filters),
        strict=True,
    ):
        grad_window.addcmul_(grad, tap)
        torch.mul(grad, window, out=product)
        grad_tap.copy_(product.sum(2, keepdim=True))


def _unpadded(padded: Tensor, like: Tensor, kernel: int) -> Tensor:
    """Copy the padded picture without its border to a tensor like `like`."""
    border = kernel // 2
    height, width = like.shape[2:]
    inner = padded[..., border : border + height, border : border + width]
    return torch.empty_like(like).copy_(inner.flatten(1, 2))


def _given_strips(x: Tensor) -> Iterator[slice]:
    batch, channels, height, width = x.shape
    most = CPU_STRIP_ELEMENTS if x.device.type == "cpu" else x.numel()
    return _strips(height, batch * channels * width, most)


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the convolution; shapes as in `reference.dynamic_dwconv_reference`.

    Returns:
        (B, C, H, W) in the dtype and layout of `x`.
    """
    groups, kernel = weight.shape[1:3]
    padded = _padded(x, groups, kernel)
    out = torch.empty_like(x)
    for rows in _given_strips(x):
        filters = _accumulable(weight[..., rows, :])
        out[:, :, rows] = _convolve(padded, filters, rows).flatten(1, 2)
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients with respect to `x` and `weight` from `grad` (B, C, H, W).

    Returns:
        (B, C, H, W) and (B, G, K, K, H, W), in the dtypes and layouts of `x` and `weight`.
    """
    groups, kernel = weight.shape[1:3]
    padded = _padded(x, groups, kernel)
    padded_grad = torch.zeros_like(padded)
    grad_weight = torch.empty_like(weight)
    for rows in _given_strips(x):
        filters = _accumulable(weight[..., rows, :])
        arriving = _accumulable(_grouped(grad[:, :, rows], groups))
        _spread(arriving, padded, filters, rows, padded_grad, grad_weight[..., rows, :])
    return _unpadded(padded_grad, x, kernel), grad_weight


def _projected_strips(x: Tensor, filters: int) -> Iterator[slice]:
    batch, channels, height, width = x.shape
    if x.device.type == "cpu":
        return _strips(height, batch * channels * width, CPU_PROJECTED_STRIP_ELEMENTS)
    return _strips(height, batch * filters * width, GPU_FILTER_ELEMENTS)


class _Projection:
    """The 1x1 convolution that makes filters, applied to some rows at a time.

    Features and filters are in the dtype that sums are kept in.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> None:
        self.hidden = hidden
        self.weight = weight.to(_sum_dtype(weight))
        self.bias = bias.to(_sum_dtype(bias))
        self.kernel = kernel

    def features(self, rows: slice) -> Tensor:
        """Return the hidden features of `rows`: (B, D, rows · W)."""
        return self.hidden[:, :, rows].to(self.weight.dtype).flatten(2)

    def filters(self, features: Tensor) -> Tensor:
        """Make filters (B, G · K², rows · W)."""
        weight = self.weight.expand(len(features), -1, -1)
        return torch.baddbmm(self.bias[None, :, None], weight, features)

    def by_place(self, filters: Tensor) -> Tensor:
        """View filters as (B, G, K, K, rows, W)."""
        groups = len(self.bias) // self.kernel**2
        rows = filters.shape[2] // max(1, self.hidden.shape[3])
        shape = (groups, self.kernel, self.kernel, rows, self.hidden.shape[3])
        return filters.view(len(filters), *shape)


def projected_forward(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Compute the convolution; shapes as in `reference.projected_dwconv_reference`.

    Returns:
        (B, C, H, W) in the dtype and layout of `x`.
    """
    padded = _padded(x, weight.shape[0] // kernel**2, kernel)
    projection = _Projection(hidden, weight, bias, kernel)
    out = torch.empty_like(x)
    for rows in _projected_strips(x, weight.shape[0]):
        filters = projection.filters(projection.features(rows))
        out[:, :, rows] = _convolve(padded, projection.by_place(filters), rows).flatten(1, 2)
    return out


def projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients with respect to `x`, `hidden`, `weight` and `bias`.

    Returns:
        Each in the shape, dtype and layout of what it is the gradient of.
    """
    groups = weight.shape[0] // kernel**2
    padded = _padded(x, groups, kernel)
    padded_grad = torch.zeros_like(padded)
    projection = _Projection(hidden, weight, bias, kernel)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(projection.weight)
    grad_bias = torch.zeros_like(projection.bias)
    for rows in _projected_strips(x, weight.shape[0]):
        features = projection.features(rows)
        filters = projection.filters(features)
        grad_filters = torch.empty_like(filters)
        _spread(
            _accumulable(_grouped(grad[:, :, rows], groups)),
            padded,
            projection.by_place(filters),
            rows,
            padded_grad,
            projection.by_place(grad_filters),
        )
        grad_features = projection.weight.mT @ grad_filters
        grad_hidden[:, :, rows] = grad_features.view_as(grad_hidden[:, :, rows])
        grad_weight += (grad_filters @ features.mT).sum(0)
        grad_bias += grad_filters.sum((0, 2))
    return (
        _unpadded(padded_grad, x, kernel),
        grad_hidden,
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    )
