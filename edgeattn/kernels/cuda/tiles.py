"""How a block multiplies tiles: what lies where in shared memory, and which thread holds which scores.

attention.py has the one loop nest over keys; it is made with a `Form`, the functions below for one kind of product. A
tile has 64 keys and `rows` queries. A thread holds s (own queries, own keys) of the scores and, of the same queries,
o (own queries, own values) of the context; own number r is row `down(r)`, and k column `across(k)`, from its `place`.

    multiply-add    thread (x, y) of 16 columns: queries 8 y + r, keys 4 x + k, values chunk / 16 x + k
    tensor cores    lane l of a warp, g = l // 4, t = l % 4: queries 16 warp + g + 8 r, keys and values
                    8 (k // 2) + 2 t + k % 2: what mma's result has and, two at a time, what its left operand wants
"""
import dataclasses
import functools

from edgeattn.kernels.cuda.language import Device, cuda, device, float32, int32
from edgeattn.kernels.cuda.ptx import (
    bits_of,
    float_of_bits,
    fma,
    half_pair,
    maximum,
    mma_f16,
    mma_s8,
    mma_tf32,
    mma_u8s8,
    nearest,
    read_b32,
    read_f32x2,
    read_f32x4,
    read_matrices,
    read_turned,
    select_f,
    select_i,
    times,
    to_float,
    to_tf32,
    truncate,
    write_b32,
    write_b32x2,
    write_b32x4,
    write_f32,
    write_f32x4,
    write_s8,
)

KEYS = 64  # of a tile
GONE = -2147483648  # the bits of -0.0, which marks the probability of a key that is not to be seen
_INFINITY = float("inf")


@dataclasses.dataclass(frozen=True)
class Form:
    """One kind of product, for blocks of so many queries and pieces of so many numbers.

    Parameters
    ----------
    queries, keys, values : int
        How many of each a thread holds.
    lanes : int
        A query's scores lie with 2**lanes neighbouring threads.
    at_keys, at_probabilities, bytes : int
        Where keys, then values, and probabilities begin in shared memory, and its end.
    late : bool
        Scores are scaled, not queries: those would be rounded twice.
    place, down, across : Device
        (t, values of a thread) -> row, column of scores, column of the context; r -> row; k -> column.
    put_query, put_key, put_value : Device
        (tile, t's row, t's column of four, four numbers) to shared memory; put_value gives 0 where all are finite.
    scores : Device
        (queries, keys, t, s, left, right): s += the product of two tiles.
    share : Device
        (probabilities, t, s): what other threads need of the probabilities.
    context : Device
        (probabilities, values, t, careful, s, o, left, right): o += the product; s is lost unless `put_left`.
    put_left : Device or None
        As put_value, what that left out, for `left_context` (values, t, s, o), which adds it; None where nothing is.
    """

    queries: int
    keys: int
    values: int
    lanes: int
    at_keys: int
    at_probabilities: int
    bytes: int
    late: bool
    place: Device
    down: Device
    across: Device
    put_query: Device
    put_key: Device
    put_value: Device
    scores: Device
    share: Device
    context: Device
    put_left: Device | None = None
    left_context: Device | None = None


# -- multiply-adds ---------------------------------------------------------------------------------------------------


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


# -- tensor cores ----------------------------------------------------------------------------------------------------


@device
def fragment_place(t):
    """Of warps, 16 queries each."""
    lane = int32(t & 31)
    pair = int32((lane & 3) * 2)
    return int32((t >> 5) * 16 + (lane >> 2)), pair, pair


@device
def fragment_row(r):
    """Own queries are 8 apart."""
    return 8 * r


@device
def fragment_column(k):
    """Own keys and values are pairs 8 apart."""
    return 8 * (k >> 1) + (k & 1)


@device
def nothing_to_share(to, t, s):
    """The probabilities stay with the threads that found them."""


@functools.cache
def products(mma, depth, pitch):
    """c (2, 16) += 16 rows of the warp in one tile times the 64 rows of another, `depth` steps of 32 bytes."""

    @device
    def multiply(left, right, t, c):
        lane, warp = int32(t & 31), int32(t >> 5)
        a_at = int32(left + times(int32(warp * 16 + (lane & 15)), pitch) + (lane >> 4) * 16)
        b_at = int32(right + times(int32((lane & 7) + ((lane >> 4) << 3)), pitch) + ((lane >> 3) & 1) * 16)
        for k in range(depth):
            a0, a1, a2, a3 = read_matrices(int32(a_at + k * 32))
            for n in range(4):
                b0, b1, b2, b3 = read_matrices(int32(b_at + n * 16 * pitch + k * 32))
                c[0, 4 * n], c[0, 4 * n + 1], c[1, 4 * n], c[1, 4 * n + 1] = mma(
                    a0, a1, a2, a3, b0, b1, c[0, 4 * n], c[0, 4 * n + 1], c[1, 4 * n], c[1, 4 * n + 1])
                c[0, 4 * n + 2], c[0, 4 * n + 3], c[1, 4 * n + 2], c[1, 4 * n + 3] = mma(
                    a0, a1, a2, a3, b2, b3, c[0, 4 * n + 2], c[0, 4 * n + 3], c[1, 4 * n + 2], c[1, 4 * n + 3])

    return multiply


