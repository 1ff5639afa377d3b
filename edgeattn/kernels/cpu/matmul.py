"""One tiled product for float32 and for bytes, and what float32 products are made of.

A product multiplies ROWS broadcast values by COLUMNS vectors, `depth` times.  The broadcast operand may lie anywhere
(`row_step` between the rows of a tile, `step` between depths); the vector operand is packed in panels
(depth, WIDTH).  float32 arrays take multiply-add; int32 and uint32 arrays hold four bytes per element and take the
four-way dot product.  What happens to the finished tile is the caller's business.
"""
import numpy as np

from edgeattn.runtime.compiler import inline, register_jitable

from .simd import (
    BY_LANE,
    COLUMNS,
    LANES,
    ROWS,
    WIDTH,
    add_tiles,
    address_of,
    multiply_by_lane,
    multiply_by_lane_ahead,
    outer_product,
    pointer_to,
    prefetch_first,
    quotient,
    rank_steps,
    steps,
    tile_add,
    tile_store,
    tile_zero,
)

# float32 products of attention summed one after another.  The sums of the chains are summed then: a rounding error
# grows with the length of a chain.
CHAIN = 32
BLOCK = 2 * CHAIN  # two chains: how much of a panel (8 KiB at 32 features) stays near while all tokens pass
_LINE = 16  # elements of four bytes in a cache line


@register_jitable
def round_up(value, multiple):
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def padded_head(size):
    """How many features one head occupies in a packed layout, so that no vector straddles two feature blocks.

    The next power of two up to LANES, then multiples of LANES; at least 4, one group of bytes.
    """
    if size > LANES:
        return round_up(size, LANES)
    width = min(4, LANES)
    while width < size:
        width *= 2
    return width


def pad_heads(array, heads, size, padded):
    """(heads * size, ...) -> (heads * padded rounded up to WIDTH, ...) with zeros between and after."""
    out = np.zeros((round_up(heads * padded, WIDTH),) + array.shape[1:], array.dtype)
    view = out[:heads * padded].reshape((heads, padded) + array.shape[1:])
    view[:, :size] = array.reshape((heads, size) + array.shape[1:])
    return out


def pack_panels(weight):
    """float32 weight (N, depth), N a multiple of WIDTH -> flat panels (N / WIDTH, depth, WIDTH)."""
    n, depth = weight.shape
    return weight.reshape(n // WIDTH, WIDTH, depth).transpose(0, 2, 1).ravel()


@inline
def _multiply(tile, a, at_a, row_step, step, b, at_b, depth):
    """tile[i][j] += sum over k of a[at_a + i row_step + k step] * vector j of b[at_b + k WIDTH]"""
    count = steps(b)
    for k in range(0, depth - count + 1, count):
        tile = rank_steps(tile, a, at_a + k * step, row_step, step, b, at_b + k * WIDTH)
    for k in range(depth // count * count, depth):
        tile = outer_product(tile, a, at_a + k * step, row_step, b, at_b + k * WIDTH)
    return tile


@inline
def _multiply_ahead(tile, a, at_a, row_step, step, b, at_b, depth, at_next, pace, most):
    """_multiply(), while for each depth `pace` elements of b from at_next on are brought near, at most `most`."""
    count = steps(b)
    for k in range(0, depth - count + 1, count):
        near = pointer_to(address_of(b) + 4 * (at_next + k * pace), np.float32)
        for i in range(count):
            for line in range(0, most, _LINE):
                prefetch_first(near, i * most + line)
            tile = outer_product(tile, a, at_a + (k + i) * step, row_step, b, at_b + (k + i) * WIDTH)
    for k in range(depth // count * count, depth):
        tile = outer_product(tile, a, at_a + k * step, row_step, b, at_b + k * WIDTH)
    return tile


# multiply(tile, a, at_a, row_step, step, b, at_b, depth), and multiply_ahead(..., at_next, pace, most)
multiply, multiply_ahead = (multiply_by_lane, multiply_by_lane_ahead) if BY_LANE else (_multiply, _multiply_ahead)


@inline
def pace_ahead(rows, tall):
    """How much of the next panel each tile of `tall` rows brings near for each depth: evenly, threads share memory.

    Nothing where one tile passes: it reads panel after panel, which the processor sees for itself.
    """
    tiles = (rows + tall - 1) // tall
    return (WIDTH + tiles - 1) // tiles if tiles > 1 else 0


@inline
def multiply_in_chains(tile, a, at_a, step, b, at_b, depth):
    """multiply() of one row of bytes, by two chains of sums: in one, each would wait for the one before."""
    if BY_LANE:
        return multiply(tile, a, at_a, 0, step, b, at_b, depth)
    other = tile_zero(1, COLUMNS, b)
    for k in range(0, depth - 1, 2):
        tile = outer_product(tile, a, at_a + k * step, 0, b, at_b + k * WIDTH)
        other = outer_product(other, a, at_a + (k + 1) * step, 0, b, at_b + (k + 1) * WIDTH)
    if depth % 2 != 0:
        tile = outer_product(tile, a, at_a + (depth - 1) * step, 0, b, at_b + (depth - 1) * WIDTH)
    return add_tiles(tile, other)


@inline
def add_product(begun, a, b, at_b, depth, chain, out):
    """Add a tile of a b, in chains of `chain` products, to the tile at `out`, zeros unless begun; a, out: Grids."""
    last = max(depth - 1, 0) // chain * chain
    for k in range(0, last, chain):
        part = tile_zero(ROWS, COLUMNS, a.data)
        part = multiply(part, a.data, a.at + k * a.column, a.row, a.column, b, at_b + k * WIDTH, chain)
        if begun or k > 0:
            part = tile_add(part, out.data, out.at, out.row, out.column)
        tile_store(part, out.data, out.at, out.row, out.column)
    tile = tile_zero(ROWS, COLUMNS, a.data)
    tile = multiply(tile, a.data, a.at + last * a.column, a.row, a.column, b, at_b + last * WIDTH, depth - last)
    if begun or last > 0:
        tile = tile_add(tile, out.data, out.at, out.row, out.column)
    tile_store(tile, out.data, out.at, out.row, out.column)


@inline
def feature_position(feature, block, block_step):
    """Where `feature` of token 0 lies in the layout (features / block, tokens, block)."""
    number = quotient(feature, block)
    return number * block_step + feature - number * block
