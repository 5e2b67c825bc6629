/* INT8 kernels, dense and sparse: see kernels.h. */
#include "kernels.h"

/* ---- two 16-bit lanes in a word ------------------------------------------------------------- */

typedef uint32_t pair_t;                                  /* low lane, high lane */
typedef uint64_t __attribute__((may_alias)) two_pairs_t;  /* one LDRD */
typedef uint32_t __attribute__((may_alias)) word_t;

static inline pair_t make_pair(int32_t low, int32_t high)
{
    return ((uint32_t)low & 0xffff) | (uint32_t)high << 16;
}

#if defined(__ARM_FEATURE_SIMD32)
#include <arm_acle.h>

static inline int32_t mac_pairs(pair_t a, pair_t b, int32_t sum) { return __smlad(a, b, sum); }
static inline int32_t mac_low(pair_t a, int32_t b, int32_t sum) { return __smlabb(a, b, sum); }
static inline int32_t mac_high(pair_t a, int32_t b, int32_t sum) { return __smlatb(a, b, sum); }
static inline pair_t add_pairs(pair_t a, pair_t b) { return __sadd16(a, b); }
static inline pair_t subtract_pairs(pair_t a, pair_t b) { return __ssub16(a, b); }
static inline pair_t signed_even(uint32_t bytes) { return __sxtb16(bytes); }
static inline pair_t unsigned_even(uint32_t bytes) { return __uxtb16(bytes); }

static inline pair_t signed_odd(uint32_t bytes)
{
    pair_t lanes;
    __asm__("sxtb16 %0, %1, ror #8" : "=r"(lanes) : "r"(bytes));
    return lanes;
}

static inline pair_t unsigned_odd(uint32_t bytes)
{
    pair_t lanes;
    __asm__("uxtb16 %0, %1, ror #8" : "=r"(lanes) : "r"(bytes));
    return lanes;
}

/* gcc makes no LDRD of two words that are aligned to 4 bytes only. */
#define LOAD_TWO(first, second, address, words) \
    __asm__("ldrd %0, %1, [%2, %3]" : "=&r"(first), "=r"(second) \
            : "r"(address), "i"(4 * (words)), "m"(*(const pair_t(*)[8])(address)))
#else
static inline int32_t low_of(pair_t a) { return (int16_t)a; }
static inline int32_t high_of(pair_t a) { return (int16_t)(a >> 16); }
static inline int32_t mac_low(pair_t a, int32_t b, int32_t sum) { return sum + low_of(a) * b; }
static inline int32_t mac_high(pair_t a, int32_t b, int32_t sum) { return sum + high_of(a) * b; }

static inline int32_t mac_pairs(pair_t a, pair_t b, int32_t sum)
{
    return (int32_t)((uint32_t)sum + (uint32_t)(low_of(a) * low_of(b)) +
                     (uint32_t)(high_of(a) * high_of(b)));  /* wraps, as SMLAD does */
}

static inline pair_t add_pairs(pair_t a, pair_t b)
{
    return make_pair(low_of(a) + low_of(b), high_of(a) + high_of(b));
}

static inline pair_t subtract_pairs(pair_t a, pair_t b)
{
    return make_pair(low_of(a) - low_of(b), high_of(a) - high_of(b));
}

static inline pair_t signed_even(uint32_t bytes)
{
    return make_pair((int8_t)bytes, (int8_t)(bytes >> 16));
}

static inline pair_t signed_odd(uint32_t bytes) { return signed_even(bytes >> 8); }
static inline pair_t unsigned_even(uint32_t bytes) { return bytes & 0xff00ff; }
static inline pair_t unsigned_odd(uint32_t bytes) { return bytes >> 8 & 0xff00ff; }

#define LOAD_TWO(first, second, address, words) \
    ((first) = (address)[words], (second) = (address)[(words) + 1])
#endif

/* ---- shared pieces -------------------------------------------------------------------------- */

static inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

static inline uint8_t requantize(const requantize_t r, int channel, int32_t sum)
{
    const float magic = 12582912.0f;  /* 1.5 * 2^23: adding it rounds to nearest, ties to even */
    union { float real; int32_t bits; } scaled, zero = {magic};
    scaled.real = ((float)sum + r.bias[channel]) * r.multiplier[channel] + magic;
    int32_t n = scaled.bits - zero.bits;
    n = n < r.low ? r.low : n;
    n = n > r.high ? r.high : n;
    return (uint8_t)(n + r.shift);
}

