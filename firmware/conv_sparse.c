/* Convolution of any shape by its non-zero weights alone, eight positions a weight.
 *
 * Scratch: band[inputs][rows][stride_x][columns], the zero-point-padded input under two rows of
 * outputs. A word holds the values of an output position of the left half of a row (low lane) and of
 * the one `half` positions to its right; the columns of one phase of the stride stand side by side, so
 * that four words are four positions. (channel, ky, kx) lies at
 * ((channel * rows + ky) * stride_x + kx % stride_x) * columns + kx / stride_x.
 */
#include <stddef.h>

#include "layers.h"
#include "requantize.h"

/* Positions of half a row of outputs, in groups of four. */
static inline int half_of(const conv_t *layer) { return CEIL_DIV(CEIL_DIV(layer->out_width, 2), 4) * 4; }

static inline int columns_of(const conv_t *layer)
{
    return half_of(layer) + (layer->kernel_width - 1) / layer->stride_x;
}

static inline int rows_of(const conv_t *layer) { return layer->kernel_height + layer->stride_y; }

static __attribute__((noinline)) void pack_band(const conv_t *layer, const uint8_t *in, int out_row, pair_t *band)
{
    int c_count = layer->inputs, columns = columns_of(layer), step = layer->stride_x;
    int plane = rows_of(layer) * step * columns, half = half_of(layer);
    int whole = c_count & ~3, line = layer->width * c_count;
    int top = out_row * layer->stride_y - layer->pad_y;
    for (int row = 0; row < rows_of(layer); row++) {
        int y = top + row, inside = y >= 0 && y < layer->height;
        const uint8_t *from = in + y * line;
        for (int phase = 0; phase < step; phase++) {
            int left = phase - layer->pad_x, right = left + half * step;
            for (int column = 0; column < columns; column++, left += step, right += step) {
                const uint8_t *a = inside && left >= 0 && left < layer->width
                                       ? from + left * c_count : NULL;
                const uint8_t *b = inside && right >= 0 && right < layer->width
                                       ? from + right * c_count : NULL;
                pair_t *to = band++;
                for (int c = 0; c < whole; c += 4) {
                    uint32_t wa = a ? load_word(a + c) ^ layer->flip : layer->zero;
                    uint32_t wb = b ? load_word(b + c) ^ layer->flip : layer->zero;
                    pair_t even_a = unsigned_even(wa), even_b = unsigned_even(wb);
                    pair_t odd_a = unsigned_odd(wa), odd_b = unsigned_odd(wb);
                    *to = low_lanes(even_a, even_b), to += plane;
                    *to = low_lanes(odd_a, odd_b), to += plane;
                    *to = high_lanes(even_a, even_b), to += plane;
                    *to = high_lanes(odd_a, odd_b), to += plane;
                }
                for (int c = whole; c < c_count; c++, to += plane)
                    *to = make_pair((a ? a[c] ^ layer->flip : layer->zero) & 255,
                                    (b ? b[c] ^ layer->flip : layer->zero) & 255);
            }
        }
    }
}

/* The sums of eight positions, [2 halves][4]; an even number of entries. */
static inline __attribute__((always_inline)) void sums_of(const uint8_t *entry, const uint8_t *end,
                                                          const pair_t *at, int32_t start,
                                                          int32_t *sums)
{
    int32_t s0 = start, s1 = start, s2 = start, s3 = start;
    int32_t s4 = start, s5 = start, s6 = start, s7 = start;
#define STEP { \
        pair_t first, second; \
        at += *entry++; \
        int32_t weight = (int8_t)*entry++; \
        LOAD_TWO(first, second, at, 0); \
        s0 = mac_low(first, weight, s0), s4 = mac_high(first, weight, s4); \
        s1 = mac_low(second, weight, s1), s5 = mac_high(second, weight, s5); \
        LOAD_TWO(first, second, at, 2); \
        s2 = mac_low(first, weight, s2), s6 = mac_high(first, weight, s6); \
        s3 = mac_low(second, weight, s3), s7 = mac_high(second, weight, s7); }
    if ((end - entry) & 4) {
        STEP STEP
    }
    while (entry != end) {
        STEP STEP STEP STEP
    }
#undef STEP
    sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
    sums[4] = s4, sums[5] = s5, sums[6] = s6, sums[7] = s7;
}

/* `put` with an addition behind it. */
static __attribute__((noinline)) void put_added(const conv_t *layer, scale_t scale,
                                                const int32_t *sums, int count,
                                                const uint8_t *residual, uint8_t *out)
{
    const add_t add = *layer->add;
    int step = layer->outputs;
    for (; count > 0; count--, out += step, residual += step)
        *out = (uint8_t)add_bytes(&add, requantize(scale, *sums++), *residual);
}

/* Writes four positions of a row from x on. */
static inline void put(const conv_t *layer, scale_t scale, const int32_t *sums, int x,
                       const uint8_t *residual, uint8_t *out)
{
    int count = smaller(layer->out_width - x, 4), step = layer->outputs;
    if (residual)
        put_added(layer, scale, sums, count, residual, out);
    else
        for (; count > 0; count--, out += step) *out = (uint8_t)requantize(scale, *sums++);
}

/* Writes two windows of two rows of sums from x on. */
static inline void put_pooled(const conv_t *layer, scale_t scale, const int32_t *upper, int x,
                              uint8_t *out)
{
    const int32_t *lower = upper + 8;
    for (int i = 0; i < 4 && x + i + 1 < layer->out_width; i += 2, out += layer->outputs)
        *out = (uint8_t)requantize(scale, larger(larger(upper[i], upper[i + 1]),
                                                 larger(lower[i], lower[i + 1])));
}

void conv_sparse(const conv_t *layer, const uint8_t *in, const uint8_t *residual, uint8_t *out,
                 void *scratch)
{
    int outputs = layer->outputs, width = layer->out_width, half = half_of(layer);
    int pool = layer->pool, height = pool ? layer->out_height & ~1 : layer->out_height;
    int next_row = layer->stride_y * layer->stride_x * columns_of(layer);
    for (int y = 0; y < height; y += 2) {
        pack_band(layer, in, y, scratch);
        for (int o = 0; o < outputs; o++) {
            const uint8_t *entry = layer->entries + layer->starts[o];
            const uint8_t *end = layer->entries + layer->starts[o + 1];
            scale_t scale = scale_of(&layer->requantize, o);
            int32_t start = offset_of(&layer->requantize, o);
            for (int x = 0; x < half; x += 4) {
                int32_t sums[16];  /* [2 rows][2 halves][4] */
                for (int row = 0; row < 2 && y + row < height; row++) {
                    int32_t *own = sums + 8 * row;
                    sums_of(entry, end, (const pair_t *)scratch + x + row * next_row, start, own);
                    for (int side = 0; side < 2 && !pool; side++) {
                        int from = x + side * half, at = ((y + row) * width + from) * outputs + o;
                        put(layer, scale, own + 4 * side, from, residual ? residual + at : NULL,
                            out + at);
                    }
                }
                for (int side = 0; side < 2 && pool; side++) {
                    int from = x + side * half;
                    put_pooled(layer, scale, sums + 4 * side, from,
                               out + (y / 2 * (width / 2) + from / 2) * outputs + o);
                }
            }
        }
    }
}
