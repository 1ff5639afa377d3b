"""A projection of the dynamic layer: rows of bytes in, rows of float32 out, tile by tile of tokens."""
from typing import NamedTuple

import numpy as np

from edgeattn.runtime.compiler import inline, task

from .byte_products import TILES_SCRATCH, row_product
from .dynamic import COLUMNS_APART
from .int8_views import BytePanels, Groups, Part
from .matmul import round_up
from .simd import LANES, WIDTH, load, outer_product, store, tile_dequantize, tile_store


class Apart(NamedTuple):
    """Features of an input that stay float32: of each token COLUMNS_APART numbers, of each of them a row of weights."""

    count: int
    inputs: object
    at: int
    weights: object
    at_weights: int
    step: int


@task
def set_apart(x, width, tokens, columns, count, own, at_rest, at_apart):
    """`tokens` rows of x, a Part, to own.float32[at_rest:], but the features columns (count,), which go to at_apart.

    columns: Part of int32; of each token COLUMNS_APART numbers at at_apart.
    """
    whole = width // LANES * LANES
    for t in range(tokens):
        row, here = x.at + t * width, at_rest + t * width
        for e in range(0, whole, LANES):
            store(own.float32, here + e, load(x.data, row + e))
        for e in range(whole, width):
            own.float32[here + e] = x.data[row + e]
        for k in range(count):
            column = np.int64(columns.data[columns.at + k])
            own.float32[at_apart + t * COLUMNS_APART + k] = x.data[row + column]
            own.float32[here + column] = np.float32(0)


@inline
def _finish_rows(tile, rows, t, f, scales, projection, apart, tokens, features, out, own, at_edge):
    """Rows of out = scale tile factor + bias + x_J V_J: the tile's tokens from t, its features from f on.

    As far as there are any; J are the features that are apart.
    """
    whole = tile_dequantize(tile, scales.data, scales.at + t, projection.factors, projection.at_factors + f,
                            projection.at_bias + f)
    for k in range(apart.count):
        whole = outer_product(whole, apart.inputs, apart.at + t * COLUMNS_APART + k, COLUMNS_APART, apart.weights,
                              apart.at_weights + k * apart.step + f)
    to = out.at + t * out.step + f
    if t + rows <= tokens and f + WIDTH <= features:
        tile_store(whole, out.data, to, out.step, LANES)
        return
    tile_store(whole, own.float32, at_edge, WIDTH, LANES)
    for i in range(min(rows, tokens - t)):
        for j in range(min(WIDTH, features - f)):
            out.data[to + i * out.step + j] = own.float32[at_edge + i * WIDTH + j]


@task
def project_rows(x, tokens, scales, projection, apart, features, out, own, at_tiles):
    """Rows of out (tokens, features) = scale (x w^T + terms) factor + bias + x_J V_J; what is packed has whole panels.

    x           Part, uint32, rows of bytes plus OFFSET; where the matrix unit multiplies, a multiple of 16
    projection  of panels (features / WIDTH, depth4, WIDTH) of bytes; its bias among the factors
    apart       the features J of x that are not among the bytes, and their weights V
    own         Scratch, TILES_SIZE elements from at_tiles on
    """
    row_product(_finish_rows, (scales, projection, apart, tokens, features, out, own, at_tiles + TILES_SCRATCH),
                Groups(x.data, x.at, projection.depth4, 1), tokens,
                BytePanels(projection.weights, projection.at, projection.weights, projection.at_terms,
                           round_up(features, WIDTH), projection.depth4), Part(own.int32, at_tiles))
