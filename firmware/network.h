/* What the generated weights file (weights.c) provides. */
#ifndef NETWORK_H
#define NETWORK_H

#include <stdint.h>

#ifdef NETWORK_FP32
typedef float value_t;   /* image: normalized pixels; logits: real */
#else
typedef int8_t value_t;  /* image: its quantized pixels less 128; logits: likewise */
#endif

#define IMAGE_VALUES (32 * 32 * 3)
#define LOGITS 10

/* image[32][32][3], logits[10]. Not reentrant: activations are static. */
void infer(const value_t *image, value_t *logits);

#endif
