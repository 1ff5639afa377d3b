"""The end of attention: what a block's context is divided by, and where that and the sums go."""
import functools

from edgeattn.kernels.cuda.language import device, float32, int32, log
from edgeattn.kernels.cuda.ptx import (
    divide,
    half_pair,
    select_f,
    shuffle_f,
    store_b32,
    store_f16,
    store_f32,
    store_f32x2,
    times,
)

from .attention_parameters import A_LSE, P_DV, P_L, P_OUT_L, P_SUMS
from .softmax import MINUS_INFINITY

_LN_2 = 0.6931471805599453


@functools.cache
def finishing(form, wide, half):
    """A function that divides the context o by the sums, and writes it, and the log-sums or what joins parts.

    A query that saw no key gets zeros.
    """
    QUERIES, OUT, LANES, down, across = form.queries, form.values, form.lanes, form.down, form.across
    WIDE, HALF, OUT_SIZE = wide, half, 2 if half else 4

    @device
    def write_pair(p, to, good, d, y0, y1):
        if WIDE and HALF:
            store_b32(good & (d < p[P_DV]), to, half_pair(y1, y0))
        elif WIDE:
            store_f32x2(good & (d < p[P_DV]), to, y0, y1)
        elif HALF:
            store_f16(good & (d < p[P_DV]), to, y0)
            store_f16(good & (int32(d + 1) < p[P_DV]), to + OUT_SIZE, y1)
        else:
            store_f32(good & (d < p[P_DV]), to, y0)
            store_f32(good & (int32(d + 1) < p[P_DV]), to + OUT_SIZE, y1)

    @device
    def write_sums(a, p, lse, row, good, largest, row_sum, none):
        if p[P_SUMS] != 0:
            to = lse + row * 4
            store_f32(good, to, largest)
            store_f32(good, to + p[P_SUMS], row_sum)
        elif a[A_LSE] != 0:
            sum_log = float32(log(select_f(none, float32(1.0), row_sum))) + largest * float32(_LN_2)
            store_f32(good, lse + row * 4, select_f(none, float32(MINUS_INFINITY), sum_log))

    @device
    def finish(a, p, out, lse, row0, d0, column0, d_out, m, total, o):
        for r in range(QUERIES):
            row_sum = total[r]
            for step in range(LANES):
                row_sum = row_sum + shuffle_f(row_sum, int32(1 << step))
            none = row_sum == float32(0.0)
            inverse = select_f(none, float32(0.0), divide(float32(1.0), row_sum))
            row = int32(row0 + down(r))
            good = row < p[P_L]
            to = out + times(row, p[P_OUT_L])
            for k in range(0, OUT, 2):
                d = int32(across(k))
                y0, y1 = o[r, k] * inverse, o[r, k + 1] * inverse
                write_pair(p, to + d * OUT_SIZE, good, int32(d0 + d), y0, y1)
            write_sums(a, p, lse, row, good & (column0 == 0) & (d_out == 0), m[r], row_sum, none)

    return finish
