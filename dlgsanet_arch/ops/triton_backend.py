"""The dynamic depthwise convolution as Triton kernels: float32, float16 and bfloat16.

A program computes a tile of pixels for a block of filter groups, in a loop over the K² taps. The
filters are projected tap by tap in registers, for (pixels, groups) at a time, and used at once:
neither the forward nor the backward pass writes a filter to memory. What is read repeatedly (hidden
features, and the input under neighbouring taps) stays in cache, as a tile and its border are small.

Every gradient is gathered, never scattered: there are no atomic adds, so equal inputs give equal
bits. Sums are kept in float32. Tensors are read through their strides; kernels are not specialised
on image size and strides, so a new size compiles nothing. With TRITON_INTERPRET=1 everything runs
on a CPU.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Pixels of a program. A square tile has the smallest border, a wide one the longest runs along W:
# 16 columns in half precision fill a sector of 32 bytes.
TILE_ROWS = 4
TILE_COLUMNS = 16
# Filter groups of a program, and the most channels of each group at a time: with 64 pixels and
# 4 warps they give at most 32 sums per thread. The tensor cores need at least 8 groups.
GROUP_BLOCK = 8
MOST_CHANNELS = 8
WARPS = 4
# More stages would prefetch the operands of products through shared memory; they are small here.
STAGES = 1
# For the gradients of the projection, a program has a few taps, as many as leave registers for the
# loaded values, and a share of the tiles. The partial sums of the shares are then added. Their
# number does not depend on the machine, so neither does the order of the sum.
PROJECTION_TAPS = 4
PROJECTION_SPLITS = 64

# Arguments of the kernels for which a new value compiles nothing.
_NOT_SPECIALISED = ["height", "width", "tiles", "splits"] + [
    f"{tensor}_{axis}" for tensor in ("x", "hidden", "grad", "out") for axis in "bchw"
]


@triton.jit
def _stride(stride, UNIT: tl.constexpr, MULTIPLE: tl.constexpr, INDEX: tl.constexpr):
    """Return a stride in elements, in a form that shows the compiler its known properties.

    A stride of one, and multiples of 2 to 8, let it combine the loads of neighbours into one.
    """
    if UNIT:
        return 1
    elif MULTIPLE > 1:  # noqa: RET505 - Triton drops a branch not taken, not what follows it
        return stride.to(INDEX) // MULTIPLE * MULTIPLE
    else:
        return stride.to(INDEX)


@triton.jit
def _pixels(tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr):
    """Return the index in the batch of a tile's image, and the rows and columns of its pixels."""
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, ROWS)
    pixel = tl.arange(0, ROWS * COLUMNS)
    rows = tile // across % down * ROWS + pixel // COLUMNS
    columns = tile % across * COLUMNS + pixel % COLUMNS
    return (tile // across // down).to(INDEX), rows.to(INDEX), columns.to(INDEX)


@triton.jit
def _inside(rows, columns, height, width):
    return (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)


@triton.jit
def _pointers(
    base,
    rows,
    columns,
    first_group,
    first_channel,
    stride_c,
    stride_h,
    stride_w,
    PER_GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Return pointers to (pixels, groups, VECTOR channels per group) from `first_channel` on."""
    groups = first_group + tl.arange(0, GROUP_BLOCK)[:, None]
    channels = groups * PER_GROUP + first_channel + tl.arange(0, VECTOR)[None, :]
    offsets = (rows * stride_h + columns * stride_w)[:, None, None]
    return base + offsets + (channels.to(INDEX) * stride_c)[None, :, :]


@triton.jit
def _existing(
    first_group,
    first_channel,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Return VECTORS masks (groups, VECTOR channels per group) of the channels that exist.

    The channels of a group are read in vectors whose length divides their number, so none is
    padded: 6 channels are three vectors of 2.
    """
    groups = (first_group + tl.arange(0, GROUP_BLOCK) < GROUPS)[:, None]
    exist = ()
    for v in tl.static_range(VECTORS):
        channels = first_channel + v * VECTOR + tl.arange(0, VECTOR)
        exist = exist + (groups & (channels < PER_GROUP)[None, :],)
    return exist


@triton.jit
def _load(pointers, inside, exist, stride_c, VECTOR: tl.constexpr, VECTORS: tl.constexpr):
    """Load VECTORS times (pixels, groups, VECTOR channels) of an image, zero outside of it."""
    inside = inside[:, None, None]
    values = ()
    for v in tl.static_range(VECTORS):
        mask = inside & exist[v][None, :, :]
        values = values + (tl.load(pointers + v * VECTOR * stride_c, mask=mask, other=0.0),)
    return values


@triton.jit
def _load_hidden(
    base,
    rows,
    columns,
    height,
    width,
    stride_c,
    stride_h,
    stride_w,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Load hidden features (pixels, D padded to a power of two) in float32."""
    depth = tl.arange(0, PADDED).to(INDEX)[None, :]
    offsets = (rows * stride_h + columns * stride_w)[:, None] + depth * stride_c
    mask = _inside(rows, columns, height, width)[:, None] & (depth < FEATURES)
    return tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _convolve_kernel(
    x,
    hidden,
    weight,
    bias,
    out,
    height,
    width,
    x_b,
    x_c,
    x_h,
    x_w,
    hidden_b,
    hidden_c,
    hidden_h,
    hidden_w,
    out_b,
    out_c,
    out_h,
    out_w,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    KERNEL: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    X_UNIT: tl.constexpr,
    X_MULTIPLE: tl.constexpr,
    HIDDEN_UNIT: tl.constexpr,
    HIDDEN_MULTIPLE: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    OUT_MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Write the convolution of x to out; if transposed, x is grad out and grad x is written.

    The output at p contains in[p + t] times tap t of the filter at p. So the input at p contributes
    to the outputs at p - t, by tap t of the filters there: the transposed form negates the shift
    and projects each filter at the position of the output.
    """
    batch, rows, columns = _pixels(tl.program_id(0), height, width, ROWS, COLUMNS, INDEX)
    first_group = tl.program_id(1) * GROUP_BLOCK
    first_channel = tl.program_id(2) * (VECTOR * VECTORS)
    groups = first_group + tl.arange(0, GROUP_BLOCK)
    depth = tl.arange(0, PADDED)
    exist = _existing(first_group, first_channel, GROUPS, PER_GROUP, GROUP_BLOCK, VECTOR, VECTORS)

    x_c = _stride(x_c, X_UNIT == "channel", 1, INDEX)
    x_h = _stride(x_h, False, X_MULTIPLE, INDEX)
    x_w = _stride(x_w, X_UNIT == "column", X_MULTIPLE, INDEX)
    x += batch * _stride(x_b, False, X_MULTIPLE, INDEX)
    # Shifted by one number per tap: computing them anew would cost more than the sums.
    pointers = _pointers(
        x, rows, columns, first_group, first_channel, x_c, x_h, x_w,
        PER_GROUP, GROUP_BLOCK, VECTOR, INDEX,
    )  # fmt: skip
    hidden_c = _stride(hidden_c, HIDDEN_UNIT == "channel", 1, INDEX)
    hidden_h = _stride(hidden_h, False, HIDDEN_MULTIPLE, INDEX)
    hidden_w = _stride(hidden_w, HIDDEN_UNIT == "column", HIDDEN_MULTIPLE, INDEX)
    hidden += batch * _stride(hidden_b, False, HIDDEN_MULTIPLE, INDEX)
    if not TRANSPOSED:
        features = _load_hidden(
            hidden, rows, columns, height, width, hidden_c, hidden_h, hidden_w,
            FEATURES, PADDED, INDEX,
        )  # fmt: skip

    totals = ()
    for _ in tl.static_range(VECTORS):
        totals = totals + (tl.zeros([ROWS * COLUMNS, GROUP_BLOCK, VECTOR], tl.float32),)
    # Not unrolled: K² copies of the body take minutes to compile.
    for tap in range(KERNEL * KERNEL):
        down = tap // KERNEL - KERNEL // 2
        right = tap % KERNEL - KERNEL // 2
        if TRANSPOSED:
            down = -down
            right = -right
        tap_rows = rows + down
        tap_columns = columns + right
        # Loaded first, so that they arrive while the filters are projected.
        inside = _inside(tap_rows, tap_columns, height, width)
        windows = _load(pointers + (down * x_h + right * x_w), inside, exist, x_c, VECTOR, VECTORS)
        if TRANSPOSED:
            features = _load_hidden(
                hidden, tap_rows, tap_columns, height, width, hidden_c, hidden_h, hidden_w,
                FEATURES, PADDED, INDEX,
            )  # fmt: skip
        # A product on the tensor cores: without them, each of a thread's D multiply-adds would have
        # to load its own weight. Half precision is exact in tf32.
        outputs = groups * (KERNEL * KERNEL) + tap
        projection = tl.load(
            weight + outputs[None, :] * FEATURES + depth[:, None],
            mask=(groups < GROUPS)[None, :] & (depth < FEATURES)[:, None],
            other=0.0,
        ).to(tl.float32)
        constant = tl.load(bias + outputs, mask=groups < GROUPS, other=0.0).to(tl.float32)
        filters = tl.dot(features, projection, input_precision=PRECISION) + constant[None, :]
        sums = ()
        for v in tl.static_range(VECTORS):
            sums = sums + (totals[v] + windows[v].to(tl.float32) * filters[:, :, None],)
        totals = sums

    out_c = _stride(out_c, OUT_UNIT == "channel", 1, INDEX)
    out_h = _stride(out_h, False, OUT_MULTIPLE, INDEX)
    out_w = _stride(out_w, OUT_UNIT == "column", OUT_MULTIPLE, INDEX)
    out += batch * _stride(out_b, False, OUT_MULTIPLE, INDEX)
    pointers = _pointers(
        out, rows, columns, first_group, first_channel, out_c, out_h, out_w,
        PER_GROUP, GROUP_BLOCK, VECTOR, INDEX,
    )  # fmt: skip
    inside = _inside(rows, columns, height, width)[:, None, None]
    for v in tl.static_range(VECTORS):
        values = totals[v].to(out.dtype.element_ty)
        tl.store(pointers + v * VECTOR * out_c, values, mask=inside & exist[v][None, :, :])


@triton.jit
def _load_gradient(pointers, inside, exist, stride_c, VECTOR: tl.constexpr, VECTORS: tl.constexpr):
    """Load as `_load` does, but in float32, converted once for all taps."""
    values = _load(pointers, inside, exist, stride_c, VECTOR, VECTORS)
    wide = ()
    for v in tl.static_range(VECTORS):
        wide = wide + (values[v].to(tl.float32),)
    return wide


@triton.jit
def _filter_gradient(
    grads,
    pointers,
    rows,
    columns,
    height,
    width,
    exist,
    tap,
    stride_c,
    stride_h,
    stride_w,
    KERNEL: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Return the gradient (pixels, groups) of one tap of the filters: Σ_c grad · window.

    `pointers` point to the tile in x. Past the last tap the gradient is zero.
    """
    down = tap // KERNEL - KERNEL // 2
    right = tap % KERNEL - KERNEL // 2
    height = tl.where(tap < KERNEL * KERNEL, height, 0)
    inside = _inside(rows + down, columns + right, height, width)
    windows = _load(
        pointers + (down * stride_h + right * stride_w), inside, exist, stride_c, VECTOR, VECTORS
    )
    total = grads[0] * windows[0].to(tl.float32)
    for v in tl.static_range(1, VECTORS):
        total += grads[v] * windows[v].to(tl.float32)
    return tl.sum(total, 2)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _hidden_gradient_kernel(
    grad,
    x,
    weight,
    out,
    height,
    width,
    grad_b,
    grad_c,
    grad_h,
    grad_w,
    x_b,
    x_c,
    x_h,
    x_w,
    out_b,
    out_c,
    out_h,
    out_w,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    KERNEL: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    GRAD_MULTIPLE: tl.constexpr,
    X_UNIT: tl.constexpr,
    X_MULTIPLE: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    OUT_MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Write the gradient of the hidden features to out.

    A program loops over all groups, as each adds to the gradient of the same features.
    """
    batch, rows, columns = _pixels(tl.program_id(0), height, width, ROWS, COLUMNS, INDEX)
    inside = _inside(rows, columns, height, width)
    depth = tl.arange(0, PADDED)

    grad_c = _stride(grad_c, GRAD_UNIT == "channel", 1, INDEX)
    grad_h = _stride(grad_h, False, GRAD_MULTIPLE, INDEX)
    grad_w = _stride(grad_w, GRAD_UNIT == "column", GRAD_MULTIPLE, INDEX)
    grad += batch * _stride(grad_b, False, GRAD_MULTIPLE, INDEX)
    x_c = _stride(x_c, X_UNIT == "channel", 1, INDEX)
    x_h = _stride(x_h, False, X_MULTIPLE, INDEX)
    x_w = _stride(x_w, X_UNIT == "column", X_MULTIPLE, INDEX)
    x += batch * _stride(x_b, False, X_MULTIPLE, INDEX)

    total = tl.zeros([ROWS * COLUMNS, PADDED], tl.float32)
    for first_group in range(0, GROUPS, GROUP_BLOCK):
        for first_channel in range(0, PER_GROUP, VECTOR * VECTORS):
            exist = _existing(
                first_group, first_channel, GROUPS, PER_GROUP, GROUP_BLOCK, VECTOR, VECTORS
            )
            pointers = _pointers(
                grad, rows, columns, first_group, first_channel, grad_c, grad_h, grad_w,
                PER_GROUP, GROUP_BLOCK, VECTOR, INDEX,
            )  # fmt: skip
            grads = _load_gradient(pointers, inside, exist, grad_c, VECTOR, VECTORS)
            pointers = _pointers(
                x, rows, columns, first_group, first_channel, x_c, x_h, x_w,
                PER_GROUP, GROUP_BLOCK, VECTOR, INDEX,
            )  # fmt: skip
            # Two taps at a time: a product sums over 16 or more, and a block has 8 groups.
            for pair in range((KERNEL * KERNEL + 1) // 2):
                even = _filter_gradient(
                    grads, pointers, rows, columns, height, width, exist,
                    2 * pair, x_c, x_h, x_w, KERNEL, VECTOR, VECTORS,
                )  # fmt: skip
                odd = _filter_gradient(
                    grads, pointers, rows, columns, height, width, exist,
                    2 * pair + 1, x_c, x_h, x_w, KERNEL, VECTOR, VECTORS,
                )  # fmt: skip
                both = tl.reshape(tl.join(even, odd), [ROWS * COLUMNS, 2 * GROUP_BLOCK])
                column = tl.arange(0, 2 * GROUP_BLOCK)
                group = first_group + column // 2
                tap = 2 * pair + column % 2
                known = (group < GROUPS) & (tap < KERNEL * KERNEL)
                outputs = group * (KERNEL * KERNEL) + tap
                projection = tl.load(
                    weight + outputs[:, None] * FEATURES + depth[None, :],
                    mask=known[:, None] & (depth < FEATURES)[None, :],
                    other=0.0,
                ).to(tl.float32)
                total += tl.dot(both, projection, input_precision=PRECISION)

    out_c = _stride(out_c, OUT_UNIT == "channel", 1, INDEX)
    out_h = _stride(out_h, False, OUT_MULTIPLE, INDEX)
    out_w = _stride(out_w, OUT_UNIT == "column", OUT_MULTIPLE, INDEX)
    out += batch * _stride(out_b, False, OUT_MULTIPLE, INDEX)
    tl.store(
        out + (rows * out_h + columns * out_w)[:, None] + (depth.to(INDEX) * out_c)[None, :],
        total.to(out.dtype.element_ty),
        mask=inside[:, None] & (depth < FEATURES)[None, :],
    )


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _projection_gradient_kernel(
    grad,
    x,
    hidden,
    partial,
    height,
    width,
    tiles,
    splits,
    grad_b,
    grad_c,
    grad_h,
    grad_w,
    x_b,
    x_c,
    x_h,
    x_w,
    hidden_b,
    hidden_c,
    hidden_h,
    hidden_w,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    KERNEL: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    GRAD_MULTIPLE: tl.constexpr,
    X_UNIT: tl.constexpr,
    X_MULTIPLE: tl.constexpr,
    HIDDEN_UNIT: tl.constexpr,
    HIDDEN_MULTIPLE: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Write to partial[split, output] the sums over every `splits`th tile, from the `split`th on.

    The first D are the gradient of the projection's weight, the last is that of its bias. A program
    has a few taps of a block of groups, so that their sums stay in registers for any K.
    """
    split = tl.program_id(0)
    first_tap = tl.program_id(1) * TAPS
    first_group = tl.program_id(2) * GROUP_BLOCK
    groups = first_group + tl.arange(0, GROUP_BLOCK)
    depth = tl.arange(0, PADDED)

    grad_b = _stride(grad_b, False, GRAD_MULTIPLE, INDEX)
    grad_c = _stride(grad_c, GRAD_UNIT == "channel", 1, INDEX)
    grad_h = _stride(grad_h, False, GRAD_MULTIPLE, INDEX)
    grad_w = _stride(grad_w, GRAD_UNIT == "column", GRAD_MULTIPLE, INDEX)
    x_b = _stride(x_b, False, X_MULTIPLE, INDEX)
    x_c = _stride(x_c, X_UNIT == "channel", 1, INDEX)
    x_h = _stride(x_h, False, X_MULTIPLE, INDEX)
    x_w = _stride(x_w, X_UNIT == "column", X_MULTIPLE, INDEX)
    hidden_b = _stride(hidden_b, False, HIDDEN_MULTIPLE, INDEX)
    hidden_c = _stride(hidden_c, HIDDEN_UNIT == "channel", 1, INDEX)
    hidden_h = _stride(hidden_h, False, HIDDEN_MULTIPLE, INDEX)
    hidden_w = _stride(hidden_w, HIDDEN_UNIT == "column", HIDDEN_MULTIPLE, INDEX)

    weight_totals = ()
    bias_totals = ()
    for _ in tl.static_range(TAPS):
        weight_totals = weight_totals + (tl.zeros([PADDED, GROUP_BLOCK], tl.float32),)
        # Summed over the pixels of a tile only at the end, as that is a sum across threads.
        bias_totals = bias_totals + (tl.zeros([ROWS * COLUMNS, GROUP_BLOCK], tl.float32),)
    for tile in range(split, tiles, splits):
        batch, rows, columns = _pixels(tile, height, width, ROWS, COLUMNS, INDEX)
        inside = _inside(rows, columns, height, width)
        features = _load_hidden(
            hidden + batch * hidden_b, rows, columns, height, width,
            hidden_c, hidden_h, hidden_w, FEATURES, PADDED, INDEX,
        )  # fmt: skip
        features = tl.trans(features)
        for first_channel in range(0, PER_GROUP, VECTOR * VECTORS):
            exist = _existing(
                first_group, first_channel, GROUPS, PER_GROUP, GROUP_BLOCK, VECTOR, VECTORS
            )
            pointers = _pointers(
                grad + batch * grad_b, rows, columns, first_group, first_channel,
                grad_c, grad_h, grad_w, PER_GROUP, GROUP_BLOCK, VECTOR, INDEX,
            )  # fmt: skip
            grads = _load_gradient(pointers, inside, exist, grad_c, VECTOR, VECTORS)
            pointers = _pointers(
                x + batch * x_b, rows, columns, first_group, first_channel, x_c, x_h, x_w,
                PER_GROUP, GROUP_BLOCK, VECTOR, INDEX,
            )  # fmt: skip
            weight_sums = ()
            bias_sums = ()
            for j in tl.static_range(TAPS):
                values = _filter_gradient(
                    grads, pointers, rows, columns, height, width, exist,
                    first_tap + j, x_c, x_h, x_w, KERNEL, VECTOR, VECTORS,
                )  # fmt: skip
                product = tl.dot(features, values, input_precision=PRECISION)
                weight_sums = weight_sums + (weight_totals[j] + product,)
                bias_sums = bias_sums + (bias_totals[j] + values,)
            weight_totals = weight_sums
            bias_totals = bias_sums

    partial += split.to(tl.int64) * (GROUPS * KERNEL * KERNEL * (FEATURES + 1))
    for j in tl.static_range(TAPS):
        tap = first_tap + j
        known = (groups < GROUPS) & (tap + groups * 0 < KERNEL * KERNEL)
        places = partial + (groups * (KERNEL * KERNEL) + tap) * (FEATURES + 1)
        tl.store(
            places[None, :] + depth[:, None],
            weight_totals[j],
            mask=known[None, :] & (depth < FEATURES)[:, None],
        )
        tl.store(places + FEATURES, tl.sum(bias_totals[j], 0), mask=known)


def _shapes(x: Tensor, weight: Tensor, kernel: int) -> dict[str, int]:
    """Return the sizes that kernels are compiled for: those of a layer, not of an image."""
    outputs, features = weight.shape
    groups = outputs // kernel**2
    per_group = x.shape[1] // groups
    vector = math.gcd(per_group, MOST_CHANNELS)
    return {
        "GROUPS": groups,
        "PER_GROUP": per_group,
        "KERNEL": kernel,
        "FEATURES": features,
        "PADDED": max(16, triton.next_power_of_2(features)),
        "VECTOR": vector,
        "VECTORS": min(per_group, MOST_CHANNELS) // vector,
    }


def _precision(dtype: torch.dtype) -> str:
    """Return how tensor cores multiply float32; half precision loses nothing in tf32."""
    if dtype != torch.float32:
        return "tf32"
    matmul = torch.backends.cuda.matmul
    # From PyTorch 2.9 on, fp32_precision decides; once it is set, reading allow_tf32 raises.
    precision = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def _layout(name: str, tensor: Tensor) -> dict[str, Any]:
    """Return the strides of (B, C, H, W) and their known properties.

    With the channels last, the other strides are multiples of the number of channels. That holds
    for every image size and determines how many channels one load may take.
    """
    known: dict[str, Any] = {
        f"{name}_{axis}": stride for axis, stride in zip("bchw", tensor.stride(), strict=True)
    }
    unit, multiple = "", 1
    if tensor.stride(1) == 1 and tensor.shape[1] > 1:
        unit = "channel"
        others = [axis for axis in (0, 2, 3) if tensor.shape[axis] > 1]
        multiple = math.gcd(8, *(tensor.stride(axis) for axis in others))
    elif tensor.stride(3) == 1:
        unit = "column"
    return {**known, f"{name.upper()}_UNIT": unit, f"{name.upper()}_MULTIPLE": multiple}


def _index(*tensors: Tensor) -> tl.dtype:
    """Return the type of offsets: wider than 32 bits only where a tensor needs it."""
    farthest = max(
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        for t in tensors
    )
    # Half the range is left for tiles and taps that reach outside the image.
    return tl.int64 if farthest >= 1 << 30 else tl.int32


def _tiles(x: Tensor) -> int:
    batch, _, height, width = x.shape
    return batch * triton.cdiv(height, TILE_ROWS) * triton.cdiv(width, TILE_COLUMNS)


def _launch(kernel: Any, grid: tuple[int, ...], x: Tensor, /, **arguments: Any) -> None:
    """Launch a kernel on the device of x, which need not be the current one."""
    with torch.cuda.device_of(x):
        kernel[grid](
            height=x.shape[2],
            width=x.shape[3],
            ROWS=TILE_ROWS,
            COLUMNS=TILE_COLUMNS,
            GROUP_BLOCK=GROUP_BLOCK,
            PRECISION=_precision(x.dtype),
            num_warps=WARPS,
            num_stages=STAGES,
            enable_fp_fusion=True,  # the default changes in Triton 3.10
            **arguments,
        )


def _convolve(
    x: Tensor,
    out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: int,
    transposed: bool = False,
) -> Tensor:
    """Write the convolution of `x`, or its transpose, to `out` and return it.

    Args:
        x: (B, C, H, W).
        out: (B, C, H, W).
        hidden: (B, D, H, W).
        weight: (G·K², D).
        bias: (G·K²,).
        kernel: K.
        transposed: Whether `x` is the gradient of an output and `out` becomes that of the input.
    """
    shapes = _shapes(x, weight, kernel)
    channels = shapes["VECTOR"] * shapes["VECTORS"]
    _launch(
        _convolve_kernel,
        (
            _tiles(x),
            triton.cdiv(shapes["GROUPS"], GROUP_BLOCK),
            triton.cdiv(shapes["PER_GROUP"], channels),
        ),
        x,
        x=x,
        hidden=hidden,
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        out=out,
        TRANSPOSED=transposed,
        INDEX=_index(x, hidden, out),
        **shapes,
        **_layout("x", x),
        **_layout("hidden", hidden),
        **_layout("out", out),
    )
    return out


def _hidden_gradient(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, kernel: int
) -> Tensor:
    """Return the gradient (B, D, H, W) of the hidden features, in their dtype and layout."""
    out = torch.empty_like(hidden)
    _launch(
        _hidden_gradient_kernel,
        (_tiles(x),),
        x,
        grad=grad,
        x=x,
        weight=weight.contiguous(),
        out=out,
        INDEX=_index(grad, x, out),
        **_shapes(x, weight, kernel),
        **_layout("grad", grad),
        **_layout("x", x),
        **_layout("out", out),
    )
    return out


def _projection_gradient(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, kernel: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients (G·K², D) and (G·K²,) of the projection in float32."""
    outputs, features = weight.shape
    shapes = _shapes(x, weight, kernel)
    tiles = _tiles(x)
    splits = min(PROJECTION_SPLITS, tiles)
    taps = min(PROJECTION_TAPS, kernel**2)
    partial = x.new_empty((splits, outputs, features + 1), dtype=torch.float32)
    _launch(
        _projection_gradient_kernel,
        (splits, triton.cdiv(kernel**2, taps), triton.cdiv(shapes["GROUPS"], GROUP_BLOCK)),
        x,
        grad=grad,
        x=x,
        hidden=hidden,
        partial=partial,
        tiles=tiles,
        splits=splits,
        TAPS=taps,
        INDEX=_index(grad, x, hidden),
        **shapes,
        **_layout("grad", grad),
        **_layout("x", x),
        **_layout("hidden", hidden),
    )
    total = partial.sum(0)
    return total[:, :features], total[:, features]


def projected_forward(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Compute the convolution; shapes as in `reference.projected_dwconv_reference`.

    Returns:
        (B, C, H, W) in the dtype and layout of `x`.
    """
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    return _convolve(x, out, hidden, weight, bias, kernel)


def projected_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients with respect to `x`, `hidden`, `weight` and `bias`.

    Returns:
        Each in the dtype of its tensor; those of `x` and `hidden` also in its layout.
    """
    if x.numel() == 0:
        return tuple(torch.zeros_like(each) for each in (x, hidden, weight, bias))
    grad_weight, grad_bias = _projection_gradient(grad, x, hidden, weight, kernel)
    return (
        _convolve(grad, torch.empty_like(x), hidden, weight, bias, kernel, transposed=True),
        _hidden_gradient(grad, x, hidden, weight, kernel),
        torch.empty_like(weight).copy_(grad_weight),
        torch.empty_like(bias).copy_(grad_bias),
    )
