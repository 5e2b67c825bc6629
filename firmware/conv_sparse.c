/* Convolution of any shape by its non-zero weights alone, eight positions a weight, two a product.
 *
 * Scratch: band[inputs][rows][stride_x][columns], the zero-point-padded input under two rows of
 * outputs, which moves down over the map; behind it, where a row takes several rounds, the entries of a
 * channel of at most 128. A word is left + 2^23 * right: the values of an output position of the left half of a row
 * and of the one `half` positions to its right; the columns of one phase of the stride stand side by
 * side, so that four words are four positions. (channel, ky, kx) lies at
 * ((channel * rows + ky) * stride_x + kx % stride_x) * columns + kx / stride_x.
 *
 * A weight times a word, added up in 64 bits (SMLAL), are both sums: the left one in 23 bits, the right
 * one above. In between the left one may borrow from the right one. At the end it is the sum of at most
 * 128 products (q - zero point) * weight, below 2^22 in size, because `offset` is -zero point * sum of
 * the weights and nothing else; and what it has borrowed then is its sign.
 */
#include <stddef.h>

#include "layers.h"
#include "requantize.h"

#define LANE 23
#define MOST 128      /* entries whose left sums stay within LANE bits */
#define UNROLLED 12   /* entries of a round of the loop in sum_rows */
#define STEP_BYTES 34 /* of its code, an entry */
#define COPIED 16     /* bytes that copy() takes at once; so many less 2 lie behind the entries */
#define TEXT(macro) #macro
#define NUMBER(macro) TEXT(macro)

/* Positions of half a row of outputs, in groups of four. */
static inline int half_of(int width) { return CEIL_DIV(CEIL_DIV(width, 2), 4) * 4; }

static inline int columns_of(const conv_t *layer)
{
    return half_of(layer->out_width) + (layer->kernel_width - 1) / layer->stride_x;
}

static inline int rows_of(const conv_t *layer) { return layer->kernel_height + layer->stride_y; }

/* Moves the rows of the band that the next two rows of outputs read too, and returns how many. */
static __attribute__((noinline)) int keep_rows(const conv_t *layer, uint32_t *band)
{
    int line = layer->stride_x * columns_of(layer), down = 2 * layer->stride_y * line;
    int kept = larger(layer->kernel_height - layer->stride_y, 0);
    for (int c = 0; c < layer->inputs; c++, band += rows_of(layer) * line) {
        uint32_t *to = band, *end = band + kept * line;
        for (; end - to >= 4; to += 4) {
            uint32_t w0 = to[down], w1 = to[down + 1], w2 = to[down + 2], w3 = to[down + 3];
            to[0] = w0, to[1] = w1, to[2] = w2, to[3] = w3;
        }
        for (; to < end; to++) to[0] = to[down];
    }
    return kept;
}

/* Fills the band's rows from `row` on. */
static __attribute__((noinline)) void pack_band(const conv_t *layer, const uint8_t *in, int out_row,
                                                int row, uint32_t *band)
{
    int c_count = layer->inputs, columns = columns_of(layer), step = layer->stride_x;
    int plane = rows_of(layer) * step * columns, half = half_of(layer->out_width);
    int whole = c_count & ~3, line = layer->width * c_count;
    uint32_t flip = layer->flip, zero = layer->zero, flips = (flip & 255) | (flip & 255) << LANE;
    uint8_t pad[4];
    store_word(pad, zero ^ flip);
    int top = out_row * layer->stride_y - layer->pad_y;
    for (band += row * step * columns; row < rows_of(layer); row++) {
        int y = top + row, inside = y >= 0 && y < layer->height;
        const uint8_t *from = in + y * line;
        for (int phase = 0; phase < step; phase++) {
            int left = phase - layer->pad_x, right = left + half * step;
            for (int column = 0; column < columns; column++, left += step, right += step) {
                const uint8_t *a = inside && left >= 0 && left < layer->width
                                       ? from + left * c_count : NULL;
                const uint8_t *b = inside && right >= 0 && right < layer->width
                                       ? from + right * c_count : NULL;
                uint32_t *to = band++;
                for (int c = 0; c < whole; c += 4) {
                    uint32_t wa = a ? load_word(a + c) ^ flip : zero;
                    uint32_t wb = b ? load_word(b + c) ^ flip : zero;
                    for (int i = 0; i < 4; i++, wa >>= 8, wb >>= 8, to += plane)
                        *to = (wa & 255) | (wb & 255) << LANE;
                }
                const uint8_t *last_a = a ? a + whole : pad, *last_b = b ? b + whole : pad;
                for (int c = whole; c < c_count; c++, to += plane)
                    *to = (*last_a++ | (uint32_t)*last_b++ << LANE) ^ flips;
            }
        }
    }
}

