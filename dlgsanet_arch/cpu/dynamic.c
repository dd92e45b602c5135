/* The dynamic convolution of ops/, its filters projected from hidden features, with its gradients.
 * The map of filters is never in memory: both passes make the filters of a block of pixels at a
 * time. ops/c_backend.py says what the tensors are. */
#include "common.h"

/* The projections of all groups, one behind the other. */
static struct matrix pack_groups(struct arena *arena, const float *weight, const float *bias,
                                 int64_t groups, int64_t taps, int64_t hidden)
{
    struct matrix first = pack(arena, weight, bias, taps, hidden);
    for (int64_t g = 1; g < groups; g++)
        pack(arena, weight + g * taps * hidden, bias + g * taps, taps, hidden);
    return first;
}

/* Read a row of all channels into a ring, columns `first` to `last` of a plane's row. */
static void read_ring(const struct ring *ring, int64_t y, const float *row, int64_t channel_stride,
                      int64_t first, int64_t last)
{
    float *to = ring_write(ring, y);
    for (int64_t c = 0; c < ring->channels; c++)
        memcpy(to + c * ring->stride, row + c * channel_stride + first,
               (last - first) * sizeof(float));
    ring_end(ring, y, last - first);
}

/* out = x filtered by project hidden + bias. */
EXPORT int projected_convolution(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *x = tensors[0], *features = tensors[1], *weight = tensors[2], *bias = tensors[3];
    float *out = tensors[4];
    struct grid grid = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    int64_t channels = sizes[5], hidden = sizes[6], groups = sizes[7], kernel = sizes[8];
    int64_t x_item = sizes[9], x_channel = sizes[10];
    int64_t features_item = sizes[11], features_channel = sizes[12];
    int64_t halo = kernel / 2, taps = kernel * kernel, shared = channels / groups;
    int64_t columns = least(grid.columns + 2 * halo, grid.width);

    struct arena arena;
    if (!open_arena(&arena, groups * matrix_floats(taps, hidden) +
                                ring_floats(kernel, channels, columns) +
                                (hidden + taps + shared) * BLOCK))
        return 1;
    struct matrix first = pack_groups(&arena, weight, bias, groups, taps, hidden);
    struct ring ring = take_ring(&arena, kernel, channels, columns);
    float *block = take(&arena, hidden * BLOCK), *filters = take(&arena, taps * BLOCK);
    float *result = take(&arena, shared * BLOCK);

    struct tile tile;
    while (take_tile(&grid, halo, next, &tile))
        for (int64_t y = tile.top - halo; y < tile.bottom + halo; y++) {
            if (y >= 0 && y < grid.height)
                read_ring(&ring, y, x + tile.item * x_item + y * grid.width, x_channel, tile.first,
                          tile.last);
            int64_t r = y - halo;
            if (r < tile.top)
                continue;
            struct row rows[LARGEST_KERNEL];
            for (int64_t i = 0; i < kernel; i++)
                rows[i] = ring_row(&ring, r - halo + i, grid.height);
            for (int64_t p = tile.left; p < tile.right; p += BLOCK) {
                int64_t pixels = least(BLOCK, tile.right - p), place = r * grid.width + p;
                read_block(features + tile.item * features_item + place, features_channel, hidden,
                           pixels, block);
                for (int64_t g = 0; g < groups; g++) {
                    struct matrix project = nth_matrix(first, g);
                    product(&project, block, BLOCK, filters, BLOCK, pixels);
                    dynamic(filters, rows, g * shared, shared, p - tile.first, kernel, result,
                            pixels);
                    float *to = out +
                                (tile.item * channels + g * shared) * grid.height * grid.width +
                                place;
                    for (int64_t c = 0; c < shared; c++, to += grid.height * grid.width)
                        memcpy(to, result + c * BLOCK, pixels * sizeof(float));
                }
            }
        }
    free(arena.block);
    return 0;
}

/* ------------------------------------------------------------------ gradients */

/* Zeros beside the filters of a block and beside a row of gradients: as many as the largest filter
 * reaches on both sides. A vector may begin beyond a block by as much. */
#define MARGIN (2 * LINE)
#define FILTER_STRIDE (BLOCK + 3 * MARGIN)

