"""Projections of the dynamic layer, each token quantized by its own range: float32 in and out.

The products are exact integers, so a token gives the same bits alone and inside a chunk. Inside a layer, `project_rows`
takes columns apart too. What encoders have beside attention, dynamic_rows.py, rounds in another order: its kernel is
not this one.
"""
import numpy as np

from edgeattn import threads
from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import NamedTuple, inline, jit
from edgeattn.runtime.plan_cache import shared_plans
from edgeattn.runtime.worker_pool import parallel_for, task

from .byte_products import TILES_SCRATCH, pack_byte_panels, row_product
from .call import PreparedCall
from .dynamic import COLUMNS_APART, STEP, TOKENS, depth_groups, quantize_rows
from .int8_operands import FLIP
from .int8_views import BytePanels, Groups, Part, Projection, scratch_at
from .matmul import round_up
from .one_row import product_of_row
from .portions import portions
from .records import blank, located, named, packed, record
from .simd import (
    ADDS_FIRST,
    LANES,
    ROWS,
    WIDTH,
    address_of,
    load,
    matrix_configure,
    matrix_release,
    outer_product,
    pointer_to,
    store,
    tile_dequantize,
    tile_store,
)
from .views import Rows
from .word_products import Words, row_product_of_words, split_row, terms_of, words_scratch

TILES_SIZE = TILES_SCRATCH + max(ROWS * WIDTH, 16)  # a block of the matrix unit, or its description; one tile
# `x` (rows, width) and `out` (rows, out_width) float32; weights int32: byte panels (features / WIDTH, depth4, WIDTH),
# then `terms_of` them; factors float32: scales (features,), then the bias (features,).
PROJECTION = record("rows width out_width private_size")
ADDRESSES = record("x out weights factors")


