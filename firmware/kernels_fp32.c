/* FP32 kernels: see kernels_fp32.h. */
#include "kernels_fp32.h"

static inline float larger(float a, float b) { return a > b ? a : b; }

/* band[4 rows][width + 2][inputs]: the zero-padded rows under one row of pooling windows. */
static void pack_band(const conv_fp32_t *layer, const float *in, int window_row, float *band)
{
    int length = layer->width * layer->inputs;
    for (int row = 0; row < 4; row++) {
        int y = 2 * window_row + row - 1;
        const float *from = in + y * length;
        for (int i = 0; i < layer->inputs; i++) *band++ = 0;
        for (int i = 0; i < length; i++) *band++ = y >= 0 && y < layer->height ? from[i] : 0;
        for (int i = 0; i < layer->inputs; i++) *band++ = 0;
    }
}

void conv_fp32(const conv_fp32_t *layer, const float *in, float *out, float *scratch)
{
    int c_count = layer->inputs, outputs = layer->outputs, windows = layer->width / 2;
    int row = (layer->width + 2) * c_count;
    for (int y = 0; y < layer->height / 2; y++) {
        pack_band(layer, in, y, scratch);
        for (int o = 0; o < outputs; o += 4) {
            for (int x = 0; x < windows; x++) {
                const float *w = layer->weights + o * 9 * c_count;
                float a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
                float c0 = 0, c1 = 0, c2 = 0, c3 = 0, d0 = 0, d1 = 0, d2 = 0, d3 = 0;
                for (int ky = 0; ky < 3; ky++) {
                    const float *a = scratch + ky * row + 2 * x * c_count, *b = a + c_count;
                    const float *c = a + row, *d = c + c_count, *end = a + 3 * c_count;
                    for (; a != end; w += 4) {
                        float va = *a++, vb = *b++, vc = *c++, vd = *d++;
                        a0 += va * w[0], a1 += va * w[1], a2 += va * w[2], a3 += va * w[3];
                        b0 += vb * w[0], b1 += vb * w[1], b2 += vb * w[2], b3 += vb * w[3];
                        c0 += vc * w[0], c1 += vc * w[1], c2 += vc * w[2], c3 += vc * w[3];
                        d0 += vd * w[0], d1 += vd * w[1], d2 += vd * w[2], d3 += vd * w[3];
                    }
                }
                float largest[4] = {larger(larger(a0, b0), larger(c0, d0)),
                                    larger(larger(a1, b1), larger(c1, d1)),
                                    larger(larger(a2, b2), larger(c2, d2)),
                                    larger(larger(a3, b3), larger(c3, d3))};
                for (int i = 0; i < 4 && o + i < outputs; i++)
                    out[(y * windows + x) * outputs + o + i] =
                        larger(largest[i] + layer->bias[o + i], 0);
            }
        }
    }
}

void linear_fp32(const linear_fp32_t *layer, const float *in, float *out)
{
    const float *w = layer->weights;
    for (int o = 0; o < layer->outputs; o += 4) {
        float sums[4], s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (int i = 0; i < layer->inputs; i++, w += 4) {
            float value = in[i];
            s0 += value * w[0], s1 += value * w[1], s2 += value * w[2], s3 += value * w[3];
        }
        sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
        for (int i = 0; i < 4 && o + i < layer->outputs; i++) {
            float sum = sums[i] + layer->bias[o + i];
            out[o + i] = layer->relu ? larger(sum, 0) : sum;
        }
    }
}
