"""A projection with int8 weights and every token quantized by its own range: float32 in and out.

The products are exact integers, so a token gives the same bits alone and inside a chunk.
"""

import numpy as np

from edgeattn import threads
from edgeattn.runtime.jit import compiled_for, inline, jit

from .dynamic import STEP, TOKENS, depth_groups, quantize_rows
from .matmul import MATRIX, MATRIX_SCRATCH, linear, pack_byte_panels, round_up
from .simd import (
    LANES,
    OFFSET,
    ROWS,
    WIDTH,
    broadcast,
    fma,
    load,
    matrix_configure,
    matrix_release,
    store,
    tile_dequantize,
    tile_store,
    to_float,
)

FLIP = np.int32(-2139062144) if OFFSET else np.int32(0)  # four bytes plus OFFSET
TILES_SIZE = MATRIX_SCRATCH + max(ROWS * WIDTH, 16)  # a block of the matrix unit, or its description; one tile

_run = None


def join_depth(weight):
    """int8 weight (N, depth) -> (N, depth up to a multiple of STEP), in the order in which `join_bytes` joins x."""
    n, depth = weight.shape
    out = np.zeros((n, round_up(depth, STEP)), np.int8)
    out[:, :depth] = weight
    return out.reshape(n, out.shape[1] // STEP, 4, LANES // 4, 4).swapaxes(2, 3).reshape(out.shape)


@inline
def finish_rows(tile, t, f, scales, at_scales, factors, at_factor, at_bias, tokens, features, out, at_out, out_row,
                scratch, scratch_f, at_tile):
    """Rows of out = scale tile factor + bias: the tile's tokens from t, its features from f on, as far as there are."""
    if t + ROWS <= tokens and f + WIDTH <= features:
        whole = tile_dequantize(tile, scales, at_scales + t, factors, at_factor + f, at_bias + f)
        tile_store(whole, out, at_out + t * out_row + f, out_row, LANES)
        return
    tile_store(tile, scratch, at_tile, WIDTH, LANES)
    for i in range(min(ROWS, tokens - t)):
        scale = broadcast(scales, at_scales + t + i)
        to = at_out + (t + i) * out_row + f
        for c in range(0, min(WIDTH, features - f), LANES):
            at = at_tile + i * WIDTH + c
            v = fma(to_float(load(scratch, at)) * load(factors, at_factor + f + c), scale,
                    load(factors, at_bias + f + c))
            if f + c + LANES <= features:
                store(out, to + c, v)
            else:
                store(scratch_f, at, v)
                for j in range(features - f - c):
                    out[to + c + j] = scratch_f[at + j]


@inline
def linear_rows(x, at_x, depth4, tokens, scales, at_scales, weights, at_weight, at_correction, factors, at_factor,
                at_bias, features, out, at_out, out_row, scratch, scratch_f, at_tiles):
    """out (tokens, features), rows out_row apart = scale (x w^T + correction) factor + bias.

    x        uint32, rows (depth4) of bytes plus OFFSET; as many as whole tiles have
    weights  panels (features / WIDTH, depth4, WIDTH) of bytes; factors: weight scales and biases
    scratch  TILES_SIZE elements
    """
    at_tile = at_tiles + MATRIX_SCRATCH
    linear(finish_rows, (scales, at_scales, factors, at_factor, at_bias, tokens, features, out, at_out, out_row,
                         scratch, scratch_f, at_tile),
           x, at_x, depth4, 1, tokens, weights, at_weight, weights, at_correction, round_up(features, WIDTH), depth4,
           scratch, at_tiles)


@jit
def linear_dynamic(x, weights, factors, depth, features, out, scratch):
    """out = quantized x times w^T, dequantized, + bias.

    x (tokens, depth) flat float32; weights int32: byte panels (features / WIDTH, depth4, WIDTH), then corrections
    (features,); factors float32: weight scales (features,), then the bias (features,); out flat, (tokens, features);
    scratch int32 of `scratch_size` elements.
    """
    depth4 = depth_groups(depth)
    tokens = x.size // depth
    at_tiles = TOKENS * depth4
    at_scales = at_tiles + TILES_SIZE
    at_inverse, at_tail = at_scales + TOKENS, at_scales + 2 * TOKENS
    scratch_u, scratch_f = scratch.view(np.uint32), scratch.view(np.float32)
    if MATRIX:
        matrix_configure(scratch, at_tiles)
    for t in range(0, tokens, TOKENS):
        some = min(TOKENS, tokens - t)
        quantize_rows(x, t * depth, depth, some, TOKENS, FLIP, scratch, 0, scratch_f, at_scales, scratch, scratch_f,
                      at_inverse, at_tail)
        linear_rows(scratch_u, 0, depth4, some, scratch_f, at_scales, weights, 0, features * depth4, factors, 0,
                    features, features, out, t * features, features, scratch, scratch_f, at_tiles)
    if MATRIX:
        matrix_release()


def scratch_size(depth):
    """Elements of scratch for rows of `depth` numbers."""
    return TOKENS * (round_up(depth, STEP) // 4) + TILES_SIZE + 2 * TOKENS + STEP


class DynamicLinear:
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
        self._features = features = round_up(self.outputs, WIDTH)
        deep = np.zeros((features, self.inputs), np.int8)
        deep[: self.outputs] = codes
        corrections = (-OFFSET * deep.astype(np.int32).sum(1)).astype(np.int32)
        panels = pack_byte_panels(join_depth(deep))
        self._weights = threads.aligned(panels.size + features, np.int32)
        self._weights[:] = np.concatenate((panels, corrections))
        self._factors = threads.aligned(2 * features, np.float32)
        self._factors[:] = 0
        self._factors[: self.outputs] = scale
        if bias is not None:
            self._factors[features : features + self.outputs] = bias
        self._scratch_size = scratch_size(self.inputs)

    def __call__(self, x):
        """(tokens, inputs) float32 in C order -> (tokens, outputs) float32, a view of padded rows."""
        out = np.empty((len(x), self._features), np.float32)
        if x.size and out.size:
            if (work := len(x) * self.inputs * self._features) > threads.LONG_WORK:
                for first, last in threads.in_portions(len(x), work):
                    self._multiply(x[first:last], out[first:last])
            else:
                self._multiply(x, out)
        else:
            out[:] = self._factors[self._features :]  # the bias is all there is
        return out[:, : self.outputs]

    def _multiply(self, x, out):
        global _run
        arguments = (x.reshape(-1), self._weights, self._factors, self.inputs, self._features, out.reshape(-1),
                     np.empty(self._scratch_size, np.int32))
        if _run is None:
            _run = compiled_for(linear_dynamic, arguments)
        _run(*arguments)
