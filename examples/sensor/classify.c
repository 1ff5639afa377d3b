/* The whole model of examples/sensor on a microcontroller: tokens of samples in, the number of a fault out.
 *
 * The encoder is what quant.export wrote; what stands around it, two linear maps and a mean, is float32 here. model.h
 * has their weights, and recordings with the answers that Python gave: microcontroller.py writes it.
 */
#include "classify.h"

#include <string.h>

#include "encoder.h"
#include "model.h"

static float x[ENCODER_OUTPUT_SIZE]; /* (tokens, features), in and out */
static int32_t scratch[(ENCODER_SCRATCH_BYTES + 3) / 4];

int classify(const float *samples, int32_t tokens)
{
    /* 1. embedding: a linear map of the samples of a token, and its position */
    for (int32_t t = 0; t < tokens; t++) {
        for (int32_t e = 0; e < ENCODER_FEATURES; e++) {
            float sum = embed_bias[e] + position[t * ENCODER_FEATURES + e];
            for (int32_t s = 0; s < TOKEN_SAMPLES; s++) {
                sum += samples[t * TOKEN_SAMPLES + s] * embed_weight[e * TOKEN_SAMPLES + s];
            }
            x[t * ENCODER_FEATURES + e] = sum;
        }
    }

    /* 2. the encoder, in place */
    if (encoder_f32(x, tokens, x, scratch, sizeof scratch) != ENCODER_OK) {
        return -1;
    }

    /* 3. the mean of the tokens, and the fault with the highest score */
    int best = 0;
    float highest = 0.0f;
    for (int fault = 0; fault < FAULTS; fault++) {
        float score = head_bias[fault];
        for (int32_t e = 0; e < ENCODER_FEATURES; e++) {
            float sum = 0.0f;
            for (int32_t t = 0; t < tokens; t++) {
                sum += x[t * ENCODER_FEATURES + e];
            }
            score += sum / (float)tokens * head_weight[fault * ENCODER_FEATURES + e];
        }
        if (fault == 0 || score > highest) {
            best = fault;
            highest = score;
        }
    }
    return best;
}

int main(void)
{
    int different = 0;
    for (int n = 0; n < RECORDINGS; n++) {
        different += classify(recordings[n], lengths[n]) != answers[n];
    }
    return different; /* 0: every answer is Python's */
}
