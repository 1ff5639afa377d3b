"""One tiled product for float32 and for bytes, and the packing of its operands.

A product multiplies ROWS broadcast values by COLUMNS vectors, `depth` times.  The broadcast operand may lie anywhere
(`row_step` between the rows of a tile, `step` between depths); the vector operand is packed in panels
(depth, WIDTH).  float32 arrays take multiply-add; int32 and uint32 arrays hold four bytes per element and take the
four-way dot product.  What happens to the finished tile is the caller's business.
"""
import numpy as np
from numba.extending import register_jitable

from edgeattn.runtime.isa import ISA
from edgeattn.runtime.jit import inline

from .simd import (
    COLUMNS,
    LANES,
    MATRIX_ROWS,
    ROWS,
    WIDTH,
    matrix_dot,
    matrix_dot_signed,
    matrix_load,
    matrix_store,
    matrix_zero,
    outer_product,
    prefetch,
    quotient,
    rank_steps,
    steps,
    tile_add,
    tile_load,
    tile_of_columns,
    tile_store,
    tile_zero,
)

# float32 products summed one after another.  The sums of the chains are summed then: a rounding error grows with the
# length of a chain.
CHAIN = 32
BLOCK = 2 * CHAIN  # two chains: how much of a panel (8 KiB at 32 features) stays near while all tokens pass
MATRIX = ISA.amx  # whether a matrix unit multiplies bytes, 16 groups of four at a time
MATRIX_TOKENS = 2 * MATRIX_ROWS
_LINE = 16  # elements of four bytes in a cache line
MATRIX_DEPTH = 16 if MATRIX else 1  # what the depth of a product of bytes must be a multiple of, in groups of four
MATRIX_SCRATCH = MATRIX_TOKENS * WIDTH if MATRIX else 0
ROW_STEP = MATRIX_ROWS if MATRIX else ROWS  # rows that `lane_product` writes at a time


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