/* One output channel's sums of eight positions of one row or two. */
typedef struct {
    uintptr_t entry;       /* the first one, less 2 bytes for each that the loop leaves out at first */
    int32_t skipped;       /* bytes of code of those, and 1: the Thumb bit of an address */
    const uint8_t *end;
    int32_t *sums;         /* [1 or 2 rows][2 halves][4, or 2 of neighbours]; moves on by a row */
    int32_t *last;         /* behind the last row's */
    int32_t next_row;      /* bytes of scratch */
    const uint32_t *at;    /* where the last entry of the last row was read */
    int32_t neighbours;    /* 1: of two sums side by side the larger alone */
    int64_t start;         /* what the sums of a word begin with: the offset, twice */
    /* All of the channel, of any number of entries. */
    const uint8_t *first, *behind;
    int32_t offset, rows, pool;
    uint8_t *near;         /* NULL, or scratch that its entries are copied to */
} rows_t;

/* Of each two neighbours the larger. */
static inline void keep_larger(int32_t *sums, int count)
{
    for (int i = 0; i < count / 2; i++) sums[i] = larger(sums[2 * i], sums[2 * i + 1]);
}

/* At most MOST entries for `rows`, as the loop of sum_rows takes them. */
static inline void take(rows_t *rows, const uint8_t *entry, const uint8_t *end)
{
    unsigned count = (unsigned)(end - entry) / 2;
    int skipped = UNROLLED * (int)((count + UNROLLED - 1) / UNROLLED) - (int)count;
    if (count == 0) skipped = UNROLLED;
    rows->entry = (uintptr_t)entry - 2 * (uintptr_t)skipped, rows->end = end;
    rows->skipped = STEP_BYTES * skipped + 1;
}

/* In assembly because its 14 registers are all there are, and gcc spills: 9 instructions for 8
 * multiplications. It enters a loop of twelve entries so that the last round is whole. */
#if defined(__ARM_FEATURE_SIMD32) && defined(__thumb2__)
#define STEP(entry) \
    "ldrb.n r3, [r0, #2 * " #entry "]\n\t" \
    "ldrsb r2, [r0, #2 * " #entry " + 1]\n\t" \
    "add r1, r1, r3, lsl #2\n\t" \
    "ldrd r3, r12, [r1]\n\t" \
    "smlal r4, r5, r3, r2\n\t" \
    "smlal r6, r7, r12, r2\n\t" \
    "ldrd r3, r12, [r1, #8]\n\t" \
    "smlal r8, r9, r3, r2\n\t" \
    "smlal r10, r11, r12, r2\n\t"
/* Of one word: its left sum, and its right one in place of its low half. The sign of the left sum, which
 * it has borrowed, the shift leaves in the carry. */
#define SPLIT(left, low, high) \
    "sbfx " left ", " low ", #0, #" NUMBER(LANE) "\n\t" \
    "lsrs " low ", " low ", #" NUMBER(LANE) "\n\t" \
    "orr " low ", " low ", " high ", lsl #32 - " NUMBER(LANE) "\n\t" \
    "adc " low ", " low ", #0\n\t"

