"""Tiles of int8 codes, which tensor cores multiply, with int32 sums."""
import functools

from edgeattn.kernels.cuda.language import cuda, device, float32, int32
from edgeattn.kernels.cuda.ptx import bits_of, fma, mma_s8, mma_u8s8, nearest, times, to_float, write_b32, write_s8

from .fragments import fragment_column, fragment_place, fragment_row, products
from .tiles import KEYS, Form


@functools.cache
def int8_products(rows, chunk):
    """The Form of int8 products with int32 sums: tiles in rows of 64 codes, 16 bytes longer; values lie turned.

    Probabilities are bytes 0..255 in a tile of their own, which only the warp that wrote it reads, and left[r] is what
    they stand for. The fours of numbers are one word of four codes, in the first of the four.
    """
    PITCH = chunk + 16
    multiply, multiply_values = products(mma_s8, chunk // 32, PITCH), products(mma_u8s8, KEYS // 32, PITCH)

    @device
    def put_word(at, row, column, a, b, c, d):
        write_b32(int32(at + times(row, PITCH) + column * 4), bits_of(a))
        return float32(0.0)

    @device
    def scores(queries_at, keys_at, t, s, left, right):
        found = cuda.local.array((2, 16), int32)
        for r in range(2):
            for k in range(16):
                found[r, k] = int32(0)
        multiply(queries_at, keys_at, t, found)
        for r in range(2):
            for k in range(16):
                s[r, k] = s[r, k] + to_float(found[r, k])

    @device
    def share(to, t, s):
        row, pair, _ = fragment_place(t)
        for r in range(2):
            for k in range(16):
                at = int32(to + times(int32(row + 8 * r), PITCH) + pair + fragment_column(k))
                write_s8(at, nearest(s[r, k]))

    @device
    def context(probabilities_at, values_at, t, careful, s, o, left, right):
        found = cuda.local.array((2, 16), int32)
        for r in range(2):
            for k in range(16):
                found[r, k] = int32(0)
        multiply_values(probabilities_at, values_at, t, found)
        for r in range(2):
            for k in range(16):
                o[r, k] = fma(to_float(found[r, k]), left[r], o[r, k])

    at_keys, at_probabilities = rows * PITCH, (rows + KEYS) * PITCH
    return Form(2, 16, 16, 2, at_keys, at_probabilities, at_probabilities + rows * PITCH, True, fragment_place,
                fragment_row, fragment_column, put_word, put_word, put_word, scores, share, context)
