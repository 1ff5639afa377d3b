"""Whole encoders in int8: feed-forwards, and attention where wanted, by the dynamic or the static scheme."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeattn.checks import is_one_of
from edgeattn.kernels.cpu.encoder_dynamic import MOST_OUTLIERS
from edgeattn.layers import FeedForward, Linear, MultiHeadAttention, TransformerEncoder, TransformerEncoderLayer
from edgeattn.layers.dynamic_linear import DynamicLinear
from quant.calibration import check_layer
from quant.model_calibration import ModelCalibration, encoder_fingerprint, feed_forward_linears, random_largest
from quant.model_calls import encoder_of
from quant.overrides import halves_of, of_model
from quant.static_models import check_feed_forward, static_attention, static_feed_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from edgeattn.types import Arithmetic, Float32s
    from quant.model_calls import Model

# An output whose largest weight is over so many times the median of all would cost the others their digits.
SPLIT = 4.0
WITHOUT_DATA = "scheme='dynamic' needs none"  # no calibration, says an error about it


class LacksFormError(ValueError):
    """Half a layer has parts that a scheme has no form of."""


class Scheme(NamedTuple):
    """How the halves of an encoder's layers become int8: each of (layer, its name), LacksFormError where it cannot."""

    attention: Callable[[MultiHeadAttention, str], Any]
    feed_forward: Callable[[FeedForward, str], Any]


def dynamic_scheme(model: Model, calibration: object, quantize_attention: Callable[..., Any]) -> Scheme:
    """Int8 weights; activations are quantized at run time.

    The four largest inputs of each product but attention's last stay float32: a few features of a residual stream,
    always the same ones, are up to a hundred times the others, and would set every token's scale. They show in random
    tokens as in real ones, so that `calibration` may be None.
    """
    encoder = encoder_of(model)
    check_float(encoder)
    largest = random_largest(model, encoder) if calibration is None else _seen_largest(calibration, encoder)

    def attention(layer: MultiHeadAttention, _: str) -> Any:
        check_layer(layer, "dynamic")
        return quantize_attention(layer, _largest_columns(largest[id(layer)]))

    return Scheme(attention, lambda layer, _: _quantized(layer, largest))


def static_scheme(model: Model, calibration: object, arithmetic: Arithmetic, quantize_layer: Any, quantize_linear: Any
                  ) -> Scheme:
    """Every scale from the calibration; quantize_layer, quantize_linear: of quant.quantize."""
    encoder = encoder_of(model)
    check_float(encoder)
    seen = _checked(calibration, encoder)

    def attention(layer: MultiHeadAttention, name: str) -> Any:
        try:
            check_layer(layer, "static")
        except ValueError as error:
            raise LacksFormError(error) from None
        if name not in seen.attention:
            raise ValueError("calibration has no ranges of it, which leave float32")
        return static_attention(layer, name, seen, arithmetic, quantize_layer)

    def feed_forward(layer: FeedForward, name: str) -> Any:
        check_feed_forward(layer)
        return static_feed_forward(layer, name, seen, arithmetic, quantize_linear)

    return Scheme(attention, feed_forward)


