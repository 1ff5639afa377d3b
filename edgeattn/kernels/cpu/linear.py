"""A projection in float32 whose every row is computed alike, however many rows come at a time.

A library's matrix product sums in another order for one row than for many. Keys that are quantized to int8 must not
depend on that: with this projection a token gives the same bits alone and inside a chunk.
"""

import numpy as np

from edgeattn import threads
from edgeattn.runtime.jit import compiled_for, jit

from .matmul import CHAIN, multiply, pack_panels, round_up
from .simd import COLUMNS, LANES, ROWS, WIDTH, load, store, tile_add, tile_store, tile_zero

_run = None


@jit
def linear_float32(x, weights, depth, features, out):
    """out = x w^T + bias, panel of WIDTH features by panel.

    x (tokens, depth) flat; weights: panels (features / WIDTH, depth, WIDTH), then the bias (features,);
    out (tokens, features) flat; features a multiple of WIDTH.
    """
    tokens = out.size // features
    whole = tokens // ROWS * ROWS
    for f in range(0, features, WIDTH):
        for k in range(0, depth, CHAIN):
            at_weight, count = f * depth + k * WIDTH, min(CHAIN, depth - k)
            # whole tiles, then one token at a time: either way a sum is the same chains of multiply-adds
            for t in range(0, whole, ROWS):
                at = t * features + f
                tile = multiply(tile_zero(ROWS, COLUMNS, x), x, t * depth + k, depth, 1, weights, at_weight, count)
                if k > 0:
                    tile = tile_add(tile, out, at, features, LANES)
                tile_store(tile, out, at, features, LANES)
            for t in range(whole, tokens):
                at = t * features + f
                row = multiply(tile_zero(1, COLUMNS, x), x, t * depth + k, depth, 1, weights, at_weight, count)
                if k > 0:
                    row = tile_add(row, out, at, features, LANES)
                tile_store(row, out, at, features, LANES)
        # the bias last: carried along from the first product on, it would make every partial sum round more coarsely
        for t in range(tokens):
            for j in range(f, f + WIDTH, LANES):
                store(out, t * features + j, load(out, t * features + j) + load(weights, features * depth + j))


class Linear:
    """y = x weight^T + bias, packed.

    Parameters
    ----------
    weight : (outputs, inputs) float32 array
    bias : (outputs,) float32 array or None
    """

    def __init__(self, weight, bias):
        self.outputs, self.inputs = weight.shape
        features = round_up(self.outputs, WIDTH)
        padded = np.zeros((features, self.inputs + 1), np.float32)
        padded[: self.outputs, :-1] = weight
        if bias is not None:
            padded[: self.outputs, -1] = bias
        self._features = features
        self._weights = threads.aligned(padded.size, np.float32)
        self._weights[: -features or None] = pack_panels(padded[:, :-1])
        self._weights[self._weights.size - features :] = padded[:, -1]

    def __call__(self, x):
        """(tokens, inputs) float32 in C order -> (tokens, outputs) float32, a view of padded rows."""
        tokens = len(x)
        out = np.empty((tokens, self._features), np.float32)
        if not out.size:
            return out[:, : self.outputs]
        if not self.inputs:
            out[:] = self._weights  # the bias is all there is
            return out[:, : self.outputs]
        if (work := 2 * tokens * self.inputs * self._features) > threads.LONG_WORK:
            for first, last in threads.in_portions(tokens, work):
                self._multiply(x[first:last], out[first:last])
        else:
            self._multiply(x, out)
        return out[:, : self.outputs]

    def _multiply(self, x, out):
        global _run
        arguments = (x.reshape(-1), self._weights, self.inputs, self._features, out.reshape(-1))
        if _run is None:
            _run = compiled_for(linear_float32, arguments)
        _run(*arguments)
