/* Layers of DLGSANet for inference on a CPU in float32, each in one pass over the picture.
 *
 * Maps are planes, (B, C, H, W) without gaps. A thread takes tiles of rows and columns, and walks
 * down a tile row by row: what a row needs of the rows around it stays in a ring of rows, in the
 * thread's own cache, and nothing but a layer's input and output is ever whole. Within a row the
 * work goes on in blocks of BLOCK pixels, LANES pixels to a vector, all channels of a block before
 * the next.
 *
 * The file is compiled once for each instruction set; LANES says how many floats its vectors have.
 * Vectors are those of GCC and Clang, no intrinsics. Letters as in network.py: C channels, K filter
 * side, G filter groups; "picture" is the map that a layer is given.
 *
 * `work` is what every thread calls, with the same argument. A kernel gets its tensors and sizes in
 * a fixed order and returns 0, or 1 where memory has run out; `next` counts the tiles that were
 * taken. layers.py says what the tensors are.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

/* A tile of a product is OUTS results of VECTORS vectors: with the inputs and a weight they fill
 * the registers, 32 with 16 lanes or on ARM, 16 with 8 lanes. */
#define OUTS 6
#if LANES == 8
#define VECTORS 2
#else
#define VECTORS 4
#endif
#define BLOCK 64
#define LINE 16 /* floats of a cache line */
#define LARGEST_KERNEL (2 * LINE + 1) /* sees at most the zeros beside a row */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef float half_vec __attribute__((vector_size(2 * LANES)));
typedef float quarter_vec __attribute__((vector_size(LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

static const int32_t lane_numbers[16] __attribute__((aligned(64))) = {
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
};

ALWAYS_INLINE vec load(const float *from) { return *(const vec_anywhere *)from; }
ALWAYS_INLINE void store(float *to, vec value) { *(vec_anywhere *)to = value; }
ALWAYS_INLINE vec everywhere(float value) { return (vec){0} + value; }
ALWAYS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
ALWAYS_INLINE int64_t up(int64_t a, int64_t step) { return (a + step - 1) / step * step; }

/* Run `statement` with N, a constant for the compiler, equal to `count` of 1 to VECTORS. */
#if VECTORS == 2
#define WITH_VECTORS(count, statement)                                                             \
    if ((count) == 1) {                                                                            \
        enum { N = 1 };                                                                            \
        statement;                                                                                 \
    } else {                                                                                       \
        enum { N = 2 };                                                                            \
        statement;                                                                                 \
    }
#else
#define WITH_VECTORS(count, statement)                                                             \
    switch (count) {                                                                               \
    case 1: {                                                                                      \
        enum { N = 1 };                                                                            \
        statement;                                                                                 \
    } break;                                                                                       \
    case 2: {                                                                                      \
        enum { N = 2 };                                                                            \
        statement;                                                                                 \
    } break;                                                                                       \
    case 3: {                                                                                      \
        enum { N = 3 };                                                                            \
        statement;                                                                                 \
    } break;                                                                                       \
    default: {                                                                                     \
        enum { N = 4 };                                                                            \
        statement;                                                                                 \
    }                                                                                              \
    }
#endif

/* ------------------------------------------------------------------ tiles of a picture */

struct grid {
    int64_t batch, height, width;
    int64_t rows, columns; /* of a tile, at most */
};

struct tile {
    int64_t item, top, bottom, left, right;
    int64_t first, last; /* the columns that are computed: the tile's and those its filters see */
};

static int take_tile(const struct grid *grid, int64_t halo, int64_t *next, struct tile *tile)
{
    int64_t down = (grid->height + grid->rows - 1) / grid->rows;
    int64_t across = (grid->width + grid->columns - 1) / grid->columns;
    int64_t number = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (number >= grid->batch * down * across)
        return 0;
    int64_t row = number % down, column = number / down % across;
    tile->item = number / down / across;
    tile->top = grid->height * row / down;
    tile->bottom = grid->height * (row + 1) / down;
    tile->left = grid->width * column / across;
    tile->right = grid->width * (column + 1) / across;
    tile->first = most(0, tile->left - halo);
    tile->last = least(grid->width, tile->right + halo);
    return 1;
}

/* ------------------------------------------------------------------ a thread's own memory */

struct arena {
    float *next;
    void *block;
};

static int open_arena(struct arena *arena, int64_t floats)
{
    /* One line beyond, to start at a line's border. */
    size_t bytes = (size_t)floats * sizeof(float) + 64;
    arena->block = malloc(bytes);
    if (!arena->block)
        return 0;
    /* Lanes beyond a row's end are computed and never used, but must not be slow denormals. */
    memset(arena->block, 0, bytes);
    arena->next = (float *)(((uintptr_t)arena->block + 63) & ~(uintptr_t)63);
    return 1;
}

static float *take(struct arena *arena, int64_t floats)
{
    float *result = arena->next;
    arena->next += up(floats, LINE);
    return result;
}

/* Rows of some channels, each with LINE zeros before and at least as many behind it. */
struct ring {
    float *rows;
    const float *zeros;
    int64_t slots, channels, stride;
};

/* What stands for a channel's row: `data` is at its first column, channels are `stride` apart. */
struct row {
    const float *data;
    int64_t stride;
};

static int64_t ring_stride(int64_t columns) { return up(columns, LANES) + 2 * LINE; }

static int64_t ring_floats(int64_t slots, int64_t channels, int64_t columns)
{
    return up(slots * channels * ring_stride(columns), LINE) + up(ring_stride(columns), LINE);
}

static struct ring take_ring(struct arena *arena, int64_t slots, int64_t channels, int64_t columns)
{
    struct ring ring = {.slots = slots, .channels = channels, .stride = ring_stride(columns)};
    ring.rows = take(arena, slots * channels * ring.stride);
    ring.zeros = take(arena, ring.stride);
    return ring;
}

static float *ring_write(const struct ring *ring, int64_t y)
{
    return ring->rows + y % ring->slots * ring->channels * ring->stride + LINE;
}

/* Return row y, of zeros outside the picture. */
static struct row ring_row(const struct ring *ring, int64_t y, int64_t height)
{
    if (y < 0 || y >= height)
        return (struct row){ring->zeros + LINE, 0};
    return (struct row){ring_write(ring, y), ring->stride};
}

/* Put zeros behind `columns` columns of row y: what filters see beyond the picture. */
static void ring_end(const struct ring *ring, int64_t y, int64_t columns)
{
    float *row = ring_write(ring, y);
    for (int64_t c = 0; c < ring->channels; c++)
        for (int64_t p = columns; p < ring->stride - LINE; p++)
            row[c * ring->stride + p] = 0;
}

/* ------------------------------------------------------------------ blocks of pixels */

/* Copy `pixels` pixels of all channels, and have the next block fetched meanwhile: planes are far
 * apart, so the hardware does not foresee it. */
static void read_block(const float *plane, int64_t plane_stride, int64_t channels, int64_t pixels,
                       float *block)
{
    for (int64_t c = 0; c < channels; c++, plane += plane_stride, block += BLOCK) {
        int64_t p = 0;
        for (; p + LANES <= pixels; p += LANES) {
            __builtin_prefetch(plane + p + BLOCK);
            store(block + p, load(plane + p));
        }
        for (; p < pixels; p++)
            block[p] = plane[p];
        for (; p < up(pixels, LANES); p++)
            block[p] = 0;
    }
}

/* Write x + block to `out`, both planes. */
static void add_block(const float *x, float *out, int64_t plane_stride, int64_t channels,
                      int64_t pixels, const float *block)
{
    for (int64_t c = 0; c < channels; c++, x += plane_stride, out += plane_stride, block += BLOCK)
        for (int64_t p = 0; p < pixels; p++)
            out[p] = x[p] + block[p];
}

/* LayerNorm over the channels of each pixel of a block, in place. */
static void normalise(float *block, const float *weight, const float *bias, int64_t channels,
                      int64_t pixels)
{
    float mean[BLOCK], scale[BLOCK];
    int64_t lanes = up(pixels, LANES);
    for (int64_t p = 0; p < lanes; p++)
        mean[p] = scale[p] = 0;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < lanes; p++)
            mean[p] += block[c * BLOCK + p];
    for (int64_t p = 0; p < lanes; p++)
        mean[p] /= channels;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < lanes; p++) {
            float d = block[c * BLOCK + p] - mean[p];
            scale[p] += d * d;
        }
    for (int64_t p = 0; p < lanes; p++)
        scale[p] = 1 / __builtin_sqrtf(scale[p] / channels + 1e-5f);
    for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < lanes; p++)
            block[c * BLOCK + p] =
                (block[c * BLOCK + p] - mean[p]) * scale[p] * weight[c] + bias[c];
}

