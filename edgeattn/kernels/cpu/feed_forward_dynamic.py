"""Linear layers and feed-forwards with int8 weights and inputs quantized at run time, and what follows them.

What they compute is said in `feed_forward_float32`.  Products are of bytes, as follows; all else is float32.

    input      s = max|x| / 127 of a token, q = rint(x / s)
    hidden     of a token and GROUP features: lo = min(0, min h), hi = max(0, max h), s = (hi - lo) / 255,
               z = rint(-lo / s), q = clamp(rint(h / s) + z, 0, 255) - z
    product    sum of s (q c), group by group, times the scale of an output channel, + bias, + x_J V_J
    columns    J: a few features of the input that bytes would round too coarsely: q = 0 there, V are their weights
    channels   an output channel that one byte a weight would round too coarsely has a second one, added last

Quotients are products with a reciprocal, s (q c) and the rest multiply-adds.  The float operations are the same in the
same order under every instruction set: where they can multiply and add with one rounding, results are equal bit for
bit, in any batch and on any number of threads.
"""
import numpy as np

from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import NamedTuple, inline, jit, task
from edgeattn.runtime.worker_pool import parallel_for

from .activation import activate_rows, multiply_rows
from .dynamic import COLUMNS_APART, inverse_of, join_row, largest_of_row, scale_of
from .feed_forward_float32 import parts_of_rows, share_of
from .int8_operands import FLIP
from .int8_views import Groups
from .matmul import multiply, multiply_ahead, pace_ahead, round_up
from .norm import ADDRESSES, NO_NORM, finish_row, normalize_row, read_row
from .one_row import multiply_row
from .records import located, named, record
from .simd import (
    ADDS_FIRST,
    AS_WORDS,
    COLUMNS,
    LANES,
    OFFSET,
    ROWS,
    VIRTUAL_LANES,
    WIDTH,
    address_of,
    bits_of,
    first_lane,
    float_of_bits,
    fma,
    join_bytes,
    load,
    max_lanes,
    maximum,
    outer_product,
    outer_product_of_words,
    pointer_to,
    round_to_int,
    select,
    shift_right_logical,
    splat,
    store,
    tile_accumulate,
    tile_add_columns,
    tile_add_down,
    tile_add_outer,
    tile_map,
    tile_of_products,
    tile_scale,
    tile_store,
    wide_splat,
)
from .word_products import Words, product_of_words, split_row

GROUP = 256  # hidden features that share a scale
ROW = GROUP + 16  # from row to row of them: a power of two would have all rows in a few sets of the cache
BLOCK = 32 if AS_WORDS and not ADDS_FIRST else 64  # rows that pass a feed-forward together
FEW_ROWS = 24  # up to so many rows, threads share the features; then the rows
DEPTH = 64  # what rows of bytes are padded to: whole numbers of vectors of bytes for every instruction set
# Of weights: positions in elements of 32 bits. `w`: bytes, `c`: sums of an output channel's, and where ADDS_FIRST,
# group by group, minus its own products behind them, `s`: scales, `b`: biases, `v`: (J, columns) of the features `j`
# that are apart, whose number is `apart`; `low`: the channels, `lows` of them, that have a second one, behind the
# others. `groups4`: groups of four bytes of an input row. `columns`: channels and second ones. Of scratch: first what
# belongs to some rows together, then what a thread needs for itself.
_ROWS_OF = "at_bytes at_scale at_minus at_own at_apart at_sums"
LINEAR = record("rows width out_width out_up columns groups4 activation norm w c s b v j apart low lows at_norm",
                _ROWS_OF, "at_wide at_row shared_size private_size")
FEED_FORWARD = record(
    "rows width hidden out_width hidden_up out_up columns groups4 activation gated norm_first norm_last",
    "w1 c1 s1 b1 v1 j1 apart1 gate_w gate_c gate_s gate_b gate_v w2 c2 s2 b2 v2 j2 apart2 low lows at_first at_last",
    _ROWS_OF, "at_codes at_code_scale at_code_minus at_code_own at_hidden_apart codes_step scales_step",
    "at_wide at_row at_hidden at_gate shared_size private_size")
WORDS = 2 if AS_WORDS else 1  # elements that four bytes of a row take in scratch
OWN_TERMS = 1 if ADDS_FIRST else 0  # whether minus a channel's own products are behind the sums of its weights
_ZERO = np.float32(0)
_SIGN = np.int32(-2147483648)
_EVEN_BYTES, _EIGHT = np.int32(0x00FF00FF), np.int32(8)
_INFINITY, _NAN, _LARGEST_FLOAT = np.float32(np.inf), np.float32(np.nan), np.float32(3.4028235e38)
_LEVELS, _PER_LEVEL = np.float32(255), np.float32(1 / 255)


