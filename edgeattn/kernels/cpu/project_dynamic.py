"""A projection of the dynamic layer: rows of bytes in, rows of float32 out, tile by tile of tokens."""

from edgeattn.runtime.compiler import inline, task

from .byte_products import TILES_SCRATCH, row_product
from .dynamic import TOKENS
from .int8_views import BytePanels, Groups, Part
from .linear_dynamic import TILES_SIZE
from .matmul import round_up
from .simd import ADDS_FIRST, LANES, WIDTH, tile_add_columns, tile_add_down, tile_dequantize, tile_store
from .word_products import Words, product_of_words, split_row


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


@inline
def _start_rows(tile, t, f, panels, own, at_own, finish_with):
    """Of a tile of zeros what is added to sums."""
    return tile_add_columns(tile_add_down(tile, own.int32, at_own + t), panels.bias, panels.at_bias + f)


@inline
def _finish_words(tile, rows, t, f, panels, own, at_own, finish_with):
    _finish_rows(tile, rows, t, f, *finish_with)


@task
def project_rows(x, tokens, scales, projection, features, out, own, at_tiles):
    """Rows of out (tokens, features) = scale (x w^T + terms) factor + bias; what is packed has whole panels.

    x           Part, uint32, rows of bytes plus OFFSET; where the matrix unit multiplies, a multiple of 16
    projection  of panels (features / WIDTH, depth4, WIDTH) of bytes; its bias among the factors
    own         Scratch, TILES_SIZE elements from at_tiles on, behind them words_scratch(TOKENS, depth4)
    """
    depth4, at_own = projection.depth4, at_tiles + TILES_SIZE
    panels = BytePanels(projection.weights, projection.at, projection.weights, projection.at_terms,
                        round_up(features, WIDTH), depth4)
    finish_with = scales, projection, tokens, features, out, own, at_tiles + TILES_SCRATCH
    if ADDS_FIRST:
        at_words = at_own + TOKENS
        for t in range(tokens):
            split_row(x.data, x.at + t * depth4, depth4, own.int32, at_words + 2 * t * depth4, at_own + t)
        product_of_words(_start_rows, _finish_words, (panels, own, at_own, finish_with),
                         Words(own.int32, at_words, depth4, at_words + 2 * TOKENS * depth4), tokens,
                         panels.data, panels.at, panels.features)
    else:
        row_product(_finish_rows, finish_with, Groups(x.data, x.at, depth4, 1), tokens, panels,
                    Part(own.int32, at_tiles))