/* gate = gelu(a) * b, in place of a.
 *
 * The exact GELU is a * Φ(a), Φ the normal distribution. Φ(a) - 1/2 is odd: a times a polynomial
 * in a², fitted for the least largest error over |a| <= 5.2, where Φ is within 1e-7 of 0 or 1. The
 * polynomial is in u = 2 (a / 5.2)² - 1, in [-1, 1], which keeps its rounding errors small. */
static void gate(float *restrict a, const float *restrict b, int64_t lanes)
{
    static const float terms[] = {
        0.135949984f,    -0.067743808f,   0.0500261113f,   -0.0399253964f,  0.0319623239f,
        -0.02476345f,    0.0181339234f,   -0.0123533597f,  0.00801009033f,  -0.00506736757f,
        0.00266244193f,  -0.000978515833f, 0.000600760221f, -0.00056229037f, 0.000202389681f,
    };
    for (int64_t p = 0; p < lanes; p++) {
        float clipped = a[p] < -5.2f ? -5.2f : a[p];
        clipped = clipped > 5.2f ? 5.2f : clipped;
        float u = clipped * clipped * (2 / (5.2f * 5.2f)) - 1;
        float sum = terms[14];
#pragma GCC unroll 16
        for (int i = 13; i >= 0; i--)
            sum = sum * u + terms[i];
        a[p] = a[p] * (sum * clipped + 0.5f) * b[p];
    }
}

