"""GDFN and MHDLSA as Triton kernels, for CUDA and without gradients.

Each function takes what those of `c_layers` take, in float32, float16 or bfloat16, and returns
x + mixer(norm(x)). `triton_attention` has SparseGSA.
"""

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlgsanet_arch.cpu.library import is_eager, is_plain
from dlgsanet_arch.fused.triton_attention import add_attention
from dlgsanet_arch.fused.triton_parts import (
    DTYPES,
    PIXELS,
    SIZES,
    add_to,
    are_inside,
    block_size,
    depthwise,
    gelu,
    launch,
    load_weight,
    make_spec,
    norm_project,
    offsets,
    padded_to,
    product,
    tile_pixels,
    tiles,
)
from dlgsanet_arch.fused.weights import read, read_mhdlsa
from dlgsanet_arch.ops.dynamic import TRITON_LARGEST_KERNEL

if TYPE_CHECKING:
    from dlgsanet_arch.network import GDFN, MHDLSA, LayerNorm

__all__ = ["add_attention", "add_gdfn", "add_mhdlsa", "can_run"]

LARGEST_WIDTH = 128  # channels of a map: those of a pixel stay in registers


@triton.jit(do_not_specialize=SIZES)
def _gate_project_kernel(
    x, expanded, packed, weight, out, height, width,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Write x + W (gelu(a) · b), (a, b) the halves of the depthwise convolution of `expanded`."""
    size = (height.to(SPEC.index), width.to(SPEC.index))
    pixels = tile_pixels(tl.program_id(0), size)
    channel = tl.arange(0, SPEC.padded)
    PADDED: tl.constexpr = SPEC.padded
    total = tl.zeros([PIXELS, PADDED], tl.float32)
    for first in range(0, HIDDEN, BLOCK):
        hidden = first + tl.arange(0, BLOCK)
        exist = hidden < HIDDEN
        a = depthwise(expanded, packed, pixels, hidden, exist, size, 2 * HIDDEN, 3)
        b = depthwise(expanded, packed, pixels, hidden + HIDDEN, exist, size, 2 * HIDDEN, 3)
        gated = gelu(a) * b
        part = load_weight(weight, channel, hidden, SPEC.channels, HIDDEN)
        total += product(gated, part, x.dtype.element_ty, SPEC)
    add_to(x, total, out, pixels, are_inside(pixels, size), channel, size, SPEC)


class Filters(NamedTuple):
    """The sizes of the filters of MHDLSA."""

    kernel: int  # K
    row: int  # K padded to a power of two
    levels: int  # the power
    features: int  # D
    padded: int  # D padded to a power of two
    groups: int  # G
    per_group: int  # C // G
    block: int  # groups at a time
    # Channels of a group that one load takes. They divide `per_group`, so that none is padded.
    vector: int
    vectors: int  # of each group at a time


@triton.jit
def _halves(values):
    """Return the halves along the last axis of (pixels, groups, n)."""
    shape: tl.constexpr = values.shape
    pairs = tl.reshape(values, [shape[0], shape[1], 2, shape[2] // 2])
    return tl.split(tl.permute(pairs, (0, 1, 3, 2)))


@triton.jit
def _filter_row(i, features, weight, bias, first_group, dtype, F: tl.constexpr, SPEC: tl.constexpr):
    """Return the filters of row i for a block of groups: tensors (pixels, groups, 1), one a tap.

    One product makes the whole row, since the tensor cores take at least 8 columns.
    """
    depth = tl.arange(0, F.padded)
    column = tl.arange(0, F.block * F.row)
    group = first_group + column // F.row
    exist = (group < F.groups) & (column % F.row < F.kernel)
    outputs = (group * F.kernel + i) * F.kernel + column % F.row
    part = tl.load(
        weight + outputs[None, :] * F.features + depth[:, None],
        mask=exist[None, :] & (depth < F.features)[:, None],
        other=0.0,
    )
    constant = tl.load(bias + outputs, mask=exist, other=0.0).to(tl.float32)
    filters = product(features, part, dtype, SPEC) + constant[None, :]
    taps = (tl.reshape(filters, [features.shape[0], F.block, F.row]),)
    LEVELS: tl.constexpr = F.levels
    for _ in tl.static_range(LEVELS):
        halves = ()
        for t in tl.static_range(len(taps)):
            halves = halves + _halves(taps[t])
        taps = halves
    return taps


@triton.jit(do_not_specialize=SIZES)
def _filter_project_kernel(
    x, y, hidden, packed, hidden_bias, weight, bias, projection, out, height, width,
    F: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Write x + W dynamic(y), its filters made of the depthwise convolution of `hidden`."""
    size = (height.to(SPEC.index), width.to(SPEC.index))
    pixels = tile_pixels(tl.program_id(0), size)
    batch, rows, columns = pixels
    dtype = x.dtype.element_ty
    depth = tl.arange(0, F.padded)
    known = depth < F.features
    FEATURES: tl.constexpr = F.features
    KERNEL: tl.constexpr = F.kernel
    features = depthwise(hidden, packed, pixels, depth, known, size, FEATURES, KERNEL)
    features += tl.load(hidden_bias + depth, mask=known, other=0.0).to(tl.float32)[None, :]
    channel = tl.arange(0, SPEC.padded)
    PADDED: tl.constexpr = SPEC.padded
    VECTOR: tl.constexpr = F.vector
    VECTORS: tl.constexpr = F.vectors
    BLOCK: tl.constexpr = F.block
    places = y + offsets(batch, rows, columns, size, SPEC.channels)[:, None, None]
    total = tl.zeros([PIXELS, PADDED], tl.float32)
    for first_group in range(0, F.groups, BLOCK):
        for first_channel in range(0, F.per_group, VECTOR * VECTORS):
            group = first_group + tl.arange(0, BLOCK)[:, None]
            own = first_channel + tl.arange(0, VECTOR)[None, :]
            pointers = places + (group * F.per_group + own)[None, :, :]
            sums = ()
            for _ in tl.static_range(VECTORS):
                sums = sums + (tl.zeros([PIXELS, BLOCK, VECTOR], tl.float32),)
            # Not unrolled: K² copies of the body take minutes to compile.
            for i in range(KERNEL):
                taps = _filter_row(i, features, weight, bias, first_group, dtype, F, SPEC)
                for j in tl.static_range(KERNEL):
                    down, right = i - KERNEL // 2, j - KERNEL // 2
                    inside = are_inside((batch, rows + down, columns + right), size)[:, None, None]
                    moved = pointers + offsets(0, down, right, size, SPEC.channels)
                    added = ()
                    for v in tl.static_range(VECTORS):
                        exist = (group < F.groups) & (own + v * VECTOR < F.per_group)
                        mask = inside & exist[None, :, :]
                        values = tl.load(moved + v * VECTOR, mask=mask, other=0.0)
                        added = added + (sums[v] + values.to(tl.float32) * taps[j],)
                    sums = added
            for v in tl.static_range(VECTORS):
                exist = (group < F.groups) & (own + v * VECTOR < F.per_group)
                # A channel that does not exist is one beyond the last, whose weight is not read.
                taken = tl.where(exist, group * F.per_group + own + v * VECTOR, SPEC.channels)
                taken = tl.reshape(taken, [BLOCK * VECTOR])
                part = load_weight(projection, channel, taken, SPEC.channels, SPEC.channels)
                values = tl.reshape(sums[v], [PIXELS, BLOCK * VECTOR])
                total += product(values, part, dtype, SPEC)
    add_to(x, total, out, pixels, are_inside(pixels, size), channel, size, SPEC)


def can_run(x: Tensor, *weights: Tensor) -> bool:
    """Return whether these forms take such a map and the weights of a norm and a mixer."""
    sides = (each.shape[-1] for each in weights if each.dim() == 4)
    return (
        is_eager(x.device.type)
        and x.dtype in DTYPES
        and x.dim() == 4
        and x.shape[1] <= LARGEST_WIDTH
        and all(is_plain(each, x.dtype) and each.device == x.device for each in (x, *weights))
        and max(sides, default=1) <= TRITON_LARGEST_KERNEL
    )


def add_gdfn(x: Tensor, norm: "LayerNorm", gdfn: "GDFN") -> Tensor:
    """Return x + GDFN(LN(x))."""
    tensors, (*_, height, width, hidden) = read("add_gdfn", x, norm, gdfn)
    x = x.contiguous(memory_format=torch.channels_last)
    scale, shift, project_in, filters, project_out = (each.contiguous() for each in tensors[1:])
    with torch.cuda.device_of(x):
        expanded, _, packed = norm_project(x, scale, shift, project_in, filters)
        out, spec = torch.empty_like(x), make_spec(x, expanded)
        launch(
            _gate_project_kernel,
            (tiles(x),),
            *(x, expanded, packed, project_out, out, height, width),
            *(hidden, block_size(spec, 32), spec),
        )
    return out


@functools.cache
def _filters(channels: int, features: int, kernel: int, groups: int) -> Filters:
    per_group = channels // groups
    vector = math.gcd(per_group, 8)
    block = max(8, 16 // vector)  # products need 16 channels
    vectors = min(per_group, 64 // block) // vector
    row = triton.next_power_of_2(kernel)
    padded = padded_to(features)
    sizes = (kernel, row, row.bit_length() - 1, features, padded, groups, per_group)
    return Filters(*sizes, block, vector, vectors)


def add_mhdlsa(x: Tensor, norm: "LayerNorm", mhdlsa: "MHDLSA") -> Tensor:
    """Return x + MHDLSA(LN(x)), with filters of at most TRITON_LARGEST_KERNEL."""
    tensors, (_, channels, height, width, features, kernel, groups) = read_mhdlsa(x, norm, mhdlsa)
    x = x.contiguous(memory_format=torch.channels_last)
    scale, shift, conv0, *generator, conv1 = (each.contiguous() for each in tensors[1:])
    first, first_bias, filters, *generator = generator
    with torch.cuda.device_of(x):
        y, hidden, packed = norm_project(x, scale, shift, conv0, filters, first, first_bias)
        out, spec = torch.empty_like(x), make_spec(x, y)
        wide = spec.padded > 64 or (spec.operand == tl.float32 and spec.precision == "tf32")
        launch(
            _filter_project_kernel,
            (tiles(x),),
            *(x, y, hidden, packed, *generator, conv1, out, height, width),
            *(_filters(channels, features, kernel, groups), spec),
            warps=8 if wide else 4,
        )
    return out
