"""What int8 codes stand for: the quantization of a tensor, and of a fully connected layer."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np

from edgeattn import arithmetic as rules
from edgeattn.arithmetic import CODE_MAX, CODE_MIN
from edgeattn.checks import as_array, is_constant, number
from edgeattn.quantized.values import Frozen, Value

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, SupportsIndex

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from edgeattn.types import Codes, Float32s, Real

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-60, 2.0**60
LARGEST_SCORE_SCALE = 2.0**121  # 255 codes reach float32's lowest number, which converters write as a mask


class TensorQuantization(Value):
    """Per-tensor int8 quantization: ``real = scale * (code - zero_point)``.

    Parameters
    ----------
    scale : float
        In [2**-60, 2**121], kept as float32. Layers take those above 2**60 for scores alone: up to there products and
        quotients of two scales are normal float32 numbers.
    zero_point : int
        In [-128, 127].
    """

    scale: np.float32
    zero_point: int

    def __init__(self, scale: Real, zero_point: SupportsIndex):
        self.set_fields(scale=_scale(scale, "scale"), zero_point=operator.index(zero_point))
        if not CODE_MIN <= self.zero_point <= CODE_MAX:
            raise ValueError(f"zero_point must lie in [-128, 127]; got {self.zero_point}")

    @classmethod
    def over(cls, low: float, high: float, smallest: float = SMALLEST_SCALE) -> TensorQuantization:
        """256 codes over [low, high], low <= 0 <= high, of a scale of ``smallest`` at least."""
        if high == low:
            return cls(1.0, 0)
        scale = np.float32(max((high - low) / 255, smallest))
        return cls(scale, int(np.clip(np.rint(CODE_MIN - low / float(scale)), CODE_MIN, CODE_MAX)))

    def to_json(self) -> list[float | int]:
        """[scale, zero_point]; a float32 survives the way through a JSON number."""
        return [float(self.scale), self.zero_point]

    def quantize(self, real: ArrayLike) -> Codes:
        """Nearest codes of ``real``, halves to even, saturated; int8 of the same shape. NaN gets the code of 0."""
        with np.errstate(over="ignore"):
            codes = np.rint(np.asarray(real, np.float32) * (np.float32(1) / self.scale)) + np.float32(self.zero_point)
        codes = np.where(np.isnan(codes), np.float32(self.zero_point), codes)
        return np.clip(codes, CODE_MIN, CODE_MAX).astype(np.int8)

    def dequantize(self, codes: ArrayLike) -> Float32s:
        """Reals that ``codes`` stand for, float32 of the same shape."""
        with np.errstate(over="ignore"):
            return (np.asarray(codes, np.float32) - np.float32(self.zero_point)) * self.scale


class QuantizedLinear(Frozen):
    """A fully connected layer: int8 weights, symmetric per output channel, and an int32 bias at input x weight scale.

    Parameters
    ----------
    weight : int8 (out_features, in_features)
        In [-127, 127].
    scale : float32 (out_features,)
        ``real weight = scale * code``.
    bias : int32 (out_features,) or None
    """

    weight: Codes
    scale: Float32s
    bias: NDArray[np.int32] | None

    def __init__(self, weight: Codes, scale: Float32s, bias: NDArray[np.int32] | None = None):
        weight = frozen(weight, np.int8, "weight")
        if weight.ndim != 2:
            raise ValueError(f"weight must be (out_features, in_features); got shape {weight.shape}")
        if (weight == CODE_MIN).any():
            raise ValueError("weight must lie in [-127, 127], as TFLite defines its FULLY_CONNECTED weights; got -128")
        scale = frozen(np.broadcast_to(scale, (weight.shape[0],)), np.float32, "scale")
        if not ((scale >= SMALLEST_SCALE) & (scale <= LARGEST_SCALE)).all():
            raise ValueError("scale of a linear layer must be positive and finite in every channel, within "
                             "[2**-60, 2**60]")
        if bias is not None:
            bias = frozen(bias, np.int32, "bias")
            if bias.shape != (weight.shape[0],):
                raise ValueError(f"bias must have shape {(weight.shape[0],)}; got {bias.shape}")
        self.set_fields(weight=weight, scale=scale, bias=bias)


def _scale(value: object, name: str) -> np.float32:
    """A scale as float32."""
    value = number(name, value)
    if not SMALLEST_SCALE <= value <= LARGEST_SCORE_SCALE:
        raise ValueError(f"{name} must be positive and finite, within [2**-60, 2**121]; got {value}")
    return np.float32(value)


def check_scales(tensors: Mapping[str, TensorQuantization]) -> None:
    """Refuse scales above 2**60 of what is not scores."""
    for name, tensor in tensors.items():
        if name != "scores" and tensor.scale > LARGEST_SCALE:
            raise ValueError(f"the scale of {name} must be positive and finite, within [2**-60, 2**60]; got "
                             f"{tensor.scale}")


def frozen(array: ArrayLike, dtype: DTypeLike, name: str) -> NDArray[Any]:
    """A C-contiguous, read-only copy, or what is constant; refuses a dtype that would have to be converted."""
    array = as_array(name, array)
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype)}; got {array.dtype}")
    if not is_constant(array):
        array = np.array(array, order="C")
        array.flags.writeable = False
    return array


def linears_state(linears: Mapping[str, QuantizedLinear]) -> dict[str, NDArray[Any]]:
    """The arrays of linear layers by name."""
    return {f"{name}.{part}": array for name, linear in linears.items() for part in ("weight", "scale", "bias")
            if (array := getattr(linear, part)) is not None}


def linears_of(tensors: Mapping[str, Any]) -> dict[str, QuantizedLinear]:
    """The inverse of `linears_state`."""
    groups: dict[str, dict[str, Any]] = {}
    for name, array in tensors.items():
        group, _, part = name.rpartition(".")
        groups.setdefault(group, {})[part] = array
    return {name: QuantizedLinear(**parts) for name, parts in groups.items()}


PROBABILITIES = TensorQuantization(rules.PROBABILITY_SCALE, rules.PROBABILITY_ZERO_POINT)
