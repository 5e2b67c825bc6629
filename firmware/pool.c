/* Pooling of a map, channels side by side. */
#include "layers.h"
#include "requantize.h"

/* The part of a window that lies inside: first and last + 1. */
typedef struct {
    int first, last;
} span_t;

static inline span_t span(int start, int kernel, int side)
{
    return (span_t){larger(start, 0), smaller(start + kernel, side)};
}

void max_pool(const pool_t *layer, const uint8_t *in, uint8_t *out)
{
    int channels = layer->channels, row = layer->width * channels, whole = channels & ~3;
    for (int y = 0; y < layer->out_height; y++) {
        span_t ys = span(y * layer->stride_y - layer->pad_y, layer->kernel_height, layer->height);
        for (int x = 0; x < layer->out_width; x++, out += channels) {
            span_t xs = span(x * layer->stride_x - layer->pad_x, layer->kernel_width, layer->width);
            for (int c = 0; c < channels; c += c < whole ? 4 : 1) {
                uint32_t most = 0;
                for (int i = ys.first; i < ys.last; i++) {
                    const uint8_t *from = in + i * row + xs.first * channels + c;
                    for (int j = xs.first; j < xs.last; j++, from += channels)
                        most = larger_bytes(most, c < whole ? load_word(from) : *from);
                }
                if (c < whole)
                    store_word(out + c, most);
                else
                    out[c] = (uint8_t)most;
            }
        }
    }
}

void avg_pool(const pool_t *layer, const uint8_t *in, uint8_t *out)
{
    int channels = layer->channels, row = layer->width * channels;
    int32_t start = -layer->zero * layer->kernel_height * layer->kernel_width;
    for (int y = 0; y < layer->out_height; y++) {
        for (int x = 0; x < layer->out_width; x++) {
            const uint8_t *corner = in + y * layer->stride_y * row + x * layer->stride_x * channels;
            for (int c = 0; c < channels; c++) {
                int32_t sum = start;
                for (int i = 0; i < layer->kernel_height; i++) {
                    const uint8_t *from = corner + i * row + c;
                    for (int j = 0; j < layer->kernel_width; j++, from += channels) sum += *from;
                }
                float mean = rounded_product((float)sum, layer->reciprocal);
                *out++ = (uint8_t)saturate_byte(round_even(mean) + layer->zero);
            }
        }
    }
}
