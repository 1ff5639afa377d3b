"""What is done to the scores of a block before softmax: factors, softcap, slopes, biases, and masks."""
import functools

from edgeattn.kernels.cuda.language import device, float32, int32, larger, smaller, tanh
from edgeattn.kernels.cuda.ptx import fma, load_f32, load_u8, read_f32, select_f, times, to_float

from .attention_parameters import P_BIAS_L, P_BIAS_S, P_KEEP_L, P_KEEP_S, P_L
from .softmax import LOG2_E, MINUS_INFINITY
from .tiles import KEYS

_LOWEST_BIAS = -2.3e38  # times log2(e) it is finite still: only -inf hides a key


@functools.cache
def scaling(form, codes):
    """A function that gives scores the factors that their products left out."""
    QUERIES, EACH, across, CODES = form.queries, form.keys, form.across, codes

    @device
    def scale(factor, q_scale, lists, column0, s):
        if CODES:
            for k in range(EACH):
                at = int32(lists + (column0 + across(k)) * 4)
                for r in range(QUERIES):
                    s[r, k] = s[r, k] * read_f32(at) * q_scale[r]
        else:
            for r in range(QUERIES):
                for k in range(EACH):
                    s[r, k] = s[r, k] * factor

    return scale


@functools.cache
def masking(form, rows):
    """Functions that change scores s: (cap, add_distances, add_bias, hide_masked, hide_outside).

    A thread's own query r is row0 + down(r), and its own key k key0 + across(k).
    """
    QUERIES, EACH, down, across = form.queries, form.keys, form.down, form.across

    @device
    def cap(softcap, s):
        for r in range(QUERIES):
            for k in range(EACH):
                s[r, k] = tanh(s[r, k]) * softcap

    @device
    def add_distances(slope, offset, row0, key0, s):
        for r in range(QUERIES):
            for k in range(EACH):
                distance = int32(row0 + down(r) + offset - key0 - across(k))
                distance = int32(larger(distance, int32(0 - distance)))
                s[r, k] = fma(to_float(distance), slope, s[r, k])

    @device
    def add_bias(p, bias, row0, key0, last, s):
        for r in range(QUERIES):
            row = int32(row0 + down(r))
            row_at = times(row, p[P_BIAS_L])
            for k in range(EACH):
                there = int32(key0 + across(k))
                at = int32(row_at + times(there, p[P_BIAS_S]))
                b = load_f32((row < p[P_L]) & (there < last), bias + at)
                bounded = select_f(b < float32(_LOWEST_BIAS), float32(_LOWEST_BIAS), b)
                s[r, k] = select_f(b == float32(MINUS_INFINITY), b, fma(bounded, float32(LOG2_E), s[r, k]))

    @device
    def hide_masked(p, keep, row0, key0, last, s):
        for r in range(QUERIES):
            row = int32(row0 + down(r))
            row_at = times(row, p[P_KEEP_L])
            for k in range(EACH):
                there = int32(key0 + across(k))
                at = int32(row_at + times(there, p[P_KEEP_S]))
                seen = load_u8((row < p[P_L]) & (there < last), keep + at) != 0
                s[r, k] = select_f(seen, s[r, k], float32(MINUS_INFINITY))

    @device
    def hide_outside(low, high, last, q0, k0, row0, key0, s):
        edge = (int32(k0 + KEYS) > last) | (int32(q0 + rows - 1 + low) > k0) | (
            int32(q0 + high) < int32(k0 + KEYS - 1))
        if edge:
            for r in range(QUERIES):
                from_key = int32(row0 + down(r) + low - key0)
                to_key = int32(smaller(int32(row0 + down(r) + high + 1), last) - key0)
                for k in range(EACH):
                    s[r, k] = select_f((across(k) >= from_key) & (across(k) < to_key), s[r, k],
                                       float32(MINUS_INFINITY))

    return cap, add_distances, add_bias, hide_masked, hide_outside
