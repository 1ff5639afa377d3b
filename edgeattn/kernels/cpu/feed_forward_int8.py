"""Feed-forwards in static int8, block of rows by block of rows: every scale fixed, codes from product to product.

    input   x, a row or its norm as codes, see row_codes.py
    hidden  h = table[requantize(x w1^T + b1)]; with a gate h = requantize((table[g] - zg) (requantize(..) - z1)),
            g = requantize(x gate^T + bg)
    result  requantize(h w2^T + b2), codes that become rows again, with a residual and a norm

Or codes in and out: x as it is, and the codes of the result.  Sums are exact and rules those of `requantize`, so that
bytes are equal under every instruction set, in any batch and on any number of threads.
"""
import numpy as np

from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import NamedTuple, inline, jit, task
from edgeattn.runtime.worker_pool import parallel_for

from .byte_products import DEPTH_STEP, TILES_SCRATCH, row_product
from .finish_int8 import finish_bytes
from .int8_operands import BYTE_FLIP, SIGN_BITS
from .int8_views import BytePanels, Groups, Part, Scaling, scratch_at
from .norm import ADDRESSES, AT_ONCE
from .records import located, named, record
from .requantize import requantize
from .row_codes import ROWS_AND_CODES, read_codes, write_codes
from .row_parts import BLOCK, FEW_ROWS, parts_of_rows, share_of
from .simd import (
    ADDS_FIRST,
    LANES,
    VIRTUAL_LANES,
    WIDTH,
    address_of,
    load,
    load_bytes,
    map_bytes,
    matrix_configure,
    matrix_release,
    maximum,
    smaller,
    splat,
    store,
    store_bytes,
)
from .views import Blocks
from .word_products import Words, row_product_of_words, split_row

WIDE = max(TILES_SCRATCH, 16)  # elements at `at_tiles` before room for the words of a panel
FEATURES = max(VIRTUAL_LANES, 4 * DEPTH_STEP)  # hidden features are a multiple of
# Of weights: positions in elements of 32 bits, `w` of panels, `b` biases and, where ADDS_FIRST, minus the features' own
# products behind them, `m` multipliers; `z` zero points, `zh` of the hidden features; `table`: 256 bytes.
# Those of row_codes.py come last: where they came first, Numba would take this for a kind of that record.
FEED_FORWARD = record(
    "hidden_up gated project_rule multiply_rule w1 b1 m1 z1 gate_w gate_b gate_m gate_z table active_z multiplier zh",
    "w2 b2 m2 at_hidden at_gate at_codes at_words at_own at_tiles shared_size", ROWS_AND_CODES)
_NONE, _LEAST, _MOST = np.int32(0), np.int32(-128), np.int32(127)
_FLIP = np.int32(BYTE_FLIP)  # of a byte in 32 bits


class Operand(NamedTuple):
    """Rows of depth4 groups of unsigned bytes, in scratch; where ADDS_FIRST, their words, and minus own products."""

    at: int
    depth4: int
    at_words: int
    at_own: int


# --- codes to codes ----------------------------------------------------------------------------------------------

@inline
def operand_of(p, base, at, depth4):
    """The Operand at `at` of the rows at base; of words there is one at a time."""
    return Operand(base + at, depth4, base + p.at_words, base + p.at_own)


@inline
def split_rows(s, x, begin, rows, step):
    """The words of every `step`-th row of an Operand, from `begin` on, where products read them."""
    if ADDS_FIRST:
        for r in range(begin, rows, step):
            split_row(s.int32, x.at + r * x.depth4, x.depth4, s.int32, x.at_words, r, x.at_own + r)


@inline
def finish_codes(tile, rows, t, f, scaling, flip, out):
    """Codes, ^ flip, to bytes of out, as row_product calls it."""
    finish_bytes(tile, t, f, scaling, flip, out)


@task
def product_of_codes(s, x, rows, panels, scaling, flip, out, at_tiles):
    """Codes of x w^T + bias, ^ flip, to out, whose blocks are whole rows."""
    if ADDS_FIRST and rows > 1:
        words = Words(s.int32, x.at_words, x.depth4, at_tiles + WIDE)
        row_product_of_words(finish_codes, (scaling, flip, out), words, x.at_own, rows, panels, scaling.features)
    else:
        row_product(finish_codes, (scaling, flip, out), Groups(s.uint32, x.at, x.depth4, 1), rows, panels,
                    Part(s.int32, at_tiles))


