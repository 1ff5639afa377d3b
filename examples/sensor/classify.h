/* See classify.c. */
#include <stdint.h>

/* The fault that samples (tokens, TOKEN_SAMPLES) show, 0 to FAULTS - 1; -1 for a number of tokens that is none. */
int classify(const float *samples, int32_t tokens);
