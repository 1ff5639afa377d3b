"""Layers computed in float32 with our kernels where there are any, and NumPy elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeattn.checks import to_float32
from edgeattn.executors.numpy import NumpyOps

if TYPE_CHECKING:
    from edgeattn.layers.linear import Linear
    from edgeattn.types import Float32s


class CompiledOps(NumpyOps):
    """`NumpyOps` whose products are compiled: a token gives the same bits alone and in any batch."""

    def linear(self, x: Float32s, linear: Linear, name: str) -> Float32s:
        """x weight^T + bias."""
        return self._keep(name, linear.packed(to_float32(x)))
