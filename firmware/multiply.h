/* The inner product that the dense convolutions share. */
#ifndef MULTIPLY_H
#define MULTIPLY_H

#include "simd.h"

/* sums[2][4] = start[2] + a[pairs][2] . b[pairs][4], each word a pair of int16; pairs is even. */
static inline __attribute__((always_inline)) void multiply_2x4(const pair_t *a, const pair_t *b,
                                                               int pairs, int32_t first,
                                                               int32_t second, int32_t *sums)
{
    int32_t s0 = first, s1 = first, s2 = first, s3 = first;
    int32_t s4 = second, s5 = second, s6 = second, s7 = second;
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

#endif
