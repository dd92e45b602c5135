/* What the kernels share: vectors, tiles, memory of a thread, blocks of pixels, products, filters.
 *
 * Maps are planes, (B, C, H, W) in float32; the pixels of a plane lie without gaps. A thread takes
 * tiles of rows and columns, and walks down a tile row by row: what a row needs of the rows around
 * it stays in a ring of rows, in the thread's own cache. Within a row the work is done in blocks of
 * BLOCK pixels, LANES pixels to a vector, all channels of a block before the next.
 *
 * The files are compiled once for each instruction set; LANES says how many floats its vectors have.
 * Vectors are those of GCC and Clang, no intrinsics. Letters as in network.py: C channels, K filter
 * side, G filter groups.
 *
 * A kernel gets its tensors and sizes in a fixed order and returns 0, or 1 where memory has run
 * out; every thread calls it with the same arguments, and `next` counts the pieces of work that were
 * taken. The Python that calls a kernel says what its tensors are.
 */
#ifndef DLGSANET_COMMON_H
#define DLGSANET_COMMON_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define INTERNAL static __attribute__((unused))
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

INTERNAL const int32_t lane_numbers[16] __attribute__((aligned(64))) = {
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

INTERNAL int take_tile(const struct grid *grid, int64_t halo, int64_t *next, struct tile *tile)
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

INTERNAL int open_arena(struct arena *arena, int64_t floats)
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

INTERNAL float *take(struct arena *arena, int64_t floats)
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

INTERNAL int64_t ring_stride(int64_t columns) { return up(columns, LANES) + 2 * LINE; }

INTERNAL int64_t ring_floats(int64_t slots, int64_t channels, int64_t columns)
{
    return up(slots * channels * ring_stride(columns), LINE) + up(ring_stride(columns), LINE);
}

INTERNAL struct ring take_ring(struct arena *arena, int64_t slots, int64_t channels, int64_t columns)
{
    struct ring ring = {.slots = slots, .channels = channels, .stride = ring_stride(columns)};
    ring.rows = take(arena, slots * channels * ring.stride);
    ring.zeros = take(arena, ring.stride);
    return ring;
}

INTERNAL float *ring_write(const struct ring *ring, int64_t y)
{
    return ring->rows + y % ring->slots * ring->channels * ring->stride + LINE;
}

/* Return row y, of zeros outside the picture. */
INTERNAL struct row ring_row(const struct ring *ring, int64_t y, int64_t height)
{
    if (y < 0 || y >= height)
        return (struct row){ring->zeros + LINE, 0};
    return (struct row){ring_write(ring, y), ring->stride};
}

/* Put zeros behind `columns` columns of row y: what filters see beyond the picture. */
INTERNAL void ring_end(const struct ring *ring, int64_t y, int64_t columns)
{
    float *row = ring_write(ring, y);
    for (int64_t c = 0; c < ring->channels; c++)
        for (int64_t p = columns; p < ring->stride - LINE; p++)
            row[c * ring->stride + p] = 0;
}

/* ------------------------------------------------------------------ blocks of pixels */

/* Copy `pixels` pixels of all channels, and have the next block fetched meanwhile: planes are far
 * apart, so the hardware does not foresee it. */
INTERNAL void read_block(const float *plane, int64_t plane_stride, int64_t channels, int64_t pixels,
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

/* Give each pixel of a block mean 0 and variance 1 over its channels, in place: LayerNorm without
 * its weight and bias, which `fold` puts into the product that follows. `scale` is set to one over
 * the standard deviations. Rows of a block lie `stride` apart; at most PIECE pixels. */
#define PIECE 256

INTERNAL void standardise(float *block, int64_t stride, int64_t channels, int64_t pixels,
                          float *restrict scale)
{
    float mean[PIECE];
    int64_t lanes = up(pixels, LANES);
    for (int64_t p = 0; p < lanes; p++)
        mean[p] = scale[p] = 0;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < lanes; p++)
            mean[p] += block[c * stride + p];
    for (int64_t p = 0; p < lanes; p++)
        mean[p] /= channels;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < lanes; p++) {
            float d = block[c * stride + p] -= mean[p];
            scale[p] += d * d;
        }
    for (int64_t p = 0; p < lanes; p++)
        scale[p] = 1 / __builtin_sqrtf(scale[p] / channels + 1e-5f);
    for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < lanes; p++)
            block[c * stride + p] *= scale[p];
}

/* Return Φ(a), the normal distribution.
 *
 * Φ(a) - 1/2 is odd: a times a polynomial in a², fitted for the least largest error over |a| <= 5.2,
 * where Φ is within 1e-7 of 0 or 1. The polynomial is in u = 2 (a / 5.2)² - 1, in [-1, 1], which
 * keeps its rounding errors small. */
