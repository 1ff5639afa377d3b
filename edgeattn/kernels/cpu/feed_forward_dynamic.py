"""Feed-forwards with int8 weights and inputs quantized at run time, and what is around them, block of rows by block.

What they compute is said in `feed_forward_float32`.  Products are of bytes, as dynamic_rows.py says, where they get the
same bits in any batch and on any number of threads; all else is float32.
"""
from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import inline, jit, task
from edgeattn.runtime.worker_pool import parallel_for

from .activation import activate_rows, multiply_rows
from .dynamic import COLUMNS_APART
from .dynamic_products import Finish, Panels, Sums, add_second, product_rows, scale_rows
from .dynamic_rows import (
    BLOCK,
    ROWS_OF,
    Codes,
    codes_of_rows,
    memory_of,
    quantize_input,
    quantize_range,
    take_apart,
)
from .norm import ADDRESSES, finish_row
from .records import located, named, record
from .row_parts import FEW_ROWS, parts_of_rows, share_of
from .simd import ADDS_FIRST, WIDTH, address_of

GROUP = 256  # hidden features that share a scale
ROW = GROUP + 16  # from row to row of them: a power of two would have all rows in a few sets of the cache
FEED_FORWARD = record(
    "rows width hidden out_width hidden_up out_up columns groups4 activation gated norm_first norm_last",
    "w1 c1 s1 b1 v1 j1 apart1 gate_w gate_c gate_s gate_b gate_v w2 c2 s2 b2 v2 j2 apart2 low lows at_first at_last",
    ROWS_OF, "at_codes at_code_scale at_code_minus at_code_own at_hidden_apart codes_step scales_step",
    "at_wide at_row at_hidden at_gate shared_size private_size")
OWN_TERMS = 1 if ADDS_FIRST else 0  # whether minus a channel's own products are behind the sums of its weights


@inline
def raise_rows(m, p, base, own, rows, g):
    """The hidden features g .. g + GROUP of the rows at base, as bytes."""
    features = min(GROUP, p.hidden_up - g)
    at, at_gate, x = own + p.at_hidden, own + p.at_gate, codes_of_rows(p, base)
    w = Panels(p.w1 + g * p.groups4, p.c1 + g, p.hidden_up)
    finish = Finish(True, p.s1 + g, p.b1 + g, p.v1 + g, p.hidden_up, p.apart1, base + p.at_apart)
    separately(product_rows, (m, x, rows, w, features, Sums(at, ROW, False), finish, own + p.at_wide))
    if p.gated != 0:
        w = Panels(p.gate_w + g * p.groups4, p.gate_c + g, p.hidden_up)
        finish = Finish(True, p.gate_s + g, p.gate_b + g, p.gate_v + g, p.hidden_up, p.apart1, base + p.at_apart)
        separately(product_rows, (m, x, rows, w, features, Sums(at_gate, ROW, False), finish, own + p.at_wide))
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
    out, finish = Sums(base + p.at_sums + n, p.columns, g > 0), Finish(False, 0, 0, 0, 0, 0, 0)
    separately(product_rows, (m, x, rows, w, features, out, finish, own + p.at_wide))


@inline
def finish_dynamic_rows(m, p, a, base, r0, row, rows):
    """All that follows the sums of the rows at base, from r0 on, which are those from `row` on."""
    at = base + p.at_sums + r0 * p.columns
    finish = Finish(True, p.s2, p.b2, p.v2, p.columns, p.apart2, base + p.at_hidden_apart + r0 * COLUMNS_APART)
    separately(scale_rows, (m, at, p.columns, rows, p.columns, finish))
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
        finish_dynamic_rows(m, p, a, own, 0, row, rows)


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
    finish_dynamic_rows(memory_of(scratch, a.weights), p, a, 0, begin, begin, end - begin)


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
