/* Two 16-bit lanes in a word, and rounding: what the kernels share.
 *
 * With the DSP extension of a Cortex-M these are single instructions; elsewhere plain C with the same
 * integers, for any little-endian processor, with gcc or clang.
 */
#ifndef SIMD_H
#define SIMD_H

#include <stdint.h>

typedef uint32_t pair_t;                                             /* low lane, high lane */
typedef int16_t __attribute__((may_alias)) halfword_t;               /* one lane */
typedef uint64_t __attribute__((may_alias)) two_pairs_t;             /* one LDRD */
typedef uint32_t __attribute__((may_alias, aligned(1))) unaligned_t; /* one LDR at any address */

/* A function that is one block of assembly, to which a compiler may add nothing. */
#if defined(__clang__)
#define ASSEMBLY __attribute__((naked, noinline))
#elif __GNUC__ >= 11
#define ASSEMBLY __attribute__((naked, noipa, no_instrument_function, no_stack_protector))
#else
#define ASSEMBLY __attribute__((naked, noinline, no_instrument_function))
#endif
#define ARGUMENT __attribute__((unused))  /* which the assembly finds in its register */

static inline uint32_t load_word(const void *bytes) { return *(const unaligned_t *)bytes; }
static inline void store_word(void *bytes, uint32_t word) { *(unaligned_t *)bytes = word; }

/* Two pairs to an address aligned to 8 bytes: one STRD. */
static inline void store_two(pair_t *to, pair_t first, pair_t second)
{
    *(two_pairs_t *)to = first | (uint64_t)second << 32;
}

static inline pair_t make_pair(int32_t low, int32_t high)
{
    return ((uint32_t)low & 0xffff) | (uint32_t)high << 16;
}

#if defined(__ARM_FEATURE_SIMD32)
#include <arm_acle.h>

static inline int32_t mac_pairs(pair_t a, pair_t b, int32_t sum) { return __smlad(a, b, sum); }
/* One lane of a by one lane of b. */
static inline int32_t mac_high(pair_t a, int32_t b, int32_t sum) { return __smlatb(a, b, sum); }
static inline int32_t mac_low_high(pair_t a, pair_t b, int32_t s) { return __smlabt(a, b, s); }
static inline pair_t add_pairs(pair_t a, pair_t b) { return __sadd16(a, b); }
static inline pair_t subtract_pairs(pair_t a, pair_t b) { return __ssub16(a, b); }
/* Bytes 0 and 2 (even), 1 and 3 (odd) of a word. */
static inline pair_t signed_even(uint32_t bytes) { return __sxtb16(bytes); }
static inline pair_t unsigned_even(uint32_t bytes) { return __uxtb16(bytes); }

/* (low lane of a, low lane of b), (high lane of a, high lane of b). */
static inline pair_t low_lanes(pair_t a, pair_t b)
{
    pair_t lanes;
    __asm__("pkhbt %0, %1, %2, lsl #16" : "=r"(lanes) : "r"(a), "r"(b));
    return lanes;
}

static inline pair_t high_lanes(pair_t a, pair_t b)
{
    pair_t lanes;
    __asm__("pkhtb %0, %1, %2, asr #16" : "=r"(lanes) : "r"(b), "r"(a));
    return lanes;
}

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

/* The larger of each of four unsigned bytes. */
static inline uint32_t larger_bytes(uint32_t a, uint32_t b)
{
    __usub8(a, b);
    return __sel(a, b);
}

static inline int32_t saturate_byte(int32_t n) { return (int32_t)__usat(n, 8); }

/* gcc makes no LDRD of two words that are aligned to 4 bytes only. */
#define LOAD_TWO(first, second, address, words) \
    __asm__("ldrd %0, %1, [%2, %3]" : "=&r"(first), "=r"(second) \
            : "r"(address), "i"(4 * (words)), "m"(*(const pair_t(*)[2])((address) + (words))))
#else
static inline pair_t low_lanes(pair_t a, pair_t b) { return (a & 0xffff) | b << 16; }
static inline pair_t high_lanes(pair_t a, pair_t b) { return a >> 16 | (b & 0xffff0000); }
static inline int32_t low_of(pair_t a) { return (int16_t)a; }
static inline int32_t high_of(pair_t a) { return (int16_t)(a >> 16); }
static inline int32_t mac_high(pair_t a, int32_t b, int32_t s) { return s + high_of(a) * (int16_t)b; }

static inline int32_t mac_low_high(pair_t a, pair_t b, int32_t s)
{
    return s + low_of(a) * high_of(b);
}

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

static inline uint32_t larger_bytes(uint32_t a, uint32_t b)
{
    uint32_t larger = 0;
    for (int i = 0; i < 32; i += 8) {
        uint32_t x = a >> i & 255, y = b >> i & 255;
        larger |= (x > y ? x : y) << i;
    }
    return larger;
}

static inline int32_t saturate_byte(int32_t n) { return n < 0 ? 0 : n > 255 ? 255 : n; }

#define LOAD_TWO(first, second, address, words) \
    ((first) = (address)[words], (second) = (address)[(words) + 1])
#endif

static inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
static inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

/* a * b rounded to single precision, whatever the compiler may do to a product and a sum behind it. */
static inline float rounded_product(float a, float b)
{
    float product = a * b;
#if defined(__ARM_FP) && !defined(__aarch64__)
    __asm__("" : "+t"(product));
#else
    __asm__("" : "+m"(product));
#endif
    return product;
}

/* To the nearest integer, ties to even; |x| < 2^22. */
static inline int32_t round_even(float x)
{
#if defined(__ARM_FP) && !defined(__aarch64__)
    union { float real; int32_t bits; } n;
    __asm__("vcvtr.s32.f32 %0, %1" : "=t"(n.real) : "t"(x));  /* by FPSCR's mode, at reset this one */
    return n.bits;
#else
    union { float real; int32_t bits; } scaled, magic = {12582912.0f};  /* 1.5 * 2^23 */
    scaled.real = x + magic.real;
    return scaled.bits - magic.bits;
#endif
}

#endif
