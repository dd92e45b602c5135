/* Layers of DLGSANet for inference, each in one pass over the image: nothing but a layer's input and
 * output is ever a complete map. fused/c_layers.py says what the tensors are.
 */
#include "common.h"

/* A row of all channels of a tile, read and written a channel at a time: planes may lie a power of two
 * apart, so that blocks of all channels would meet in the same few sets of the caches. */
struct line {
    float *data;
    int64_t stride;
};

static int64_t line_floats(int64_t channels, int64_t columns)
{
    return up(channels * ring_stride(columns), LINE);
}

static struct line take_line(struct arena *arena, int64_t channels, int64_t columns)
{
    return (struct line){take(arena, line_floats(channels, columns)), ring_stride(columns)};
}

static void read_line(const struct line *line, const float *x, int64_t plane, int64_t channels,
                      int64_t columns)
{
    for (int64_t c = 0; c < channels; c++) {
        float *row = line->data + c * line->stride;
        memcpy(row, x + c * plane, columns * sizeof(float));
        for (int64_t p = columns; p < up(columns, LANES); p++)
            row[p] = 0;
    }
}

/* out = x + line, both planes. */
static void add_line(const struct line *line, const float *x, float *out, int64_t plane,
                     int64_t channels, int64_t columns)
{
    for (int64_t c = 0; c < channels; c++, x += plane, out += plane) {
        const float *row = line->data + c * line->stride;
        for (int64_t p = 0; p < columns; p++)
            out[p] = x[p] + row[p];
    }
}

/* Compute a tile's row of matrix LN(x), the norm's weight and bias being folded into the matrix.
 * `line` is overwritten. */
static void fill_row(const struct matrix *matrix, const float *x, int64_t plane,
                     const struct tile *tile, const struct line *line, float *row,
                     int64_t row_stride)
{
    int64_t columns = tile->last - tile->first;
    float scale[BLOCK];
    read_line(line, x + tile->first, plane, matrix->depth, columns);
    for (int64_t p = 0; p < columns; p += BLOCK) {
        int64_t pixels = least(BLOCK, columns - p);
        standardise(line->data + p, line->stride, matrix->depth, pixels, scale);
        product(matrix, line->data + p, line->stride, row + p, row_stride, pixels);
    }
}

/* ------------------------------------------------------------------ GDFN */

/* out = x + project_out(gelu(a) b), (a, b) = dwconv(project_in(LN(x))). */
EXPORT int add_gdfn(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *x = tensors[0], *norm_weight = tensors[1], *norm_bias = tensors[2];
    const float *in_weight = tensors[3], *filters = tensors[4], *out_weight = tensors[5];
    float *out = tensors[6];
    struct grid grid = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    int64_t channels = sizes[5], hidden = sizes[6];
    int64_t plane = grid.height * grid.width;
    int64_t columns = least(grid.columns + 2, grid.width);

    struct arena arena;
    if (!open_arena(&arena, matrix_floats(2 * hidden, channels) + matrix_floats(channels, hidden) +
                                ring_floats(3, 2 * hidden, columns) +
                                line_floats(channels, columns) + (hidden + 1) * BLOCK))
        return 1;
    struct matrix project_in = pack(&arena, in_weight, NULL, 2 * hidden, channels);
    fold(&project_in, norm_weight, norm_bias);
    struct matrix project_out = pack(&arena, out_weight, NULL, channels, hidden);
    struct ring ring = take_ring(&arena, 3, 2 * hidden, columns);
    struct line line = take_line(&arena, channels, columns);
    float *gated = take(&arena, hidden * BLOCK), *other = take(&arena, BLOCK);

    struct tile tile;
    while (take_tile(&grid, 1, next, &tile)) {
        const float *from = x + tile.item * channels * plane;
        float *to = out + tile.item * channels * plane;
        for (int64_t y = tile.top - 1; y <= tile.bottom; y++) {
            if (y >= 0 && y < grid.height) {
                float *row = ring_write(&ring, y);
                fill_row(&project_in, from + y * grid.width, plane, &tile, &line, row, ring.stride);
                ring_end(&ring, y, tile.last - tile.first);
            }
            int64_t r = y - 1;
            if (r < tile.top)
                continue;
            struct row rows[3] = {ring_row(&ring, r - 1, grid.height),
                                  ring_row(&ring, r, grid.height),
                                  ring_row(&ring, r + 1, grid.height)};
            for (int64_t p = tile.left; p < tile.right; p += BLOCK) {
                int64_t pixels = least(BLOCK, tile.right - p), at = p - tile.first;
                for (int64_t k = 0; k < hidden; k++) {
                    float *a = gated + k * BLOCK;
                    depthwise(rows, k, at, filters + k * 9, 0, 3, a, pixels);
                    depthwise(rows, k + hidden, at, filters + (k + hidden) * 9, 0, 3, other,
                              pixels);
                    gate(a, other, up(pixels, LANES));
                }
                product(&project_out, gated, BLOCK, line.data + p - tile.left, line.stride, pixels);
            }
            int64_t place = r * grid.width + tile.left;
            add_line(&line, from + place, to + place, plane, channels, tile.right - tile.left);
        }
    }
    free(arena.block);
    return 0;
}

