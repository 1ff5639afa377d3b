"""A projection of the dynamic layer: rows of bytes in, rows of float32 out, tile by tile of tokens."""

from edgeattn.runtime.compiler import inline, task

from .byte_products import TILES_SCRATCH, row_product
from .int8_views import BytePanels, Groups, Part
from .matmul import round_up
from .simd import LANES, WIDTH, tile_dequantize, tile_store


@inline
def _finish_rows(tile, rows, t, f, scales, projection, tokens, features, out, own, at_edge):
    """Rows of out = scale tile factor + bias: the tile's tokens from t, its features from f on, as far as there are."""
    whole = tile_dequantize(tile, scales.data, scales.at + t, projection.factors, projection.at_factors + f,
                            projection.at_bias + f)
    to = out.at + t * out.step + f
    if t + rows <= tokens and f + WIDTH <= features:
        tile_store(whole, out.data, to, out.step, LANES)
        return
    tile_store(whole, own.float32, at_edge, WIDTH, LANES)
    for i in range(min(rows, tokens - t)):
        for j in range(min(WIDTH, features - f)):
            out.data[to + i * out.step + j] = own.float32[at_edge + i * WIDTH + j]


@task
def project_rows(x, tokens, scales, projection, features, out, own, at_tiles):
    """Rows of out (tokens, features) = scale (x w^T + terms) factor + bias; what is packed has whole panels.

    x           Part, uint32, rows of bytes plus OFFSET; where the matrix unit multiplies, a multiple of 16
    projection  of panels (features / WIDTH, depth4, WIDTH) of bytes; its bias among the factors
    own         Scratch, TILES_SIZE elements from at_tiles on
    """
    row_product(_finish_rows, (scales, projection, tokens, features, out, own, at_tiles + TILES_SCRATCH),
                Groups(x.data, x.at, projection.depth4, 1), tokens,
                BytePanels(projection.weights, projection.at, projection.weights, projection.at_terms,
                           round_up(features, WIDTH), projection.depth4), Part(own.int32, at_tiles))