/* Run `statement` with N, a constant for the compiler, equal to `count` of 1 to OUTS channels. */
#define CHANNEL_CASE(number, statement)                                                            \
    case number: {                                                                                 \
        enum { N = number };                                                                       \
        statement;                                                                                 \
    } break;
#define WITH_CHANNELS(count, statement)                                                            \
    switch (count) {                                                                               \
        CHANNEL_CASE(1, statement)                                                                 \
        CHANNEL_CASE(2, statement)                                                                 \
        CHANNEL_CASE(3, statement)                                                                 \
        CHANNEL_CASE(4, statement)                                                                 \
        CHANNEL_CASE(5, statement)                                                                 \
        CHANNEL_CASE(6, statement)                                                                 \
    }

/* taps[i * K + j][p] += Σ grad[c][p] x[c][p + j] over some channels, for filter row i. */
ALWAYS_INLINE void tap_gradients(const float *grad, int64_t grad_stride, const float *x,
                                 int64_t x_stride, int64_t kernel, float *taps, int64_t pixels,
                                 const int channels)
{
    for (int64_t p = 0; p < pixels; p += LANES) {
        vec g[OUTS];
#pragma GCC unroll 8
        for (int c = 0; c < channels; c++)
            g[c] = load(grad + c * grad_stride + p);
        for (int64_t j = 0; j < kernel; j++) {
            vec sum = load(taps + j * BLOCK + p);
#pragma GCC unroll 8
            for (int c = 0; c < channels; c++)
                sum += g[c] * load(x + c * x_stride + p + j);
            store(taps + j * BLOCK + p, sum);
        }
    }
}

/* out[c][v] += Σ_j filters[j][v - j] grad[c][v - j]: what the taps of one filter row bring to a row
 * of the input. Gathered, for a store that the next load overlaps would stall. */
ALWAYS_INLINE void spread_vectors(const float *filters, const float *grad, int64_t grad_stride,
                                  float *out, int64_t out_stride, int64_t kernel,
                                  const int channels)
{
    vec sum[OUTS];
#pragma GCC unroll 8
    for (int c = 0; c < channels; c++)
        sum[c] = load(out + c * out_stride);
    for (int64_t j = 0; j < kernel; j++) {
        vec filter = load(filters + j * FILTER_STRIDE - j);
#pragma GCC unroll 8
        for (int c = 0; c < channels; c++)
            sum[c] += filter * load(grad + c * grad_stride - j);
    }
#pragma GCC unroll 8
    for (int c = 0; c < channels; c++)
        store(out + c * out_stride, sum[c]);
}

/* All that a thread keeps of a band of rows. */
struct band_state {
    int64_t channels, hidden, groups, kernel, width;
    struct matrix project;   /* of the first group */
    struct matrix transposed; /* (D, G K²) */
    struct ring x, grad_x;
    float *grad;     /* a row of all channels, MARGIN zeros before it */
    int64_t grad_stride;
    float *features; /* (D, BLOCK) */
    float *filters;  /* (K², FILTER_STRIDE), MARGIN zeros before each */
    float *taps;     /* (G K², BLOCK), the gradients of the filters */
    float *result;   /* (D, BLOCK) */
    vec *grad_weight, *grad_bias;
};

static int64_t band_state_floats(int64_t channels, int64_t hidden, int64_t groups, int64_t kernel,
                                 int64_t width)
{
    int64_t taps = kernel * kernel;
    return groups * matrix_floats(taps, hidden) + matrix_floats(hidden, groups * taps) +
           2 * ring_floats(kernel, channels, width + 2 * LINE) +
           up(channels * (up(width, LANES) + 3 * MARGIN), LINE) +
           (2 * hidden + groups * taps) * BLOCK + taps * FILTER_STRIDE +
           groups * taps * (hidden + 1) * LANES + 2 * LINE;
}

