"""Tiles of float16 or tf32 numbers, which tensor cores multiply, with float32 sums."""
import functools

from edgeattn.kernels.cuda.language import cuda, device, float32, int32
from edgeattn.kernels.cuda.ptx import (
    bits_of,
    float_of_bits,
    half_pair,
    maximum,
    mma_f16,
    mma_tf32,
    read_b32,
    read_turned,
    select_f,
    select_i,
    times,
    to_tf32,
    truncate,
    write_b32x2,
    write_b32x4,
)

from .fragments import fragment_column, fragment_place, fragment_row, nothing_to_share, products
from .tiles import GONE, KEYS, Form

_INFINITY = float("inf")

# From which magnitude on a number is infinite: halfway from the largest one to the next power of two.
_HALF_END, _TF32_END = 65520.0, float(2**128 - 2**116)


@device
def put_halves(at, a, b, c, d):
    """Four numbers as float16."""
    write_b32x2(at, half_pair(b, a), half_pair(d, c))


@device
def put_tf32(at, a, b, c, d):
    """Four numbers with 10 bits of fraction."""
    write_b32x4(at, to_tf32(a), to_tf32(b), to_tf32(c), to_tf32(d))


@functools.cache
def finiteness(end):
    """Functions of a number: whether rounding leaves it finite, it or 0, and how a product counts what it is else."""

    @device
    def finite(e):
        return maximum(e, -e) < float32(end)

    @device
    def or_zero(e):
        return select_f(finite(e), e, float32(0.0))

    @device
    def kind_of(e):
        infinite = select_f(e > float32(0.0), float32(128.0), float32(16384.0))
        return select_f(finite(e), float32(0.0), select_f(e == e, infinite, float32(1.0)))

    return finite, or_zero, kind_of


@functools.cache
def weighing_halves(chunk, pitch):
    """A function: o (2, chunk / 4) += the probabilities s times a tile of values, in float16."""

    @device
    def weigh(values_at, t, s, o):
        lane = int32(t & 31)
        at = int32(values_at + times(int32(lane & 15), pitch) + (lane >> 4) * 16)
        for k in range(4):
            a0, a1 = half_pair(s[0, 4 * k + 1], s[0, 4 * k]), half_pair(s[1, 4 * k + 1], s[1, 4 * k])
            a2, a3 = half_pair(s[0, 4 * k + 3], s[0, 4 * k + 2]), half_pair(s[1, 4 * k + 3], s[1, 4 * k + 2])
            for n in range(chunk // 16):
                b0, b1, b2, b3 = read_turned(int32(at + k * 16 * pitch + n * 32))
                o[0, 4 * n], o[0, 4 * n + 1], o[1, 4 * n], o[1, 4 * n + 1] = mma_f16(
                    a0, a1, a2, a3, b0, b1, o[0, 4 * n], o[0, 4 * n + 1], o[1, 4 * n], o[1, 4 * n + 1])
                o[0, 4 * n + 2], o[0, 4 * n + 3], o[1, 4 * n + 2], o[1, 4 * n + 3] = mma_f16(
                    a0, a1, a2, a3, b2, b3, o[0, 4 * n + 2], o[0, 4 * n + 3], o[1, 4 * n + 2], o[1, 4 * n + 3])

    return weigh


@functools.cache
def weighing_tf32(chunk, pitch):
    """As `weighing_halves`, in tf32."""

    @device
    def weigh(values_at, t, s, o):
        # the depth of a product has no order: a thread's keys 2 t and 2 t + 1 stand where mma has t and t + 4
        lane = int32(t & 31)
        at = int32(values_at + times(int32((lane & 3) * 2), pitch) + (lane >> 2) * 4)
        for k in range(8):
            a0, a1 = to_tf32(s[0, 2 * k]), to_tf32(s[1, 2 * k])
            a2, a3 = to_tf32(s[0, 2 * k + 1]), to_tf32(s[1, 2 * k + 1])
            for n in range(chunk // 8):
                b0 = read_b32(int32(at + k * 8 * pitch + n * 32))
                b1 = read_b32(int32(at + (k * 8 + 1) * pitch + n * 32))
                o[0, 2 * n], o[0, 2 * n + 1], o[1, 2 * n], o[1, 2 * n + 1] = mma_tf32(
                    a0, a1, a2, a3, b0, b1, o[0, 2 * n], o[0, 2 * n + 1], o[1, 2 * n], o[1, 2 * n + 1])

    return weigh


@functools.cache
def tensor_cores(precision, rows, chunk):
    """The Form of float16 or tf32 products with float32 sums: tiles lie in rows, 16 bytes longer than their numbers.

    So eight rows meet different banks. What is not finite is left out of the product, where it would meet the 0 of
    keys that are not to be seen, and added by a second one: of the keys that are seen, how many hold a NaN (1), an
    infinity (128), a negative one (16384), 64 of each at most.
    """
    HALF = precision == "float16"
    SIZE, END = (2, _HALF_END) if HALF else (4, _TF32_END)
    PITCH = chunk * SIZE + 16
    DEEP, OUT = chunk * SIZE // 32, chunk // 4
    put = put_halves if HALF else put_tf32
    multiply = products(mma_f16 if HALF else mma_tf32, DEEP, PITCH)
    weigh = (weighing_halves if HALF else weighing_tf32)(chunk, PITCH)
    finite, or_zero, kind_of = finiteness(END)

    @device
    def put_row(at, row, column, a, b, c, d):
        put(int32(at + times(row, PITCH) + column * 4 * SIZE), a, b, c, d)

    @device
    def put_value(at, row, column, a, b, c, d):
        put_row(at, row, column, or_zero(a), or_zero(b), or_zero(c), or_zero(d))
        good = finite(a) & finite(b) & finite(c) & finite(d)
        return select_f(good, float32(0.0), float32(1.0))

    @device
    def put_left(at, row, column, a, b, c, d):
        put_row(at, row, column, kind_of(a), kind_of(b), kind_of(c), kind_of(d))
        return float32(0.0)

    @device
    def scores(queries_at, keys_at, t, s, left, right):
        multiply(queries_at, keys_at, t, s)

    @device
    def context(probabilities_at, values_at, t, careful, s, o, left, right):
        weigh(values_at, t, s, o)

    @device
    def left_context(values_at, t, s, o):
        found = cuda.local.array((2, OUT), float32)
        for r in range(2):
            for k in range(OUT):
                found[r, k] = float32(0.0)
            for k in range(16):
                s[r, k] = select_f(bits_of(s[r, k]) == GONE, float32(0.0), float32(1.0))
        weigh(values_at, t, s, found)
        for r in range(2):
            for k in range(OUT):
                count = truncate(found[r, k])
                nan, above, below = int32(count & 127), int32((count >> 7) & 127), int32(count >> 14)
                more = select_f(above > 0, float32(_INFINITY), select_f(below > 0, float32(-_INFINITY), float32(0.0)))
                both = (above > 0) & (below > 0)
                o[r, k] = o[r, k] + float_of_bits(select_i((nan > 0) | both, int32(0x7FC00000), bits_of(more)))

    at_keys = rows * PITCH
    end = at_keys + KEYS * PITCH
    return Form(2, 16, OUT, 2, at_keys, end, end, True, fragment_place, fragment_row, fragment_column, put_row,
                put_row, put_value, scores, nothing_to_share, context, put_left, left_context)
