/* The operators of ops/ with their gradients. ops/c_backend.py says what the tensors are.
 *
 * A gradient of a weight is a sum over all images and pixels. It is taken over slices, which depend
 * on shapes alone and not on the number of threads; each slice has sums of its own, in a fixed order,
 * and `add_slices` adds these. */
#include "common.h"

static int64_t take_piece(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

/* out[i] = Σ parts[s][i] over the slices. */
EXPORT int add_slices(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *parts = tensors[0];
    float *out = tensors[1];
    int64_t slices = sizes[0], count = sizes[1];
    int64_t piece, most = (count + PIECE - 1) / PIECE;
    while ((piece = take_piece(next)) < most)
        for (int64_t i = piece * PIECE; i < least(count, (piece + 1) * PIECE); i++) {
            float sum = 0;
            for (int64_t s = 0; s < slices; s++)
                sum += parts[s * count + i];
            out[i] = sum;
        }
    return 0;
}

/* ------------------------------------------------------------------ 1x1 convolution */

static void write_rows(const float *rows, int64_t stride, int64_t channels, int64_t pixels,
                       float *plane, int64_t plane_stride)
{
    for (int64_t c = 0; c < channels; c++, rows += stride, plane += plane_stride)
        memcpy(plane, rows, pixels * sizeof(float));
}

/* out = weight x + bias, x standardised over its channels where `normalise` is set. */
EXPORT int pointwise(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *x = tensors[0], *weight = tensors[1], *bias = tensors[2];
    float *out = tensors[3];
    int64_t batch = sizes[0], plane = sizes[1], channels = sizes[2], outs = sizes[3];
    int64_t x_item = sizes[4], x_channel = sizes[5], normalise = sizes[6];
    int64_t span = 16 * BLOCK, spans = (plane + span - 1) / span;

    struct arena arena;
    if (!open_arena(&arena, matrix_floats(outs, channels) + (channels + OUTS) * BLOCK))
        return 1;
    struct matrix matrix = pack(&arena, weight, bias, outs, channels);
    float *block = take(&arena, channels * BLOCK), *result = take(&arena, OUTS * BLOCK);
    float scale[BLOCK];

    for (int64_t piece; (piece = take_piece(next)) < batch * spans;) {
        int64_t item = piece / spans, start = piece % spans * span;
        for (int64_t p = start; p < least(start + span, plane); p += BLOCK) {
            int64_t pixels = least(BLOCK, plane - p);
            read_block(x + item * x_item + p, x_channel, channels, pixels, block);
            if (normalise)
                standardise(block, BLOCK, channels, pixels, scale);
            for (int64_t o = 0; o < outs; o += OUTS) {
                int64_t place = (item * outs + o) * plane + p, rows = least(OUTS, outs - o);
                product_rows(&matrix, o, block, BLOCK, result, BLOCK, pixels);
                write_rows(result, BLOCK, rows, pixels, out + place, plane);
            }
        }
    }
    free(arena.block);
    return 0;
}

/* Copy `pixels` pixels of all channels to rows `stride` apart, zeros up to whole vectors. */
static void read_rows(const float *plane, int64_t plane_stride, int64_t channels, int64_t pixels,
                      float *rows, int64_t stride)
{
    for (int64_t c = 0; c < channels; c++, plane += plane_stride, rows += stride) {
        memcpy(rows, plane, pixels * sizeof(float));
        for (int64_t p = pixels; p < up(pixels, LANES); p++)
            rows[p] = 0;
    }
}

/* Turn gradients of standardised pixels into those of the pixels, in place: with `mean` over the
 * channels, scale * (grad - mean(grad) - x * mean(grad * x)), x being the standardised pixels. */
static void standardise_backward(float *grad, const float *x, int64_t stride, int64_t channels,
                                 int64_t pixels, const float *scale)
{
    float mean[PIECE], slope[PIECE];
    int64_t lanes = up(pixels, LANES);
    for (int64_t p = 0; p < lanes; p++)
        mean[p] = slope[p] = 0;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < lanes; p++) {
            mean[p] += grad[c * stride + p];
            slope[p] += grad[c * stride + p] * x[c * stride + p];
        }
    for (int64_t p = 0; p < lanes; p++) {
        mean[p] /= channels;
        slope[p] /= channels;
    }
    for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < lanes; p++)
            grad[c * stride + p] =
                scale[p] * (grad[c * stride + p] - mean[p] - x[c * stride + p] * slope[p]);
}