/* ------------------------------------------------------------------ products over channels */

/* A weight (outs, depth), OUTS of its rows side by side. */
struct matrix {
    float *values; /* (blocks, depth, OUTS) */
    float *bias;   /* (blocks * OUTS) */
    int64_t outs, depth;
};

/* What a packed matrix takes; the next one lies behind it. */
static int64_t matrix_floats(int64_t outs, int64_t depth)
{
    return up(up(outs, OUTS) * depth, LINE) + up(up(outs, OUTS), LINE);
}

static void fill_matrix(struct matrix *matrix, const float *weight, const float *bias)
{
    int64_t outs = matrix->outs, depth = matrix->depth;
    for (int64_t o = 0; o < up(outs, OUTS); o++) {
        float *column = matrix->values + o / OUTS * depth * OUTS + o % OUTS;
        for (int64_t d = 0; d < depth; d++)
            column[d * OUTS] = o < outs ? weight[o * depth + d] : 0;
        matrix->bias[o] = bias && o < outs ? bias[o] : 0;
    }
}

static struct matrix take_matrix(struct arena *arena, int64_t outs, int64_t depth)
{
    struct matrix matrix = {.outs = outs, .depth = depth};
    matrix.values = take(arena, up(outs, OUTS) * depth);
    matrix.bias = take(arena, up(outs, OUTS));
    return matrix;
}

static struct matrix pack(struct arena *arena, const float *weight, const float *bias,
                          int64_t outs, int64_t depth)
{
    struct matrix matrix = take_matrix(arena, outs, depth);
    fill_matrix(&matrix, weight, bias);
    return matrix;
}

