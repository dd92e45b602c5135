"""What the Triton kernels of whole layers share, and the first of each: a 1x1 convolution of LN(x).

Maps are dense in channels_last. Sums are kept in float32; what goes into a product is rounded to
the dtype of the map, as it is where PyTorch computes. A kernel is compiled for the sizes of a
layer, never for that of an image, and no number depends on the device.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlgsanet_arch.ops.convolutions import NORM_EPS
from dlgsanet_arch.ops.triton_backend import ceil_div, dot_precision, offset_type

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
PIXELS = tl.constexpr(64)  # of a program, or at a time
_COLUMNS = tl.constexpr(16)  # of a tile of PIXELS
_EPS = tl.constexpr(NORM_EPS)
_PACKED = tl.constexpr(256)  # weights that a program packs at a time
# Arguments whose values compile nothing: sizes, and what attention knows of the rows and columns.
SIZES = ["pixels", "height", "width", *(f"{axis}{n}" for axis in "rc" for n in range(6))]


class Spec(NamedTuple):
    """What every kernel of a layer is compiled for."""

    channels: int  # C
    padded: int  # C padded to a power of two
    operand: tl.dtype  # of products: that of the map, but in the interpreter, which lacks bfloat16
    precision: str  # how tensor cores multiply float32
    index: tl.dtype  # of offsets


@triton.jit
def tile_pixels(tile, size):
    """Return the image, rows and columns of the PIXELS pixels of a tile."""
    height, width = size
    across = tl.cdiv(width, _COLUMNS)
    down = tl.cdiv(height, PIXELS // _COLUMNS)
    pixel = tl.arange(0, PIXELS)
    rows = tile // across % down * (PIXELS // _COLUMNS) + pixel // _COLUMNS
    return tile // across // down, rows, tile % across * _COLUMNS + pixel % _COLUMNS


@triton.jit
def are_inside(pixels, size):
    """Return which pixels are in the image."""
    _, rows, columns = pixels
    height, width = size
    return (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)


@triton.jit
def offsets(batch, rows, columns, size, CHANNELS: tl.constexpr):
    """Return the offsets of the first channel of pixels in a map with CHANNELS."""
    height, width = size
    return ((batch * height + rows) * width + columns) * CHANNELS


@triton.jit
def product(left, right, dtype, SPEC: tl.constexpr):
    """Return left @ right in float32, of operands rounded to `dtype`."""
    left = left.to(dtype).to(SPEC.operand)
    return tl.dot(left, right.to(SPEC.operand), input_precision=SPEC.precision)


@triton.jit
def load_weight(weight, outs, channels, OUTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Load the transpose (channels, outs) of a part of a weight (OUTS, CHANNELS)."""
    return tl.load(
        weight + outs[None, :] * CHANNELS + channels[:, None],
        mask=(outs < OUTS)[None, :] & (channels < CHANNELS)[:, None],
        other=0.0,
    )


