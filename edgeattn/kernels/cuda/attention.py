"""Attention on the device: softmax(query key^T * scale + mask) value with online softmax.

Dao et al., "FlashAttention" (2022), algorithm 1. Letters: B batch, H query heads, Hkv key/value heads, L queries, S
keys, D head size, Dv value size. A block has ROWS queries of one head, 64 keys at a time, 2 ROWS threads; tiles.py says
who holds what, and has the products: float32 multiply-adds, or float16, tf32 or int8 ones of the tensor cores.
D is walked in pieces of CHUNK, Dv is cut into pieces of CHUNK along the grid, so any size works in the same memory.
"""
import functools

from edgeattn.kernels.cuda.language import (
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
from edgeattn.kernels.cuda.ptx import (
    bits_of,
    block_x,
    block_y,
    block_z,
    divide,
    float_of_bits,
    fma,
    half_pair,
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
    nearest,
    quotient,
    read_f32,
    remainder,
    select_f,
    shuffle_f,
    store_b32,
    store_f16,
    store_f32,
    store_f32x2,
    thread,
    times,
    times_wide,
    to_float,
    unpack_f16,
    write_f32,
)

from .int8_products import int8_products
from .multiply_adds import multiply_adds
from .tensor_cores import tensor_cores
from .tiles import KEYS

# The Form of products in each precision, for blocks of so many queries and pieces of so many numbers.
FORMS = {"float32": multiply_adds, "int8": int8_products, "float16": functools.partial(tensor_cores, "float16"),
         "tf32": functools.partial(tensor_cores, "tf32")}

FAR = 1 << 30  # beyond any distance between a query and a key

# Addresses (int64), 0 where there is none.
(A_Q, A_K, A_V, A_OUT, A_LSE, A_KEEP, A_BIAS, A_LENGTHS, A_SLOPES, A_KEY_SCALE, A_VALUE_SCALE, A_Q_SCALE,
 A_COUNT) = range(13)
# Numbers (int32). Strides are bytes, of B, H, L or S, and along the keys for masks; floats are given by their bits.
(P_H, P_GROUP, P_L, P_S, P_D, P_DV, P_CHUNKS, P_VALUE_CHUNKS, P_SPLITS, P_OFFSET, P_AT_END, P_LEFT, P_RIGHT,
 P_LENGTHS_64, P_FACTOR, P_SOFTCAP, P_Q_B, P_Q_H, P_Q_L, P_K_B, P_K_H, P_K_S, P_V_B, P_V_H, P_V_S,
 P_OUT_B, P_OUT_H, P_OUT_L, P_OUT_SPLIT, P_LSE_B, P_LSE_H, P_LSE_SPLIT, P_SUMS, P_KEEP_B, P_KEEP_H, P_KEEP_L, P_KEEP_S,
 P_BIAS_B, P_BIAS_H, P_BIAS_L, P_BIAS_S, P_SLOPES_B, P_SCALE_B, P_SCALE_H, P_SCALE_S, P_PARTS, P_COUNT) = range(47)

_LOG2_E = 1.4426950408889634
_LOWEST_BIAS = -2.3e38  # times log2(e) it is finite still: only -inf hides a key
_LN_2 = 0.6931471805599453
_MINUS_INFINITY = float("-inf")
_LOG2_255 = 7.994353436858858  # of the largest probability as a byte
_SMALLEST_SCALE = 2.0**-60  # of values in int8, as of all int8 tensors
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


@device
def fetch_codes(wide, address, good, left):
    """Four int8 codes as they are: one word, by its bits."""
    word = load_b32(good & (left > 0), address)
    return float_of_bits(word), float32(0.0), float32(0.0), float32(0.0)


# format -> (function, bytes of a number)
FETCH = {"float32": (fetch_float32, 4), "float16": (fetch_float16, 2), "int8": (fetch_int8, 1),
         "codes": (fetch_codes, 1)}


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


@functools.cache
def staging(fetch, size, scaled, chunk, threads, wide, put):
    """A function that brings a tile of values to shared memory with `put`; the sum of what that gives."""
    SHIFT, MASK = (chunk // 4).bit_length() - 1, chunk // 4 - 1
    STEP = threads >> SHIFT

    @device
    def stage(a, p, values_at, t, value, scale_at, k0, last, d_out):
        found = float32(0.0)
        column = int32(t & MASK)
        for i in range(0, KEYS, STEP):
            row = int32((t >> SHIFT) + i)
            at = int32(times(int32(k0 + row), p[P_V_S]) + (d_out + column * 4) * size)
            good = int32(k0 + row) < last
            e0, e1, e2, e3 = fetch(wide, value + at, good, int32(p[P_DV] - d_out - column * 4))
            if scaled:
                w = load_f32(good, a[A_VALUE_SCALE] + scale_at + times(int32(k0 + row), p[P_SCALE_S]))
                e0, e1, e2, e3 = e0 * w, e1 * w, e2 * w, e3 * w
            found = found + put(values_at, row, column, e0, e1, e2, e3)
        return found

    return stage


@functools.cache
def staging_turned(chunk, threads, put):
    """As `staging`, of int8 values that lie turned: a row of keys for each number of a value, P_V_S bytes apart."""
    STEP = threads * 4 // KEYS

    @device
    def stage(a, p, values_at, t, value, scale_at, k0, last, d_out):
        column = int32(t & 15)
        for i in range(0, chunk, STEP):
            row = int32((t >> 4) + i)
            at = int32(times(int32(d_out + row), p[P_V_S]) + k0 + column * 4)
            e0, e1, e2, e3 = fetch_codes(True, value + at, int32(k0 + column * 4) < last, int32(1))
            put(values_at, row, column, e0, e1, e2, e3)
        return float32(0.0)

    return stage


@specialised
def attention(precision, rows, chunk, q_format, kv_format, wide, out_format, weights=False):
    """The kernel for blocks of `rows` (32 or 64) queries and pieces of `chunk` numbers (32 or 64; 128 for float16).

    Parameters
    ----------
    precision : str
        A key of FORMS.
    rows, chunk : int
    q_format, kv_format : str
        Keys of FETCH. int8 keys and values have a scale each, A_KEY_SCALE and A_VALUE_SCALE (B, Hkv, S).
        "codes" with precision "int8": int8 and padded with zeros to whole pieces, values turned (B, Hkv, Dv, S) in rows
        of whole words, and A_Q_SCALE (B, H, L), which has the factor of the scores in it.
    wide : bool
        All rows of query, key, value and out begin at a multiple of four numbers, and D and Dv are such multiples.
    out_format : str
        "float32" or "float16"; float32 where there is more than one part.
    weights : bool
        The kernel that writes probabilities, (B, H, L, S) to A_OUT, from what all parts left at A_LSE.

    Returns
    -------
    Kernel
        Grid (ceil(L / rows), B H, value pieces * splits). With P_SPLITS above 1 each split sees a part
        of the keys, and writes its float32 result P_OUT_SPLIT apart. Where there is P_SUMS, in place of the log-sum
        P_LSE_SPLIT apart the largest score to base 2, and P_SUMS behind that the sum: of P_PARTS parts for `weights`.
    """
    WEIGHTS = bool(weights)
    form = FORMS[precision](rows, chunk)
    QUERIES, EACH, OUT, LANES, LATE = form.queries, form.keys, form.values, form.lanes, form.late
    AT_KEYS, AT_PROBABILITIES = form.at_keys, form.at_probabilities
    place, down, across = form.place, form.down, form.across
    put_query, put_key, scores, share, context = (
        form.put_query, form.put_key, form.scores, form.share, form.context)
    ROWS, CHUNK, THREADS, WIDE = rows, chunk, 2 * rows, bool(wide)
    SHIFT, MASK = (chunk // 4).bit_length() - 1, chunk // 4 - 1  # the threads bring STEP rows at a time, in fours
    STEP = THREADS >> SHIFT
    (fetch_q, Q_SIZE), (fetch, SIZE) = FETCH[q_format], FETCH[kv_format]
    SCALED, HALF, CODES = kv_format == "int8", out_format == "float16", kv_format == "codes"
    OUT_SIZE = 2 if HALF else 4
    stage_values = (staging_turned(chunk, THREADS, form.put_value) if CODES else
                    staging(fetch, SIZE, SCALED, chunk, THREADS, WIDE, form.put_value))
    AT_LISTS = form.bytes  # of int8 products, a float32 per key: scale, the value's log2 of the scale, and its inverse
    BYTES = form.bytes + (4 * KEYS * 4 if CODES else 0)
    SECOND = form.put_left is not None
    stage_left = staging(fetch, SIZE, SCALED, chunk, THREADS, WIDE, form.put_left) if SECOND else stage_values
    left_context = form.left_context if SECOND else form.context

    def attention_kernel(a, p):
        # query (B, H, L, D)  key (B, Hkv, S, D)  value (B, Hkv, S, Dv)  out (B, H, L, Dv)  lse (B, H, L)
        base = shared()
        keys_at, probabilities_at = int32(base + AT_KEYS), int32(base + AT_PROBABILITIES)
        t = thread()
        row0, column0, d0 = place(t)
        q0 = int32(block_x() * ROWS)
        row0 = int32(q0 + row0)
        four_row, column = int32(t >> SHIFT), int32(t & MASK)  # of what the thread brings to shared memory
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
        if CODES:
            first = int32(first & -4)  # values are read four keys at a time
        last = int32(smaller(length, int32(int32(smaller(q0 + ROWS, L)) + high)))
        end = last
        if WEIGHTS:  # every key has one, 0 where it is not to be seen
            first, end = int32(0), p[P_S]
        tiles = int32((larger(end - first, 0) + KEYS - 1) >> 6)
        per_split = quotient(int32(tiles + p[P_SPLITS] - 1), p[P_SPLITS])
        first = int32(first + times(split, per_split) * KEYS)
        end = int32(smaller(end, int32(first + per_split * KEYS)))
        if not WEIGHTS:
            last = end

        s = cuda.local.array((QUERIES, EACH), float32)
        o = cuda.local.array((QUERIES, OUT), float32)
        left = cuda.local.array(8, float32)
        right = cuda.local.array(4, float32)
        m = cuda.local.array(QUERIES, float32)
        total = cuda.local.array(QUERIES, float32)
        for r in range(QUERIES):
            m[r] = float32(_MINUS_INFINITY)
            total[r] = float32(0.0)
            for k in range(OUT):
                o[r, k] = float32(0.0)
        if WEIGHTS:  # of all parts together: what each row's scores are measured from, and 1 / sum
            sums = a[A_LSE] + times_wide(batch, p[P_LSE_B]) + times_wide(head, p[P_LSE_H])
            for r in range(QUERIES):
                row = int32(row0 + down(r))
                at = sums + row * 4
                for part in range(p[P_PARTS]):
                    m[r] = maximum(m[r], load_f32(row < L, at + times_wide(int32(part), p[P_LSE_SPLIT])))
                m[r] = select_f(m[r] == float32(_MINUS_INFINITY), float32(0.0), m[r])
                for part in range(p[P_PARTS]):
                    found = at + times_wide(int32(part), p[P_LSE_SPLIT])
                    size = load_f32(row < L, found + p[P_SUMS])
                    total[r] = fma(exp2(load_f32(row < L, found) - m[r]), size, total[r])
                none = total[r] == float32(0.0)
                total[r] = select_f(none, float32(0.0), divide(float32(1.0), total[r]))
        q_scale = cuda.local.array(QUERIES, float32)
        lists = int32(base + AT_LISTS)
        if CODES:
            for r in range(QUERIES):
                row = int32(row0 + down(r))
                q_scale[r] = load_f32(row < L, a[A_Q_SCALE] + times_wide(times(block_y(), L), 4) + row * 4)
        for k0 in range(first, end, KEYS):
            k0 = int32(k0)
            # 2. scores, D in pieces; the queries stay where they are one piece
            for r in range(QUERIES):
                for k in range(EACH):
                    s[r, k] = float32(0.0)
            for piece in range(p[P_CHUNKS]):
                d_in = int32(piece * CHUNK)
                cuda.syncthreads()
                if p[P_CHUNKS] > 1 or k0 == first:
                    for i in range(0, ROWS, STEP):
                        row = int32(four_row + i)
                        at = int32(times(int32(q0 + row), p[P_Q_L]) + (d_in + column * 4) * Q_SIZE)
                        e0, e1, e2, e3 = fetch_q(WIDE, query + at, int32(q0 + row) < L, int32(D - d_in - column * 4))
                        if not LATE:
                            e0, e1, e2, e3 = e0 * factor, e1 * factor, e2 * factor, e3 * factor
                        put_query(base, row, column, e0, e1, e2, e3)
                for i in range(KEYS // STEP):
                    row = int32(int32(t + i * THREADS) >> SHIFT)
                    at = int32(times(int32(k0 + row), p[P_K_S]) + (d_in + column * 4) * SIZE)
                    good = int32(k0 + row) < last
                    e0, e1, e2, e3 = fetch(WIDE, key + at, good, int32(D - d_in - column * 4))
                    if SCALED:
                        w = load_f32(good, a[A_KEY_SCALE] + scale_at + times(int32(k0 + row), p[P_SCALE_S]))
                        e0, e1, e2, e3 = e0 * w, e1 * w, e2 * w, e3 * w
                    put_key(keys_at, row, column, e0, e1, e2, e3)
                if CODES:
                    i = int32(k0 + (t & (KEYS - 1)))
                    at = int32(scale_at + times(i, p[P_SCALE_S]))
                    w = load_f32((t < KEYS) & (i < last), a[A_KEY_SCALE] + at)
                    size = load_f32(i < last, a[A_VALUE_SCALE] + at)
                    size = maximum(size, float32(_SMALLEST_SCALE))
                    value_log = float32(log(size)) * float32(_LOG2_E)
                    write_f32(int32(lists + t * 4), select_f(t < KEYS, w, value_log))
                    inverse = select_f(size == size, divide(float32(1.0), size), float32(0.0))  # NaN shows in its log
                    write_f32(int32(lists + (t + 2 * KEYS) * 4), inverse)
                cuda.syncthreads()
                scores(base, keys_at, t, s, left, right)
            if CODES:
                for k in range(EACH):
                    at = int32(lists + (column0 + across(k)) * 4)
                    for r in range(QUERIES):
                        s[r, k] = s[r, k] * read_f32(at) * q_scale[r]
            elif LATE:
                for r in range(QUERIES):
                    for k in range(EACH):
                        s[r, k] = s[r, k] * factor
            # 3. softcap, then masks
            if capped:
                for r in range(QUERIES):
                    for k in range(EACH):
                        s[r, k] = tanh(s[r, k]) * softcap
            key0 = int32(k0 + column0)
            if has_slope:
                for r in range(QUERIES):
                    for k in range(EACH):
                        distance = int32(row0 + down(r) + offset - key0 - across(k))
                        distance = int32(larger(distance, int32(0 - distance)))
                        s[r, k] = fma(to_float(distance), slope, s[r, k])
            if has_bias:
                for r in range(QUERIES):
                    row = int32(row0 + down(r))
                    row_at = times(row, p[P_BIAS_L])
                    for k in range(EACH):
                        there = int32(key0 + across(k))
                        at = int32(row_at + times(there, p[P_BIAS_S]))
                        b = load_f32((row < L) & (there < last), bias + at)
                        bounded = select_f(b < float32(_LOWEST_BIAS), float32(_LOWEST_BIAS), b)
                        s[r, k] = select_f(b == float32(_MINUS_INFINITY), b, fma(bounded, float32(_LOG2_E), s[r, k]))
            if has_keep:
                for r in range(QUERIES):
                    row = int32(row0 + down(r))
                    row_at = times(row, p[P_KEEP_L])
                    for k in range(EACH):
                        there = int32(key0 + across(k))
                        at = int32(row_at + times(there, p[P_KEEP_S]))
                        seen = load_u8((row < L) & (there < last), keep + at) != 0
                        s[r, k] = select_f(seen, s[r, k], float32(_MINUS_INFINITY))
            edge = (int32(k0 + KEYS) > last) | (int32(q0 + ROWS - 1 + low) > k0) | (
                int32(q0 + high) < int32(k0 + KEYS - 1))
            if edge:
                for r in range(QUERIES):
                    from_key = int32(row0 + down(r) + low - key0)
                    to_key = int32(smaller(int32(row0 + down(r) + high + 1), last) - key0)
                    for k in range(EACH):
                        s[r, k] = select_f((across(k) >= from_key) & (across(k) < to_key), s[r, k],
                                           float32(_MINUS_INFINITY))
            if WEIGHTS:
                to = (a[A_OUT] + times_wide(batch, p[P_OUT_B]) + times_wide(head, p[P_OUT_H])
                      + key0 * OUT_SIZE)
                for r in range(QUERIES):
                    row = int32(row0 + down(r))
                    row_at = times(row, p[P_OUT_L])
                    for k in range(EACH):
                        gone = s[r, k] == float32(_MINUS_INFINITY)
                        y = select_f(gone, float32(0.0), exp2(s[r, k] - m[r]) * total[r])
                        good = (row < L) & (int32(key0 + across(k)) < p[P_S])
                        at = to + int32(row_at + across(k) * OUT_SIZE)
                        if HALF:
                            store_f16(good, at, y)
                        else:
                            store_f32(good, at, y)
                continue
            # 4. online softmax to base 2; a row's 64 scores lie with neighbouring threads
            for r in range(QUERIES):
                best = s[r, 0]
                for k in range(1, EACH):
                    best = maximum(best, s[r, k])
                for step in range(LANES):
                    best = maximum(best, shuffle_f(best, int32(1 << step)))
                empty = best == float32(_MINUS_INFINITY)
                here = select_f(empty, float32(0.0), best)
                best = maximum(m[r], best)
                above = select_f(best == float32(_MINUS_INFINITY), float32(0.0), best)
                shrink = exp2(m[r] - above)
                m[r] = best
                row_sum = float32(0.0)
                if CODES:
                    # A byte has the value's scale in it, and is 255 where that is largest among the tile's keys: those
                    # far below another tile's are seen too. What is summed is what the product will see, the bytes.
                    top = float32(_MINUS_INFINITY)
                    for k in range(EACH):
                        gone = s[r, k] == float32(_MINUS_INFINITY)
                        value_log = read_f32(int32(lists + (KEYS + column0 + across(k)) * 4))
                        s[r, k] = select_f(gone, s[r, k], s[r, k] - here + value_log)
                        top = maximum(top, s[r, k])
                    for step in range(LANES):
                        top = maximum(top, shuffle_f(top, int32(1 << step)))
                    top = select_f(empty, float32(0.0), top) - float32(_LOG2_255)
                    left[r] = select_f(empty, float32(0.0), exp2(here - above + top))
                    for k in range(EACH):
                        gone = s[r, k] == float32(_MINUS_INFINITY)
                        byte = nearest(select_f(gone, float32(0.0), exp2(s[r, k] - top)))
                        s[r, k] = to_float(byte)
                        at = int32(lists + (2 * KEYS + column0 + across(k)) * 4)
                        row_sum = fma(s[r, k], read_f32(at), row_sum)
                    row_sum = row_sum * left[r]
                else:
                    for k in range(EACH):
                        gone = s[r, k] == float32(_MINUS_INFINITY)
                        s[r, k] = select_f(gone, float32(-0.0), exp2(s[r, k] - above))
                        row_sum = row_sum + s[r, k]
                total[r] = fma(total[r], shrink, row_sum)
                for k in range(OUT):
                    o[r, k] = o[r, k] * shrink
            share(probabilities_at, t, s)
            cuda.syncthreads()
            # 5. values, as they are; whether all of them are finite
            found = stage_values(a, p, keys_at, t, value, scale_at, k0, last, d_out)
            careful = cuda.syncthreads_or(int32(found != float32(0.0))) != 0
            # 6. context
            context(probabilities_at, keys_at, t, careful, s, o, left, right)
            if SECOND:  # noqa: SIM102 - known when the kernel is made, and left out where there is none
                if careful:
                    cuda.syncthreads()
                    stage_left(a, p, keys_at, t, value, scale_at, k0, last, d_out)
                    cuda.syncthreads()
                    left_context(keys_at, t, s, o)

        if WEIGHTS:
            return
        # 7. divide by the sum; a query that saw no key gets zeros
        d0 = int32(d_out + d0)
        out = (a[A_OUT] + times_wide(batch, p[P_OUT_B]) + times_wide(head, p[P_OUT_H])
               + times_wide(split, p[P_OUT_SPLIT]) + d0 * OUT_SIZE)
        lse = (a[A_LSE] + times_wide(batch, p[P_LSE_B]) + times_wide(head, p[P_LSE_H])
               + times_wide(split, p[P_LSE_SPLIT]))
        for r in range(QUERIES):
            row_sum = total[r]
            for step in range(LANES):
                row_sum = row_sum + shuffle_f(row_sum, int32(1 << step))
            none = row_sum == float32(0.0)
            inverse = select_f(none, float32(0.0), divide(float32(1.0), row_sum))
            row = int32(row0 + down(r))
            good = row < L
            to = out + times(row, p[P_OUT_L])
            for k in range(0, OUT, 2):
                d = int32(across(k))
                y0, y1 = o[r, k] * inverse, o[r, k + 1] * inverse
                if WIDE and HALF:
                    store_b32(good & (int32(d0 + d) < Dv), to + d * OUT_SIZE, half_pair(y1, y0))
                elif WIDE:
                    store_f32x2(good & (int32(d0 + d) < Dv), to + d * OUT_SIZE, y0, y1)
                elif HALF:
                    store_f16(good & (int32(d0 + d) < Dv), to + d * OUT_SIZE, y0)
                    store_f16(good & (int32(d0 + d + 1) < Dv), to + d * OUT_SIZE + OUT_SIZE, y1)
                else:
                    store_f32(good & (int32(d0 + d) < Dv), to + d * OUT_SIZE, y0)
                    store_f32(good & (int32(d0 + d + 1) < Dv), to + d * OUT_SIZE + OUT_SIZE, y1)
            good = good & (column0 == 0) & (d_out == 0)
            if p[P_SUMS] != 0:
                to = lse + row * 4
                store_f32(good, to, m[r])
                store_f32(good, to + p[P_SUMS], row_sum)
            elif a[A_LSE] != 0:
                sum_log = float32(log(select_f(none, float32(1.0), row_sum))) + m[r] * float32(_LN_2)
                store_f32(good, lse + row * 4, select_f(none, float32(_MINUS_INFINITY), sum_log))

    return Kernel(attention_kernel, A_COUNT, P_COUNT, THREADS, BYTES)
