"""The float32 attention kernel on given queries, keys and values, and calling it."""
import numpy as np

from edgeattn.runtime.compiler import inline, jit
from edgeattn.runtime.plan_cache import planned
from edgeattn.runtime.worker_pool import parallel_for, task

from .attend_lanes import AT_FREE, AT_TILE, all_small, attend, largest_magnitudes
from .attend_rows import FEW_QUERIES, MORE_MASK, attend_rows, scratch_of_rows
from .call import PreparedCall
from .matmul import round_up
from .portions import portions
from .records import (
    MASK_ADDRESSES,
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
from .score_masks import adds_to_scores, fill_mask, fill_mask_rows, mask_row, visible_range
from .simd import LANES, ROWS, WIDTH, address_of, load, pointer_to, splat, store, transpose_block
from .softmax import LOG2_E
from .views import Rows, ScoreMask, Visible

_MOST_KEPT = 1 << 14  # elements of masks that one head leaves to the next
_ZERO = np.float32(0)
_ONE = np.float32(1)

# The parameters of `attention_float32`: sizes; float32 by their bits; strides of each array, in elements; masks; how
# far those of blocks of queries are apart that the next head finds again, or 0 where it does not; where things begin in
# the scratch of each thread.
ATTENTION = record("batch heads kv_heads queries keys head_size value_size", "scale softcap",
                   "q_b q_h q_l", "k_b k_h k_s", "v_b v_h v_s", "out_b out_h out_l", MASKS,
                   "mask_step at_row_major at_q at_context at_k_copy at_v_copy at_largest at_masks at_few private_size")
# Where its arrays are: q (B, H, L, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), out (B, H, L, Dv), the last dimension
# contiguous; masks, and (B,) int64 keys that exist per batch entry, or 0 of none.
ATTENTION_ADDRESSES = record("q k v out", MASK_ADDRESSES, "lengths")


@inline
def copy_rows(source, at, step, rows, size, factor, target, to, target_step):
    """target = source * factor, `rows` rows of `size` that are `step` and `target_step` apart."""
    for row in range(rows):
        i, j = at + row * step, to + row * target_step
        for d in range(0, size - LANES + 1, LANES):
            store(target, j + d, load(source, i + d) * splat(factor))
        for d in range(size // LANES * LANES, size):
            target[j + d] = source[i + d] * factor


@inline
def padded_keys(k, keys, size, private, at):
    """Rows of keys, as many as a tile has at least: a copy, with zeros behind them."""
    for s in range(ROWS):
        for d in range(size):
            private[at + s * size + d] = k.data[k.at + s * k.step + d] if s < keys else _ZERO
    return Rows(private, at, size)


@inline
def pad_values(v, keys, size, size_up, private, at):
    """A copy of rows of values that are size_up long, with zeros."""
    for s in range(keys):
        for d in range(size):
            private[at + s * size_up + d] = v.data[v.at + s * v.step + d]
        for d in range(size, size_up):
            private[at + s * size_up + d] = _ZERO


@inline
def turn_queries(private, at, queries, size_up, to):
    """Queries (queries, size_up), in scratch, so that they are lanes, (size_up, W)."""
    for i in range(queries * size_up, WIDTH * size_up):
        private[at + i] = _ZERO
    for d in range(0, size_up, LANES):
        for l in range(0, WIDTH, LANES):
            transpose_block(private, at + l * size_up + d, size_up, private, to + d * WIDTH + l, WIDTH)


@inline
def turn_context(private, at, size_up, to):
    """A context (size_up, W), in scratch, so that it is rows of queries, (W, size_up)."""
    for d in range(0, size_up, LANES):
        for l in range(0, WIDTH, LANES):
            transpose_block(private, at + d * WIDTH + l, WIDTH, private, to + l * size_up + d, size_up)


@task
def attention_part(p, a, scratch, portion, worker, part):
    """Scaled dot product attention over given queries, keys and values, for a portion of (batch, head, block).

    The arrays stay where they are unless a tile would read past their end.  scratch: for each thread its own.
    """
    private = pointer_to(scratch + 4 * worker * p.private_size, np.float32)
    scale, softcap = real(p.scale), real(p.softcap)
    H, L, S, D, Dv, group = p.heads, p.queries, p.keys, p.head_size, p.value_size, p.heads // p.kv_heads
    D_up, Dv_up, Dv_lanes = round_up(D, LANES), round_up(Dv, ROWS), round_up(Dv, LANES)
    blocks, band, adds = (L + WIDTH - 1) // WIDTH, p.band != 0, adds_to_scores(a)
    has_mask = adds or a.keep != 0
    all_q, all_k = pointer_to(a.q, np.float32), pointer_to(a.k, np.float32)
    all_v, all_o = pointer_to(a.v, np.float32), pointer_to(a.out, np.float32)
    lengths = pointer_to(a.lengths, np.int64)
    few = L <= FEW_QUERIES
    bounded = D >= LANES and not adds and not softcap > _ZERO and not few
    measured = copied = -1
    at_row_major, at_q, at_context, at_k_copy = p.at_row_major, p.at_q, p.at_context, p.at_k_copy
    at_v_copy, at_largest, at_masks = p.at_v_copy, p.at_largest, p.at_masks
    factor = scale / softcap if softcap > _ZERO else scale * LOG2_E
    for item in range(part * portion, min((part + 1) * portion, p.batch * H * blocks)):
        batch, h, q0 = item // (H * blocks), item // blocks % H, item % blocks * WIDTH
        kv = h // group
        queries, head = min(WIDTH, L - q0), batch * p.kv_heads + kv
        keys = S if a.lengths == 0 else min(max(lengths[batch], 0), S)
        first, last, full_from, full_to = visible_range(q0, queries, keys, band, p.low, p.high)
        seen = Visible(first, last, full_from, full_to, q0, band, p.low, p.high)
        mask = ScoreMask(private, at_masks + q0 // WIDTH * p.mask_step, first, has_mask)
        is_filled = p.mask_step != 0 and min(item % (H * blocks), item - part * portion) >= blocks
        k, v = Rows(all_k, batch * p.k_b + kv * p.k_h, p.k_s), Rows(all_v, batch * p.v_b + kv * p.v_h, p.v_s)
        out = Rows(all_o, batch * p.out_b + h * p.out_h + q0 * p.out_l, p.out_l)
        # 1. queries of this block, scaled
        copy_rows(all_q, batch * p.q_b + h * p.q_h + q0 * p.q_l, p.q_l, queries, D, factor,
                  private, at_row_major, D_up)
        if few:
            if has_mask and not is_filled:
                fill_mask_rows(p, a, batch, h, q0, queries, first, last, private, mask.at)
            if attend_rows(Rows(private, at_row_major, D_up), queries, k, v, out, D, Dv, seen, mask, mask_row(S),
                           softcap, pointer_to(address_of(private) + 4 * p.at_few, np.float32)):
                continue
        # 2. turned so that queries are lanes
        turn_queries(private, at_row_major, queries, D_up, at_q)
        if has_mask and not is_filled:
            fill_mask(p, a, batch, h, q0, queries, first, last, private, mask.at, AT_TILE)
        # 3. fewer keys than a tile has rows, or a value row narrower than whole tiles: read from a padded copy
        if keys < ROWS:
            k = padded_keys(k, keys, D, private, at_k_copy)
        if Dv != Dv_up:
            if copied != head:
                copied = head
                pad_values(v, keys, Dv, Dv_up, private, at_v_copy)
            v = Rows(private, at_v_copy, Dv_up)
        # 4. attention
        q, context = Rows(private, at_q, WIDTH), Rows(private, at_context, WIDTH)
        if bounded and measured != head:
            measured = head
            largest_magnitudes(k, keys, D, private, at_largest)
        small = bounded and all_small(q, D, private, at_largest)
        attend(q, k, v, context, D, Dv, seen, mask, softcap, small, private)
        # 5. turn the context back into rows
        turn_context(private, at_context, Dv_lanes, at_row_major)
        copy_rows(private, at_row_major, Dv_lanes, queries, Dv, _ONE, all_o, out.at, p.out_l)


@jit
def attention_float32(parameters, addresses, scratch, task_queue, count):
    """See `attention_part`; on at most `count` threads that serve the task_queue."""
    p, a = named(parameters, ATTENTION), located(addresses, ATTENTION_ADDRESSES)
    items = p.batch * p.heads * ((p.queries + WIDTH - 1) // WIDTH)
    portion, parts = portions(items, 1, count)
    parallel_for(task_queue, parts, attention_part, p, a, address_of(scratch), portion)


def prepare(inputs, scale, softcap=0.0, masks=NO_MASKS):
    """The `PreparedCall` of q, k, v of these shapes and their result, in C order; masks: `KernelMask.shapes`."""
    (_, H, L, D), (_, Hkv, S, _), (*_, Dv) = inputs
    steps = H * L * D, L * D, D, Hkv * S * D, S * D, D, Hkv * S * Dv, S * Dv, Dv, H * L * Dv, L * Dv, Dv
    return _plan(*inputs, steps, scale, softcap, masks)


def _plan(q, k, v, steps, scale, softcap, masks):
    """The `PreparedCall` of arrays and masks of these shapes; steps: of q, k, v and out, elements along three axes."""
    B, H, L, D = q
    Hkv, S, Dv = k[1], k[2], v[3]
    D_up, Dv_up, Dv_lanes = round_up(D, LANES), round_up(Dv, ROWS), round_up(Dv, LANES)
    p = blank(ATTENTION, batch=B, heads=H, kv_heads=Hkv, queries=L, keys=S, head_size=D, value_size=Dv,
              scale=bits_of_real(scale), softcap=bits_of_real(softcap))
    masked = set_masks(p, masks)
    p.at_row_major, private = place(AT_FREE, WIDTH * max(D_up, Dv_lanes))
    p.at_q, private = place(private, WIDTH * D_up)
    p.at_context, private = place(private, WIDTH * (max(Dv_up, Dv_lanes) + ROWS))
    p.at_k_copy, private = place(private, ROWS * D)
    p.at_v_copy, private = place(private, S * Dv_up if Dv != Dv_up else 0)
    p.at_largest, private = place(private, D_up)
    p.at_masks, few = private, L <= FEW_QUERIES
    if masked:
        is_shared = FEW_QUERIES < L <= _MOST_KEPT // max(S, 1) and not (p.keep_h or p.bias_h or masks[4])
        p.mask_step = S * WIDTH if is_shared else 0
        _, private = place(private, S * WIDTH * (-(-L // WIDTH) if is_shared else 1) + MORE_MASK * few)
    p.at_few, p.private_size = place(private, scratch_of_rows(D, Dv) if few else 0)
    (p.q_b, p.q_h, p.q_l, p.k_b, p.k_h, p.k_s, p.v_b, p.v_h, p.v_s, p.out_b, p.out_h, p.out_l) = steps
    return PreparedCall(attention_float32, packed(p, ATTENTION), ATTENTION_ADDRESSES, np.float32, 0,
                        p.private_size, 2 * B * H * L * S * (D + Dv))


def attention(q, k, v, out, scale, softcap=0.0, mask=NO_MASK, lengths=None):
    """out (B, H, L, Dv) = softmax(q k^T scale, capped and masked) v.

    Parameters
    ----------
    q, k, v : ndarray of float32
        (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv); last dimension contiguous, other strides free.
    out : ndarray of float32
        (B, H, L, Dv), last dimension contiguous.
    mask : KernelMask
    lengths : (B,) int64 or None
        Keys that exist per batch entry.
    """
    steps = tuple(step // 4 for array in (q, k, v, out) for step in array.strides[:3])
    call = planned(_plan, q.shape, k.shape, v.shape, steps, scale, softcap, mask.shapes)
    call(q, k, v, out, *mask.arrays, lengths)
    return out