/* Gradients of `pointwise`: grad_x, and for each slice those of weight (O, D) and bias (O). */
EXPORT int pointwise_backward(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *grad = tensors[0], *x = tensors[1], *weight = tensors[2];
    float *grad_x = tensors[3], *parts = tensors[4];
    int64_t plane = sizes[1], channels = sizes[2], outs = sizes[3];
    int64_t x_item = sizes[4], x_channel = sizes[5], normalise = sizes[6];
    int64_t grad_item = sizes[7], grad_channel = sizes[8], slices = sizes[9];
    /* Rows of a piece in L2; its stride is no power of two, which would share the cache's sets. */
    int64_t size = outs + 2 * channels > 400 ? PIECE / 2 : PIECE, stride = size + LINE;
    int64_t spans = (plane + size - 1) / size, pieces = sizes[0] * spans;

    struct arena arena;
    if (!open_arena(&arena, matrix_floats(channels, outs) + (outs + 2 * channels) * stride))
        return 1;
    struct matrix transposed = pack_transposed(&arena, weight, channels, outs);
    float *grads = take(&arena, outs * stride), *rows = take(&arena, channels * stride);
    float *result = take(&arena, channels * stride), scale[PIECE];

    for (int64_t slice; (slice = take_piece(next)) < slices;) {
        float *grad_weight = parts + slice * outs * (channels + 1);
        float *grad_bias = grad_weight + outs * channels;
        memset(grad_weight, 0, outs * (channels + 1) * sizeof(float));
        for (int64_t i = pieces * slice / slices; i < pieces * (slice + 1) / slices; i++) {
            int64_t item = i / spans, p = i % spans * size, pixels = least(size, plane - p);
            read_rows(grad + item * grad_item + p, grad_channel, outs, pixels, grads, stride);
            read_rows(x + item * x_item + p, x_channel, channels, pixels, rows, stride);
            if (normalise)
                standardise(rows, stride, channels, pixels, scale);
            product(&transposed, grads, stride, result, stride, pixels);
            if (normalise)
                standardise_backward(result, rows, stride, channels, pixels, scale);
            write_rows(result, stride, channels, pixels, grad_x + item * channels * plane + p,
                       plane);
            add_outer(grads, stride, outs, rows, stride, channels, pixels, grad_weight);
            for (int64_t o = 0; o < outs; o++) {
                vec sum = {0};
                for (int64_t q = 0; q < pixels; q += LANES)
                    sum += load(grads + o * stride + q);
                grad_bias[o] += sum_lanes(sum);
            }
        }
    }
    free(arena.block);
    return 0;
}

/* ------------------------------------------------------------------ depthwise convolution */

/* Some rows of a channel with zeros around the image. */
struct band {
    float *data; /* the first row, its first column */
    int64_t stride;
};

static struct band take_band(struct arena *arena, int64_t rows, int64_t width)
{
    struct band band = {.stride = ring_stride(width)};
    band.data = take(arena, rows * band.stride) + LINE;
    return band;
}

static int64_t band_floats(int64_t rows, int64_t width)
{
    return up(rows * ring_stride(width), LINE);
}

/* Rows of a band, so that some bands stay in L1. */
static int64_t band_rows(int64_t height, int64_t width)
{
    return least(height, most(4, 2048 / ring_stride(width)));
}

/* Read rows `top` to `bottom` of a plane, zeros where there are none. */
static void read_band(const struct band *band, const float *plane, int64_t top, int64_t bottom,
                      int64_t height, int64_t width)
{
    float *row = band->data;
    for (int64_t y = top; y < bottom; y++, row += band->stride) {
        if (y < 0 || y >= height)
            memset(row, 0, width * sizeof(float));
        else
            memcpy(row, plane + y * width, width * sizeof(float));
    }
}

/* Filter the row of a band whose neighbourhood begins at row `y`, whole vectors. */
static void filter_row(const struct band *band, int64_t y, const float *weight, float bias,
                       int64_t kernel, float *out, int64_t width)
{
    struct row rows[LARGEST_KERNEL];
    for (int64_t i = 0; i < kernel; i++)
        rows[i] = (struct row){band->data + (y + i) * band->stride, 0};
    switch (kernel) {
    case 3:
        depthwise(rows, 0, 0, weight, bias, 3, out, width);
        break;
    case 7:
        depthwise(rows, 0, 0, weight, bias, 7, out, width);
        break;
    default:
        depthwise(rows, 0, 0, weight, bias, kernel, out, width);
    }
}