ALWAYS_INLINE void product_tile(const float *restrict weight, const float *restrict bias,
                                int64_t depth, const float *restrict in, int64_t in_stride,
                                float *restrict out, int64_t out_stride, int64_t outs,
                                const int vectors)
{
    vec sum[OUTS][VECTORS];
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; o++)
#pragma GCC unroll 8
        for (int n = 0; n < vectors; n++)
            sum[o][n] = everywhere(bias[o]);
    for (int64_t d = 0; d < depth; d++, in += in_stride, weight += OUTS) {
        vec x[VECTORS];
#pragma GCC unroll 8
        for (int n = 0; n < vectors; n++)
            x[n] = load(in + n * LANES);
#pragma GCC unroll 8
        for (int o = 0; o < OUTS; o++)
#pragma GCC unroll 8
            for (int n = 0; n < vectors; n++)
                sum[o][n] += weight[o] * x[n];
    }
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; o++)
        if (o < outs)
#pragma GCC unroll 8
            for (int n = 0; n < vectors; n++)
                store(out + o * out_stride + n * LANES, sum[o][n]);
}

/* out[o][p] = bias[o] + Σ_d weight[o][d] in[d][p], for whole vectors of at most BLOCK pixels. */
static void product(const struct matrix *matrix, const float *in, int64_t in_stride, float *out,
                    int64_t out_stride, int64_t pixels)
{
    int64_t count = up(pixels, LANES) / LANES;
    for (int64_t n = 0; n < count; n += VECTORS) {
        const float *from = in + n * LANES;
        float *to = out + n * LANES;
        for (int64_t o = 0; o < matrix->outs; o += OUTS) {
            WITH_VECTORS(least(count - n, VECTORS),
                         product_tile(matrix->values + o * matrix->depth, matrix->bias + o,
                                      matrix->depth, from, in_stride, to + o * out_stride,
                                      out_stride, matrix->outs - o, N))
        }
    }
}

/* ------------------------------------------------------------------ filters */

ALWAYS_INLINE void depthwise_vectors(const float *const *rows, const float *weight, float bias,
                                     const int64_t kernel, float *out, const int vectors)
{
    vec sum[VECTORS];
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n++)
        sum[n] = everywhere(bias);
    for (int64_t i = 0; i < kernel; i++)
        for (int64_t j = 0; j < kernel; j++)
#pragma GCC unroll 8
            for (int n = 0; n < vectors; n++)
                sum[n] += weight[i * kernel + j] * load(rows[i] + j + n * LANES);
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n++)
        store(out + n * LANES, sum[n]);
}

/* One channel of a depthwise convolution, for whole vectors from column `first` on. */
ALWAYS_INLINE void depthwise(const struct row *rows, int64_t channel, int64_t first,
                             const float *weight, float bias, const int64_t kernel, float *out,
                             int64_t pixels)
{
    const float *from[LARGEST_KERNEL];
    int64_t count = up(pixels, LANES) / LANES;
    for (int64_t n = 0; n < count; n += VECTORS) {
        for (int64_t i = 0; i < kernel; i++)
            from[i] = rows[i].data + channel * rows[i].stride + first - kernel / 2 + n * LANES;
        WITH_VECTORS(least(count - n, VECTORS),
                     depthwise_vectors(from, weight, bias, kernel, out + n * LANES, N))
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
                                (2 * channels + hidden + 1) * BLOCK))
        return 1;
    struct matrix project_in = pack(&arena, in_weight, NULL, 2 * hidden, channels);
    struct matrix project_out = pack(&arena, out_weight, NULL, channels, hidden);
    struct ring ring = take_ring(&arena, 3, 2 * hidden, columns);
    float *block = take(&arena, channels * BLOCK), *result = take(&arena, channels * BLOCK);
    float *gated = take(&arena, hidden * BLOCK), *other = take(&arena, BLOCK);

    struct tile tile;
    while (take_tile(&grid, 1, next, &tile)) {
        const float *from = x + tile.item * channels * plane;
        float *to = out + tile.item * channels * plane;
        for (int64_t y = tile.top - 1; y <= tile.bottom; y++) {
            if (y >= 0 && y < grid.height) {
                float *row = ring_write(&ring, y);
                for (int64_t p = tile.first; p < tile.last; p += BLOCK) {
                    int64_t pixels = least(BLOCK, tile.last - p);
                    read_block(from + y * grid.width + p, plane, channels, pixels, block);
                    normalise(block, norm_weight, norm_bias, channels, pixels);
                    product(&project_in, block, BLOCK, row + p - tile.first, ring.stride, pixels);
                }
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
                product(&project_out, gated, BLOCK, result, BLOCK, pixels);
                int64_t place = r * grid.width + p;
                add_block(from + place, to + place, plane, channels, pixels, result);
            }
        }
    }
    free(arena.block);
    return 0;
}