/* ------------------------------------------------------------------ MHDLSA */

/* out = x + conv1(y filtered by project(dwconv(squeeze(y)))), y = conv0(LN(x)). */
EXPORT int add_mhdlsa(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *x = tensors[0], *norm_weight = tensors[1], *norm_bias = tensors[2];
    const float *conv0_weight = tensors[3], *squeeze_weight = tensors[4];
    const float *squeeze_bias = tensors[5], *dwconv_weight = tensors[6], *dwconv_bias = tensors[7];
    const float *project_weight = tensors[8], *project_bias = tensors[9];
    const float *conv1_weight = tensors[10];
    float *out = tensors[11];
    struct grid grid = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    int64_t channels = sizes[5], hidden = sizes[6], groups = sizes[7], kernel = sizes[8];
    int64_t plane = grid.height * grid.width, halo = kernel / 2, taps = kernel * kernel;
    int64_t columns = least(grid.columns + 2 * halo, grid.width), shared = channels / groups;

    struct arena arena;
    if (!open_arena(&arena, 2 * matrix_floats(channels, channels) +
                                matrix_floats(hidden, channels) +
                                groups * matrix_floats(taps, hidden) +
                                ring_floats(kernel, channels, columns) +
                                ring_floats(kernel, hidden, columns) +
                                line_floats(channels, columns) +
                                (channels + hidden + taps) * BLOCK))
        return 1;
    struct matrix conv0 = pack(&arena, conv0_weight, NULL, channels, channels);
    fold(&conv0, norm_weight, norm_bias);
    struct matrix conv1 = pack(&arena, conv1_weight, NULL, channels, channels);
    struct matrix squeeze = pack(&arena, squeeze_weight, squeeze_bias, hidden, channels);
    struct matrix first = pack(&arena, project_weight, project_bias, taps, hidden);
    for (int64_t g = 1; g < groups; g++)
        pack(&arena, project_weight + g * taps * hidden, project_bias + g * taps, taps, hidden);
    struct ring features = take_ring(&arena, kernel, channels, columns);
    struct ring squeezed = take_ring(&arena, kernel, hidden, columns);
    struct line line = take_line(&arena, channels, columns);
    float *block = take(&arena, channels * BLOCK);
    float *generator = take(&arena, hidden * BLOCK), *filters = take(&arena, taps * BLOCK);

    struct tile tile;
    while (take_tile(&grid, halo, next, &tile)) {
        const float *from = x + tile.item * channels * plane;
        float *to = out + tile.item * channels * plane;
        for (int64_t y = tile.top - halo; y < tile.bottom + halo; y++) {
            if (y >= 0 && y < grid.height) {
                float *row = ring_write(&features, y), *narrow = ring_write(&squeezed, y);
                fill_row(&conv0, from + y * grid.width, plane, &tile, &line, row, features.stride);
                product(&squeeze, row, features.stride, narrow, squeezed.stride,
                        tile.last - tile.first);
                ring_end(&features, y, tile.last - tile.first);
                ring_end(&squeezed, y, tile.last - tile.first);
            }
            int64_t r = y - halo;
            if (r < tile.top)
                continue;
            struct row rows[LARGEST_KERNEL], narrow[LARGEST_KERNEL];
            for (int64_t i = 0; i < kernel; i++) {
                rows[i] = ring_row(&features, r - halo + i, grid.height);
                narrow[i] = ring_row(&squeezed, r - halo + i, grid.height);
            }
            for (int64_t p = tile.left; p < tile.right; p += BLOCK) {
                int64_t pixels = least(BLOCK, tile.right - p), at = p - tile.first;
                for (int64_t d = 0; d < hidden; d++)
                    depthwise(narrow, d, at, dwconv_weight + d * taps, dwconv_bias[d], kernel,
                              generator + d * BLOCK, pixels);
                for (int64_t g = 0; g < groups; g++) {
                    struct matrix project = nth_matrix(first, g);
                    product(&project, generator, BLOCK, filters, BLOCK, pixels);
                    dynamic(filters, rows, g * shared, shared, at, kernel,
                            block + g * shared * BLOCK, pixels);
                }
                product(&conv1, block, BLOCK, line.data + p - tile.left, line.stride, pixels);
            }
            int64_t place = r * grid.width + tile.left;
            add_line(&line, from + place, to + place, plane, channels, tile.right - tile.left);
        }
    }
    free(arena.block);
    return 0;
}

