"""Attention on given queries, keys and values with int8 products: float32 in and out, quantized at run time."""
import numpy as np

from edgeattn.runtime.compiler import inline, jit
from edgeattn.runtime.plan_cache import planned
from edgeattn.runtime.worker_pool import parallel_for, task

from .attend_dynamic import KEY_BLOCK, Keys, Queries, attend_bytes, fill_dither, lay_out_values, values_of, values_row
from .byte_products import DEPTH_STEP, READ_AHEAD, ROW_STEP
from .call import PreparedCall
from .dynamic import (
    BLOCKS,
    TOKENS,
    keys_to_rows,
    largest_rows,
    quantize_keys,
    quantize_queries,
    quantize_values,
    turn,
    unit_of,
)
from .functional_float32 import ATTENTION_ADDRESSES
from .int8_views import Part, parts_of
from .key_mean import choose_block, subtract_mean, weigh_tokens
from .matmul import round_up
from .portions import portions
from .records import (
    MASKS,
    NO_MASK,
    NO_MASKS,
    bits_of_real,
    blank,
    located,
    named,
    packed,
    place,
    real,
    record,
    set_masks,
)
from .score_masks import adds_to_scores, fill_mask, visible_range
from .simd import (
    LANES,
    WIDTH,
    address_of,
    broadcast,
    load,
    matrix_configure,
    matrix_release,
    pointer_to,
    splat,
    store,
)
from .softmax import LOG2_E
from .views import Rows, ScoreMask, Visible

_ZERO = np.float32(0)
_ONE = np.float32(1)

# The parameters: sizes; the scale by its bits; masks; where things begin in the scratch of all threads, and of each.
ATTENTION = record("batch heads kv_heads queries keys head_size value_size scale", MASKS,
                   "at_mean at_units at_kterm at_kscale at_values at_vlog at_vinverse",
                   "at_row_major at_rows at_weights at_seen at_keys at_q at_qscale at_scores at_probabilities at_stats",
                   "at_dither at_context at_square at_masks shared_size private_size")


@inline
def turn_rows(x, size, tokens, factor, own, at_row_major, at_rows):
    """(size up to LANES, W) = factor x^T for up to W rows of x, a Part; what is missing is 0."""
    padded = round_up(size, LANES)
    for t in range(tokens):
        for d in range(size):
            own.float32[at_row_major + t * padded + d] = x.data[x.at + t * size + d] * factor
        for d in range(size, padded):
            own.float32[at_row_major + t * padded + d] = _ZERO
    for i in range(at_row_major + tokens * padded, at_row_major + WIDTH * padded, LANES):
        store(own.float32, i, splat(_ZERO))
    turn(own.float32, at_row_major, WIDTH, padded, padded, own.float32, at_rows)


@inline
def turn_block(x, head, t, b, size, p, own, at_rows):
    """Tokens of block b of W from t on, of keys or values of a head of a batch entry."""
    first = t + b * WIDTH
    some = max(min(p.keys - first, WIDTH), 0)
    turn_rows(Part(x, (head * p.keys + first) * size), size, some, _ONE, own, p.at_row_major, at_rows)


