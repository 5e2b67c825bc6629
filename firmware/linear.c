/* Linear layers, dense and by their non-zero weights. */
#include "layers.h"
#include "requantize.h"

/* A halfword of weights is 256 * upper + lower, exactly, for the rows o and o + 1. So one SMLAD on the
 * word itself sums both rows, one on its sign-extended low bytes sums the lower row alone, and the
 * difference is 256 times the upper row: right modulo 2^32 while |sum of the upper row| < 2^23, which
 * 256 inputs of at most 255 * 127 cannot reach. */
#define UPPER_ROW_INPUTS 256

void linear_dense(const linear_t *layer, const uint8_t *in, uint8_t *out, void *scratch)
{
    int quads = CEIL_DIV(layer->inputs, 4);
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
            const two_pairs_t *end = last - value > UPPER_ROW_INPUTS / 4
                                         ? value + UPPER_ROW_INPUTS / 4 : last;
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
            out[o + i] = (uint8_t)requantize(scale_of(&layer->requantize, o + i),
                                             sums[i] + offset_of(&layer->requantize, o + i));
    }
}

void linear_sparse(const linear_t *layer, const uint8_t *in, uint8_t *out)
{
    for (int o = 0; o < layer->outputs; o++) {
        const uint8_t *entry = layer->entries + layer->starts[o];
        const uint8_t *end = layer->entries + layer->starts[o + 1];
        const uint8_t *at = in;
        int32_t sum = offset_of(&layer->requantize, o);
#define STEP at += *entry++, sum += *at * (int8_t)*entry++;
        if ((end - entry) & 2) {
            STEP
        }
        if ((end - entry) & 4) {
            STEP STEP
        }
        while (entry != end) {
            STEP STEP STEP STEP
        }
#undef STEP
        out[o] = (uint8_t)requantize(scale_of(&layer->requantize, o), sum);
    }
}
