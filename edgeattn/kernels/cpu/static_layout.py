"""Where the static layer keeps keys, values and context between its products, which the matrix unit reads otherwise.

In registers a product takes values as (features / block, keys / 4, block), four keys to an element, and the context
with queries in lanes; the matrix unit takes both as whole rows: of each feature all keys, of each query all features.
"""
from typing import NamedTuple

import numpy as np

from edgeattn.runtime.compiler import inline, register_jitable
from edgeattn.runtime.isa import ISA

from .byte_products import DEPTH_STEP, READ_AHEAD
from .finish_int8 import finish_values, scale_features
from .int8_views import Groups, Part
from .matmul import feature_position, round_up
from .one_row import linear_of_tokens
from .simd import LANES, ROWS, WIDTH, tile_pack_rows, tile_store, transpose_block
from .views import Blocks

_UNCHANGED = np.int32(0)


class Layout(NamedTuple):
    """Keys: (features / k_block, keys, k_block) bytes, k_step a block; values as said above, v_row of one feature."""

    keys: int
    k_block: int
    k_step: int
    v_block: int
    v_step: int
    v_row: int


@register_jitable
def padded_keys(S):
    """Keys of one head that have room: a multiple of ROWS and of LANES, which both go by at a time."""
    return round_up(S, max(ROWS, LANES))


@inline
def layout_of(p):
    """The layout for the sizes in the parameters."""
    S_up, k_block, v_block = padded_keys(p.keys), max(p.padded_head, LANES), max(p.padded_value, LANES)
    return Layout(S_up, k_block, S_up * k_block, v_block, S_up // 4 * v_block, round_up(S_up // 4, DEPTH_STEP))


# --- in registers ------------------------------------------------------------------------------------------------

@register_jitable
def _size_of_blocks(features, block, S_up):
    return (features + block) * (S_up // 4) + 2 * WIDTH


@inline
def _project_blocks(x, tokens, panels, scaling, t, p, layout, shared, own):
    out = Blocks(shared.int32, p.at_values + t // 4 * layout.v_block, layout.v_block, layout.v_step)
    linear_of_tokens(finish_values, (scaling, out), x, tokens, panels, Part(own.int32, p.at_tiles))


@inline
def _block_of_head(h, first, p, layout, shared):
    at = p.at_values + feature_position(h * p.padded_value, layout.v_block, layout.v_step)
    return Groups(shared.int32, at + first // 4 * layout.v_block, 1, layout.v_block)


@inline
def _room_in_block(h, d, t, p, layout, shared, own):
    at = p.at_values + feature_position(h * p.padded_value, layout.v_block, layout.v_step)
    return Groups(shared, at + t // 4 * layout.v_block + d, 1, layout.v_block)


@inline
def _leave_there(room, h, d, t, p, layout, shared):
    pass


@register_jitable
def _no_rows(depth4):
    return 0


@inline
def _context_in_lanes(p, depth4, own):
    return Groups(own.uint32, p.at_context, 1, WIDTH)


# --- for the matrix unit -----------------------------------------------------------------------------------------

@register_jitable
def _size_of_rows(features, block, S_up):
    return (features + READ_AHEAD) * round_up(S_up // 4, DEPTH_STEP) + DEPTH_STEP


@inline
def _finish_turned(tile, t, f, scaling, out, tokens, panel):
    """out : Rows of features, (features, tokens / 4) of int32, by way of one panel (tokens / 4, W)."""
    tile = scale_features(tile, f, scaling)
    four = tile_pack_rows(tile, scaling.zero_point, _UNCHANGED)
    tile_store(four, panel.data, panel.at + t // 4 * WIDTH, WIDTH, LANES)
    if t + ROWS >= tokens:
        for g in range(0, (tokens + 3) // 4, LANES):
            for c in range(0, WIDTH, LANES):
                transpose_block(panel.data, panel.at + g * WIDTH + c, WIDTH, out.data,
                                out.at + (f + c) * out.row + g, out.row)


@inline
def _project_rows(x, tokens, panels, scaling, t, p, layout, shared, own):
    out = Groups(shared.int32, p.at_values + t // 4, layout.v_row, 1)
    linear_of_tokens(_finish_turned, (scaling, out, tokens, Part(own.int32, p.at_row_major)), x, tokens, panels,
                     Part(own.int32, p.at_tiles))


@inline
def _rows_of_head(h, first, p, layout, shared):
    return Groups(shared.int32, p.at_values + h * p.padded_value * layout.v_row + first // 4, layout.v_row, 1)


@inline
def _room_to_turn(h, d, t, p, layout, shared, own):
    return Groups(own, p.at_row_major, 1, LANES)


@inline
def _turn_values(room, h, d, t, p, layout, shared):
    transpose_block(room.data, room.at, LANES, shared, p.at_values + (h * p.padded_value + d) * layout.v_row + t // 4,
                    layout.v_row)


@register_jitable
def _size_of_context(depth4):
    return WIDTH * depth4


@inline
def _context_rows(p, depth4, own):
    for c in range(0, depth4, LANES):
        for l in range(0, WIDTH, LANES):
            transpose_block(own.int32, p.at_context + c * WIDTH + l, WIDTH, own.int32,
                            p.at_transposed + l * depth4 + c, depth4)
    return Groups(own.uint32, p.at_transposed, depth4, 1)


# values_size(features, block, S_up): elements of the values of S_up keys
# project_values(x, tokens, panels, scaling, t, p, layout, shared, own): values of `tokens` tokens from the t-th on
# values_of(h, first, p, layout, shared): of a head, from its key `first` on, Groups: a row is a feature
# value_room(h, d, t, p, layout, shared, own): where LANES groups of keys from t on, of LANES features from d on, are
#     put together, `step` from group to group; `place_values` then has them where `values_of` finds them
# FEATURES_TOGETHER: whether a group's LANES features from d on are load(v.data, v.at + g * v.step + d), v of values_of
# turned_size(depth4): elements of scratch of `context_rows(p, depth4, own)`, the context as Groups of each query
FEATURES_TOGETHER = not ISA.amx
if ISA.amx:
    values_size, project_values, values_of = _size_of_rows, _project_rows, _rows_of_head
    value_room, place_values = _room_to_turn, _turn_values
    turned_size, context_rows = _size_of_context, _context_rows
else:
    values_size, project_values, values_of = _size_of_blocks, _project_blocks, _block_of_head
    value_room, place_values = _room_in_block, _leave_there
    turned_size, context_rows = _no_rows, _context_in_lanes