static struct band_state take_band_state(struct arena *arena, const float *weight,
                                         const float *bias, int64_t channels, int64_t hidden,
                                         int64_t groups, int64_t kernel, int64_t width)
{
    int64_t taps = kernel * kernel;
    struct band_state s = {
        .channels = channels, .hidden = hidden, .groups = groups, .kernel = kernel, .width = width};
    s.project = pack_groups(arena, weight, bias, groups, taps, hidden);
    s.transposed = pack_transposed(arena, weight, hidden, groups * taps);
    s.x = take_ring(arena, kernel, channels, width);
    /* Vectors begin up to K/2 before the image and end up to K/2 and a vector behind it. */
    s.grad_x = take_ring(arena, kernel, channels, width + 2 * LINE);
    s.grad_stride = up(width, LANES) + 3 * MARGIN;
    s.grad = take(arena, channels * s.grad_stride) + MARGIN;
    s.features = take(arena, hidden * BLOCK);
    s.result = take(arena, hidden * BLOCK);
    s.taps = take(arena, groups * taps * BLOCK);
    s.filters = take(arena, taps * FILTER_STRIDE) + MARGIN;
    s.grad_weight = (vec *)take(arena, groups * taps * hidden * LANES);
    s.grad_bias = (vec *)take(arena, groups * taps * LANES);
    return s;
}

/* Make the filters of a group for a block; beyond its pixels they are zeros. */
static void make_filters(const struct band_state *s, int64_t group, int64_t pixels)
{
    struct matrix project = nth_matrix(s->project, group);
    product(&project, s->features, BLOCK, s->filters, FILTER_STRIDE, pixels);
    if (pixels < BLOCK)
        for (int64_t t = 0; t < s->kernel * s->kernel; t++)
            memset(s->filters + t * FILTER_STRIDE + pixels, 0, (BLOCK - pixels) * sizeof(float));
}

/* Add what pixels `p` to `p + pixels` of row `r` bring to the rows of grad_x from `top` to `bottom`. */
static void spread(const struct band_state *s, int64_t group, int64_t r, int64_t top,
                   int64_t bottom, int64_t p, int64_t pixels)
{
    int64_t kernel = s->kernel, halo = kernel / 2, shared = s->channels / s->groups;
    for (int64_t i = 0; i < kernel; i++) {
        int64_t y = r + i - halo;
        if (y < top || y >= bottom)
            continue;
        float *out = ring_write(&s->grad_x, y) + group * shared * s->grad_x.stride + p - halo;
        const float *grad = s->grad + group * shared * s->grad_stride + p;
        for (int64_t c = 0; c < shared; c += OUTS)
            for (int64_t v = 0; v < pixels + 2 * halo; v += LANES)
                WITH_CHANNELS(least(OUTS, shared - c),
                              spread_vectors(s->filters + i * kernel * FILTER_STRIDE + v,
                                             grad + c * s->grad_stride + v, s->grad_stride,
                                             out + c * s->grad_x.stride + v, s->grad_x.stride,
                                             kernel, N))
    }
}

/* Set the gradients of a group's filters at row `r`. */
static void filter_gradients(const struct band_state *s, int64_t group, int64_t r, int64_t height,
                             int64_t p, int64_t pixels)
{
    int64_t kernel = s->kernel, shared = s->channels / s->groups;
    float *taps = s->taps + group * kernel * kernel * BLOCK;
    memset(taps, 0, kernel * kernel * BLOCK * sizeof(float));
    for (int64_t i = 0; i < kernel; i++, taps += kernel * BLOCK) {
        struct row row = ring_row(&s->x, r + i - kernel / 2, height);
        for (int64_t c = 0; c < shared; c += OUTS) {
            int64_t channel = group * shared + c;
            const float *grad = s->grad + channel * s->grad_stride + p;
            const float *x = row.data + channel * row.stride + p - kernel / 2;
            WITH_CHANNELS(least(OUTS, shared - c),
                          tap_gradients(grad, s->grad_stride, x, row.stride, kernel, taps, pixels,
                                        N))
        }
    }
}

/* Gradients of `projected_convolution`: of x and of the features, and for each slice those of weight
 * (G K², D) and bias (G K²). Rows around a band are looked at again for what they bring to grad_x. */