/* ------------------------------------------------------------------ SparseGSA */

/* Sums over pixels are kept for each cell of a grid: `row_cuts` and `column_cuts` list where its
 * cells start, and where the last ends. Each border of a tile is a cut. */

/* (q, k, v) = dwconv(qkv(LN(x))): v is written, of q and k only sums over each cell's pixels, the
 * products of a head's channels (C, c) and then the squares of q and of k (2C). */
EXPORT int attention_sums(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *x = tensors[0], *norm_weight = tensors[1], *norm_bias = tensors[2];
    const float *qkv_weight = tensors[3], *filters = tensors[4];
    const int64_t *row_cuts = (const int64_t *)tensors[5];
    const int64_t *column_cuts = (const int64_t *)tensors[6];
    float *v = tensors[7], *sums = tensors[8];
    struct grid grid = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    int64_t channels = sizes[5], heads = sizes[6];
    int64_t cell_rows = sizes[7], cell_columns = sizes[8];
    int64_t plane = grid.height * grid.width, share = channels / heads;
    int64_t columns = least(grid.columns + 2, grid.width), stride = ring_stride(columns);
    int64_t cell_floats = channels * share + 2 * channels;

    struct arena arena;
    if (!open_arena(&arena, matrix_floats(3 * channels, channels) +
                                ring_floats(3, 3 * channels, columns) + line_floats(channels, columns) +
                                2 * up(share * stride, LINE) + BLOCK))
        return 1;
    struct matrix qkv = pack(&arena, qkv_weight, NULL, 3 * channels, channels);
    fold(&qkv, norm_weight, norm_bias);
    struct ring ring = take_ring(&arena, 3, 3 * channels, columns);
    struct line line = take_line(&arena, channels, columns);
    float *result = take(&arena, BLOCK);
    float *q = take(&arena, share * stride), *k = take(&arena, share * stride);

    struct tile tile;
    while (take_tile(&grid, 1, next, &tile)) {
        const float *from = x + tile.item * channels * plane;
        float *to = v + tile.item * channels * plane;
        int64_t cell_row = 0, first_cell = 0;
        while (row_cuts[cell_row + 1] <= tile.top)
            cell_row++;
        while (column_cuts[first_cell + 1] <= tile.left)
            first_cell++;
        for (int64_t y = tile.top - 1; y <= tile.bottom; y++) {
            if (y >= 0 && y < grid.height) {
                float *row = ring_write(&ring, y);
                fill_row(&qkv, from + y * grid.width, plane, &tile, &line, row, ring.stride);
                ring_end(&ring, y, tile.last - tile.first);
            }
            int64_t r = y - 1;
            if (r < tile.top)
                continue;
            struct row rows[3] = {ring_row(&ring, r - 1, grid.height),
                                  ring_row(&ring, r, grid.height),
                                  ring_row(&ring, r + 1, grid.height)};
            int64_t at = tile.left - tile.first, width = tile.right - tile.left;
            if (r >= row_cuts[cell_row + 1])
                cell_row++;
            float *row_sums =
                sums + (tile.item * cell_rows + cell_row) * cell_columns * cell_floats;
            for (int64_t h = 0; h < heads; h++) {
                for (int64_t c = 0; c < share; c++) {
                    int64_t channel = h * share + c;
                    depthwise(rows, channel, at, filters + channel * 9, 0, 3, q + c * stride,
                              width);
                    channel += channels;
                    depthwise(rows, channel, at, filters + channel * 9, 0, 3, k + c * stride,
                              width);
                }
                for (int64_t cell = first_cell; column_cuts[cell] < tile.right; cell++) {
                    int64_t p = column_cuts[cell] - tile.left;
                    int64_t pixels = column_cuts[cell + 1] - column_cuts[cell];
                    float *products = row_sums + cell * cell_floats + h * share * share;
                    float *squares = row_sums + cell * cell_floats + channels * share + h * share;
                    add_outer(q + p, stride, share, k + p, stride, share, pixels, products);
                    for (int64_t c = 0; c < share; c++) {
                        squares[c] += sum_of_products(q + c * stride + p, q + c * stride + p,
                                                      pixels);
                        squares[channels + c] += sum_of_products(k + c * stride + p, k + c * stride + p,
                                                      pixels);
                    }
                }
            }
            for (int64_t c = 0; c < channels; c++)
                for (int64_t p = 0; p < width; p += BLOCK) {
                    int64_t channel = 2 * channels + c, pixels = least(BLOCK, width - p);
                    depthwise(rows, channel, at + p, filters + channel * 9, 0, 3, result, pixels);
                    memcpy(to + c * plane + r * grid.width + tile.left + p, result,
                           pixels * sizeof(float));
                }
        }
    }
    free(arena.block);
    return 0;
}

