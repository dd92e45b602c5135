"""The dynamic depthwise convolution as Triton kernels: float32, float16 and bfloat16.

A program takes a tile of pixels and a block of filter groups, and walks over the K² taps. Projected
filters are made tap by tap in registers, for (pixels, groups) at a time, and used at once: neither
the forward nor the backward writes a filter to memory. What is read again (hidden features, and
input under neighbouring taps) comes from cache, as a tile and its border are small.

Every gradient is gathered, never scattered: no atomic adds, so equal inputs give equal bits.
Sums are kept in float32. Tensors are read through their strides; picture size and strides are not
specialised, so a new size compiles nothing. With TRITON_INTERPRET=1 all of it runs on a CPU.
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
# Filter groups of a program, and the most channels of each group: with 64 pixels and 4 warps they
# are at most 32 sums a thread. Groups are 8 or more: the narrowest product of the tensor cores.
GROUP_BLOCK = 8
MOST_CHANNELS = 8
WARPS = 4
# Stages above 1 prefetch what enters a product through shared memory, which is little here.
STAGES = 1
# The gradients of the projection: a program has a few taps, as many as leave registers for what is
# loaded, and a share of the tiles. The shares' sums are then summed; their number depends on no
# machine, so neither does the order.
PROJECTION_TAPS = 4
PROJECTION_SPLITS = 64

# Of all kernels. A new value of these compiles nothing.
_NOT_SPECIALISED = ["height", "width", "tiles", "splits"] + [
    f"{tensor}_{axis}" for tensor in ("x", "grad", "out", "features") for axis in "bcijhw"
]


@triton.jit
def _stride(stride, UNIT: tl.constexpr, MULTIPLE: tl.constexpr, INDEX: tl.constexpr):
    """Return a stride to count elements with, telling the compiler what is true of it.

    A stride of one, and multiples of 2 to 8, let it join the loads of neighbours into one.
    """
    if UNIT:
        return 1
    elif MULTIPLE > 1:  # noqa: RET505 - Triton drops branches that are not taken, not what follows
        return stride.to(INDEX) // MULTIPLE * MULTIPLE
    else:
        return stride.to(INDEX)


@triton.jit
def _pixels(tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr):
    """Return the picture a tile is in, and the row and column of each of its pixels."""
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
    """Return where (pixels, groups, VECTOR channels of each group) are, from `first_channel` on."""
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
    """Return VECTORS times which (groups, VECTOR channels of each group) there are.

    Channels of a group are read in vectors whose length divides their number: nothing is padded,
    6 channels are three vectors of 2.
    """
    groups = (first_group + tl.arange(0, GROUP_BLOCK) < GROUPS)[:, None]
    exist = ()
    for v in tl.static_range(VECTORS):
        channels = first_channel + v * VECTOR + tl.arange(0, VECTOR)
        exist = exist + (groups & (channels < PER_GROUP)[None, :],)
    return exist


@triton.jit
def _load(pointers, inside, exist, stride_c, VECTOR: tl.constexpr, VECTORS: tl.constexpr):
    """Load VECTORS times (pixels, groups, VECTOR channels) of a picture, zero outside of it."""
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
    """Load the hidden features (pixels, D padded to a power of two) in float32."""
    depth = tl.arange(0, PADDED).to(INDEX)[None, :]
    offsets = (rows * stride_h + columns * stride_w)[:, None] + depth * stride_c
    mask = _inside(rows, columns, height, width)[:, None] & (depth < FEATURES)
    return tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _convolve_kernel(
    x,
    features,
    weight,
    bias,
    out,
    height,
    width,
    x_b,
    x_c,
    x_h,
    x_w,
    features_b,
    features_c,
    features_i,
    features_j,
    features_h,
    features_w,
    out_b,
    out_c,
    out_h,
    out_w,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    KERNEL: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    PROJECTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    X_UNIT: tl.constexpr,
    X_MULTIPLE: tl.constexpr,
    FEATURES_UNIT: tl.constexpr,
    FEATURES_MULTIPLE: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    OUT_MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Write the convolution of x to out; transposed, write grad x to out from grad as x.

    The output at p took in[p + t] times tap t of the filter at p. So the input at p was taken by
    the outputs at p - t, with tap t of the filters there: the transposed form turns the shift
    round, and reads or projects each filter where the output was.

    Features are the hidden features or, where nothing is projected, the map of filters.
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
    # Moved from tap to tap by one number: making them anew would cost more than the sums do.
    pointers = _pointers(
        x, rows, columns, first_group, first_channel, x_c, x_h, x_w,
        PER_GROUP, GROUP_BLOCK, VECTOR, INDEX,
    )  # fmt: skip
    features_c = _stride(features_c, FEATURES_UNIT == "channel", 1, INDEX)
    features_i = features_i.to(INDEX)
    features_j = features_j.to(INDEX)
    features_h = _stride(features_h, False, FEATURES_MULTIPLE, INDEX)
    features_w = _stride(features_w, FEATURES_UNIT == "column", FEATURES_MULTIPLE, INDEX)
    features += batch * _stride(features_b, False, FEATURES_MULTIPLE, INDEX)
    if PROJECTED and not TRANSPOSED:
        hidden = _load_hidden(
            features, rows, columns, height, width, features_c, features_h, features_w,
            FEATURES, PADDED, INDEX,
        )  # fmt: skip

    totals = ()
    for _ in tl.static_range(VECTORS):
        totals = totals + (tl.zeros([ROWS * COLUMNS, GROUP_BLOCK, VECTOR], tl.float32),)
    # A loop at run time: K² copies of its body take minutes to compile.
    for tap in range(KERNEL * KERNEL):
        down = tap // KERNEL - KERNEL // 2
        right = tap % KERNEL - KERNEL // 2
        if TRANSPOSED:
            down = -down
            right = -right
        tap_rows = rows + down
        tap_columns = columns + right
        # Asked for first, to arrive while the filters are projected.
        inside = _inside(tap_rows, tap_columns, height, width)
        windows = _load(pointers + (down * x_h + right * x_w), inside, exist, x_c, VECTOR, VECTORS)
        if PROJECTED:
            if TRANSPOSED:
                hidden = _load_hidden(
                    features, tap_rows, tap_columns, height, width,
                    features_c, features_h, features_w, FEATURES, PADDED, INDEX,
                )  # fmt: skip
            # A product on the tensor cores: D multiply-adds of a thread would each need a weight,
            # and so a load. Half precision is exact in tf32.
            outputs = groups * (KERNEL * KERNEL) + tap
            projection = tl.load(
                weight + outputs[None, :] * FEATURES + depth[:, None],
                mask=(groups < GROUPS)[None, :] & (depth < FEATURES)[:, None],
                other=0.0,
            ).to(tl.float32)
            constant = tl.load(bias + outputs, mask=groups < GROUPS, other=0.0).to(tl.float32)
            filters = tl.dot(hidden, projection, input_precision=PRECISION) + constant[None, :]
        else:
            if TRANSPOSED:
                filter_rows = tap_rows
                filter_columns = tap_columns
            else:
                filter_rows = rows
                filter_columns = columns
            filters = tl.load(
                features
                + (tap // KERNEL * features_i + tap % KERNEL * features_j)
                + (filter_rows * features_h + filter_columns * features_w)[:, None]
                + (groups.to(INDEX) * features_c)[None, :],
                mask=_inside(filter_rows, filter_columns, height, width)[:, None]
                & (groups < GROUPS)[None, :],
                other=0.0,
            ).to(tl.float32)
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
    """Load what `_load` does, in float32: it is used with every tap."""
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

    `pointers` are where the tile is in x. Past the last tap it is zero.
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
def _feature_gradient_kernel(
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
    out_i,
    out_j,
    out_h,
    out_w,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    KERNEL: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    PROJECTED: tl.constexpr,
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
    """Write to out the gradient of the hidden features or, if none project, of the given filters.

    A program walks over all groups, as each adds to the gradient of the same features.
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
    out_c = _stride(out_c, OUT_UNIT == "channel", 1, INDEX)
    out_i = out_i.to(INDEX)
    out_j = out_j.to(INDEX)
    out_h = _stride(out_h, False, OUT_MULTIPLE, INDEX)
    out_w = _stride(out_w, OUT_UNIT == "column", OUT_MULTIPLE, INDEX)
    out += batch * _stride(out_b, False, OUT_MULTIPLE, INDEX)
    places = (rows * out_h + columns * out_w)[:, None]

    total = tl.zeros([ROWS * COLUMNS, PADDED], tl.float32)
    for first_group in range(0, GROUPS, GROUP_BLOCK):
        groups = first_group + tl.arange(0, GROUP_BLOCK)
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
            if PROJECTED:
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
                    projection = tl.load(
                        weight
                        + ((group * (KERNEL * KERNEL) + tap) * FEATURES)[:, None]
                        + depth[None, :],
                        mask=known[:, None] & (depth < FEATURES)[None, :],
                        other=0.0,
                    ).to(tl.float32)
                    total += tl.dot(both, projection, input_precision=PRECISION)
            else:
                for tap in range(KERNEL * KERNEL):
                    values = _filter_gradient(
                        grads, pointers, rows, columns, height, width, exist,
                        tap, x_c, x_h, x_w, KERNEL, VECTOR, VECTORS,
                    )  # fmt: skip
                    shift = tap // KERNEL * out_i + tap % KERNEL * out_j
                    tl.store(
                        out + shift + places + (groups.to(INDEX) * out_c)[None, :],
                        values.to(out.dtype.element_ty),
                        mask=inside[:, None] & (groups < GROUPS)[None, :],
                    )
    if PROJECTED:
        tl.store(
            out + places + (depth.to(INDEX) * out_c)[None, :],
            total.to(out.dtype.element_ty),
            mask=inside[:, None] & (depth < FEATURES)[None, :],
        )


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _projection_gradient_kernel(
    grad,
    x,
    features,
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
    features_b,
    features_c,
    features_h,
    features_w,
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
    FEATURES_UNIT: tl.constexpr,
    FEATURES_MULTIPLE: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Write to partial[split, output] the sums over every `splits`th tile, from the `split`th on.

    The first D are the gradient of the weight of the projection, the last is that of its bias. A
    program has a few taps of a block of groups: their sums stay in registers, whatever K.
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
    features_b = _stride(features_b, False, FEATURES_MULTIPLE, INDEX)
    features_c = _stride(features_c, FEATURES_UNIT == "channel", 1, INDEX)
    features_h = _stride(features_h, False, FEATURES_MULTIPLE, INDEX)
    features_w = _stride(features_w, FEATURES_UNIT == "column", FEATURES_MULTIPLE, INDEX)

    weight_totals = ()
    bias_totals = ()
    for _ in tl.static_range(TAPS):
        weight_totals = weight_totals + (tl.zeros([PADDED, GROUP_BLOCK], tl.float32),)
        # Summed over a tile's pixels once, at the end: that takes every thread's part.
        bias_totals = bias_totals + (tl.zeros([ROWS * COLUMNS, GROUP_BLOCK], tl.float32),)
    for tile in range(split, tiles, splits):
        batch, rows, columns = _pixels(tile, height, width, ROWS, COLUMNS, INDEX)
        inside = _inside(rows, columns, height, width)
        hidden = _load_hidden(
            features + batch * features_b, rows, columns, height, width,
            features_c, features_h, features_w, FEATURES, PADDED, INDEX,
        )  # fmt: skip
        hidden = tl.trans(hidden)
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
                product = tl.dot(hidden, values, input_precision=PRECISION)
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


def _shapes(per_group: int, groups: int, kernel: int, weight: Tensor | None) -> dict[str, int]:
    """Return the sizes that kernels are compiled for: those of a layer, none of a picture."""
    features = 0 if weight is None else weight.shape[1]
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
    """Return how float32 is multiplied on tensor cores; half precision loses nothing in tf32."""
    if dtype != torch.float32:
        return "tf32"
    matmul = torch.backends.cuda.matmul
    # From PyTorch 2.9 on, the first says what holds; allow_tf32 then raises where it was not used.
    precision = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def _layout(name: str, tensor: Tensor) -> dict[str, Any]:
    """Return the strides of (B, C, H, W) or (B, G, K, K, H, W), and what is known of them.

    Of a map with its channels last, the other strides are multiples of the channels: that holds
    for every picture size and tells how many channels one load may take.
    """
    axes = "bchw" if tensor.dim() == 4 else "bcijhw"
    known: dict[str, Any] = {
        f"{name}_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)
    }
    unit, multiple = "", 1
    if tensor.stride(1) == 1 and tensor.shape[1] > 1:
        unit = "channel"
        others = [axis for axis in range(tensor.dim()) if axis != 1 and tensor.shape[axis] > 1]
        multiple = math.gcd(8, *(tensor.stride(axis) for axis in others))
    elif tensor.stride(-1) == 1:
        unit = "column"
    return {**known, f"{name.upper()}_UNIT": unit, f"{name.upper()}_MULTIPLE": multiple}


def _index(*tensors: Tensor) -> tl.dtype:
    """Return the type to count elements in: wider than 32 bits only for a tensor that needs it."""
    farthest = max(
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        for t in tensors
    )
    # Half the range is left to tiles and taps that stick out of the picture.
    return tl.int64 if farthest >= 1 << 30 else tl.int32


def _tiles(x: Tensor) -> int:
    batch, _, height, width = x.shape
    return batch * triton.cdiv(height, TILE_ROWS) * triton.cdiv(width, TILE_COLUMNS)


def _launch(kernel: Any, grid: tuple[int, ...], x: Tensor, /, **arguments: Any) -> None:
    """Launch on the device of x, which need not be the current one."""
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
    features: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernel: int,
    transposed: bool = False,
) -> Tensor:
    """Write to `out` the convolution of `x`, or its transpose, and return it.

    Args:
        x: (B, C, H, W).
        out: (B, C, H, W).
        features: (B, D, H, W) to project, or (B, G, K, K, H, W) filters.
        weight: (G·K², D), or None.
        bias: (G·K²,), or None.
        kernel: K.
        transposed: Whether `x` is the gradient of an output and `out` becomes that of the input.
    """
    groups = features.shape[1] if weight is None else weight.shape[0] // kernel**2
    shapes = _shapes(x.shape[1] // groups, groups, kernel, weight)
    channels = shapes["VECTOR"] * shapes["VECTORS"]
    _launch(
        _convolve_kernel,
        (
            _tiles(x),
            triton.cdiv(groups, GROUP_BLOCK),
            triton.cdiv(shapes["PER_GROUP"], channels),
        ),
        x,
        x=x,
        features=features,
        weight=None if weight is None else weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        out=out,
        PROJECTED=weight is not None,
        TRANSPOSED=transposed,
        INDEX=_index(x, features, out),
        **shapes,
        **_layout("x", x),
        **{"features_i": 0, "features_j": 0, **_layout("features", features)},
        **_layout("out", out),
    )
    return out


def _feature_gradient(
    grad: Tensor, x: Tensor, out: Tensor, weight: Tensor | None, kernel: int
) -> Tensor:
    """Write to `out` the gradient of the hidden features, or of given filters, and return it."""
    groups = out.shape[1] if weight is None else weight.shape[0] // kernel**2
    shapes = _shapes(x.shape[1] // groups, groups, kernel, weight)
    if weight is None:
        # What is stored is not added to, so all channels of a group are summed at once.
        shapes["VECTORS"] = shapes["PER_GROUP"] // shapes["VECTOR"]
    _launch(
        _feature_gradient_kernel,
        (_tiles(x),),
        x,
        grad=grad,
        x=x,
        weight=None if weight is None else weight.contiguous(),
        out=out,
        PROJECTED=weight is not None,
        INDEX=_index(grad, x, out),
        **shapes,
        **_layout("grad", grad),
        **_layout("x", x),
        **{"out_i": 0, "out_j": 0, **_layout("out", out)},
    )
    return out


def _projection_gradient(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, kernel: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients (G·K², D) and (G·K²,) of the projection in float32."""
    outputs, features = weight.shape
    groups = outputs // kernel**2
    tiles = _tiles(x)
    splits = min(PROJECTION_SPLITS, tiles)
    taps = min(PROJECTION_TAPS, kernel**2)
    partial = x.new_empty((splits, outputs, features + 1), dtype=torch.float32)
    _launch(
        _projection_gradient_kernel,
        (splits, triton.cdiv(kernel**2, taps), triton.cdiv(groups, GROUP_BLOCK)),
        x,
        grad=grad,
        x=x,
        features=hidden,
        partial=partial,
        tiles=tiles,
        splits=splits,
        TAPS=taps,
        INDEX=_index(grad, x, hidden),
        **_shapes(x.shape[1] // groups, groups, kernel, weight),
        **_layout("grad", grad),
        **_layout("x", x),
        **_layout("features", hidden),
    )
    total = partial.sum(0)
    return total[:, :features], total[:, features]


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the convolution; shapes as in `reference.dynamic_dwconv_reference`.

    Returns:
        (B, C, H, W) in the dtype and layout of `x`.
    """
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    return _convolve(x, out, weight, None, None, weight.shape[2])


def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients with respect to `x` and `weight` from `grad` (B, C, H, W).

    Returns:
        (B, C, H, W) and (B, G, K, K, H, W), in the dtypes and layouts of `x` and `weight`.
    """
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight)
    kernel = weight.shape[2]
    return (
        _convolve(grad, torch.empty_like(x), weight, None, None, kernel, transposed=True),
        _feature_gradient(grad, x, torch.empty_like(weight), None, kernel),
    )


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
        Each in the dtype of what it is the gradient of; those of the maps in their layouts.
    """
    if x.numel() == 0:
        return tuple(torch.zeros_like(each) for each in (x, hidden, weight, bias))
    grad_weight, grad_bias = _projection_gradient(grad, x, hidden, weight, kernel)
    return (
        _convolve(grad, torch.empty_like(x), hidden, weight, bias, kernel, transposed=True),
        _feature_gradient(grad, x, torch.empty_like(hidden), weight, kernel),
        torch.empty_like(weight).copy_(grad_weight),
        torch.empty_like(bias).copy_(grad_bias),
    )