@inline
def key_block(k, head, kv, t, is_first, p, shared, own):
    """Keys from t on of a head, less the mean of those in the block that comes first, to rows of bytes."""
    D, Dp, D_up = p.head_size, round_up(p.head_size, 4), round_up(p.head_size, LANES)
    K4, at_rows, minus = round_up(Dp // 4, LANES), p.at_rows, p.at_mean + kv * D_up
    for b in range(BLOCKS):
        turn_block(k, head, t, b, D, p, own, at_rows + b * D_up * WIDTH)
    if is_first:
        for b in range(BLOCKS):
            for c in range(0, WIDTH, LANES):
                largest = largest_rows(own.float32, at_rows + b * D_up * WIDTH + c, Dp)
                store(own.float32, p.at_weights + b * WIDTH + c, largest)
        weigh_tokens(own.float32, p.at_weights, own.int32, p.at_seen)
        subtract_mean(own.float32, at_rows, D_up * WIDTH, D_up, TOKENS, p.at_weights, shared.float32, minus)
    else:
        for j in range(0, BLOCKS * D_up * WIDTH, LANES):
            at = at_rows + j
            store(own.float32, at, load(own.float32, at) + broadcast(shared.float32, minus + j // WIDTH % D_up))
    for b in range(BLOCKS):
        at = kv * round_up(p.keys, TOKENS) + t + b * WIDTH
        quantize_keys(Part(own.float32, at_rows + b * D_up * WIDTH), Dp, WIDTH, Part(own.int32, p.at_keys),
                      Part(shared.float32, p.at_kscale + at), Part(shared.int32, p.at_kterm + at))
        keys_to_rows(own.int32, p.at_keys, K4, WIDTH, shared.int32, at * K4, K4)


@inline
def value_block(v, head, kv, t, is_first, p, shared, own):
    """Values from t on of a head, in units that fit those of the block that comes first, to rows of bytes."""
    Dv, Dvp, row = p.value_size, round_up(p.value_size, 4), values_row(p.keys)
    if is_first:
        for b in range(BLOCKS):
            turn_block(v, head, t, b, Dv, p, own, p.at_rows)
            for c in range(0, WIDTH, LANES):
                store(own.float32, p.at_weights + b * WIDTH + c, largest_rows(own.float32, p.at_rows + c, Dvp))
        shared.float32[p.at_units + kv] = unit_of(own.float32, p.at_weights, own.int32, p.at_seen, TOKENS)
    for b in range(BLOCKS):
        at = kv * round_up(p.keys, TOKENS) + t + b * WIDTH
        turn_block(v, head, t, b, Dv, p, own, p.at_rows)
        some = min(max(p.keys - t - b * WIDTH, 0), WIDTH)
        quantize_values(Part(own.float32, p.at_rows), Dvp, some, shared.float32[p.at_units + kv],
                        Rows(shared.int8, 4 * (p.at_values + kv * Dvp * row) + t + b * WIDTH, 4 * row),
                        Part(shared.float32, p.at_vlog + at), Part(shared.float32, p.at_vinverse + at))


@task
def quantize_part(p, a, scratch, batch, portion, worker, part):
    """Keys and values of `portion` heads of one batch entry, for all threads.

    scratch: int32, first keys (Hkv, S', K4), values (Hkv Dvp, S') and their scales for all threads.
    """
    shared, own = parts_of(scratch, p, worker)
    k, v = pointer_to(a.k, np.float32), pointer_to(a.v, np.float32)
    smooth = choose_block(p, a, batch, own.int32, p.at_seen)
    for kv in range(part * portion, min((part + 1) * portion, p.kv_heads)):
        head = batch * p.kv_heads + kv
        for i in range((p.keys + TOKENS - 1) // TOKENS):
            t = TOKENS * (smooth if i == 0 else i - 1 if i <= smooth else i)
            key_block(k, head, kv, t, i == 0, p, shared, own)
            value_block(v, head, kv, t, i == 0, p, shared, own)


@inline
def attend_block(p, a, batch, h, q0, shared, own):
    """Attention of one block of queries of a head."""
    H, L, S, D, Dv, Dvp = p.heads, p.queries, p.keys, p.head_size, p.value_size, round_up(p.value_size, 4)
    D4, Dv_up, kv = round_up(D, 4) // 4, round_up(Dv, LANES), h // (H // p.kv_heads)
    K4, queries, at_row = round_up(D4, LANES), min(WIDTH, L - q0), (batch * H + h) * L + q0
    q, out, factor = pointer_to(a.q, np.float32), pointer_to(a.out, np.float32), real(p.scale) * LOG2_E
    band, adds = p.band != 0, adds_to_scores(a)
    masked = adds or a.keep != 0
    # 1. queries
    turn_rows(Part(q, at_row * D), D, queries, factor, own, p.at_row_major, p.at_rows)
    quantize_queries(Part(own.float32, p.at_rows), 4 * D4, queries, Part(own.int32, p.at_q),
                     Part(own.float32, p.at_qscale))
    # 2. attention
    first, last, full_from, full_to = visible_range(q0, queries, S, band, p.low, p.high)
    first = first // 4 * 4
    if masked:
        fill_mask(p, a, batch, h, q0, queries, first, last, own.float32, p.at_masks, p.at_square)
    at = kv * round_up(S, TOKENS)
    attend_bytes(Queries(own.uint32, p.at_q, round_up(D4, DEPTH_STEP), own.float32, p.at_qscale, queries, False),
                 Keys(shared.int32, at * K4, K4, p.at_kterm + at, shared.float32, p.at_kscale + at),
                 values_of(kv, Dvp, p, shared), Dvp,
                 Visible(first, last, full_from, full_to, q0, band, p.low, p.high),
                 ScoreMask(own.float32, p.at_masks, first, masked), adds, p, own, p.at_context)
    # 3. rows of the context
    turn(own.int32, p.at_context, Dv_up, WIDTH, queries, own.int32, p.at_row_major)
    for l in range(queries):
        for d in range(Dv):
            out[(at_row + l) * Dv + d] = own.float32[p.at_row_major + l * Dv_up + d]


@task
def attend_part(p, a, scratch, batch, portion, worker, part):
    """`portion` of one batch entry's blocks of W queries, head by head."""
    shared, own = parts_of(scratch, p, worker)
    blocks, D4 = (p.queries + WIDTH - 1) // WIDTH, round_up(p.head_size, 4) // 4
    matrix_configure(own.int32, p.at_stats)
    fill_dither(own.float32, p.at_dither, p.keys)
    for i in range(p.at_q + D4 * WIDTH, p.at_q + round_up(D4, DEPTH_STEP) * WIDTH, LANES):
        store(own.int32, i, splat(np.int32(0)))
    for item in range(part * portion, min((part + 1) * portion, p.heads * blocks)):
        attend_block(p, a, batch, item // blocks, item % blocks * WIDTH, shared, own)
    matrix_release()


@jit
def attention_dynamic(parameters, addresses, scratch, task_queue, count):
    """See ATTENTION; arrays in C order; on at most `count` threads that serve the task_queue."""
    p, a, memory = named(parameters, ATTENTION), located(addresses, ATTENTION_ADDRESSES), address_of(scratch)
    heads, head_parts = portions(p.kv_heads, 1, count)
    items, item_parts = portions(p.heads * ((p.queries + WIDTH - 1) // WIDTH), 1, count)
    for batch in range(p.batch):
        parallel_for(task_queue, head_parts, quantize_part, p, a, memory, batch, heads)
        parallel_for(task_queue, item_parts, attend_part, p, a, memory, batch, items)


def plan(p, masked):
    """Write where what a call needs lies in its scratch into p; (shared, private) elements of that."""
    Hkv, S, D, Dv = p.kv_heads, p.keys, p.head_size, p.value_size
    Dvp, D_up, Dv_up = round_up(Dv, 4), round_up(D, LANES), round_up(Dv, LANES)
    D4, K4 = -(-D // 4), round_up(-(-D // 4), LANES)
    keys = round_up((Hkv * round_up(S, TOKENS) + READ_AHEAD) * K4 + READ_AHEAD, 16)
    p.at_mean, shared = place(lay_out_values(p, keys, Hkv, Dvp, S), Hkv * D_up)
    p.at_row_major, private = place(0, WIDTH * max(D_up, Dv_up))
    p.at_rows, private = place(private, TOKENS * max(D_up, Dv_up))
    p.at_weights, private = place(private, TOKENS)
    p.at_seen, private = place(private, TOKENS)
    p.at_keys, private = place(private, WIDTH * K4)
    p.at_q, private = place(private, round_up(D4, DEPTH_STEP) * WIDTH)
    p.at_qscale, private = place(private, WIDTH)
    p.at_scores, private = place(private, (max(KEY_BLOCK, Dvp) + ROW_STEP) * WIDTH)
    p.at_probabilities, private = place(private, KEY_BLOCK // 4 * WIDTH)
    p.at_stats, private = place(private, 6 * WIDTH)
    p.at_dither, private = place(private, KEY_BLOCK)
    p.at_context, private = place(private, Dv_up * WIDTH)
    p.at_square, private = place(private, LANES * LANES)
    p.at_masks, private = place(private, (S + 4) * WIDTH if masked else 0)
    p.shared_size, p.private_size = shared, private
    return shared, private


def prepare(inputs, scale, softcap=0.0, masks=NO_MASKS):
    """The `PreparedCall` of arrays and masks of these shapes; as `functional_float32.prepare`, without softcap."""
    return _plan(*inputs, scale, masks)


def _plan(q, k, v, scale, masks):
    """The same."""
    p = blank(ATTENTION, scale=bits_of_real(scale))
    p.batch, p.heads, p.queries, p.head_size = q
    p.kv_heads, p.keys, p.value_size = k[1], k[2], v[3]
    shared, private = plan(p, set_masks(p, masks))
    work = q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])
    return PreparedCall(attention_dynamic, packed(p, ATTENTION), ATTENTION_ADDRESSES, np.int32, shared, private, work,
                        q[0])


def attention(q, k, v, out, scale, mask=NO_MASK):
    """out (B, H, L, Dv) = softmax(q k^T scale, masked) v, products in int8.

    Parameters
    ----------
    q, k, v : float32 arrays, C order
        (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv); no axis empty.
    out : float32 array, C order
    mask : KernelMask
    """
    planned(_plan, q.shape, k.shape, v.shape, scale, mask.shapes)(q, k, v, out, *mask.arrays)
    return out