def pack_byte_panels(weight):
    """int8 weight (N, depth), N a multiple of WIDTH, depth of 4 -> int32 panels (N / WIDTH, depth / 4, WIDTH)."""
    n, depth = weight.shape
    panels = weight.reshape(n // WIDTH, WIDTH, depth // 4, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(panels).view(np.int32).ravel()


def pack_byte_rows(weight):
    """int8 weight (N, depth), N a multiple of ROW_STEP, depth of 4 -> int32 for `lane_product`.

    Rows one after the other; for a matrix unit, which needs a depth of 64, its tiles one after the other.
    """
    n, depth = weight.shape
    if MATRIX:
        weight = weight.reshape(n // MATRIX_ROWS, MATRIX_ROWS, depth // 64, 64).swapaxes(1, 2)
    return np.ascontiguousarray(weight).view(np.int32).ravel()


@inline
def multiply(tile, a, at_a, row_step, step, b, at_b, depth):
    """tile[i][j] += sum over k of a[at_a + i row_step + k step] * vector j of b[at_b + k WIDTH]"""
    count = steps(b)
    for k in range(0, depth - count + 1, count):
        tile = rank_steps(tile, a, at_a + k * step, row_step, step, b, at_b + k * WIDTH)
    for k in range(depth // count * count, depth):
        tile = outer_product(tile, a, at_a + k * step, row_step, b, at_b + k * WIDTH)
    return tile


@inline
def multiply_ahead(tile, a, at_a, row_step, step, b, at_b, depth, at_next, part):
    """multiply(), while `part` elements of b from at_next on, at most 8 times `depth`, are brought near."""
    count = steps(b)
    pace = part // max(depth, 1)
    for k in range(0, depth - 2 * count + 1, 2 * count):
        half = k + count
        prefetch(b, at_next + k * pace)
        prefetch(b, at_next + k * pace + _LINE)
        tile = rank_steps(tile, a, at_a + k * step, row_step, step, b, at_b + k * WIDTH)
        prefetch(b, at_next + half * pace)
        prefetch(b, at_next + half * pace + _LINE)
        tile = rank_steps(tile, a, at_a + half * step, row_step, step, b, at_b + half * WIDTH)
    for k in range(depth // (2 * count) * (2 * count), depth):
        tile = outer_product(tile, a, at_a + k * step, row_step, b, at_b + k * WIDTH)
    return tile


@inline
def add_product(begun, a, at_a, row_step, step, b, at_b, depth, chain, out, at_out, out_row, out_column):
    """Add a tile of a b, in chains of `chain` products, to the tile at `out`, zeros unless begun."""
    last = max(depth - 1, 0) // chain * chain
    for k in range(0, last, chain):
        part = tile_zero(ROWS, COLUMNS, a)
        part = multiply(part, a, at_a + k * step, row_step, step, b, at_b + k * WIDTH, chain)
        if begun or k > 0:
            part = tile_add(part, out, at_out, out_row, out_column)
        tile_store(part, out, at_out, out_row, out_column)
    tile = tile_zero(ROWS, COLUMNS, a)
    tile = multiply(tile, a, at_a + last * step, row_step, step, b, at_b + last * WIDTH, depth - last)
    if begun or last > 0:
        tile = tile_add(tile, out, at_out, out_row, out_column)
    tile_store(tile, out, at_out, out_row, out_column)


@inline
def matrix_multiply(x, at_x, x_row, rows, weights, at_weight, bias, at_bias, depth4):
    """Tiles 0 to 3 of the matrix unit = x w^T + bias, a block (MATRIX_TOKENS, WIDTH); at least its first `rows`.

    x        (MATRIX_TOKENS, depth4) groups of four bytes, depth4 a multiple of 16, rows x_row apart
    weights  one panel (depth4, WIDTH); bias (WIDTH,)
    """
    below = MATRIX_ROWS * x_row
    both = rows > MATRIX_ROWS
    matrix_load(0, bias, at_bias, 0)  # every row of the tile is the bias
    matrix_load(1, bias, at_bias + 16, 0)
    if both:
        matrix_load(2, bias, at_bias, 0)
        matrix_load(3, bias, at_bias + 16, 0)
    for k in range(0, depth4, 16):
        matrix_load(4, x, at_x + k, x_row)
        matrix_load(6, weights, at_weight + k * WIDTH, WIDTH)
        matrix_load(7, weights, at_weight + k * WIDTH + 16, WIDTH)
        matrix_dot(0, 4, 6, x, weights)
        matrix_dot(1, 4, 7, x, weights)
        if both:
            matrix_load(5, x, at_x + below + k, x_row)
            matrix_dot(2, 5, 6, x, weights)
            matrix_dot(3, 5, 7, x, weights)


@inline
def matrix_keep(rows, out, at_out):
    """out (MATRIX_TOKENS, WIDTH) = what `matrix_multiply` computed, at least its first `rows`."""
    matrix_store(0, out, at_out, WIDTH)
    matrix_store(1, out, at_out + 16, WIDTH)
    if rows > MATRIX_ROWS:
        matrix_store(2, out, at_out + MATRIX_ROWS * WIDTH, WIDTH)
        matrix_store(3, out, at_out + MATRIX_ROWS * WIDTH + 16, WIDTH)


@inline
def linear(finish, arguments, x, at_x, x_row, x_step, tokens, weights, at_weight, bias, at_bias, features, depth4,
           tiles, at_tiles):
    """finish(tile, t, f, *arguments) with every register tile of x w^T + bias: tokens from t, features from f on.

    arguments  not a function first: Numba would take them all for functions
    x          group k of four bytes of token t at at_x + t x_row + k x_step
    weights    panels (features / WIDTH, depth4, WIDTH); bias (features,) int32
    tokens     a multiple of ROWS, or x holds as many more

    With a matrix unit x_step is 1, depth4 a multiple of MATRIX_DEPTH, and x holds a multiple of 16 tokens. `tiles`,
    MATRIX_SCRATCH elements, then holds one block, which is finished while the next one is multiplied.
    """
    if MATRIX:
        blocks = (tokens + MATRIX_TOKENS - 1) // MATRIX_TOKENS * (features // WIDTH)
        t, f, t_before, f_before = 0, 0, 0, 0
        for block in range(blocks + 1):
            if block < blocks:
                matrix_multiply(x, at_x + t * x_row, x_row, tokens - t, weights, at_weight + f * depth4,
                                bias, at_bias + f, depth4)
            if block > 0:
                for i in range(0, min(MATRIX_TOKENS, tokens - t_before), ROWS):
                    tile = tile_load(ROWS, COLUMNS, tiles, at_tiles + i * WIDTH, WIDTH, LANES)
                    finish(tile, t_before + i, f_before, *arguments)
            if block < blocks:
                matrix_keep(tokens - t, tiles, at_tiles)
            t_before, f_before = t, f
            t += MATRIX_TOKENS
            if t >= tokens:
                t = 0
                f += WIDTH
    else:
        for f in range(0, features, WIDTH):
            for t in range(0, tokens, ROWS):
                tile = tile_of_columns(ROWS, COLUMNS, bias, at_bias + f)
                tile = multiply(tile, x, at_x + t * x_row, x_row, x_step, weights, at_weight + f * depth4, depth4)
                finish(tile, t, f, *arguments)


@inline
def lane_product(unsigned, tiled, a, at_a, a_row, rows, b, at_b, depth4, out, at_out):
    """out (rows, WIDTH) int32 = a b, bytes; the rows up to the next multiple of ROW_STEP are read and written too.

    a         int32: signed bytes, row r from a[at_a + r a_row] on, or as `pack_byte_rows` leaves them
    b         uint32: (depth4, WIDTH), depth4 a multiple of MATRIX_DEPTH; what does not belong to the product is 0 here,
              whatever `a` holds there
    unsigned  a constant: whether b holds unsigned bytes; where it does not, a matrix unit takes them as they are, the
              other instruction sets plus `OFFSET`
    tiled     a constant: whether `pack_byte_rows` laid a out
    """
    if MATRIX:
        row, next_depth, next_tile = a_row, 16, MATRIX_ROWS * a_row
        if tiled:
            row, next_depth, next_tile = 16, 16 * MATRIX_ROWS, MATRIX_ROWS * depth4
        for r in range(0, rows, 2 * MATRIX_ROWS):
            second = rows - r > MATRIX_ROWS
            here = at_a + r // MATRIX_ROWS * next_tile
            matrix_zero(0)
            matrix_zero(1)
            matrix_zero(2)
            matrix_zero(3)
            for k in range(0, depth4, 16):
                matrix_load(6, b, at_b + k * WIDTH, WIDTH)
                matrix_load(7, b, at_b + k * WIDTH + 16, WIDTH)
                matrix_load(4, a, here, row)
                if unsigned:
                    matrix_dot(0, 4, 6, a, b)
                    matrix_dot(1, 4, 7, a, b)
                else:
                    matrix_dot_signed(0, 4, 6)
                    matrix_dot_signed(1, 4, 7)
                if second:
                    matrix_load(5, a, here + next_tile, row)
                    if unsigned:
                        matrix_dot(2, 5, 6, a, b)
                        matrix_dot(3, 5, 7, a, b)
                    else:
                        matrix_dot_signed(2, 5, 6)
                        matrix_dot_signed(3, 5, 7)
                here += next_depth
            to = at_out + r * WIDTH
            matrix_store(0, out, to, WIDTH)
            matrix_store(1, out, to + 16, WIDTH)
            if second:
                matrix_store(2, out, to + MATRIX_ROWS * WIDTH, WIDTH)
                matrix_store(3, out, to + MATRIX_ROWS * WIDTH + 16, WIDTH)
    else:
        for r in range(0, rows, ROWS):
            tile = tile_zero(ROWS, COLUMNS, out)
            tile = multiply(tile, a, at_a + r * a_row, a_row, 1, b, at_b, depth4)
            tile_store(tile, out, at_out + r * WIDTH, WIDTH, LANES)


@inline
def feature_position(feature, block, block_step):
    """Where `feature` of token 0 lies in the layout (features / block, tokens, block)."""
    number = quotient(feature, block)
    return number * block_step + feature - number * block


@inline
def part_of_block(count, tokens):
    """How much of the next `count` rows of a panel one of the tiles of `tokens` tokens brings near."""
    return (count * WIDTH * ROWS // max(tokens, 1) + _LINE - 1) // _LINE * _LINE


@inline
def project(x, tokens, weights, features, out):
    """out = x @ weight.T + bias for `tokens`, a multiple of ROWS.

    x: Rows, as long as they are apart; weights: Panels; out: Blocks.

    The bias comes last: carried along from the first product on, it would make every partial sum round more coarsely.
    """
    depth, panels, block = x.step, weights.data, out.block
    for f in range(0, features, WIDTH):
        at = out.at + feature_position(f, block, out.step)
        next_column = out.at + feature_position(f + LANES, block, out.step) - at
        for k in range(0, depth, BLOCK):
            count = min(BLOCK, depth - k)
            at_rows = weights.at + f * depth + k * WIDTH
            at_next, part = at_rows + count * WIDTH, part_of_block(count, tokens)
            for t in range(0, tokens, ROWS):
                at_row, at_near, done = x.at + t * depth + k, at_next + t // ROWS * part, 0
                if count > CHAIN:
                    done = CHAIN
                    tile = tile_zero(ROWS, COLUMNS, panels)
                    tile = multiply_ahead(tile, x.data, at_row, depth, 1, panels, at_rows, CHAIN, at_near, part // 2)
                    if k > 0:
                        tile = tile_add(tile, out.data, at + t * block, block, next_column)
                    tile_store(tile, out.data, at + t * block, block, next_column)
                tile = tile_zero(ROWS, COLUMNS, panels)
                tile = multiply_ahead(tile, x.data, at_row + done, depth, 1, panels, at_rows + done * WIDTH,
                                      count - done, at_near + part // 2, part // 2)
                if k + done > 0:
                    tile = tile_add(tile, out.data, at + t * block, block, next_column)
                if k + BLOCK >= depth:
                    tile = tile_add(tile, panels, weights.at_bias + f, 0, LANES)
                tile_store(tile, out.data, at + t * block, block, next_column)
