"""Whole encoders in dynamic int8: linear layers and feed-forwards, and attention's products where wanted."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import is_one_of
from edgeattn.kernels.cpu.encoder_dynamic import MOST_OUTLIERS
from edgeattn.layers import FeedForward, Linear, MultiHeadAttention, TransformerEncoder, TransformerEncoderLayer
from edgeattn.layers.dynamic_linear import DynamicLinear
from edgeattn.models import TextEncoder
from edgeattn.position_bias import ConstantPositionBias
from quant.calibrate import check_layer
from quant.model_calibration import LargestInputs, ModelCalibration, encoder_fingerprint, feed_forward_linears
from quant.model_calls import encoder_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from edgeattn.quantized import DynamicMultiHeadAttention
    from edgeattn.types import Float32s
    from quant.model_calls import Model

# An output whose largest weight is over so many times the median of all would cost the others their digits.
SPLIT = 4.0
_SEQUENCES, _TOKENS = 16, 24  # of the random input that finds the features with the largest magnitude


def quantize_model(model: Model, attention: str, quantize_attention: Callable[[MultiHeadAttention],
                                                                              DynamicMultiHeadAttention],
                   calibration: object) -> Model:
    """`model` with int8 weights; activations are quantized at run time.

    The four inputs of each feed-forward product that are largest stay float32: a few features of a residual stream,
    always the same ones, are up to a hundred times the others, and would set every token's scale. They show in random
    tokens as in real ones, so that `calibration` may be None.
    """
    if not is_one_of(attention, ("int8", "float32")):
        raise ValueError(f"attention must be 'int8' or 'float32'; got {attention!r}")
    encoder = encoder_of(model)
    for i, layer in enumerate(encoder.layers):
        part = layer.feed_forward
        for of in (part.linear1, part.linear2, part.gate, layer.attention):
            if isinstance(of, DynamicLinear) or (of is layer.attention and not isinstance(of, MultiHeadAttention)):
                raise TypeError(f"model must be a float one; got layers[{i}] with {of}")
    largest = _random_largest(model, encoder) if calibration is None else _seen_largest(calibration, encoder)
    made: dict[int, TransformerEncoderLayer] = {}
    for i, layer in enumerate(encoder.layers):
        if id(layer) in made:
            continue
        attend: Any = layer.attention
        try:
            feed_forward = _quantized(layer.feed_forward, largest)
        except ValueError as error:
            raise ValueError(f"layers[{i}].feed_forward: {error}") from None
        if attention == "int8":
            try:
                check_layer(layer.attention, "dynamic")
                attend = quantize_attention(layer.attention)
            except ValueError as error:
                raise ValueError(f"layers[{i}]: {error}; attention='float32' leaves attention as it is") from None
        made[id(layer)] = TransformerEncoderLayer(
            attend, feed_forward, layer.norm1, layer.norm2, norm_first=layer.norm_first,
            window_size=layer.window_size)
    result = TransformerEncoder([made[id(layer)] for layer in encoder.layers], norm=encoder.norm)
    if isinstance(model, TransformerEncoder):
        return result
    given = {name: getattr(model, name) for name in inspect.signature(type(model)).parameters}
    return type(model)(**given | {"encoder": result})


def _quantized(feed_forward: FeedForward, largest: Mapping[int, Float32s]) -> FeedForward:
    linear1, linear2, gate = feed_forward.linear1, feed_forward.linear2, feed_forward.gate
    if not linear1.outputs:
        return feed_forward
    of_hidden, of_input = largest[id(linear2)], largest[id(linear1)]
    if gate is not None:  # both read the same, and a linear layer may stand in several feed-forwards
        of_input = np.maximum(of_input, largest[id(gate)])

    def quantized(linear: Linear, magnitudes: Float32s, split: float | None = None) -> DynamicLinear:
        columns = np.argsort(magnitudes, kind="stable")[max(len(magnitudes) - MOST_OUTLIERS, 0):]
        return DynamicLinear.quantized_from(linear, outlier_columns=columns.tolist(), split=split)

    return FeedForward(quantized(linear1, of_input), quantized(linear2, of_hidden, SPLIT),
                       activation=feed_forward.activation, gate=None if gate is None else quantized(gate, of_input))


def _seen_largest(calibration: object, encoder: TransformerEncoder) -> dict[int, Float32s]:
    if not isinstance(calibration, ModelCalibration):
        raise TypeError("calibration must be a quant.ModelCalibration for a whole encoder, as quant.calibrate gives of "
                        f"one; got {type(calibration).__name__}")
    linears = feed_forward_linears(encoder)
    sizes = {name: (linear.inputs,) for name, linear in linears.items()}
    if calibration.encoder != encoder_fingerprint(encoder) or sizes != {
            name: largest.shape for name, largest in calibration.largest.items()}:
        raise ValueError("calibration was made with another encoder: its weights differ from this one's")
    return {id(linear): calibration.largest[name] for name, linear in linears.items()}


def _random_largest(model: Model, encoder: TransformerEncoder) -> dict[int, Float32s]:
    rng, ops, length = np.random.default_rng(0), LargestInputs(), _TOKENS
    for layer in encoder.layers:
        bias = getattr(layer.attention, "position_bias", None)
        if isinstance(bias, ConstantPositionBias):
            length = min(length, *bias.array.shape[1:])
    with np.errstate(over="ignore", invalid="ignore"):  # of huge weights
        if isinstance(model, TextEncoder):
            length = min(length, model.embedding.longest or length)
            ids = rng.integers(0, len(model.embedding.token_weight), (_SEQUENCES, length))
            positions = model.embedding.positions(ids, 0)
            with encoder.prepared(ids.shape, is_causal=model.is_causal) as sequences:
                model.forward(ops, ids.ravel(), positions.ravel(), np.zeros(ids.size, np.int64), sequences)
        else:
            x = rng.standard_normal((_SEQUENCES * length, encoder.embed_dim), np.float32)
            with encoder.prepared((_SEQUENCES, length)) as sequences:
                encoder.forward(ops, x, sequences)
    return ops.largest
