"""From a float layer and its calibration to an int8 layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Literal, TypeVar, overload

import numpy as np

from edgeattn.arithmetic import kernel_set
from edgeattn.checks import flag, is_one_of
from edgeattn.hints import hinted
from edgeattn.layers import MultiHeadAttention, TransformerEncoder
from edgeattn.layers.positions import POSITIONS
from edgeattn.models import ImageEncoder, TextEncoder
from edgeattn.quantized import (
    INPUTS,
    LARGEST_SCALE,
    PROBABILITIES,
    SHORT,
    SMALLEST_SCALE,
    AddMask,
    DynamicMultiHeadAttention,
    QuantizedLinear,
    StaticMultiHeadAttention,
    TensorQuantization,
)
from quant.calibration import Calibration, check_layer, fingerprint
from quant.model_calibration import ModelCalibration
from quant.model_calls import MODELS
from quant.models import WITHOUT_DATA, dynamic_scheme, quantize_model, static_scheme
from quant.overrides import Given, of_layer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.types import Arithmetic, Float32s
    from quant.types import Overrides, Scheme

Model = TypeVar("Model", TransformerEncoder, TextEncoder, ImageEncoder)
# A masked score gets the lowest code, so the lowest code must be worth nothing in every row. exp(-12) is 1/636 of the
# smallest probability int8 can hold, which leaves room for rows lower than any seen at calibration. A smaller margin
# lets masked keys through, a larger one makes the codes coarser (measured: docs/masks.md).
MASK_MARGIN = 12.0
# Scores this close are equal to any softmax: exp(255 * 2**-20) is 1.0002.
SMALLEST_SCORE_SCALE = 2.0**-20


@overload
def quantize(layer: MultiHeadAttention, calibration: Calibration, *, scheme: Literal["static"] = "static",
             arithmetic: Arithmetic = "litert", room_for_masks: bool = False, overrides: Overrides | None = None
             ) -> StaticMultiHeadAttention: ...


@overload
def quantize(layer: MultiHeadAttention, calibration: Calibration | None = None, *, scheme: Literal["dynamic"],
             arithmetic: Arithmetic = "litert") -> DynamicMultiHeadAttention: ...


@overload
def quantize(layer: MultiHeadAttention, calibration: Calibration | None = None, *, scheme: Scheme,
             arithmetic: Arithmetic = "litert", room_for_masks: bool = False, overrides: Overrides | None = None
             ) -> StaticMultiHeadAttention | DynamicMultiHeadAttention: ...


@overload
def quantize(layer: Model, calibration: ModelCalibration | None = None, *, scheme: Scheme = "static",
             arithmetic: Arithmetic = "litert", attention: Literal["int8", "float32"] = "int8",
             room_for_masks: bool = False, overrides: Overrides | None = None) -> Model: ...


@hinted
def quantize(layer: Any, calibration: Calibration | ModelCalibration | None = None, *, scheme: Scheme = "static",
             arithmetic: Arithmetic = "litert", attention: Literal["int8", "float32"] = "int8",
             room_for_masks: bool = False, overrides: Overrides | None = None) -> Any:
    """Quantize a float layer, or a whole encoder, to int8.

    Dynamic: weights symmetric per output channel, everything else at run time; no calibration. That of a whole encoder
    chooses which inputs stay float32, instead of random tokens (docs/encoders.md).

    Static: weights are symmetric per output channel, keys and values symmetric per tensor, everything else asymmetric
    per tensor. 1/sqrt(D) goes into the scale of the query projection, which changes no weight. The key bias is left
    out: it adds the same to all scores of a row, which softmax does not see, and would only widen ranges. Grouped key
    and value heads are repeated. The scores' range is that of permitted scores in rows of two or more, cut where a
    score no longer matters to any row; when a mask was seen it reaches MASK_MARGIN below the lowest row's maximum, so
    that masks survive, and ``with_mask`` extends it where the mask leaves a row a single key. A whole encoder keeps its
    norms and residuals in float32, and spreads what reaches beyond the range of most features (docs/encoders.md).
    Halves of its layers that no static form is of stay float32, and a warning names them.

    Parameters
    ----------
    layer : MultiHeadAttention, TransformerEncoder, TextEncoder or ImageEncoder
    calibration : Calibration, or ModelCalibration of a whole encoder
        From ``calibrate`` on the same layer; the dynamic scheme needs none.
    scheme : {"static", "dynamic"}
        "static": int8 in and out, what ``.tflite`` files and microcontrollers run. "dynamic": float in and out, the
        more accurate choice where Python is the host.
    arithmetic : str
        The TFLite kernel set for the static scheme to equal, a name in ``edgeattn.arithmetic.KERNEL_SETS``.
    attention : {"int8", "float32"}
        Of a whole encoder: whether its attention layers become int8 too, or stay as they are.
    room_for_masks : bool
        Of static attention: whether the scores' range leaves room below for masks that a file shall hold. A layer has
        it anyway where its calibration saw masks; a whole encoder, whose calls leave masked keys out, does not.
    overrides : mapping, optional
        From names, which may hold ``*``, to what they shall be. Of halves of a whole encoder's layers,
        "layers.0.feed_forward" or "layers.*.attention": "static", "dynamic" or "float32", so that one model has
        several (``ModelReport.overrides`` of a comparison says which cost most). Of tensors of static attention,
        "scores" of a layer, "layers.*.attention.context" of an encoder: how their range is found, "minmax", "mse",
        "percentile", ("percentile", share left out at either end), or (low, high). The last that fits a name counts.

    Returns
    -------
    QuantizedMultiHeadAttention, or an encoder of the same kind

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    """
    room_for_masks = flag("room_for_masks", room_for_masks)
    kernel_set(arithmetic)
    if room_for_masks and scheme == "dynamic":
        raise ValueError("room_for_masks must be left out for scheme='dynamic', whose scores are float32")
    if isinstance(layer, MODELS):
        if not is_one_of(scheme, ("static", "dynamic")):
            raise ValueError(f"scheme must be 'static' or 'dynamic'; got {scheme!r}")
        schemes = {
            "static": lambda seen: static_scheme(
                layer, seen, arithmetic, functools.partial(quantize, room_for_masks=room_for_masks), quantize_linear),
            "dynamic": lambda seen: dynamic_scheme(layer, seen, _quantize_dynamic)}
        return quantize_model(layer, calibration, scheme, attention, overrides, schemes)
    check_layer(layer, scheme)
    if not is_one_of(attention, ("int8",)):
        raise ValueError("attention must be left out for an attention layer, of which no other half could be int8; got "
                         f"{attention!r}")
    if scheme == "dynamic":
        if calibration is not None and not isinstance(calibration, Calibration):
            raise TypeError("calibration must be left out, or a quant.Calibration, for an attention layer; got "
                            f"{type(calibration).__name__}")
        if overrides is not None:
            raise ValueError("overrides must be left out for scheme='dynamic' of a layer, which has no fixed ranges")
        return _quantize_dynamic(layer)
    if not isinstance(calibration, Calibration):
        raise TypeError(f"calibration must be a quant.Calibration for scheme='static' (run quant.calibrate first); "
                        f"got {type(calibration).__name__}; {WITHOUT_DATA}")
    if calibration.layer != fingerprint(layer):
        raise ValueError("calibration was made with another layer: its weights differ from this layer's")
    if overrides is not None:
        calibration = of_layer(overrides, calibration)
    if room_for_masks:
        calibration = dataclasses.replace(calibration, masked=True)
    return _quantize_static(layer, calibration, arithmetic)


def _quantize_static(layer: MultiHeadAttention, calibration: Calibration, arithmetic: Arithmetic
                     ) -> StaticMultiHeadAttention:
    """The layer with the ranges of its calibration."""
    for name in calibration.statistics:
        low, high = calibration.range(name)
        if high - low > 127 * LARGEST_SCALE:
            raise ValueError(f"calibration saw {name} values up to {max(-low, high):.3g}; int8 scales end at 2**60")
    tensors = {name: TensorQuantization.over(*calibration.range(name)) for name in calibration.statistics}
    for name in ("key", "value"):
        tensors[name] = _symmetric_quantization(*calibration.range(name, symmetric=True))
    biased = tensors.pop("biased_scores", None)
    tensors["scores"] = TensorQuantization.over(
        *(_score_range(calibration) if biased is None else calibration.range("scores")), smallest=SMALLEST_SCORE_SCALE)
    score_ops = () if biased is None else (_added_bias(layer.position_bias, calibration),)
    tensors["probabilities"] = PROBABILITIES

    def linear(name: str, weight: Float32s, bias: Float32s | None, source: str) -> QuantizedLinear:
        if name in ("key", "value"):
            weight = _repeat_heads(weight, layer.num_kv_heads, layer.num_heads)
            bias = None if bias is None else _repeat_heads(bias, layer.num_kv_heads, layer.num_heads)
        return quantize_linear(weight, bias, tensors[source].scale)

    biases = {"query": layer.q_bias, "key": None, "value": layer.v_bias}
    linears: dict[str, QuantizedLinear] = {
        name: linear(name, getattr(layer, f"{name[0]}_weight"), biases[name],
                     f"{INPUTS[calibration.sources[i]]}_input") for i, name in enumerate(INPUTS)}
    if layer.out_weight is not None:
        linears["output"] = linear("output", layer.out_weight, layer.out_bias, "context")
    fold = np.float32(layer.scale)
    q = linears["query"]
    smallest = np.float32(SMALLEST_SCALE)
    linears["query"] = QuantizedLinear(q.weight, np.maximum(q.scale * fold, smallest), q.bias)
    tensors["query"] = TensorQuantization(max(tensors["query"].scale * fold, smallest), tensors["query"].zero_point)
    alone = calibration.single_scores
    exported_masks = calibration.masked and biased is None
    return StaticMultiHeadAttention(layer.num_heads, linears, tensors, sources=calibration.sources, score_ops=score_ops,
                                    arithmetic=arithmetic, mask_margin=MASK_MARGIN if exported_masks else 0.0,
                                    lowest_single_score=alone.minimum if alone.count else None)


def _added_bias(position_bias: Any, calibration: Calibration) -> AddMask:
    """A layer's position bias as a constant that is added to its scores, as other people's files have it.

    What would lower any score to the lowest code of the sum is cut off there: a few of -100 take no code from others.
    """
    low, high = _score_range(calibration, "biased_scores")
    output = TensorQuantization.over(low, high, smallest=SMALLEST_SCORE_SCALE)
    bias = np.maximum(position_bias.array, np.float32(low - calibration.range("scores")[1]))
    constant = TensorQuantization.over(float(bias.min()), float(bias.max()), smallest=SMALLEST_SCORE_SCALE)
    return AddMask(constant.quantize(bias), constant, output)


def _quantize_dynamic(layer: MultiHeadAttention, columns: Sequence[int] = ()) -> DynamicMultiHeadAttention:
    """columns: inputs of queries, keys and values whose products stay float32."""
    weights, biases, apart = {}, {}, {}
    for name, short in SHORT.items():
        weight, bias = getattr(layer, f"{short}_weight"), getattr(layer, f"{short}_bias")
        if weight is not None and name != "output" and len(columns):
            apart[name], weight = weight[:, columns], weight.copy()
            weight[:, columns] = 0
        if weight is not None:
            weights[name] = quantize_linear(weight, None, 1.0)
        if bias is not None:
            biases[name] = bias
    return DynamicMultiHeadAttention(
        layer.num_heads, weights, biases, num_kv_heads=layer.num_kv_heads, bias_k=layer.bias_k, bias_v=layer.bias_v,
        add_zero_attn=layer.add_zero_attn, outlier_columns=columns or None, outlier_weights=apart,
        **{name: getattr(layer, name) for name in POSITIONS})


def quantize_linear(weight: Float32s, bias: Float32s | None, input_scale: float | np.float32) -> QuantizedLinear:
    """Symmetric int8 weights per output channel, int32 bias.

    A channel whose bias would leave int32 gets the scale its bias needs, and a channel of zeros one as large as the
    layer's largest, for runtimes refuse multipliers that stand out.
    """
    scale: NDArray[Any] = np.abs(weight).max(1, initial=0).astype(np.float64) / 127
    if bias is not None:
        scale = np.maximum(scale, np.abs(bias.astype(np.float64)) / (float(input_scale) * 2**30))
    scale = np.where(scale > 0, scale, scale.max(initial=0))
    scale = np.maximum(scale, SMALLEST_SCALE).astype(np.float32)
    codes = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)
    if bias is None:
        return QuantizedLinear(codes, scale)
    step = float(input_scale) * scale.astype(np.float64)  # explicitly: NumPy 1 and 2 promote scalars differently
    return QuantizedLinear(codes, scale, np.rint(bias.astype(np.float64) / step).astype(np.int32))


def _score_range(calibration: Calibration, name: str = "scores") -> tuple[float, float]:
    low, high = calibration.range(name)
    if isinstance(calibration.rules.get(name), Given):
        return low, high
    reach = min(calibration.lowest_row_maximum, high) - MASK_MARGIN
    return min(0.0, reach if calibration.masked else max(low, reach)), high


def _symmetric_quantization(low: float, high: float) -> TensorQuantization:
    """255 codes over [low, high], low = -high."""
    return TensorQuantization(max(high / 127, SMALLEST_SCALE) if high > low else 1.0, 0)


def _repeat_heads(array: Float32s, heads: int, wanted: int) -> Float32s:
    """Rows of grouped heads, each head ``wanted / heads`` times."""
    if heads == wanted:
        return array
    grouped = array.reshape(heads, -1, *array.shape[1:])
    return np.repeat(grouped, wanted // heads, axis=0).reshape(-1, *array.shape[1:])