#define LARGER(a, b) \
    "cmp " a ", " b "\n\t" \
    "it lt\n\t" \
    "movlt " a ", " b "\n\t"

_Static_assert(offsetof(rows_t, skipped) == 4 && offsetof(rows_t, end) == 8 &&
               offsetof(rows_t, sums) == 12 && offsetof(rows_t, last) == 16 &&
               offsetof(rows_t, next_row) == 20 && offsetof(rows_t, at) == 24 &&
               offsetof(rows_t, neighbours) == 28 && offsetof(rows_t, start) == 32,
               "as the code below reads it");

static ASSEMBLY void sum_rows(ARGUMENT rows_t *rows, ARGUMENT const uint32_t *at)
{
    __asm__ volatile(
        "push {r0, r1, r4-r11, lr}\n\t"
        "1:\n\t"
        "ldrd r4, r5, [r0, #32]\n\t"
        "ldm r0, {r0, r3, lr}\n\t"
        "mov r6, r4\n\t"
        "mov r7, r5\n\t"
        "mov r8, r4\n\t"
        "mov r9, r5\n\t"
        "mov r10, r4\n\t"
        "mov r11, r5\n\t"
        "adr r12, 2f\n\t"
        "add r12, r12, r3\n\t"
        "bx r12\n\t"
        ".balign 4\n\t"
        "2:\n\t" STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7)
        STEP(8) STEP(9) STEP(10) STEP(11)
        ".if (. - 2b) - " NUMBER(UNROLLED) " * " NUMBER(STEP_BYTES) "\n\t"
        ".error \"STEP_BYTES\"\n\t"
        ".endif\n\t"
        "add r0, r0, #2 * " NUMBER(UNROLLED) "\n\t"
        "cmp r0, lr\n\t"
        "bne 2b\n\t"
        "ldr r12, [sp]\n\t"
        "ldr lr, [r12, #12]\n\t"
        SPLIT("r0", "r4", "r5") SPLIT("r2", "r6", "r7")
        "ldr r7, [r12, #28]\n\t"
        SPLIT("r3", "r8", "r9") SPLIT("r5", "r10", "r11")
        "cbz r7, 3f\n\t"
        LARGER("r0", "r2") LARGER("r3", "r5") LARGER("r4", "r6") LARGER("r8", "r10")
        "strd r0, r3, [lr], #16\n\t"
        "strd r4, r8, [lr, #-8]\n\t"
        "4:\n\t"
        "ldrd r2, r3, [r12, #16]\n\t"
        "str lr, [r12, #12]\n\t"
        "str r1, [r12, #24]\n\t"
        "ldr r1, [sp, #4]\n\t"
        "add r1, r1, r3\n\t"
        "mov r0, r12\n\t"
        "cmp lr, r2\n\t"
        "bne 1b\n\t"
        "pop {r0, r1, r4-r11, pc}\n\t"
        "3:\n\t"
        "strd r3, r5, [lr, #8]\n\t"
        "strd r4, r6, [lr, #16]\n\t"
        "strd r8, r10, [lr, #24]\n\t"
        "strd r0, r2, [lr], #32\n\t"
        "b 4b\n\t");
}
#undef STEP
#undef SPLIT
#undef LARGER
#else
static void sum_rows(rows_t *rows, const uint32_t *at)
{
    for (; rows->sums != rows->last; at += rows->next_row / 4) {
        int32_t sums[8];  /* [2 halves][4] */
        int64_t words[4] = {rows->start, rows->start, rows->start, rows->start};
        rows->at = at;
        const uint8_t *entry = (const uint8_t *)(rows->entry + rows->skipped / STEP_BYTES * 2u);
        for (; entry != rows->end; entry += 2) {
            rows->at += entry[0];
            for (int i = 0; i < 4; i++) words[i] += (int64_t)rows->at[i] * (int8_t)entry[1];
        }
        for (int i = 0; i < 4; i++) {
            int64_t sign = 1 << (LANE - 1), right = (words[i] + sign) >> LANE;
            sums[i] = (int32_t)(words[i] - right * (2 * sign));
            sums[4 + i] = (int32_t)right;
        }
        if (rows->neighbours) keep_larger(sums, 8);
        for (int i = 0; i < (rows->neighbours ? 4 : 8); i++) *rows->sums++ = sums[i];
    }
}
#endif

