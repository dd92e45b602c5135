"""The layers of DLGSANet that have a kernel, declared to PyTorch as operators for inference.

Each takes and returns maps (B, C, H, W) in float32 on the CPU, without gradients. Names and
formulas are those of `network.py`, which decides when a layer is computed this way.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from dlgsanet_arch import strips
from dlgsanet_arch.cpu import library
from dlgsanet_arch.tlc import Axis, Windows

# Bytes of the rows that a thread keeps: they stay in its share of L2, 1 MiB on current servers.
RING_BYTES = 768 << 10
LEAST_ROWS = 8  # of a tile


def serves(x: Tensor) -> bool:
    """Return whether there are kernels for a map like `x`: float32 inference on a CPU."""
    return (
        strips.pay_for(x)
        and x.dtype == torch.float32
        and type(x) is Tensor
        and x.numel() > 0
        and library.load() is not None
    )


def serves_weights(module: nn.Module) -> bool:
    """Return whether kernels can read the weights that `module` itself has."""
    return all(
        weight is None
        or (type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.is_cpu)
        for weight in module._parameters.values()
    )


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
    across = -(-width // max(16, RING_BYTES // (4 * ring)))
    threads = torch.get_num_threads()

    def rows_in_turn(down: int) -> int:
        return -(-batch * across * down // threads) * (-(-height // down) + halo)

    choices = range(1, max(1, height // LEAST_ROWS) + 1)
    best = min(map(rows_in_turn, choices))
    down = max(each for each in choices if rows_in_turn(each) <= 1.05 * best)
    return -(-height // down), -(-width // across)


def _borders(length: int, side: int) -> list[int]:
    """List where tiles of at most `side` start, and where the last ends, as the kernels do."""
    count = -(-length // side)
    return [length * i // count for i in range(count + 1)]


class _Cells(NamedTuple):
    """How windows and tiles cut an axis into cells.

    Attributes:
        summed: Where cells start that lie in one tile and under the same windows, and the end.
        members: Which window lies over which of these, zeros and ones (windows, cells).
        covered: The same without tiles.
        shares: The weight of each window in the mean over a cell of `covered`, (windows, cells).
    """

    summed: list[int]
    members: Tensor
    covered: list[int]
    shares: Tensor


@functools.lru_cache(maxsize=64)
def _cells(axis: Axis, side: int) -> _Cells:
    over = axis.membership(torch.float32)
    covered = axis.cuts()
    summed = sorted({*covered, *_borders(axis.length, side)})
    shares = over[:, covered[:-1]]
    return _Cells(summed, over[:, summed[:-1]], covered, shares / shares.sum(0))


def _run(
    kernel: str, tile: tuple[int, int], tensors: Sequence[Tensor | None], sizes: Sequence[int]
) -> None:
    batch, _, height, width = tensors[0].shape
    library.run(kernel, tensors, [batch, height, width, *tile, *sizes])


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [each if each is None else each.contiguous() for each in tensors]


def _new_map(x: Tensor, channels: int | None = None) -> Tensor:
    strips.keep_memory()
    batch, own, height, width = x.shape
    return x.new_empty((batch, own if channels is None else channels, height, width))


@torch.library.custom_op("dlgsanet::add_gdfn", mutates_args=(), device_types="cpu")
def add_gdfn(
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
    out = _new_map(x)
    channels, hidden = project_out.shape[:2]
    tile = _tile(x, 1, 3 * 2 * hidden)
    tensors = _dense(x, norm_weight, norm_bias, project_in, dwconv, project_out)
    _run("add_gdfn", tile, [*tensors, out], [channels, hidden])
    return out


@torch.library.custom_op("dlgsanet::add_mhdlsa", mutates_args=(), device_types="cpu")
def add_mhdlsa(
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
    """Return x + MHDLSA(LN(x)), with filters of at most library.LARGEST_KERNEL.

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
    out = _new_map(x)
    channels, (hidden, _, kernel, _) = x.shape[1], dwconv.shape
    groups = len(projection) // kernel**2
    tile = _tile(x, kernel // 2, kernel * (channels + hidden))
    tensors = _dense(
        x, norm_weight, norm_bias, conv0, squeeze, squeeze_bias, dwconv, dwconv_bias,
        projection, projection_bias, conv1,
    )  # fmt: skip
    _run("add_mhdlsa", tile, [*tensors, out], [channels, hidden, groups, kernel])
    return out


@torch.library.custom_op("dlgsanet::attention_sums", mutates_args=(), device_types="cpu")
def attention_sums(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv: Tensor,
    dwconv: Tensor,
    heads: int,
    row_cuts: Sequence[int],
    column_cuts: Sequence[int],
    tile: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute q, k and v from LN(x), and of q and k only sums over the cells of a grid.

    Args:
        x: (B, C, H, W).
        norm_weight: (C,).
        norm_bias: (C,).
        qkv: (3C, C, 1, 1).
        dwconv: (3C, 1, 3, 3).
        heads: h, of c = C // h channels each.
        row_cuts: The rows where the cells start, and H.
        column_cuts: The columns where the cells start, and W.
        tile: Rows and columns of a thread's tile; its borders must be cuts.

    Returns:
        v (B, C, H, W), and (B, rows, columns, C·c + 2C) for the cells: Σ q kᵀ of each head, and
        Σ q² and Σ k² of each channel.
    """
    channels = x.shape[1]
    v = _new_map(x)
    cells = (len(row_cuts) - 1, len(column_cuts) - 1)
    sums = x.new_zeros((len(x), *cells, channels * (channels // heads) + 2 * channels))
    cuts = [torch.tensor(each) for each in (row_cuts, column_cuts)]
    tensors = _dense(x, norm_weight, norm_bias, qkv, dwconv)
    _run("attention_sums", tuple(tile), [*tensors, *cuts, v, sums], [channels, heads, *cells])
    return v, sums


@torch.library.custom_op("dlgsanet::add_attended", mutates_args=(), device_types="cpu")
def add_attended(
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
        row_cuts: As in `attention_sums`.
        column_cuts: As in `attention_sums`.
    """
    out = _new_map(x)
    channels, cells = x.shape[1], matrices.shape[1:3]
    cuts = [torch.tensor(each) for each in (row_cuts, column_cuts)]
    tile = _tile(x, 2, 2 * channels)  # each tile packs its cells' matrices
    tensors = _dense(x, v, matrices)
    _run("add_attended", tile, [*tensors, *cuts, out], [channels, *cells])
    return out


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
    that the borders of all windows cut the picture into. A pixel under several windows meets the
    mean of their matrices, so that no pixel is worked on twice.

    Args:
        x: (B, C, H, W).
        norm_weight: As in `attention_sums`.
        norm_bias: As in `attention_sums`.
        qkv: As in `attention_sums`.
        dwconv: As in `attention_sums`.
        heads: As in `attention_sums`.
        matrices: Maps the sums of n windows, Σ q kᵀ (n, h, c, c) and Σ q² and Σ k² (n, 2C), to
            what acts on v: (n, C, C).
        window: Side of the windows in pixels; None for one window over all.
    """
    batch, channels, height, width = x.shape
    windows = Windows((height, width), window or max(height, width))
    tile = _tile(x, 1, 3 * 3 * channels)
    rows, columns = map(_cells, (windows.rows, windows.columns), tile)
    v, sums = attention_sums(
        x, norm_weight, norm_bias, qkv, dwconv, heads, rows.summed, columns.summed, tile
    )
    sums = torch.einsum("ir,jc,brcf->bijf", rows.members, columns.members, sums).flatten(0, 2)
    products, squares = sums.split([sums.shape[1] - 2 * channels, 2 * channels], 1)
    acting = matrices(products.unflatten(1, (heads, channels // heads, -1)), squares)
    acting = acting.unflatten(0, (batch, windows.rows.count, windows.columns.count))
    acting = torch.einsum("ir,jc,bijde->brcde", rows.shares, columns.shares, acting)
    return add_attended(x, v, acting, rows.covered, columns.covered)


@torch.library.custom_op("dlgsanet::convolve3x3", mutates_args=(), device_types="cpu")
def convolve3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution with a border of zeros.

    Args:
        x: (B, C, H, W).
        weight: (C', C, 3, 3).
        bias: (C',), or None for zeros.

    Returns:
        (B, C', H, W).
    """
    out = _new_map(x, len(weight))
    tile = _tile(x, 1, 3 * x.shape[1])
    _run("convolve3x3", tile, [*_dense(x, weight, bias), out], [x.shape[1], len(weight)])
    return out


@add_gdfn.register_fake
@add_mhdlsa.register_fake
@add_attended.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return _new_map(x)


@attention_sums.register_fake
def _(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv: Tensor,
    dwconv: Tensor,
    heads: int,
    row_cuts: Sequence[int],
    column_cuts: Sequence[int],
    tile: Sequence[int],
) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[:2]
    features = channels * (channels // heads) + 2 * channels
    return _new_map(x), x.new_empty((batch, len(row_cuts) - 1, len(column_cuts) - 1, features))


@convolve3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _new_map(x, len(weight))


# FlopCounterMode hands over what the operators take, with shapes in place of tensors. All that is
# multiplied are weights with an entry for each pixel: as many products as entries.
def _flops(x_shape: Any, *weight_shapes: Any) -> int:
    batch, _, height, width = x_shape
    entries = sum(torch.Size(shape).numel() for shape in weight_shapes)
    return 2 * batch * height * width * entries


@register_flop_formula(torch.ops.dlgsanet.add_gdfn)
def _gdfn_flops(x: Any, norm_weight: Any, norm_bias: Any, *weights: Any, **_: Any) -> int:
    return _flops(x, *weights)


@register_flop_formula(torch.ops.dlgsanet.add_mhdlsa)
def _mhdlsa_flops(
    x: Any, norm_weight: Any, norm_bias: Any, conv0: Any, squeeze: Any, squeeze_bias: Any,
    dwconv: Any, dwconv_bias: Any, projection: Any, projection_bias: Any, conv1: Any, **_: Any,
) -> int:  # fmt: skip
    filters = (x[1], *dwconv[2:])  # each channel of a pixel meets a filter
    return _flops(x, conv0, squeeze, dwconv, projection, filters, conv1)


@register_flop_formula(torch.ops.dlgsanet.attention_sums)
def _attention_flops(
    x: Any, norm_weight: Any, norm_bias: Any, qkv: Any, dwconv: Any, heads: int, *_: Any, **__: Any
) -> int:
    return _flops(x, qkv, dwconv, (x[1], x[1] // heads))


@register_flop_formula(torch.ops.dlgsanet.add_attended)
def _attended_flops(x: Any, *_: Any, **__: Any) -> int:
    return _flops(x, (x[1], x[1]))


@register_flop_formula(torch.ops.dlgsanet.convolve3x3)
def _convolution_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _flops(x, weight)
