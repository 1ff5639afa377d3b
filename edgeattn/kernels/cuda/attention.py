"""Attention on the device: softmax(query key^T * scale + mask) value with online softmax.

Dao et al., "FlashAttention" (2022), algorithm 1. Letters: B batch, H query heads, Hkv key/value heads, L queries, S
keys, D head size, Dv value size. A block has ROWS queries of one head, 64 keys at a time, 2 ROWS threads; tiles.py says
who holds what, and FORMS has the products: float32 multiply-adds, or float16, tf32 or int8 ones of the tensor cores.
D is walked in pieces of CHUNK, Dv is cut into pieces of CHUNK along the grid, so any size works in the same memory.
"""
import functools

from edgeattn.kernels.cuda.language import Kernel, cuda, float32, int32, shared, specialised
from edgeattn.kernels.cuda.ptx import (
    block_x,
    block_y,
    block_z,
    float_of_bits,
    load_f32,
    quotient,
    remainder,
    thread,
    times,
    times_wide,
)

from .attention_parameters import (
    A_BIAS,
    A_COUNT,
    A_KEEP,
    A_LENGTHS,
    A_LSE,
    A_OUT,
    A_Q_SCALE,
    A_SLOPES,
    P_CHUNKS,
    P_COUNT,
    P_FACTOR,
    P_GROUP,
    P_H,
    P_L,
    P_LENGTHS_64,
    P_LSE_B,
    P_LSE_H,
    P_LSE_SPLIT,
    P_OUT_B,
    P_OUT_H,
    P_OUT_SPLIT,
    P_S,
    P_SOFTCAP,
    P_VALUE_CHUNKS,
)
from .block import band, choosing_keys, head_addresses, slope_of, visible_keys
from .fetch import FETCH
from .finish import finishing
from .int8_products import int8_products
from .multiply_adds import multiply_adds
from .probabilities import joining_parts, writing_weights
from .score_masks import masking, scaling
from .softmax import MINUS_INFINITY, online_softmax
from .stage import list_scales, staging_keys, staging_queries, staging_turned, staging_values
from .tensor_cores import tensor_cores
from .tiles import KEYS

