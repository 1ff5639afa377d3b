"""What quantization cost: every tensor of the int8 layer against the float layer's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, overload

import numpy as np

from edgeattn.hints import hinted
from edgeattn.layers import MultiHeadAttention
from edgeattn.quantized import (
    INPUTS,
    SHORT,
    DynamicMultiHeadAttention,
    MulConstant,
    QuantizedLinear,
    QuantizedMultiHeadAttention,
    SelectMask,
    StaticMultiHeadAttention,
    StaticSelfAttention,
    fit_mask,
)
from quant.calibration import check_layer
from quant.compare_models import compare_model
from quant.model_calls import MODELS
from quant.report import Comparison, ModelReport, Report
from quant.trace import counted, describe_sources, float_trace, read_calls, static_trace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.types import Bools, Shape
    from quant.detail import Detail
    from quant.model_calls import Model
    from quant.types import Batch, ModelBatch

UNDERFLOW_LIMIT = 0.05  # lint when int8 probabilities, multiples of 1/256, miss a sum of 1 by more than this on average
SATURATION_LIMIT = 0.01  # lint when more of a tensor than this lies outside its range


@overload
def compare(layer: MultiHeadAttention, quantized: QuantizedMultiHeadAttention, batches: Iterable[Batch], *,
            detail: Detail | None = None) -> Report: ...


@overload
def compare(layer: Model, quantized: Model, batches: Iterable[ModelBatch], *, detail: Detail | None = None
            ) -> ModelReport: ...


@hinted
def compare(layer: Any, quantized: Any, batches: Iterable[Any], *, detail: Detail | None = None
            ) -> Report | ModelReport:
    """Compare every tensor and every head of ``quantized`` with the float ``layer`` on ``batches``.

    Parameters
    ----------
    layer : MultiHeadAttention, TransformerEncoder, TextEncoder or ImageEncoder
    quantized : QuantizedMultiHeadAttention, or an encoder of the same kind
        What ``quantize`` made of it; or of a static one's ``.onnx`` file ``layer`` is what ``from_onnx`` reads. Of a
        dynamic layer, whose inner tensors have no fixed codes, only the output is compared; of a whole encoder
        attention and feed-forward of every layer, and the results.
    batches : iterable
        As for ``calibrate``; better other data than was calibrated on.
    detail : Detail, optional
        Takes what lies behind the figures, which ``write_report`` shows.

    Returns
    -------
    Report, or ModelReport of a whole encoder
        SQNR = 10 log10(sum(real**2) / sum((real - dequantized)**2)) in dB, cosine similarity, saturation (the share of
        elements outside the int8 range), by tensor and, for the context, by head. Masked scores do not count, nor keys
        and values that no query sees, nor queries that see none, nor padding. Keys and scores are those without the key
        bias, which softmax does not see, where ``quantized`` leaves it out. A mask that ``quantized`` carries
        (``with_mask``) holds for ``layer`` too.

    Raises
    ------
    TypeError, ValueError
        Layers that do not belong together, no batch, batches that do not fit.
    """
    if isinstance(layer, MODELS):
        return compare_model(layer, quantized, batches, _check_of_model, detail)
    if not isinstance(quantized, (StaticMultiHeadAttention, DynamicMultiHeadAttention)):
        raise TypeError(f"quantized must be a layer from quant.quantize; got {type(quantized).__name__}")
    check_layer(layer, quantized.scheme)
    if isinstance(quantized, DynamicMultiHeadAttention):
        _check_dynamic(layer, quantized)
        return _compare_outputs(layer, quantized, batches, detail)
    _check_sizes(layer, quantized)
    factor = _factors(layer, quantized, quantized.linears)
    tensors: dict[str, Comparison] = {}
    heads = [Comparison() for _ in range(layer.num_heads)]
    lost = rows = 0.0
    for call in read_calls(layer, batches, "comparing"):
        if call.sources != quantized.sources:
            raise ValueError(f"{call.where} calls the layer with {describe_sources(call.sources)}; it was quantized "
                             f"for {describe_sources(quantized.sources)}")
        codes = static_trace(quantized, call)
        call = dataclasses.replace(
            call, permitted=_with_carried_masks(call.permitted, quantized, codes["scores"].shape))
        # other converters keep the bias that ours leave out
        real = float_trace(layer, call, key_bias=quantized.linears["key"].bias is not None)
        for name, values in real.items():
            values = values * factor.get(name, np.float32(1))
            tensors.setdefault(name, Comparison()).update(
                counted(name, values, call), counted(name, codes[name], call), quantized.tensors[name])
            if detail is not None:
                detail.add_layer_tensor(name, values, codes[name], quantized.tensors[name], call)
        for head, comparison in enumerate(heads):
            alone = call if call.permitted is None else dataclasses.replace(
                call, permitted=call.permitted[:, head:head + 1])
            comparison.update(counted("context", real["context"][:, head:head + 1], alone),
                              counted("context", codes["context"][:, head:head + 1], alone),
                              quantized.tensors["context"])
        total = quantized.tensors["probabilities"].dequantize(codes["probabilities"]).sum(-1)
        attending = real["probabilities"].any(-1)
        lost += float(np.abs(1 - total[attending]).sum())
        rows += int(np.count_nonzero(attending))
    if not any(comparison.count for comparison in tensors.values()):
        raise ValueError("batches must hold at least one query with a permitted key; got none")
    return Report({name: c.result() for name, c in tensors.items()}, [c.result() for c in heads],
                  _lints(tensors, lost / rows if rows else 0.0))


def _check_sizes(layer: MultiHeadAttention, quantized: QuantizedMultiHeadAttention | StaticSelfAttention) -> None:
    for name in ("num_heads", "embed_dim", "kdim", "vdim", "head_dim", "value_dim", "output_dim"):
        if getattr(layer, name) != getattr(quantized, name):
            raise ValueError(f"quantized does not belong to layer: {name} is {getattr(quantized, name)}, "
                             f"the layer's is {getattr(layer, name)}")


def _check_dynamic(layer: MultiHeadAttention, quantized: DynamicMultiHeadAttention) -> None:
    _check_sizes(layer, quantized)
    columns = quantized.outlier_columns
    for name, apart in quantized.outlier_weights.items() if len(columns) else ():
        if not np.array_equal(getattr(layer, f"{SHORT[name]}_weight")[:, columns], apart):
            raise ValueError(f"quantized does not belong to layer: its outlier_weights of {name} differ; compare it "
                             "with the layer it was made of")
    _check_weights(layer, quantized.weights, {}, list(columns))


def _check_of_model(layer: MultiHeadAttention, quantized: DynamicMultiHeadAttention | StaticSelfAttention) -> None:
    """Raise unless `quantized` is the attention layer of an encoder that was made of `layer`."""
    if isinstance(quantized, DynamicMultiHeadAttention):
        _check_dynamic(layer, quantized)
        return
    _check_sizes(layer, quantized)
    linears = dict(quantized.attention.linears)
    for name in INPUTS:  # behind the features there are further columns
        of = linears[name]
        linears[name] = QuantizedLinear(of.weight[:, :layer.embed_dim], of.scale, of.bias)
    _factors(layer, quantized.attention, linears)


def _factors(layer: MultiHeadAttention, quantized: StaticMultiHeadAttention, linears: Mapping[str, QuantizedLinear]
             ) -> Mapping[str, np.float32]:
    """What each float tensor is times where ``quantized`` has it in codes, by name.

    Raises
    ------
    ValueError
        Where the weights do not belong together.
    """
    # our layers carry 1/sqrt(D) in the query; other converters multiply the scores by it, or queries and keys
    scale = float(layer.scale)
    query, key, scores = (
        math.prod(float(op.constant.dequantize(op.code)) for op in ops if isinstance(op, MulConstant))
        for ops in (quantized.query_ops, quantized.key_ops, quantized.score_ops))
    scaled = any(isinstance(op, MulConstant) for op in quantized.score_ops)
    forms: list[dict[str, float]]
    if not (scaled or quantized.query_ops or quantized.key_ops):
        forms = [{"query": scale}]
    else:
        forms = [{"scores": 1 / scale} if scaled else {}]
        if query * key * scores:  # of a file without codes: queries and keys hold what they are multiplied by
            forms.append({"query": scale / (query * scores), "key": 1 / key, "scores": 1 / scores})
    factors = [{name: np.float32(number) for name, number in form.items()} for form in forms]

    def off(factor: Mapping[str, np.float32]) -> float:
        steps = _steps_off(layer, linears, factor)
        return max(steps["query"], steps["key"])

    best = min(factors, key=off)
    _check_weights(layer, linears, best)
    return best


def _check_weights(layer: MultiHeadAttention, linears: Mapping[str, QuantizedLinear],
                   factor: Mapping[str, np.float32], columns: Sequence[int] | NDArray[np.int64] = ()) -> None:
    """Raise unless every int8 weight lies within a step of the layer's; the others as of ``_steps_off``."""
    for name, off in _steps_off(layer, linears, factor, columns).items():
        if off > 1:
            raise ValueError(f"quantized does not belong to layer: its {name} weights are off by up to {off:.3g} steps "
                             "of int8; compare it with the layer it was made of")


