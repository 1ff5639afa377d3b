"""Linear layers with int8 weights and inputs quantized at run time, and what follows them, block of rows by block.

What they compute is said in `linear_float32`.  Products are of bytes, as dynamic_rows.py says, where they get the same
bits in any batch and on any number of threads; all else is float32.
"""
from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import inline, jit, task
from edgeattn.runtime.worker_pool import parallel_for

from .activation import activate_rows
from .dynamic_products import Finish, Panels, Sums, add_second, product_rows
from .dynamic_rows import (
    BLOCK,
    ROWS_OF,
    codes_of_rows,
    memory_of,
    quantize_input,
)
from .norm import ADDRESSES, NO_NORM, finish_row
from .records import located, named, record
from .row_parts import FEW_ROWS, parts_of_rows, share_of
from .simd import WIDTH, address_of

LINEAR = record("rows width out_width out_up columns groups4 activation norm w c s b v j apart low lows at_norm",
                ROWS_OF, "at_wide at_row shared_size private_size")


@inline
def multiply_linear(m, p, base, own, rows, f, features):
    """The channels from f on of the rows at base, without the second ones."""
    w, out = Panels(p.w + f * p.groups4, p.c + f, p.columns), Sums(base + p.at_sums + f, p.columns, False)
    finish = Finish(True, p.s + f, p.b + f, p.v + f, p.columns, p.apart, base + p.at_apart)
    separately(product_rows, (m, codes_of_rows(p, base), rows, w, features, out, finish, own + p.at_wide))


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
