/* Dense convolution of any shape: the values under four positions side by side, two outputs at a time. */
#include <stddef.h>

#include "layers.h"
#include "multiply.h"
#include "requantize.h"

#define MOST_GROUPS 8  /* of four positions in scratch at once: the largest layer->block */

static inline void fill_bytes(uint8_t *to, uint32_t word, int count)
{
    for (int i = 0; i < count; i++) to[i] = (uint8_t)word;
}

/* One row of a patch that may reach over the map's sides, or to its very end. */
static __attribute__((noinline)) void copy_edge(const conv_t *layer, const uint8_t *row, int left,
                                                uint8_t *to)
{
    int c_count = layer->inputs, run = layer->kernel_width * c_count;
    int first = smaller(larger(-left, 0) * c_count, run);
    int last = larger(smaller(layer->width - left, layer->kernel_width) * c_count, first);
    fill_bytes(to, layer->zero, first);
    for (int i = first; i < last; i++) to[i] = row[left * c_count + i] ^ (uint8_t)layer->flip;
    fill_bytes(to + last, layer->zero, run - last);
}

/* The kernel_height * kernel_width * inputs bytes from (top, left) on, to `to`; behind them up to three
 * bytes more are written. `end` is that of the map. */
static void copy_patch(const conv_t *layer, const uint8_t *in, const uint8_t *end, int top, int left,
                       uint8_t *to)
{
    int c_count = layer->inputs, line = layer->width * c_count, height = layer->height;
    int run = layer->kernel_width * c_count, words = CEIL_DIV(run, 4);
    int across = left >= 0 && left + layer->kernel_width <= layer->width;
    uint32_t flip = layer->flip, zero = layer->zero;
    const uint8_t *row = in + top * line;
    for (int y = top; y < top + layer->kernel_height; y++, row += line, to += run) {
        uint8_t *at = to, *last = to + 4 * words;
        if (y < 0 || y >= height) {
            for (; at != last; at += 4) store_word(at, zero);
        } else if (across && row + left * c_count + 4 * words <= end) {
            const uint8_t *from = row + left * c_count;
            for (; at != last; at += 4, from += 4) store_word(at, load_word(from) ^ flip);
        } else {
            copy_edge(layer, row, left, to);
        }
    }
}

/* columns[2 * words][4] of the values of four positions. */
static __attribute__((noinline)) void expand_columns(const uint8_t *const from[4], int words, pair_t *to)
{
    const uint8_t *a = from[0], *b = from[1], *c = from[2], *d = from[3];
    for (const uint8_t *end = a + 4 * words; a != end; a += 4, b += 4, c += 4, d += 4, to += 8) {
        uint32_t wa = load_word(a), wb = load_word(b), wc = load_word(c), wd = load_word(d);
        store_two(to, unsigned_even(wa), unsigned_even(wb));
        store_two(to + 2, unsigned_even(wc), unsigned_even(wd));
        store_two(to + 4, unsigned_odd(wa), unsigned_odd(wb));
        store_two(to + 6, unsigned_odd(wc), unsigned_odd(wd));
    }
}

/* rows[2 * words][2] of the weights of two outputs. */
static __attribute__((noinline)) void expand_rows(const int8_t *first, const int8_t *second, int words, pair_t *to)
{
    for (const int8_t *end = first + 4 * words; first != end; first += 4, second += 4, to += 4) {
        uint32_t a = load_word(first), b = load_word(second);
        store_two(to, signed_even(a), signed_even(b));
        store_two(to + 2, signed_odd(a), signed_odd(b));
    }
}

/* `put` with an addition behind it. */
static __attribute__((noinline)) void put_added(const conv_t *layer, scale_t scale,
                                                const int32_t *sums, int units,
                                                const uint8_t *residual, uint8_t *out)
{
    const add_t add = *layer->add;
    int step = layer->outputs;
    for (int i = 0; i < units; i++, out += step, residual += step)
        *out = (uint8_t)add_bytes(&add, requantize(scale, sums[i / 4 * 8 + i % 4]), *residual);
}

