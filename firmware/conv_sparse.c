/* Convolution of any shape by its non-zero weights alone, eight positions a weight, two a product.
 *
 * Scratch: band[inputs][rows][stride_x][columns], the zero-point-padded input under two rows of
 * outputs. A word is left + 2^23 * right: the values of an output position of the left half of a row
 * and of the one `half` positions to its right; the columns of one phase of the stride stand side by
 * side, so that four words are four positions. (channel, ky, kx) lies at
 * ((channel * rows + ky) * stride_x + kx % stride_x) * columns + kx / stride_x.
 *
 * A weight times a word, added up in 64 bits (SMLAL), are both sums: the left one in 23 bits, which
 * 128 products of at most 255 * 128 cannot leave, the right one above.
 */
#include <stddef.h>

#include "layers.h"
#include "requantize.h"

#define LANE 23
#define MOST 128      /* entries whose left sums stay within LANE bits */
#define UNROLLED 8    /* entries of a round of the loop in sum_rows */
#define STEP_BYTES 34 /* of its code, an entry */

/* Positions of half a row of outputs, in groups of four. */
static inline int half_of(const conv_t *layer) { return CEIL_DIV(CEIL_DIV(layer->out_width, 2), 4) * 4; }

static inline int columns_of(const conv_t *layer)
{
    return half_of(layer) + (layer->kernel_width - 1) / layer->stride_x;
}

static inline int rows_of(const conv_t *layer) { return layer->kernel_height + layer->stride_y; }

static __attribute__((noinline)) void pack_band(const conv_t *layer, const uint8_t *in, int out_row,
                                                uint32_t *band)
{
    int c_count = layer->inputs, columns = columns_of(layer), step = layer->stride_x;
    int plane = rows_of(layer) * step * columns, half = half_of(layer);
    int whole = c_count & ~3, line = layer->width * c_count;
    uint32_t flip = layer->flip, zero = layer->zero, flips = (flip & 255) | (flip & 255) << LANE;
    uint8_t pad[4];
    store_word(pad, zero ^ flip);
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

/* One output channel's sums of eight positions of a row, and of as many in the next one. */
typedef struct {
    const uint8_t *entry;  /* the first one, less 2 bytes for each that the loop leaves out at first */
    int32_t skipped;       /* bytes of code of those, and 1 */
    const uint8_t *end;
    int32_t *sums;         /* [rows][2 halves][4]; moves on by a row */
    int32_t *last;         /* behind the last row's */
    int32_t next_row;      /* bytes of scratch */
    const uint32_t *at;    /* where the last entry was read */
    int64_t start;         /* what the sums of a word begin with */
} rows_t;

/* At most MOST entries for `rows`. */
static inline void take(rows_t *rows, const uint8_t *entry, const uint8_t *end)
{
    int count = (int)(end - entry) / 2, skipped = count ? -count & (UNROLLED - 1) : UNROLLED;
    rows->entry = entry - 2 * skipped, rows->end = end;
    rows->skipped = STEP_BYTES * skipped + 1;
}

/* In assembly because its 14 registers are all there are, and gcc spills: 9 instructions for 8
 * multiplications. It enters a loop of eight entries so that the last round is whole. */
#if defined(__ARM_FEATURE_SIMD32) && defined(__thumb2__)
#define STEP(entry) \
    "ldrb r3, [r0, #2 * " #entry "]\n\t" \
    "ldrsb r2, [r0, #2 * " #entry " + 1]\n\t" \
    "add r1, r1, r3, lsl #2\n\t" \
    "ldrd r3, r12, [r1]\n\t" \
    "smlal r4, r5, r3, r2\n\t" \
    "smlal r6, r7, r12, r2\n\t" \
    "ldrd r3, r12, [r1, #8]\n\t" \
    "smlal r8, r9, r3, r2\n\t" \
    "smlal r10, r11, r12, r2\n\t"
/* Of one word: its left sum, and its right one in place of its low half. The bit that a negative left
 * sum has borrowed is its sign, which the shift leaves in the carry. */
#define SPLIT(left, low, high) \
    "sbfx " left ", " low ", #0, #23\n\t" \
    "lsrs " low ", " low ", #23\n\t" \
    "orr " low ", " low ", " high ", lsl #9\n\t" \
    "adc " low ", " low ", #0\n\t"

_Static_assert(offsetof(rows_t, start) == 32, "as the code below reads it");

static __attribute__((naked, noinline)) void sum_rows(rows_t *rows, const uint32_t *at)
{
    (void)rows, (void)at;
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
        "add r0, r0, #16\n\t"
        "cmp r0, lr\n\t"
        "bne 2b\n\t"
        "ldr r12, [sp]\n\t"
        "ldr lr, [r12, #12]\n\t"
        SPLIT("r0", "r4", "r5") SPLIT("r2", "r6", "r7")
        "strd r0, r2, [lr], #8\n\t"
        "strd r4, r6, [lr, #8]\n\t"
        SPLIT("r0", "r8", "r9") SPLIT("r2", "r10", "r11")
        "strd r0, r2, [lr], #24\n\t"
        "strd r8, r10, [lr, #-8]\n\t"
        "ldrd r2, r3, [r12, #16]\n\t"
        "str lr, [r12, #12]\n\t"
        "str r1, [r12, #24]\n\t"
        "ldr r1, [sp, #4]\n\t"
        "add r1, r1, r3\n\t"
        "mov r0, r12\n\t"
        "cmp lr, r2\n\t"
        "bne 1b\n\t"
        "pop {r0, r1, r4-r11, pc}\n\t");
}
#undef STEP
#undef SPLIT
#else
static void sum_rows(rows_t *rows, const uint32_t *at)
{
    for (; rows->sums != rows->last; rows->sums += 8, at += rows->next_row / 4) {
        int64_t words[4] = {rows->start, rows->start, rows->start, rows->start};
        rows->at = at;
        for (const uint8_t *entry = rows->entry + rows->skipped / STEP_BYTES * 2; entry != rows->end;
             entry += 2) {
            rows->at += entry[0];
            for (int i = 0; i < 4; i++) words[i] += (int64_t)rows->at[i] * (int8_t)entry[1];
        }
        for (int i = 0; i < 4; i++) {
            int64_t half = 1 << (LANE - 1), right = (words[i] + half) >> LANE;
            rows->sums[i] = (int32_t)(words[i] - right * (2 * half));
            rows->sums[4 + i] = (int32_t)right;
        }
    }
}
#endif