EXPORT int projected_backward(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *grad = tensors[0], *x = tensors[1], *features = tensors[2];
    const float *weight = tensors[3], *bias = tensors[4];
    float *grad_x = tensors[5], *grad_features = tensors[6], *parts = tensors[7];
    int64_t batch = sizes[0], height = sizes[1], width = sizes[2];
    int64_t channels = sizes[3], hidden = sizes[4], groups = sizes[5], kernel = sizes[6];
    int64_t x_item = sizes[7], x_channel = sizes[8];
    int64_t features_item = sizes[9], features_channel = sizes[10];
    int64_t grad_item = sizes[11], grad_channel = sizes[12];
    int64_t bands = sizes[13], slices = sizes[14]; /* bands of an image; slices of all bands */
    int64_t halo = kernel / 2, outs = groups * kernel * kernel, plane = height * width;

    struct arena arena;
    if (!open_arena(&arena, band_state_floats(channels, hidden, groups, kernel, width)))
        return 1;
    struct band_state s =
        take_band_state(&arena, weight, bias, channels, hidden, groups, kernel, width);

    for (int64_t slice; (slice = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < slices;) {
        memset(s.grad_weight, 0, outs * hidden * sizeof(vec));
        memset(s.grad_bias, 0, outs * sizeof(vec));
        int64_t pieces = batch * bands;
        for (int64_t i = pieces * slice / slices; i < pieces * (slice + 1) / slices; i++) {
            int64_t item = i / bands, band = i % bands;
            int64_t top = height * band / bands, bottom = height * (band + 1) / bands;
            memset(s.grad_x.rows, 0, kernel * channels * s.grad_x.stride * sizeof(float));
            for (int64_t y = top - halo; y < top + halo; y++)
                if (y >= 0 && y < height)
                    read_ring(&s.x, y, x + item * x_item + y * width, x_channel, 0, width);
            for (int64_t r = top - halo; r < bottom + halo; r++) {
                int inside = r >= top && r < bottom;
                if (inside && r + halo < height)
                    read_ring(&s.x, r + halo, x + item * x_item + (r + halo) * width, x_channel, 0,
                              width);
                if (r >= 0 && r < height) {
                    for (int64_t c = 0; c < channels; c++)
                        memcpy(s.grad + c * s.grad_stride,
                               grad + item * grad_item + c * grad_channel + r * width,
                               width * sizeof(float));
                    for (int64_t p = 0; p < width; p += BLOCK) {
                        int64_t pixels = least(BLOCK, width - p), place = r * width + p;
                        read_block(features + item * features_item + place, features_channel,
                                   hidden, pixels, s.features);
                        for (int64_t g = 0; g < groups; g++) {
                            make_filters(&s, g, pixels);
                            spread(&s, g, r, top, bottom, p, pixels);
                            if (inside)
                                filter_gradients(&s, g, r, height, p, pixels);
                        }
                        if (!inside)
                            continue;
                        product(&s.transposed, s.taps, BLOCK, s.result, BLOCK, pixels);
                        for (int64_t d = 0; d < hidden; d++)
                            memcpy(grad_features + (item * hidden + d) * plane + place,
                                   s.result + d * BLOCK, pixels * sizeof(float));
                        add_outer_lanes(s.taps, BLOCK, outs, s.features, BLOCK, hidden, pixels,
                                        s.grad_weight);
                        for (int64_t o = 0; o < outs; o++)
                            for (int64_t q = 0; q < pixels; q += LANES)
                                s.grad_bias[o] += load(s.taps + o * BLOCK + q);
                    }
                }
                int64_t done = r - halo; /* a row that no later one brings anything to */
                if (done < top || done >= bottom)
                    continue;
                float *row = ring_write(&s.grad_x, done);
                for (int64_t c = 0; c < channels; c++) {
                    memcpy(grad_x + (item * channels + c) * plane + done * width,
                           row + c * s.grad_x.stride, width * sizeof(float));
                    memset(row + c * s.grad_x.stride - LINE, 0,
                           s.grad_x.stride * sizeof(float));
                }
            }
        }
        float *part = parts + slice * outs * (hidden + 1);
        add_lanes(s.grad_weight, outs * hidden, part);
        add_lanes(s.grad_bias, outs, part + outs * hidden);
    }
    free(arena.block);
    return 0;
}