ALWAYS_INLINE float normal_distribution(float a)
{
    static const float terms[] = {
        0.135949984f,    -0.067743808f,   0.0500261113f,   -0.0399253964f,  0.0319623239f,
        -0.02476345f,    0.0181339234f,   -0.0123533597f,  0.00801009033f,  -0.00506736757f,
        0.00266244193f,  -0.000978515833f, 0.000600760221f, -0.00056229037f, 0.000202389681f,
    };
    float clipped = a < -5.2f ? -5.2f : a;
    clipped = clipped > 5.2f ? 5.2f : clipped;
    float u = clipped * clipped * (2 / (5.2f * 5.2f)) - 1;
    float sum = terms[14];
#pragma GCC unroll 16
    for (int i = 13; i >= 0; i--)
        sum = sum * u + terms[i];
    return sum * clipped + 0.5f;
}

/* gate = gelu(a) * b, in place of a; the exact GELU is a * Φ(a). */
INTERNAL void gate(float *restrict a, const float *restrict b, int64_t lanes)
{
    for (int64_t p = 0; p < lanes; p++)
        a[p] = a[p] * normal_distribution(a[p]) * b[p];
}

/* ------------------------------------------------------------------ products over channels */

/* A weight (outs, depth), OUTS of its rows side by side. */
struct matrix {
    float *values; /* (blocks, depth, OUTS) */
    float *bias;   /* (blocks * OUTS) */
    int64_t outs, depth;
};

/* What a packed matrix takes; the next one lies behind it. */
INTERNAL int64_t matrix_floats(int64_t outs, int64_t depth)
{
    return up(up(outs, OUTS) * depth, LINE) + up(up(outs, OUTS), LINE);
}

/* Entry (o, d) of the weight lies at o * out_step + d * depth_step. */
INTERNAL void fill_matrix(struct matrix *matrix, const float *weight, int64_t out_step,
                          int64_t depth_step, const float *bias)
{
    int64_t outs = matrix->outs, depth = matrix->depth;
    for (int64_t o = 0; o < up(outs, OUTS); o++) {
        float *column = matrix->values + o / OUTS * depth * OUTS + o % OUTS;
        for (int64_t d = 0; d < depth; d++)
            column[d * OUTS] = o < outs ? weight[o * out_step + d * depth_step] : 0;
        matrix->bias[o] = bias && o < outs ? bias[o] : 0;
    }
}

INTERNAL struct matrix take_matrix(struct arena *arena, int64_t outs, int64_t depth)
{
    struct matrix matrix = {.outs = outs, .depth = depth};
    matrix.values = take(arena, up(outs, OUTS) * depth);
    matrix.bias = take(arena, up(outs, OUTS));
    return matrix;
}

/* Return the matrix that was taken `n` matrices of the same size after `first`. */
INTERNAL struct matrix nth_matrix(struct matrix first, int64_t n)
{
    int64_t size = matrix_floats(first.outs, first.depth);
    first.values += n * size;
    first.bias += n * size;
    return first;
}

INTERNAL struct matrix pack(struct arena *arena, const float *weight, const float *bias,
                            int64_t outs, int64_t depth)
{
    struct matrix matrix = take_matrix(arena, outs, depth);
    fill_matrix(&matrix, weight, depth, 1, bias);
    return matrix;
}

/* The same for a weight (depth, outs). */
INTERNAL struct matrix pack_transposed(struct arena *arena, const float *weight, int64_t outs,
                                       int64_t depth)
{
    struct matrix matrix = take_matrix(arena, outs, depth);
    fill_matrix(&matrix, weight, 1, outs, NULL);
    return matrix;
}

