"""Layers that take each token by itself, as functions of arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import check_out, float_array, result_dtype, to_float32, write_result
from edgeattn.layers.state import Stored

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from edgeattn.ops import Ops, T
    from edgeattn.types import Float32s, Floats


class TokenWise(Stored):
    """A layer whose `forward` maps rows of `inputs` features to rows of `outputs`."""

    inputs: int
    outputs: int

    if TYPE_CHECKING:
        def forward(self, ops: Ops[T], x: T, name: str = "") -> T: ...  # noqa: D102

    def __call__(self, x: ArrayLike, *, out: Floats | None = None) -> Floats:
        """The layer of `x`.

        Parameters
        ----------
        x : (..., E) float16, float32 or float64 array
            Computed in float32.
        out : array, optional
            Takes the result; of the result's dtype.

        Returns
        -------
        (..., features) array
            Of the dtype of `x`.
        """
        x = float_array("x", x)
        if x.ndim < 1 or x.shape[-1] != self.inputs:
            raise ValueError(f"x must have a last axis of {self.inputs}, the layer's inputs, got shape {x.shape}")
        shape, dtype = (*x.shape[:-1], self.outputs), result_dtype(x)
        check_out(out, shape, dtype)
        rows = self.computed(np.ascontiguousarray(to_float32(x)).reshape(math.prod(x.shape[:-1]), self.inputs))
        return write_result(rows.reshape(shape), out, dtype)

    def computed(self, rows: Float32s) -> Float32s:
        """(tokens, inputs) -> (tokens, outputs), by compiled kernels."""
        from edgeattn.executors.compiled import CompiledOps

        return self.forward(CompiledOps(), rows)
