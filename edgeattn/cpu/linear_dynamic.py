"""A projection with int8 weights and every token quantized by its own range: float32 in and out.

The products are exact integers, so a token gives the same bits alone and inside a chunk.
"""

import numpy as np

from edgeattn import threads
from edgeattn.jit import entry, jit

from .fused_dynamic import TOKENS, add_bias, project, quantize_tokens
from .matmul import MATRIX, MATRIX_TOKENS, pack_byte_panels, round_up
from .simd import OFFSET, ROWS, WIDTH, matrix_configure, matrix_release

_run = None


@jit
def linear_dynamic(x, weights, factors, depth, features, out, scratch):
    """out = quantized x times w^T, dequantized, + bias.

    x (tokens, depth) flat float32; weights int32: byte panels (features / WIDTH, depth / 4, WIDTH), then corrections
    (features,); factors float32: weight scales (features,), then the bias (features,); out flat, (tokens rounded up to
    ROWS, features); scratch int32 of `scratch_size` elements.
    """
    depth4 = (depth + 3) // 4
    tokens = x.size // depth
    at_scales = TOKENS * depth4 + WIDTH
    at_tiles = at_scales + TOKENS + WIDTH
    as_bytes, as_unsigned, as_floats = scratch.view(np.int8), scratch.view(np.uint32), scratch.view(np.float32)
    if MATRIX:
        matrix_configure(scratch, at_tiles)
    for t in range(0, tokens, TOKENS):
        some = min(TOKENS, tokens - t)
        rows = (some + ROWS - 1) // ROWS * ROWS
        quantize_tokens(x, t * depth, depth, some, rows, as_bytes, 0, as_floats, at_scales)
        project(as_unsigned, depth4, as_floats, at_scales, rows, weights, 0, features * depth4, factors, 0, features,
                out, t * features, scratch, at_tiles)
        add_bias(out, t * features, rows, features, factors, features)
    if MATRIX:
        matrix_release()


def scratch_size(depth):
    """Elements of scratch for rows of `depth` numbers."""
    return TOKENS * (round_up(depth, 4) // 4) + TOKENS + 2 * WIDTH + MATRIX_TOKENS * WIDTH


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
        deep = np.zeros((features, round_up(self.inputs, 4)), np.int8)
        deep[: self.outputs, : self.inputs] = codes
        corrections = (-OFFSET * deep.astype(np.int32).sum(1)).astype(np.int32)
        self._weights = threads.aligned(deep.size // 4 + features, np.int32)
        self._weights[:] = np.concatenate((pack_byte_panels(deep), corrections))
        self._factors = threads.aligned(2 * features, np.float32)
        self._factors[:] = 0
        self._factors[: self.outputs] = scale
        if bias is not None:
            self._factors[features : features + self.outputs] = bias
        self._scratch_size = scratch_size(self.inputs)

    def __call__(self, x):
        """(tokens, inputs) float32 in C order -> (tokens, outputs) float32, a view of padded rows."""
        global _run
        out = np.empty((round_up(len(x), ROWS), self._features), np.float32)
        if x.size and out.size:
            arguments = (x.reshape(-1), self._weights, self._factors, self.inputs, self._features, out.reshape(-1),
                         np.empty(self._scratch_size, np.int32))
            if _run is None:
                _run = entry(linear_dynamic, arguments)
            _run(*arguments)
        else:
            out[:] = self._factors[self._features :]  # the bias is all there is
        return out[: len(x), : self.outputs]