class Codes(NamedTuple):
    """Where rows of groups4 groups of bytes are; of each row its scale, what c is times, minus its own products."""

    at: int
    groups4: int
    at_scale: int
    at_minus: int
    at_own: int


class Panels(NamedTuple):
    """Where panels of weights are, the channels' sums, and how far behind those minus their own products."""

    at: int
    at_c: int
    own_step: int


class Sums(NamedTuple):
    """Where products go, as float32: rows from `at` on, `row` apart; begun: they are added to what is there.

    finished: they are not, and become y s + b + x_J V_J: where the scales, biases and V, rows `v_step` apart, of these
    channels are, how many features are `apart`, and where x_J of the first row is.
    """

    at: int
    row: int
    begun: bool
    finished: bool
    at_s: int
    at_b: int
    at_v: int
    v_step: int
    apart: int
    at_apart: int


class Memory(NamedTuple):
    """The scratch, and weights, by the kinds of their elements."""

    f: object
    i: object
    u: object
    weights: object
    factors: object


@inline
def memory_of(scratch, weights):
    """Memory from the addresses of the scratch and of the weights."""
    return Memory(pointer_to(scratch, np.float32), pointer_to(scratch, np.int32), pointer_to(scratch, np.uint32),
                  pointer_to(weights, np.int32), pointer_to(weights, np.float32))


# --- rows to bytes -----------------------------------------------------------------------------------------------

@inline
def take_apart(m, at, j, first, width, apart, kept):
    """Move the features j (apart,) that lie in first .. first + width from a row at `at` to kept, leaving zeros."""
    for k in range(apart):
        column = np.int64(m.weights[j + k]) - first
        if 0 <= column < width:
            m.f[kept + k] = m.f[at + column]
            m.f[at + column] = _ZERO


@inline
def place_of_codes(at_row, groups4, out, r, alone):
    """Where a row at at_row becomes bytes: as row r of those at `out` or, where ADDS_FIRST, in its own place.

    alone: whether it is the only one, which stays bytes where ADDS_FIRST.
    """
    return at_row if ADDS_FIRST and not alone else out + r * groups4 * WORDS


@inline
def split_codes(m, at, groups4, out, r, alone, at_own):
    """Four bytes an element (groups4,) to 16-bit numbers, as products take row r of `out`, where AS_WORDS."""
    if ADDS_FIRST:
        if not alone:
            split_row(m.i, at, groups4, m.i, out, r, at_own)
    elif AS_WORDS:
        for i in range(at, at + groups4, LANES):
            four = load(m.i, i)
            store(m.i, i, four & splat(_EVEN_BYTES))
            store(m.i, i + groups4, shift_right_logical(four, splat(_EIGHT)) & splat(_EVEN_BYTES))


@inline
def quantize_row(m, at, groups4, out, r, alone, at_scale, at_minus, at_own):
    """A row, which changes, to bytes, row r of those at `out`, symmetric: bytes, scale, and what the sum of a channel's
    weights times is added to products.
    """
    largest = float_of_bits(splat(largest_of_row(m.f, at, 4 * groups4)))
    m.f[at_scale] = first_lane(scale_of(largest))
    m.i[at_minus] = np.int32(-OFFSET)
    to = place_of_codes(at, groups4, out, r, alone)
    join_row(m.f, at, 4 * groups4, inverse_of(largest), FLIP, m.i, to)
    split_codes(m, to, groups4, out, r, alone, at_own)


