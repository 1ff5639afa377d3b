"""A linear map with int8 weights, whose inputs are quantized token by token at run time."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import as_array, is_constant
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
    residual_outputs : (n,) int array, optional
        The outputs that the last n rows are added to: these have a second, finer code for each weight.
    outlier_columns : (m,) int array, optional
        Inputs whose products are float32, at most 4: those much larger than the others. Their codes are 0.
    outlier_weight : (F, m) float array, optional
        The weights of `outlier_columns`.

    Attributes
    ----------
    inputs, outputs : int
        E, F.
    """

    def __init__(self, codes: ArrayLike, scale: ArrayLike, bias: ArrayLike | None = None, *,
                 residual_outputs: ArrayLike | None = None, outlier_columns: ArrayLike | None = None,
                 outlier_weight: ArrayLike | None = None):
        self.codes = _integers("codes", codes, np.int8, 2)
        rows, self.inputs = self.codes.shape
        self.residual_outputs = indices("residual_outputs", residual_outputs, rows)
        self.outputs = rows - len(self.residual_outputs)
        self.outlier_columns = indices("outlier_columns", outlier_columns, self.inputs, once=True)
        self.scale = parameter("scale", scale, "(rows,)")
        self.bias = None if bias is None else parameter("bias", bias, "(outputs,)")
        outliers = self.outputs, len(self.outlier_columns)
        self.outlier_weight = parameter(
            "outlier_weight", np.zeros((self.outputs, 0)) if outlier_weight is None else outlier_weight,
            "(outputs, outlier_columns)")
        for name, array, shape in (("scale", self.scale, (rows,)), ("bias", self.bias, (self.outputs,)),
                                   ("outlier_weight", self.outlier_weight, outliers)):
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} must have shape {shape} with codes {self.codes.shape}, got {array.shape}")
        if outliers[1] > encoder_dynamic.MOST_OUTLIERS:
            raise ValueError(f"outlier_columns must be at most {encoder_dynamic.MOST_OUTLIERS} inputs, got "
                             f"{self.outlier_columns}")
        if (self.residual_outputs >= self.outputs).any():
            raise ValueError(f"residual_outputs must lie between 0 and {self.outputs - 1}, got {self.residual_outputs}")
        if (self.codes == -128).any() or not (np.isfinite(self.scale) & (self.scale > 0)).all():
            raise ValueError("codes must lie in [-127, 127], and scale be positive and finite")

    @classmethod
    def quantized_from(cls, linear: Linear, *, outlier_columns: Sequence[int] = (), split: float | None = None) -> Self:
        """The nearest of a float layer.

        Parameters
        ----------
        linear : Linear
        outlier_columns : sequence of int
            Inputs that stay float32, at most 4.
        split : float, optional
            Outputs whose largest weight is over `split` times the median get a second code for each weight.
        """
        for name, array in (("weight", linear.weight), ("bias", linear.bias)):
            if array is not None and not np.isfinite(array).all():
                raise ValueError(f"linear must have a finite {name}, got NaN or infinity")
        made = encoder_dynamic.quantize_linear(linear.weight, columns=outlier_columns, split=split)
        return cls(made.codes, made.scale, linear.bias, residual_outputs=made.residual_outputs,
                   outlier_columns=made.outlier_columns, outlier_weight=made.outlier_weight)

    @property
    def quantized(self) -> encoder_dynamic.QuantizedWeight:
        """The bytes, as kernels pack them."""
        return encoder_dynamic.QuantizedWeight(
            self.codes, self.scale, self.residual_outputs, self.outlier_columns, self.outlier_weight)

    @functools.cached_property
    def packed(self) -> Callable[[Float32s], Float32s]:
        """The compiled map of (tokens, E) to (tokens, F), each row computed alike however many come at a time."""
        kernel = encoder_dynamic.Linear(self.quantized, self.bias)
        return lambda x: kernel(x, None, np.empty((len(x), self.outputs), np.float32))

    def __repr__(self) -> str:
        return f"DynamicLinear(inputs={self.inputs}, outputs={self.outputs}, bias={self.bias is not None})"

    def __reduce__(self) -> tuple[Any, ...]:
        options: dict[str, Any] = {"residual_outputs": self.residual_outputs,
                                   "outlier_columns": self.outlier_columns, "outlier_weight": self.outlier_weight}
        return functools.partial(type(self), **options), (self.codes, self.scale, self.bias)


def _integers(name: str, value: ArrayLike, dtype: DTypeLike, axes: int) -> NDArray[Any]:
    """An owned, read-only copy in C order; what is constant is kept."""
    array = as_array(name, value)
    if array.dtype.kind not in "iu" or array.ndim != axes or (dtype is np.int8 and array.dtype != np.int8):
        raise TypeError(f"{name} must be {np.dtype(dtype)} with {axes} axes, got {array.dtype} of shape {array.shape}")
    if array.dtype != dtype or not is_constant(array):
        array = np.array(array, dtype, order="C")
        array.flags.writeable = False
    return array


def indices(name: str, value: ArrayLike | None, size: int, *, once: bool = False) -> NDArray[np.int64]:
    """`value` as a row of indices below `size`, each once or not; none for None."""
    indices = _integers(name, np.zeros(0, np.int64) if value is None else value, np.int64, 1)
    if not ((indices >= 0) & (indices < size)).all():
        raise ValueError(f"{name} must lie between 0 and {size - 1}, got {indices}")
    if once and len(np.unique(indices)) < len(indices):
        raise ValueError(f"{name} must name each once, got {indices}")
    return indices
