"""2**x, and the online softmax of a block's scores.

Dao et al., "FlashAttention" (2022), algorithm 1; to base 2.
"""
import functools

from edgeattn.kernels.cuda.language import device, float32, int32
from edgeattn.kernels.cuda.ptx import (
    bits_of,
    float_of_bits,
    fma,
    maximum,
    nearest,
    read_f32,
    select_f,
    shuffle_f,
    to_float,
)

from .tiles import KEYS

LOG2_E = 1.4426950408889634
MINUS_INFINITY = float("-inf")
_LOG2_255 = 7.994353436858858  # of the largest probability as a byte
_ROUND = 12583039.0  # 1.5 * 2**23 + 127: adding it leaves the nearest integer, as an exponent's bits, in the low bits
# 2**r on [-0.5, 0.5], minimax in relative error, as edgeattn/kernels/cpu/softmax.py
_C1, _C2, _C3, _C4, _C5 = (0.6931469775973295, 0.24022242082675763, 0.055507337448249136, 0.00967151281259882,
                           0.0013264727213862246)


@device
def exp2(x):
    """2**x for x <= 127; x below -126 counts as -126 and a NaN stays."""
    x = maximum(x, float32(-126.0))
    shifted = x + float32(_ROUND)
    r = x - (shifted - float32(_ROUND))
    y = fma(float32(_C5), r, float32(_C4))
    y = fma(y, r, float32(_C3))
    y = fma(y, r, float32(_C2))
    y = fma(y, r, float32(_C1))
    y = fma(y, r, float32(1.0))
    return y * float_of_bits(int32(bits_of(shifted) << 23))  # of a NaN, a NaN: its bits would be a number's


@functools.cache
def online_softmax(form, codes):
    """A function that makes probabilities of scores s to base 2, as far as the keys go that were seen until now.

    m and total are the largest score and the sum of each own query, o its context until now. A hidden key's probability
    is -0.0, which tells it from one that is 0. `codes`: probabilities are bytes, and left[r] what they stand for.
    """
    QUERIES, EACH, OUT, LANES = form.queries, form.keys, form.values, form.lanes
    across, CODES = form.across, codes

    @device
    def weigh_row(r, above, s):
        row_sum = float32(0.0)
        for k in range(EACH):
            gone = s[r, k] == float32(MINUS_INFINITY)
            s[r, k] = select_f(gone, float32(-0.0), exp2(s[r, k] - above))
            row_sum = row_sum + s[r, k]
        return row_sum

    @device
    def weigh_row_in_bytes(r, empty, here, above, lists, column0, s, left):
        # A byte has the value's scale in it, and is 255 where that is largest among the tile's keys: those far below
        # another tile's are seen too. What is summed is what the product will see, the bytes.
        row_sum, top = float32(0.0), float32(MINUS_INFINITY)
        for k in range(EACH):
            gone = s[r, k] == float32(MINUS_INFINITY)
            value_log = read_f32(int32(lists + (KEYS + column0 + across(k)) * 4))
            s[r, k] = select_f(gone, s[r, k], s[r, k] - here + value_log)
            top = maximum(top, s[r, k])
        for step in range(LANES):
            top = maximum(top, shuffle_f(top, int32(1 << step)))
        top = select_f(empty, float32(0.0), top) - float32(_LOG2_255)
        left[r] = select_f(empty, float32(0.0), exp2(here - above + top))
        for k in range(EACH):
            gone = s[r, k] == float32(MINUS_INFINITY)
            byte = nearest(select_f(gone, float32(0.0), exp2(s[r, k] - top)))
            s[r, k] = to_float(byte)
            at = int32(lists + (2 * KEYS + column0 + across(k)) * 4)
            row_sum = fma(s[r, k], read_f32(at), row_sum)
        return row_sum * left[r]

    @device
    def weigh(lists, column0, s, m, total, o, left):
        for r in range(QUERIES):  # a row's 64 scores lie with neighbouring threads
            best = s[r, 0]
            for k in range(1, EACH):
                best = maximum(best, s[r, k])
            for step in range(LANES):
                best = maximum(best, shuffle_f(best, int32(1 << step)))
            empty = best == float32(MINUS_INFINITY)
            here = select_f(empty, float32(0.0), best)
            best = maximum(m[r], best)
            above = select_f(best == float32(MINUS_INFINITY), float32(0.0), best)
            shrink = exp2(m[r] - above)
            m[r] = best
            if CODES:
                row_sum = weigh_row_in_bytes(r, empty, here, above, lists, column0, s, left)
            else:
                row_sum = weigh_row(r, above, s)
            total[r] = fma(total[r], shrink, row_sum)
            for k in range(OUT):
                o[r, k] = o[r, k] * shrink

    return weigh
