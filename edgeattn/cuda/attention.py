"""float32 attention on the device: softmax(query key^T * scale + mask) value with online softmax, and its merge.

Dao et al., "FlashAttention" (2022), algorithm 1, on the ordinary multiply-adds. Letters: B batch, H query heads, Hkv
key/value heads, L queries, S keys, D head size, Dv value size. A block has ROWS queries of one head, 64 keys at a time,
2 ROWS threads; thread (x, y) of 16 columns has 8 queries and 4 keys, then 8 queries and CHUNK / 16 value elements.
D is walked in pieces of CHUNK, Dv is cut into pieces of CHUNK along the grid, so any size works in the same memory.
"""
from edgeattn.cuda.language import (
    Kernel,
    cuda,
    device,
    float32,
    int32,
    int64,
    larger,
    log,
    shared,
    smaller,
    specialised,
    tanh,
)
from edgeattn.cuda.ptx import (
    bits_of,
    block_x,
    block_y,
    block_z,
    divide,
    float_of_bits,
    fma,
    load_b32,
    load_b32x2,
    load_f16,
    load_f32,
    load_f32x4,
    load_s8,
    load_u8,
    load_uniform,
    load_uniform_64,
    maximum,
    quotient,
    read_f32x2,
    read_f32x4,
    remainder,
    select_f,
    shuffle_f,
    store_f16,
    store_f32,
    store_f32x4,
    thread,
    times,
    times_wide,
    to_float,
    unpack_f16,
    write_f32,
    write_f32x4,
)

KEYS = 64  # of a tile
FAR = 1 << 30  # beyond any distance between a query and a key

# Addresses (int64), 0 where there is none.
(A_Q, A_K, A_V, A_OUT, A_LSE, A_KEEP, A_BIAS, A_LENGTHS, A_SLOPES, A_KEY_SCALE, A_VALUE_SCALE, A_COUNT) = range(12)
# Numbers (int32). Strides are bytes, of B, H, L or S, and along the keys for masks; floats are given by their bits.
(P_H, P_GROUP, P_L, P_S, P_D, P_DV, P_CHUNKS, P_VALUE_CHUNKS, P_SPLITS, P_OFFSET, P_AT_END, P_LEFT, P_RIGHT,
 P_LENGTHS_64, P_FACTOR, P_SOFTCAP, P_Q_B, P_Q_H, P_Q_L, P_K_B, P_K_H, P_K_S, P_V_B, P_V_H, P_V_S,
 P_OUT_B, P_OUT_H, P_OUT_L, P_OUT_SPLIT, P_LSE_B, P_LSE_H, P_LSE_SPLIT, P_SUMS, P_KEEP_B, P_KEEP_H, P_KEEP_L, P_KEEP_S,
 P_BIAS_B, P_BIAS_H, P_BIAS_L, P_BIAS_S, P_SLOPES_B, P_SCALE_B, P_SCALE_H, P_SCALE_S, P_COUNT) = range(46)

_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453
_MINUS_INFINITY = float("-inf")
_GONE = -2147483648  # the bits of -0.0, which marks the probability of a key that is not to be seen
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
# 2**r on [-0.5, 0.5], minimax in relative error, as edgeattn/cpu/softmax.py
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
    return float_of_bits(int32(bits_of(y) + (bits_of(shifted) << 23)))


# -- formats of queries, keys and values: four neighbouring numbers as float32, the first `left` of which exist ------


@device
def fetch_float32(wide, address, good, left):
    """Of float32."""
    if wide:
        return load_f32x4(good & (left > 0), address)
    return (load_f32(good & (left > 0), address), load_f32(good & (left > 1), address + 4),
            load_f32(good & (left > 2), address + 8), load_f32(good & (left > 3), address + 12))


@device
def fetch_float16(wide, address, good, left):
    """Of float16."""
    if wide:
        low, high = load_b32x2(good & (left > 0), address)
        a, b = unpack_f16(low)
        c, d = unpack_f16(high)
        return a, b, c, d
    return (load_f16(good & (left > 0), address), load_f16(good & (left > 1), address + 2),
            load_f16(good & (left > 2), address + 4), load_f16(good & (left > 3), address + 6))