/* sum_rows by any number of entries; rows->start is 0. */
static __attribute__((noinline)) void sum_long_rows(rows_t *rows, const uint8_t *entry,
                                                    const uint8_t *end, int32_t start,
                                                    const uint32_t *at)
{
    int32_t *sums = rows->sums, *last = rows->last, more[16];
    int count = (int)(last - sums);
    for (int i = 0; i < count; i++) sums[i] = start;
    for (const uint8_t *stop; entry != end; entry = stop) {
        stop = end - entry > 2 * MOST ? entry + 2 * MOST : end;
        take(rows, entry, stop);
        rows->sums = more, rows->last = more + count;
        sum_rows(rows, at);
        for (int i = 0; i < count; i++) sums[i] += more[i];
        at = rows->at - (count / 8 - 1) * (rows->next_row / 4);
    }
    rows->last = last;
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

/* Writes four positions of a row, or fewer at its end. */
static inline void put(scale_t scale, const int32_t *sums, int count, int step, uint8_t *out)
{
    for (int i = 0; i < 4 && i < count; i++, out += step) *out = (uint8_t)requantize(scale, sums[i]);
}

/* Writes two windows of two rows of sums, or fewer at its end. */
static inline void put_pooled(scale_t scale, const int32_t *upper, int count, int step, uint8_t *out)
{
    const int32_t *lower = upper + 8;
    for (int i = 0; i < 4 && i + 1 < count; i += 2, out += step)
        *out = (uint8_t)requantize(scale, larger(larger(upper[i], upper[i + 1]),
                                                 larger(lower[i], lower[i + 1])));
}

void conv_sparse(const conv_t *layer, const uint8_t *in, const uint8_t *residual, uint8_t *out,
                 void *scratch)
{
    int outputs = layer->outputs, width = layer->out_width, half = half_of(layer);
    int pool = layer->pool, height = pool ? layer->out_height & ~1 : layer->out_height;
    rows_t rows;
    rows.next_row = 4 * layer->stride_y * layer->stride_x * columns_of(layer);
    int32_t sums[16];  /* [2 rows][2 halves][4] */
    for (int y = 0; y < height; y += 2) {
        pack_band(layer, in, y, scratch);
        rows.last = sums + 8 * smaller(height - y, 2);
        for (int o = 0; o < outputs; o++) {
            const uint8_t *entry = layer->entries + layer->starts[o];
            const uint8_t *end = layer->entries + layer->starts[o + 1];
            int is_long = end - entry > 2 * MOST;
            scale_t scale = scale_of(&layer->requantize, o);
            int32_t start = offset_of(&layer->requantize, o);
            rows.start = is_long ? 0 : start * ((1 << LANE) + (int64_t)1);
            if (!is_long) take(&rows, entry, end);
            const uint32_t *band = scratch;
            for (int x = 0; x < half; x += 4, band += 4) {
                rows.sums = sums;
                if (is_long) sum_long_rows(&rows, entry, end, start, band);
                else sum_rows(&rows, band);
                if (pool) {
                    uint8_t *to = out + (y / 2 * (width / 2) + x / 2) * outputs + o;
                    put_pooled(scale, sums, width - x, outputs, to);
                    put_pooled(scale, sums + 4, width - x - half, outputs, to + half / 2 * outputs);
                    continue;
                }
                int at = (y * width + x) * outputs + o;
                for (int part = 0; part < 4; part++) {  /* the sides of a row, and the next one's */
                    int from = x + (part & 1) * half, place = at + (part & 1) * half * outputs;
                    if (part >= 2) place += width * outputs;
                    if (part >= 2 && y + 1 == height) break;
                    if (residual)
                        put_added(layer, scale, sums + 4 * part, smaller(width - from, 4),
                                  residual + place, out + place);
                    else
                        put(scale, sums + 4 * part, width - from, outputs, out + place);
                }
            }
        }
    }
}
