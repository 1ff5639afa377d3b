"""Encoders in static int8: attention layers and feed-forwards whose every scale comes from a calibration.

Codes have the range of most features. What reaches beyond it is spread: a feature of the input has a further column for
what the range leaves of it, an output another that goes on where it ends, and a few large hidden features are a network
of their own. So ranges need not be cut, and a file of TFLite operators computes the same.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeattn.arithmetic import ACTIVATIONS, CODE_MAX, CODE_MIN
from edgeattn.layers import FeedForward, Linear, MultiHeadAttention
from edgeattn.quantized import QuantizedLinear, StaticFeedForward, StaticSelfAttention, TensorQuantization
from quant.calibration import fingerprint
from quant.observers import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.quantized import StaticMultiHeadAttention
    from edgeattn.types import Arithmetic, Float32s
    from quant.calibration import Calibration
    from quant.model_calibration import ModelCalibration

SHARE = 6  # further columns, and outputs, are at most one for so many features
_FACTORS = np.linspace(1, 0.02, 99)  # of the whole range, tried for that of the codes
_CODES = CODE_MAX - CODE_MIN  # what a further output's codes begin beyond those before it


class Ranges(NamedTuple):
    """The least and the largest value of each feature, the first none above 0, the second none below."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def of(cls, ranges: Float32s) -> Ranges:
        """Of (2, features)."""
        return cls(np.minimum(ranges[0].astype(np.float64), 0), np.maximum(ranges[1].astype(np.float64), 0))

    def quantization(self, factor: float = 1.0) -> TensorQuantization:
        """256 codes over this much of the range of all."""
        return TensorQuantization.over(*(factor * float(end) for end in (
            self.low.min(initial=0), self.high.max(initial=0))))

    def pieces(self, of: TensorQuantization) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many ranges each feature takes, below and above 0."""
        low, high = (float(of.dequantize(code)) for code in (CODE_MIN, CODE_MAX))
        half = float(of.scale) / 2
        return (np.ceil((half - self.low) / max(-low + half, half) - 1e-6).astype(np.int64),
                np.ceil((half + self.high) / max(high + half, half) - 1e-6).astype(np.int64))


def spread(ranges: Ranges, count: Callable[[NDArray[np.int64], NDArray[np.int64]], int]) -> TensorQuantization:
    """The finest codes for which `count` of the pieces of all features, those beyond the first, are few enough."""
    best = ranges.quantization()
    for factor in _FACTORS[1:]:
        tried = ranges.quantization(float(factor))
        if count(*ranges.pieces(tried)) > len(ranges.low) // SHARE:
            break
        best = tried
    return best


def spread_inputs(ranges: Ranges) -> tuple[TensorQuantization, list[int]]:
    """Codes of an input, and the columns behind its features: which column each goes on from."""
    def further(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.maximum(np.maximum(low, high) - 1, 0)

    of = spread(ranges, lambda low, high: int(further(low, high).sum()))
    more: list[int] = []
    for feature, count in enumerate(further(*ranges.pieces(of))):
        for i in range(count):
            more.append(len(ranges.low) + len(more) - 1 if i else feature)
    return of, more


def spread_outputs(ranges: Ranges) -> tuple[TensorQuantization, list[tuple[int, int, int]]]:
    """Codes of outputs, and those behind them: (output, the code that adds nothing, by how many codes it is moved)."""
    def further(pieces: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.maximum(pieces - 1, 0)

    of = spread(ranges, lambda low, high: int(further(low).sum() + further(high).sum()))
    low, high = map(further, ranges.pieces(of))
    more = [(output, CODE_MIN, -_CODES * (i + 1)) for output, count in enumerate(high) for i in range(count)]
    more += [(output, CODE_MAX, _CODES * (i + 1)) for output, count in enumerate(low) for i in range(count)]
    return of, more


def source_of(more: list[int], features: int) -> list[int]:
    """The feature that each further column belongs to."""
    found: list[int] = []
    for column in more:
        found.append(column if column < features else found[column - features])
    return found


def static_attention(layer: MultiHeadAttention, name: str, calibration: ModelCalibration, arithmetic: Arithmetic,
                     quantize: Callable[..., StaticMultiHeadAttention]) -> StaticSelfAttention:
    """An encoder's attention in static int8; quantize: of a layer and its calibration."""
    seen: Calibration = calibration.attention[name]
    of, more = spread_inputs(Ranges.of(calibration.ranges[f"{name}.input"]))
    columns = source_of(more, layer.embed_dim)
    q, k, v = (np.concatenate([weight, weight[:, columns]], axis=1)
               for weight in (layer.q_weight, layer.k_weight, layer.v_weight))
    wide = MultiHeadAttention(
        layer.num_heads, q, k, v, layer.out_weight, num_kv_heads=layer.num_kv_heads, q_bias=layer.q_bias,
        k_bias=layer.k_bias, v_bias=layer.v_bias, out_bias=layer.out_bias, position_bias=layer.position_bias)
    wide.scale = layer.scale
    inputs = Statistics()
    inputs.update(np.array([of.dequantize(code) for code in (CODE_MIN, CODE_MAX)], np.float32))
    calibration_of_wide = dataclasses.replace(
        seen, layer=fingerprint(wide), observer="minmax", statistics={**seen.statistics, "query_input": inputs})
    return StaticSelfAttention(quantize(wide, calibration_of_wide, arithmetic=arithmetic), more_inputs=more)


