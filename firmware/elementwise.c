/* What works on a map value by value; `out` may be an input. */
#include "layers.h"
#include "requantize.h"

void add(const add_layer_t *layer, const uint8_t *a, const uint8_t *b, uint8_t *out)
{
    const add_t scales = layer->scales;
    for (const uint8_t *end = a + layer->count; a != end;)
        *out++ = (uint8_t)add_bytes(&scales, *a++, *b++);
}

void clamp(const clamp_t *layer, const uint8_t *in, uint8_t *out)
{
    int low = layer->low, high = layer->high;
    for (const uint8_t *end = in + layer->count; in != end;)
        *out++ = (uint8_t)smaller(larger(*in++, low), high);
}

void flip_signs(const uint8_t *in, uint8_t *out, int count)
{
    int i = 0;
    for (; i + 4 <= count; i += 4) store_word(out + i, load_word(in + i) ^ 0x80808080);
    for (; i < count; i++) out[i] = in[i] ^ 128;
}
