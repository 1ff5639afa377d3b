"""Quantized multi-head attention: the parameters of the static form and the layer that runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeattn import arithmetic
from edgeattn.arithmetic import CODE_MAX, CODE_MIN


@dataclass(frozen=True)
class TensorQuantization:
    """Per-tensor int8 quantization: ``real = scale * (code - zero_point)``.

    Parameters
    ----------
    scale : float
        Positive and finite; kept as float32.
    zero_point : int
        In [-128, 127].
    """

    scale: np.float32
    zero_point: int

    def __post_init__(self):
        object.__setattr__(self, "scale", np.float32(self.scale))
        object.__setattr__(self, "zero_point", int(self.zero_point))
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be positive and finite; got {self.scale}")
        if not CODE_MIN <= self.zero_point <= CODE_MAX:
            raise ValueError(f"zero_point must lie in [-128, 127]; got {self.zero_point}")

    def quantize(self, real) -> np.ndarray:
        """Nearest codes of ``real``, halves to even, saturated; int8 of the same shape."""
        codes = np.rint(np.asarray(real, np.float32) * (np.float32(1) / self.scale)) + np.float32(self.zero_point)
        return np.clip(codes, CODE_MIN, CODE_MAX).astype(np.int8)

    def dequantize(self, codes) -> np.ndarray:
        """Reals that ``codes`` stand for, float32 of the same shape."""
        return (np.asarray(codes, np.float32) - np.float32(self.zero_point)) * self.scale


PROBABILITIES = TensorQuantization(arithmetic.PROBABILITY_SCALE, arithmetic.PROBABILITY_ZERO_POINT)


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """A fully connected layer: int8 weights, symmetric per output channel, and an int32 bias at input scale x weight scale.

    Parameters
    ----------
    weight : int8 (out_features, in_features)
        In [-127, 127].
    scale : float32 (out_features,)
        ``real weight = scale * code``.
    bias : int32 (out_features,) or None
    """

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None = None

    def __post_init__(self):
        weight = _frozen(self.weight, np.int8, "weight")
        if weight.ndim != 2:
            raise ValueError(f"weight must be (out_features, in_features); got shape {weight.shape}")
        scale = _frozen(np.broadcast_to(self.scale, (weight.shape[0],)), np.float32, "scale")
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError("scale of a linear layer must be positive and finite in every channel")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "scale", scale)
        if self.bias is not None:
            bias = _frozen(self.bias, np.int32, "bias")
            if bias.shape != (weight.shape[0],):
                raise ValueError(f"bias must have shape {(weight.shape[0],)}; got {bias.shape}")
            object.__setattr__(self, "bias", bias)


@dataclass(frozen=True)
class MulConstant:
    """Scores times a constant: how other converters write 1/sqrt(D).

    Parameters
    ----------
    code : int
        The constant's int8 code.
    constant, output : TensorQuantization
    """

    code: int
    constant: TensorQuantization
    output: TensorQuantization


@dataclass(frozen=True, eq=False)
class AddMask:
    """Scores plus a constant mask: how other converters write a mask.

    Parameters
    ----------
    codes : int8, broadcastable to (B, H, L, S)
    mask, output : TensorQuantization
    """

    codes: np.ndarray
    mask: TensorQuantization
    output: TensorQuantization

    def __post_init__(self):
        object.__setattr__(self, "codes", _frozen(self.codes, np.int8, "codes"))


@dataclass(frozen=True, eq=False)
class SelectMask:
    """Scores where permitted, a fill code elsewhere: how our exporter writes a mask. Keeps the scores' quantization.

    Parameters
    ----------
    keep : bool, broadcastable to (B, H, L, S)
        True = attend.
    fill : int
        The code of a masked score: the lowest, -128.
    """

    keep: np.ndarray
    fill: int = CODE_MIN

    def __post_init__(self):
        object.__setattr__(self, "keep", _frozen(self.keep, np.bool_, "keep"))


ScoreOp = MulConstant | AddMask | SelectMask


def _frozen(array, dtype, name: str) -> np.ndarray:
    """A C-contiguous, read-only copy; refuses a dtype that would have to be converted."""
    array = np.asarray(array)
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype)}; got {array.dtype}")
    array = np.array(array, order="C")
    array.flags.writeable = False
    return array
