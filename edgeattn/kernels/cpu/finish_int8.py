"""What becomes of tiles of sums in the static layer: codes, where the next product reads them.

Each is a `finish` of byte_products.linear: of a tile, the row and the feature it begins with, and its own arguments.
"""
import numpy as np

from edgeattn.runtime.compiler import inline

from .int8_operands import FLIP, add_value_terms
from .int8_views import block_position
from .requantize import requantize_tile
from .simd import LANES, WIDTH, tile_add_down, tile_pack_rows, tile_rows, tile_store, tile_store_bytes

_UNCHANGED = np.int32(0)


@inline
def scale_features(tile, f, scaling):
    """Sums of the features from f on, each by its own multiplier."""
    return requantize_tile(tile, scaling.rule, scaling.data, scaling.at + f, LANES, scaling.features)


@inline
def scale_all(tile, scaling):
    """Sums by the one multiplier there is, LANES times."""
    return requantize_tile(tile, scaling.rule, scaling.data, scaling.at, 0, LANES)


@inline
def finish_bytes(tile, t, f, scaling, flip, out):
    """Codes to bytes of out: Blocks."""
    at, next_column = block_position(out, t, f)
    tile = scale_features(tile, f, scaling)
    tile_store_bytes(tile, out.data, at, out.block, next_column, scaling.zero_point, flip)


@inline
def finish_values(tile, t, f, scaling, out):
    """Four tokens to a lane: codes to out, int32 Blocks of a row for every four."""
    at, next_column = block_position(out, t // 4, f)
    tile = scale_features(tile, f, scaling)
    tile_store(tile_pack_rows(tile, scaling.zero_point, _UNCHANGED), out.data, at, out.block, next_column)


@inline
def finish_scores(tile, s, f, scaling, terms, codes):
    """Scores of ROWS keys to codes (keys / 4, W) of four keys to a lane; terms: of each key."""
    tile = scale_all(tile_add_down(tile, terms.data, terms.at + s), scaling)
    tile_store(tile_pack_rows(tile, scaling.zero_point, _UNCHANGED), codes.data, codes.at + s // 4 * WIDTH, WIDTH,
               LANES)


@inline
def finish_context(tile, d, f, scaling, terms, context):
    """ROWS features of the context to unsigned operands (features / 4, W), four features to a lane."""
    tile = scale_all(add_value_terms(tile, terms.data, terms.at + d), scaling)
    tile_store(tile_pack_rows(tile, scaling.zero_point, FLIP), context.data, context.at + d // 4 * WIDTH, WIDTH, LANES)


@inline
def finish_output(tile, l, e, scaling, out, queries, edge):
    """Codes to the rows of out, so many bytes each; a tile that reaches past the edge goes by way of `edge`."""
    tile = scale_features(tile, e, scaling)
    Eo, to = out.row, out.at + l * out.row + e
    rows = tile_rows(tile)
    if l + rows <= queries and e + WIDTH <= Eo:
        tile_store_bytes(tile, out.data, to, Eo, LANES, scaling.zero_point, _UNCHANGED)
    else:
        tile_store_bytes(tile, edge.data, edge.at, WIDTH, LANES, scaling.zero_point, _UNCHANGED)
        for i in range(min(rows, queries - l)):
            for j in range(min(WIDTH, Eo - e)):
                out.data[to + i * Eo + j] = edge.data[edge.at + i * WIDTH + j]
