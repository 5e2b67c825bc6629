/* From an exact sum to the byte that leaves; see layers.h. */
#ifndef REQUANTIZE_H
#define REQUANTIZE_H

#include "layers.h"
#include "simd.h"

/* One channel's constants, in registers: a store of bytes might alias the arrays. */
typedef struct {
    float multiplier, bias;
    int32_t zero;
} scale_t;

static inline scale_t scale_of(const requantize_t *r, int channel)
{
    return (scale_t){r->multiplier[channel], r->bias[channel], r->zero};
}

static inline int32_t offset_of(const requantize_t *r, int channel)
{
    return r->offset ? r->offset[channel] : 0;
}

static inline int32_t requantize(scale_t scale, int32_t sum)
{
    float real = rounded_product((float)sum + scale.bias, scale.multiplier);
    return saturate_byte(round_even(real) + scale.zero);
}

static inline int32_t add_bytes(const add_t *add, int32_t a, int32_t b)
{
    float left = rounded_product((float)(a - add->zero_a), add->scale_a);
    float right = rounded_product((float)(b - add->zero_b), add->scale_b);
    return saturate_byte(round_even(left + right) + add->zero);
}

#endif
