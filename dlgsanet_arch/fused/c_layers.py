"""The halves of DLGSANet's layers in C, declared to PyTorch as operators without gradients.

Each takes and returns maps (B, C, H, W) in float32 on the CPU. Names and formulas are those of
`network.py`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlgsanet_arch import cpu
from dlgsanet_arch.cpu.library import LARGEST_KERNEL
from dlgsanet_arch.ops.declare import declare
from dlgsanet_arch.tlc import Axis

# Bytes of the rows that a thread keeps: they stay in its share of L2, 1 MiB on current servers.
RING_BYTES = 768 << 10
LEAST_ROWS = 8  # of a tile


def _ring_columns(ring: int) -> int:
    """Return how many columns a thread keeps of rows with `ring` floats for each column."""
    return max(16, RING_BYTES // (4 * ring))


def _tile(x: Tensor, halo: int, ring: int) -> tuple[int, int]:
    """Choose the rows and columns of a tile.

    Rows around a tile are computed twice, and all threads should end at the same time. Of the
    numbers of tiles that come close to the best in both, the largest is taken: a thread may be
    held up by others on the machine.

    Args:
        x: (B, C, H, W).
        halo: Rows on either side of a tile that are computed as well.
        ring: Floats that a thread keeps of each column.
    """
    batch, _, height, width = x.shape
    across = -(-width // _ring_columns(ring))
    threads = torch.get_num_threads()

    def rows_in_turn(down: int) -> int:
        return -(-batch * across * down // threads) * (-(-height // down) + halo)

    choices = range(1, max(1, height // LEAST_ROWS) + 1)
    best = min(map(rows_in_turn, choices))
    down = max(each for each in choices if rows_in_turn(each) <= 1.05 * best)
    return -(-height // down), -(-width // across)


# Rows of a tile of `attention_sums`. Its sums go over a tile's part of a cell, so they must not
# depend on the number of threads.
_SUM_ROWS = 48


def _sum_tile(x: Tensor) -> tuple[int, int]:
    return min(x.shape[2], _SUM_ROWS), min(x.shape[3], _ring_columns(3 * 3 * x.shape[1]))


def _borders(length: int, side: int) -> list[int]:
    """List where tiles of at most `side` start, and where the last ends, as the kernels do."""
    count = -(-length // side)
    return [length * i // count for i in range(count + 1)]


class _Cells(NamedTuple):
    """How windows and tiles cut an axis into cells.

    Attributes:
        summed: Where cells start that lie in one tile and under the same windows, and the end.
        members: Which window lies over which of these, zeros and ones (windows, cells).
        covered: The same as `summed` without tiles.
        shares: The weight of each window in the mean over a cell of `covered`, (windows, cells).
    """

    summed: list[int]
    members: Tensor
    covered: list[int]
    shares: Tensor


@functools.lru_cache(maxsize=64)
def _cells(axis: Axis, side: int) -> _Cells:
    covered = [0, *(cell.stop for cell in axis.cells())]
    summed = sorted({*covered, *_borders(axis.length, side)})
    members, shares = (torch.tensor(each[:-1], device="cpu") for each in (summed, covered))
    return _Cells(summed, axis.membership(members), covered, axis.shares(shares))


def _run(kernel: str, tile: tuple[int, int], tensors: Sequence[Tensor | None], *sizes: int) -> None:
    batch, _, height, width = tensors[0].shape
    dense = [each if each is None else each.contiguous() for each in tensors]
    cpu.run(kernel, dense, [batch, height, width, *tile, *sizes])


def _require(operator: str, x: Tensor, *pairs: tuple[Tensor, Sequence[int]]) -> None:
    """Refuse what is not float32 on a CPU, a tensor of another shape, and one that is missing."""
    if any(tensor is None for tensor, _ in pairs):  # PyTorch takes None for a tensor
        raise ValueError(f"{operator} needs all of its tensors; got None")
    cpu.require_shapes(operator, (x, x.shape), *pairs)


def _require_cuts(x: Tensor, *cuts: Sequence[int]) -> None:
    for each, length in zip(cuts, x.shape[2:], strict=True):
        rising = all(a < b for a, b in itertools.pairwise(each))
        if not rising or len(each) < 2 or each[0] != 0 or each[-1] != length:
            raise ValueError(f"cuts must rise from 0 to {length}; got {list(each)}")


def _entries(x: Any, *weights: Any) -> int:
    """Count a multiply-add of every pixel with every entry of these weights; takes shapes."""
    return 2 * x[0] * x[2] * x[3] * sum(map(math.prod, weights))


def _like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _add_gdfn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    dwconv: Tensor,
    project_out: Tensor,
) -> Tensor:
    """Return x + GDFN(LN(x)).

    Args:
        x: (B, C, H, W).
        norm_weight: (C,).
        norm_bias: (C,).
        project_in: (2e, C, 1, 1).
        dwconv: (2e, 1, 3, 3).
        project_out: (C, e, 1, 1).
    """
    channels, hidden = x.shape[1], project_out.shape[1]
    _require(
        "add_gdfn",
        x,
        (norm_weight, (channels,)),
        (norm_bias, (channels,)),
        (project_in, (2 * hidden, channels, 1, 1)),
        (dwconv, (2 * hidden, 1, 3, 3)),
        (project_out, (channels, hidden, 1, 1)),
    )
    out = x.new_empty(x.shape)
    tensors = (x, norm_weight, norm_bias, project_in, dwconv, project_out, out)
    _run("add_gdfn", _tile(x, 1, 3 * 2 * hidden), tensors, channels, hidden)
    return out


def _add_mhdlsa(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv0: Tensor,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    dwconv: Tensor,
    dwconv_bias: Tensor,
    projection: Tensor,
    projection_bias: Tensor,
    conv1: Tensor,
) -> Tensor:
    """Return x + MHDLSA(LN(x)), with filters of at most LARGEST_KERNEL.

    Args:
        x: (B, C, H, W).
        norm_weight: (C,).
        norm_bias: (C,).
        conv0: (C, C, 1, 1).
        squeeze: (D, C, 1, 1), the generator's first convolution.
        squeeze_bias: (D,).
        dwconv: (D, 1, K, K).
        dwconv_bias: (D,).
        projection: (G·K², D, 1, 1), the generator's last convolution.
        projection_bias: (G·K²,).
        conv1: (C, C, 1, 1).
    """
    channels, (hidden, _, kernel, _) = x.shape[1], dwconv.shape
    groups = len(projection) // kernel**2
    _require(
        "add_mhdlsa",
        x,
        (norm_weight, (channels,)),
        (norm_bias, (channels,)),
        (conv0, (channels, channels, 1, 1)),
        (squeeze, (hidden, channels, 1, 1)),
        (squeeze_bias, (hidden,)),
        (dwconv, (hidden, 1, kernel, kernel)),
        (dwconv_bias, (hidden,)),
        (projection, (groups * kernel**2, hidden, 1, 1)),
        (projection_bias, (groups * kernel**2,)),
        (conv1, (channels, channels, 1, 1)),
    )
    if groups == 0 or channels % groups or kernel % 2 == 0 or kernel > LARGEST_KERNEL:
        raise ValueError(f"add_mhdlsa cannot have {channels=}, {groups=}, {kernel=}")
    out = x.new_empty(x.shape)
    tile = _tile(x, kernel // 2, kernel * (channels + hidden))
    tensors = (
        *(x, norm_weight, norm_bias, conv0, squeeze, squeeze_bias, dwconv, dwconv_bias),
        *(projection, projection_bias, conv1, out),
    )
    _run("add_mhdlsa", tile, tensors, channels, hidden, groups, kernel)
    return out


def _mhdlsa_flops(x: Any, *weights: Any) -> int:
    _, _, conv0, squeeze, _, dwconv, _, projection, _, conv1 = weights
    filters = (x[1], *dwconv[2:])  # each channel of a pixel meets a filter
    return _entries(x, conv0, squeeze, dwconv, projection, filters, conv1)


def _attention_sums(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv: Tensor,
    dwconv: Tensor,
    heads: int,
    row_cuts: Sequence[int],
    column_cuts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute q, k and v from LN(x), and of q and k only sums over the cells of a grid.

    Args:
        x: (B, C, H, W).
        norm_weight: (C,).
        norm_bias: (C,).
        qkv: (3C, C, 1, 1).
        dwconv: (3C, 1, 3, 3).
        heads: h, of c = C // h channels each.
        row_cuts: The rows where the cells start, and H; borders of tiles (`_sum_tile`) among them.
        column_cuts: The columns where the cells start, and W; likewise.

    Returns:
        v (B, C, H, W), and (B, rows, columns, C·c + 2C) for the cells: Σ q kᵀ of each head, and
        Σ q² and Σ k² of each channel.
    """
    channels, tile = x.shape[1], _sum_tile(x)
    _require(
        "attention_sums",
        x,
        (norm_weight, (channels,)),
        (norm_bias, (channels,)),
        (qkv, (3 * channels, channels, 1, 1)),
        (dwconv, (3 * channels, 1, 3, 3)),
    )
    if channels % heads:
        raise ValueError(f"attention_sums cannot have {heads=} for {channels=}")
    _require_cuts(x, row_cuts, column_cuts)
    for cuts, length, side in zip((row_cuts, column_cuts), x.shape[2:], tile, strict=True):
        if not set(_borders(length, side)) <= set(cuts):
            raise ValueError(f"attention_sums needs cuts at {_borders(length, side)}")
    v, sums = _sums_like(x, norm_weight, norm_bias, qkv, dwconv, heads, row_cuts, column_cuts)
    cuts = [torch.tensor(each, device="cpu") for each in (row_cuts, column_cuts)]
    tensors = (x, norm_weight, norm_bias, qkv, dwconv, *cuts, v, sums.zero_())
    _run("attention_sums", tile, tensors, channels, heads, *sums.shape[1:3])
    return v, sums


