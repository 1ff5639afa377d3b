"""Feed-forwards in float32, with what is around them, block of rows by block of rows.

    h = activation(y w1^T + b1) * (gate(y) where there is one), y = x or norm(x)
    out = norm(h w2^T + b2 + residual)

With a gate the activation is the gate's: h = activation(y g^T + bg) * (y w1^T + b1).  Tokens are the rows of tiles; of
the hidden features `at_once` are in scratch.  A sum is CHAIN products at a time, the bias comes last: a row gives the
same bits alone and among others, on one thread and on several.
"""
import numpy as np

from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import inline, jit, task
from edgeattn.runtime.worker_pool import parallel_for

from .activation import activate_rows, multiply_rows
from .norm import ADDRESSES, AT_ONCE, NO_NORM, finish_rows, normalize_rows, read_row
from .records import located, named, record
from .row_parts import BLOCK, FEW_ROWS, parts_of_rows, share_of
from .row_products import CHAIN, NO_BIAS, Weights, product_rows
from .simd import WIDTH, address_of, pointer_to
from .views import Blocks, Rows

HIDDEN = 256  # hidden features in scratch at a time, a multiple of CHAIN; all of rows of one tile: weights stream by
APART = 16  # more between their rows: a power of two would have all rows in a few sets of the cache
NEAR = 2048  # of them, so many are made and activated while they are near
# Positions are in elements of 32 bits: of weights, biases and norms in the weights, others in the scratch; `width_up`,
# `hidden_up` and `out_up` are whole numbers of vectors of 32 lanes.
FEED_FORWARD = record("rows width hidden out_width width_up hidden_up out_up activation gated norm_first norm_last",
                      "w1 b1 gate_w gate_b w2 b2 at_first at_last",
                      "at_once at_rows at_hidden at_sums shared_size own_rows own_hidden own_sums own_gate",
                      "private_size")


@inline
def norm_rows(p, a, row, rows, s, at, at_means):
    """Rows of x, the first of which is `row`, in scratch, and their norm; at_means: see normalize_rows."""
    x, w = pointer_to(a.x, np.float32), pointer_to(a.weights, np.float32)
    for r in range(0, rows, AT_ONCE):
        begin, some = at + r * p.width_up, min(AT_ONCE, rows - r)
        for i in range(some):
            read_row(x, (row + r + i) * p.width, p.width, s, begin + i * p.width_up)
        separately(normalize_rows, (s, begin, p.width_up, some, p.width, p.norm_first, w, p.at_first, at_means))


