/* Layers of the deployed network: 3 x (Conv3x3 pad 1 -> ReLU -> MaxPool2), then Linear layers.
 *
 * Activations are bytes u = q - zero_point >= 0 in HWC order, so that 0 is the real zero and the
 * padding; the image alone is signed int8 = q - 128. Weights are symmetric int8. Accumulators are
 * exact int32, and an output is rint((accumulator + bias) * multiplier), clamped, plus `shift`:
 * bias in units of the accumulator, multiplier = input scale * weight scale / output scale.
 * |(accumulator + bias) * multiplier| must stay below 2^22; edgecnn/c_source.py checks that.
 *
 * The same file compiles for a Cortex-M with the DSP extension and, in plain C, for any
 * little-endian host, with identical integers: build it with -ffp-contract=off.
 */
#ifndef KERNELS_H
#define KERNELS_H

#include <stdint.h>

#define CEIL_DIV(n, d) (((n) + (d) - 1) / (d))
#define LARGER(a, b) ((a) > (b) ? (a) : (b))

typedef struct {
    const float *multiplier;     /* an output channel */
    const float *bias;           /* an output channel */
    int32_t low, high, shift;    /* ReLU: 0, 255 - zero point, 0 */
} requantize_t;

typedef struct {
    int height, width, inputs, outputs;  /* of the convolution; its output is half as high and wide */
    int flip, zero;  /* an input byte b stands for (b ^ flip) - zero: 0, 0 or, for an image, 128, q's zero */
    const int8_t *weights;       /* dense: order by kernel, below */
    const uint8_t *entries;      /* sparse: (step, value) bytes, an even number an output channel */
    const uint32_t *starts;      /* sparse: outputs + 1 offsets into entries, in bytes */
    requantize_t requantize;
} conv_t;

typedef struct {
    int inputs, outputs;
    const int16_t *weights;      /* dense: two rows a halfword, order by linear_dense, below */
    const uint8_t *entries;      /* sparse: as in conv_t */
    const uint32_t *masks;       /* bitmap: 32 inputs a word, the first in the highest bit */
    const int8_t *values;        /* bitmap: the non-zeros */
    const uint32_t *starts;      /* outputs + 1 offsets into entries or values */
    requantize_t requantize;
} linear_t;

/* Scratch bytes; every scratch pointer is aligned to 8 bytes. */
#define DIRECT_SCRATCH(width, inputs) \
    (((width) / 2 * 4 + 2) * CEIL_DIV(9 * (inputs), 2) * 4 + 4 * ((width) + 2) * (inputs) * 2)
#define WINOGRAD_TILE_ROWS(width) LARGER(8 / LARGER((width) / 2, 1), 1)
#define WINOGRAD_QUADS(width) CEIL_DIV(WINOGRAD_TILE_ROWS(width) * ((width) / 2), 4)
#define WINOGRAD_SCRATCH(width, inputs) \
    ((16 * WINOGRAD_QUADS(width) * 4 + 16 * 2) * (inputs) * 2 + CEIL_DIV(inputs, 8) * 8)
#define SPARSE_COLUMNS(width) (2 * CEIL_DIV((width) / 2, 2) + 2)
#define SPARSE_SCRATCH(width, inputs) ((inputs) * SPARSE_COLUMNS(width) * 4 * 4)
#define LINEAR_SCRATCH(inputs) (CEIL_DIV(inputs, 4) * 8)

/* `out` may be `in` where outputs <= 2 * inputs: a row is written when its inputs have been read. */

/* Any shape. Weights [outputs][3][3][inputs]. */
void conv_direct(const conv_t *layer, const uint8_t *in, uint8_t *out, void *scratch);

/* inputs a multiple of 4, outputs even, flip and zero 0. Weights [outputs][inputs/4][3][3][4].
 * Winograd F(2x2, 3x3) in exact integers (Lavin and Gray, CVPR 2016, arXiv 1509.09308): 16
 * multiplications in place of 36, the weights transformed as they are read. */
void conv_winograd(const conv_t *layer, const uint8_t *in, uint8_t *out, void *scratch);

/* Any shape. A step moves a pointer over scratch by words; the address of (channel, ky, kx) is
 * channel * 4 * SPARSE_COLUMNS(width) + 4 * kx + ky. A gap above 255 takes entries of value 0. */
void conv_sparse(const conv_t *layer, const uint8_t *in, uint8_t *out, void *scratch);

/* Weights [outputs/4][inputs/4][2][2][2], zero-filled: element (a, b, i, j, k) is output 4a + 2i plus
 * 256 times output 4a + 2i + 1, of input 4b + 2k + j. */
void linear_dense(const linear_t *layer, const uint8_t *in, uint8_t *out, void *scratch);

/* A step moves a pointer over `in` by bytes. */
void linear_sparse(const linear_t *layer, const uint8_t *in, uint8_t *out);

void linear_bitmap(const linear_t *layer, const uint8_t *in, uint8_t *out);

#endif
