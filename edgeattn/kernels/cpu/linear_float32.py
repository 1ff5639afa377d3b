"""Linear layers in float32, with what follows them, block of rows by block of rows.

    out = norm(activation(x w^T + b) + residual)

Tokens are the rows of tiles.  A sum is CHAIN products at a time, the bias comes last: a row gives the same bits
alone and among others, on one thread and on several.
"""
import numpy as np

from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import inline, jit, task
from edgeattn.runtime.worker_pool import parallel_for

from .activation import activate_rows, add_to_rows
from .matmul import round_up
from .norm import ADDRESSES, finish_row
from .records import located, named, record
from .row_parts import BLOCK, FEW_ROWS, parts_of_rows
from .row_products import CHAIN, NO_BIAS, Weights, product_rows
from .simd import WIDTH, address_of, pointer_to
from .views import Blocks, Rows

# Positions are in elements of 32 bits: of weights, biases and norms in the weights, others in the scratch; `hidden_up`
# and `out_up` are whole numbers of vectors of 32 lanes.
LINEAR = record("rows width out_width out_up activation norm w b at_norm private_size")


@inline
def finish_linear(p, a, s, at, row, rows):
    """Bias, activation, residual and norm of the sums of some rows, the first of which is `row`."""
    w = pointer_to(a.weights, np.float32)
    add_to_rows(w, p.b, s, at, p.out_up, rows, p.out_up)
    separately(activate_rows, (p.activation, False, s, at, p.out_up, rows, p.out_up))
    for r in range(rows):
        separately(finish_row, (s, at + r * p.out_up, p.out_width, a.residual, row + r, p.norm, w, p.at_norm, a.out))


@task
def linear_of_rows(p, a, scratch, portion, worker, part):
    """All of a portion of the rows."""
    x, w, s = pointer_to(a.x, np.float32), pointer_to(a.weights, np.float32), pointer_to(scratch, np.float32)
    E, at, end = p.width, worker * p.private_size, min((part + 1) * portion, p.rows)
    for row in range(part * portion, end, BLOCK):
        rows = min(BLOCK, end - row)
        separately(product_rows, (False, Rows(x, row * E, E), rows, Weights(w, p.w, E * WIDTH, E, CHAIN, NO_BIAS),
                                  p.out_up, Blocks(s, at, p.out_up, 0)))
        finish_linear(p, a, s, at, row, rows)


@task
def multiply_features(p, a, scratch, portion, worker, part):
    """The sums of all rows for a portion of the features, at the start of the scratch."""
    x, w, s = pointer_to(a.x, np.float32), pointer_to(a.weights, np.float32), pointer_to(scratch, np.float32)
    E, f = p.width, part * portion
    separately(product_rows, (False, Rows(x, 0, E), p.rows, Weights(w, p.w + f * E, E * WIDTH, E, CHAIN, NO_BIAS),
                              min(portion, p.out_up - f), Blocks(s, f, p.out_up, 0)))


@jit
def linear_float32(parameters, addresses, scratch, task_queue, count):
    """A linear layer and what follows it, see above, on at most `count` threads that serve the task_queue.

    parameters LINEAR, addresses ADDRESSES; scratch: 32-bit elements, `private_size` for each thread.
    """
    p, a, s = named(parameters, LINEAR), located(addresses, ADDRESSES), address_of(scratch)
    if count > 1 and p.rows <= FEW_ROWS:
        portion = round_up((p.out_up + count - 1) // count, WIDTH)
        parallel_for(task_queue, (p.out_up + portion - 1) // portion, multiply_features, p, a, s, portion)
        finish_linear(p, a, pointer_to(s, np.float32), 0, 0, p.rows)
    else:
        portion, parts = parts_of_rows(p.rows, BLOCK, count)
        parallel_for(task_queue, parts, linear_of_rows, p, a, s, portion)
