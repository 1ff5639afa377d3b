/* The three operators as their documentation says, slow and obvious, from gemmlowp's formulas; for tests alone.
 *
 * As on a core with Helium, a buffer is required, sums in it are written and read, and a fully connected layer takes its
 * bias from the buffer and ignores the argument.
 */
#include <stddef.h>

#include "arm_nnfunctions.h"

static int64_t shift_right(int64_t x, int exponent) /* halves away from zero */
{
    const int64_t half = exponent > 0 ? (int64_t)1 << (exponent - 1) : 0;
    return x >= 0 ? (x + half) >> exponent : -((-x + half) >> exponent);
}

static int64_t high(int64_t a, int64_t b)
{
    return (a * b + ((int64_t)1 << 30)) >> 31;
}

static int8_t requantize(int32_t sum, int32_t multiplier, int32_t shift, const cmsis_nn_fc_params *params)
{
    const int32_t shifted = (int32_t)((uint32_t)sum << (shift > 0 ? shift : 0));
    int64_t code = shift_right(high(shifted, multiplier), shift > 0 ? 0 : -shift) + params->output_offset;
    code = code < params->activation.min ? params->activation.min : code;
    return (int8_t)(code > params->activation.max ? params->activation.max : code);
}

arm_cmsis_nn_status arm_fully_connected_per_channel_s8(
    const cmsis_nn_context *ctx, const cmsis_nn_fc_params *fc_params,
    const cmsis_nn_per_channel_quant_params *quant_params, const cmsis_nn_dims *input_dims, const int8_t *input_data,
    const cmsis_nn_dims *filter_dims, const int8_t *filter_data, const cmsis_nn_dims *bias_dims,
    const int32_t *bias_data, const cmsis_nn_dims *output_dims, int8_t *output_data)
{
    const int32_t inputs = input_dims->h * input_dims->w * input_dims->c, outputs = output_dims->c;
    if (ctx->buf == NULL || bias_data == NULL || ctx->size != 4 * outputs || filter_dims->n != inputs ||
        filter_dims->c != outputs || bias_dims->c != outputs || output_dims->n != input_dims->n ||
        fc_params->filter_offset != 0 || fc_params->input_offset != 0) {
        return ARM_CMSIS_NN_ARG_ERROR;
    }
    const int32_t *sums = ctx->buf;
    for (int32_t n = 0; n < input_dims->n; n++) {
        for (int32_t o = 0; o < outputs; o++) {
            uint32_t sum = (uint32_t)sums[o];
            for (int32_t k = 0; k < inputs; k++) {
                sum += (uint32_t)(input_data[n * inputs + k] * filter_data[o * inputs + k]);
            }
            output_data[n * outputs + o] =
                requantize((int32_t)sum, quant_params->multiplier[o], quant_params->shift[o], fc_params);
        }
    }
    return ARM_CMSIS_NN_SUCCESS;
}

arm_cmsis_nn_status arm_batch_matmul_s8(
    const cmsis_nn_context *ctx, const cmsis_nn_bmm_params *bmm_params,
    const cmsis_nn_per_tensor_quant_params *quant_params, const cmsis_nn_dims *input_lhs_dims, const int8_t *input_lhs,
    const cmsis_nn_dims *input_rhs_dims, const int8_t *input_rhs, const cmsis_nn_dims *output_dims, int8_t *output)
{
    const cmsis_nn_fc_params *params = &bmm_params->fc_params;
    const int32_t rows = input_lhs_dims->w, columns = input_rhs_dims->w, inner = input_rhs_dims->c;
    if (ctx->buf == NULL || ctx->size < 4 * columns || input_lhs_dims->c != inner || output_dims->w != rows ||
        output_dims->c != columns || input_lhs_dims->n * input_lhs_dims->h != 1 || input_rhs_dims->n * input_rhs_dims->h != 1) {
        return ARM_CMSIS_NN_ARG_ERROR;
    }
    int32_t *sums = ctx->buf;
    for (int32_t column = 0; column < columns; column++) {
        sums[column] = 0;
        for (int32_t k = 0; k < inner; k++) {
            sums[column] += params->input_offset * (input_rhs[column * inner + k] + params->filter_offset);
        }
    }
    for (int32_t row = 0; row < rows; row++) {
        for (int32_t column = 0; column < columns; column++) {
            int32_t sum = sums[column];
            for (int32_t k = 0; k < inner; k++) {
                sum += input_lhs[row * inner + k] * (input_rhs[column * inner + k] + params->filter_offset);
            }
            output[row * columns + column] = requantize(sum, quant_params->multiplier, quant_params->shift, params);
        }
    }
    return ARM_CMSIS_NN_SUCCESS;
}

/* exp of a Q5.26 from -32 to 0, in Q0.31. */
static int64_t exponential(int64_t x)
{
    static const int64_t factors[7] = {1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242};
    if (x == 0) {
        return INT32_MAX;
    }
    const int64_t quarter = (int64_t)1 << 24, last = (x & (quarter - 1)) - quarter, rest = last - x;
    const int64_t a = last * 32 + (1 << 28), a2 = high(a, a), a3 = high(a2, a), a4 = high(a2, a2);
    const int64_t tail = shift_right(high(shift_right(a4, 2) + a3, 715827883) + a2, 1);
    int64_t result = 1895147668 + high(1895147668, a + tail);
    for (int n = 0; n < 7; n++) {
        result = (rest >> (24 + n)) & 1 ? high(result, factors[n]) : result;
    }
    return result;
}

void arm_softmax_s8(const int8_t *input, const int32_t num_rows, const int32_t row_size, const int32_t mult,
                    const int32_t shift, const int32_t diff_min, int8_t *output)
{
    for (int32_t row = 0; row < num_rows; row++, input += row_size, output += row_size) {
        int32_t largest = -128;
        for (int32_t k = 0; k < row_size; k++) {
            largest = input[k] > largest ? input[k] : largest;
        }
        int64_t sum = 0;
        for (int32_t k = 0; k < row_size; k++) {
            const int64_t difference = input[k] - largest;
            sum += difference < diff_min ? 0 : shift_right(exponential(high(difference * ((int64_t)1 << shift), mult)), 12);
        }
        int zeros = 0;
        while ((uint64_t)sum << zeros < (uint64_t)1 << 31) {
            zeros++;
        }
        const int64_t half = (sum << zeros) >> 1;
        int64_t x = 1515870810 + high(half, -1010580540);
        for (int step = 0; step < 3; step++) {
            x += high(x, ((int64_t)1 << 29) - high(half, x)) * 4;
        }
        const int64_t reciprocal = x * 2 > INT32_MAX ? INT32_MAX : x * 2;
        for (int32_t k = 0; k < row_size; k++) {
            const int64_t difference = input[k] - largest;
            const int64_t e = difference < diff_min ? 0 : exponential(high(difference * ((int64_t)1 << shift), mult));
            const int64_t code = shift_right(high(reciprocal, e), 35 - zeros) - 128;
            output[k] = (int8_t)(code > 127 ? 127 : code);
        }
    }
}
