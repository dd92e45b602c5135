"""The halves of DLGSANet's layers in C, for float32 on the CPU and without gradients.

Each takes a map (B, C, H, W), the norm before a mixer and the mixer, reads their weights, and
returns x + mixer(norm(x)). Names and formulas are those of `network.py`.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dlgsanet_arch import cpu
from dlgsanet_arch.cpu.library import LARGEST_KERNEL
from dlgsanet_arch.fused.weights import read, read_mhdlsa
from dlgsanet_arch.ops import attention_weights
from dlgsanet_arch.ops.shapes import Pattern, sizes
from dlgsanet_arch.tlc import Axis

if TYPE_CHECKING:
    from dlgsanet_arch.network import GDFN, MHDLSA, LayerNorm, SparseGSA

# Bytes of the rows that a thread keeps: they stay in its share of L2, 1 MiB on current servers.
RING_BYTES = 768 << 10
LEAST_ROWS = 8  # of a tile
# Rows of a tile of `attention_sums`. Its sums go over a tile's part of a cell, so they must not
# depend on the number of threads.
_SUM_ROWS = 48

_CONV3X3 = Pattern("x: B C H W; weight: O C 3 3; bias: O")


def can_run(x: Tensor, *weights: Tensor) -> bool:
    """Return whether these forms take such a map and the weights of a norm and a mixer."""
    sides = (each.shape[-1] for each in weights if each.dim() == 4)
    return cpu.can_run(x, *weights) and max(sides, default=1) <= LARGEST_KERNEL


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


def _run(
    kernel: str,
    tile: tuple[int, int],
    tensors: Sequence[Tensor | Sequence[int] | None],
    *numbers: int,
) -> None:
    batch, _, height, width = tensors[0].shape
    dense = [each.contiguous() if isinstance(each, Tensor) else each for each in tensors]
    cpu.run(kernel, dense, [batch, height, width, *tile, *numbers])


def add_gdfn(x: Tensor, norm: "LayerNorm", gdfn: "GDFN") -> Tensor:
    """Return x + GDFN(LN(x))."""
    tensors, (_, channels, _, _, hidden) = read("add_gdfn", x, norm, gdfn)
    out = x.new_empty(x.shape)
    _run("add_gdfn", _tile(x, 1, 3 * 2 * hidden), [*tensors, out], channels, hidden)
    return out


def add_mhdlsa(x: Tensor, norm: "LayerNorm", mhdlsa: "MHDLSA") -> Tensor:
    """Return x + MHDLSA(LN(x)), with filters of at most LARGEST_KERNEL."""
    tensors, numbers = read_mhdlsa(x, norm, mhdlsa)
    _, channels, _, _, hidden, kernel, groups = numbers
    out = x.new_empty(x.shape)
    tile = _tile(x, kernel // 2, kernel * (channels + hidden))
    _run("add_mhdlsa", tile, [*tensors, out], channels, hidden, groups, kernel)
    return out


def convolve3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of x (B, C, H, W) by weight (O, C, 3, 3), with a border of zeros."""
    batch, channels, height, width, outs = sizes("convolve3x3", _CONV3X3, x, weight, bias)
    out = x.new_empty((batch, outs, height, width))
    _run("convolve3x3", _tile(x, 1, 3 * channels), (x, weight, bias, out), channels, outs)
    return out


class _Cells(NamedTuple):
    """How windows and tiles cut an axis into cells."""

    summed: list[int]  # where cells in one tile and under the same windows start, and the end
    members: Tensor  # which window lies over which of these, zeros and ones (windows, cells)
    covered: list[int]  # as `summed`, without tiles
    shares: Tensor  # of each window in the mean over a cell of `covered`, (windows, cells)


@functools.lru_cache(maxsize=64)
def _cells(axis: Axis, side: int) -> _Cells:
    """Cut an axis by its windows, and by tiles of at most `side` as the kernels do."""
    tiles = -(-axis.length // side)
    covered = [0, *(cell.stop for cell in axis.cells())]
    summed = sorted({*covered, *(axis.length * i // tiles for i in range(tiles))})
    members, shares = (torch.tensor(each[:-1], device="cpu") for each in (summed, covered))
    return _Cells(summed, axis.membership(members), covered, axis.shares(shares))


def add_attention(x: Tensor, norm: "LayerNorm", attention: "SparseGSA") -> Tensor:
    """Return x + SparseGSA(LN(x)), within windows in eval mode and their overlaps averaged.

    A window's attention is one C x C matrix, made from sums over its pixels: those of the cells
    that the borders of all windows cut the image into. A pixel under several windows meets the
    mean of their matrices, so that no pixel is worked on twice.
    """
    heads, window = attention.heads, attention.eval_window()
    tensors, numbers = read("add_attention", x, norm, attention, h=heads)
    *tensors, projection = tensors
    batch, channels, height, width, share = numbers
    # q, k and v. Of q and k there are only sums over cells: Σ q kᵀ of each head, Σ q² and Σ k².
    axes = Axis.plan(height, window), Axis.plan(width, window)
    tile = min(height, _SUM_ROWS), min(width, _ring_columns(3 * 3 * channels))
    rows, columns = map(_cells, axes, tile)
    cells = len(rows.summed) - 1, len(columns.summed) - 1
    v, sums = x.new_empty(x.shape), x.new_zeros(batch, *cells, channels * (share + 2))
    tensors += [rows.summed, columns.summed, v, sums]
    _run("attention_sums", tile, tensors, channels, heads, *cells)
    # What acts on v, for each window and then for each cell, the projection included.
    sums = torch.einsum("ir,jc,brcf->bijf", rows.members, columns.members, sums)
    products, squares = sums.split([channels * share, 2 * channels], -1)
    acting = attention_weights(
        products.unflatten(-1, (heads, share, share)),
        squares.unflatten(-1, (2, heads, share)),
        attention.temperature,
        attention.activation,
    )
    projection = projection.flatten(1).unflatten(1, (heads, share))
    acting = torch.einsum("ohc,bijhcd->bijohd", projection, acting).flatten(-2)
    acting = torch.einsum("ir,jc,bijde->brcde", rows.shares, columns.shares, acting)
    out = x.new_empty(x.shape)
    tile = _tile(x, 2, 2 * channels)  # each tile packs its cells' matrices
    tensors = (x, v, acting, rows.covered, columns.covered, out)
    _run("add_attended", tile, tensors, channels, *acting.shape[1:3])
    return out