/* out = x + matrix v, with a matrix (C, C) for each cell of the grid that the cuts make. */
EXPORT int add_attended(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *x = tensors[0], *v = tensors[1], *matrices = tensors[2];
    const int64_t *row_cuts = (const int64_t *)tensors[3];
    const int64_t *column_cuts = (const int64_t *)tensors[4];
    float *out = tensors[5];
    struct grid grid = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    int64_t channels = sizes[5], cell_rows = sizes[6], cell_columns = sizes[7];
    int64_t plane = grid.height * grid.width;

    int64_t columns = least(grid.columns, grid.width);

    struct arena arena;
    if (!open_arena(&arena, cell_columns * matrix_floats(channels, channels) +
                                2 * line_floats(channels, columns)))
        return 1;
    struct matrix first = take_matrix(&arena, channels, channels);
    for (int64_t j = 1; j < cell_columns; j++)
        take_matrix(&arena, channels, channels);
    struct line line = take_line(&arena, channels, columns);
    struct line result = take_line(&arena, channels, columns);

    struct tile tile;
    while (take_tile(&grid, 0, next, &tile)) {
        int64_t start = tile.item * channels * plane + tile.left, width = tile.right - tile.left;
        for (int64_t i = 0; i < cell_rows; i++) {
            int64_t top = most(tile.top, row_cuts[i]), bottom = least(tile.bottom, row_cuts[i + 1]);
            if (top >= bottom)
                continue;
            const float *cells =
                matrices + (tile.item * cell_rows + i) * cell_columns * channels * channels;
            for (int64_t y = top; y < bottom; y++) {
                int64_t place = start + y * grid.width;
                read_line(&line, v + place, plane, channels, width);
                for (int64_t j = 0; j < cell_columns; j++) {
                    int64_t left = most(0, column_cuts[j] - tile.left);
                    int64_t right = least(width, column_cuts[j + 1] - tile.left);
                    if (left >= right)
                        continue;
                    struct matrix matrix = nth_matrix(first, j);
                    if (y == top)
                        fill_matrix(&matrix, cells + j * channels * channels, channels, 1, NULL);
                    /* Its last vector may reach into the next cell, which is computed after it. */
                    product(&matrix, line.data + left, line.stride, result.data + left,
                            result.stride, right - left);
                }
                add_line(&result, x + place, out + place, plane, channels, width);
            }
        }
    }
    free(arena.block);
    return 0;
}