# How float16 and tf32 words are made of four neighbouring numbers, and from which magnitude on they are infinite:
# halfway from the largest number to the next power of two.


@device
def put_halves(at, a, b, c, d):
    """Four numbers as float16."""
    write_b32x2(at, half_pair(b, a), half_pair(d, c))


@device
def put_tf32(at, a, b, c, d):
    """Four numbers with 10 bits of fraction."""
    write_b32x4(at, to_tf32(a), to_tf32(b), to_tf32(c), to_tf32(d))


_TF32_END = float(2**128 - 2**116)


@functools.cache
def tensor_cores(precision, rows, chunk):
    """The Form of float16 or tf32 products with float32 sums: tiles lie in rows, 16 bytes longer than their numbers.

    So eight rows meet different banks. What is not finite is left out of the product, where it would meet the 0 of
    keys that are not to be seen, and added by a second one: of the keys that are seen, how many hold a NaN (1), an
    infinity (128), a negative one (16384), 64 of each at most.
    """
    HALF = precision == "float16"
    SIZE, END = (2, 65520.0) if HALF else (4, _TF32_END)
    PITCH = chunk * SIZE + 16
    DEEP, OUT = chunk * SIZE // 32, chunk // 4
    put = put_halves if HALF else put_tf32
    multiply = products(mma_f16 if HALF else mma_tf32, DEEP, PITCH)

    @device
    def put_row(at, row, column, a, b, c, d):
        put(int32(at + times(row, PITCH) + column * 4 * SIZE), a, b, c, d)

    @device
    def finite(e):
        return maximum(e, -e) < float32(END)

    @device
    def or_zero(e):
        return select_f(finite(e), e, float32(0.0))

    @device
    def put_value(at, row, column, a, b, c, d):
        put_row(at, row, column, or_zero(a), or_zero(b), or_zero(c), or_zero(d))
        good = finite(a) & finite(b) & finite(c) & finite(d)
        return select_f(good, float32(0.0), float32(1.0))

    @device
    def kind_of(e):
        infinite = select_f(e > float32(0.0), float32(128.0), float32(16384.0))
        return select_f(finite(e), float32(0.0), select_f(e == e, infinite, float32(1.0)))

    @device
    def put_left(at, row, column, a, b, c, d):
        put_row(at, row, column, kind_of(a), kind_of(b), kind_of(c), kind_of(d))
        return float32(0.0)

    @device
    def scores(queries_at, keys_at, t, s, left, right):
        multiply(queries_at, keys_at, t, s)

    @device
    def weigh_halves(values_at, t, s, o):
        lane = int32(t & 31)
        at = int32(values_at + times(int32(lane & 15), PITCH) + (lane >> 4) * 16)
        for k in range(4):
            a0, a1 = half_pair(s[0, 4 * k + 1], s[0, 4 * k]), half_pair(s[1, 4 * k + 1], s[1, 4 * k])
            a2, a3 = half_pair(s[0, 4 * k + 3], s[0, 4 * k + 2]), half_pair(s[1, 4 * k + 3], s[1, 4 * k + 2])
            for n in range(chunk // 16):
                b0, b1, b2, b3 = read_turned(int32(at + k * 16 * PITCH + n * 32))
                o[0, 4 * n], o[0, 4 * n + 1], o[1, 4 * n], o[1, 4 * n + 1] = mma_f16(
                    a0, a1, a2, a3, b0, b1, o[0, 4 * n], o[0, 4 * n + 1], o[1, 4 * n], o[1, 4 * n + 1])
                o[0, 4 * n + 2], o[0, 4 * n + 3], o[1, 4 * n + 2], o[1, 4 * n + 3] = mma_f16(
                    a0, a1, a2, a3, b2, b3, o[0, 4 * n + 2], o[0, 4 * n + 3], o[1, 4 * n + 2], o[1, 4 * n + 3])

    @device
    def weigh_tf32(values_at, t, s, o):
        # the depth of a product has no order: a thread's keys 2 t and 2 t + 1 stand where mma has t and t + 4
        lane = int32(t & 31)
        at = int32(values_at + times(int32((lane & 3) * 2), PITCH) + (lane >> 2) * 4)
        for k in range(8):
            a0, a1 = to_tf32(s[0, 2 * k]), to_tf32(s[1, 2 * k])
            a2, a3 = to_tf32(s[0, 2 * k + 1]), to_tf32(s[1, 2 * k + 1])
            for n in range(chunk // 8):
                b0 = read_b32(int32(at + k * 8 * PITCH + n * 32))
                b1 = read_b32(int32(at + (k * 8 + 1) * PITCH + n * 32))
                o[0, 2 * n], o[0, 2 * n + 1], o[1, 2 * n], o[1, 2 * n + 1] = mma_tf32(
                    a0, a1, a2, a3, b0, b1, o[0, 2 * n], o[0, 2 * n + 1], o[1, 2 * n], o[1, 2 * n + 1])

    weigh = weigh_halves if HALF else weigh_tf32

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


# -- int8 ------------------------------------------------------------------------------------------------------------


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


FORMS = {"float32": multiply_adds, "int8": int8_products, "float16": functools.partial(tensor_cores, "float16"),
         "tf32": functools.partial(tensor_cores, "tf32")}