/* Make a matrix act on standardised pixels as it would on scale * pixel + shift. */
INTERNAL void fold(struct matrix *matrix, const float *scale, const float *shift)
{
    for (int64_t o = 0; o < up(matrix->outs, OUTS); o++) {
        float *column = matrix->values + o / OUTS * matrix->depth * OUTS + o % OUTS;
        for (int64_t d = 0; d < matrix->depth; d++, column += OUTS) {
            matrix->bias[o] += *column * shift[d];
            *column *= scale[d];
        }
    }
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

/* The OUTS results of a product from row `o` on, for whole vectors of pixels. */
INTERNAL void product_rows(const struct matrix *matrix, int64_t o, const float *in,
                           int64_t in_stride, float *out, int64_t out_stride, int64_t pixels)
{
    int64_t count = up(pixels, LANES) / LANES;
    for (int64_t n = 0; n < count; n += VECTORS) {
        WITH_VECTORS(least(count - n, VECTORS),
                     product_tile(matrix->values + o * matrix->depth, matrix->bias + o,
                                  matrix->depth, in + n * LANES, in_stride, out + n * LANES,
                                  out_stride, matrix->outs - o, N))
    }
}

/* out[o][p] = bias[o] + Σ_d weight[o][d] in[d][p], for whole vectors of pixels. */
INTERNAL void product(const struct matrix *matrix, const float *in, int64_t in_stride, float *out,
                      int64_t out_stride, int64_t pixels)
{
    for (int64_t o = 0; o < matrix->outs; o += OUTS)
        product_rows(matrix, o, in, in_stride, out + o * out_stride, out_stride, pixels);
}

/* ------------------------------------------------------------------ sums over pixels */

INTERNAL float sum_lanes(vec value)
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

/* Set out[i] to the sum over the lanes of sums[i]. */
INTERNAL void add_lanes(const vec *sums, int64_t count, float *out)
{
    for (int64_t i = 0; i < count; i++)
        out[i] = sum_lanes(sums[i]);
}

/* Return the lanes of `value` that lie before `count`, and zeros. */
ALWAYS_INLINE vec first_lanes(vec value, int64_t count)
{
    ints numbers = *(const ints *)lane_numbers;
    return (vec)((ints)value & (numbers < (int32_t)least(count, LANES)));
}

/* Rows of a and of b whose products are summed at once: with a row of each, they fill the
 * registers. */
#if LANES == 8
#define LEFT 3
#else
#define LEFT 4
#endif
#define RIGHT 4

/* Set sum[i][j] to the lanes of Σ a[i] b[j] over pixels; rows from a_count or b_count on are not
 * read. */
ALWAYS_INLINE void outer_tile(const float *a, int64_t a_stride, int64_t a_count, const float *b,
                              int64_t b_stride, int64_t b_count, int64_t pixels,
                              vec sum[LEFT][RIGHT])
{
    const float *left[LEFT], *right[RIGHT];
#pragma GCC unroll 4
    for (int i = 0; i < LEFT; i++)
        left[i] = a + least(i, a_count - 1) * a_stride;
#pragma GCC unroll 4
    for (int j = 0; j < RIGHT; j++)
        right[j] = b + least(j, b_count - 1) * b_stride;
    vec total[LEFT][RIGHT];
#pragma GCC unroll 4
    for (int i = 0; i < LEFT; i++)
#pragma GCC unroll 4
        for (int j = 0; j < RIGHT; j++)
            total[i][j] = everywhere(0);
    int64_t p = 0;
    for (; p + LANES <= pixels; p += LANES) {
        vec x[LEFT];
#pragma GCC unroll 4
        for (int i = 0; i < LEFT; i++)
            x[i] = load(left[i] + p);
#pragma GCC unroll 4
        for (int j = 0; j < RIGHT; j++) {
            vec y = load(right[j] + p);
#pragma GCC unroll 4
            for (int i = 0; i < LEFT; i++)
                total[i][j] += x[i] * y;
        }
    }
    if (p < pixels) {
#pragma GCC unroll 4
        for (int j = 0; j < RIGHT; j++) {
            vec y = first_lanes(load(right[j] + p), pixels - p);
#pragma GCC unroll 4
            for (int i = 0; i < LEFT; i++)
                total[i][j] += first_lanes(load(left[i] + p), pixels - p) * y;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < LEFT; i++)
#pragma GCC unroll 4
        for (int j = 0; j < RIGHT; j++)
            sum[i][j] = total[i][j];
}

/* Add to out[i * b_count + j] the sums Σ a[i] b[j] over pixels. Whole vectors are read. */
INTERNAL void add_outer(const float *a, int64_t a_stride, int64_t a_count, const float *b,
                        int64_t b_stride, int64_t b_count, int64_t pixels, float *out)
{
    for (int64_t i = 0; i < a_count; i += LEFT)
        for (int64_t j = 0; j < b_count; j += RIGHT) {
            int64_t down = least(LEFT, a_count - i), across = least(RIGHT, b_count - j);
            vec sum[LEFT][RIGHT];
            outer_tile(a + i * a_stride, a_stride, down, b + j * b_stride, b_stride, across, pixels,
                       sum);
            for (int64_t k = 0; k < down; k++)
                for (int64_t l = 0; l < across; l++)
                    out[(i + k) * b_count + j + l] += sum_lanes(sum[k][l]);
        }
}

/* The same with the lanes of each sum apart, for pieces too short to add them up each time. */
INTERNAL void add_outer_lanes(const float *a, int64_t a_stride, int64_t a_count, const float *b,
                              int64_t b_stride, int64_t b_count, int64_t pixels, vec *out)
{
    for (int64_t i = 0; i < a_count; i += LEFT)
        for (int64_t j = 0; j < b_count; j += RIGHT) {
            int64_t down = least(LEFT, a_count - i), across = least(RIGHT, b_count - j);
            vec sum[LEFT][RIGHT];
            outer_tile(a + i * a_stride, a_stride, down, b + j * b_stride, b_stride, across, pixels,
                       sum);
            for (int64_t k = 0; k < down; k++)
                for (int64_t l = 0; l < across; l++)
                    out[(i + k) * b_count + j + l] += sum[k][l];
        }
}

/* Return Σ a b over pixels. */
INTERNAL float sum_of_products(const float *a, const float *b, int64_t pixels)
{
    vec sum = {0};
    int64_t p = 0;
    for (; p + LANES <= pixels; p += LANES)
        sum += load(a + p) * load(b + p);
    float rest = 0;
    for (; p < pixels; p++)
        rest += a[p] * b[p];
    return sum_lanes(sum) + rest;
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
INTERNAL void dynamic(const float *filters, const struct row *rows, int64_t first, int64_t channels,
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

#endif