def _steps_off(layer: MultiHeadAttention, linears: Mapping[str, QuantizedLinear], factor: Mapping[str, np.float32],
               columns: Sequence[int] | NDArray[np.int64] = ()) -> dict[str, float]:
    """How many steps int8 weights are at most from the layer's, by projection.

    factor: by projection, what the layer's weights are times where they have codes; 1 of those that it lacks.
    columns: inputs whose weights are no codes, but of the output projection.
    """
    groups, found = layer.num_heads // layer.num_kv_heads, {}
    for name, short in SHORT.items():
        weight, linear = getattr(layer, f"{short}_weight"), linears.get(name)
        if (weight is None) != (linear is None):
            raise ValueError(f"quantized does not belong to layer: one of them has no {name} projection")
        if linear is None:
            continue
        if name in ("key", "value") and len(weight) != len(linear.weight):
            weight = np.repeat(weight.reshape(layer.num_kv_heads, -1, weight.shape[1]), groups, axis=0)
        step = (linear.scale / factor.get(name, np.float32(1)))[:, None]
        off = np.abs((weight.reshape(linear.weight.shape) - linear.weight * step) / step)
        if name != "output":
            off[:, columns] = 0
        found[name] = float(off.max(initial=0))
    return found


def _compare_outputs(layer: MultiHeadAttention, quantized: DynamicMultiHeadAttention, batches: Iterable[Batch],
                     detail: Detail | None) -> Report:
    output = Comparison()
    for call in read_calls(layer, batches, "comparing"):
        real, got = (each(call.query, call.key, call.value, attn_mask=call.permitted) for each in (layer, quantized))
        if detail is not None:
            detail.add_layer_call(layer, quantized, call, counted("output", real, call), counted("output", got, call))
        output.add(*(counted("output", y, call) for y in (real, got)))
    if not output.count:
        raise ValueError("batches must hold at least one query with a permitted key; got none")
    return Report({"output": output.result()}, [], [])