@inline
def raise_rows(p, x, rows, w, hidden, at_gate, begin, features):
    """The hidden features begin .. begin + `features`, a multiple of WIDTH, of some rows; x, hidden: Rows."""
    E, s, near, gate_step = p.width, hidden.data, max(NEAR // rows // WIDTH * WIDTH, WIDTH), p.at_once + APART
    for f in range(0, features, near):
        some, g, at = min(near, features - f), begin + f, hidden.at + f
        separately(product_rows, (False, x, rows, Weights(w, p.w1 + g * E, E * WIDTH, E, CHAIN, p.b1 + g), some,
                                  Blocks(s, at, hidden.step, 0)))
        if p.gated == 0:
            separately(activate_rows, (p.activation, False, s, at, hidden.step, rows, some))
        else:
            separately(product_rows, (False, x, rows, Weights(w, p.gate_w + g * E, E * WIDTH, E, CHAIN, p.gate_b + g),
                                      some, Blocks(s, at_gate + f, gate_step, 0)))
            separately(activate_rows, (p.activation, False, s, at_gate + f, gate_step, rows, some))
            multiply_rows(s, at_gate + f, gate_step, s, at, hidden.step, rows, some)


@inline
def lower_rows(p, rows, w, hidden, g, at_sums, n, features):
    """Add to the sums, features from n on, what `at_once` hidden features from g on contribute; hidden: Rows.

    The last of them bring the bias.
    """
    depth = min(p.at_once, p.hidden - g)
    at_bias = p.b2 + n if g + p.at_once >= p.hidden else np.int64(NO_BIAS)
    weights = Weights(w, p.w2 + n * p.hidden + g * WIDTH, p.hidden * WIDTH, depth, CHAIN, at_bias)
    separately(product_rows, (g > 0, hidden, rows, weights, features,
                              Blocks(hidden.data, at_sums + n, p.out_up, 0)))


@task
def feed_rows_forward(p, a, scratch, portion, worker, part):
    """All of a portion of the rows."""
    x, w, s = pointer_to(a.x, np.float32), pointer_to(a.weights, np.float32), pointer_to(scratch, np.float32)
    own = p.shared_size + worker * p.private_size
    at_hidden, at_sums, end = own + p.own_hidden, own + p.own_sums, min((part + 1) * portion, p.rows)
    for row in range(part * portion, end, BLOCK):
        rows = min(BLOCK, end - row)
        y = Rows(x, row * p.width, p.width)
        if p.norm_first != NO_NORM:
            norm_rows(p, a, row, rows, s, own + p.own_rows, at_hidden)
            y = Rows(s, own + p.own_rows, p.width_up)
        hidden = Rows(s, at_hidden, p.at_once + APART)
        for g in range(0, p.hidden, p.at_once):
            raise_rows(p, y, rows, w, hidden, own + p.own_gate, g, min(p.at_once, p.hidden_up - g))
            lower_rows(p, rows, w, hidden, g, at_sums, 0, p.out_up)
        separately(finish_rows, (s, at_sums, p.out_up, rows, p.out_width, a.residual, row, p.norm_last, w, p.at_last,
                                 at_hidden, a.out))


@task
def norm_some(p, a, scratch, parts, worker, part):
    """The norm of some rows, where few rows are all done together."""
    begin, end = share_of(p.rows, 1, parts, part)
    norm_rows(p, a, begin, end - begin, pointer_to(scratch, np.float32), p.at_rows + begin * p.width_up,
              p.shared_size + worker * p.private_size + p.own_hidden)


@task
def raise_some(p, a, scratch, parts, worker, part):
    """Some hidden features of all rows."""
    w, s = pointer_to(a.weights, np.float32), pointer_to(scratch, np.float32)
    y = Rows(pointer_to(a.x, np.float32), 0, p.width)
    if p.norm_first != NO_NORM:
        y = Rows(s, p.at_rows, p.width_up)
    begin, end = share_of(p.hidden_up, WIDTH, parts, part)
    for g in range(begin, end, p.at_once):
        raise_rows(p, y, p.rows, w, Rows(s, p.at_hidden + g, p.hidden_up),
                   p.shared_size + worker * p.private_size + p.own_gate, g, min(p.at_once, end - g))


@task
def lower_some(p, a, scratch, parts, worker, part):
    """The sums of all rows for some output features."""
    w, s = pointer_to(a.weights, np.float32), pointer_to(scratch, np.float32)
    begin, end = share_of(p.out_up, WIDTH, parts, part)
    for g in range(0, p.hidden, p.at_once):
        lower_rows(p, p.rows, w, Rows(s, p.at_hidden + g, p.hidden_up), g, p.at_sums, begin, end - begin)


@task
def finish_some(p, a, scratch, parts, worker, part):
    """All that follows the sums of some rows."""
    w, s = pointer_to(a.weights, np.float32), pointer_to(scratch, np.float32)
    begin, end = share_of(p.rows, 1, parts, part)
    separately(finish_rows, (s, p.at_sums + begin * p.out_up, p.out_up, end - begin, p.out_width, a.residual, begin,
                             p.norm_last, w, p.at_last, p.shared_size + worker * p.private_size + p.own_hidden, a.out))


@jit
def feed_forward_float32(parameters, addresses, scratch, task_queue, count):
    """A feed-forward and what is around it, see above, on at most `count` threads that serve the task_queue.

    parameters FEED_FORWARD, addresses ADDRESSES; scratch: 32-bit elements, `shared_size` for all threads and then
    `private_size` for each.
    """
    p, a, s = named(parameters, FEED_FORWARD), located(addresses, ADDRESSES), address_of(scratch)
    if count > 1 and p.rows <= FEW_ROWS:
        if p.norm_first != NO_NORM:
            parallel_for(task_queue, count, norm_some, p, a, s, count)
        parallel_for(task_queue, count, raise_some, p, a, s, count)
        parallel_for(task_queue, count, lower_some, p, a, s, count)
        parallel_for(task_queue, count, finish_some, p, a, s, count)
    else:
        portion, parts = parts_of_rows(p.rows, BLOCK, count)
        parallel_for(task_queue, parts, feed_rows_forward, p, a, s, portion)
