/* Dense convolution of any shape: the values under four positions side by side, two outputs at a time. */
#include <stddef.h>

#include "layers.h"
#include "multiply.h"
#include "requantize.h"

/* count bytes, four at a time; up to three bytes more are written. */
static inline void copy_bytes(uint8_t *to, const uint8_t *from, int count, uint32_t flip)
{
    for (int i = 0; i < count; i += 4) store_word(to + i, load_word(from + i) ^ flip);
}

static inline void fill_bytes(uint8_t *to, uint32_t word, int count)
{
    for (int i = 0; i < count; i += 4) store_word(to + i, word);
}

/* The kernel_height * kernel_width * inputs bytes under output (y, x): at `to`, or where they are. */
static const uint8_t *patch(const conv_t *layer, const uint8_t *in, int y, int x, uint8_t *to)
{
    int c_count = layer->inputs, row = layer->width * c_count;
    int top = y * layer->stride_y - layer->pad_y, left = x * layer->stride_x - layer->pad_x;
    int run = layer->kernel_width * c_count;
    if (run % 4 == 0 && layer->kernel_height == 1 && !layer->flip && top >= 0 &&
        top < layer->height && left >= 0 && left + layer->kernel_width <= layer->width)
        return in + top * row + left * c_count;
    int before = larger(-left, 0) * c_count;
    int after = larger(left + layer->kernel_width - layer->width, 0) * c_count;
    before = smaller(before, run), after = smaller(after, run - before);
    const uint8_t *from = in + top * row + (left * c_count + before);
    uint8_t *at = to;
    for (int y_in = top; y_in < top + layer->kernel_height; y_in++, at += run, from += row) {
        if (y_in < 0 || y_in >= layer->height) {
            fill_bytes(at, layer->zero, run);
            continue;
        }
        if (before) fill_bytes(at, layer->zero, before);
        int inside = run - before - after;
        copy_bytes(at + before, from, inside & ~3, layer->flip);
        for (int i = inside & ~3; i < inside; i++)  /* in two, not to read behind the map's end */
            at[before + i] = from[i] ^ (uint8_t)layer->flip;
        if (after) fill_bytes(at + before + inside, layer->zero, after);
    }
    return to;
}

/* columns[2 * words][4] of the values of four positions. */
static void expand_columns(const uint8_t *const from[4], int words, pair_t *to)
{
    const uint8_t *a = from[0], *b = from[1], *c = from[2], *d = from[3];
    for (const uint8_t *end = a + 4 * words; a != end; a += 4, b += 4, c += 4, d += 4, to += 8) {
        uint32_t wa = load_word(a), wb = load_word(b), wc = load_word(c), wd = load_word(d);
        to[0] = unsigned_even(wa), to[1] = unsigned_even(wb);
        to[2] = unsigned_even(wc), to[3] = unsigned_even(wd);
        to[4] = unsigned_odd(wa), to[5] = unsigned_odd(wb);
        to[6] = unsigned_odd(wc), to[7] = unsigned_odd(wd);
    }
}

/* rows[2 * words][2] of the weights of two outputs. */
static void expand_rows(const int8_t *first, const int8_t *second, int words, pair_t *to)
{
    for (const int8_t *end = first + 4 * words; first != end; first += 4, second += 4, to += 4) {
        uint32_t a = load_word(first), b = load_word(second);
        to[0] = signed_even(a), to[1] = signed_even(b);
        to[2] = signed_odd(a), to[3] = signed_odd(b);
    }
}

/* Writes the outputs o (and o + 1 where `both`) of the positions from `at` on. */
static inline __attribute__((always_inline)) void put(const conv_t *layer, scale_t scale,
                                                      const int32_t *sums, int count,
                                                      const uint8_t *residual, uint8_t *out)
{
    int outputs = layer->outputs;
    if (layer->pool) {
        *out = (uint8_t)requantize(scale, larger(larger(sums[0], sums[1]),
                                                 larger(sums[2], sums[3])));
        return;
    }
    for (int i = 0; i < 4; i++, out += outputs) {
        if (i >= count) return;
        int32_t value = requantize(scale, sums[i]);
        if (residual) {
            value = add_bytes(layer->add, value, *residual);
            residual += outputs;
        }
        *out = (uint8_t)value;
    }
}

void conv_direct(const conv_t *layer, const uint8_t *in, const uint8_t *residual, uint8_t *out,
                 void *scratch)
{
    int outputs = layer->outputs, pool = layer->pool, width = layer->out_width >> pool;
    int words = CEIL_DIV(layer->kernel_height * layer->kernel_width * layer->inputs, 4);
    int units = (layer->out_height >> pool) * width;  /* positions, or windows of four */
    int a_group = pool ? 1 : 4, groups = CEIL_DIV(units, a_group);
    pair_t *columns = scratch, *rows = columns + layer->block * words * 8;
    uint8_t *patches = (uint8_t *)(rows + 4 * words);
    for (int first = 0; first < groups; first += layer->block) {
        int last = smaller(first + layer->block, groups);
        for (int group = first; group < last; group++) {
            const uint8_t *from[4];
            for (int i = 0; i < 4; i++) {
                int unit = smaller(a_group * group + (pool ? 0 : i), units - 1);
                int y = unit / width, x = unit - y * width;
                if (pool) y = 2 * y + i / 2, x = 2 * x + i % 2;
                from[i] = patch(layer, in, y, x, patches + i * (4 * words + 4));
            }
            expand_columns(from, words, columns + (group - first) * words * 8);
        }
        for (int o = 0; o < outputs; o += 2) {
            int second = smaller(o + 1, outputs - 1);
            expand_rows(layer->weights + o * 4 * words, layer->weights + second * 4 * words, words,
                        rows);
            scale_t scale = scale_of(&layer->requantize, o);
            scale_t next = scale_of(&layer->requantize, second);
            int32_t start = offset_of(&layer->requantize, o);
            int32_t next_start = offset_of(&layer->requantize, second);
            for (int group = first; group < last; group++) {
                int32_t s[8];
                multiply_2x4(rows, columns + (group - first) * words * 8, 2 * words, start,
                             next_start, s);
                int unit = a_group * group, count = units - unit;
                int at = unit * outputs + o;
                put(layer, scale, s, count, residual ? residual + at : NULL, out + at);
                if (second == o) continue;
                put(layer, next, s + 4, count, residual ? residual + at + 1 : NULL, out + at + 1);
            }
        }
    }
}
