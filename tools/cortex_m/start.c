/* Start-up of a Cortex-M program under an emulator: vectors, memory, floating point unit, main, exit by semihosting. */
#include <stdint.h>

#include "semihosting.h"

extern uint32_t stack_top[], data_start[], data_end[], data_source[], bss_start[], bss_end[]; /* by memory.ld */
int main(void);

static void reset(void);
static void fault(void);

/* The first 16 words a core reads: stack pointer, reset, then the exceptions. */
__attribute__((section(".vectors"), used)) static void (*const vectors[16])(void) = {
    (void (*)(void))stack_top, reset, fault, fault, fault, fault, fault, 0, 0, 0, 0, fault, fault, 0, fault, fault,
};

static void reset(void)
{
    /* CPACR: full access to coprocessors 10 and 11, floating point and vectors; without effect where there are none */
    *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20;
    __asm volatile("dsb\n isb");
    for (uint32_t *to = data_start, *from = data_source; to < data_end; to++, from++) {
        *to = *from;
    }
    for (uint32_t *to = bss_start; to < bss_end; to++) {
        *to = 0;
    }
    semihosting_exit((uint32_t)main());
}

static void fault(void)
{
    semihosting_write("fault\n");
    semihosting_exit(99);
}
