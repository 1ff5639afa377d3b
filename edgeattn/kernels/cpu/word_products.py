"""Products of bytes as words, as simd.word_tile says, where ADDS_FIRST: tile by tile, panel by panel.

The first tile of a panel leaves its words for the others, which bring the next panel near.
"""
import numpy as np

from edgeattn.runtime.compiler import NamedTuple, inline, register_jitable

from .matmul import round_up
from .simd import (
    ADDS_FIRST,
    COLUMNS,
    LANES,
    ROWS,
    WIDTH,
    add_products_of_wide,
    add_word_products,
    add_word_products_and_widen,
    load,
    own_products,
    prefetch,
    splat,
    split_words,
    sum_lanes,
    tile_zero,
)

_NEAR = 32 * WIDTH  # how far ahead bytes are brought near that are read once


class Words(NamedTuple):
    """Rows of pairs of words, of which there are depth4, from data[at] on.

    at_wide: where in data the words of a panel go, 2 * depth4 * WIDTH elements.
    """

    data: object
    at: int
    depth4: int
    at_wide: int


@inline
def split_row(source, at, depth4, data, to, at_own):
    """Four bytes an element (depth4,) to pairs of words, and minus the sum of their own products; depth4 as LANES.

    The bytes may be the second half of where the words go.
    """
    own = splat(np.int32(0))
    for i in range(0, depth4, LANES):
        own = own + split_words(data, to + 2 * i, load(source, at + i))
    data[at_own] = -sum_lanes(own)


def own_terms(codes):
    """What is added to the products of each row of int8 codes (n, depth): minus their own ones, where ADDS_FIRST."""
    return -own_products(codes) if ADDS_FIRST else np.zeros(len(codes), np.int32)


@register_jitable
def words_scratch(rows, depth4):
    """Elements that rows of words take, what each adds, and the words of a panel."""
    return round_up(rows, 16) + 2 * depth4 * (rows + WIDTH) if ADDS_FIRST else 0


@inline
def _of_bytes(start, finish, arguments, zero, rows, x, w, at_w, f):
    tile = start(zero, 0, f, *arguments)
    for k in range(x.depth4):
        prefetch(w, at_w + k * WIDTH + _NEAR)
        tile = add_word_products(tile, x.data, x.at + 2 * k, 2 * x.depth4, w, at_w + k * WIDTH)
    finish(tile, rows, 0, f, *arguments)


@inline
def _of_words(start, finish, arguments, zero, rows, x, t, f, w, at_next, lines):
    for i in range(lines):
        prefetch(w, at_next + ((t // ROWS - 1) * lines + i) * WIDTH)
    tile = start(zero, t, f, *arguments)
    for k in range(x.depth4):
        tile = add_products_of_wide(tile, x.data, x.at + 2 * (t * x.depth4 + k), 2 * x.depth4, x.data,
                                    x.at_wide + 2 * k * WIDTH)
    finish(tile, rows, t, f, *arguments)


@inline
def _widen(start, finish, arguments, zero, x, w, at_w, f):
    tile = start(zero, 0, f, *arguments)
    for k in range(x.depth4):
        tile = add_word_products_and_widen(tile, x.data, x.at + 2 * k, 2 * x.depth4, w, at_w + k * WIDTH, x.data,
                                           x.at_wide + 2 * k * WIDTH)
    finish(tile, ROWS, 0, f, *arguments)


@inline
def product_of_words(start, finish, arguments, x, rows, w, at_w, features):
    """finish(tile, rows, t, f, *arguments) with every tile of start(zeros, t, f, *arguments) + x w^T + own products.

    x: Words; w: panels (features / WIDTH, depth4, WIDTH) of bytes from at_w on
    """
    like, depth4, more_tiles = x.data, x.depth4, (rows - 1) // ROWS
    lines = (depth4 + more_tiles - 1) // max(more_tiles, 1)  # of the next panel that each of these tiles brings near
    for f in range(0, features, WIDTH):
        at_panel = at_w + f * depth4
        if rows > ROWS:
            at_next, t = at_panel + depth4 * WIDTH, ROWS
            _widen(start, finish, arguments, tile_zero(ROWS, COLUMNS, like), x, w, at_panel, f)
            while t + ROWS <= rows:
                _of_words(start, finish, arguments, tile_zero(ROWS, COLUMNS, like), ROWS, x, t, f, w, at_next,
                          lines)
                t += ROWS
            if rows - t == 3:
                _of_words(start, finish, arguments, tile_zero(3, COLUMNS, like), 3, x, t, f, w, at_next,
                          lines)
            elif rows - t == 2:
                _of_words(start, finish, arguments, tile_zero(2, COLUMNS, like), 2, x, t, f, w, at_next,
                          lines)
            elif rows - t == 1:
                _of_words(start, finish, arguments, tile_zero(1, COLUMNS, like), 1, x, t, f, w, at_next,
                          lines)
        elif rows == 4:
            _of_bytes(start, finish, arguments, tile_zero(4, COLUMNS, like), 4, x, w, at_panel, f)
        elif rows == 3:
            _of_bytes(start, finish, arguments, tile_zero(3, COLUMNS, like), 3, x, w, at_panel, f)
        elif rows == 2:
            _of_bytes(start, finish, arguments, tile_zero(2, COLUMNS, like), 2, x, w, at_panel, f)
        else:
            _of_bytes(start, finish, arguments, tile_zero(1, COLUMNS, like), 1, x, w, at_panel, f)
