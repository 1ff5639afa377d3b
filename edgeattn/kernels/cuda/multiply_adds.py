"""Tiles that are multiplied by float32 multiply-adds: they lie turned, and a thread has 8 queries and 4 keys."""
import functools

from edgeattn.kernels.cuda.language import device, float32, int32
from edgeattn.kernels.cuda.ptx import bits_of, fma, read_f32x2, read_f32x4, select_f, write_f32, write_f32x4

from .tiles import GONE, KEYS, Form


@device
def write_column(at, pitch, row, column, a, b, c, d):
    """Elements (row, column * 4 ...) of a tile to shared memory, turned; rows permuted so that banks are not shared."""
    to = int32(at + column * 4 * pitch + ((row ^ ((column & 7) << 2)) << 2))
    write_f32(to, a)
    write_f32(int32(to + pitch), b)
    write_f32(int32(to + 2 * pitch), c)
    write_f32(int32(to + 3 * pitch), d)


@device
def read_four(at, b):
    """b[:4] = four numbers of shared memory."""
    b[0], b[1], b[2], b[3] = read_f32x4(at)


@device
def read_two(at, b):
    """b[:2] = two numbers of shared memory."""
    b[0], b[1] = read_f32x2(at)


@device
def multiply_tiles(left, left_pitch, right, columns, x, y, a, b, sums):
    """sums (8, 4) += the rows 8 y ... of one turned tile times the rows 4 x ... of another, both of 4 `columns`."""
    for column in range(columns):
        swap = int32((column & 7) << 2)
        a_at = int32(left + column * 4 * left_pitch + ((int32(y * 8) ^ swap) << 2))
        a_next = int32(left + column * 4 * left_pitch + ((int32(y * 8 + 4) ^ swap) << 2))
        b_at = int32(right + column * 1024 + ((int32(x * 4) ^ swap) << 2))
        for u in range(4):
            a[0], a[1], a[2], a[3] = read_f32x4(int32(a_at + u * left_pitch))
            a[4], a[5], a[6], a[7] = read_f32x4(int32(a_next + u * left_pitch))
            read_four(int32(b_at + u * 256), b)
            for i in range(8):
                for j in range(4):
                    sums[i, j] = fma(a[i], b[j], sums[i, j])


@device
def itself(i):
    """Own numbers that lie side by side."""
    return i


@functools.cache
def multiply_adds(rows, chunk):
    """The Form of float32 multiply-adds: tiles of queries and keys lie turned, and so do the probabilities."""
    PITCH, OUT = rows * 4, chunk // 16
    QUADS = chunk // 4
    read_values = read_four if OUT == 4 else read_two

    @device
    def place(t):
        x = int32(t & 15)
        return int32((t >> 4) * 8), int32(x * 4), int32(x * OUT)

    @device
    def put_query(at, row, column, a, b, c, d):
        write_column(at, PITCH, row, column, a, b, c, d)

    @device
    def put_key(at, row, column, a, b, c, d):
        write_column(at, KEYS * 4, row, column, a, b, c, d)

    @device
    def put_value(at, row, column, a, b, c, d):
        write_f32x4(int32(at + row * chunk * 4 + column * 16), a, b, c, d)
        return (a - a) + (b - b) + (c - c) + (d - d)  # an infinity or NaN minus itself is NaN

    @device
    def scores(queries_at, keys_at, t, s, left, right):
        multiply_tiles(queries_at, PITCH, keys_at, QUADS, int32(t & 15), int32(t >> 4), left, right, s)

    @device
    def share(to, t, s):
        x, y = int32(t & 15), int32(t >> 4)
        swap = int32((x & 7) << 2)
        for j in range(4):
            at = int32(to + (x * 4 + j) * PITCH)
            write_f32x4(int32(at + ((int32(y * 8) ^ swap) << 2)), s[0, j], s[1, j], s[2, j], s[3, j])
            write_f32x4(int32(at + ((int32(y * 8 + 4) ^ swap) << 2)), s[4, j], s[5, j], s[6, j], s[7, j])

    @device
    def context(probabilities_at, values_at, t, careful, s, o, left, right):
        # A value that is not finite must not meet the 0 of a key that is not to be seen. Each tile has a sum of its
        # own, in the scores' registers: one long chain of additions would double the rounding error.
        x, y = int32(t & 15), int32(t >> 4)
        for i in range(8):
            for j in range(OUT):
                s[i, j] = float32(0.0)
        for quad in range(KEYS // 4):
            swap = int32((quad & 7) << 2)
            p_at = int32(probabilities_at + quad * 4 * PITCH + ((int32(y * 8) ^ swap) << 2))
            p_next = int32(probabilities_at + quad * 4 * PITCH + ((int32(y * 8 + 4) ^ swap) << 2))
            v_at = int32(values_at + quad * 16 * chunk + x * OUT * 4)
            for u in range(4):
                left[0], left[1], left[2], left[3] = read_f32x4(int32(p_at + u * PITCH))
                left[4], left[5], left[6], left[7] = read_f32x4(int32(p_next + u * PITCH))
                read_values(int32(v_at + u * 4 * chunk), right)
                if careful:
                    for i in range(8):
                        for j in range(OUT):
                            gone = bits_of(left[i]) == GONE
                            more = fma(left[i], right[j], s[i, j])
                            s[i, j] = select_f(gone, s[i, j], more)
                else:
                    for i in range(8):
                        for j in range(OUT):
                            s[i, j] = fma(left[i], right[j], s[i, j])
        for i in range(8):
            for j in range(OUT):
                o[i, j] = o[i, j] + s[i, j]

    at_keys, at_probabilities = rows * chunk * 4, rows * chunk * 4 + KEYS * chunk * 4
    return Form(8, 4, OUT, 4, at_keys, at_probabilities, at_probabilities + KEYS * PITCH, False, place, itself, itself,
                put_query, put_key, put_value, scores, share, context)
