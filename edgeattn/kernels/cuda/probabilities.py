"""The walk over the keys that writes probabilities: by the largest score and the sum that each part of the keys had."""
import functools

from edgeattn.kernels.cuda.language import device, float32, int32
from edgeattn.kernels.cuda.ptx import divide, fma, load_f32, maximum, select_f, store_f16, store_f32, times, times_wide

from .attention_parameters import P_L, P_LSE_SPLIT, P_OUT_L, P_PARTS, P_S, P_SUMS
from .softmax import MINUS_INFINITY, exp2


@functools.cache
def joining_parts(form):
    """A function that makes, of what all parts left, what each row's scores are measured from, and 1 / sum."""
    QUERIES, down = form.queries, form.down

    @device
    def join(p, sums, row0, m, total):
        for r in range(QUERIES):
            row = int32(row0 + down(r))
            at = sums + row * 4
            for part in range(p[P_PARTS]):
                m[r] = maximum(m[r], load_f32(row < p[P_L], at + times_wide(int32(part), p[P_LSE_SPLIT])))
            m[r] = select_f(m[r] == float32(MINUS_INFINITY), float32(0.0), m[r])
            for part in range(p[P_PARTS]):
                found = at + times_wide(int32(part), p[P_LSE_SPLIT])
                size = load_f32(row < p[P_L], found + p[P_SUMS])
                total[r] = fma(exp2(load_f32(row < p[P_L], found) - m[r]), size, total[r])
            none = total[r] == float32(0.0)
            total[r] = select_f(none, float32(0.0), divide(float32(1.0), total[r]))

    return join


@functools.cache
def writing_weights(form, half):
    """A function that writes the probabilities of scores s to rows of float16 or float32."""
    QUERIES, EACH, down, across = form.queries, form.keys, form.down, form.across
    HALF, OUT_SIZE = half, 2 if half else 4

    @device
    def write(p, to, row0, key0, s, m, total):
        for r in range(QUERIES):
            row = int32(row0 + down(r))
            row_at = times(row, p[P_OUT_L])
            for k in range(EACH):
                gone = s[r, k] == float32(MINUS_INFINITY)
                y = select_f(gone, float32(0.0), exp2(s[r, k] - m[r]) * total[r])
                good = (row < p[P_L]) & (int32(key0 + across(k)) < p[P_S])
                at = to + int32(row_at + across(k) * OUT_SIZE)
                if HALF:
                    store_f16(good, at, y)
                else:
                    store_f32(good, at, y)

    return write