@device
def fetch_int8(wide, address, good, left):
    """Of int8 codes."""
    if wide:
        word = load_b32(good & (left > 0), address)
        return (to_float(int32(int32(word << 24) >> 24)), to_float(int32(int32(word << 16) >> 24)),
                to_float(int32(int32(word << 8) >> 24)), to_float(int32(word >> 24)))
    return (to_float(load_s8(good & (left > 0), address)), to_float(load_s8(good & (left > 1), address + 1)),
            to_float(load_s8(good & (left > 2), address + 2)), to_float(load_s8(good & (left > 3), address + 3)))


FETCH = {"float32": (fetch_float32, 4), "float16": (fetch_float16, 2), "int8": (fetch_int8, 1)}  # and bytes a number


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
def visible_keys(lengths, wide_lengths, batch, keys):
    """The number of leading keys of a batch entry that exist."""
    if lengths == 0:
        return keys
    if wide_lengths:
        found = int32(load_uniform_64(lengths + int64(batch) * 8))
    else:
        found = load_uniform(lengths + int64(batch) * 4)
    return int32(smaller(larger(found, 0), keys))


@specialised
def attention(rows, chunk, q_format, kv_format, wide, out_format):
    """The kernel for blocks of `rows` (32 or 64) queries and pieces of `chunk` (32 or 64) numbers.

    Parameters
    ----------
    rows, chunk : int
    q_format, kv_format : str
        Keys of FETCH. int8 keys and values have a scale each, A_KEY_SCALE and A_VALUE_SCALE (B, Hkv, S).
    wide : bool
        All rows of query, key, value and out begin at a multiple of four numbers, and D and Dv are such multiples.
    out_format : str
        "float32" or "float16"; float32 where there is more than one split.

    Returns
    -------
    Kernel
        Grid (ceil(L / rows), B H, value pieces * splits). With P_SPLITS above 1 each split sees a part
        of the keys, and writes its float32 result P_OUT_SPLIT apart; P_LSE_SPLIT apart, in place of the log-sum, the
        largest score to base 2, and P_SUMS behind that the sum.
    """
    ROWS, CHUNK, THREADS, WIDE = rows, chunk, 2 * rows, bool(wide)
    QUADS, PITCH = chunk // 4, rows * 4
    OUT = chunk // 16
    PER_ROW = chunk // 4
    Q_TURNS, K_TURNS = rows * PER_ROW // THREADS, KEYS * PER_ROW // THREADS
    AT_KEYS, AT_PROBABILITIES = rows * chunk * 4, rows * chunk * 4 + KEYS * chunk * 4
    BYTES = AT_PROBABILITIES + KEYS * rows * 4
    (fetch_q, Q_SIZE), (fetch, SIZE) = FETCH[q_format], FETCH[kv_format]
    SCALED, HALF = kv_format == "int8", out_format == "float16"
    OUT_SIZE = 2 if HALF else 4
    read_values = read_four if OUT == 4 else read_two

    def attention_kernel(a, p):
        # query (B, H, L, D)  key (B, Hkv, S, D)  value (B, Hkv, S, Dv)  out (B, H, L, Dv)  lse (B, H, L)
        base = shared()
        keys_at, probabilities_at = int32(base + AT_KEYS), int32(base + AT_PROBABILITIES)
        t = thread()
        x, y = int32(t & 15), int32(t >> 4)
        q0 = int32(block_x() * ROWS)
        batch = quotient(block_y(), p[P_H])
        head = remainder(block_y(), p[P_H])
        split = quotient(block_z(), p[P_VALUE_CHUNKS])
        d_out = int32(remainder(block_z(), p[P_VALUE_CHUNKS]) * CHUNK)
        kv = quotient(head, p[P_GROUP])
        L, D, Dv = p[P_L], p[P_D], p[P_DV]
        query = a[A_Q] + times_wide(batch, p[P_Q_B]) + times_wide(head, p[P_Q_H])
        key = a[A_K] + times_wide(batch, p[P_K_B]) + times_wide(kv, p[P_K_H])
        value = a[A_V] + times_wide(batch, p[P_V_B]) + times_wide(kv, p[P_V_H])
        keep = a[A_KEEP] + times_wide(batch, p[P_KEEP_B]) + times_wide(head, p[P_KEEP_H])
        bias = a[A_BIAS] + times_wide(batch, p[P_BIAS_B]) + times_wide(head, p[P_BIAS_H])
        scale_at = times_wide(batch, p[P_SCALE_B]) + times_wide(kv, p[P_SCALE_H])
        has_keep, has_bias, has_slope = a[A_KEEP] != 0, a[A_BIAS] != 0, a[A_SLOPES] != 0
        slope = float32(0.0)
        if has_slope:
            slope = float_of_bits(load_uniform(a[A_SLOPES] + times_wide(batch, p[P_SLOPES_B]) + head * 4))
            slope = slope * float32(-_LOG2_E)
        factor, softcap = float_of_bits(p[P_FACTOR]), float_of_bits(p[P_SOFTCAP])
        capped = p[P_SOFTCAP] != 0

        # 1. the keys that this block's queries may see: query i sees i + low <= j <= i + high, j < length
        length = visible_keys(a[A_LENGTHS], p[P_LENGTHS_64], batch, p[P_S])
        offset = p[P_OFFSET]
        if p[P_AT_END] != 0:
            offset = int32(length - L)
        low, high = -FAR, FAR
        if p[P_LEFT] >= 0:
            low = int32(offset - p[P_LEFT])
        if p[P_RIGHT] >= 0:
            high = int32(offset + p[P_RIGHT])
        first = int32(larger(0, int32(q0 + low)))
        last = int32(smaller(length, int32(int32(smaller(q0 + ROWS, L)) + high)))
        tiles = int32((larger(last - first, 0) + KEYS - 1) >> 6)
        per_split = quotient(int32(tiles + p[P_SPLITS] - 1), p[P_SPLITS])
        first = int32(first + times(split, per_split) * KEYS)
        last = int32(smaller(last, int32(first + per_split * KEYS)))

        s = cuda.local.array((8, 4), float32)
        o = cuda.local.array((8, OUT), float32)
        left = cuda.local.array(8, float32)
        right = cuda.local.array(4, float32)
        m = cuda.local.array(8, float32)
        total = cuda.local.array(8, float32)
        for i in range(8):
            m[i] = float32(_MINUS_INFINITY)
            total[i] = float32(0.0)
            for j in range(OUT):
                o[i, j] = float32(0.0)
        for k0 in range(first, last, KEYS):
            k0 = int32(k0)
            # 2. scores, D in pieces; the queries stay where they are one piece
            for i in range(8):
                for j in range(4):
                    s[i, j] = float32(0.0)
            for piece in range(p[P_CHUNKS]):
                d0 = int32(piece * CHUNK)
                cuda.syncthreads()
                if p[P_CHUNKS] > 1 or k0 == first:
                    for i in range(Q_TURNS):
                        row, column = int32((t + i * THREADS) // PER_ROW), int32((t + i * THREADS) % PER_ROW)
                        at = int32(times(int32(q0 + row), p[P_Q_L]) + (d0 + column * 4) * Q_SIZE)
                        e0, e1, e2, e3 = fetch_q(WIDE, query + at, int32(q0 + row) < L, int32(D - d0 - column * 4))
                        write_column(base, PITCH, row, column, e0 * factor, e1 * factor, e2 * factor, e3 * factor)
                for i in range(K_TURNS):
                    row, column = int32((t + i * THREADS) // PER_ROW), int32((t + i * THREADS) % PER_ROW)
                    at = int32(times(int32(k0 + row), p[P_K_S]) + (d0 + column * 4) * SIZE)
                    good = int32(k0 + row) < last
                    e0, e1, e2, e3 = fetch(WIDE, key + at, good, int32(D - d0 - column * 4))
                    if SCALED:
                        w = load_f32(good, a[A_KEY_SCALE] + scale_at + times(int32(k0 + row), p[P_SCALE_S]))
                        e0, e1, e2, e3 = e0 * w, e1 * w, e2 * w, e3 * w
                    write_column(keys_at, KEYS * 4, row, column, e0, e1, e2, e3)
                cuda.syncthreads()
                multiply_tiles(base, PITCH, keys_at, QUADS, x, y, left, right, s)
            # 3. softcap, then masks
            if capped:
                for i in range(8):
                    for j in range(4):
                        s[i, j] = tanh(s[i, j]) * softcap
            if has_slope:
                for i in range(8):
                    for j in range(4):
                        distance = int32(q0 + y * 8 + i + offset - k0 - x * 4 - j)
                        distance = int32(larger(distance, int32(0 - distance)))
                        s[i, j] = fma(to_float(distance), slope, s[i, j])
            if has_bias:
                for i in range(8):
                    row = int32(q0 + y * 8 + i)
                    row_at = times(row, p[P_BIAS_L])
                    for j in range(4):
                        column = int32(k0 + x * 4 + j)
                        at = int32(row_at + times(column, p[P_BIAS_S]))
                        b = load_f32((row < L) & (column < last), bias + at)
                        s[i, j] = select_f(b == float32(_MINUS_INFINITY), b, fma(b, float32(_LOG2_E), s[i, j]))
            if has_keep:
                for i in range(8):
                    row = int32(q0 + y * 8 + i)
                    row_at = times(row, p[P_KEEP_L])
                    for j in range(4):
                        column = int32(k0 + x * 4 + j)
                        at = int32(row_at + times(column, p[P_KEEP_S]))
                        seen = load_u8((row < L) & (column < last), keep + at) != 0
                        s[i, j] = select_f(seen, s[i, j], float32(_MINUS_INFINITY))
            edge = (int32(k0 + KEYS) > last) | (int32(q0 + ROWS - 1 + low) > k0) | (
                int32(q0 + high) < int32(k0 + KEYS - 1))
            if edge:
                for i in range(8):
                    from_key = int32(q0 + y * 8 + i + low - k0 - x * 4)
                    to_key = int32(smaller(int32(q0 + y * 8 + i + high + 1), last) - k0 - x * 4)
                    for j in range(4):
                        s[i, j] = select_f((j >= from_key) & (j < to_key), s[i, j], float32(_MINUS_INFINITY))
            # 4. online softmax to base 2; a row's 64 scores lie with 16 neighbouring threads
            for i in range(8):
                best = maximum(maximum(s[i, 0], s[i, 1]), maximum(s[i, 2], s[i, 3]))
                best = maximum(best, shuffle_f(best, 8))
                best = maximum(best, shuffle_f(best, 4))
                best = maximum(best, shuffle_f(best, 2))
                best = maximum(best, shuffle_f(best, 1))
                best = maximum(best, m[i])
                above = select_f(best == float32(_MINUS_INFINITY), float32(0.0), best)
                shrink = exp2(m[i] - above)
                m[i] = best
                row_sum = float32(0.0)
                for j in range(4):
                    gone = s[i, j] == float32(_MINUS_INFINITY)
                    s[i, j] = select_f(gone, float32(-0.0), exp2(s[i, j] - above))
                    row_sum = row_sum + s[i, j]
                total[i] = fma(total[i], shrink, row_sum)
                for j in range(OUT):
                    o[i, j] = o[i, j] * shrink
            for j in range(4):
                to = int32(probabilities_at + (x * 4 + j) * PITCH)
                swap = int32((x & 7) << 2)
                write_f32x4(int32(to + ((int32(y * 8) ^ swap) << 2)), s[0, j], s[1, j], s[2, j], s[3, j])
                write_f32x4(int32(to + ((int32(y * 8 + 4) ^ swap) << 2)), s[4, j], s[5, j], s[6, j], s[7, j])
            cuda.syncthreads()
            # 5. values, as they are; whether all of them are finite
            finite = float32(0.0)
            for i in range(K_TURNS):
                row, column = int32((t + i * THREADS) // PER_ROW), int32((t + i * THREADS) % PER_ROW)
                at = int32(times(int32(k0 + row), p[P_V_S]) + (d_out + column * 4) * SIZE)
                good = int32(k0 + row) < last
                e0, e1, e2, e3 = fetch(WIDE, value + at, good, int32(Dv - d_out - column * 4))
                if SCALED:
                    w = load_f32(good, a[A_VALUE_SCALE] + scale_at + times(int32(k0 + row), p[P_SCALE_S]))
                    e0, e1, e2, e3 = e0 * w, e1 * w, e2 * w, e3 * w
                write_f32x4(int32(keys_at + row * CHUNK * 4 + column * 16), e0, e1, e2, e3)
                finite = finite + (e0 - e0) + (e1 - e1) + (e2 - e2) + (e3 - e3)
            # an infinity or NaN minus itself is NaN
            careful = cuda.syncthreads_or(int32(finite != float32(0.0))) != 0
            # 6. context; a value that is not finite must not meet the 0 of a key that is not to be seen. Each tile has
            # a sum of its own, in the scores' registers: one long chain of additions would double the rounding error.
            for i in range(8):
                for j in range(OUT):
                    s[i, j] = float32(0.0)
            for quad in range(KEYS // 4):
                swap = int32((quad & 7) << 2)
                p_at = int32(probabilities_at + quad * 4 * PITCH + ((int32(y * 8) ^ swap) << 2))
                p_next = int32(probabilities_at + quad * 4 * PITCH + ((int32(y * 8 + 4) ^ swap) << 2))
                v_at = int32(keys_at + quad * 16 * CHUNK + x * OUT * 4)
                for u in range(4):
                    left[0], left[1], left[2], left[3] = read_f32x4(int32(p_at + u * PITCH))
                    left[4], left[5], left[6], left[7] = read_f32x4(int32(p_next + u * PITCH))
                    read_values(int32(v_at + u * 4 * CHUNK), right)
                    if careful:
                        for i in range(8):
                            for j in range(OUT):
                                gone = bits_of(left[i]) == _GONE
                                more = fma(left[i], right[j], s[i, j])
                                s[i, j] = select_f(gone, s[i, j], more)
                    else:
                        for i in range(8):
                            for j in range(OUT):
                                s[i, j] = fma(left[i], right[j], s[i, j])
            for i in range(8):
                for j in range(OUT):
                    o[i, j] = o[i, j] + s[i, j]

        # 7. divide by the sum; a query that saw no key gets zeros
        out = (a[A_OUT] + times_wide(batch, p[P_OUT_B]) + times_wide(head, p[P_OUT_H])
               + times_wide(split, p[P_OUT_SPLIT]) + (d_out + x * OUT) * OUT_SIZE)
        lse = (a[A_LSE] + times_wide(batch, p[P_LSE_B]) + times_wide(head, p[P_LSE_H])
               + times_wide(split, p[P_LSE_SPLIT]))
        for i in range(8):
            row_sum = total[i]
            row_sum = row_sum + shuffle_f(row_sum, 8)
            row_sum = row_sum + shuffle_f(row_sum, 4)
            row_sum = row_sum + shuffle_f(row_sum, 2)
            row_sum = row_sum + shuffle_f(row_sum, 1)
            none = row_sum == float32(0.0)
            inverse = select_f(none, float32(0.0), divide(float32(1.0), row_sum))
            row = int32(q0 + y * 8 + i)
            good = row < L
            to = out + times(row, p[P_OUT_L])
            if WIDE and OUT == 4 and not HALF:
                store_f32x4(good & (int32(d_out + x * OUT) < Dv), to,
                            o[i, 0] * inverse, o[i, 1] * inverse, o[i, 2] * inverse, o[i, 3] * inverse)
            else:
                for j in range(OUT):
                    inside = good & (int32(d_out + x * OUT + j) < Dv)
                    if HALF:
                        store_f16(inside, to + j * OUT_SIZE, o[i, j] * inverse)
                    else:
                        store_f32(inside, to + j * OUT_SIZE, o[i, j] * inverse)
            if p[P_SPLITS] > 1:
                to = lse + row * 4
                store_f32(good & (x == 0) & (d_out == 0), to, m[i])
                store_f32(good & (x == 0) & (d_out == 0), to + p[P_SUMS], row_sum)
            elif a[A_LSE] != 0:
                found = float32(log(select_f(none, float32(1.0), row_sum))) + m[i] * float32(_LN_2)
                found = select_f(none, float32(_MINUS_INFINITY), found)
                store_f32(good & (x == 0) & (d_out == 0), lse + row * 4, found)

    return Kernel(attention_kernel, A_COUNT, P_COUNT, THREADS, BYTES)