/* Add to sums[i * kernel + j], for `down` filter rows and `across` taps, the products of `count`
 * rows of `grad` with the rows of `x` that these taps see. */
ALWAYS_INLINE void correlate_taps(const float *grad, int64_t grad_stride, const float *x,
                                  int64_t x_stride, int64_t count, int64_t width, int64_t kernel,
                                  vec *sums, const int down, const int across)
{
    vec total[9];
#pragma GCC unroll 9
    for (int t = 0; t < down * across; t++)
        total[t] = everywhere(0);
    for (int64_t y = 0; y < count; y++, grad += grad_stride, x += x_stride)
        for (int64_t p = 0; p < width; p += LANES) {
            vec g = load(grad + p);
#pragma GCC unroll 3
            for (int i = 0; i < down; i++)
#pragma GCC unroll 9
                for (int j = 0; j < across; j++)
                    total[i * across + j] += g * load(x + i * x_stride + p + j);
        }
#pragma GCC unroll 3
    for (int i = 0; i < down; i++)
#pragma GCC unroll 9
        for (int j = 0; j < across; j++)
            sums[i * kernel + j] += total[i * across + j];
}

/* Add the gradient of a filter: `count` rows of grad, from row `y` of its band on, and of x those
 * whose neighbourhoods begin at row `top` of its band. Grad has zeros beside the image. */
static void correlate(const struct band *grad, int64_t y, const struct band *x, int64_t top,
                      int64_t count, int64_t width, int64_t kernel, vec *sums)
{
    const float *from = grad->data + y * grad->stride;
    const float *seen = x->data + top * x->stride - kernel / 2;
    if (kernel == 3) {
        correlate_taps(from, grad->stride, seen, x->stride, count, width, 3, sums, 3, 3);
        return;
    }
    for (int64_t i = 0; i < kernel; i++, seen += x->stride)
        for (int64_t j = 0; j < kernel; j += 7) {
            vec *row = sums + i * kernel + j;
#define CASE(taps)                                                                                 \
    case taps:                                                                                     \
        correlate_taps(from, grad->stride, seen + j, x->stride, count, width, kernel, row, 1,      \
                       taps);                                                                      \
        break;
            switch (least(7, kernel - j)) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
            }
#undef CASE
        }
}

static float *take_vectors(struct arena *arena, int64_t count) { return take(arena, count * LANES); }

static void turn(const float *weight, int64_t taps, float *turned)
{
    for (int64_t t = 0; t < taps; t++)
        turned[t] = weight[taps - 1 - t];
}

/* out = the depthwise convolution of x with a border of zeros; `bias` may be missing. */
EXPORT int depthwise_convolution(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *x = tensors[0], *weight = tensors[1], *bias = tensors[2];
    float *out = tensors[3];
    int64_t batch = sizes[0], channels = sizes[1], height = sizes[2], width = sizes[3];
    int64_t kernel = sizes[4], x_item = sizes[5], x_channel = sizes[6];
    int64_t halo = kernel / 2, rows = band_rows(height, width);

    struct arena arena;
    if (!open_arena(&arena, band_floats(rows + 2 * halo, width) + up(width, LANES) + LINE))
        return 1;
    struct band band = take_band(&arena, rows + 2 * halo, width);
    float *result = take(&arena, up(width, LANES));

    for (int64_t piece; (piece = take_piece(next)) < batch * channels;) {
        int64_t item = piece / channels, c = piece % channels;
        const float *from = x + item * x_item + c * x_channel;
        float *to = out + piece * height * width;
        for (int64_t top = 0; top < height; top += rows) {
            int64_t bottom = least(height, top + rows);
            read_band(&band, from, top - halo, bottom + halo, height, width);
            for (int64_t y = top; y < bottom; y++) {
                filter_row(&band, y - top, weight + c * kernel * kernel, bias ? bias[c] : 0, kernel,
                           result, width);
                memcpy(to + y * width, result, width * sizeof(float));
            }
        }
    }
    free(arena.block);
    return 0;
}

/* Gradients of `depthwise_convolution`: of x, of weight (C, K²), and of bias (C) if it is given. A
 * thread takes whole channels, so that no sum is shared. */