def _sums_like(x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    *_, heads, row_cuts, column_cuts = given
    channels = x.shape[1]
    features = channels * (channels // heads) + 2 * channels
    cells = (len(row_cuts) - 1, len(column_cuts) - 1)
    return x.new_empty(x.shape), x.new_empty((len(x), *cells, features))


def _sums_flops(x: Any, norm_weight: Any, norm_bias: Any, *given: Any) -> int:
    qkv, dwconv, heads, *_ = given
    return _entries(x, qkv, dwconv, (x[1], x[1] // heads))


def _add_attended(
    x: Tensor,
    v: Tensor,
    matrices: Tensor,
    row_cuts: Sequence[int],
    column_cuts: Sequence[int],
) -> Tensor:
    """Return x + M v, M the matrix of the cell that a pixel lies in.

    Args:
        x: (B, C, H, W).
        v: (B, C, H, W).
        matrices: (B, rows, columns, C, C).
        row_cuts: As in `_attention_sums`, but without tiles.
        column_cuts: Likewise.
    """
    batch, channels = x.shape[:2]
    cells = (len(row_cuts) - 1, len(column_cuts) - 1)
    _require("add_attended", x, (v, x.shape), (matrices, (batch, *cells, channels, channels)))
    _require_cuts(x, row_cuts, column_cuts)
    out = x.new_empty(x.shape)
    cuts = [torch.tensor(each, device="cpu") for each in (row_cuts, column_cuts)]
    tile = _tile(x, 2, 2 * channels)  # each tile packs its cells' matrices
    _run("add_attended", tile, (x, v, matrices, *cuts, out), channels, *cells)
    return out


def _convolve3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of x (B, C, H, W) with a border of zeros: (B, C', H, W).

    Args:
        x: (B, C, H, W).
        weight: (C', C, 3, 3).
        bias: (C',), or None for zeros.
    """
    outs, channels = len(weight), x.shape[1]
    given = [] if bias is None else [(bias, (outs,))]
    _require("convolve3x3", x, (weight, (outs, channels, 3, 3)), *given)
    out = _convolved_like(x, weight)
    _run("convolve3x3", _tile(x, 1, 3 * channels), (x, weight, bias, out), channels, outs)
    return out


def _convolved_like(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((len(x), len(weight), *x.shape[2:]))


_on_cpu = functools.partial(declare, device_types="cpu")
add_gdfn = _on_cpu(
    "add_gdfn", _add_gdfn, result=_like, flops=lambda x, _, __, *weights: _entries(x, *weights)
)
add_mhdlsa = _on_cpu("add_mhdlsa", _add_mhdlsa, result=_like, flops=_mhdlsa_flops)
attention_sums = _on_cpu("attention_sums", _attention_sums, result=_sums_like, flops=_sums_flops)
add_attended = _on_cpu(
    "add_attended", _add_attended, result=_like, flops=lambda x, *_: _entries(x, (x[1], x[1]))
)
convolve3x3 = _on_cpu(
    "convolve3x3",
    _convolve3x3,
    result=_convolved_like,
    flops=lambda x, weight, _: _entries(x, weight),
)


def add_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv: Tensor,
    dwconv: Tensor,
    heads: int,
    matrices: Callable[[Tensor, Tensor], Tensor],
    window: int | None,
) -> Tensor:
    """Return x plus its channel attention within windows, overlaps averaged.

    A window's attention is one C x C matrix, made from sums over its pixels: those of the cells
    that the borders of all windows cut the image into. A pixel under several windows meets the
    mean of their matrices, so that no pixel is worked on twice.

    Args:
        x: (B, C, H, W).
        norm_weight: As in `_attention_sums`.
        norm_bias: As in `_attention_sums`.
        qkv: As in `_attention_sums`.
        dwconv: As in `_attention_sums`.
        heads: As in `_attention_sums`.
        matrices: Maps the sums of n windows, Σ q kᵀ (n, h, c, c) and Σ q² and Σ k² (n, 2C), to
            what acts on v: (n, C, C).
        window: Side of the windows in pixels; None for one window over all.
    """
    batch, channels, height, width = x.shape
    axes = Axis.plan(height, window), Axis.plan(width, window)
    rows, columns = map(_cells, axes, _sum_tile(x))
    v, sums = attention_sums(
        x, norm_weight, norm_bias, qkv, dwconv, heads, rows.summed, columns.summed
    )
    sums = torch.einsum("ir,jc,brcf->bijf", rows.members, columns.members, sums).flatten(0, 2)
    products, squares = sums.split([sums.shape[1] - 2 * channels, 2 * channels], 1)
    acting = matrices(products.unflatten(1, (heads, channels // heads, -1)), squares)
    acting = acting.unflatten(0, (batch, axes[0].count, axes[1].count))
    acting = torch.einsum("ir,jc,bijde->brcde", rows.shares, columns.shares, acting)
    return add_attended(x, v, acting, rows.covered, columns.covered)