# The Form of products in each precision, for blocks of so many queries and pieces of so many numbers.
FORMS = {"float32": multiply_adds, "int8": int8_products, "float16": functools.partial(tensor_cores, "float16"),
         "tf32": functools.partial(tensor_cores, "tf32")}


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
    QUERIES, EACH, OUT, LATE, SECOND = form.queries, form.keys, form.values, form.late, form.put_left is not None
    AT_KEYS, AT_PROBABILITIES = form.at_keys, form.at_probabilities
    place, down, scores, share, context = form.place, form.down, form.scores, form.share, form.context
    ROWS, CHUNK, THREADS, WIDE = rows, chunk, 2 * rows, bool(wide)
    SHIFT, MASK = (chunk // 4).bit_length() - 1, chunk // 4 - 1
    (fetch_q, Q_SIZE), (fetch, SIZE) = FETCH[q_format], FETCH[kv_format]
    SCALED, HALF, CODES = kv_format == "int8", out_format == "float16", kv_format == "codes"
    OUT_SIZE = 2 if HALF else 4
    AT_LISTS = form.bytes  # of int8 products, see list_scales
    BYTES = form.bytes + (4 * KEYS * 4 if CODES else 0)
    bring = fetch, SIZE, SCALED, chunk, THREADS, WIDE
    stage_queries = staging_queries(fetch_q, Q_SIZE, rows, chunk, WIDE, LATE, form.put_query)
    stage_keys = staging_keys(*bring, form.put_key)
    stage_values = (staging_turned(chunk, THREADS, form.put_value) if CODES else
                    staging_values(*bring, form.put_value))
    stage_left = staging_values(*bring, form.put_left) if SECOND else stage_values
    left_context = form.left_context if SECOND else form.context
    scale = scaling(form, CODES)
    cap, add_distances, add_bias, hide_masked, hide_outside = masking(form, rows)
    choose_keys = choosing_keys(rows, CODES, WEIGHTS)
    weigh, finish = online_softmax(form, CODES), finishing(form, WIDE, HALF)
    join, write_weights = joining_parts(form), writing_weights(form, HALF)

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
        query, key, value, keep, bias, scale_at = head_addresses(a, p, batch, head, kv)
        has_keep, has_bias, has_slope = a[A_KEEP] != 0, a[A_BIAS] != 0, a[A_SLOPES] != 0
        slope = slope_of(a, p, batch, head)
        factor, softcap = float_of_bits(p[P_FACTOR]), float_of_bits(p[P_SOFTCAP])
        capped = p[P_SOFTCAP] != 0

        # 1. the keys that this block's queries may see
        length = visible_keys(a[A_LENGTHS], p[P_LENGTHS_64], batch, p[P_S])
        offset, low, high = band(p, length)
        first, end, last = choose_keys(p, q0, split, low, high, length)

        s = cuda.local.array((QUERIES, EACH), float32)
        o = cuda.local.array((QUERIES, OUT), float32)
        left = cuda.local.array(8, float32)
        right = cuda.local.array(4, float32)
        m = cuda.local.array(QUERIES, float32)
        total = cuda.local.array(QUERIES, float32)
        for r in range(QUERIES):
            m[r] = float32(MINUS_INFINITY)
            total[r] = float32(0.0)
            for k in range(OUT):
                o[r, k] = float32(0.0)
        if WEIGHTS:
            join(p, a[A_LSE] + times_wide(batch, p[P_LSE_B]) + times_wide(head, p[P_LSE_H]), row0, m, total)
        q_scale = cuda.local.array(QUERIES, float32)
        lists = int32(base + AT_LISTS)
        if CODES:
            for r in range(QUERIES):
                row = int32(row0 + down(r))
                q_scale[r] = load_f32(row < p[P_L], a[A_Q_SCALE] + times_wide(times(block_y(), p[P_L]), 4) + row * 4)
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
                    stage_queries(p, base, four_row, column, query, factor, q0, d_in)
                stage_keys(a, p, keys_at, t, column, key, scale_at, k0, last, d_in)
                if CODES:
                    list_scales(a, p, lists, t, scale_at, k0, last)
                cuda.syncthreads()
                scores(base, keys_at, t, s, left, right)
            if LATE:
                scale(factor, q_scale, lists, column0, s)
            # 3. softcap, then masks
            if capped:
                cap(softcap, s)
            key0 = int32(k0 + column0)
            if has_slope:
                add_distances(slope, offset, row0, key0, s)
            if has_bias:
                add_bias(p, bias, row0, key0, last, s)
            if has_keep:
                hide_masked(p, keep, row0, key0, last, s)
            hide_outside(low, high, last, q0, k0, row0, key0, s)
            if WEIGHTS:
                to = a[A_OUT] + times_wide(batch, p[P_OUT_B]) + times_wide(head, p[P_OUT_H]) + key0 * OUT_SIZE
                write_weights(p, to, row0, key0, s, m, total)
                continue
            # 4. online softmax, and what other threads need of the probabilities
            weigh(lists, column0, s, m, total, o, left)
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
        # 7. divide by the sum
        d0 = int32(d_out + d0)
        out = (a[A_OUT] + times_wide(batch, p[P_OUT_B]) + times_wide(head, p[P_OUT_H])
               + times_wide(split, p[P_OUT_SPLIT]) + d0 * OUT_SIZE)
        lse = (a[A_LSE] + times_wide(batch, p[P_LSE_B]) + times_wide(head, p[P_LSE_H])
               + times_wide(split, p[P_LSE_SPLIT]))
        finish(a, p, out, lse, row0, d0, column0, d_out, m, total, o)

    return Kernel(attention_kernel, A_COUNT, P_COUNT, THREADS, BYTES)