/* sums[2][4] = a[pairs][2] . b[pairs][4], each word a pair of int16. */
static inline void multiply_2x4(const pair_t *a, const pair_t *b, int pairs, int32_t *sums)
{
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
    const two_pairs_t *rows = (const two_pairs_t *)a, *columns = (const two_pairs_t *)b;
    const two_pairs_t *end = rows + pairs;
#define STEP(i) { \
        two_pairs_t row = rows[i], column = columns[2 * (i)]; \
        s0 = mac_pairs((pair_t)row, (pair_t)column, s0); \
        s4 = mac_pairs((pair_t)(row >> 32), (pair_t)column, s4); \
        s1 = mac_pairs((pair_t)row, (pair_t)(column >> 32), s1); \
        s5 = mac_pairs((pair_t)(row >> 32), (pair_t)(column >> 32), s5); \
        column = columns[2 * (i) + 1]; \
        s2 = mac_pairs((pair_t)row, (pair_t)column, s2); \
        s6 = mac_pairs((pair_t)(row >> 32), (pair_t)column, s6); \
        s3 = mac_pairs((pair_t)row, (pair_t)(column >> 32), s3); \
        s7 = mac_pairs((pair_t)(row >> 32), (pair_t)(column >> 32), s7); }
    if (pairs & 1) {
        STEP(0)
        rows += 1, columns += 2;
    }
    if (pairs & 2) {
        STEP(0) STEP(1)
        rows += 2, columns += 4;
    }
    for (; rows != end; rows += 4, columns += 8) {
        STEP(0) STEP(1) STEP(2) STEP(3)
    }
#undef STEP
    sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
    sums[4] = s4, sums[5] = s5, sums[6] = s6, sums[7] = s7;
}

/* ---- dense convolutions --------------------------------------------------------------------- */

/* band[4 rows][width + 2][inputs]: the zero-padded values under one row of pooling windows. */
static void unpack_band(const conv_t *layer, const uint8_t *in, int window_row, int16_t *band)
{
    int c_count = layer->inputs, length = layer->width * c_count, flip = layer->flip;
    int zero = layer->zero;
    for (int row = 0; row < 4; row++) {
        int y = 2 * window_row + row - 1;
        const uint8_t *from = in + y * length;
        for (int i = 0; i < c_count; i++) *band++ = 0;
        if (y >= 0 && y < layer->height)
            for (int i = 0; i < length; i++) *band++ = (int16_t)((from[i] ^ flip) - zero);
        else
            for (int i = 0; i < length; i++) *band++ = 0;
        for (int i = 0; i < c_count; i++) *band++ = 0;
    }
}

/* columns[width/2][pairs][4 positions of a window]: the 9 * inputs values under each position. */
static void gather_windows(const conv_t *layer, const int16_t *band, int16_t *columns)
{
    int c_count = layer->inputs, run = 3 * c_count, row = (layer->width + 2) * c_count;
    int pairs = CEIL_DIV(3 * run, 2);
    for (int window = 0; window < layer->width / 2; window++, columns += 8 * pairs) {
        for (int position = 0; position < 4; position++) {
            const int16_t *from =
                band + position / 2 * row + (2 * window + position % 2) * c_count;
            int16_t *to = columns + 2 * position;
            int odd = 0;  /* whether the next value is the high lane of its pair */
            for (int ky = 0; ky < 3; ky++, from += row) {
                const int16_t *value = from, *end = from + run;
                if (odd) to[1] = *value++, to += 8;
                for (; value + 1 < end; value += 2, to += 8) to[0] = value[0], to[1] = value[1];
                odd = value < end;
                if (odd) to[0] = *value;
            }
            if (odd) to[1] = 0;
        }
    }
}

