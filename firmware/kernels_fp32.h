/* The same layers in single precision; activations in HWC order. */
#ifndef KERNELS_FP32_H
#define KERNELS_FP32_H

typedef struct {
    int height, width, inputs, outputs;  /* of the convolution; its output is half as high and wide */
    const float *weights;                /* [outputs/4][3][3][inputs][4 outputs], zero-filled */
    const float *bias;
} conv_fp32_t;

typedef struct {
    int inputs, outputs, relu;
    const float *weights;                /* [outputs/4][inputs][4 outputs], zero-filled */
    const float *bias;
} linear_fp32_t;

/* Scratch floats. */
#define CONV_FP32_SCRATCH(width, inputs) (4 * ((width) + 2) * (inputs))
#define LARGER(a, b) ((a) > (b) ? (a) : (b))

/* Conv3x3 pad 1 -> ReLU -> MaxPool2. `out` may be `in` where outputs <= 2 * inputs. */
void conv_fp32(const conv_fp32_t *layer, const float *in, float *out, float *scratch);
void linear_fp32(const linear_fp32_t *layer, const float *in, float *out);

#endif
