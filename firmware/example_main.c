/* Classifies a picture on the host: cc *.c && ./a.out picture.ppm
 *
 * Takes binary PPM (colour) or PGM (grey) files of 8 bits a value, of exactly the size that the network
 * wants. In a firmware, call image_from_pixels and infer as main does, with pixels from a camera. */
#include <stdio.h>
#include <stdlib.h>

#include "model.h"

/* The next number of a header, after blanks and comments; -1 where there is none. */
static int read_number(FILE *file)
{
    int c = getc(file), number = 0, digits = 0;
    while (c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '#') {
        if (c == '#')
            while (c != '\n' && c != EOF) c = getc(file);
        else
            c = getc(file);
    }
    for (; c >= '0' && c <= '9' && digits < 6; digits++, c = getc(file)) number = 10 * number + c - '0';
    return digits ? number : -1;
}

static int fail(const char *path, const char *problem)
{
    fprintf(stderr, "%s: %s; give a binary %s of %d x %d pixels, 8 bits a value\n", path, problem,
            IMAGE_CHANNELS == 3 ? "PPM (P6)" : "PGM (P5)", IMAGE_WIDTH, IMAGE_HEIGHT);
    return EXIT_FAILURE;
}

int main(int count, char **arguments)
{
    static uint8_t pixels[IMAGE_VALUES];
    static int8_t image[IMAGE_VALUES], logits[LOGITS];
    if (count != 2) {
        fprintf(stderr, "usage: %s picture.%s\n", arguments[0], IMAGE_CHANNELS == 3 ? "ppm" : "pgm");
        return EXIT_FAILURE;
    }
    FILE *file = fopen(arguments[1], "rb");
    if (file == NULL) return fail(arguments[1], "cannot be read");
    int p = getc(file), kind = getc(file);
    if (p != 'P' || kind != (IMAGE_CHANNELS == 3 ? '6' : '5'))
        return fclose(file), fail(arguments[1], "is another kind of file");
    int width = read_number(file), height = read_number(file), most = read_number(file);
    if (width != IMAGE_WIDTH || height != IMAGE_HEIGHT || most != 255)
        return fclose(file), fail(arguments[1], "has another size");
    size_t read = fread(pixels, 1, sizeof pixels, file);
    fclose(file);
    if (read != sizeof pixels) return fail(arguments[1], "ends early");
    image_from_pixels(pixels, image);
    infer(image, logits);
    int best = 0;
    for (int i = 1; i < LOGITS; i++)
        if (logits[i] > logits[best]) best = i;
    for (int i = 0; i < LOGITS; i++)
        printf("%s %-24s %9.4f\n", i == best ? "->" : "  ", class_names[i],
               (double)((float)(logits[i] - (LOGITS_ZERO_POINT)) * LOGITS_SCALE));
    return EXIT_SUCCESS;
}