void conv_direct(const conv_t *layer, const uint8_t *in, uint8_t *out, void *scratch)
{
    int length = 9 * layer->inputs, pairs = CEIL_DIV(length, 2), outputs = layer->outputs;
    int windows = layer->width / 2;
    const requantize_t scale = layer->requantize;
    pair_t *columns = scratch, *rows = columns + windows * pairs * 4;
    int16_t *band = (int16_t *)(rows + 2 * pairs);
    for (int y = 0; y < layer->height / 2; y++, out += windows * outputs) {
        unpack_band(layer, in, y, band);
        gather_windows(layer, band, (int16_t *)columns);
        for (int o = 0; o < outputs; o += 2) {
            const int8_t *first = layer->weights + o * length;
            int both = o + 1 < outputs;
            const int8_t *second = both ? first + length : first;
            for (int k = 0; k < pairs; k++) {
                int odd = 2 * k + 1 < length;
                rows[2 * k] = make_pair(first[2 * k], odd ? first[2 * k + 1] : 0);
                rows[2 * k + 1] = make_pair(second[2 * k], odd ? second[2 * k + 1] : 0);
            }
            for (int x = 0; x < windows; x++) {
                int32_t s[8];
                multiply_2x4(rows, columns + x * pairs * 4, pairs, s);
                uint8_t *to = out + x * outputs + o;
                to[0] = requantize(scale, o,
                                   larger(larger(s[0], s[1]), larger(s[2], s[3])));
                if (both)
                    to[1] = requantize(scale, o + 1,
                                       larger(larger(s[4], s[5]), larger(s[6], s[7])));
            }
        }
    }
}

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