/* ------------------------------------------------------------------ 3x3 convolution */

ALWAYS_INLINE void convolution_tile(const float *restrict weight, const float *restrict bias,
                                    const struct row *rows, int64_t at, int64_t channels,
                                    float *restrict out, int64_t outs, const int vectors)
{
    vec sum[OUTS][VECTORS];
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; o++)
#pragma GCC unroll 8
        for (int n = 0; n < vectors; n++)
            sum[o][n] = everywhere(bias[o]);
    for (int64_t c = 0; c < channels; c++)
        for (int i = 0; i < 3; i++) {
            const float *from = rows[i].data + c * rows[i].stride + at - 1;
            for (int j = 0; j < 3; j++, weight += OUTS) {
                vec x[VECTORS];
#pragma GCC unroll 8
                for (int n = 0; n < vectors; n++)
                    x[n] = load(from + j + n * LANES);
#pragma GCC unroll 8
                for (int o = 0; o < OUTS; o++)
#pragma GCC unroll 8
                    for (int n = 0; n < vectors; n++)
                        sum[o][n] += weight[o] * x[n];
            }
        }
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; o++)
        if (o < outs)
#pragma GCC unroll 8
            for (int n = 0; n < vectors; n++)
                store(out + o * BLOCK + n * LANES, sum[o][n]);
}

/* out = conv(x); `bias` may be missing. */
EXPORT int convolve3x3(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *x = tensors[0], *weight = tensors[1], *bias = tensors[2];
    float *out = tensors[3];
    struct grid grid = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    int64_t channels = sizes[5], outs = sizes[6];
    int64_t plane = grid.height * grid.width;
    int64_t columns = least(grid.columns + 2, grid.width);

    struct arena arena;
    if (!open_arena(&arena, matrix_floats(outs, 9 * channels) + ring_floats(3, channels, columns) +
                                outs * BLOCK))
        return 1;
    struct matrix matrix = pack(&arena, weight, bias, outs, 9 * channels);
    struct ring ring = take_ring(&arena, 3, channels, columns);
    float *result = take(&arena, outs * BLOCK);

    struct tile tile;
    while (take_tile(&grid, 1, next, &tile)) {
        const float *from = x + tile.item * channels * plane;
        float *to = out + tile.item * outs * plane;
        for (int64_t y = tile.top - 1; y <= tile.bottom; y++) {
            if (y >= 0 && y < grid.height) {
                float *row = ring_write(&ring, y);
                for (int64_t c = 0; c < channels; c++)
                    memcpy(row + c * ring.stride, from + c * plane + y * grid.width + tile.first,
                           (tile.last - tile.first) * sizeof(float));
                ring_end(&ring, y, tile.last - tile.first);
            }
            int64_t r = y - 1;
            if (r < tile.top)
                continue;
            struct row rows[3] = {ring_row(&ring, r - 1, grid.height),
                                  ring_row(&ring, r, grid.height),
                                  ring_row(&ring, r + 1, grid.height)};
            for (int64_t p = tile.left; p < tile.right; p += BLOCK) {
                int64_t pixels = least(BLOCK, tile.right - p), at = p - tile.first;
                int64_t count = up(pixels, LANES) / LANES;
                for (int64_t n = 0; n < count; n += VECTORS)
                    for (int64_t o = 0; o < outs; o += OUTS)
                        WITH_VECTORS(least(count - n, VECTORS),
                                     convolution_tile(matrix.values + o * matrix.depth,
                                                      matrix.bias + o, rows, at + n * LANES,
                                                      channels, result + o * BLOCK + n * LANES,
                                                      outs - o, N))
                for (int64_t o = 0; o < outs; o++)
                    memcpy(to + o * plane + r * grid.width + p, result + o * BLOCK,
                           pixels * sizeof(float));
            }
        }
    }
    free(arena.block);
    return 0;
}
