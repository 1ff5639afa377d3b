"""The mean of a head's first keys that are seen, which is left out of all of them: softmax does not see it.

Letters as in attend_lanes.py.  p, a: a record of the sizes and of MASKS, and one of MASK_ADDRESSES.
"""
import numpy as np

from edgeattn.runtime.compiler import inline

from .dynamic import TOKENS
from .simd import (
    LANES,
    WIDTH,
    broadcast,
    load,
    pointer_to,
    select,
    splat,
    store,
    tile_get,
    tile_load,
    tile_map,
    tile_row_sums,
)

_ZERO = np.float32(0)
_ONE = np.float32(1)
_INFINITY = np.float32(np.inf)
_NO_WEIGHT = np.float32(-5000)  # what a mask lowers by as much has no weight beside anything that it does not
_SMALLEST = np.float32(1e-30)  # its reciprocal is a float32 too


@inline
def in_band(p, key):
    """Whether any query sees a key, as far as the band is concerned."""
    return p.band == 0 or p.low <= key <= p.queries - 1 + p.high


@inline
def mark_seen(p, a, batch, first, seen, at):
    """seen (TOKENS,) = whether any query of any head may see key first + s; how many are seen."""
    there, count, keys = 0, 0, p.keys
    at_keep, at_bias = batch * p.keep_b, batch * p.bias_b
    keep, bias, masked = pointer_to(a.keep, np.uint8), pointer_to(a.bias, np.float32), a.keep != 0 or a.bias != 0
    padding, at_padding = pointer_to(a.padding, np.uint8), batch * p.padding_b
    for s in range(TOKENS):
        is_there = first + s < keys and in_band(p, first + s)
        there += is_there
        seen[at + s] = is_there and not masked
    if not masked:
        return there
    for h in range(p.heads if p.keep_h != 0 or p.bias_h != 0 else 1):
        for q in range(p.queries if p.keep_l != 0 or p.bias_l != 0 else 1):
            for s in range(min(TOKENS, keys - first)):
                key = first + s
                if seen[at + s] != 0 or not in_band(p, key):
                    continue
                if a.keep != 0 and keep[at_keep + h * p.keep_h + q * p.keep_l + key * p.keep_s] == 0:
                    continue
                if a.padding != 0 and padding[at_padding + key] == 0:
                    continue
                if a.bias != 0 and not (bias[at_bias + h * p.bias_h + q * p.bias_l + key * p.bias_s] > _NO_WEIGHT):
                    continue
                seen[at + s] = 1
                count += 1
            if count == there:
                return count
    return count


@inline
def choose_block(p, a, batch, seen, at):
    """The block of TOKENS keys whose mean is left out, and seen (TOKENS,): which of its keys `mark_seen` marks.

    The first of whose keys at least a quarter is seen; where there is none, the one with the most.
    """
    best, most, blocks = 0, -1, (p.keys + TOKENS - 1) // TOKENS
    for i in range(blocks + 1):
        block = i if i < blocks else best  # once more, where the last one was not the best
        count = mark_seen(p, a, batch, block * TOKENS, seen, at)
        if count > most:
            best, most = block, count
        if 4 * count >= TOKENS:
            break
    return best


@inline
def weigh_tokens(weights, at, seen, at_seen):
    """weights (TOKENS,), magnitudes of a block's keys, to their parts in a mean: alike in units of those magnitudes.

    So that a large one does not outweigh all others; none for what no query sees, and for what is not finite.
    """
    total = _ZERO
    for s in range(TOKENS):
        weight, size = _ZERO, weights[at + s]
        if seen[at_seen + s] != 0 and _SMALLEST < size < _INFINITY:
            weight = _ONE / size
        weights[at + s] = weight
        total += weight
    for s in range(TOKENS):
        weights[at + s] /= max(total, _SMALLEST)


@inline
def weigh(v, weights, at, plane):
    """v times weights[at:], 0 where the weight is 0 whatever v is there."""
    w = load(weights, at)
    return select(w > splat(_ZERO), v * w, splat(_ZERO))


@inline
def token_sums(values, at, block_step, j, at_weight):
    """Of LANES rows, the weighted sums over the tokens from j LANES on, LANES of them."""
    b, c = j * LANES // WIDTH, j * LANES % WIDTH
    tile = tile_load(LANES, 1, values, at + b * block_step + c, WIDTH, 0)
    return tile_get(tile_row_sums(tile_map(tile, weigh, values, at_weight + j * LANES, 0, 0)), 0, 0)


@inline
def pair_sums(values, at, block_step, j, tokens, at_weight):
    """`token_sums` of j and, where there are such tokens, of j + 1."""
    total = token_sums(values, at, block_step, j, at_weight)
    if (j + 1) * LANES < tokens:
        total = total + token_sums(values, at, block_step, j + 1, at_weight)
    return total


@inline
def subtract_mean(values, at, block_step, rows, tokens, at_weight, shared, at_mean):
    """values (blocks, rows, W) minus their weighted mean over the tokens, which is left, negative, in shared[at_mean:].

    The sums are trees of neighbours, the same for every number of lanes; zeros, of no token, change none.
    """
    for d in range(0, rows, LANES):
        here = at + d * WIDTH
        total = pair_sums(values, here, block_step, 0, tokens, at_weight)
        if TOKENS // LANES >= 4 and tokens > 2 * LANES:
            total = total + pair_sums(values, here, block_step, 2, tokens, at_weight)
        if TOKENS // LANES == 8 and tokens > 4 * LANES:
            later = pair_sums(values, here, block_step, 4, tokens, at_weight)
            if tokens > 6 * LANES:
                later = later + pair_sums(values, here, block_step, 6, tokens, at_weight)
            total = total + later
        store(shared, at_mean + d, splat(_ZERO) - total)
    add_to_tokens(values, at, block_step, rows, tokens, shared, at_mean)


@inline
def add_to_tokens(values, at, block_step, rows, tokens, shared, at_added):
    """values (blocks, rows, W) += a number for each row, from shared[at_added] on."""
    for b in range((tokens + WIDTH - 1) // WIDTH):
        for d in range(rows):
            added = broadcast(shared, at_added + d)
            for c in range(0, min(WIDTH, tokens - b * WIDTH), LANES):
                i = at + b * block_step + d * WIDTH + c
                store(values, i, load(values, i) + added)