/* tiles[16][quads][inputs/2][4 tiles]; `zeros` holds `inputs` zero bytes, the padding. */
static void transform_tiles(const conv_t *layer, const uint8_t *in, const uint8_t *zeros, int first,
                            int tiles, int quads, pair_t *to)
{
    int c_count = layer->inputs, per_row = layer->width / 2;
    for (int tile = 0; tile < tiles; tile++) {
        const uint8_t *from[16];
        for (int i = 0; i < 16; i++) {
            int y = 2 * ((first + tile) / per_row) + i / 4 - 1;
            int x = 2 * ((first + tile) % per_row) + i % 4 - 1;
            int inside = y >= 0 && y < layer->height && x >= 0 && x < layer->width;
            from[i] = inside ? in + (y * layer->width + x) * c_count : zeros;
        }
        pair_t *quad = to + tile / 4 * c_count / 2 * 4 + tile % 4;
        for (int c = 0; c < c_count; c += 4, quad += 8) {
            pair_t even[16], odd[16];
            for (int i = 0; i < 16; i++) {
                uint32_t bytes = *(const word_t *)(from[i] + c);
                even[i] = unsigned_even(bytes), odd[i] = unsigned_odd(bytes);
            }
            transform_tile(even, quad, quads * c_count / 2 * 4);
            transform_tile(odd, quad + 4, quads * c_count / 2 * 4);
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
    const word_t *from = (const word_t *)(layer->weights + o * 9 * c_count);
    for (int lane = 0; lane < 2; lane++) {
        pair_t *filter = to + lane;
        for (int c = 0; c < c_count; c += 4, from += 9, filter += 4) {
            pair_t even[9], odd[9];
            for (int i = 0; i < 9; i++) even[i] = signed_even(from[i]), odd[i] = signed_odd(from[i]);
            transform_filter(even, filter, c_count);
            transform_filter(odd, filter + 2, c_count);
        }
    }
}

/* The largest of A^T m A, the four outputs under one pooling window; m[16] lies 8 words apart. */
static inline int32_t largest_of_tile(const int32_t *m)
{
    int32_t top[4], bottom[4];
    for (int j = 0; j < 4; j++) {
        int32_t a = m[8 * j], b = m[8 * (4 + j)], c = m[8 * (8 + j)], d = m[8 * (12 + j)];
        top[j] = a + b + c;
        bottom[j] = b - c - d;
    }
    return larger(larger(top[0] + top[1] + top[2], top[1] - top[2] - top[3]),
                  larger(bottom[0] + bottom[1] + bottom[2], bottom[1] - bottom[2] - bottom[3]));
}

void conv_winograd(const conv_t *layer, const uint8_t *in, uint8_t *out, void *scratch)
{
    int width = layer->width, c_count = layer->inputs, outputs = layer->outputs;
    int total = layer->height / 2 * (width / 2), quads = WINOGRAD_QUADS(width);
    int block = WINOGRAD_TILE_ROWS(width) * (width / 2);
    const requantize_t scale = layer->requantize;
    pair_t *tiles = scratch, *filters = tiles + 16 * quads * 4 * (c_count / 2);
    uint8_t *zeros = (uint8_t *)(filters + 16 * c_count);
    for (int c = 0; c < c_count; c++) zeros[c] = 0;
    for (int first = 0; first < total; first += block) {
        int count = total - first < block ? total - first : block;
        transform_tiles(layer, in, zeros, first, count, quads, tiles);
        for (int o = 0; o < outputs; o += 2) {
            transform_filters(layer, o, filters);
            for (int tile = 0; tile < count; tile += 4) {
                int32_t sums[16 * 8];  /* [16][2 outputs][4 tiles] */
                for (int i = 0; i < 16; i++)
                    multiply_2x4(filters + i * c_count,
                                 tiles + (i * quads + tile / 4) * (c_count / 2) * 4, c_count / 2,
                                 sums + 8 * i);
                uint8_t *to = out + (first + tile) * outputs + o;
                for (int lane = 0; lane < 4 && tile + lane < count; lane++, to += outputs) {
                    to[0] = requantize(scale, o, largest_of_tile(sums + lane) >> 2);
                    to[1] =
                        requantize(scale, o + 1, largest_of_tile(sums + 4 + lane) >> 2);
                }
            }
        }
    }
}

/* ---- sparse convolution --------------------------------------------------------------------- */

/* band[inputs][SPARSE_COLUMNS][4 rows]: low lane the left half of the row, high lane the right. */
static void pack_band(const conv_t *layer, const uint8_t *in, int window_row, pair_t *band)
{
    int width = layer->width, c_count = layer->inputs, columns = SPARSE_COLUMNS(width);
    for (int column = 0; column < columns; column++) {
        for (int row = 0; row < 4; row++) {
            int y = 2 * window_row + row - 1, left = column - 1, right = left + columns - 2;
            int inside = y >= 0 && y < layer->height;
            const uint8_t *a = in + (y * width + left) * c_count;
            const uint8_t *b = in + (y * width + right) * c_count;
            int has_a = inside && left >= 0 && left < width, has_b = inside && right < width;
            pair_t *to = band + 4 * column + row;
            for (int c = 0; c < c_count; c++, to += 4 * columns)
                *to = make_pair(has_a ? (a[c] ^ layer->flip) - layer->zero : 0,
                                has_b ? (b[c] ^ layer->flip) - layer->zero : 0);
        }
    }
}

void conv_sparse(const conv_t *layer, const uint8_t *in, uint8_t *out, void *scratch)
{
    int outputs = layer->outputs, windows = layer->width / 2, half = CEIL_DIV(windows, 2);
    const requantize_t scale = layer->requantize;
    pair_t *band = scratch;
    for (int y = 0; y < layer->height / 2; y++, out += windows * outputs) {
        pack_band(layer, in, y, band);
        for (int o = 0; o < outputs; o++) {
            const uint8_t *end = layer->entries + layer->starts[o + 1];
            for (int x = 0; x < half; x++) {
                const uint8_t *entry = layer->entries + layer->starts[o];
                const pair_t *at = band + 8 * x;
                int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
#define STEP { \
        pair_t top, bottom; \
        at += *entry++; \
        int32_t weight = (int8_t)*entry++; \
        LOAD_TWO(top, bottom, at, 0); \
        s0 = mac_low(top, weight, s0), s1 = mac_high(top, weight, s1); \
        s2 = mac_low(bottom, weight, s2), s3 = mac_high(bottom, weight, s3); \
        LOAD_TWO(top, bottom, at, 4); \
        s4 = mac_low(top, weight, s4), s5 = mac_high(top, weight, s5); \
        s6 = mac_low(bottom, weight, s6), s7 = mac_high(bottom, weight, s7); }
                if ((end - entry) & 4) {
                    STEP STEP
                }
                while (entry != end) {
                    STEP STEP STEP STEP
                }
#undef STEP
                uint8_t *to = out + x * outputs + o;
                *to = requantize(scale, o, larger(larger(s0, s2), larger(s4, s6)));
                if (x + half < windows)
                    to[half * outputs] =
                        requantize(scale, o, larger(larger(s1, s3), larger(s5, s7)));
            }
        }
    }
}

/* ---- linear layers -------------------------------------------------------------------------- */

/* A halfword of weights is 256 * upper + lower, exactly, for the rows o and o + 1. So one SMLAD on the
 * word itself sums both rows, one on its sign-extended low bytes sums the lower row alone, and the
 * difference is 256 times the upper row: right modulo 2^32 while |sum of the upper row| < 2^23, which
 * 256 inputs of at most 255 * 127 cannot reach. */
#define UPPER_ROW_INPUTS 256

void linear_dense(const linear_t *layer, const uint8_t *in, uint8_t *out, void *scratch)
{
    int quads = CEIL_DIV(layer->inputs, 4);
    const requantize_t scale = layer->requantize;
    pair_t *values = scratch;
    for (int i = 0; i < quads; i++) {
        uint32_t bytes = 0;
        for (int j = 0; j < 4 && 4 * i + j < layer->inputs; j++)
            bytes |= (uint32_t)in[4 * i + j] << 8 * j;
        values[2 * i] = unsigned_even(bytes), values[2 * i + 1] = unsigned_odd(bytes);
    }
    const two_pairs_t *weights = (const two_pairs_t *)layer->weights;
    for (int o = 0; o < layer->outputs; o += 4) {
        int32_t sums[4] = {0, 0, 0, 0};
        const two_pairs_t *value = scratch, *last = value + quads;
        while (value != last) {
            const two_pairs_t *end = value + UPPER_ROW_INPUTS / 4 < last ? value + UPPER_ROW_INPUTS / 4 : last;
            int32_t both01 = 0, both23 = 0, low0 = 0, low2 = 0;
#define STEP(i) { \
        pair_t even = (pair_t)value[i], odd = (pair_t)(value[i] >> 32); \
        pair_t w = (pair_t)weights[2 * (i)], next = (pair_t)(weights[2 * (i)] >> 32); \
        both01 = mac_pairs(w, even, both01), low0 = mac_pairs(signed_even(w), even, low0); \
        both01 = mac_pairs(next, odd, both01), low0 = mac_pairs(signed_even(next), odd, low0); \
        w = (pair_t)weights[2 * (i) + 1], next = (pair_t)(weights[2 * (i) + 1] >> 32); \
        both23 = mac_pairs(w, even, both23), low2 = mac_pairs(signed_even(w), even, low2); \
        both23 = mac_pairs(next, odd, both23), low2 = mac_pairs(signed_even(next), odd, low2); }
            if ((end - value) & 1) {
                STEP(0)
                value += 1, weights += 2;
            }
            if ((end - value) & 2) {
                STEP(0) STEP(1)
                value += 2, weights += 4;
            }
            for (; value != end; value += 4, weights += 8) {
                STEP(0) STEP(1) STEP(2) STEP(3)
            }
#undef STEP
            sums[0] += low0, sums[2] += low2;
            sums[1] += (int32_t)((uint32_t)both01 - (uint32_t)low0) >> 8;
            sums[3] += (int32_t)((uint32_t)both23 - (uint32_t)low2) >> 8;
        }
        for (int i = 0; i < 4 && o + i < layer->outputs; i++)
            out[o + i] = requantize(scale, o + i, sums[i]);
    }
}

