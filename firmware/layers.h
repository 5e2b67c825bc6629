/* The kernels that a generated network calls, a step each.
 *
 * Activations are torch's quint8 bytes q, real = (q - zero point) * scale, in H, W, C order; weights
 * are symmetric int8. A kernel sums q * weight exactly in int32, starting from `offset` = -zero point
 * * sum of the weights, padding with the zero point. What leaves is rint((sum + bias) * multiplier) in
 * single precision plus the output's zero point, clamped to 0..255: bias in units of the sum,
 * multiplier = input scale * weight scale / output scale. edgecnn/deploy checks that nothing overflows.
 *
 * Every scratch pointer is aligned to 8 bytes; its size, and where `out` may lie over `in`, are in
 * edgecnn/deploy/kernels.py.
 */
#ifndef LAYERS_H
#define LAYERS_H

#include <stdint.h>

#define CEIL_DIV(n, d) (((n) + (d) - 1) / (d))

/* rint((a - zero_a) * scale_a + (b - zero_b) * scale_b) + zero, clamped; scales over the output's. */
typedef struct {
    float scale_a, scale_b;
    int32_t zero_a, zero_b, zero;
} add_t;

/* A channel each. */
typedef struct {
    const float *multiplier, *bias;
    const int32_t *offset;  /* NULL: zeros */
    int32_t zero;           /* the output's zero point */
} requantize_t;

typedef struct {
    int height, width, inputs;             /* of the input */
    int out_height, out_width, outputs;    /* of the convolution */
    int kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x;
    int pool;               /* 1: the largest of each 2x2 outputs, which then are a quarter as many */
    int block;              /* what stands in scratch at once: groups of four positions (direct), of four
                               tiles (Winograd), channels (depthwise: 1, or 4 of as many filters) */
    uint32_t flip;          /* 0x80808080 where `in` is the image, signed int8 = q - 128 */
    uint32_t zero;          /* the input's zero point, in each of four bytes */
    const int8_t *weights;  /* dense: order by kernel, below */
    const uint8_t *entries; /* sparse: (step, value) bytes, by output channel */
    const uint32_t *starts; /* sparse: outputs + 1 offsets into entries, in bytes */
    requantize_t requantize;
    const add_t *add;       /* with `residual`: adds the output (a) and residual (b) */
} conv_t;

/* `residual` is NULL, or a map of the output's shape; `out` may be `residual`. None with a pool. */

/* Any shape. Weights [outputs][kernel_height * kernel_width * inputs, zero-filled to 4s]. */
void conv_direct(const conv_t *layer, const uint8_t *in, const uint8_t *residual, uint8_t *out,
                 void *scratch);

/* 3x3, stride 1, inputs a multiple of 4, outputs even, not of the image. Weights
 * [outputs][inputs/4][3][3][4]. Winograd F(2x2, 3x3) in exact integers (Lavin and Gray, CVPR 2016,
 * arXiv 1509.09308): 16 multiplications in place of 36, the weights transformed as they are read. */
void conv_winograd(const conv_t *layer, const uint8_t *in, const uint8_t *residual, uint8_t *out,
                   void *scratch);

/* Any shape. A step moves a pointer over the scratch by words; behind the entries 14 bytes more may be
 * read. See conv_sparse.c. */
void conv_sparse(const conv_t *layer, const uint8_t *in, const uint8_t *residual, uint8_t *out,
                 void *scratch);

/* Each channel has outputs / inputs filters of its own. Weights [outputs][kernel_height * kernel_width]. */
void conv_depthwise(const conv_t *layer, const uint8_t *in, const uint8_t *residual, uint8_t *out,
                    void *scratch);

typedef struct {
    int inputs, outputs;
    const int16_t *weights;  /* dense: two rows a halfword, order by linear_dense, below */
    const uint8_t *entries;  /* sparse: as in conv_t */
    const uint32_t *starts;
    requantize_t requantize;
} linear_t;

/* Weights [outputs/4][inputs/4][2][2][2], zero-filled: element (a, b, i, j, k) is output 4a + 2i plus
 * 256 times output 4a + 2i + 1, of input 4b + 2k + j. */
void linear_dense(const linear_t *layer, const uint8_t *in, uint8_t *out, void *scratch);

/* A step moves a pointer over `in` by bytes. */
void linear_sparse(const linear_t *layer, const uint8_t *in, uint8_t *out);

typedef struct {
    int height, width, channels, out_height, out_width;
    int kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x;
    int32_t zero;        /* average: the zero point of both sides */
    float reciprocal;    /* average: 1 / (kernel_height * kernel_width) */
} pool_t;

void max_pool(const pool_t *layer, const uint8_t *in, uint8_t *out);
void avg_pool(const pool_t *layer, const uint8_t *in, uint8_t *out);

typedef struct {
    int count;
    add_t scales;
} add_layer_t;

void add(const add_layer_t *layer, const uint8_t *a, const uint8_t *b, uint8_t *out);

typedef struct {
    int count;
    uint8_t low, high;
} clamp_t;

void clamp(const clamp_t *layer, const uint8_t *in, uint8_t *out);

/* int8 = q - 128 to q and back. */
void flip_signs(const uint8_t *in, uint8_t *out, int count);

#endif
