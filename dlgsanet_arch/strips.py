"""Inference on a CPU, in strips of rows that stay in cache.

A network's maps are far larger than a CPU's caches, and a chain of layers that writes each map
whole waits for memory. Here a chain of layers runs over a few rows at a time, with as many rows
around them as its convolutions see: the same modules, the same results, no map between them.
A hook on a module within a layer then sees strips; with gradients enabled it sees whole maps.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlgsanet_arch.tlc import Windows

# Elements of the widest map of a strip, 4 MiB in float32: with the maps around it, it stays in a
# share of L3, and the rows that are computed twice, at the seams, stay few.
STRIP_ELEMENTS = 1 << 20
LEAST_ROWS = 8


def pay_for(x: Tensor) -> bool:
    """Return whether `x` (B, C, H, W) is worked on in strips: eager inference on a CPU.

    Gradients need the maps, compilers fuse by themselves, and GPUs want large pieces.
    """
    return x.device.type == "cpu" and not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    )


@functools.cache
def keep_memory() -> None:
    """Let the process keep the memory of freed strips instead of giving it back to the system.

    glibc maps every block above a threshold afresh, and each of its pages then costs a fault. The
    threshold follows the largest block freed so far, up to 32 MiB. Elsewhere this does nothing.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def depthwise(conv: nn.Conv2d, x: Tensor, rows: slice | None) -> Tensor:
    """Return the `rows` of conv(x), all of them for None, and compute no others."""
    if rows is None:
        return conv(x)
    halo, sides = conv.padding
    above, below = max(0, halo - rows.start), max(0, halo - (x.shape[2] - rows.stop))
    x = x[:, :, max(0, rows.start - halo) : rows.stop + halo]
    if above or below:
        x = F.pad(x, (0, 0, above, below))
    return F.conv2d(x, conv.weight, conv.bias, padding=(0, sides), groups=conv.groups)


def _rows(height: int, width: int, channels: int) -> Iterator[slice]:
    """Yield even slices of rows whose map of `channels` has about STRIP_ELEMENTS elements."""
    most = max(LEAST_ROWS, STRIP_ELEMENTS // max(1, width * channels))
    count = -(-height // most)
    for i in range(count):
        yield slice(i * height // count, (i + 1) * height // count)


def _around(rows: slice, halo: int, height: int) -> tuple[slice, slice]:
    """Return `rows` with `halo` rows on either side in the picture, and where `rows` are there."""
    seen = slice(max(0, rows.start - halo), min(height, rows.stop + halo))
    return seen, slice(rows.start - seen.start, rows.stop - seen.start)


def _items(x: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(len(x)):
        yield x[i : i + 1], out[i : i + 1]


def _add_rows(source: Tensor, target: Tensor, rows: slice, result: Tensor) -> None:
    torch.add(source[:, :, rows], result, out=target[:, :, rows])


def add(
    function: Callable[[Tensor, slice], Tensor],
    x: Tensor,
    halo: int,
    channels: int,
    in_place: bool = False,
) -> Tensor:
    """Return x + function(x), in strips.

    Args:
        function: Maps some rows of a picture (1, C, H, W), and the slice of those that are asked
            for, to these rows (1, C, rows, W). Above and below what it is given it takes zeros.
        x: (B, C, H, W), best in channels_last.
        halo: Rows on either side of a pixel that `function` sees; in place at most a strip's.
        channels: Of the widest map within `function`.
        in_place: Write the sum to `x`, which spares the memory's bandwidth a map.
    """
    keep_memory()
    height, width = x.shape[2:]
    out = x if in_place else torch.empty_like(x)
    for source, target in _items(x, out):
        late: list[tuple[slice, Tensor]] = []
        for rows in _rows(height, width, channels):
            seen, inner = _around(rows, halo, height)
            late.append((rows, function(source[:, :, seen], inner)))
            # Written one strip late: in place, the next strip still sees the rows as they were.
            if len(late) > 1:
                _add_rows(source, target, *late.pop(0))
        for rows, result in late:
            _add_rows(source, target, rows, result)
    return out


def add_attention(
    x: Tensor,
    qkv: Callable[[Tensor, slice], Tensor],
    matrices: Callable[[Tensor, Tensor], Tensor],
    window: int | None,
) -> Tensor:
    """Return x plus its channel attention within windows, overlaps averaged, in strips.

    A window's attention is one C x C matrix: it is made from sums over the window's pixels, row
    by row of the picture, and acts on each pixel alone. So a pixel under several windows meets
    the mean of their matrices, and no window's pixels are ever gathered.

    Args:
        x: (B, C, H, W), best in channels_last.
        qkv: Maps as `function` of `add` does to (1, 3C, rows, W), seeing one row on either side.
        matrices: Maps the sums of each of n windows, Σ q kᵀ (n, C, C) and the squares Σ q², Σ k²
            (n, 2C), in float32 or wider, to what acts on v: (n, C, C).
        window: Side of the windows in pixels; None for one window over all.
    """
    keep_memory()
    out = torch.empty_like(x)
    for source, target in _items(x, out):
        _add_attention(source, target, qkv, matrices, window)
    return out


def _add_attention(
    x: Tensor,
    out: Tensor,
    qkv: Callable[[Tensor, slice], Tensor],
    matrices: Callable[[Tensor, Tensor], Tensor],
    window: int | None,
) -> None:
    _, channels, height, width = x.shape
    windows = Windows((height, width), window or max(height, width))
    wide = torch.promote_types(x.dtype, torch.float32)
    over_rows, over_columns = (axis.membership(wide) for axis in (windows.rows, windows.columns))
    columns = windows.columns.slices()
    v = x.new_empty(height, width, channels)
    products = x.new_zeros(len(columns), len(over_rows), channels**2, dtype=wide)
    squares = x.new_zeros(len(over_rows), len(columns), 2 * channels, dtype=wide)
    for rows in _rows(height, width, 3 * channels):
        seen, inner = _around(rows, 1, height)
        pixels = qkv(x[:, :, seen], inner)[0].permute(1, 2, 0)
        v[rows] = pixels[..., 2 * channels :]
        qk = pixels[..., : 2 * channels].to(wide)
        q, k = qk.split(channels, dim=2)
        share = over_rows[:, rows]
        for total, column in zip(products, columns, strict=True):
            total.addmm_(share, (q[:, column].mT @ k[:, column]).flatten(1))
        squares += torch.tensordot(share, over_columns @ qk.square(), 1)

    acting = matrices(
        products.transpose(0, 1).reshape(-1, channels, channels), squares.flatten(0, 1)
    ).reshape(len(over_rows), len(columns), -1)
    shares = (over_columns / over_columns.sum(0)).mT.to(x.dtype)
    source, target = (each[0].permute(1, 2, 0) for each in (x, out))
    for band, over in windows.rows.bands():
        column_matrices = (shares @ acting[over].mean(0)).view(-1, channels, channels)
        for rows in _rows(band.stop - band.start, width, channels):
            rows = slice(band.start + rows.start, band.start + rows.stop)
            attended = torch.bmm(v[rows].transpose(0, 1), column_matrices.mT)
            torch.add(source[rows], attended.transpose(0, 1), out=target[rows])