/* ------------------------------------------------------------------ MHDLSA */

/* Filter `channels` channels of a group with its filters (kernel², BLOCK), a filter a pixel. */
ALWAYS_INLINE void dynamic_vectors(const float *filters, const struct row *rows, int64_t at,
                                   const int64_t kernel, float *out, const int channels,
                                   const int vectors)
{
    vec sum[OUTS][VECTORS];
#pragma GCC unroll 8
    for (int c = 0; c < channels; c++)
#pragma GCC unroll 8
        for (int n = 0; n < vectors; n++)
            sum[c][n] = everywhere(0);
    for (int64_t i = 0; i < kernel; i++) {
        const float *from = rows[i].data + at;
        for (int64_t j = 0; j < kernel; j++, filters += BLOCK) {
            vec filter[VECTORS];
#pragma GCC unroll 8
            for (int n = 0; n < vectors; n++)
                filter[n] = load(filters + n * LANES);
#pragma GCC unroll 8
            for (int c = 0; c < channels; c++)
#pragma GCC unroll 8
                for (int n = 0; n < vectors; n++)
                    sum[c][n] += filter[n] * load(from + c * rows[i].stride + j + n * LANES);
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < channels; c++)
#pragma GCC unroll 8
        for (int n = 0; n < vectors; n++)
            store(out + c * BLOCK + n * LANES, sum[c][n]);
}

ALWAYS_INLINE void dynamic_channels(const float *filters, const struct row *rows, int64_t at,
                                    int64_t kernel, float *out, int64_t pixels, const int channels)
{
    int64_t count = up(pixels, LANES) / LANES;
    for (int64_t n = 0; n < count; n += VECTORS) {
        int64_t p = n * LANES;
        WITH_VECTORS(least(count - n, VECTORS),
                     dynamic_vectors(filters + p, rows, at + p, kernel, out + p, channels, N))
    }
}

/* Filter `channels` channels from `first` on, which share their filters. */
static void dynamic(const float *filters, const struct row *rows, int64_t first, int64_t channels,
                    int64_t at, int64_t kernel, float *out, int64_t pixels)
{
    struct row shifted[LARGEST_KERNEL];
    for (int64_t c = 0; c < channels; c += OUTS, out += OUTS * BLOCK) {
        for (int64_t i = 0; i < kernel; i++) {
            shifted[i] = rows[i];
            shifted[i].data += (first + c) * rows[i].stride - kernel / 2;
        }
#define CASE(count)                                                                                \
    case count:                                                                                    \
        dynamic_channels(filters, shifted, at, kernel, out, pixels, count);                        \
        break;
        switch (least(channels - c, OUTS)) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        }
#undef CASE
    }
}

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
                                (2 * channels + hidden + taps) * BLOCK))
        return 1;
    struct matrix conv0 = pack(&arena, conv0_weight, NULL, channels, channels);
    struct matrix conv1 = pack(&arena, conv1_weight, NULL, channels, channels);
    struct matrix squeeze = pack(&arena, squeeze_weight, squeeze_bias, hidden, channels);
    struct matrix first = pack(&arena, project_weight, project_bias, taps, hidden);
    for (int64_t g = 1; g < groups; g++)
        pack(&arena, project_weight + g * taps * hidden, project_bias + g * taps, taps, hidden);
    struct ring features = take_ring(&arena, kernel, channels, columns);
    struct ring squeezed = take_ring(&arena, kernel, hidden, columns);
    float *block = take(&arena, channels * BLOCK), *result = take(&arena, channels * BLOCK);
    float *generator = take(&arena, hidden * BLOCK), *filters = take(&arena, taps * BLOCK);

    struct tile tile;
    while (take_tile(&grid, halo, next, &tile)) {
        const float *from = x + tile.item * channels * plane;
        float *to = out + tile.item * channels * plane;
        for (int64_t y = tile.top - halo; y < tile.bottom + halo; y++) {
            if (y >= 0 && y < grid.height) {
                float *row = ring_write(&features, y), *narrow = ring_write(&squeezed, y);
                for (int64_t p = tile.first; p < tile.last; p += BLOCK) {
                    int64_t pixels = least(BLOCK, tile.last - p), at = p - tile.first;
                    read_block(from + y * grid.width + p, plane, channels, pixels, block);
                    normalise(block, norm_weight, norm_bias, channels, pixels);
                    product(&conv0, block, BLOCK, row + at, features.stride, pixels);
                    product(&squeeze, row + at, features.stride, narrow + at, squeezed.stride,
                            pixels);
                }
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
                    struct matrix project = first;
                    project.values += g * matrix_floats(taps, hidden);
                    project.bias += g * matrix_floats(taps, hidden);
                    product(&project, generator, BLOCK, filters, BLOCK, pixels);
                    dynamic(filters, rows, g * shared, shared, at, kernel,
                            block + g * shared * BLOCK, pixels);
                }
                product(&conv1, block, BLOCK, result, BLOCK, pixels);
                int64_t place = r * grid.width + p;
                add_block(from + place, to + place, plane, channels, pixels, result);
            }
        }
    }
    free(arena.block);
    return 0;
}

