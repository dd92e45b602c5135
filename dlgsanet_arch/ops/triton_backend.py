"""The dynamic depthwise convolution as Triton kernels: float32, float16 and bfloat16.

A program computes a tile of pixels for a block of filter groups, in a loop over the K² taps. The
filters are projected tap by tap in registers, for (pixels, groups) at a time, and used at once:
neither the forward nor the backward pass writes a filter to memory. What is read repeatedly (hidden
features, and the input under neighbouring taps) stays in cache, as a tile and its border are small.

Every gradient is gathered, never scattered: there are no atomic adds, so equal inputs give equal
bits. Sums are kept in float32. Maps are dense in channels_last, as the network's are on a GPU;
those that have another layout are copied. Kernels are not specialised on image size, so a new size
compiles nothing. With TRITON_INTERPRET=1 everything runs on a CPU.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Pixels of a program. A square tile has the smallest border, a wide one the longest runs along W:
# 16 columns in half precision fill a sector of 32 bytes.
ROWS = tl.constexpr(4)
COLUMNS = tl.constexpr(16)
# Filter groups of a program, and the most channels of each group at a time: with 64 pixels and
# 4 warps they give at most 32 sums per thread. The tensor cores need at least 8 groups.
GROUP_BLOCK = tl.constexpr(8)
MOST_CHANNELS = 8
WARPS = 4
# More stages would prefetch the operands of products through shared memory; they are small here.
STAGES = 1
# For the gradients of the projection, a program has a few taps, as many as leave registers for the
# loaded values (IEEE products take more), and a share of the tiles. The partial sums of the shares
# are then added. Their number does not depend on the machine, so neither does the order of the sum.
PROJECTION_TAPS = {"tf32": 4, "ieee": 2}
PROJECTION_SPLITS = 64

# Arguments of the kernels for which a new value compiles nothing.
_SIZES = ["height", "width", "tiles"]


class Spec(NamedTuple):
    """What a kernel is compiled for: nothing of it depends on the image's size.

    In a list of sizes or in `static_range`, Triton 3.6 and 3.7 take a field only by a name of its
    own, annotated tl.constexpr.
    """

    channels: int  # C
    groups: int  # G
    per_group: int  # C // G
    kernel: int  # K
    taps: int  # K²
    features: int  # D
    padded: int  # D padded to a power of two; products need at least 16
    # Channels of a group that one load takes. They divide `per_group`, so that none is padded: 6
    # channels are three vectors of 2.
    vector: int
    vectors: int  # of each group that a program has at a time
    precision: str  # how tensor cores multiply float32, "tf32" or "ieee"
    index: tl.dtype  # of offsets


@triton.jit
def _pixels(tile, size):
    """Return the index in the batch of a tile's image, and the rows and columns of its pixels."""
    height, width = size
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, ROWS)
    pixel = tl.arange(0, ROWS * COLUMNS)
    rows = tile // across % down * ROWS + pixel // COLUMNS
    columns = tile % across * COLUMNS + pixel % COLUMNS
    return tile // across // down, rows, columns


@triton.jit
def _shift(tap, SPEC: tl.constexpr):
    """Return how far below and right of the filter's centre a tap is."""
    return tap // SPEC.kernel - SPEC.kernel // 2, tap % SPEC.kernel - SPEC.kernel // 2


@triton.jit
def _inside(rows, columns, size):
    height, width = size
    return (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)


@triton.jit
def _offsets(batch, rows, columns, size, CHANNELS: tl.constexpr):
    """Return the offsets of pixels' first channel in a map (B, CHANNELS, H, W)."""
    height, width = size
    return ((batch * height + rows) * width + columns) * CHANNELS


@triton.jit
def _pointers(base, pixels, block, size, SPEC: tl.constexpr):
    """Return pointers to (pixels, groups, one vector of channels of each), the first of a block."""
    batch, rows, columns = pixels
    first_group, first_channel = block
    groups = first_group + tl.arange(0, GROUP_BLOCK)[:, None]
    channels = groups * SPEC.per_group + first_channel + tl.arange(0, SPEC.vector)[None, :]
    offsets = _offsets(batch, rows, columns, size, SPEC.channels)
    return base + offsets[:, None, None] + channels[None, :, :]


