/* Depthwise convolution: one channel at a time, its plane unpacked and padded in the scratch. */
#include <stddef.h>

#include "layers.h"
#include "requantize.h"

static inline int plane_width(const conv_t *layer)
{
    return (layer->width + 2 * layer->pad_x + 1) & ~1;  /* even: a row starts at a word */
}

/* plane[height + 2 pad][plane_width]: the values of one channel. */
static void unpack_plane(const conv_t *layer, const uint8_t *in, int16_t *to)
{
    int zero = layer->zero & 255, pad = layer->pad_x, step = layer->inputs;
    int width = plane_width(layer), inside = layer->width, flip = layer->flip & 255;
    for (int i = layer->pad_y * width; i > 0; i--) *to++ = (int16_t)zero;
    for (int y = 0; y < layer->height; y++) {
        for (int i = 0; i < pad; i++) *to++ = (int16_t)zero;
        for (int i = 0; i < inside; i++, in += step) *to++ = (int16_t)(*in ^ flip);
        for (int i = pad + inside; i < width; i++) *to++ = (int16_t)zero;
    }
    for (int i = layer->pad_y * width; i > 0; i--) *to++ = (int16_t)zero;
}

/* Writes one value; `at` counts from the channel's first. */
static inline void put(const conv_t *layer, scale_t scale, int32_t sum, int at,
                       const uint8_t *residual, uint8_t *out)
{
    int32_t value = requantize(scale, sum);
    if (residual) value = add_bytes(layer->add, value, residual[at]);
    out[at] = (uint8_t)value;
}

/* A 3x3 filter's rows as (w0, w1) and (w1, w2). */
typedef struct {
    pair_t left[3], right[3];
} filter_t;

static inline filter_t filter_of(const int8_t *w)
{
    filter_t f;
    for (int i = 0; i < 3; i++) {
        f.left[i] = make_pair(w[3 * i], w[3 * i + 1]);
        f.right[i] = make_pair(w[3 * i + 1], w[3 * i + 2]);
    }
    return f;
}

static void rows_of_3x3(const conv_t *layer, const int16_t *plane, const int8_t *weights,
                        scale_t scale, int32_t start, const uint8_t *residual, uint8_t *out)
{
    const filter_t f = filter_of(weights);
    int words = plane_width(layer) / 2, step = layer->outputs, width = layer->out_width;
    for (int y = 0, at = 0; y < layer->out_height; y++) {
        const pair_t *a = (const pair_t *)plane + y * layer->stride_y * words;
        const pair_t *b = a + words, *c = b + words;
        pair_t a0 = *a++, b0 = *b++, c0 = *c++;
        if (layer->stride_x == 2) {
            for (int x = 0; x < width; x++, at += step) {
                pair_t a1 = *a++, b1 = *b++, c1 = *c++;
                int32_t sum = mac_low_high(a1, f.right[0], mac_pairs(a0, f.left[0], start));
                sum = mac_low_high(b1, f.right[1], mac_pairs(b0, f.left[1], sum));
                sum = mac_low_high(c1, f.right[2], mac_pairs(c0, f.left[2], sum));
                put(layer, scale, sum, at, residual, out);
                a0 = a1, b0 = b1, c0 = c1;
            }
            continue;
        }
        for (int x = 0; x < width; x += 2, at += step) {
            pair_t a1 = *a++, b1 = *b++, c1 = *c++;
            int32_t sum = mac_low_high(a1, f.right[0], mac_pairs(a0, f.left[0], start));
            int32_t next = mac_high(a0, (int32_t)f.left[0], mac_pairs(a1, f.right[0], start));
            sum = mac_low_high(b1, f.right[1], mac_pairs(b0, f.left[1], sum));
            next = mac_high(b0, (int32_t)f.left[1], mac_pairs(b1, f.right[1], next));
            sum = mac_low_high(c1, f.right[2], mac_pairs(c0, f.left[2], sum));
            next = mac_high(c0, (int32_t)f.left[2], mac_pairs(c1, f.right[2], next));
            put(layer, scale, sum, at, residual, out);
            if (x + 1 < width) put(layer, scale, next, at += step, residual, out);
            a0 = a1, b0 = b1, c0 = c1;
        }
    }
}

static void rows_of_any(const conv_t *layer, const int16_t *plane, const int8_t *weights,
                        scale_t scale, int32_t start, const uint8_t *residual, uint8_t *out)
{
    int width = plane_width(layer), at = 0;
    for (int y = 0; y < layer->out_height; y++) {
        for (int x = 0; x < layer->out_width; x++, at += layer->outputs) {
            const int16_t *from = plane + y * layer->stride_y * width + x * layer->stride_x;
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
    for (int o = 0; o < layer->outputs; o++) {
        if (o % filters == 0) unpack_plane(layer, in + o / filters, scratch);
        (fast ? rows_of_3x3 : rows_of_any)(layer, scratch, layer->weights + o * taps,
                                           scale_of(&layer->requantize, o),
                                           offset_of(&layer->requantize, o),
                                           residual ? residual + o : NULL, out + o);
    }
}