/* sum_rows of a channel of more than MOST entries. */
static __attribute__((noinline)) void sum_parts(rows_t *rows, const uint32_t *at, int32_t *sums)
{
    int32_t part[16];
    int count = 8 * rows->rows;
    rows->neighbours = 0;
    for (int i = 0; i < count; i++) sums[i] = rows->offset;
    for (const uint8_t *entry = rows->first, *stop; entry != rows->behind; entry = stop) {
        stop = rows->behind - entry > 2 * MOST ? entry + 2 * MOST : rows->behind;
        take(rows, entry, stop);
        rows->start = 0, rows->sums = part, rows->last = part + count;
        sum_rows(rows, at);
        for (int i = 0; i < count; i++) sums[i] += part[i];
        at = rows->at - (rows->rows - 1) * (rows->next_row / 4);
    }
    if (rows->pool) keep_larger(sums, count);
}

/* sums[rows][2 halves][4] of a channel, under a pool [rows][2 halves][2]. */
static inline void sum_channel(rows_t *rows, const uint32_t *at, int32_t *sums)
{
    if (rows->behind - rows->first > 2 * MOST) {
        sum_parts(rows, at, sums);
        return;
    }
    rows->sums = sums;
    sum_rows(rows, at);
}

static inline uint8_t window(scale_t scale, const int32_t *upper)
{
    const int32_t *lower = upper + 4;
    return (uint8_t)requantize(scale, larger(*upper, *lower));
}

/* Copies entries into scratch, where no read waits, COPIED bytes at once. */
static inline void copy(const uint8_t *entries, int bytes, uint8_t *to)
{
    for (uint8_t *end = to + bytes; to < end; to += COPIED, entries += COPIED) {
        uint32_t w0 = load_word(entries), w1 = load_word(entries + 4);
        uint32_t w2 = load_word(entries + 8), w3 = load_word(entries + 12);
        store_word(to, w0), store_word(to + 4, w1), store_word(to + 8, w2), store_word(to + 12, w3);
    }
}

/* Sets `rows` to an output channel whose sums go to `sums`. */
static inline void take_channel(const conv_t *layer, int channel, rows_t *rows, int32_t *sums)
{
    const uint32_t *starts = layer->starts + channel;
    const uint8_t *first = layer->entries + starts[0];
    int bytes = (int)(starts[1] - starts[0]);
    if (rows->near && bytes <= 2 * MOST) {
        copy(first, bytes, rows->near);
        first = rows->near;
    }
    rows->first = first, rows->behind = first + bytes, rows->neighbours = rows->pool;
    rows->last = sums + (rows->pool ? 4 : 8) * rows->rows;
    rows->offset = offset_of(&layer->requantize, channel);
    rows->start = rows->offset * ((1 << LANE) + (int64_t)1);
    take(rows, rows->first, rows->behind);
}

/* Writes those of four windows, two of each half, that a row has: of it `right` positions are left to the
 * right, `right + half` to the left. */
static __attribute__((noinline)) void put_some_windows(scale_t scale, const int32_t *sums, int right,
                                                       int half, int step, int far, uint8_t *to)
{
    for (int i = 0; i < 4; i++) {
        int left = right + (i < 2 ? half : 0) - 2 * (i & 1);
        if (left >= 2) to[(i & 1) * step + (i >> 1) * far] = window(scale, sums + i);
    }
}