@triton.jit
def _existing(block, SPEC: tl.constexpr):
    """Return for each vector which of its (groups, channels of each) exist."""
    first_group, first_channel = block
    groups = (first_group + tl.arange(0, GROUP_BLOCK) < SPEC.groups)[:, None]
    exist = ()
    VECTORS: tl.constexpr = SPEC.vectors
    for v in tl.static_range(VECTORS):
        channels = first_channel + v * SPEC.vector + tl.arange(0, SPEC.vector)
        exist = exist + (groups & (channels < SPEC.per_group)[None, :],)
    return exist


@triton.jit
def _load(pointers, inside, exist, SPEC: tl.constexpr):
    """Load the vectors of a block, each (pixels, groups, channels of each), zero outside."""
    inside = inside[:, None, None]
    values = ()
    for v in tl.static_range(len(exist)):
        mask = inside & exist[v][None, :, :]
        values = values + (tl.load(pointers + v * SPEC.vector, mask=mask, other=0.0),)
    return values


@triton.jit
def _hidden_pointers(base, pixels, size, SPEC: tl.constexpr):
    """Return pointers to (pixels, D padded) and which of them exist."""
    batch, rows, columns = pixels
    depth = tl.arange(0, SPEC.padded)[None, :]
    offsets = _offsets(batch, rows, columns, size, SPEC.features)[:, None]
    exist = _inside(rows, columns, size)[:, None] & (depth < SPEC.features)
    return base + offsets + depth, exist