def static_feed_forward(layer: FeedForward, name: str, calibration: ModelCalibration, arithmetic: Arithmetic,
                        quantize_linear: Any) -> StaticFeedForward:
    """A feed-forward in static int8; quantize_linear: of (weight, bias, scale of its input)."""
    large = calibration.large[name]
    apart = np.zeros(layer.linear1.outputs, bool)
    apart[large] = True
    of, more = spread_inputs(Ranges.of(calibration.ranges[f"{name}.input"]))
    part = _Part(layer, name, calibration, arithmetic, quantize_linear, of, more)
    second = part.network(apart, "large", None, None) if len(large) else None
    return part.network(~apart, "linear2", layer.linear2.bias, second)


class _Part(NamedTuple):
    """A feed-forward of which networks of some hidden features are made."""

    layer: FeedForward
    name: str
    calibration: ModelCalibration
    arithmetic: Arithmetic
    quantize_linear: Any
    input: TensorQuantization
    more_inputs: list[int]

    def network(self, features: NDArray[np.bool_], result: str, bias: Float32s | None,
                large: StaticFeedForward | None) -> StaticFeedForward:
        """That of some hidden features; result: what the calibration calls what they give."""
        layer, tensors = self.layer, {"input": self.input}
        columns = source_of(self.more_inputs, layer.inputs)

        def raised(linear: Linear) -> QuantizedLinear:
            weight = linear.weight[features]
            quantized: QuantizedLinear = self.quantize_linear(
                np.concatenate([weight, weight[:, columns]], axis=1),
                None if linear.bias is None else linear.bias[features], self.input.scale)
            return quantized

        linears = {"linear1": raised(layer.linear1)}
        active = "linear1" if layer.gate is None else "gate"
        before = self._ranges(active, features)
        tensors["activation"], cut = _activation(layer.activation, before)
        if layer.activation != "relu":
            tensors[active] = cut.quantization()
        if layer.gate is not None:
            linears["gate"] = raised(layer.gate)
            tensors["linear1"] = self._ranges("linear1", features).quantization()
            tensors["gated"] = self._ranges("hidden", features).quantization()
        hidden = tensors["activation" if layer.gate is None else "gated"]
        tensors["linear2"], more = spread_outputs(self._ranges(result))
        outputs = [output for output, _, _ in more]
        weight = layer.linear2.weight[:, features]
        moved = np.zeros(len(weight)) if bias is None else bias.astype(np.float64)
        moved = np.concatenate([moved, moved[outputs] + [by * float(tensors["linear2"].scale) for _, _, by in more]])
        linears["linear2"] = self.quantize_linear(
            np.concatenate([weight, weight[outputs]]), moved if more or bias is not None else None, hidden.scale)
        return StaticFeedForward(
            linears, tensors, activation=layer.activation, arithmetic=self.arithmetic, more_inputs=self.more_inputs,
            more_outputs=[(output, none) for output, none, _ in more], large=large)

    def _ranges(self, tensor: str, features: Any = slice(None)) -> Ranges:
        return Ranges.of(self.calibration.ranges[f"{self.name}.{tensor}"][:, features])


def _activation(kind: str, before: Ranges) -> tuple[TensorQuantization, Ranges]:
    """Codes of an activation of what lies between `before`, and what of that range its codes tell from 0."""
    if kind == "relu":
        ranges = Ranges(np.zeros_like(before.low), before.high)
        return ranges.quantization(), ranges
    low, high = float(before.low.min(initial=0)), float(before.high.max(initial=0))
    x = np.linspace(min(low, 0), 0, 1001)
    y = np.array([ACTIVATIONS[kind](float(value)) for value in x])
    result = TensorQuantization.over(float(y.min()), max(ACTIVATIONS[kind](high), 0.0))
    told = x[np.abs(y) >= float(result.scale) / 4]
    least = float(told.min(initial=0))
    return result, Ranges(np.maximum(before.low, least), before.high)


def check_feed_forward(layer: FeedForward) -> None:
    """Raise unless static int8 has a form of it."""
    for name in ("linear1", "gate", "linear2"):
        linear = getattr(layer, name)
        if linear is None:
            continue
        for part in ("weight", "bias"):
            array = getattr(linear, part)
            if array is not None and not np.isfinite(array).all():
                raise ValueError(f"{name} must have a finite {part}, got NaN or infinity")