/* ------------------------------------------------------------------ SparseGSA */

/* Sums over pixels are kept for each cell of a grid: `row_cuts` and `column_cuts` list where its
 * cells start, and where the last ends. Each border of a tile is a cut. */

#define PAIRS 4 /* channels of q, and of k, whose products are summed at once */

static float sum_lanes(vec value)
{
    union {
        vec whole;
        half_vec halves[2];
    } by_halves = {value};
    union {
        half_vec whole;
        quarter_vec quarters[2];
    } by_quarters = {by_halves.halves[0] + by_halves.halves[1]};
    quarter_vec rest = by_quarters.quarters[0] + by_quarters.quarters[1];
    float sum = 0;
    for (int i = 0; i < LANES / 4; i++)
        sum += rest[i];
    return sum;
}

/* Return the lanes of `value` that lie before `count`, and zeros. */
ALWAYS_INLINE vec first_lanes(vec value, int32_t count)
{
    ints numbers = *(const ints *)lane_numbers;
    return (vec)((ints)value & (numbers < count));
}

/* Add to product[i * width + j] the sums Σ q[i] k[j] over pixels, i and j up to PAIRS. */
static void add_products(const float *q, const float *k, int64_t stride, int64_t pixels,
                         float *product, int64_t width, int64_t q_count, int64_t k_count)
{
    vec sum[PAIRS][PAIRS] = {{{0}}};
    for (int64_t p = 0; p < pixels; p += LANES) {
        vec a[PAIRS], b[PAIRS];
#pragma GCC unroll 4
        for (int i = 0; i < PAIRS; i++) {
            a[i] = load(q + i * stride + p);
            b[i] = load(k + i * stride + p);
        }
        if (pixels - p < LANES)
            for (int i = 0; i < PAIRS; i++) {
                a[i] = first_lanes(a[i], pixels - p);
                b[i] = first_lanes(b[i], pixels - p);
            }
#pragma GCC unroll 4
        for (int i = 0; i < PAIRS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < PAIRS; j++)
                sum[i][j] += a[i] * b[j];
    }
    for (int64_t i = 0; i < q_count; i++)
        for (int64_t j = 0; j < k_count; j++)
            product[i * width + j] += sum_lanes(sum[i][j]);
}