/* Writes a row of windows. */
static __attribute__((noinline)) void put_windows(const conv_t *layer, rows_t *rows,
                                                  const uint32_t *scratch, uint8_t *out)
{
    int32_t sums[16];  /* [2 rows][2 halves][2], and room for a long channel's before */
    int width = layer->out_width, half = half_of(width), step = layer->outputs, far = half / 2 * step;
    for (int channel = 0; channel < step; channel++, out++) {
        scale_t scale = scale_of(&layer->requantize, channel);
        const uint32_t *band = scratch;
        uint8_t *to = out;
        take_channel(layer, channel, rows, sums);
        for (int right = width - half; right > width - 2 * half; right -= 4, band += 4, to += 2 * step) {
            sum_channel(rows, band, sums);
            if (right < 4) {
                put_some_windows(scale, sums, right, half, step, far, to);
                continue;
            }
            to[0] = window(scale, sums), to[step] = window(scale, sums + 1);
            to[far] = window(scale, sums + 2), to[far + step] = window(scale, sums + 3);
        }
    }
}

/* `put` with an addition behind it. */
static __attribute__((noinline)) void put_added(const conv_t *layer, scale_t scale,
                                                const int32_t *sums, int count,
                                                const uint8_t *residual, uint8_t *out)
{
    const add_t add = *layer->add;
    int step = layer->outputs;
    for (int i = 0; i < 4 && i < count; i++, out += step, residual += step)
        *out = (uint8_t)add_bytes(&add, requantize(scale, sums[i]), *residual);
}

/* Writes four positions of a row, or the `count` that are left of it. */
static inline void put(scale_t scale, const int32_t *sums, int count, int step, uint8_t *out)
{
    for (int i = 0; i < 4 && i < count; i++, out += step) *out = (uint8_t)requantize(scale, sums[i]);
}

/* Writes one row of positions, or two. */
static __attribute__((noinline)) void put_rows(const conv_t *layer, rows_t *rows,
                                               const uint32_t *scratch, const uint8_t *residual,
                                               uint8_t *out)
{
    int32_t sums[16];  /* [2 rows][2 halves][4] */
    int width = layer->out_width, half = half_of(width), step = layer->outputs;
    for (int channel = 0; channel < step; channel++) {
        scale_t scale = scale_of(&layer->requantize, channel);
        take_channel(layer, channel, rows, sums);
        for (int x = 0; x < half; x += 4) {
            sum_channel(rows, scratch + x, sums);
            for (int part = 0; part < 2 * rows->rows; part++) {
                int from = x + (part & 1) * half, at = (part / 2 * width + from) * step + channel;
                if (residual)
                    put_added(layer, scale, sums + 4 * part, width - from, residual + at, out + at);
                else
                    put(scale, sums + 4 * part, width - from, step, out + at);
            }
        }
    }
}

void conv_sparse(const conv_t *layer, const uint8_t *in, const uint8_t *residual, uint8_t *out,
                 void *scratch)
{
    int height = layer->out_height, line = layer->out_width * layer->outputs;
    rows_t rows;
    int words = layer->stride_x * columns_of(layer);  /* of a row of the band */
    rows.next_row = 4 * layer->stride_y * words, rows.pool = layer->pool;
    rows.near = half_of(layer->out_width) > 4
                    ? (uint8_t *)scratch + 4 * layer->inputs * rows_of(layer) * words : NULL;
    for (int y = 0; y + layer->pool < height; y += 2) {
        pack_band(layer, in, y, y ? keep_rows(layer, scratch) : 0, scratch);
        rows.rows = smaller(height - y, 2);
        if (layer->pool)
            put_windows(layer, &rows, scratch, out + y / 2 * (layer->out_width / 2) * layer->outputs);
        else
            put_rows(layer, &rows, scratch, residual ? residual + y * line : NULL, out + y * line);
    }
}
