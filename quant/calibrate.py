"""Run a float layer or model over sample data and remember the range of every tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from edgeattn.checks import is_one_of
from quant.calibration import Calibration, check_layer, fingerprint, observe
from quant.model_calibration import ModelCalibration, calibrate_model
from quant.model_calls import MODELS
from quant.observers import OBSERVERS
from quant.trace import describe_sources, read_calls

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from edgeattn.layers import MultiHeadAttention
    from quant.model_calls import Model
    from quant.types import Batch, ModelBatch, Observer


@overload
def calibrate(layer: MultiHeadAttention, batches: Iterable[Batch], *, observer: Observer = "minmax") -> Calibration: ...


@overload
def calibrate(layer: Model, batches: Iterable[ModelBatch]) -> ModelCalibration: ...


def calibrate(layer: Any, batches: Iterable[Any], *, observer: Observer = "minmax") -> Calibration | ModelCalibration:
    """Run ``layer`` over ``batches`` and remember the range of every tensor, of a whole encoder of every feature.

    Parameters
    ----------
    layer : MultiHeadAttention, TransformerEncoder, TextEncoder or ImageEncoder
    batches : iterable
        Each a float array (B, L, E) or (L, E), or a mapping of the layer's call arguments (query, key, value,
        attn_mask, key_padding_mask, is_causal, causal_alignment). Of a whole encoder what its call takes first, or a
        mapping of the call's arguments; of a TextEncoder a list of texts, too. A progress bar shows on a terminal.
    observer : {"minmax", "percentile", "mse"}
        How ``quantize`` will turn what was seen into ranges; left out for a whole encoder, no range of which is cut.

    Returns
    -------
    Calibration, or ModelCalibration of a whole encoder

    Raises
    ------
    TypeError, ValueError
        No batch; NaN or infinite values; calls of different kinds; shapes that do not fit.
    """
    if isinstance(layer, MODELS):
        if not is_one_of(observer, ("minmax",)):
            raise ValueError("observer must be left out for a whole encoder, no range of which is cut; got "
                             f"{observer!r}")
        return calibrate_model(layer, batches)
    check_layer(layer)
    if not is_one_of(observer, OBSERVERS):
        raise ValueError(f"observer must be one of {', '.join(map(repr, OBSERVERS))}; got {observer!r}")
    checksum, total = fingerprint(layer), None
    for call in read_calls(layer, batches, "calibrating"):
        if total is None:
            total = Calibration(checksum, observer, call.sources)
        elif call.sources != total.sources:
            raise ValueError(f"{call.where} calls the layer with {describe_sources(call.sources)}, the batches before "
                             f"with {describe_sources(total.sources)}; a static layer has one kind of call")
        observe(layer, call, total)
    if total is None:
        raise ValueError("batches must hold at least one batch; got none")
    if total.statistics["scores"].count + total.single_scores.count == 0:
        raise ValueError("batches must hold at least one query with a permitted key; got none")
    return total
