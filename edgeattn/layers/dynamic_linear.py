"""A linear map with int8 weights, whose inputs are quantized token by token at run time."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import as_array
from edgeattn.kernels.cpu import encoder_dynamic
from edgeattn.layers.linear import Linear, parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from numpy.typing import ArrayLike, DTypeLike, NDArray
    from typing_extensions import Self

    from edgeattn.types import Float32s


class DynamicLinear(Linear):
    """y = x weight^T + bias with weight = codes * scale: int8 products, of inputs with a scale for each token.

    Parameters
    ----------
    codes : (F + n, E) int8 array
        Within [-127, 127].
    scale : (F + n,) float array
        Of each row of codes.
    bias : (F,) float array, optional
    low : (n,) int array, optional
        The outputs that the last n rows are added to: these have a second, finer code for each weight.
    columns : (m,) int array, optional
        Inputs whose products are float32, at most 4: those much larger than the others. Their codes are 0.
    apart : (F, m) float array, optional
        The weights of `columns`.

    Attributes
    ----------
    inputs, outputs : int
        E, F.
    """

    def __init__(self, codes: ArrayLike, scale: ArrayLike, bias: ArrayLike | None = None, *,
                 low: ArrayLike | None = None, columns: ArrayLike | None = None, apart: ArrayLike | None = None):
        self.codes = _integers("codes", codes, np.int8, 2)
        self.scale = parameter("scale", scale, "(outputs,)")
        self.low = None if low is None else _integers("low", low, np.int64, 1)
        self.columns = None if columns is None else _integers("columns", columns, np.int64, 1)
        rows, self.inputs = self.codes.shape
        self.outputs = rows - (0 if self.low is None else len(self.low))
        self.apart = None if apart is None else parameter("apart", apart, "(outputs, columns)")
        self.bias = None if bias is None else parameter("bias", bias, "(outputs,)")
        few = 0 if self.columns is None else len(self.columns)
        for name, array, shape in (("scale", self.scale, (rows,)), ("bias", self.bias, (self.outputs,)),
                                   ("apart", self.apart, (self.outputs, few))):
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} must have shape {shape} with codes {self.codes.shape}, got {array.shape}")
        if (self.columns is None) != (self.apart is None) or few > encoder_dynamic.COLUMNS_APART:
            raise ValueError(f"columns must be at most {encoder_dynamic.COLUMNS_APART} inputs, with apart, their "
                             f"weights, got {self.columns}")
        for name, indices, size in (("low", self.low, self.outputs), ("columns", self.columns, self.inputs)):
            if indices is not None and not ((indices >= 0) & (indices < size)).all():
                raise ValueError(f"{name} must lie between 0 and {size - 1}, got {indices}")
        if (self.codes == -128).any() or not (np.isfinite(self.scale) & (self.scale > 0)).all():
            raise ValueError("codes must lie in [-127, 127], and scale be positive and finite")

    @classmethod
    def quantized_from(cls, linear: Linear, *, columns: Sequence[int] = (), split: float | None = None) -> Self:
        """The nearest of a float layer.

        Parameters
        ----------
        linear : Linear
        columns : sequence of int
            Inputs that stay float32, at most 4.
        split : float, optional
            Outputs whose largest weight is over `split` times the median get a second code for each weight.
        """
        for name, array in (("weight", linear.weight), ("bias", linear.bias)):
            if array is not None and not np.isfinite(array).all():
                raise ValueError(f"linear must have a finite {name}, got NaN or infinity")
        made = encoder_dynamic.quantize_linear(linear.weight, columns=columns, split=split)
        some = {"low": made.low} if len(made.low) else {}
        some |= {"columns": made.columns, "apart": made.apart} if len(made.columns) else {}
        return cls(made.codes, made.scale, linear.bias, **some)

    @property
    def quantized(self) -> encoder_dynamic.QuantizedLinear:
        """The bytes, as kernels pack them."""
        none = np.zeros(0, np.int64)
        return encoder_dynamic.QuantizedLinear(
            self.codes, self.scale, none if self.low is None else self.low,
            none if self.columns is None else self.columns,
            np.zeros((self.outputs, 0), np.float32) if self.apart is None else self.apart)

    @functools.cached_property
    def packed(self) -> Callable[[Float32s], Float32s]:
        """The compiled map of (tokens, E) to (tokens, F), each row computed alike however many come at a time."""
        kernel = encoder_dynamic.Linear(self.quantized, self.bias)
        return lambda x: kernel(x, None, np.empty((len(x), self.outputs), np.float32))

    def __repr__(self) -> str:
        return f"DynamicLinear(inputs={self.inputs}, outputs={self.outputs}, bias={self.bias is not None})"

    def __reduce__(self) -> tuple[Any, ...]:
        options: dict[str, Any] = {"low": self.low, "columns": self.columns, "apart": self.apart}
        return functools.partial(type(self), **options), (self.codes, self.scale, self.bias)


def _integers(name: str, value: ArrayLike, dtype: DTypeLike, axes: int) -> NDArray[Any]:
    """An owned, read-only copy in C order."""
    array = as_array(name, value)
    if array.dtype.kind not in "iu" or array.ndim != axes or (dtype is np.int8 and array.dtype != np.int8):
        raise TypeError(f"{name} must be {np.dtype(dtype)} with {axes} axes, got {array.dtype} of shape {array.shape}")
    array = np.array(array, dtype, order="C")
    array.flags.writeable = False
    return array