def quantize_model(model: Model, calibration: Any, scheme: str, attention: str, overrides: Any,
                   schemes: Mapping[str, Callable[[Any], Scheme]]) -> Model:
    """`model` with the halves of its layers in int8; schemes: by name, of a calibration.

    What the scheme has no form of stays float32, unless `overrides` asks for it.
    """
    if not is_one_of(attention, ("int8", "float32")):
        raise ValueError(f"attention must be 'int8' or 'float32'; got {attention!r}")
    encoder = encoder_of(model)
    names = halves_of(encoder)
    asked, calibration = of_model(overrides, names.values(), calibration)
    made: dict[str, Scheme] = {}
    halves: dict[int, Any] = {}
    left: dict[str, list[str]] = {}
    wanted = {name: "float32" if attention == "float32" and name.endswith("attention") else scheme
              for name in names.values()} | asked
    for each in {scheme, *wanted.values()} - {"float32"}:
        made[each] = schemes[each](calibration)

    def quantized(half: Any, part: str) -> Any:
        name = names[id(half)]
        if wanted[name] == "float32" or id(half) in halves:
            return halves.get(id(half), half)
        try:
            halves[id(half)] = getattr(made[wanted[name]], part)(half, name)
        except LacksFormError as error:
            if name in asked:
                raise ValueError(f"{name}: {error}") from None
            left.setdefault(str(error), []).append(name)
            halves[id(half)] = half
        except ValueError as error:
            other = f"overrides={{{name!r}: 'float32'}}" if part == "feed_forward" else "attention='float32'"
            raise ValueError(f"{name}: {error}; {other} leaves it as it is") from None
        return halves[id(half)]

    layers: dict[int, TransformerEncoderLayer] = {}
    for layer in encoder.layers:
        if id(layer) not in layers:
            layers[id(layer)] = TransformerEncoderLayer(
                quantized(layer.attention, "attention"), quantized(layer.feed_forward, "feed_forward"), layer.norm1,
                layer.norm2, norm_first=layer.norm_first, window_size=layer.window_size)
    for reason, some in left.items():
        warnings.warn(f"{', '.join(some)} stay{'s' * (len(some) == 1)} float32: {reason}; overrides={{{some[0]!r}: "
                      "'dynamic'} makes dynamic int8 of one", stacklevel=3)
    result = TransformerEncoder([layers[id(layer)] for layer in encoder.layers], norm=encoder.norm)
    if isinstance(model, TransformerEncoder):
        return result
    given = {name: getattr(model, name) for name in inspect.signature(type(model)).parameters}
    return type(model)(**given | {"encoder": result})


def check_float(encoder: TransformerEncoder) -> None:
    """Raise unless the encoder has no int8 part."""
    for i, layer in enumerate(encoder.layers):
        part = layer.feed_forward
        parts = [getattr(part, name, part) for name in ("linear1", "linear2", "gate")]
        for of in (*parts, layer.attention):
            float_one = (type(of) is Linear or of is None) if of is not layer.attention else isinstance(
                of, MultiHeadAttention)
            if not float_one:
                raise TypeError(f"model must be a float one; got layers[{i}] with {of}")


def _quantized(feed_forward: FeedForward, largest: Mapping[int, Float32s]) -> FeedForward:
    linear1, linear2, gate = feed_forward.linear1, feed_forward.linear2, feed_forward.gate
    if not linear1.outputs:
        return feed_forward
    of_hidden, of_input = largest[id(linear2)], largest[id(linear1)]
    if gate is not None:  # both read the same, and a linear layer may stand in several feed-forwards
        of_input = np.maximum(of_input, largest[id(gate)])

    def quantized(linear: Linear, magnitudes: Float32s, split: float | None = None) -> DynamicLinear:
        return DynamicLinear.quantized_from(linear, outlier_columns=_largest_columns(magnitudes), split=split)

    return FeedForward(quantized(linear1, of_input), quantized(linear2, of_hidden, SPLIT),
                       activation=feed_forward.activation, gate=None if gate is None else quantized(gate, of_input))


def _largest_columns(magnitudes: Float32s) -> list[int]:
    largest = np.argsort(magnitudes, kind="stable")[max(len(magnitudes) - MOST_OUTLIERS, 0):]
    columns: list[int] = np.sort(largest).tolist()
    return columns


def _seen_largest(calibration: object, encoder: TransformerEncoder) -> dict[int, Float32s]:
    seen = _checked(calibration, encoder)
    largest = {id(linear): seen.largest[name] for name, linear in feed_forward_linears(encoder).items()}
    for i, layer in enumerate(encoder.layers):
        if (ends := seen.ranges.get(f"layers.{i}.attention.input")) is not None:
            largest.setdefault(id(layer.attention), np.abs(ends).max(axis=0))
    return largest


def _checked(calibration: object, encoder: TransformerEncoder) -> ModelCalibration:
    """A calibration of this encoder."""
    if not isinstance(calibration, ModelCalibration):
        raise TypeError("calibration must be a quant.ModelCalibration for a whole encoder, as quant.calibrate gives of "
                        f"one; got {type(calibration).__name__}; {WITHOUT_DATA}")
    sizes = {name: (linear.inputs,) for name, linear in feed_forward_linears(encoder).items()}
    if calibration.encoder != encoder_fingerprint(encoder) or sizes != {
            name: largest.shape for name, largest in calibration.largest.items()}:
        raise ValueError("calibration was made with another encoder: its weights differ from this one's")
    return calibration