@inline
def look_up(s, at, row_step, rows, features, table):
    """codes = table[codes], in place; codes plus 128, a multiple of 4 of them to a row."""
    together = 4 * LANES
    whole = features // together * together
    for r in range(rows):
        here = at + r * row_step
        for i in range(here, here + whole, together):
            store(s.int32, i >> 2, map_bytes(table.data, table.at, load(s.int32, i >> 2)))
        for i in range(here + whole, here + features):
            s.int8[i] = table.data[table.at + (np.int64(s.int8[i]) & 255)]


@inline
def multiply_codes(s, w, p, at_gate, at, rows, features):
    """Codes of the product of gate and hidden features, in place of these, as an unsigned operand."""
    z1, active_z, zh = splat(np.int32(p.z1)), splat(np.int32(p.active_z)), splat(np.int32(p.zh))
    for r in range(rows):
        for i in range(r * p.hidden_up, r * p.hidden_up + features, LANES):
            product = (load_bytes(s.int8, at_gate + i) - active_z) * (load_bytes(s.int8, at + i) - z1)
            code = requantize(product, p.multiply_rule, w.int32, p.multiplier, LANES) + zh
            code = smaller(maximum(code, splat(_LEAST)), splat(_MOST))
            store_bytes(s.int8, at + i, code ^ splat(_FLIP))


@inline
def raise_rows(s, w, p, base, own, rows, begin, end):
    """The hidden features begin .. end of the rows at base, as unsigned operands."""
    x, at_tiles = operand_of(p, base, p.at_x, p.depth4), own + p.at_tiles
    at, at_gate, features = 4 * (base + p.at_hidden) + begin, 4 * (base + p.at_gate) + begin, end - begin
    table = Part(w.int8, 4 * p.table)
    scaling = Scaling(w.int32, p.project_rule, p.m1 + begin, p.hidden_up, np.int32(p.z1))
    panels = BytePanels(w.int32, p.w1 + begin * p.depth4, w.int32, p.b1 + begin, features, p.depth4)
    flip = SIGN_BITS if p.gated == 0 else _NONE  # what is looked up is a position
    separately(product_of_codes, (s, x, rows, panels, scaling, flip, Blocks(s.int8, at, p.hidden_up, 0), at_tiles))
    if p.gated != 0:
        scaling = Scaling(w.int32, p.project_rule, p.gate_m + begin, p.hidden_up, np.int32(p.gate_z))
        panels = BytePanels(w.int32, p.gate_w + begin * p.depth4, w.int32, p.gate_b + begin, features, p.depth4)
        separately(product_of_codes, (s, x, rows, panels, scaling, SIGN_BITS,
                                      Blocks(s.int8, at_gate, p.hidden_up, 0), at_tiles))
        look_up(s, at_gate, p.hidden_up, rows, features, table)
        multiply_codes(s, w, p, at_gate, at, rows, features)
    else:
        look_up(s, at, p.hidden_up, rows, features, table)


@inline
def lower_rows(s, w, p, base, own, rows, begin, end):
    """The codes of the channels begin .. end of the rows at base."""
    depth4 = p.hidden_up // 4
    x, out = operand_of(p, base, p.at_hidden, depth4), 4 * (base + p.at_codes) + begin
    scaling = Scaling(w.int32, p.project_rule, p.m2 + begin, p.out_up, np.int32(p.z2))
    panels = BytePanels(w.int32, p.w2 + begin * depth4, w.int32, p.b2 + begin, end - begin, depth4)
    separately(product_of_codes, (s, x, rows, panels, scaling, _NONE, Blocks(s.int8, out, p.out_up, 0),
                                  own + p.at_tiles))


@inline
def write_result(s, w, p, a, r, row, base, own):
    """Row r of the results at base to row `row` of out."""
    codes = Part(s.int8, 4 * (base + p.at_codes) + r * p.out_up)
    separately(write_codes, (s, w, p, codes, s.float32[base + p.at_nan + r], a.residual, a.out, row, own))


