/* Checks attention_s8, or attention_f32 of an encoder, against its test vectors on a Cortex-M, and counts its instructions and stack.
 *
 * Exits with the number of vectors that differ. Prints one line: vectors, equal ones, bytes of stack, and ticks of the
 * system timer for one call and for CALIBRATION_INSTRUCTIONS; under an emulator that lets the clock advance by
 * instructions their quotient tells how many instructions a call takes, whatever the timer's frequency.
 */
#include <string.h>

#include "attention_test.h"
#include "semihosting.h"

#define SYSTICK_CONTROL (*(volatile uint32_t *)0xE000E010)
#define SYSTICK_RELOAD (*(volatile uint32_t *)0xE000E014)
#define SYSTICK_CURRENT (*(volatile uint32_t *)0xE000E018)
#define SYSTICK_LARGEST 0xFFFFFFu

enum { GUARD = 16, SENTINEL = 0x5a, CALIBRATION_LOOPS = 1000000, CALIBRATION_INSTRUCTIONS = 2 * CALIBRATION_LOOPS };

extern uint8_t bss_end[]; /* by memory.ld */

static int32_t scratch_words[(ATTENTION_SCRATCH_BYTES + 3) / 4 + GUARD];
static OUTPUT output[ATTENTION_OUTPUT_SIZE + GUARD];

static void start_ticks(void)
{
    SYSTICK_RELOAD = SYSTICK_LARGEST;
    SYSTICK_CURRENT = 0;
    SYSTICK_CONTROL = 5; /* on, by the core's clock */
}

static uint32_t ticks(void)
{
    return SYSTICK_LARGEST - SYSTICK_CURRENT;
}

static void write_number(const char *name, uint32_t number)
{
    char digits[12] = {0};
    int n = sizeof digits - 1;
    do {
        digits[--n] = (char)('0' + number % 10);
        number /= 10;
    } while (number != 0);
    semihosting_write(name);
    semihosting_write(digits + n);
}

static int untouched(const void *memory, size_t start, size_t end)
{
    for (size_t n = start; n < end; n++) {
        if (((const unsigned char *)memory)[n] != SENTINEL) {
            return 0;
        }
    }
    return 1;
}

/* The free memory below the stack, up to a little below what is in use now. */
static uint8_t *stack_limit(void)
{
    return bss_end;
}

static void __attribute__((noinline)) paint_stack(void)
{
    uint8_t *now = (uint8_t *)__builtin_frame_address(0) - 64;
    for (uint8_t *byte = stack_limit(); byte < now; byte++) {
        *byte = SENTINEL;
    }
}

int main(void)
{
    uint32_t equal = 0, used_ticks = 0, stack = 0;
    for (uint32_t n = 0; n < ATTENTION_TEST_VECTORS; n++) {
        const attention_test_vector *vector = &attention_test_vectors[n];
        memset(scratch_words, SENTINEL, sizeof scratch_words);
        memset(output, SENTINEL, sizeof output);
        if (n == 0) {
            paint_stack();
            start_ticks();
        }
        const int status = CALL(vector, output, scratch_words);
        if (n == 0) {
            used_ticks = ticks();
            const uint8_t *deepest = stack_limit();
            while (*deepest == SENTINEL) {
                deepest++;
            }
            stack = (uint32_t)((const uint8_t *)__builtin_frame_address(0) - deepest);
        }
        equal += status == ATTENTION_OK && memcmp(output, vector->output, sizeof vector->output) == 0 &&
                 untouched(output, sizeof vector->output, sizeof output) &&
                 untouched(scratch_words, ATTENTION_SCRATCH_BYTES, sizeof scratch_words);
    }

    start_ticks();
    uint32_t loops = CALIBRATION_LOOPS;
    __asm volatile("1: subs %0, %0, #1\n bne 1b" : "+r"(loops) : : "cc");
    const uint32_t calibration_ticks = ticks();

    write_number("vectors ", ATTENTION_TEST_VECTORS);
    write_number(" equal ", equal);
    write_number(" stack ", stack);
    write_number(" ticks ", used_ticks);
    write_number(" calibration_ticks ", calibration_ticks);
    write_number(" calibration_instructions ", CALIBRATION_INSTRUCTIONS);
    semihosting_write("\n");
    return (int)(ATTENTION_TEST_VECTORS - equal);
}