EXPORT int depthwise_backward(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *grad = tensors[0], *x = tensors[1], *weight = tensors[2];
    float *grad_x = tensors[3], *grad_weight = tensors[4], *grad_bias = tensors[5];
    int64_t batch = sizes[0], channels = sizes[1], height = sizes[2], width = sizes[3];
    int64_t kernel = sizes[4], x_item = sizes[5], x_channel = sizes[6];
    int64_t grad_item = sizes[7], grad_channel = sizes[8];
    int64_t halo = kernel / 2, rows = band_rows(height, width), taps = kernel * kernel;

    struct arena arena;
    if (!open_arena(&arena, 2 * band_floats(rows + 2 * halo, width) + up(width, LANES) + 2 * LINE +
                                up(taps, LINE) + taps * LANES))
        return 1;
    struct band seen = take_band(&arena, rows + 2 * halo, width);
    struct band arriving = take_band(&arena, rows + 2 * halo, width);
    float *result = take(&arena, up(width, LANES)), *turned = take(&arena, taps);
    vec *sums = (vec *)take_vectors(&arena, taps);

    for (int64_t c; (c = take_piece(next)) < channels;) {
        turn(weight + c * taps, taps, turned);
        memset(sums, 0, taps * sizeof(vec));
        vec total = {0};
        for (int64_t item = 0; item < batch; item++) {
            float *to = grad_x + (item * channels + c) * height * width;
            for (int64_t top = 0; top < height; top += rows) {
                int64_t bottom = least(height, top + rows);
                read_band(&seen, x + item * x_item + c * x_channel, top - halo, bottom + halo,
                          height, width);
                read_band(&arriving, grad + item * grad_item + c * grad_channel, top - halo,
                          bottom + halo, height, width);
                correlate(&arriving, halo, &seen, 0, bottom - top, width, kernel, sums);
                for (int64_t y = top; y < bottom; y++) {
                    filter_row(&arriving, y - top, turned, 0, kernel, result, width);
                    memcpy(to + y * width, result, width * sizeof(float));
                    const float *row = arriving.data + (y - top + halo) * arriving.stride;
                    for (int64_t p = 0; p < width; p += LANES)
                        total += load(row + p);
                }
            }
        }
        add_lanes(sums, taps, grad_weight + c * taps);
        if (grad_bias)
            grad_bias[c] = sum_lanes(total);
    }
    free(arena.block);
    return 0;
}

/* ------------------------------------------------------------------ GDFN's gate */

/* out = gelu(a) b, (a, b) = the depthwise convolution of x. */
EXPORT int gated_convolution(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *x = tensors[0], *weight = tensors[1];
    float *out = tensors[2];
    int64_t batch = sizes[0], hidden = sizes[1], height = sizes[2], width = sizes[3];
    int64_t kernel = sizes[4], x_item = sizes[5], x_channel = sizes[6];
    int64_t halo = kernel / 2, rows = band_rows(height, width), taps = kernel * kernel;

    struct arena arena;
    if (!open_arena(&arena,
                    2 * band_floats(rows + 2 * halo, width) + 2 * (up(width, LANES) + LINE)))
        return 1;
    struct band band = take_band(&arena, rows + 2 * halo, width);
    float *a = take(&arena, up(width, LANES)), *b = take(&arena, up(width, LANES));
    struct band other = take_band(&arena, rows + 2 * halo, width);

    for (int64_t piece; (piece = take_piece(next)) < batch * hidden;) {
        int64_t item = piece / hidden, k = piece % hidden;
        const float *from = x + item * x_item + k * x_channel;
        float *to = out + piece * height * width;
        for (int64_t top = 0; top < height; top += rows) {
            int64_t bottom = least(height, top + rows);
            read_band(&band, from, top - halo, bottom + halo, height, width);
            read_band(&other, from + hidden * x_channel, top - halo, bottom + halo, height, width);
            for (int64_t y = top; y < bottom; y++) {
                filter_row(&band, y - top, weight + k * taps, 0, kernel, a, width);
                filter_row(&other, y - top, weight + (hidden + k) * taps, 0, kernel, b, width);
                gate(a, b, up(width, LANES));
                memcpy(to + y * width, a, width * sizeof(float));
            }
        }
    }
    free(arena.block);
    return 0;
}

/* Return a φ(a), φ the normal density: a times a polynomial in a², fitted as that of Φ in common.h,
 * over |a| <= 5.7, beyond which a φ(a) is within 3e-7 of 0. */
