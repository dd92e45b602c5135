"""SparseGSA as Triton kernels, for CUDA and without gradients.

A window's attention is one matrix for each head, made from sums over its pixels. The borders of all
windows cut an image into cells, and these are cut into blocks of at most BLOCK_SIDES. One kernel
writes v and the sums of each block, one makes the matrices of each window from the sums of its
blocks, and one applies to each pixel the mean of the matrices of the windows over it. So no pixel
is worked on twice, and all sums have an order that depends on the image's size alone.
"""

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlgsanet_arch.fused.triton_parts import (
    PIXELS,
    SIZES,
    add_to,
    depthwise,
    gelu,
    launch,
    load_weight,
    make_spec,
    norm_project,
    offsets,
    padded_to,
    product,
)
from dlgsanet_arch.fused.weights import read
from dlgsanet_arch.ops.shapes import Pattern, sizes
from dlgsanet_arch.ops.triton_backend import ceil_div
from dlgsanet_arch.tlc import Axis

if TYPE_CHECKING:
    from dlgsanet_arch.network import LayerNorm, SparseGSA

BLOCK_SIDES = (8, 16)  # rows and columns
_NORM_FLOOR = tl.constexpr(1e-24)  # under the squares of norms, as in `ops.attention`
_TEMPERATURE = Pattern("x: B C H W; temperature: h 1 1")


class Heads(NamedTuple):
    """The sizes of SparseGSA."""

    count: int  # h
    share: int  # c, channels of each
    padded: int  # c padded to a power of two
    together: int  # heads of a block
    blocks: int
    block: int  # their channels, padded to a power of two


@triton.jit
def _start(window, axis):
    """Return where a window of an axis starts."""
    length, side, step, _, _, _ = axis
    return tl.minimum(window * step, length - side)


@triton.jit
def _count(axis):
    """Return the number of segments of an axis."""
    _, _, _, windows, single, shared = axis
    return windows * (single + shared) - shared


@triton.jit
def _segment(n, axis):
    """Return where segment n of an axis starts and ends, and the first and last window over it.

    Windows cut an axis into cells: of window i alone, of i and i + 1, of i + 1 alone, ... Each cell
    of one window is cut into `single` segments of about one length, each of two into `shared`.
    """
    length, side, _, windows, single, shared = axis
    window = n // (single + shared)
    piece = n % (single + shared)
    after = tl.where(window + 1 < windows, _start(window + 1, axis), length)
    before = tl.where(window > 0, _start(window - 1, axis) + side, 0)
    is_shared = piece >= single
    start = tl.where(is_shared, after, before)
    span = tl.where(is_shared, _start(window, axis) + side, after) - start
    piece = tl.where(is_shared, piece - single, piece)
    pieces = tl.where(is_shared, shared, single)
    last = window + is_shared.to(tl.int32)
    return start + span * piece // pieces, start + span * (piece + 1) // pieces, window, last


