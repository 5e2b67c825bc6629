/* Depthwise convolution: a channel at a time, its plane unpacked and padded in the scratch. */
#include <stddef.h>

#include "layers.h"
#include "requantize.h"

static inline int plane_words(const conv_t *layer)  /* of a row */
{
    return CEIL_DIV(layer->width + 2 * layer->pad_x, 2);
}

/* plane[height + 2 pad][plane_words] of one channel, two values a word. */
static void unpack_plane(const conv_t *layer, const uint8_t *in, pair_t *to)
{
    int words = plane_words(layer), step = layer->inputs, width = layer->width;
    pair_t zero = unsigned_even(layer->zero), flip = unsigned_even(layer->flip);
    for (int y = -layer->pad_y; y < layer->height + layer->pad_y; y++) {
        halfword_t *at = (halfword_t *)to;
        for (pair_t *end = to + words; to != end; to++) *to = zero;
        if (y < 0 || y >= layer->height) continue;
        at += layer->pad_x;
        for (int x = width / 2; x > 0; x--, in += 2 * step, at += 2)
            store_word(at, (in[0] | (uint32_t)in[step] << 16) ^ flip);
        if (width & 1) *at = (halfword_t)(*in ^ (flip & 255)), in += step;
    }
}

/* The planes of four channels, `plane` words apart. */
static void unpack_planes(const conv_t *layer, const uint8_t *in, pair_t *to, int plane)
{
    int words = plane_words(layer), step = layer->inputs, width = layer->width;
    uint32_t zero = layer->zero, flip = layer->flip;
    for (int y = -layer->pad_y; y < layer->height + layer->pad_y; y++) {
        int inside = y >= 0 && y < layer->height;
        const uint8_t *row = in + (y * width - layer->pad_x) * step;
        for (int x = -layer->pad_x, i = 0; i < words; i++, x += 2, row += 2 * step) {
            uint32_t a = zero, b = zero;
            if (inside && x >= 0 && x + 1 < width) {
                a = load_word(row) ^ flip, b = load_word(row + step) ^ flip;
            } else if (inside) {
                if (x >= 0 && x < width) a = load_word(row) ^ flip;
                if (x + 1 >= 0 && x + 1 < width) b = load_word(row + step) ^ flip;
            }
            pair_t even_a = unsigned_even(a), even_b = unsigned_even(b);
            pair_t odd_a = unsigned_odd(a), odd_b = unsigned_odd(b), *at = to++;
            *at = low_lanes(even_a, even_b), at += plane;
            *at = low_lanes(odd_a, odd_b), at += plane;
            *at = high_lanes(even_a, even_b), at += plane;
            *at = high_lanes(odd_a, odd_b);
        }
    }
}

/* Writes one value; `at` counts from the channel's first. */
static inline void put(const conv_t *layer, scale_t scale, int32_t sum, int at,
                       const uint8_t *residual, uint8_t *out)
{
    int32_t value = requantize(scale, sum);
    if (residual) value = add_bytes(layer->add, value, residual[at]);
    out[at] = (uint8_t)value;
}

/* A 3x3 filter, by rows (w0, w1) and (w1, w2). */
static void pack_filter(const int8_t *w, pair_t *to)
{
    for (int i = 0; i < 3; i++, w += 3) *to++ = make_pair(w[0], w[1]), *to++ = make_pair(w[1], w[2]);
}

/* Two outputs that stand side by side: of (p0 p1)(q0 q1) the sums over p0 p1 q0 and p1 q0 q1. */
static inline void two_of_3x3(const pair_t *a, const pair_t *b, const pair_t *c, const pair_t *f,
                              int32_t *first, int32_t *second)
{
    pair_t p, q, left, right;
#define ROW(row, i) \
    LOAD_TWO(p, q, row, 0); \
    LOAD_TWO(left, right, f, 2 * (i)); \
    *first = mac_low_high(q, right, mac_pairs(p, left, *first)); \
    *second = mac_high(p, (int32_t)left, mac_pairs(q, right, *second));
    ROW(a, 0) ROW(b, 1) ROW(c, 2)
#undef ROW
}

static inline int32_t one_of_3x3(const pair_t *a, const pair_t *b, const pair_t *c, const pair_t *f,
                                 int32_t sum)
{
    pair_t p, q, left, right;
#define ROW(row, i) \
    LOAD_TWO(p, q, row, 0); \
    LOAD_TWO(left, right, f, 2 * (i)); \
    sum = mac_low_high(q, right, mac_pairs(p, left, sum));
    ROW(a, 0) ROW(b, 1) ROW(c, 2)
#undef ROW
    return sum;
}

static void rows_of_3x3(const conv_t *layer, const pair_t *plane, const int8_t *weights,
                        scale_t scale, int32_t start, const uint8_t *residual, uint8_t *out)
{
    pair_t f[6];
    pack_filter(weights, f);
    int words = plane_words(layer), step = layer->outputs, width = layer->out_width;
    int pairs = layer->stride_x == 1 ? width / 2 : 0, next_row = layer->stride_y * words;
    for (int y = layer->out_height, at = 0; y > 0; y--, plane += next_row) {
        const pair_t *a = plane, *b = a + words, *c = b + words, *end = a + pairs;
        for (; a != end; a++, b++, c++) {
            int32_t first = start, second = start;
            two_of_3x3(a, b, c, f, &first, &second);
            put(layer, scale, first, at, residual, out), at += step;
            put(layer, scale, second, at, residual, out), at += step;
        }
        for (int x = 2 * pairs; x < width; x++, a++, b++, c++, at += step)
            put(layer, scale, one_of_3x3(a, b, c, f, start), at, residual, out);
    }
}

static void rows_of_any(const conv_t *layer, const pair_t *words, const int8_t *weights,
                        scale_t scale, int32_t start, const uint8_t *residual, uint8_t *out)
{
    int width = 2 * plane_words(layer), at = 0;
    const halfword_t *plane = (const halfword_t *)words;
    for (int y = 0; y < layer->out_height; y++) {
        for (int x = 0; x < layer->out_width; x++, at += layer->outputs) {
            const halfword_t *from = plane + y * layer->stride_y * width + x * layer->stride_x;
            const int8_t *w = weights;
            int32_t sum = start;
            for (int ky = 0; ky < layer->kernel_height; ky++, from += width)
                for (int kx = 0; kx < layer->kernel_width; kx++) sum += from[kx] * *w++;
            put(layer, scale, sum, at, residual, out);
        }
    }
}

void conv_depthwise(const conv_t *layer, const uint8_t *in, const uint8_t *residual, uint8_t *out,
                    void *scratch)
{
    int taps = layer->kernel_height * layer->kernel_width;
    int fast = layer->kernel_height == 3 && layer->kernel_width == 3 && layer->stride_x <= 2;
    int filters = layer->outputs / layer->inputs;  /* of a channel */
    int plane = plane_words(layer) * (layer->height + 2 * layer->pad_y), at_once = layer->block;
    const pair_t *planes = scratch;
    for (int o = 0; o < layer->outputs; o++) {
        int c = o / filters;
        if (o % filters == 0 && at_once == 1) unpack_plane(layer, in + c, scratch);
        if (at_once == 4 && o % 4 == 0) unpack_planes(layer, in + o, scratch, plane);
        (fast ? rows_of_3x3 : rows_of_any)(layer, planes + c % at_once * plane,
                                           layer->weights + o * taps,
                                           scale_of(&layer->requantize, o),
                                           offset_of(&layer->requantize, o),
                                           residual ? residual + o : NULL, out + o);
    }
}
