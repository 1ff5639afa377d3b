"""Run a float layer or model over sample data and remember the range of every tensor."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, overload

from edgeattn.checks import is_one_of
from quant.calibration import Calibration, check_layer, fingerprint, observe
from quant.model_calibration import ModelCalibration, calibrate_model, large_by_name
from quant.model_calls import MODELS, encoder_of
from quant.models import check_float
from quant.observers import OBSERVERS
from quant.over_executor import merged
from quant.trace import check_batches, describe_sources, read_calls

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Executor
    from typing import Any

    from edgeattn.layers import MultiHeadAttention
    from quant.model_calls import Model
    from quant.types import Batch, ModelBatch, Observer


@overload
def calibrate(layer: MultiHeadAttention, batches: Iterable[Batch], *, observer: Observer = "minmax",
              executor: Executor | None = None) -> Calibration: ...


@overload
def calibrate(layer: Model, batches: Iterable[ModelBatch], *, executor: Executor | None = None
              ) -> ModelCalibration: ...


def calibrate(layer: Any, batches: Iterable[Any], *, observer: Observer = "minmax", executor: Executor | None = None
              ) -> Calibration | ModelCalibration:
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
    executor : concurrent.futures.Executor, optional
        Runs the layer over some batches at a time: threads, processes, or a cluster as a Dask client's
        ``get_executor()`` is. What comes out is the same, bit for bit.

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
        check_batches(batches)
        check_float(encoder_of(layer))
        large = {name: features.tolist() for name, features in large_by_name(layer).items()}
        of_some = functools.partial(calibrate_model, layer, large=large)
        found = of_some(batches, "calibrating") if executor is None else merged(executor, of_some, batches)
        if found is None:
            raise ValueError("batches must hold at least one token that is no padding; got none")
        _warn_of_one_token(list(found.attention.values()))
        return found
    check_layer(layer)
    if not is_one_of(observer, OBSERVERS):
        raise ValueError(f"observer must be one of {', '.join(map(repr, OBSERVERS))}; got {observer!r}")
    check_batches(batches)
    of_layer = functools.partial(_of_some, layer, observer)
    total = of_layer(batches, "calibrating") if executor is None else merged(executor, of_layer, batches)
    if total is None:
        raise ValueError("batches must hold at least one batch; got none")
    if total.statistics["scores"].count + total.single_scores.count == 0:
        raise ValueError("batches must hold at least one query with a permitted key; got none")
    _warn_of_one_token([total])
    return total


def _warn_of_one_token(seen: Sequence[Calibration]) -> None:
    if seen and all(each.is_of_one_token for each in seen):
        warnings.warn("batches hold one token again and again, as constant data does: ranges of it fit no other data; "
                      "calibrate on samples of what will be asked", stacklevel=3)


def _of_some(layer: MultiHeadAttention, observer: Observer, batches: Iterable[Batch], description: str = ""
             ) -> Calibration | None:
    """What some batches show; None of none."""
    checksum, total = fingerprint(layer), None
    for call in read_calls(layer, batches, description):
        if total is None:
            total = Calibration(checksum, observer, call.sources)
        elif call.sources != total.sources:
            raise ValueError(f"{call.where} calls the layer with {describe_sources(call.sources)}, the batches before "
                             f"with {describe_sources(total.sources)}; a static layer has one kind of call")
        observe(layer, call, total)
    return total