@triton.jit
def _block_of(n, rows, columns):
    """Return the image of block n, its first row and column and its size, and what is over it.

    That is the first and the last window of the rows, then of the columns.
    """
    down, across = _count(rows), _count(columns)
    top, bottom, first_row, last_row = _segment(n // across % down, rows)
    left, right, first_column, last_column = _segment(n % across, columns)
    block = (n // across // down, top, left, bottom - top, right - left)
    return block, (first_row, last_row, first_column, last_column)


@triton.jit
def _block_pixels(first, block):
    """Return PIXELS pixels of a block in rows from the first on, and which of them exist."""
    batch, top, left, height, width = block
    pixel = first + tl.arange(0, PIXELS)
    return (batch, top + pixel // width, left + pixel % width), pixel < height * width


@triton.jit(do_not_specialize=SIZES)
def _attention_sums_kernel(
    qkv, packed, v, sums, r0, r1, r2, r3, r4, r5, c0, c1, c2, c3, c4, c5,
    H: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Write v and the sums Σ q kᵀ, Σ q² and Σ k² of a block of pixels, for some heads.

    The sums of a block are c numbers for each channel of q, then one for each channel of q and k.
    """
    rows = (r0, r1, r2, r3, r4, r5)  # a tuple's values would be compiled in
    columns = (c0, c1, c2, c3, c4, c5)
    n = tl.program_id(0).to(SPEC.index)
    size = (rows[0].to(SPEC.index), columns[0].to(SPEC.index))
    block, _ = _block_of(n, rows, columns)
    own = tl.arange(0, H.block)
    channel = tl.program_id(1) * (H.together * H.share) + own
    known = (own < H.together * H.share) & (channel < SPEC.channels)
    CHANNELS: tl.constexpr = SPEC.channels
    BLOCK: tl.constexpr = H.block
    dtype = qkv.dtype.element_ty
    products = tl.zeros([BLOCK, BLOCK], tl.float32)
    q_squares = tl.zeros([BLOCK], tl.float32)
    k_squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, block[3] * block[4], PIXELS):
        pixels, exist = _block_pixels(first, block)
        q = depthwise(qkv, packed, pixels, channel, known, size, 3 * CHANNELS, 3)
        k = depthwise(qkv, packed, pixels, channel + CHANNELS, known, size, 3 * CHANNELS, 3)
        # Rounded before their norms are taken, as q and k of unit length are.
        q = tl.where(exist[:, None], q, 0.0).to(dtype).to(tl.float32)
        k = tl.where(exist[:, None], k, 0.0).to(dtype).to(tl.float32)
        products += product(tl.trans(q), k.to(dtype), dtype, SPEC)
        q_squares += tl.sum(q * q, 0)
        k_squares += tl.sum(k * k, 0)
        values = depthwise(
            qkv, packed, pixels, channel + 2 * CHANNELS, known, size, 3 * CHANNELS, 3
        )
        places = offsets(pixels[0], pixels[1], pixels[2], size, CHANNELS)[:, None]
        mask = exist[:, None] & known[None, :]
        tl.store(v + places + channel[None, :], values.to(dtype), mask=mask)
    sums += n * (CHANNELS * (H.share + 2))
    same = (own // H.share)[:, None] == (own // H.share)[None, :]
    places = sums + channel[:, None] * H.share + own[None, :] % H.share
    tl.store(places, products, mask=same & known[:, None] & known[None, :])
    sums += CHANNELS * H.share
    tl.store(sums + channel, q_squares, mask=known)
    tl.store(sums + CHANNELS + channel, k_squares, mask=known)


@triton.jit
def _activated(values, known, ACTIVATION: tl.constexpr):
    """Apply an activation to (c, c); a softmax is over the known of the last axis."""
    if ACTIVATION == "relu":
        return tl.maximum(values, 0.0)
    elif ACTIVATION == "gelu":  # noqa: RET505 - Triton drops a branch not taken, not what follows
        return gelu(values)
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(values)
    else:
        tl.static_assert(ACTIVATION == "softmax")
        values = tl.where(known, values, float("-inf"))
        powers = tl.exp(values - tl.max(values, 1)[:, None])
        return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _covered(window, axis):
    """Return the first segment of a window and how many it has."""
    _, _, _, _, single, shared = axis
    first = tl.maximum(window * (single + shared) - shared, 0)
    return first, tl.minimum((window + 1) * (single + shared), _count(axis)) - first


@triton.jit(do_not_specialize=SIZES)
def _attention_kernel(
    sums, temperature, matrices, r0, r1, r2, r3, r4, r5, c0, c1, c2, c3, c4, c5,
    ACTIVATION: tl.constexpr, SEGMENTS: tl.constexpr, H: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Write the matrix (c, c) of a head for a window, from the sums of its blocks."""
    rows = (r0, r1, r2, r3, r4, r5)
    columns = (c0, c1, c2, c3, c4, c5)
    n = tl.program_id(0).to(SPEC.index)
    head = tl.program_id(1)
    down, windows = rows[3], columns[3]
    top, height = _covered(n // windows % down, rows)
    left, width = _covered(n % windows, columns)
    SHARE: tl.constexpr = H.share
    PADDED: tl.constexpr = H.padded
    entry = tl.arange(0, PADDED * PADDED)
    own = tl.arange(0, PADDED)
    known = (entry // PADDED < SHARE) & (entry % PADDED < SHARE)
    places = head * SHARE * SHARE + entry // PADDED * SHARE + entry % PADDED
    squares = SPEC.channels * SHARE + head * SHARE + own
    products = tl.zeros([PADDED * PADDED], tl.float32)
    q_squares = tl.zeros([PADDED], tl.float32)
    k_squares = tl.zeros([PADDED], tl.float32)
    for first in range(0, height * width, SEGMENTS):
        segment = first + tl.arange(0, SEGMENTS)
        block = n // windows // down * _count(rows) + top + segment // width
        block = block * _count(columns) + left + segment % width
        base = sums + block[:, None] * (SPEC.channels * (SHARE + 2))
        exist = (segment < height * width)[:, None]
        mask = exist & (own < SHARE)[None, :]
        products += tl.sum(tl.load(base + places[None, :], exist & known[None, :], 0.0), 0)
        q_squares += tl.sum(tl.load(base + squares[None, :], mask, 0.0), 0)
        k_squares += tl.sum(tl.load(base + SPEC.channels + squares[None, :], mask, 0.0), 0)
    # Before the root, as in `ops.attention_weights`.
    q_norm = tl.sqrt(tl.maximum(q_squares, _NORM_FLOOR))[:, None]
    k_norm = tl.sqrt(tl.maximum(k_squares, _NORM_FLOOR))[None, :]
    cosines = tl.reshape(products, [PADDED, PADDED]) / (q_norm * k_norm)
    scaled = cosines * tl.load(temperature + head).to(tl.float32)
    values = _activated(scaled, (own < SHARE)[None, :], ACTIVATION)
    matrices += n * (SPEC.channels * SHARE)
    tl.store(matrices + places, tl.reshape(values, [PADDED * PADDED]), mask=known)


@triton.jit
def _acting(matrices, windows, across, b, H: tl.constexpr, SPEC: tl.constexpr):
    """Return the transposed mean of the matrices of these windows, for block b of the heads."""
    top, bottom, left, right = windows
    own = tl.arange(0, H.block)
    channel = b * (H.together * H.share) + own
    known = (own < H.together * H.share) & (channel < SPEC.channels)
    same = (own // H.share)[:, None] == (own // H.share)[None, :]
    mask = same & known[:, None] & known[None, :]
    places = matrices + channel[None, :] * H.share + own[:, None] % H.share
    BLOCK: tl.constexpr = H.block
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for row in range(top, bottom + 1):
        for column in range(left, right + 1):
            moved = places + (row * across + column) * (SPEC.channels * H.share)
            total += tl.load(moved, mask=mask, other=0.0)
    return total / ((bottom + 1 - top) * (right + 1 - left))


@triton.jit(do_not_specialize=SIZES)
def _attend_project_kernel(
    x, v, matrices, projection, out, r0, r1, r2, r3, r4, r5, c0, c1, c2, c3, c4, c5,
    OUTS: tl.constexpr, H: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Write x + W A v for a block of pixels and OUTS channels."""
    rows = (r0, r1, r2, r3, r4, r5)
    columns = (c0, c1, c2, c3, c4, c5)
    n = tl.program_id(0).to(SPEC.index)
    size = (rows[0].to(SPEC.index), columns[0].to(SPEC.index))
    block, windows = _block_of(n, rows, columns)
    base = matrices + block[0] * (rows[3] * columns[3] * SPEC.channels * H.share)
    channel = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    own = tl.arange(0, H.block)
    dtype = x.dtype.element_ty
    BLOCKS: tl.constexpr = H.blocks
    acting = ()
    for b in tl.static_range(BLOCKS):
        acting = acting + (_acting(base, windows, columns[3], b, H, SPEC).to(dtype),)
    for first in range(0, block[3] * block[4], PIXELS):
        pixels, exist = _block_pixels(first, block)
        places = v + offsets(pixels[0], pixels[1], pixels[2], size, SPEC.channels)[:, None]
        total = tl.zeros([PIXELS, OUTS], tl.float32)
        for b in tl.static_range(BLOCKS):
            # What belongs to no head of a block meets zeros in `acting`.
            heads = b * (H.together * H.share) + own
            mask = exist[:, None] & (heads < SPEC.channels)[None, :]
            values = tl.load(places + heads[None, :], mask=mask, other=0.0)
            attended = product(values, acting[b], dtype, SPEC)
            part = load_weight(projection, channel, heads, SPEC.channels, SPEC.channels)
            total += product(attended, part, dtype, SPEC)
        add_to(x, total, out, pixels, exist, channel, size, SPEC)


@functools.cache
def _heads(channels: int, count: int, bits: int) -> Heads:
    share = channels // count
    choices = []
    for most in (32, 16) if bits < 32 else (32,):  # channels at a time: others would spill
        blocks = ceil_div(count, max(1, most // share))
        together = ceil_div(count, blocks)
        choices.append((together, blocks, padded_to(together * share)))
    fullest = min(choices, key=lambda choice: choice[1] * choice[2])
    return Heads(count, share, padded_to(share), *fullest)


@functools.lru_cache(maxsize=64)
def _segments(axis: Axis, most: int) -> tuple[int, ...]:
    """Return what kernels know of an axis, cut into segments of at most `most`.

    Where no window starts or ends within a segment, one mean of matrices acts on all of it, and its
    sums are parts of those of all windows over it. It depends on the image's size alone.
    """
    starts = [min(i * axis.step, axis.length - axis.side) for i in range(axis.count)]
    ends = [0, *(start + axis.side for start in starts)]
    nexts = [*starts[1:], axis.length]
    single = max(stop - start for start, stop in zip(ends, nexts, strict=False))
    shared = max(
        (stop - start for start, stop in zip(nexts[:-1], ends[1:], strict=False)), default=0
    )
    return (*axis, ceil_div(single, most), ceil_div(shared, most))


def add_attention(x: Tensor, norm: "LayerNorm", attention: "SparseGSA") -> Tensor:
    """Return x + SparseGSA(LN(x)), within windows in eval mode and their overlaps averaged."""
    heads, window, temperature = attention.heads, attention.eval_window(), attention.temperature
    tensors, numbers = read("add_attention", x, norm, attention, h=heads)
    sizes("add_attention", _TEMPERATURE, x, temperature, h=heads)
    batch, channels, height, width, share = numbers
    x = x.contiguous(memory_format=torch.channels_last)
    scale, shift, project, filters, project_out = (each.contiguous() for each in tensors[1:])
    plans = Axis.plan(height, window), Axis.plan(width, window)
    rows, columns = axes = [_segments(*each) for each in zip(plans, BLOCK_SIDES, strict=True)]
    blocks, windows = batch, batch
    for *_, count, single, shared in axes:
        blocks, windows = blocks * (count * (single + shared) - shared), windows * count
    own = _heads(channels, heads, 8 * x.element_size())
    with torch.cuda.device_of(x):
        qkv, _, packed = norm_project(x, scale, shift, project, filters)
        v, out = torch.empty_like(x), torch.empty_like(x)
        sums = x.new_empty((blocks, channels * (share + 2)), dtype=torch.float32)
        matrices = x.new_empty((windows, channels * share), dtype=torch.float32)
        spec = make_spec(x, qkv, sums, matrices)
        tensors = (qkv, packed, v, sums)
        launch(_attention_sums_kernel, (blocks, own.blocks), *tensors, *rows, *columns, own, spec)
        tensors, at_once = (sums, temperature, matrices), max(1, min(32, 4096 // own.padded**2))
        settings = (*rows, *columns, attention.activation, at_once, own, spec)
        launch(_attention_kernel, (windows, heads), *tensors, *settings)
        outs = min(32 if spec.precision == "tf32x3" else 64, spec.padded)
        tensors, settings = (x, v, matrices, project_out, out), (*rows, *columns, outs, own, spec)
        launch(_attend_project_kernel, (blocks, ceil_div(channels, outs)), *tensors, *settings)
    return out