ALWAYS_INLINE float normal_slope(float a)
{
    static const float terms[] = {
        0.000118407908f, -0.000961120066f, 0.00390452682f, -0.0106026186f, 0.0215052031f,
        -0.0344996266f,  0.0469017923f,    -0.057160724f,  0.0572584607f,  -0.042549435f,
        0.0362195298f,   -0.0440018773f,   0.0278234314f,  0.00120022125f, 0.00051002024f,
        -0.0108958995f,  0.00522978045f,
    };
    float clipped = a < -5.7f ? -5.7f : a;
    clipped = clipped > 5.7f ? 5.7f : clipped;
    float u = clipped * clipped * (2 / (5.7f * 5.7f)) - 1;
    float sum = terms[16];
#pragma GCC unroll 16
    for (int i = 15; i >= 0; i--)
        sum = sum * u + terms[i];
    return sum * clipped;
}

/* Turn a and b into the gradients of a and b: grad b gelu'(a) and grad gelu(a), with
 * gelu'(a) = Φ(a) + a φ(a). */
static void gate_backward(const float *restrict grad, float *restrict a, float *restrict b,
                          int64_t lanes)
{
    for (int64_t p = 0; p < lanes; p++) {
        float value = a[p], below = normal_distribution(value);
        a[p] = grad[p] * b[p] * (below + normal_slope(value));
        b[p] = grad[p] * value * below;
    }
}

/* Gradients of `gated_convolution`, of x and of weight (2e, K²). A thread takes whole pairs of
 * channels; a and b are computed again, also in the rows around a band that its gradients see. */
EXPORT int gated_backward(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *grad = tensors[0], *x = tensors[1], *weight = tensors[2];
    float *grad_x = tensors[3], *grad_weight = tensors[4];
    int64_t batch = sizes[0], hidden = sizes[1], height = sizes[2], width = sizes[3];
    int64_t kernel = sizes[4], x_item = sizes[5], x_channel = sizes[6];
    int64_t grad_item = sizes[7], grad_channel = sizes[8];
    int64_t halo = kernel / 2, taps = kernel * kernel, plane = height * width;
    /* Twice as tall as others, for more is computed around a band. */
    int64_t rows = least(height, 2 * band_rows(height, width));

    struct arena arena;
    if (!open_arena(&arena, 2 * band_floats(rows + 4 * halo, width) +
                                2 * band_floats(rows + 2 * halo, width) +
                                2 * (up(width, LANES) + LINE) + 2 * (up(taps, LINE) + taps * LANES)))
        return 1;
    struct band seen[2], arriving[2];
    float *turned[2];
    vec *sums[2];
    for (int half = 0; half < 2; half++) {
        seen[half] = take_band(&arena, rows + 4 * halo, width);
        arriving[half] = take_band(&arena, rows + 2 * halo, width);
        turned[half] = take(&arena, taps);
        sums[half] = (vec *)take_vectors(&arena, taps);
    }
    float *given = take(&arena, up(width, LANES)), *result = take(&arena, up(width, LANES));

    for (int64_t k; (k = take_piece(next)) < hidden;) {
        for (int half = 0; half < 2; half++) {
            turn(weight + (k + half * hidden) * taps, taps, turned[half]);
            memset(sums[half], 0, taps * sizeof(vec));
        }
        for (int64_t item = 0; item < batch; item++)
            for (int64_t top = 0; top < height; top += rows) {
                int64_t bottom = least(height, top + rows);
                for (int half = 0; half < 2; half++)
                    read_band(&seen[half], x + item * x_item + (k + half * hidden) * x_channel,
                              top - 2 * halo, bottom + 2 * halo, height, width);
                for (int64_t y = top - halo; y < bottom + halo; y++) {
                    int64_t row = y - top + halo;
                    float *a = arriving[0].data + row * arriving[0].stride;
                    float *b = arriving[1].data + row * arriving[1].stride;
                    if (y < 0 || y >= height) { /* beyond the width, an image may leave NaN */
                        memset(a, 0, up(width, LANES) * sizeof(float));
                        memset(b, 0, up(width, LANES) * sizeof(float));
                        continue;
                    }
                    /* Zeros beyond the width make the gradients beyond it zeros. */
                    memcpy(given, grad + item * grad_item + k * grad_channel + y * width,
                           width * sizeof(float));
                    filter_row(&seen[0], row, weight + k * taps, 0, kernel, a, width);
                    filter_row(&seen[1], row, weight + (hidden + k) * taps, 0, kernel, b, width);
                    gate_backward(given, a, b, up(width, LANES));
                }
                for (int half = 0; half < 2; half++) {
                    float *to = grad_x + ((item * 2 + half) * hidden + k) * plane;
                    correlate(&arriving[half], halo, &seen[half], halo, bottom - top, width, kernel,
                              sums[half]);
                    for (int64_t y = top; y < bottom; y++) {
                        filter_row(&arriving[half], y - top, turned[half], 0, kernel, result, width);
                        memcpy(to + y * width, result, width * sizeof(float));
                    }
                }
            }
        for (int half = 0; half < 2; half++)
            add_lanes(sums[half], taps, grad_weight + (k + half * hidden) * taps);
    }
    free(arena.block);
    return 0;
}