static float sum_of_squares(const float *from, int64_t pixels)
{
    vec sum = {0};
    int64_t p = 0;
    for (; p + LANES <= pixels; p += LANES)
        sum += load(from + p) * load(from + p);
    float rest = 0;
    for (; p < pixels; p++)
        rest += from[p] * from[p];
    return sum_lanes(sum) + rest;
}

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
                                ring_floats(3, 3 * channels, columns) + channels * BLOCK +
                                2 * up(up(share, PAIRS) * stride, LINE) + BLOCK))
        return 1;
    struct matrix qkv = pack(&arena, qkv_weight, NULL, 3 * channels, channels);
    struct ring ring = take_ring(&arena, 3, 3 * channels, columns);
    float *block = take(&arena, channels * BLOCK), *result = take(&arena, BLOCK);
    /* Channels beyond a head's stay zero. */
    float *q = take(&arena, up(share, PAIRS) * stride);
    float *k = take(&arena, up(share, PAIRS) * stride);

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
                for (int64_t p = tile.first; p < tile.last; p += BLOCK) {
                    int64_t pixels = least(BLOCK, tile.last - p);
                    read_block(from + y * grid.width + p, plane, channels, pixels, block);
                    normalise(block, norm_weight, norm_bias, channels, pixels);
                    product(&qkv, block, BLOCK, row + p - tile.first, ring.stride, pixels);
                }
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
                    for (int64_t i = 0; i < share; i += PAIRS)
                        for (int64_t j = 0; j < share; j += PAIRS)
                            add_products(q + i * stride + p, k + j * stride + p, stride, pixels,
                                         products + i * share + j, share, least(PAIRS, share - i),
                                         least(PAIRS, share - j));
                    for (int64_t c = 0; c < share; c++) {
                        squares[c] += sum_of_squares(q + c * stride + p, pixels);
                        squares[channels + c] += sum_of_squares(k + c * stride + p, pixels);
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

    struct arena arena;
    if (!open_arena(&arena, matrix_floats(channels, channels) + 2 * channels * BLOCK))
        return 1;
    struct matrix matrix = take_matrix(&arena, channels, channels);
    float *block = take(&arena, channels * BLOCK), *result = take(&arena, channels * BLOCK);

    struct tile tile;
    while (take_tile(&grid, 0, next, &tile)) {
        int64_t start = tile.item * channels * plane;
        for (int64_t i = 0; i < cell_rows; i++)
            for (int64_t j = 0; j < cell_columns; j++) {
                int64_t top = most(tile.top, row_cuts[i]);
                int64_t bottom = least(tile.bottom, row_cuts[i + 1]);
                int64_t left = most(tile.left, column_cuts[j]);
                int64_t right = least(tile.right, column_cuts[j + 1]);
                if (top >= bottom || left >= right)
                    continue;
                int64_t cell = (tile.item * cell_rows + i) * cell_columns + j;
                fill_matrix(&matrix, matrices + cell * channels * channels, NULL);
                for (int64_t y = top; y < bottom; y++)
                    for (int64_t p = left; p < right; p += BLOCK) {
                        int64_t pixels = least(BLOCK, right - p), place = start + y * grid.width + p;
                        read_block(v + place, plane, channels, pixels, block);
                        product(&matrix, block, BLOCK, result, BLOCK, pixels);
                        add_block(x + place, out + place, plane, channels, pixels, result);
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

/* ------------------------------------------------------------------ a thread's part */

struct call {
    int (*kernel)(float *const *tensors, const int64_t *sizes, int64_t *next);
    float *const *tensors;
    const int64_t *sizes;
    int64_t next, failed;
};

/* Of this file, from setup.py. */
EXPORT const char source_digest[] = SOURCE_DIGEST;

EXPORT void work(void *data)
{
    struct call *call = data;
    if (call->kernel(call->tensors, call->sizes, &call->next))
        __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
}
