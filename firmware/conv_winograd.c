/* Dense 3x3 convolution by Winograd's F(2x2, 3x3): tiles of 4x4 inputs give 2x2 outputs. */
#include <stddef.h>

#include "layers.h"
#include "multiply.h"
#include "requantize.h"

static const int32_t ZEROS[8];

/* B^T d B of one 4x4 tile of channel pairs, element (i, j) to to[(4 * i + j) * step]. */
static inline void transform_tile(const pair_t *d, pair_t *to, int step)
{
    pair_t t[16];
    for (int j = 0; j < 4; j++) {
        t[j] = subtract_pairs(d[j], d[8 + j]);
        t[4 + j] = add_pairs(d[4 + j], d[8 + j]);
        t[8 + j] = subtract_pairs(d[8 + j], d[4 + j]);
        t[12 + j] = subtract_pairs(d[4 + j], d[12 + j]);
    }
    for (int i = 0; i < 16; i += 4, to += 4 * step) {
        to[0] = subtract_pairs(t[i], t[i + 2]);
        to[step] = add_pairs(t[i + 1], t[i + 2]);
        to[2 * step] = subtract_pairs(t[i + 2], t[i + 1]);
        to[3 * step] = subtract_pairs(t[i + 1], t[i + 3]);
    }
}

/* tiles[16][quads][inputs/2][4 tiles]; `pad` holds `inputs` bytes of the zero point, the padding. */
static void transform_tiles(const conv_t *layer, const uint8_t *in, const uint8_t *pad, int first,
                            int tiles, int per_row, pair_t *to)
{
    int c_count = layer->inputs;
    for (int tile = 0; tile < tiles; tile++) {
        const uint8_t *from[16];
        int tile_y = (first + tile) / per_row, tile_x = first + tile - tile_y * per_row;
        for (int i = 0; i < 16; i++) {
            int y = 2 * tile_y + i / 4 - layer->pad_y, x = 2 * tile_x + i % 4 - layer->pad_x;
            int inside = y >= 0 && y < layer->height && x >= 0 && x < layer->width;
            from[i] = inside ? in + (y * layer->width + x) * c_count : pad;
        }
        pair_t *quad = to + tile / 4 * c_count / 2 * 4 + tile % 4;
        for (int c = 0; c < c_count; c += 4, quad += 8) {
            pair_t even[16], odd[16];
            for (int i = 0; i < 16; i++) {
                uint32_t bytes = load_word(from[i] + c);
                even[i] = unsigned_even(bytes), odd[i] = unsigned_odd(bytes);
            }
            transform_tile(even, quad, layer->block * c_count / 2 * 4);
            transform_tile(odd, quad + 4, layer->block * c_count / 2 * 4);
        }
    }
}

/* One row of (2 G) t for the three columns a, b, c of t. */
static inline void transform_filter_row(pair_t a, pair_t b, pair_t c, pair_t *to, int step)
{
    pair_t outer = add_pairs(a, c);
    to[0] = add_pairs(a, a);
    to[step] = add_pairs(outer, b);
    to[2 * step] = subtract_pairs(outer, b);
    to[3 * step] = add_pairs(c, c);
}

/* (2 G) g (2 G)^T of one 3x3 filter of channel pairs: four times G g G^T, so an integer. */
static inline void transform_filter(const pair_t *g, pair_t *to, int step)
{
    pair_t a = add_pairs(g[0], g[6]), b = add_pairs(g[1], g[7]), c = add_pairs(g[2], g[8]);
    transform_filter_row(add_pairs(g[0], g[0]), add_pairs(g[1], g[1]), add_pairs(g[2], g[2]), to,
                         step);
    transform_filter_row(add_pairs(g[6], g[6]), add_pairs(g[7], g[7]), add_pairs(g[8], g[8]),
                         to + 12 * step, step);
    transform_filter_row(add_pairs(a, g[3]), add_pairs(b, g[4]), add_pairs(c, g[5]), to + 4 * step,
                         step);
    transform_filter_row(subtract_pairs(a, g[3]), subtract_pairs(b, g[4]), subtract_pairs(c, g[5]),
                         to + 8 * step, step);
}

/* filters[16][inputs/2][2 outputs] of the outputs o and o + 1. */
static void transform_filters(const conv_t *layer, int o, pair_t *to)
{
    int c_count = layer->inputs;
    const int8_t *from = layer->weights + o * 9 * c_count;
    for (int lane = 0; lane < 2; lane++) {
        pair_t *filter = to + lane;
        for (int c = 0; c < c_count; c += 4, from += 36, filter += 4) {
            pair_t even[9], odd[9];
            for (int i = 0; i < 9; i++) {
                uint32_t bytes = load_word(from + 4 * i);
                even[i] = signed_even(bytes), odd[i] = signed_odd(bytes);
            }
            transform_filter(even, filter, c_count);
            transform_filter(odd, filter + 2, c_count);
        }
    }
}

