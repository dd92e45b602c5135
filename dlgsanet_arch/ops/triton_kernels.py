"""The dynamic depthwise convolution as Triton kernels: float32, float16 and bfloat16.

`triton_backend` launches them; SPEC is its `Spec`. A program is one warp. It has 8 columns and a
few rows of pixels, 8 filter groups and up to 8 channels of each, and loops over the columns of the
filters. In a step, one product on the tensor cores projects the taps of a column for all groups and
pixels of a row; rows of the input are loaded once, each for all rows of the output. Neither the
forward nor the backward pass writes a filter to memory.

The warp has its pixels and groups in the order in which the tensor cores return a product: thread
4 g + c has group g of columns c and c + 4. Maps are loaded in this order, 64 slots of
(column // 4, group, column % 4), and so filters and inputs meet in registers. The operands of the
products are loaded in the cores' order, too. Otherwise Triton moves values between threads, by
shared memory and barriers; `make kernels` shows whether it does.

Every gradient is gathered, never scattered: there are no atomic adds, so equal inputs give equal
bits. Sums are kept in float32, and so are the filters and their gradients; hidden features and
weights of half precision are multiplied as they are. Maps are dense in channels_last. Kernels are
not specialised on image size, so a new size compiles nothing.
"""

import triton
import triton.language as tl

# Of a program.
COLUMNS = tl.constexpr(8)
GROUPS = tl.constexpr(8)
SLOTS = tl.constexpr(64)
# The interpreter multiplies bfloat16 as if its bits were integers.
WIDEN = tl.constexpr(triton.knobs.runtime.interpret)

# Arguments of the kernels for which a new value compiles nothing.
SIZES = ["height", "width", "tiles"]


@triton.jit
def _tile(index, size, SPEC: tl.constexpr):
    """Return the index in the batch of a tile's image, and its first row and column."""
    height, width = size
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, SPEC.rows)
    return index // across // down, index // across % down * SPEC.rows, index % across * COLUMNS


@triton.jit
def _pixel(batch, row, column, size, SPEC: tl.constexpr):
    """Return the index of a pixel in the batch."""
    height, width = size
    return (batch.to(SPEC.index) * height + row) * width + column


@triton.jit
def _slots(first_group, first_channel, first_column, SPEC: tl.constexpr):
    """Return the column and the first channel of each slot.

    Where a group does not exist, the column is outside the image, so that zeros are loaded.
    """
    slot = tl.arange(0, SLOTS)
    group = first_group + slot // 4 % 8
    column = first_column + slot // 32 * 4 + slot % 4
    return tl.where(group < SPEC.groups, column, -1024), group * SPEC.per_group + first_channel


@triton.jit
def _pointers(base, batch, row, columns, channels, size, SPEC: tl.constexpr):
    """Return pointers to (slots, the first vector of channels) at a row."""
    pixels = _pixel(batch, row, columns, size, SPEC)
    return base + (pixels * SPEC.channels + channels)[:, None] + tl.arange(0, SPEC.vector)[None, :]


@triton.jit
def _inside(row, columns, size):
    """Return for each slot whether its pixel is in the image, (slots, 1)."""
    height, width = size
    end = tl.where((row >= 0) & (row < height), width, 0)
    return ((columns >= 0) & (columns < end))[:, None]


@triton.jit
def _load(pointers, inside, SPEC: tl.constexpr):
    """Load the vectors of channels, each (slots, vector), in float32 and zero outside."""
    VECTORS: tl.constexpr = SPEC.vectors
    values = ()
    for v in tl.static_range(VECTORS):
        loaded = tl.load(pointers + v * SPEC.vector, mask=inside, other=0.0)
        values = values + (loaded.to(tl.float32),)
    return values