/* Writes one output channel of groups of four positions, or of windows that they are. */
static inline void put(const conv_t *layer, scale_t scale, const int32_t *sums, int units,
                       const uint8_t *residual, uint8_t *out)
{
    int step = layer->outputs;
    if (layer->pool) {
        for (; units; units--, sums += 8, out += step)
            *out = (uint8_t)requantize(scale, larger(larger(sums[0], sums[1]),
                                                     larger(sums[2], sums[3])));
        return;
    }
    if (residual) {
        put_added(layer, scale, sums, units, residual, out);
        return;
    }
    for (int two = 2 * step, three = 3 * step; units >= 4; units -= 4, sums += 8, out += 4 * step) {
        out[0] = (uint8_t)requantize(scale, sums[0]);
        out[step] = (uint8_t)requantize(scale, sums[1]);
        out[two] = (uint8_t)requantize(scale, sums[2]);
        out[three] = (uint8_t)requantize(scale, sums[3]);
    }
    for (; units; units--, out += step) *out = (uint8_t)requantize(scale, *sums++);
}

void conv_direct(const conv_t *layer, const uint8_t *in, const uint8_t *residual, uint8_t *out,
                 void *scratch)
{
    int outputs = layer->outputs, pool = layer->pool, width = layer->out_width >> pool;
    int words = CEIL_DIV(layer->kernel_height * layer->kernel_width * layer->inputs, 4);
    int units = (layer->out_height >> pool) * width;  /* positions, or windows of four */
    int block = pool ? layer->block : 4 * layer->block;
    const uint8_t *end = in + layer->height * layer->width * layer->inputs;
    /* Where a position's values stand side by side already, they need no copy. */
    int in_line = layer->kernel_height == 1 && layer->kernel_width == 1 && !layer->flip &&
                  layer->inputs % 4 == 0 && layer->pad_y == 0 && layer->pad_x == 0;
    int as_it_is = in_line && !pool && layer->stride_y == 1 && layer->stride_x == 1;
    pair_t *columns = scratch, *rows = columns + layer->block * words * 8;
    uint8_t *patches = (uint8_t *)(rows + 4 * words);
    int y = 0, x = 0;  /* of the next unit */
    for (int first = 0; first < units; first += block) {
        int count = smaller(units - first, block), groups = pool ? count : CEIL_DIV(count, 4);
        for (int group = 0; group < groups; group++) {
            const uint8_t *from[4];
            for (int i = 0; i < 4; i++) {
                if (as_it_is) {
                    from[i] = in + smaller(first + 4 * group + i, units - 1) * layer->inputs;
                    continue;
                }
                int top = y << pool, left = x << pool;
                if (pool) top += i >> 1, left += i & 1;
                top = top * layer->stride_y - layer->pad_y;
                left = left * layer->stride_x - layer->pad_x;
                if (in_line) {
                    from[i] = in + (top * layer->width + left) * layer->inputs;
                } else {
                    from[i] = patches + i * (4 * words + 4);
                    copy_patch(layer, in, end, top, left, patches + i * (4 * words + 4));
                }
                if (pool && i < 3) continue;
                /* Behind the last unit it stands again. */
                if (x + 1 < width) x++;
                else if (y + 1 < layer->out_height >> pool) x = 0, y++;
            }
            expand_columns(from, words, columns + group * words * 8);
        }
        for (int o = 0; o < outputs; o += 2) {
            int next = smaller(o + 1, outputs - 1);
            expand_rows(layer->weights + o * 4 * words, layer->weights + next * 4 * words, words,
                        rows);
            int32_t sums[MOST_GROUPS * 8], starts[8];
            for (int i = 0; i < 4; i++) {
                starts[i] = offset_of(&layer->requantize, o);
                starts[4 + i] = offset_of(&layer->requantize, next);
            }
            products_t products = {starts, 16 * words, 0, sums, -16 * words, 0, groups};
            multiply_2x4(rows, columns, &products);
            int at = first * outputs + o;
            put(layer, scale_of(&layer->requantize, o), sums, count,
                residual ? residual + at : NULL, out + at);
            if (next == o) break;
            put(layer, scale_of(&layer->requantize, next), sums + 4, count,
                residual ? residual + at + 1 : NULL, out + at + 1);
        }
    }
}