@inline
def quantize_range(m, at, width, out, r, alone, at_scale, at_minus, at_own):
    """A row to bytes with a zero point; otherwise as quantize_row. width a multiple of DEPTH."""
    to = place_of_codes(at, width // 4, out, r, alone)
    high = splat(np.int32(0))
    low = high
    for e in range(0, width, LANES):  # as integers: a NaN is larger than all numbers
        bits = bits_of(load(m.f, at + e))
        high, low = maximum(bits, high), maximum(bits ^ splat(_SIGN), low)
    below = float_of_bits(splat(max_lanes(low)))
    extent = float_of_bits(splat(max_lanes(high))) + below
    m.f[at_scale] = first_lane(select(extent < splat(_INFINITY), extent * splat(_PER_LEVEL), splat(_NAN)))
    inverse = splat(_LEVELS) / extent
    inverse = select(inverse < splat(_LARGEST_FLOAT), inverse, splat(_LARGEST_FLOAT))
    zero = round_to_int(below * inverse)
    m.i[at_minus] = np.int32(128 - OFFSET) - first_lane(zero)
    shift = zero - splat(np.int32(128))
    for e in range(0, width, 4 * LANES):
        i = at + e
        c0 = round_to_int(load(m.f, i) * inverse) + shift
        c1 = round_to_int(load(m.f, i + LANES) * inverse) + shift
        c2 = round_to_int(load(m.f, i + 2 * LANES) * inverse) + shift
        c3 = round_to_int(load(m.f, i + 3 * LANES) * inverse) + shift
        store(m.i, to + e // 4, join_bytes(c0, c1, c2, c3) ^ splat(FLIP))
    split_codes(m, to, width // 4, out, r, alone, at_own)


@task
def quantize_input(m, p, a, row, base, r, alone, own, norm, at_norm, j, apart):
    """Row `row` of x, or its norm, as row r of the bytes at base, the only one if `alone`; own: room for a row."""
    at = own + p.at_row
    read_row(pointer_to(a.x, np.float32), row * p.width, p.width, m.f, at)
    store(m.f, at + round_up(p.width, VIRTUAL_LANES), wide_splat(_ZERO))
    if norm != NO_NORM:
        normalize_row(m.f, at, p.width, norm, m.factors, at_norm)
    take_apart(m, at, j, 0, p.width, apart, base + p.at_apart + r * COLUMNS_APART)
    quantize_row(m, at, p.groups4, base + p.at_bytes, r, alone, base + p.at_scale + r, base + p.at_minus + r,
                 base + p.at_own + r)


@inline
def codes_of_rows(p, base):
    """The Codes of the rows at base."""
    return Codes(base + p.at_bytes, p.groups4, base + p.at_scale, base + p.at_minus, base + p.at_own)


# --- products ----------------------------------------------------------------------------------------------------

@inline
def scale_and_add(y, factors, at, behind):
    """y times a scale, plus the bias `behind` it."""
    return fma(y, load(factors, at), load(factors, at + behind))


@inline
def finish_tile(tile, t, f, m, x, out):
    """The products of rows from t on and channels from f on, times each row's scale, as `out` says."""
    to = out.at + t * out.row + f
    if out.begun:
        tile_accumulate(tile, m.f, x.at_scale + t, m.f, to, out.row)
    elif out.finished:
        y = tile_map(tile_scale(tile, m.f, x.at_scale + t), scale_and_add, m.factors, out.at_s + f, LANES,
                     out.at_b - out.at_s)
        for k in range(out.apart):
            y = outer_product(y, m.f, out.at_apart + t * COLUMNS_APART + k, COLUMNS_APART, m.factors,
                              out.at_v + k * out.v_step + f)
        tile_store(y, m.f, to, out.row, LANES)
    else:
        tile_store(tile_scale(tile, m.f, x.at_scale + t), m.f, to, out.row, LANES)


@inline
def multiply_tile(tile, t, f, m, x, w, out, at_next, pace):
    """A tile, plus x w^T, finished; of weights from at_next on, `pace` elements for each depth are brought near."""
    groups4 = x.groups4
    at_x, at_w = x.at + t * groups4 * WORDS, w.at + f * groups4
    if AS_WORDS:
        for k in range(groups4):
            tile = outer_product_of_words(tile, m.i, at_x + k, WORDS * groups4, groups4, m.weights, at_w + k * WIDTH)
    elif pace > 0:
        tile = multiply_ahead(tile, m.u, at_x, groups4, 1, m.weights, at_w, groups4, at_next, pace,
                              WIDTH // 2)
    else:
        tile = multiply(tile, m.u, at_x, groups4, 1, m.weights, at_w, groups4)
    finish_tile(tile, t, f, m, x, out)


@inline
def product_of_bytes(m, x, rows, w, features, out):
    """product_rows() of bytes, or of words as they are."""
    at_minus, at_c, pace = x.at_minus, w.at_c, pace_ahead(rows, ROWS)
    for f in range(0, features, WIDTH):
        t, at_next = 0, w.at + (f + WIDTH) * x.groups4
        while t < rows:
            left = rows - t
            if left >= ROWS:
                tile = tile_of_products(ROWS, COLUMNS, m.i, at_minus + t, m.weights, at_c + f)
                multiply_tile(tile, t, f, m, x, w, out, at_next, pace)
                at_next += pace * x.groups4
                t += ROWS
            elif left >= 4:
                tile = tile_of_products(4, COLUMNS, m.i, at_minus + t, m.weights, at_c + f)
                multiply_tile(tile, t, f, m, x, w, out, at_next, 0)
                t += 4
            elif left == 3:
                tile = tile_of_products(3, COLUMNS, m.i, at_minus + t, m.weights, at_c + f)
                multiply_tile(tile, t, f, m, x, w, out, at_next, 0)
                t += 3
            elif left == 2:
                tile = tile_of_products(2, COLUMNS, m.i, at_minus + t, m.weights, at_c + f)
                multiply_tile(tile, t, f, m, x, w, out, at_next, 0)
                t += 2
            else:
                tile = tile_of_products(1, COLUMNS, m.i, at_minus + t, m.weights, at_c + f)
                multiply_tile(tile, t, f, m, x, w, out, at_next, 0)
                t += 1


@inline
def start_sums(tile, t, f, m, x, w, out):
    """What a tile of zeros is before products are added."""
    tile = tile_add_outer(tile, m.i, x.at_minus + t, m.weights, w.at_c + f)
    return tile_add_columns(tile_add_down(tile, m.i, x.at_own + t), m.weights, w.at_c + w.own_step + f)


@inline
def finish_sums(tile, rows, t, f, m, x, w, out):
    """finish_tile(), as product_of_words calls it."""
    finish_tile(tile, t, f, m, x, out)


@task
def product_rows(m, x, rows, w, features, out, at_wide):
    """out (rows, features) = scale (x w^T + minus c), or what `out` says.

    x: Codes; w: Panels (features / WIDTH, groups4, WIDTH); c (features,): sums of w; out: Sums; at_wide: room for words
    """
    if ADDS_FIRST:
        if rows == 1:
            for f in range(0, features, WIDTH):
                tile = tile_of_products(1, COLUMNS, m.i, x.at_minus, m.weights, w.at_c + f)
                tile = multiply_row(tile, Groups(m.u, x.at, 0, 1), m.weights, w.at + f * x.groups4, x.groups4)
                finish_tile(tile, 0, f, m, x, out)
            return
        product_of_words(start_sums, finish_sums, (m, x, w, out), Words(m.i, x.at, x.groups4, at_wide), rows,
                         m.weights, w.at, features)
    else:
        product_of_bytes(m, x, rows, w, features, out)


@task
def scale_rows(m, at, row_step, rows, features, at_s, at_b, at_v, v_step, apart, at_apart):
    """y = y s + b, then + x_J V_J for each J; y (rows, features) at `at`."""
    for r in range(rows):
        here, kept = at + r * row_step, at_apart + r * COLUMNS_APART
        for f in range(0, features, LANES):
            y = fma(load(m.f, here + f), load(m.factors, at_s + f), load(m.factors, at_b + f))
            for k in range(apart):
                y = fma(splat(m.f[kept + k]), load(m.factors, at_v + k * v_step + f), y)
            store(m.f, here + f, y)


@inline
def add_second(m, at, out_up, low, lows):
    """Add to channels `low` (lows,) of a row at `at` what their second ones, behind out_up channels, hold."""
    for k in range(lows):
        channel = np.int64(m.weights[low + k])
        m.f[at + channel] = m.f[at + channel] + m.f[at + out_up + k]


# --- linear ------------------------------------------------------------------------------------------------------

@inline
def multiply_linear(m, p, base, own, rows, f, features):
    """The channels from f on of the rows at base, without the second ones."""
    out = Sums(base + p.at_sums + f, p.columns, False, True, p.s + f, p.b + f, p.v + f, p.columns, p.apart,
               base + p.at_apart)
    separately(product_rows, (m, codes_of_rows(p, base), rows, Panels(p.w + f * p.groups4, p.c + f, p.columns),
                              features, out, own + p.at_wide))


@inline
def finish_linear(m, p, a, base, row, rows):
    """All that follows the sums of the rows at base, of which `row` is the first."""
    at = base + p.at_sums
    for r in range(rows):
        add_second(m, at + r * p.columns, p.out_up, p.low, p.lows)
    separately(activate_rows, (p.activation, True, m.f, at, p.columns, rows, p.out_up))
    for r in range(rows):
        separately(finish_row, (m.f, at + r * p.columns, p.out_width, a.residual, row + r, p.norm, m.factors, p.at_norm,
                                a.out))


@task
def linear_of_rows(p, a, scratch, portion, worker, part):
    """All of a portion of the rows."""
    m, own = memory_of(scratch, a.weights), p.shared_size + worker * p.private_size
    end = min((part + 1) * portion, p.rows)
    for row in range(part * portion, end, BLOCK):
        rows = min(BLOCK, end - row)
        for r in range(rows):
            separately(quantize_input, (m, p, a, row + r, own, r, rows == 1, own, NO_NORM, 0, p.j, p.apart))
        multiply_linear(m, p, own, own, rows, 0, p.columns)
        finish_linear(m, p, a, own, row, rows)


@task
def quantize_linear_input(p, a, scratch, parts, worker, part):
    """Some rows to bytes, where few rows are all done together."""
    m, own = memory_of(scratch, a.weights), p.shared_size + worker * p.private_size
    for r in range(part, p.rows, parts):
        separately(quantize_input, (m, p, a, r, 0, r, p.rows == 1, own, NO_NORM, 0, p.j, p.apart))


@task
def multiply_channels(p, a, scratch, parts, worker, part):
    """The sums of all rows for some channels."""
    begin, end = share_of(p.columns, WIDTH, parts, part)
    own = p.shared_size + worker * p.private_size
    multiply_linear(memory_of(scratch, a.weights), p, 0, own, p.rows, begin, end - begin)


@jit
def linear_dynamic(parameters, addresses, scratch, task_queue, count):
    """A linear layer and what follows it, see above, on at most `count` threads that serve the task_queue.

    parameters LINEAR, addresses ADDRESSES; scratch: 32-bit elements, `shared_size` for all threads and then
    `private_size` for each.
    """
    p, a, s = named(parameters, LINEAR), located(addresses, ADDRESSES), address_of(scratch)
    if count > 1 and p.rows <= FEW_ROWS:
        parallel_for(task_queue, count, quantize_linear_input, p, a, s, count)
        parallel_for(task_queue, count, multiply_channels, p, a, s, count)
        finish_linear(memory_of(s, a.weights), p, a, 0, 0, p.rows)
    else:
        portion, parts = parts_of_rows(p.rows, BLOCK, count)
        parallel_for(task_queue, parts, linear_of_rows, p, a, s, portion)


# --- feed-forward ------------------------------------------------------------------------------------------------

@inline
def raise_rows(m, p, base, own, rows, g):
    """The hidden features g .. g + GROUP of the rows at base, as bytes."""
    features = min(GROUP, p.hidden_up - g)
    at, at_gate, x4 = own + p.at_hidden, own + p.at_gate, p.groups4
    x, at_apart = codes_of_rows(p, base), base + p.at_apart
    out = Sums(at, ROW, False, True, p.s1 + g, p.b1 + g, p.v1 + g, p.hidden_up, p.apart1, at_apart)
    separately(product_rows, (m, x, rows, Panels(p.w1 + g * x4, p.c1 + g, p.hidden_up), features, out,
                              own + p.at_wide))
    if p.gated != 0:
        out = Sums(at_gate, ROW, False, True, p.gate_s + g, p.gate_b + g, p.gate_v + g, p.hidden_up, p.apart1,
                   at_apart)
        separately(product_rows, (m, x, rows, Panels(p.gate_w + g * x4, p.gate_c + g, p.hidden_up), features, out,
                                  own + p.at_wide))
        separately(activate_rows, (p.activation, True, m.f, at_gate, ROW, rows, features))
        multiply_rows(m.f, at_gate, ROW, m.f, at, ROW, rows, features)
    else:
        separately(activate_rows, (p.activation, True, m.f, at, ROW, rows, features))
    number = g // GROUP
    codes, scales = base + p.at_codes + number * p.codes_step, number * p.scales_step
    for r in range(rows):
        take_apart(m, at + r * ROW, p.j2, g, features, p.apart2, base + p.at_hidden_apart + r * COLUMNS_APART)
        quantize_range(m, at + r * ROW, features, codes, r, rows == 1, base + p.at_code_scale + scales + r,
                       base + p.at_code_minus + scales + r, base + p.at_code_own + scales + r)


@inline
def lower_rows(m, p, base, own, rows, g, n, features):
    """Add to the sums of the channels from n on what the hidden features g .. g + GROUP contribute."""
    number, groups4 = g // GROUP, min(GROUP, p.hidden_up - g) // 4
    scales = number * p.scales_step
    x = Codes(base + p.at_codes + number * p.codes_step, groups4, base + p.at_code_scale + scales,
              base + p.at_code_minus + scales, base + p.at_code_own + scales)
    w = Panels(p.w2 + g // 4 * p.columns + n * groups4, p.c2 + number * p.columns * (1 + OWN_TERMS) + n, p.columns)
    out = Sums(base + p.at_sums + n, p.columns, g > 0, False, 0, 0, 0, 0, 0, 0)
    separately(product_rows, (m, x, rows, w, features, out, own + p.at_wide))


@inline
def finish_rows(m, p, a, base, r0, row, rows):
    """All that follows the sums of the rows at base, from r0 on, which are those from `row` on."""
    at = base + p.at_sums + r0 * p.columns
    separately(scale_rows, (m, at, p.columns, rows, p.columns, p.s2, p.b2, p.v2, p.columns, p.apart2, base +
                            p.at_hidden_apart + r0 * COLUMNS_APART))
    for r in range(rows):
        add_second(m, at + r * p.columns, p.out_up, p.low, p.lows)
        separately(finish_row, (m.f, at + r * p.columns, p.out_width, a.residual, row + r, p.norm_last, m.factors,
                                p.at_last, a.out))


@task
def feed_rows_forward(p, a, scratch, portion, worker, part):
    """All of a portion of the rows."""
    m, own = memory_of(scratch, a.weights), p.shared_size + worker * p.private_size
    end = min((part + 1) * portion, p.rows)
    for row in range(part * portion, end, BLOCK):
        rows = min(BLOCK, end - row)
        for r in range(rows):
            separately(quantize_input, (m, p, a, row + r, own, r, rows == 1, own, p.norm_first, p.at_first, p.j1,
                                        p.apart1))
        for g in range(0, p.hidden, GROUP):
            raise_rows(m, p, own, own, rows, g)
            lower_rows(m, p, own, own, rows, g, 0, p.columns)
        finish_rows(m, p, a, own, 0, row, rows)


@task
def quantize_some(p, a, scratch, parts, worker, part):
    """Some rows to bytes, where few rows are all done together."""
    m, own = memory_of(scratch, a.weights), p.shared_size + worker * p.private_size
    for r in range(part, p.rows, parts):
        separately(quantize_input, (m, p, a, r, 0, r, p.rows == 1, own, p.norm_first, p.at_first, p.j1, p.apart1))


@task
def raise_some(p, a, scratch, parts, worker, part):
    """Some groups of hidden features of all rows."""
    m, own = memory_of(scratch, a.weights), p.shared_size + worker * p.private_size
    for g in range(part * GROUP, p.hidden, parts * GROUP):
        raise_rows(m, p, 0, own, p.rows, g)


@task
def lower_some(p, a, scratch, parts, worker, part):
    """The sums of all rows for some channels."""
    m, own = memory_of(scratch, a.weights), p.shared_size + worker * p.private_size
    begin, end = share_of(p.columns, WIDTH, parts, part)
    for g in range(0, p.hidden, GROUP):
        lower_rows(m, p, 0, own, p.rows, g, begin, end - begin)


@task
def finish_some(p, a, scratch, parts, worker, part):
    """All that follows the sums of some rows."""
    begin, end = share_of(p.rows, 1, parts, part)
    finish_rows(memory_of(scratch, a.weights), p, a, 0, begin, begin, end - begin)


@jit
def feed_forward_dynamic(parameters, addresses, scratch, task_queue, count):
    """A feed-forward and what is around it, see above, on at most `count` threads that serve the task_queue.

    parameters FEED_FORWARD, addresses ADDRESSES; scratch: 32-bit elements, `shared_size` for all threads and then
    `private_size` for each.
    """
    p, a, s = named(parameters, FEED_FORWARD), located(addresses, ADDRESSES), address_of(scratch)
    if count > 1 and p.rows <= FEW_ROWS:
        parallel_for(task_queue, count, quantize_some, p, a, s, count)
        parallel_for(task_queue, count, raise_some, p, a, s, count)
        parallel_for(task_queue, count, lower_some, p, a, s, count)
        parallel_for(task_queue, count, finish_some, p, a, s, count)
    else:
        portion, parts = parts_of_rows(p.rows, BLOCK, count)
        parallel_for(task_queue, parts, feed_rows_forward, p, a, s, portion)