void linear_sparse(const linear_t *layer, const uint8_t *in, uint8_t *out)
{
    const requantize_t scale = layer->requantize;
    for (int o = 0; o < layer->outputs; o++) {
        const uint8_t *entry = layer->entries + layer->starts[o];
        const uint8_t *end = layer->entries + layer->starts[o + 1];
        const uint8_t *at = in;
        int32_t sum = 0;
#define STEP at += *entry++, sum += *at * (int8_t)*entry++;
        if ((end - entry) & 4) {
            STEP STEP
        }
        while (entry != end) {
            STEP STEP STEP STEP
        }
#undef STEP
        out[o] = requantize(scale, o, sum);
    }
}

void linear_bitmap(const linear_t *layer, const uint8_t *in, uint8_t *out)
{
    const requantize_t scale = layer->requantize;
    const uint32_t *mask = layer->masks;
    const int8_t *value = layer->values;
    for (int o = 0; o < layer->outputs; o++) {
        int32_t sum = 0;
        for (const uint8_t *at = in; at < in + layer->inputs; at += 32) {
            for (uint32_t left = *mask++; left;) {
                int first = __builtin_clz(left);
                left &= ~(0x80000000u >> first);
                sum += at[first] * *value++;
            }
        }
        out[o] = requantize(scale, o, sum);
    }
}
