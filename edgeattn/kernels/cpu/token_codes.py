"""Codes of tokens in the static layer: as unsigned operands of products, and what its projections make of them."""
import numpy as np

from edgeattn.runtime.compiler import NamedTuple, inline, register_jitable

from .byte_products import DEPTH_STEP
from .finish_int8 import finish_bytes
from .int8_operands import FLIP
from .int8_views import BytePanels, Groups, Part, Scaling
from .matmul import round_up
from .one_row import linear_of_tokens
from .simd import LANES, ROWS, WIDTH, address_of, dot_bytes, load, map_bytes, pointer_to, splat, store, transpose_block
from .views import Blocks

_NONE = np.int32(0)


@register_jitable
def packed_depth(E):
    """Groups of four bytes in a packed row of E."""
    return round_up((E + 3) // 4, DEPTH_STEP)


class Linear(NamedTuple):
    """Where panels, bias and multipliers of a projection begin in the weights, and the zero point of its codes.

    table: where the table of what becomes of them begins there, or 0.
    """

    weight: int
    bias: int
    multiplier: int
    zero_point: int
    table: int


@inline
def pack_tokens(x, E, tokens, rows, out, out_row):
    """int8 rows of x as unsigned operand (rows, out_row); missing bytes and rows are zero codes."""
    whole = E // (4 * LANES) * LANES  # groups that come in vectors
    flip = splat(FLIP)
    for t in range(tokens):
        from_x, to = x.at + t * E, out.at + t * out_row
        words = pointer_to(address_of(x.data) + from_x, np.int32)
        for i in range(0, whole, LANES):
            store(out.data, to + i, load(words, i) ^ flip)
        for i in range(whole, out_row):
            word = np.int32(0)
            for j in range(min(4, E - 4 * i)):
                word |= (np.int32(x.data[from_x + 4 * i + j]) & np.int32(255)) << np.int32(8 * j)
            out.data[to + i] = word ^ FLIP
    for i in range(tokens * out_row, rows * out_row):
        out.data[out.at + i] = FLIP


@inline
def scale_codes(codes, count, weights, table, flip):
    """Codes, `count` groups of a multiple of LANES, to what the table from weights[table] on says of them, in place.

    They are ^ flip, and remain so.
    """
    flips, bytes_ = splat(flip), pointer_to(address_of(weights), np.int8)
    for i in range(codes.at, codes.at + count, LANES):
        store(codes.data, i, map_bytes(bytes_, 4 * table, load(codes.data, i) ^ flips) ^ flips)


@inline
def key_terms(keys, tokens, D4, zero_point, out, square):
    """out[s] = - zero_point * sum over d of key s, LANES keys at a time; keys: Rows of D4 groups.

    zero_point in four bytes, as an unsigned operand; square: scratch (LANES, LANES).
    """
    for s in range(0, tokens, LANES):
        total = splat(_NONE)
        for d in range(0, D4, LANES):
            transpose_block(keys.data, keys.at + s * keys.row + d, keys.row, square.data, square.at, LANES)
            for i in range(min(LANES, D4 - d)):
                total = dot_bytes(total, splat(zero_point), load(square.data, square.at + i * LANES))
        store(out.data, out.at + s, splat(_NONE) - total)


@inline
def project_codes(p, a, x, E, tokens, to, padded, flip, own):
    """Codes, ^ flip, of at most W tokens of x to p.at_row_major, where rows are so many bytes apart; to: Linear."""
    rows, depth4 = 1 if tokens == 1 else round_up(tokens, ROWS), packed_depth(E)
    features = round_up(p.heads * padded, WIDTH)
    row, weights = 4 * round_up(features // 4, LANES), pointer_to(a.weights, np.int32)
    pack_tokens(x, E, tokens, rows, Part(own.int32, p.at_x), depth4)
    scaling = Scaling(weights, p.project_rule, to.multiplier, features, np.int32(to.zero_point))
    linear_of_tokens(finish_bytes, (scaling, flip, Blocks(own.int8, 4 * p.at_row_major, row, 0)),
                     Groups(own.uint32, p.at_x, depth4, 1), tokens,
                     BytePanels(weights, to.weight, weights, to.bias, features, depth4), Part(own.int32, p.at_tiles))
    if to.table != 0:
        scale_codes(Part(own.int32, p.at_row_major), tokens * row // 4, weights, to.table, flip)
    return row
