/* The inner products that the dense convolutions share. */
#ifndef MULTIPLY_H
#define MULTIPLY_H

#include "simd.h"

/* `count` products in turn. */
typedef struct {
    const int32_t *starts;       /* [2][4], where each product's sums begin */
    int32_t bytes;               /* of a in one product: 16 a word */
    int32_t skipped;             /* bytes of code, set by multiply_2x4 */
    int32_t *sums;               /* [count][2][4] */
    int32_t next_a, next_b;      /* bytes from the end of a product's values to the next one's */
    int32_t count;
} products_t;

/* sums[2][4] = starts + a[2 * words][2] . b[2 * words][4], each word of a and b a pair of int16, and so
 * on for every product; words >= 1.
 *
 * In assembly because its 14 registers are all there are, and gcc spills: 11 instructions for 16
 * multiplications. It enters a loop of four words so that the last round is whole. */
#if defined(__ARM_FEATURE_SIMD32) && defined(__ARM_FP) && defined(__thumb2__)
#define STEP \
    "ldrd r2, r3, [r0], #8\n\t" \
    "ldrd r12, lr, [r1], #8\n\t" \
    "smlad r4, r2, r12, r4\n\t" \
    "smlad r8, r3, r12, r8\n\t" \
    "smlad r5, r2, lr, r5\n\t" \
    "smlad r9, r3, lr, r9\n\t" \
    "ldrd r12, lr, [r1], #8\n\t" \
    "smlad r6, r2, r12, r6\n\t" \
    "smlad r10, r3, r12, r10\n\t" \
    "smlad r7, r2, lr, r7\n\t" \
    "smlad r11, r3, lr, r11\n\t"

static ASSEMBLY void multiply_2x4(ARGUMENT const pair_t *a, ARGUMENT const pair_t *b,
                                  ARGUMENT products_t *products)
{
    __asm__ volatile(
        "push {r2, r4-r11, lr}\n\t"
        "ldr r3, [r2, #4]\n\t"
        "rsb r3, r3, #0\n\t"
        "ubfx r3, r3, #4, #2\n\t"  /* words of the loop to leave out at first */
        "mov r12, #88\n\t"         /* bytes of code a word takes */
        "mul r3, r3, r12\n\t"
        "adr r12, 2f\n\t"
        "add r3, r3, r12\n\t"
        "orr r3, r3, #1\n\t"
        "str r3, [r2, #8]\n\t"
        "1:\n\t"
        "ldr r3, [sp]\n\t"
        "ldrd r2, r12, [r3]\n\t"
        "ldm r2, {r4-r11}\n\t"
        "add r12, r12, r0\n\t"
        "vmov s0, r12\n\t"         /* the end of a */
        "ldr r2, [r3, #8]\n\t"
        "bx r2\n\t"
        ".balign 4\n\t"
        "2:\n\t" STEP STEP STEP STEP STEP STEP STEP STEP
        "vmov r2, s0\n\t"
        "cmp r0, r2\n\t"
        "bne 2b\n\t"
        "ldr r3, [sp]\n\t"
        "ldr r2, [r3, #12]\n\t"
        "stm r2!, {r4-r11}\n\t"
        "str r2, [r3, #12]\n\t"
        "ldrd r2, r12, [r3, #16]\n\t"
        "add r0, r0, r2\n\t"
        "add r1, r1, r12\n\t"
        "ldr r2, [r3, #24]\n\t"
        "subs r2, r2, #1\n\t"
        "str r2, [r3, #24]\n\t"
        "bne 1b\n\t"
        "pop {r2, r4-r11, pc}\n\t");
}
#undef STEP
#else
static inline void multiply_2x4(const pair_t *a, const pair_t *b, products_t *p)
{
    for (; p->count; p->count--, p->sums += 8, a += p->next_a / 4, b += p->next_b / 4) {
        for (int i = 0; i < 8; i++) p->sums[i] = p->starts[i];
        for (const pair_t *end = a + p->bytes / 4; a != end; a += 2, b += 4)
            for (int i = 0; i < 4; i++) {
                p->sums[i] = mac_pairs(a[0], b[i], p->sums[i]);
                p->sums[4 + i] = mac_pairs(a[1], b[i], p->sums[4 + i]);
            }
    }
}
#endif

#endif