# --- rows among threads ------------------------------------------------------------------------------------------

@task
def feed_rows_forward(p, a, scratch, portion, worker, part):
    """All of a portion of the rows."""
    s, w, own = scratch_at(scratch), scratch_at(a.weights), p.shared_size + worker * p.private_size
    matrix_configure(s.int32, own + p.at_tiles)
    end = min((part + 1) * portion, p.rows)
    for row in range(part * portion, end, BLOCK):
        rows = min(BLOCK, end - row)
        for r in range(0, rows, AT_ONCE):
            separately(read_codes, (s, w, p, a.x, row + r, min(AT_ONCE, rows - r), own + p.at_x + r * p.depth4,
                                    own + p.at_nan + r, own))
        split_rows(s, operand_of(p, own, p.at_x, p.depth4), 0, rows, 1)
        raise_rows(s, w, p, own, own, rows, 0, p.hidden_up)
        split_rows(s, operand_of(p, own, p.at_hidden, p.hidden_up // 4), 0, rows, 1)
        lower_rows(s, w, p, own, own, rows, 0, p.out_up)
        for r in range(rows):
            write_result(s, w, p, a, r, row + r, own, own)
    matrix_release()


@task
def read_some(p, a, scratch, parts, worker, part):
    """Some rows to codes, where few rows are all done together."""
    s, w, own = scratch_at(scratch), scratch_at(a.weights), p.shared_size + worker * p.private_size
    for r in range(part, p.rows, parts):
        separately(read_codes, (s, w, p, a.x, r, np.int64(1), p.at_x + r * p.depth4, p.at_nan + r, own))
    split_rows(s, operand_of(p, 0, p.at_x, p.depth4), part, p.rows, parts)


@task
def raise_some(p, a, scratch, parts, worker, part):
    """Some hidden features of all rows."""
    s, w, own = scratch_at(scratch), scratch_at(a.weights), p.shared_size + worker * p.private_size
    matrix_configure(s.int32, own + p.at_tiles)
    begin, end = share_of(p.hidden_up, WIDTH, parts, part)
    if begin < end:
        raise_rows(s, w, p, 0, own, p.rows, begin, end)
    matrix_release()


@task
def split_some(p, a, scratch, parts, worker, part):
    """The words of some rows of hidden features."""
    split_rows(scratch_at(scratch), operand_of(p, 0, p.at_hidden, p.hidden_up // 4), part, p.rows, parts)


@task
def lower_some(p, a, scratch, parts, worker, part):
    """Some channels of all rows."""
    s, w, own = scratch_at(scratch), scratch_at(a.weights), p.shared_size + worker * p.private_size
    matrix_configure(s.int32, own + p.at_tiles)
    begin, end = share_of(p.out_up, WIDTH, parts, part)
    if begin < end:
        lower_rows(s, w, p, 0, own, p.rows, begin, end)
    matrix_release()


@task
def write_some(p, a, scratch, parts, worker, part):
    """Some rows of the result."""
    s, w, own = scratch_at(scratch), scratch_at(a.weights), p.shared_size + worker * p.private_size
    for r in range(part, p.rows, parts):
        write_result(s, w, p, a, r, r, 0, own)


@jit
def feed_forward_int8(parameters, addresses, scratch, task_queue, count):
    """A feed-forward and what is around it, see above, on at most `count` threads that serve the task_queue.

    parameters FEED_FORWARD, addresses ADDRESSES; scratch: 32-bit elements, `shared_size` for all threads and then
    `private_size` for each.
    """
    p, a, s = named(parameters, FEED_FORWARD), located(addresses, ADDRESSES), address_of(scratch)
    if count > 1 and p.rows <= FEW_ROWS:
        parallel_for(task_queue, count, read_some, p, a, s, count)
        parallel_for(task_queue, count, raise_some, p, a, s, count)
        if ADDS_FIRST:
            parallel_for(task_queue, count, split_some, p, a, s, count)
        parallel_for(task_queue, count, lower_some, p, a, s, count)
        parallel_for(task_queue, count, write_some, p, a, s, count)
    else:
        portion, parts = parts_of_rows(p.rows, BLOCK, count)
        parallel_for(task_queue, parts, feed_rows_forward, p, a, s, portion)
