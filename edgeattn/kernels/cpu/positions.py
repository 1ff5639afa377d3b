"""What a layer does with its heads by positions, between their projection and their product: a norm, then a rotation.

A head is (features, W) here, tokens in lanes: the order of the sums does not depend on the number of lanes.
"""
import numpy as np

from edgeattn.runtime.compiler import inline

from .simd import LANES, WIDTH, broadcast, fma, load, splat, store, transpose_block

# What the records of layers have of it.  Of q_norm and k_norm: whether there is one, whether it takes out the mean, and
# where its eps, weight and bias begin among the weights.  Of the rotation: pairs of features (i * step, i * step +
# apart); the position of query 0 and the positions in each row of the table.
POSITIONS = ("q_norm q_mean at_q_norm k_norm k_mean at_k_norm "
             "pairs pair_step pair_apart query_position table_step")
_WHOLE = 32  # so many tokens more than there are go by at a time
_ZERO, _ONE = np.float32(0), np.float32(1)


def norm_fields(packer, q_norm, k_norm, q_factor):
    """{field: value} of two norms (kind, weight, bias or None, eps), or None, which are put into a `Packer` of weights.

    q_factor: by what queries are multiplied after their norm.
    """
    fields = {}
    for letter, norm, factor in (("q", q_norm, q_factor), ("k", k_norm, 1.0)):
        if norm is not None:
            kind, weight, bias, eps = norm
            bias = np.zeros_like(weight) if bias is None else bias
            packer.put(f"at_{letter}_norm", np.concatenate(([eps], weight * np.float64(factor),
                                                            bias * np.float64(factor))))
            fields |= {f"{letter}_norm": 1, f"{letter}_mean": kind == "layer"}
    return fields


def rotary_fields(rotary):
    """{field: value} of a `RotaryEmbedding`, or None."""
    if rotary is None:
        return {}
    pairs = rotary.rotary_embedding_dim // 2
    step, apart = (2, 1) if rotary.interleaved else (1, pairs)
    return {"pairs": pairs, "pair_step": step, "pair_apart": apart}


def rotary_table(rotary, queries, keys, position):
    """The table of a `RotaryEmbedding` for so many queries from `position` on, and keys; None of None."""
    return None if rotary is None else rotary.by_features(max(position + queries, keys) + WIDTH + _WHOLE)


@inline
def normalize_lanes(x, at, size, has_mean, weights, at_norm, at_spare):
    """The norm of LANES tokens, `size` rows from x[at] on; LANES elements from x[at_spare] on are written."""
    mean = splat(_ZERO)
    if has_mean != 0:
        for d in range(size):
            mean = mean + load(x, at + d * WIDTH)
        mean = mean / splat(np.float32(size))
    squares = splat(_ZERO)
    for d in range(size):
        apart = load(x, at + d * WIDTH) - mean
        squares = fma(apart, apart, squares)
    store(x, at_spare, squares / splat(np.float32(size)))
    for l in range(LANES):
        x[at_spare + l] = _ONE / np.sqrt(x[at_spare + l] + weights[at_norm])
    inverse = load(x, at_spare)
    for d in range(size):
        scaled = (load(x, at + d * WIDTH) - mean) * inverse
        store(x, at + d * WIDTH, fma(scaled, broadcast(weights, at_norm + 1 + d),
                                     broadcast(weights, at_norm + 1 + size + d)))


@inline
def rotate_lanes(x, at, p, table, position):
    """Pairs (a, b) of LANES tokens from `position` on become (a cos - b sin, a sin + b cos).

    table (2 pairs, table_step): cosines, then sines.
    """
    for i in range(p.pairs):
        at_angle = i * p.table_step + position
        cos, sin = load(table, at_angle), load(table, at_angle + p.pairs * p.table_step)
        first = at + i * p.pair_step * WIDTH
        second = first + p.pair_apart * WIDTH
        a, b = load(x, first), load(x, second)
        store(x, first, fma(a, cos, (splat(_ZERO) - b) * sin))
        store(x, second, fma(a, sin, b * cos))


@inline
def place_queries(x, at, p, weights, table, token, at_spare):
    """W queries of a head, from `token` on, normed and rotated, in place."""
    for c in range(0, WIDTH, LANES):
        if p.q_norm != 0:
            normalize_lanes(x, at + c, p.head_size, p.q_mean, weights, p.at_q_norm, at_spare)
        rotate_lanes(x, at + c, p, table, p.query_position + token + c)


@inline
def place_keys(x, at, p, weights, table, token, at_spare):
    """W keys of a head, from `token` on, normed and rotated, in place."""
    for c in range(0, WIDTH, LANES):
        if p.k_norm != 0:
            normalize_lanes(x, at + c, p.head_size, p.k_mean, weights, p.at_k_norm, at_spare)
        rotate_lanes(x, at + c, p, table, token + c)


@inline
def transpose(source, at, step, rows, columns, target, at_target, target_step):
    """target[j][i] = source[i][j]: rows `step` and `target_step` apart, their number and length any."""
    whole = rows >= LANES and columns >= LANES
    for i in range(0, rows, LANES):
        for j in range(0, columns, LANES):
            if whole:  # the last block steps back rather than past the end
                i0, j0 = min(i, rows - LANES), min(j, columns - LANES)
                transpose_block(source, at + i0 * step + j0, step, target, at_target + j0 * target_step + i0,
                                target_step)
            else:
                at_source, to = at + i * step + j, at_target + j * target_step + i
                for k in range(min(LANES, rows - i)):
                    for l in range(min(LANES, columns - j)):
                        target[to + l * target_step + k] = source[at_source + k * step + l]