/* A^T m A / 4, the four outputs of a tile; m[16] lies 8 words apart. */
static inline void outputs_of_tile(const int32_t *m, int32_t *to)
{
    int32_t top[4], bottom[4];
    for (int j = 0; j < 4; j++) {
        int32_t a = m[8 * j], b = m[8 * (4 + j)], c = m[8 * (8 + j)], d = m[8 * (12 + j)];
        top[j] = a + b + c;
        bottom[j] = b - c - d;
    }
    to[0] = top[0] + top[1] + top[2], to[1] = top[1] - top[2] - top[3];
    to[2] = bottom[0] + bottom[1] + bottom[2], to[3] = bottom[1] - bottom[2] - bottom[3];
}

/* Writes one output channel of the 2x2 positions at `at`, those that `right` and `below` allow. */
static inline void put(const conv_t *layer, scale_t scale, const int32_t *m, int right, int below,
                       const uint8_t *residual, uint8_t *out)
{
    int32_t values[4];
    int step = layer->outputs, row = layer->out_width * step;
    outputs_of_tile(m, values);
    if (layer->pool) {
        *out = (uint8_t)requantize(scale, larger(larger(values[0], values[1]),
                                                 larger(values[2], values[3])) >> 2);
        return;
    }
    for (int i = 0; i < 4; i++) values[i] = requantize(scale, values[i] >> 2);
    if (residual) {
        const add_t add = *layer->add;
        values[0] = add_bytes(&add, values[0], residual[0]);
        if (right) values[1] = add_bytes(&add, values[1], residual[step]);
        if (below) values[2] = add_bytes(&add, values[2], residual[row]);
        if (right && below) values[3] = add_bytes(&add, values[3], residual[row + step]);
    }
    out[0] = (uint8_t)values[0];
    if (right) out[step] = (uint8_t)values[1];
    if (below) out[row] = (uint8_t)values[2];
    if (right && below) out[row + step] = (uint8_t)values[3];
}

void conv_winograd(const conv_t *layer, const uint8_t *in, const uint8_t *residual, uint8_t *out,
                   void *scratch)
{
    int c_count = layer->inputs, outputs = layer->outputs, pool = layer->pool;
    int height = layer->out_height, width = layer->out_width, quads = layer->block;
    int per_row = pool ? width / 2 : CEIL_DIV(width, 2);
    int total = (pool ? height / 2 : CEIL_DIV(height, 2)) * per_row;
    pair_t *tiles = scratch, *filters = tiles + 16 * quads * 4 * (c_count / 2);
    uint8_t *pad = (uint8_t *)(filters + 16 * c_count);
    for (int c = 0; c < c_count; c += 4) store_word(pad + c, layer->zero);
    for (int first = 0; first < total; first += 4 * quads) {
        int count = smaller(total - first, 4 * quads);
        transform_tiles(layer, in, pad, first, count, per_row, tiles);
        for (int o = 0; o < outputs; o += 2) {
            transform_filters(layer, o, filters);
            scale_t scale = scale_of(&layer->requantize, o);
            scale_t next = scale_of(&layer->requantize, o + 1);
            /* Element (1, 1) enters each of a tile's outputs once. */
            int32_t start = 4 * offset_of(&layer->requantize, o);
            int32_t next_start = 4 * offset_of(&layer->requantize, o + 1);
            for (int tile = 0; tile < count; tile += 4) {
                int32_t sums[16 * 8];  /* [16][2 outputs][4 tiles] */
                products_t products = {ZEROS, 4 * c_count, 0, sums, 0, 8 * c_count * (quads - 1), 16};
                multiply_2x4(filters, tiles + tile / 4 * (c_count / 2) * 4, &products);
                for (int i = 0; i < 4; i++) sums[8 * 5 + i] += start, sums[8 * 5 + 4 + i] += next_start;
                for (int lane = 0; lane < 4 && tile + lane < count; lane++) {
                    int at = first + tile + lane, right = 1, below = 1;
                    if (!pool) {
                        int y = at / per_row, x = at - y * per_row;
                        right = 2 * x + 1 < width, below = 2 * y + 1 < height;
                        at = 2 * (y * width + x);
                    }
                    at = at * outputs + o;
                    put(layer, scale, sums + lane, right, below, residual ? residual + at : NULL,
                        out + at);
                    put(layer, next, sums + 4 + lane, right, below,
                        residual ? residual + at + 1 : NULL, out + at + 1);
                }
            }
        }
    }
}