/* ------------------------------------------------------------------ attention over channels */

/* For each item and head, out (c, c) = Σ a[i] b[j] over all pixels and, where `squares` is given,
 * Σ a² and Σ b² of each channel, those of b C behind those of a. A thread takes whole heads. */
EXPORT int head_products(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *a = tensors[0], *b = tensors[1];
    float *out = tensors[2], *squares = tensors[3];
    int64_t batch = sizes[0], plane = sizes[1], heads = sizes[2], share = sizes[3];
    int64_t a_item = sizes[4], a_channel = sizes[5], b_item = sizes[6], b_channel = sizes[7];
    int64_t channels = heads * share, stride = PIECE + LINE;

    struct arena arena;
    if (!open_arena(&arena, 2 * share * stride))
        return 1;
    float *left = take(&arena, share * stride), *right = take(&arena, share * stride);

    for (int64_t piece; (piece = take_piece(next)) < batch * heads;) {
        int64_t item = piece / heads, first = piece % heads * share;
        float *product = out + piece * share * share;
        float *square = squares ? squares + item * 2 * channels + first : NULL;
        memset(product, 0, share * share * sizeof(float));
        for (int64_t c = 0; squares && c < share; c++)
            square[c] = square[channels + c] = 0;
        for (int64_t p = 0; p < plane; p += PIECE) {
            int64_t pixels = least(PIECE, plane - p);
            read_rows(a + item * a_item + first * a_channel + p, a_channel, share, pixels, left,
                      stride);
            read_rows(b + item * b_item + first * b_channel + p, b_channel, share, pixels, right,
                      stride);
            add_outer(left, stride, share, right, stride, share, pixels, product);
            for (int64_t c = 0; squares && c < share; c++) {
                square[c] += sum_of_products(left + c * stride, left + c * stride, pixels);
                square[channels + c] +=
                    sum_of_products(right + c * stride, right + c * stride, pixels);
            }
        }
    }
    free(arena.block);
    return 0;
}

/* For each item and head, out = matrix x, the rows of x being the head's channels of one or two maps
 * that lie one behind the other (q and k), and so those of out. */
EXPORT int head_apply(float *const *tensors, const int64_t *sizes, int64_t *next)
{
    const float *x = tensors[0], *matrices = tensors[1];
    float *out = tensors[2];
    int64_t batch = sizes[0], plane = sizes[1], heads = sizes[2], share = sizes[3];
    int64_t maps = sizes[4], x_item = sizes[5], x_channel = sizes[6];
    int64_t out_item = sizes[7], out_channel = sizes[8];
    int64_t rows = maps * share, channels = heads * share;

    struct arena arena;
    if (!open_arena(&arena, matrix_floats(rows, rows) + 2 * rows * BLOCK))
        return 1;
    struct matrix matrix = take_matrix(&arena, rows, rows);
    float *block = take(&arena, rows * BLOCK), *result = take(&arena, rows * BLOCK);

    for (int64_t piece; (piece = take_piece(next)) < batch * heads;) {
        int64_t item = piece / heads, first = piece % heads * share;
        fill_matrix(&matrix, matrices + piece * rows * rows, rows, 1, NULL);
        for (int64_t p = 0; p < plane; p += BLOCK) {
            int64_t pixels = least(BLOCK, plane - p);
            for (int64_t m = 0; m < maps; m++)
                read_block(x + item * x_item + (m * channels + first) * x_channel + p, x_channel,
                           share, pixels, block + m * share * BLOCK);
            product(&matrix, block, BLOCK, result, BLOCK, pixels);
            for (int64_t m = 0; m < maps; m++)
                write_rows(result + m * share * BLOCK, BLOCK, share, pixels,
                           out + item * out_item + (m * channels + first) * out_channel + p,
                           out_channel);
        }
    }
    free(arena.block);
    return 0;
}