@triton.jit
def _split(values, SIZE: tl.constexpr):
    """Return the columns of (slots, SIZE), each (slots, 1); SIZE is a power of two."""
    parts = (values,)
    LEVELS: tl.constexpr = SIZE.bit_length() - 1
    for level in tl.static_range(LEVELS):
        even = ()
        odd = ()
        for i in tl.static_range(len(parts)):
            pairs = tl.reshape(parts[i], [SLOTS, SIZE // 2 ** (level + 1), 2])
            first, second = tl.split(pairs)
            even = even + (first,)
            odd = odd + (second,)
        parts = even + odd
    return parts


@triton.jit
def _join(parts):
    """Return 2ⁿ tensors of one shape as one with n more dimensions of 2, the first the slowest."""
    LEVELS: tl.constexpr = len(parts).bit_length() - 1
    for _ in tl.static_range(LEVELS):
        pairs = ()
        for i in tl.static_range(len(parts) // 2):
            pairs = pairs + (tl.join(parts[i], parts[i + len(parts) // 2]),)
        parts = pairs
    return parts[0]


@triton.jit
def _dot(left, right, SPEC: tl.constexpr):
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision=SPEC.precision)


@triton.jit
def _places(ROWS: tl.constexpr, SPEC: tl.constexpr):
    """Return the row and the first feature of each load of an operand (ROWS, D padded).

    Thread 4 r + c loads quarter c of row r, in runs that are aligned.
    """
    RUNS: tl.constexpr = SPEC.padded // (4 * SPEC.run)
    place = tl.arange(0, RUNS * ROWS * 4)
    first = place % 4 * (SPEC.padded // 4) + place // (4 * ROWS) * SPEC.run
    return place // 4 % ROWS, first


@triton.jit
def _load_operand(pointers, exist, first, last, ROWS: tl.constexpr, SPEC: tl.constexpr):
    """Load a matrix (ROWS, D padded) for a product that sums over D; its feature D is `last`.

    Quarters of rows are what the tensor cores want of a thread, if the sum is in another order.
    """
    RUN: tl.constexpr = SPEC.run
    RUNS: tl.constexpr = SPEC.padded // (4 * SPEC.run)
    PACK: tl.constexpr = SPEC.pack
    PACKS: tl.constexpr = SPEC.padded // (4 * SPEC.pack)
    PADDED: tl.constexpr = SPEC.padded
    depth = first[:, None] + tl.arange(0, RUN)[None, :]
    mask = exist[:, None] & (depth < SPEC.features)
    loaded = tl.load(pointers[:, None] + depth, mask=mask, other=0.0)
    loaded = tl.where(depth == SPEC.features, last, loaded)
    quarters = tl.permute(tl.reshape(loaded, [RUNS, ROWS, 4, RUN]), [1, 2, 0, 3])
    quarters = tl.permute(tl.reshape(quarters, [ROWS, 4, PACKS, PACK]), [0, 2, 1, 3])
    return tl.reshape(quarters, [ROWS, PADDED])


@triton.jit
def _block(index, SPEC: tl.constexpr):
    """Return the first tap of a block of taps, and the first that no earlier block has.

    Blocks are equally large, and where they do not divide K, the last two share taps. With taps
    that do not exist, input beyond the filter's reach would be multiplied by zero: NaN if infinite.
    """
    new = index * SPEC.taps
    return tl.minimum(new, SPEC.kernel - SPEC.used), new


@triton.jit
def _outputs(taps, groups, column, SPEC: tl.constexpr):
    """Return the projection's outputs for taps of a column of the filters."""
    # Those before the first tap or past the last tap or group are not used, but must be in memory.
    taps = tl.minimum(tl.maximum(taps, 0), SPEC.kernel - 1)
    return (tl.minimum(groups, SPEC.groups - 1) * SPEC.kernel + taps) * SPEC.kernel + column


@triton.jit
def _load_weights(
    weight, bias, first_group, column, block, MIRRORED: tl.constexpr, SPEC: tl.constexpr
):
    """Load what projects a block of taps of a column of the filters: (taps · groups, D padded)."""
    ROWS: tl.constexpr = SPEC.taps * GROUPS
    first_tap, first_new = block
    row, first = _places(ROWS, SPEC)
    taps = first_tap + row // GROUPS
    exist = taps >= first_new
    if MIRRORED:
        column = SPEC.kernel - 1 - column
        taps = SPEC.kernel - 1 - taps
    outputs = _outputs(taps, first_group + row % GROUPS, column, SPEC)
    last = tl.load(bias + outputs, mask=exist & (first == SPEC.features), other=0.0)[:, None]
    return _load_operand(weight + outputs * SPEC.features, exist, first, last, ROWS, SPEC)


@triton.jit
def _feature_places(hidden, batch, row, first_column, size, SPEC: tl.constexpr):
    """Return pointers to the hidden features of the pixels of a row, and their columns."""
    pixel, _first = _places(COLUMNS, SPEC)
    columns = first_column + pixel % 2 * 4 + pixel // 2  # as they are in the slots
    return hidden + _pixel(batch, row, columns, size, SPEC) * SPEC.features, columns


@triton.jit
def _load_features(pointers, row, columns, size, SPEC: tl.constexpr):
    """Load the hidden features of the pixels of a row: (columns, D padded), zero outside."""
    _pixel_of, first = _places(COLUMNS, SPEC)
    exist = tl.reshape(_inside(row, columns, size), columns.shape)
    return _load_operand(pointers, exist, first, 1.0, COLUMNS, SPEC)


@triton.jit
def _filters(weights, features, SPEC: tl.constexpr):
    """Project a column of the filters of a row of pixels: for each tap (slots, 1)."""
    TAPS: tl.constexpr = SPEC.taps
    product = _dot(weights, tl.trans(features), SPEC)
    slots = tl.permute(tl.reshape(product, [TAPS, GROUPS, 4, 2]), [3, 1, 2, 0])
    return _split(tl.reshape(slots, [SLOTS, TAPS]), TAPS)


@triton.jit
def _add_row(totals, windows, filters, row: tl.constexpr, SHARED: tl.constexpr, SPEC: tl.constexpr):
    """Add the products of one row of the input to the sums of all rows of the output below."""
    ROWS: tl.constexpr = SPEC.rows
    VECTORS: tl.constexpr = SPEC.vectors
    sums = ()
    for r in tl.static_range(ROWS):
        for v in tl.static_range(VECTORS):
            total = totals[r * SPEC.vectors + v]
            if row - r >= 0 and row - r < SPEC.used:
                if SHARED:
                    total += windows[v] * filters[row - r]
                else:
                    total += windows[v] * filters[r * SPEC.taps + row - r]
            sums = sums + (total,)
    return sums


@triton.jit(do_not_specialize=SIZES)
def convolve_kernel(
    x, hidden, weight, bias, out, height, width, SPEC: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Write the convolution of x to out; if transposed, x is grad out and grad x is written.

    The output at p contains in[p + t] times tap t of the filter at p. So the input at p contributes
    to the outputs at p - t, by tap t of the filters there: the transposed form mirrors the filters,
    and takes those of the window instead of those of the output.
    """
    HALF: tl.constexpr = SPEC.kernel // 2
    VECTOR: tl.constexpr = SPEC.vector
    ROWS: tl.constexpr = SPEC.rows
    VECTORS: tl.constexpr = SPEC.vectors
    TOTALS: tl.constexpr = SPEC.rows * SPEC.vectors
    REACH: tl.constexpr = SPEC.rows + SPEC.used - 1
    size = (height, width)
    batch, first_row, first_column = _tile(tl.program_id(0), size, SPEC)
    first_group = tl.program_id(1) * GROUPS
    first_channel = tl.program_id(2) * (SPEC.vector * SPEC.vectors)
    columns, channels = _slots(first_group, first_channel, first_column, SPEC)
    corner = _pointers(x, batch, first_row - HALF, columns - HALF, channels, size, SPEC)
    MOVED: tl.constexpr = HALF if TRANSPOSED else 0
    places, pixels = _feature_places(
        hidden, batch, first_row - MOVED, first_column - MOVED, size, SPEC
    )
    features = ()
    if not TRANSPOSED:
        for r in tl.static_range(ROWS):
            there = places + r * width.to(SPEC.index) * SPEC.features
            features = features + (_load_features(there, first_row + r, pixels, size, SPEC),)

    totals = ()
    for _ in tl.static_range(TOTALS):
        totals = totals + (tl.zeros([SLOTS, VECTOR], tl.float32),)
    for index in range(SPEC.blocks):
        block = _block(index, SPEC)
        first_tap = block[0]
        for column in range(SPEC.kernel):
            weights = _load_weights(weight, bias, first_group, column, block, TRANSPOSED, SPEC)
            filters = ()
            if not TRANSPOSED:
                for r in tl.static_range(ROWS):
                    filters = filters + _filters(weights, features[r], SPEC)
            for i in tl.static_range(REACH):
                row = first_row - HALF + first_tap + i
                shift = (first_tap + i) * width.to(SPEC.index) + column
                inside = _inside(row, columns + (column - HALF), size)
                windows = _load(corner + shift * SPEC.channels, inside, SPEC)
                if TRANSPOSED:
                    there = places + shift * SPEC.features
                    there = _load_features(there, row, pixels + column, size, SPEC)
                    filters = _filters(weights, there, SPEC)
                totals = _add_row(totals, windows, filters, i, TRANSPOSED, SPEC)

    for r in tl.static_range(ROWS):
        pointers = _pointers(out, batch, first_row + r, columns, channels, size, SPEC)
        inside = _inside(first_row + r, columns, size)
        for v in tl.static_range(VECTORS):
            values = totals[r * SPEC.vectors + v].to(out.dtype.element_ty)
            tl.store(pointers + v * SPEC.vector, values, mask=inside)


@triton.jit
def _filter_gradients(grads, corner, tile, columns, column, first_tap, size, SPEC: tl.constexpr):
    """Return the gradient of taps of the filters: Σ_c grad · window, (slots, 2, …): taps, rows."""
    HALF: tl.constexpr = SPEC.kernel // 2
    ROWS: tl.constexpr = SPEC.rows
    VECTORS: tl.constexpr = SPEC.vectors
    REACH: tl.constexpr = SPEC.rows + SPEC.used - 1
    TAPS: tl.constexpr = SPEC.taps
    zero = tl.zeros([SLOTS], tl.float32)
    found = ()  # for each row of the input and of the output
    for i in tl.static_range(REACH):
        down = first_tap + i
        inside = _inside(tile[1] - HALF + down, columns + (column - HALF), size)
        shift = (down * size[1].to(SPEC.index) + column) * SPEC.channels
        windows = _load(corner + shift, inside, SPEC)
        for r in tl.static_range(ROWS):
            total = zero
            if i - r >= 0 and i - r < SPEC.used:
                products = grads[r * SPEC.vectors] * windows[0]
                for v in tl.static_range(1, VECTORS):
                    products += grads[r * SPEC.vectors + v] * windows[v]
                total = tl.sum(products, 1)
            found = found + (total,)
    parts = ()
    for tap in tl.static_range(TAPS):
        for r in tl.static_range(ROWS):
            if tap < SPEC.used:
                parts = parts + (found[(tap + r) * SPEC.rows + r],)
            else:
                parts = parts + (zero,)
    return _join(parts)


@triton.jit
def _gradient_block(grad, x, tile, first_group, first_channel, size, SPEC: tl.constexpr):
    """Return a block's columns, its pointers to x at the first tap, and grad at all its rows."""
    ROWS: tl.constexpr = SPEC.rows
    HALF: tl.constexpr = SPEC.kernel // 2
    batch, first_row, first_column = tile
    columns, channels = _slots(first_group, first_channel, first_column, SPEC)
    corner = _pointers(x, batch, first_row - HALF, columns - HALF, channels, size, SPEC)
    grads = ()
    for r in tl.static_range(ROWS):
        pointers = _pointers(grad, batch, first_row + r, columns, channels, size, SPEC)
        grads = grads + _load(pointers, _inside(first_row + r, columns, size), SPEC)
    return columns, corner, grads


@triton.jit(do_not_specialize=SIZES)
def hidden_gradient_kernel(grad, x, weight, out, height, width, SPEC: tl.constexpr):
    """Write the gradient of the hidden features to out.

    A program loops over all groups, as each adds to the gradient of the same features.
    """
    TAPS: tl.constexpr = SPEC.taps
    ROWS: tl.constexpr = SPEC.rows
    PADDED: tl.constexpr = SPEC.padded
    PIXELS: tl.constexpr = SPEC.rows * COLUMNS
    OUTPUTS: tl.constexpr = SPEC.taps * GROUPS
    size = (height, width)
    tile = _tile(tl.program_id(0), size, SPEC)
    batch, first_row, first_column = tile
    depth = tl.arange(0, PADDED)[None, :]
    row = tl.arange(0, OUTPUTS)
    total = tl.zeros([PIXELS, PADDED], tl.float32)
    for first_group in range(0, SPEC.groups, GROUPS):
        for first_channel in range(0, SPEC.per_group, SPEC.vector * SPEC.vectors):
            columns, corner, grads = _gradient_block(
                grad, x, tile, first_group, first_channel, size, SPEC
            )
            # One loop: of two, the assembler may unroll the inner one, and needs more registers.
            for step in range(SPEC.blocks * SPEC.kernel):
                first_tap, first_new = _block(step // SPEC.kernel, SPEC)
                column = step % SPEC.kernel
                taps = first_tap + row % TAPS
                known = ((taps >= first_new) & (row % TAPS < SPEC.used))[:, None]
                filters = _filter_gradients(
                    grads, corner, tile, columns, column, first_tap, size, SPEC
                )
                filters = tl.reshape(filters, [2, GROUPS, 4, TAPS, ROWS])
                filters = tl.reshape(tl.permute(filters, [4, 0, 2, 1, 3]), [PIXELS, OUTPUTS])
                outputs = _outputs(taps, first_group + row // TAPS, column, SPEC)
                pointers = weight + outputs[:, None] * SPEC.features + depth
                mask = known & (depth < SPEC.features)
                weights = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                total += _dot(filters, weights, SPEC)

    pixel = tl.arange(0, PIXELS)
    rows = first_row + pixel // COLUMNS
    columns = first_column + pixel % COLUMNS
    inside = ((rows < height) & (columns < width))[:, None] & (depth < SPEC.features)
    pointers = out + _pixel(batch, rows, columns, size, SPEC)[:, None] * SPEC.features + depth
    tl.store(pointers, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def projection_gradient_kernel(grad, x, hidden, partial, height, width, tiles, SPEC: tl.constexpr):
    """Write to partial[split, output] the sums over a share of the tiles, every S-th of them.

    The first D are the gradient of the projection's weight, the last is that of its bias. A program
    has one column of the filters.
    """
    TAPS: tl.constexpr = SPEC.taps
    ROWS: tl.constexpr = SPEC.rows
    PADDED: tl.constexpr = SPEC.padded
    PIXELS: tl.constexpr = SPEC.rows * COLUMNS
    OUTPUTS: tl.constexpr = SPEC.taps * GROUPS
    size = (height, width)
    split = tl.program_id(0)
    column = tl.program_id(1) % SPEC.kernel
    first_tap, first_new = _block(tl.program_id(1) // SPEC.kernel, SPEC)
    first_group = tl.program_id(2) * GROUPS
    depth = tl.arange(0, PADDED)[None, :]
    pixel = tl.arange(0, PIXELS)
    pixel_row = pixel // 8
    pixel_column = pixel % 2 * 4 + pixel // 2 % 4

    total = tl.zeros([OUTPUTS, PADDED], tl.float32)
    for index in range(split, tiles, tl.num_programs(0)):
        tile = _tile(index, size, SPEC)
        batch, first_row, first_column = tile
        rows = first_row + pixel_row
        places = first_column + pixel_column
        exist = ((rows < height) & (places < width))[:, None]
        pointers = hidden + _pixel(batch, rows, places, size, SPEC)[:, None] * SPEC.features + depth
        features = tl.load(pointers, mask=exist & (depth < SPEC.features), other=0.0)
        features = tl.where(depth == SPEC.features, 1.0, features.to(tl.float32))
        for first_channel in range(0, SPEC.per_group, SPEC.vector * SPEC.vectors):
            columns, corner, grads = _gradient_block(
                grad, x, tile, first_group, first_channel, size, SPEC
            )
            filters = _filter_gradients(grads, corner, tile, columns, column, first_tap, size, SPEC)
            filters = tl.permute(tl.reshape(filters, [2, GROUPS, 4, TAPS, ROWS]), [3, 1, 4, 2, 0])
            total += _dot(tl.reshape(filters, [OUTPUTS, PIXELS]), features, SPEC)

    row = tl.arange(0, OUTPUTS)
    taps = first_tap + row // GROUPS
    groups = first_group + row % GROUPS
    known = (taps >= first_new) & (row // GROUPS < SPEC.used) & (groups < SPEC.groups)
    partial += split.to(tl.int64) * (SPEC.groups * SPEC.kernel * SPEC.kernel * (SPEC.features + 1))
    outputs = _outputs(taps, groups, column, SPEC)
    pointers = partial + outputs[:, None] * (SPEC.features + 1) + depth
    tl.store(pointers, total, mask=known[:, None] & (depth <= SPEC.features))