def join_depth(weight):
    """int8 weight (N, depth) -> (N, depth up to a multiple of STEP), in the order in which `join_bytes` joins x."""
    n, depth = weight.shape
    deep = np.ascontiguousarray(weight)
    if depth % STEP:
        deep = np.zeros((n, round_up(depth, STEP)), np.int8)
        deep[:, :depth] = weight
    words = deep.view(np.int32).reshape(n, deep.shape[1] // STEP, 4, LANES // 4).swapaxes(2, 3)
    return words.reshape(n, deep.shape[1] // 4).view(np.int8)


class Apart(NamedTuple):
    """Features of an input that stay float32: of each token COLUMNS_APART numbers, of each of them a row of weights."""

    count: int
    inputs: object
    at: int
    weights: object
    at_weights: int
    step: int


@task
def set_apart(x, width, tokens, columns, count, own, at_rest, at_apart):
    """`tokens` rows of x, a Part, to own.float32[at_rest:], but the features columns (count,), which go to at_apart.

    columns: Part of int32; of each token COLUMNS_APART numbers at at_apart.
    """
    whole = width // LANES * LANES
    for t in range(tokens):
        row, here = x.at + t * width, at_rest + t * width
        for e in range(0, whole, LANES):
            store(own.float32, here + e, load(x.data, row + e))
        for e in range(whole, width):
            own.float32[here + e] = x.data[row + e]
        for k in range(count):
            column = np.int64(columns.data[columns.at + k])
            own.float32[at_apart + t * COLUMNS_APART + k] = x.data[row + column]
            own.float32[here + column] = np.float32(0)


@inline
def _finish_rows(tile, rows, t, f, scales, projection, apart, tokens, features, out, own, at_edge):
    """Rows of out = scale tile factor + bias + x_J V_J: the tile's tokens from t, its features from f on.

    As far as there are any; J are the features that are apart.
    """
    whole = tile_dequantize(tile, scales.data, scales.at + t, projection.factors, projection.at_factors + f,
                            projection.at_bias + f)
    for k in range(apart.count):
        whole = outer_product(whole, apart.inputs, apart.at + t * COLUMNS_APART + k, COLUMNS_APART, apart.weights,
                              apart.at_weights + k * apart.step + f)
    to = out.at + t * out.step + f
    if t + rows <= tokens and f + WIDTH <= features:
        tile_store(whole, out.data, to, out.step, LANES)
        return
    tile_store(whole, own.float32, at_edge, WIDTH, LANES)
    for i in range(min(rows, tokens - t)):
        for j in range(min(WIDTH, features - f)):
            out.data[to + i * out.step + j] = own.float32[at_edge + i * WIDTH + j]


@task
def project_rows(x, tokens, scales, projection, apart, features, out, own, at_tiles):
    """Rows of out (tokens, features) = scale (x w^T + terms) factor + bias + x_J V_J; what is packed has whole panels.

    x           Part, uint32, rows of bytes plus OFFSET; where the matrix unit multiplies, a multiple of 16
    projection  of panels (features / WIDTH, depth4, WIDTH) of bytes; its bias among the factors
    apart       the features J of x that are not among the bytes, and their weights V
    own         Scratch, TILES_SIZE elements from at_tiles on, behind them words_scratch(TOKENS, depth4)
    """
    depth4, at_own = projection.depth4, at_tiles + TILES_SIZE
    panels = BytePanels(projection.weights, projection.at, projection.weights, projection.at_terms,
                        round_up(features, WIDTH), depth4)
    finish_with = scales, projection, apart, tokens, features, out, own, at_tiles + TILES_SCRATCH
    if ADDS_FIRST:
        if tokens == 1:
            product_of_row(_finish_rows, finish_with, Groups(x.data, x.at, depth4, 1), panels)
            return
        at_words = at_own + TOKENS
        for t in range(tokens):
            split_row(x.data, x.at + t * depth4, depth4, own.int32, at_words, t, at_own + t)
        words = Words(own.int32, at_words, depth4, at_words + 2 * TOKENS * depth4)
        row_product_of_words(_finish_rows, finish_with, words, at_own, tokens, panels, projection.own_step)
    else:
        row_product(_finish_rows, finish_with, Groups(x.data, x.at, depth4, 1), tokens, panels,
                    Part(own.int32, at_tiles))


@task
def project_part(p, a, scratch, portion, worker, part):
    """A portion of the rows, quantized and multiplied TOKENS at a time."""
    depth, depth4, features = p.width, depth_groups(p.width), round_up(p.out_width, WIDTH)
    at_tiles = TOKENS * depth4
    at_scales = at_tiles + TILES_SIZE + words_scratch(TOKENS, depth4)
    at_inverse, at_tail = at_scales + TOKENS, at_scales + 2 * TOKENS
    own = scratch_at(scratch + 4 * worker * p.private_size)
    x, out, factors = pointer_to(a.x, np.float32), pointer_to(a.out, np.float32), pointer_to(a.factors, np.float32)
    scales = Part(own.float32, at_scales)
    projection = Projection(pointer_to(a.weights, np.int32), 0, features * depth4, features, factors, 0, factors,
                            features, depth4)
    none = Apart(0, own.float32, 0, factors, 0, 0)
    matrix_configure(own.int32, at_tiles)
    end = min((part + 1) * portion, p.rows)
    for t in range(part * portion, end, TOKENS):
        some = min(TOKENS, end - t)
        quantize_rows(Part(x, t * depth), depth, some, TOKENS, FLIP, Part(own.int32, 0), scales, own, at_inverse,
                      at_tail)
        separately(project_rows, (Part(own.uint32, 0), some, scales, projection, none, p.out_width,
                                  Rows(out, t * p.out_width, p.out_width), own, at_tiles))
    matrix_release()


@jit
def projection_dynamic(parameters, addresses, scratch, task_queue, count):
    """out = quantized x times w^T, dequantized, + bias; on at most `count` threads that serve the task_queue.

    parameters PROJECTION, addresses ADDRESSES; scratch: 32-bit elements, `private_size` for each thread.
    """
    p, a = named(parameters, PROJECTION), located(addresses, ADDRESSES)
    portion, parts = portions(p.rows, TOKENS, count)
    parallel_for(task_queue, parts, project_part, p, a, address_of(scratch), portion)


class DynamicProjection:
    """y = x weight^T + bias, with int8 weights, packed.

    Parameters
    ----------
    codes : (outputs, inputs) int8 array
    scale : (outputs,) float32 array
        real weight = scale * code.
    bias : (outputs,) float32 array or None
    """

    def __init__(self, codes, scale, bias):
        self.outputs, self.inputs = codes.shape
        features = round_up(self.outputs, WIDTH)
        deep = np.zeros((features, self.inputs), np.int8)
        deep[: self.outputs] = codes
        joined = join_depth(deep)
        panels, terms = pack_byte_panels(joined), terms_of(joined)
        self._weights = threads.aligned(panels.size + terms.size, np.int32)
        self._weights[:] = np.concatenate((panels, terms))
        self._factors = threads.aligned(2 * features, np.float32)
        self._factors[:] = 0
        self._factors[: self.outputs] = scale
        if bias is not None:
            self._factors[features : features + self.outputs] = bias
        self._plans = shared_plans((DynamicProjection, self.inputs, self.outputs))

    def __call__(self, x):
        """(tokens, inputs) float32 in C order -> (tokens, outputs) float32."""
        rows = len(x)
        out = np.empty((rows, self.outputs), np.float32)
        if not (x.size and out.size):
            out[:] = self._factors[len(self._factors) // 2:][:self.outputs]  # the bias is all there is
            return out
        call = self._plans.get(rows) or self._plans.keep(rows, self._plan(rows))
        call.run_four(x, out, self._weights, self._factors)
        return out

    def _plan(self, rows):
        deep = round_up(self.inputs, STEP) // 4
        private = round_up(TOKENS * deep + TILES_SIZE + words_scratch(TOKENS, deep) + 2 * TOKENS + STEP, 16)
        p = blank(PROJECTION, rows=rows, width=self.inputs, out_width=self.outputs, private_size=private)
        return PreparedCall(projection_dynamic, packed(p, PROJECTION), ADDRESSES, np.int32, 0, private,
                            rows * self.inputs * self.outputs)
