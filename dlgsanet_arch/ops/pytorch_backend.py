"""The dynamic depthwise convolution in plain PyTorch, as a sum over the K² shifted images.

No K²-fold copy of the input is made. Rows are taken in strips: on a CPU a strip's accumulator stays
in cache while all taps are added to it; projected filters are made for one strip at a time, in the
forward and once more in the backward, and their whole map never exists.
Sums are kept in float32 for half-precision inputs and have a fixed order: no atomic adds.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from dlgsanet_arch.precision import widened

# Elements of a strip, at most: of its output on a CPU (in cache with what it is made of), of its
# filters on a GPU (256 MiB in float32), where strips bound memory alone.
_CPU_ELEMENTS = 1 << 18
_GPU_FILTER_ELEMENTS = 1 << 26

# The filters (B, G, K, K, rows, W) of some rows.
_Filters: TypeAlias = Callable[[slice], Tensor]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the convolution as a short graph of plain operators, for exported models.

    One depthwise convolution with filters of zeros and a one lays the K column shifts side by
    side, then each of the K filter rows is one product and one sum. That is about 5·K nodes in
    the graph where unrolled taps have 3·K², and a K-fold copy of the input. Height, width and
    batch may be symbolic: no number in the graph depends on them.
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


def _convolve(x: Tensor, groups: int, kernel: int, filters: _Filters) -> Tensor:
    """Return the convolution in the dtype and layout of `x`."""
    padded, out = _padded(x, groups, kernel), torch.empty_like(x)
    for rows in _strips(x, groups * kernel**2):
        pairs = zip(_windows(padded, kernel, rows), _taps(filters(rows)), strict=True)
        window, tap = next(pairs)
        total = window * tap
        for window, tap in pairs:
            total.addcmul_(window, tap)
        out[:, :, rows] = total.flatten(1, 2)
    return out


def _spread(
    grad: Tensor,
    x: Tensor,
    groups: int,
    kernel: int,
    filters: _Filters,
    take: Callable[[slice, Tensor], None],
) -> Tensor:
    """Return the gradient of `x`; `take` gets that of the filters, for some rows at a time."""
    padded = _padded(x, groups, kernel)
    padded_grad = torch.zeros_like(padded)
    for rows in _strips(x, groups * kernel**2):
        wide, own = _wide(grad[:, :, rows]).unflatten(1, (groups, -1)), filters(rows)
        grad_filters = torch.empty_like(own, memory_format=torch.contiguous_format)
        parts = zip(
            *(_windows(each, kernel, rows) for each in (padded, padded_grad)),
            *(_taps(each) for each in (own, grad_filters)),
            strict=True,
        )
        for window, grad_window, tap, grad_tap in parts:
            grad_window.addcmul_(wide, tap)
            torch.sum(wide * window, 2, keepdim=True, out=grad_tap)
        take(rows, grad_filters)
    border, (height, width) = kernel // 2, x.shape[2:]
    inner = padded_grad[..., border : border + height, border : border + width]
    return torch.empty_like(x).copy_(inner.flatten(1, 2))


def _given(weight: Tensor) -> _Filters:
    return lambda rows: _wide(weight[..., rows, :])


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `ops.dynamic_dwconv`."""
    return _convolve(x, *weight.shape[1:3], _given(weight))


def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `x` and `weight`, in their dtypes and layouts."""
    grad_weight = torch.empty_like(weight)

    def take(rows: slice, grad_filters: Tensor) -> None:
        grad_weight[..., rows, :] = grad_filters

    return _spread(grad, x, *weight.shape[1:3], _given(weight), take), grad_weight


def _projection(hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> _Filters:
    wide_bias = _wide(bias)[:, None]
    wide_weight = _wide(weight).expand(len(hidden), -1, -1)

    def filters(rows: slice) -> Tensor:
        features = _wide(hidden[:, :, rows])
        projected = torch.baddbmm(wide_bias, wide_weight, features.flatten(2))
        return projected.view(
            len(hidden), len(bias) // kernel**2, kernel, kernel, *features.shape[2:]
        )

    return filters


def projected_forward(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Compute `ops.projected_dwconv`."""
    filters = _projection(hidden, weight, bias, kernel)
    return _convolve(x, len(bias) // kernel**2, kernel, filters)


def projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of all tensors, in their shapes, dtypes and layouts."""
    wide_weight, grad_hidden = _wide(weight), torch.empty_like(hidden)
    grad_weight, grad_bias = torch.zeros_like(wide_weight), torch.zeros_like(_wide(bias))

    def take(rows: slice, grad_filters: Tensor) -> None:
        by_tap = grad_filters.flatten(1, 3)
        grad_hidden[:, :, rows] = torch.einsum("od,bohw->bdhw", wide_weight, by_tap)
        grad_weight.add_(torch.einsum("bohw,bdhw->od", by_tap, _wide(hidden[:, :, rows])))
        grad_bias.add_(by_tap.sum((0, 2, 3)))

    filters = _projection(hidden, weight, bias, kernel)
    grad_x = _spread(grad, x, len(bias) // kernel**2, kernel, filters, take)
    return (
        grad_x,
        grad_hidden,
        torch.empty_like(weight).copy_(grad_weight),
        torch.empty_like(bias).copy_(grad_bias),
    )
