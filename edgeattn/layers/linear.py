"""A linear map of the features."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import float_array, is_constant, to_float32
from edgeattn.layers.module import TokenWise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from numpy.typing import ArrayLike

    from edgeattn.ops import Ops, T
    from edgeattn.types import Float32s


class Linear(TokenWise):
    """y = x weight^T + bias.

    Parameters
    ----------
    weight : (F, E) float array
        (outputs, inputs), as in torch.nn.Linear; copied to float32.
    bias : (F,) float array, optional

    Attributes
    ----------
    weight : (F, E) float32 array
        Read-only, in C order; `bias` likewise, or None.
    inputs, outputs : int
        E, F.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    def __init__(self, weight: ArrayLike, bias: ArrayLike | None = None):
        self.weight = parameter("weight", weight, "(outputs, inputs)")
        self.outputs, self.inputs = self.weight.shape
        self.bias = None if bias is None else parameter("bias", bias, "(outputs,)")
        if self.bias is not None and self.bias.shape != (self.outputs,):
            raise ValueError(f"bias must have shape {(self.outputs,)}, one per row of weight {self.weight.shape}, got "
                             f"{self.bias.shape}")

    def forward(self, ops: Ops[T], x: T, name: str = "") -> T:
        """(tokens, E) -> (tokens, F)."""
        return ops.linear(x, self, name)

    quantized: Any = None  # a layer whose weight is bytes has them here

    @functools.cached_property
    def packed(self) -> Callable[[Float32s], Float32s]:
        """The compiled map of (tokens, E) to (tokens, F), each row computed alike however many come at a time."""
        from edgeattn.kernels.cpu.encoder_float32 import Linear as Packed

        of: Callable[[Float32s], Float32s] = Packed(self.weight, self.bias).of
        return of

    def __repr__(self) -> str:
        return f"Linear(inputs={self.inputs}, outputs={self.outputs}, bias={self.bias is not None})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.weight, self.bias)


def joined(linears: Sequence[Linear]) -> Callable[[Float32s], Float32s]:
    """Compiled maps of one input, (tokens, E), as one to (tokens, F of them all), the same bits side by side.

    Where their outputs fill whole vectors, each has its weights there from now on, rather than in memory of its own.
    """
    from edgeattn.kernels.cpu.encoder_float32 import Linear as Packed
    from edgeattn.kernels.cpu.simd.wide import VIRTUAL_LANES

    biases = [np.zeros(linear.outputs, np.float32) if linear.bias is None else linear.bias for linear in linears]
    whole = Packed(np.concatenate([linear.weight for linear in linears]), np.concatenate(biases))
    first = 0
    for linear in linears:
        if first % VIRTUAL_LANES:
            break
        linear.packed = whole.part(first, linear.outputs).of
        first += linear.outputs
    of: Callable[[Float32s], Float32s] = whole.of
    return of


def check_linear(name: str, linear: object, *, optional: bool = False) -> None:
    """Raise unless `linear` is a Linear, or None where that may be."""
    if not isinstance(linear, Linear) and not (optional and linear is None):
        raise TypeError(f"{name} must be an edgeattn.Linear, got {type(linear).__name__}")


def parameter(name: str, value: ArrayLike, axes: str) -> Float32s:
    """An owned, read-only float32 copy of a weight with as many axes as `axes` names; what is one already is kept."""
    array = float_array(name, value)
    if array.ndim != axes.count(",") + (not axes.endswith(",)")):
        raise ValueError(f"{name} must be {axes}, got shape {array.shape}")
    kept = is_constant(array) or not array.flags.writeable and array.flags.owndata and array.flags.c_contiguous
    if array.dtype != np.float32 or not kept:
        array = np.array(to_float32(array))
        array.flags.writeable = False
    return array