def _with_carried_masks(permitted: Bools | None, quantized: StaticMultiHeadAttention, shape: Shape
                        ) -> Bools | None:
    """What a call permits and the masks in the layer permit, together."""
    for op in quantized.score_ops:
        if isinstance(op, SelectMask):
            keep = fit_mask(op.keep, shape)
            permitted = keep if permitted is None else permitted & keep
    return permitted


def _lints(tensors: dict[str, Comparison], lost: float) -> list[str]:
    """What a reader of the numbers should know."""
    lints = []
    if lost > UNDERFLOW_LIMIT:
        lints.append(f"probability underflow: the int8 probabilities of a row miss a sum of 1 by {lost:.0%} on "
                     f"average: they are multiples of 1/256, and rows here are spread thinner; attend to fewer keys, "
                     f"or quantize with scheme='dynamic', whose probabilities have a scale per row")
    for name, comparison in tensors.items():
        # probabilities near 1 lie above the fixed range, and scores below it no longer matter to their row
        outside = {"probabilities": 0, "scores": comparison.above}.get(name, comparison.below + comparison.above)
        if comparison.count and outside / comparison.count > SATURATION_LIMIT:
            lints.append(f"saturation: {outside / comparison.count:.1%} of {name} lies outside its int8 range; "
                         f"calibrate on data like this")
    return lints
