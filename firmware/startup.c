/* Start-up, semihosting and measurement for the emulated boards; a product brings its own.
 *
 * Runs `infer` on every image of the file images.bin, writes the logits to logits.bin, and prints
 * one line: SysTick ticks of the first inference, and the bytes of stack used by all of them.
 */
#include <stddef.h>
#include <stdint.h>

#include "model.h"

extern uint32_t stack_limit[], stack_top[], bss_start[], bss_end[], data_start[], data_end[];
extern const uint32_t data_load[];

#define SYSTICK_CONTROL (*(volatile uint32_t *)0xe000e010)
#define SYSTICK_RELOAD (*(volatile uint32_t *)0xe000e014)
#define SYSTICK_CURRENT (*(volatile uint32_t *)0xe000e018)
#define COPROCESSOR_ACCESS (*(volatile uint32_t *)0xe000ed88)
#define PAINT 0xa5a5a5a5u

/* ---- what gcc may call without a C library -------------------------------------------------- */

void *memcpy(void *restrict to, const void *restrict from, size_t count)
{
    unsigned char *t = to;
    const unsigned char *f = from;
    while (count--) *t++ = *f++;
    return to;
}

void *memset(void *to, int value, size_t count)
{
    unsigned char *t = to;
    while (count--) *t++ = (unsigned char)value;
    return to;
}

/* ---- semihosting: Arm's document "Semihosting for AArch32 and AArch64" ------------------------ */

enum { SYS_OPEN = 1, SYS_WRITE0 = 4, SYS_WRITE = 5, SYS_READ = 6, SYS_EXIT = 0x18 };

static int32_t host(int operation, const void *argument)
{
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static int32_t open_file(const char *name, int length, int mode)
{
    const uint32_t block[] = {(uint32_t)name, (uint32_t)mode, (uint32_t)length};
    return host(SYS_OPEN, block);
}

/* Bytes that were not moved. */
static int32_t move(int operation, int32_t file, void *buffer, uint32_t count)
{
    const uint32_t block[] = {(uint32_t)file, (uint32_t)buffer, count};
    return host(operation, block);
}

static void leave(int good)
{
    host(SYS_EXIT, (const void *)(good ? 0x20026 : 0x20023));  /* application exit, runtime error */
    for (;;) {}
}

static char *write_number(char *to, uint32_t number)
{
    char digits[10];
    int count = 0;
    do digits[count++] = (char)('0' + number % 10);
    while (number /= 10);
    while (count) *to++ = digits[--count];
    return to;
}

/* ---- the run -------------------------------------------------------------------------------- */

static int8_t image[IMAGE_VALUES], logits[LOGITS];

static uint32_t ticks_of_inference(void)
{
    SYSTICK_RELOAD = 0xffffff;
    SYSTICK_CURRENT = 0;
    SYSTICK_CONTROL = 5;  /* enabled, on the processor clock */
    uint32_t start = SYSTICK_CURRENT;
    infer(image, logits);
    return (start - SYSTICK_CURRENT) & 0xffffff;
}

static void __attribute__((noinline)) run(void)
{
    char line[32], *end;
    uint32_t first = 0;
    int32_t images = open_file("images.bin", 10, 1), results = open_file("logits.bin", 10, 5);
    if (images < 0 || results < 0) leave(0);
    for (int i = 0; move(SYS_READ, images, image, sizeof image) == 0; i++) {
        uint32_t ticks = ticks_of_inference();
        if (i == 0) first = ticks;
        if (move(SYS_WRITE, results, logits, sizeof logits)) leave(0);
    }
    uint32_t *unused = stack_limit;
    while (unused < stack_top && *unused == PAINT) unused++;
    end = write_number(line, first);
    *end++ = ' ';
    end = write_number(end, (uint32_t)((char *)stack_top - (char *)unused));
    *end++ = '\n';
    *end = 0;
    host(SYS_WRITE0, line);
    leave(1);
}

void reset(void)
{
    COPROCESSOR_ACCESS |= 0xf << 20;  /* the floating-point unit */
    __asm__ volatile("dsb\n isb");
    for (uint32_t *p = bss_start; p < bss_end; p++) *p = 0;
    for (uint32_t *p = data_start; p < data_end; p++) *p = data_load[p - data_start];
    /* Nothing of this function lies on the painted stack yet but what is above its own frame. */
    for (uint32_t *p = stack_limit; p < (uint32_t *)__builtin_frame_address(0) - 16; p++) *p = PAINT;
    run();
}

static void fault(void) { leave(0); }

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    stack_top, (const void *)reset, (const void *)fault, (const void *)fault, (const void *)fault,
    (const void *)fault, (const void *)fault,
};
