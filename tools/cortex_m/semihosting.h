/* Text and exit status from a program to its emulator or debugger: Arm's semihosting, operations by number in r0. */
#ifndef SEMIHOSTING_H
#define SEMIHOSTING_H

#include <stdint.h>

enum { SYS_WRITE0 = 0x04, SYS_EXIT_EXTENDED = 0x20, APPLICATION_EXIT = 0x20026 };

static inline void semihosting_call(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm("r0") = operation;
    register const void *r1 __asm("r1") = argument;
    __asm volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}

static inline void semihosting_write(const char *text)
{
    semihosting_call(SYS_WRITE0, text);
}

static inline void semihosting_exit(uint32_t status)
{
    const uint32_t block[2] = {APPLICATION_EXIT, status};
    semihosting_call(SYS_EXIT_EXTENDED, block);
    for (;;) {
    }
}

#endif