@triton.jit
def _pack(filters, packed, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """Write depthwise filters (CHANNELS, TAPS) as (TAPS, CHANNELS), each program a share.

    The next kernel loads those of neighbouring channels at once.
    """
    SIZE: tl.constexpr = CHANNELS * TAPS
    for first in range(tl.program_id(0) * _PACKED, SIZE, tl.num_programs(0) * _PACKED):
        places = first + tl.arange(0, _PACKED)
        exist = places < SIZE
        values = tl.load(filters + places % CHANNELS * TAPS + places // CHANNELS, mask=exist)
        tl.store(packed + places, values.to(tl.float32), mask=exist)


@triton.jit
def _normed(x, scale, shift, rows, exist, SPEC: tl.constexpr):
    """Load pixels and normalise them over their channels: (PIXELS, C padded), zero beyond C."""
    channel = tl.arange(0, SPEC.padded)
    known = channel < SPEC.channels
    values = tl.load(
        x + rows[:, None] * SPEC.channels + channel[None, :],
        mask=exist[:, None] & known[None, :],
        other=0.0,
    ).to(tl.float32)
    mean = tl.sum(values, 1) / SPEC.channels
    centred = tl.where(known[None, :], values - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / SPEC.channels + _EPS)
    scale = tl.load(scale + channel, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(shift + channel, mask=known, other=0.0).to(tl.float32)
    return centred / deviation[:, None] * scale[None, :] + shift[None, :]


@triton.jit(do_not_specialize=SIZES)
def _norm_project_kernel(
    x, scale, shift, weight, out, second_weight, second_bias, second, filters, packed, pixels,
    OUTS: tl.constexpr, BLOCK: tl.constexpr, SECOND: tl.constexpr, PADDED: tl.constexpr,
    FILTERS: tl.constexpr, TAPS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Write the product of a weight (OUTS, C) with LN(x), and pack the filters that follow.

    If SECOND is not 0, a second weight (SECOND, OUTS) multiplies that product, with a bias.
    """
    _pack(filters, packed, FILTERS, TAPS)
    rows = tl.program_id(0).to(SPEC.index) * PIXELS + tl.arange(0, PIXELS)
    exist = rows < pixels
    channel = tl.arange(0, SPEC.padded)
    features = tl.arange(0, PADDED)
    dtype = x.dtype.element_ty
    normed = _normed(x, scale, shift, rows, exist, SPEC)
    total = tl.zeros([PIXELS, PADDED], tl.float32)
    for first in range(0, OUTS, BLOCK):
        outs = first + tl.arange(0, BLOCK)
        part = load_weight(weight, outs, channel, OUTS, SPEC.channels)
        values = product(normed, part, dtype, SPEC)
        mask = exist[:, None] & (outs < OUTS)[None, :]
        tl.store(out + rows[:, None] * OUTS + outs[None, :], values.to(dtype), mask=mask)
        if SECOND:
            part = load_weight(second_weight, features, outs, SECOND, OUTS)
            total += product(values, part, dtype, SPEC)
    if SECOND:
        known = features < SECOND
        total += tl.load(second_bias + features, mask=known, other=0.0).to(tl.float32)[None, :]
        places = second + rows[:, None] * SECOND + features[None, :]
        tl.store(places, total.to(dtype), mask=exist[:, None] & known[None, :])


@triton.jit
def depthwise(
    x, packed, pixels, channels, exist, size, CHANNELS: tl.constexpr, KERNEL: tl.constexpr
):
    """Return the depthwise convolution (pixels, channels) in float32 of a map with CHANNELS."""
    batch, rows, columns = pixels
    pointers = x + offsets(batch, rows, columns, size, CHANNELS)[:, None] + channels[None, :]
    total = tl.zeros([rows.shape[0], channels.shape[0]], tl.float32)
    for i in range(KERNEL):
        for j in tl.static_range(KERNEL):
            down, right = i - KERNEL // 2, j - KERNEL // 2
            inside = are_inside((batch, rows + down, columns + right), size)
            moved = pointers + offsets(0, down, right, size, CHANNELS)
            values = tl.load(moved, mask=inside[:, None] & exist[None, :], other=0.0)
            tap = tl.load(packed + (i * KERNEL + j) * CHANNELS + channels, mask=exist, other=0.0)
            total += values.to(tl.float32) * tap[None, :]
    return total


@triton.jit
def add_to(x, values, out, pixels, exist, channel, size, SPEC: tl.constexpr):
    """Write x + values (pixels, channels) where they exist."""
    batch, rows, columns = pixels
    mask = exist[:, None] & (channel < SPEC.channels)[None, :]
    places = offsets(batch, rows, columns, size, SPEC.channels)[:, None] + channel[None, :]
    values += tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + places, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gelu(values):
    """Return the exact GELU."""
    return values * 0.5 * (1 + tl.math.erf(values * 0.7071067811865476))


def padded_to(channels: int) -> int:
    """Return the power of two that channels are padded to; products need at least 16."""
    return max(16, triton.next_power_of_2(channels))


def make_spec(x: Tensor, *maps: Tensor) -> Spec:
    """Return what the kernels that take these are compiled for."""
    operand, precision = DTYPES[x.dtype], dot_precision(x.dtype)
    if triton.knobs.runtime.interpret and operand == tl.bfloat16:
        operand = tl.float32
    # Three products of TF32 are right to 21 bits; those of IEEE would spill.
    precision = "tf32x3" if precision == "ieee" else precision
    return Spec(x.shape[1], padded_to(x.shape[1]), operand, precision, offset_type(x, *maps))


def block_size(spec: Spec, most: int) -> int:
    """Return how many channels a product with a weight takes at a time: registers hold them."""
    fewer = spec.padded > 64 and spec.operand == tl.float32
    return max(16, most // (2 if fewer else 1) // (2 if spec.precision == "tf32x3" else 1))


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, warps: int = 4) -> None:
    """Launch a kernel on the current device."""
    # The default of enable_fp_fusion changes in Triton 3.10.
    kernel[programs](*arguments, num_warps=warps, num_stages=1, enable_fp_fusion=True)


def tiles(x: Tensor) -> int:
    """Return the number of tiles of `tile_pixels`."""
    batch, _, height, width = x.shape
    columns = _COLUMNS.value
    return batch * ceil_div(height, PIXELS.value // columns) * ceil_div(width, columns)


def norm_project(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, filters: Tensor, *second: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return conv(LN(x)), a second convolution of it if given, and packed depthwise filters."""
    batch, _, height, width = x.shape
    outs, count, taps = len(weight), len(filters), filters.shape[2] ** 2
    pixels, seconds = batch * height * width, count if second else 0
    out, packed = x.new_empty((pixels, outs)), x.new_empty((taps, count), dtype=torch.float32)
    features = x.new_empty((pixels, count)) if second else None
    spec, padded = make_spec(x, out), padded_to(seconds)
    launch(
        _norm_project_kernel,
        (ceil_div(pixels, PIXELS.value),),
        *(x, scale, shift, weight, out, *(second or (None, None)), features),
        *(filters, packed, pixels),
        *(outs, block_size(spec, 64), seconds, padded, count, taps, spec),
    )
    return out, features, packed