@triton.jit
def _load_hidden(base, pixels, size, SPEC: tl.constexpr):
    """Load hidden features (pixels, D padded) in float32."""
    pointers, exist = _hidden_pointers(base, pixels, size, SPEC)
    return tl.load(pointers, mask=exist, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def _convolve_kernel(
    x, hidden, weight, bias, out, height, width, SPEC: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Write the convolution of x to out; if transposed, x is grad out and grad x is written.

    The output at p contains in[p + t] times tap t of the filter at p. So the input at p contributes
    to the outputs at p - t, by tap t of the filters there: the transposed form negates the shift
    and projects each filter at the position of the output.
    """
    size = (height.to(SPEC.index), width.to(SPEC.index))
    pixels = _pixels(tl.program_id(0), size)
    batch, rows, columns = pixels
    first_group = tl.program_id(1) * GROUP_BLOCK
    block = (first_group, tl.program_id(2) * (SPEC.vector * SPEC.vectors))
    exist = _existing(block, SPEC)
    groups = first_group + tl.arange(0, GROUP_BLOCK)
    depth = tl.arange(0, SPEC.padded)
    # Moved by one number per tap: computing them anew would cost more than the sums.
    pointers = _pointers(x, pixels, block, size, SPEC)
    if not TRANSPOSED:
        features = _load_hidden(hidden, pixels, size, SPEC)

    VECTOR: tl.constexpr = SPEC.vector
    totals = ()
    for _ in tl.static_range(len(exist)):
        totals = totals + (tl.zeros([ROWS * COLUMNS, GROUP_BLOCK, VECTOR], tl.float32),)
    # Not unrolled: K² copies of the body take minutes to compile.
    for tap in range(SPEC.taps):
        down, right = _shift(tap, SPEC)
        if TRANSPOSED:
            down = -down
            right = -right
        # Loaded first, so that they arrive while the filters are projected.
        inside = _inside(rows + down, columns + right, size)
        moved = pointers + _offsets(0, down, right, size, SPEC.channels)
        windows = _load(moved, inside, exist, SPEC)
        if TRANSPOSED:
            features = _load_hidden(hidden, (batch, rows + down, columns + right), size, SPEC)
        # A product on the tensor cores: without them, each of a thread's D multiply-adds would have
        # to load its own weight. Half precision is exact in tf32.
        outputs = groups * SPEC.taps + tap
        projection = tl.load(
            weight + outputs[None, :] * SPEC.features + depth[:, None],
            mask=(groups < SPEC.groups)[None, :] & (depth < SPEC.features)[:, None],
            other=0.0,
        ).to(tl.float32)
        constant = tl.load(bias + outputs, mask=groups < SPEC.groups, other=0.0).to(tl.float32)
        filters = tl.dot(features, projection, input_precision=SPEC.precision) + constant[None, :]
        sums = ()
        for v in tl.static_range(len(exist)):
            sums = sums + (totals[v] + windows[v].to(tl.float32) * filters[:, :, None],)
        totals = sums

    pointers = _pointers(out, pixels, block, size, SPEC)
    inside = _inside(rows, columns, size)[:, None, None]
    for v in tl.static_range(len(exist)):
        values = totals[v].to(out.dtype.element_ty)
        tl.store(pointers + v * SPEC.vector, values, mask=inside & exist[v][None, :, :])


@triton.jit
def _filter_gradient(grads, pointers, pixels, size, exist, tap, SPEC: tl.constexpr):
    """Return the gradient (pixels, groups) of one tap of the filters: Σ_c grad · window.

    `pointers` point to the pixels in x. Past the last tap the gradient is zero.
    """
    _, rows, columns = pixels
    down, right = _shift(tap, SPEC)
    inside = _inside(rows + down, columns + right, size)
    inside = inside & (rows * 0 + tap < SPEC.taps)  # a vector: the interpreter wants one
    moved = pointers + _offsets(0, down, right, size, SPEC.channels)
    windows = _load(moved, inside, exist, SPEC)
    total = grads[0] * windows[0].to(tl.float32)
    for v in tl.static_range(1, len(exist)):
        total += grads[v] * windows[v].to(tl.float32)
    return tl.sum(total, 2)


@triton.jit
def _load_gradient(grad, pixels, block, exist, size, SPEC: tl.constexpr):
    """Load vectors as `_load` does, but in float32: converted once for all taps."""
    _, rows, columns = pixels
    pointers = _pointers(grad, pixels, block, size, SPEC)
    values = _load(pointers, _inside(rows, columns, size), exist, SPEC)
    wide = ()
    for v in tl.static_range(len(exist)):
        wide = wide + (values[v].to(tl.float32),)
    return wide


@triton.jit(do_not_specialize=_SIZES)
def _hidden_gradient_kernel(grad, x, weight, out, height, width, SPEC: tl.constexpr):
    """Write the gradient of the hidden features to out.

    A program loops over all groups, as each adds to the gradient of the same features.
    """
    size = (height.to(SPEC.index), width.to(SPEC.index))
    pixels = _pixels(tl.program_id(0), size)
    depth = tl.arange(0, SPEC.padded)
    PADDED: tl.constexpr = SPEC.padded
    total = tl.zeros([ROWS * COLUMNS, PADDED], tl.float32)
    for first_group in range(0, SPEC.groups, GROUP_BLOCK):
        for first_channel in range(0, SPEC.per_group, SPEC.vector * SPEC.vectors):
            block = (first_group, first_channel)
            exist = _existing(block, SPEC)
            grads = _load_gradient(grad, pixels, block, exist, size, SPEC)
            pointers = _pointers(x, pixels, block, size, SPEC)
            # Two taps at a time: a product sums over 16 or more, and a block has 8 groups.
            for pair in range((SPEC.taps + 1) // 2):
                first = 2 * pair
                even = _filter_gradient(grads, pointers, pixels, size, exist, first, SPEC)
                odd = _filter_gradient(grads, pointers, pixels, size, exist, first + 1, SPEC)
                both = tl.reshape(tl.join(even, odd), [ROWS * COLUMNS, 2 * GROUP_BLOCK])
                column = tl.arange(0, 2 * GROUP_BLOCK)
                group = first_group + column // 2
                tap = first + column % 2
                known = (group < SPEC.groups) & (tap < SPEC.taps)
                outputs = group * SPEC.taps + tap
                projection = tl.load(
                    weight + outputs[:, None] * SPEC.features + depth[None, :],
                    mask=known[:, None] & (depth < SPEC.features)[None, :],
                    other=0.0,
                ).to(tl.float32)
                total += tl.dot(both, projection, input_precision=SPEC.precision)

    pointers, exist = _hidden_pointers(out, pixels, size, SPEC)
    tl.store(pointers, total.to(out.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=_SIZES)
def _projection_gradient_kernel(
    grad, x, hidden, partial, height, width, tiles, SPEC: tl.constexpr, TAP_BLOCK: tl.constexpr
):
    """Write to partial[split, output] the sums over a share of the tiles, every S-th of them.

    The first D are the gradient of the projection's weight, the last is that of its bias. A program
    has a few taps of a block of groups, so that their sums stay in registers for any K.
    """
    size = (height.to(SPEC.index), width.to(SPEC.index))
    split = tl.program_id(0)
    first_tap = tl.program_id(1) * TAP_BLOCK
    first_group = tl.program_id(2) * GROUP_BLOCK
    groups = first_group + tl.arange(0, GROUP_BLOCK)
    depth = tl.arange(0, SPEC.padded)

    PADDED: tl.constexpr = SPEC.padded
    weight_totals = ()
    bias_totals = ()
    for _ in tl.static_range(TAP_BLOCK):
        weight_totals = weight_totals + (tl.zeros([PADDED, GROUP_BLOCK], tl.float32),)
        # Summed over the pixels of a tile only at the end, as that is a sum across threads.
        bias_totals = bias_totals + (tl.zeros([ROWS * COLUMNS, GROUP_BLOCK], tl.float32),)
    for tile in range(split, tiles, tl.num_programs(0)):
        pixels = _pixels(tile, size)
        features = tl.trans(_load_hidden(hidden, pixels, size, SPEC))
        for first_channel in range(0, SPEC.per_group, SPEC.vector * SPEC.vectors):
            block = (first_group, first_channel)
            exist = _existing(block, SPEC)
            grads = _load_gradient(grad, pixels, block, exist, size, SPEC)
            pointers = _pointers(x, pixels, block, size, SPEC)
            weight_sums = ()
            bias_sums = ()
            for j in tl.static_range(TAP_BLOCK):
                tap = first_tap + j
                values = _filter_gradient(grads, pointers, pixels, size, exist, tap, SPEC)
                product = tl.dot(features, values, input_precision=SPEC.precision)
                weight_sums = weight_sums + (weight_totals[j] + product,)
                bias_sums = bias_sums + (bias_totals[j] + values,)
            weight_totals = weight_sums
            bias_totals = bias_sums

    outputs = SPEC.groups * SPEC.taps
    partial += split.to(tl.int64) * (outputs * (SPEC.features + 1))
    for j in tl.static_range(TAP_BLOCK):
        first_output = groups * SPEC.taps
        output = first_output + first_tap + j
        # Past the last tap, it would be an output of the next group.
        known = (groups < SPEC.groups) & (output < first_output + SPEC.taps)
        places = partial + output * (SPEC.features + 1)
        mask = known[None, :] & (depth < SPEC.features)[:, None]
        tl.store(places[None, :] + depth[:, None], weight_totals[j], mask=mask)
        tl.store(places + SPEC.features, tl.sum(bias_totals[j], 0), mask=known)


def _precision(dtype: torch.dtype) -> str:
    """Return how tensor cores multiply float32: as the 1x1 convolution that the kernels replace.

    Half precision loses nothing in tf32.
    """
    cudnn = torch.backends.cudnn
    # From PyTorch 2.9 on, fp32_precision decides; once it is set, reading allow_tf32 raises.
    precision = getattr(getattr(cudnn, "conv", None), "fp32_precision", None)
    allowed = cudnn.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed or dtype != torch.float32 else "ieee"


def _index(*maps: Tensor) -> tl.dtype:
    """Return the type of offsets: wider than 32 bits only where a map needs it."""
    # Half the range is left for tiles and taps that reach outside the image.
    return tl.int64 if max(each.numel() for each in maps) > 1 << 30 else tl.int32


@functools.cache
def _spec(channels: int, outputs: int, features: int, kernel: int, *settings: Any) -> Spec:
    """Derive the sizes of a layer with C channels and G·K² outputs; `settings` are the rest."""
    groups = outputs // kernel**2
    per_group = channels // groups
    vector = math.gcd(per_group, MOST_CHANNELS)
    vectors = min(per_group, MOST_CHANNELS) // vector
    padded = max(16, triton.next_power_of_2(features))
    sizes = (channels, groups, per_group, kernel, kernel**2, features, padded, vector, vectors)
    return Spec(*sizes, *settings)


def _prepare(weight: Tensor, kernel: int, x: Tensor, *maps: Tensor) -> tuple[Spec, list[Tensor]]:
    """Return what to compile for, and the maps in channels_last, copied where needed."""
    spec = _spec(x.shape[1], *weight.shape, kernel, _precision(x.dtype), _index(x, *maps))
    return spec, [each.contiguous(memory_format=torch.channels_last) for each in (x, *maps)]


def _restore(values: Tensor, like: Tensor) -> Tensor:
    """Return the map `values`, which is dense, in the layout of torch.empty_like(like)."""
    return values if values.stride() == like.stride() else torch.empty_like(like).copy_(values)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)  # triton.cdiv takes 5 µs


def _tiles(x: Tensor) -> int:
    batch, _, height, width = x.shape
    return batch * _blocks(height, ROWS.value) * _blocks(width, COLUMNS.value)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    # The default of enable_fp_fusion changes in Triton 3.10.
    kernel[grid](*arguments, num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=True)


def _convolve(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, spec: Spec, transposed: bool
) -> Tensor:
    """Return the convolution of `x`; if transposed, `x` is grad out and the result is grad x."""
    out = torch.empty_like(x)
    together = spec.vector * spec.vectors
    blocks = _blocks(spec.groups, GROUP_BLOCK.value), _blocks(spec.per_group, together)
    tensors = (x, hidden, weight.contiguous(), bias.contiguous(), out)
    _launch(_convolve_kernel, (_tiles(x), *blocks), *tensors, *x.shape[2:], spec, transposed)
    return out


def projected_forward(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Compute `ops.projected_dwconv`."""
    with torch.cuda.device_of(x):  # it need not be the current one
        spec, (dense_x, dense_hidden) = _prepare(weight, kernel, x, hidden)
        return _restore(_convolve(dense_x, dense_hidden, weight, bias, spec, transposed=False), x)


def projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of all tensors, in their dtypes and layouts."""
    with torch.cuda.device_of(x):
        spec, (dense_x, dense_hidden, grad) = _prepare(weight, kernel, x, hidden, grad)
        grad_x = _convolve(grad, dense_hidden, weight, bias, spec, transposed=True)
        grad_hidden, tiles, size = torch.empty_like(dense_hidden), _tiles(x), x.shape[2:]
        tensors = (grad, dense_x, weight.contiguous(), grad_hidden)
        _launch(_hidden_gradient_kernel, (tiles,), *tensors, *size, spec)

        taps, splits = PROJECTION_TAPS[spec.precision], min(PROJECTION_SPLITS, tiles)
        grid = (splits, _blocks(spec.taps, taps), _blocks(spec.groups, GROUP_BLOCK.value))
        partial = x.new_empty((splits, len(bias), spec.features + 1), dtype=torch.float32)
        tensors = (grad, dense_x, dense_hidden, partial)
        _launch(_projection_gradient_kernel, grid, *tensors, *size, tiles, spec, taps)
        projection = partial.sum(0)  # the gradients of weight and bias side by side
        return (
            _restore(grad_x, x),
            _restore(grad_hidden, hidden),
            torch.empty_like(weight).copy_(projection[:, :-1]),
            torch.empty_like(bias).copy_(projection[:, -1]),
        )
