"""Run a float layer over sample data and remember the range of every tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from edgeattn.layers import MultiHeadAttention
from quant.observers import OBSERVERS, Statistics
from quant.progress import track
from quant.trace import float_trace, read_call


WEIGHTS = tuple(f"{name}_{part}" for name in ("q", "k", "v", "out") for part in ("weight", "bias"))


@dataclass
class Calibration:
    """What ``calibrate`` saw; give it to ``quantize``. Mergeable: ``a.merge(b)`` is calibration on both data sets.

    Attributes
    ----------
    layer : str
        Checksum of the layer's weights.
    observer : str
        The rule that turns statistics into ranges, a name in ``quant.observers.OBSERVERS``.
    sources : tuple of int
        Which inputs the layer was called with: (0, 0, 0) self-attention, (0, 1, 1) the value is the key, (0, 1, 2) three.
    statistics : dict of Statistics
        By tensor name. Of the scores only those that a query was permitted to see.
    lowest_row_maximum : float
        The smallest maximum of a row of permitted scores.
    masked : bool
        Whether any call left out a key.
    underflow : float
        The largest share of a row's probability in entries below 1/512, which int8 probabilities round to nothing.
    """

    layer: str
    observer: str
    sources: tuple[int, int, int]
    statistics: dict[str, Statistics] = field(default_factory=dict)
    lowest_row_maximum: float = np.inf
    masked: bool = False
    underflow: float = 0.0

    def merge(self, other: Calibration) -> Calibration:
        """Calibration on the data of both.

        Raises
        ------
        ValueError
            When the two saw different layers, kinds of calls or observers.
        """
        for name in ("layer", "observer", "sources"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"cannot merge calibrations with different {name}: "
                                 f"{getattr(self, name)} and {getattr(other, name)}")
        return Calibration(
            self.layer, self.observer, self.sources,
            {name: s.merge(other.statistics[name]) for name, s in self.statistics.items()},
            min(self.lowest_row_maximum, other.lowest_row_maximum), self.masked or other.masked,
            max(self.underflow, other.underflow))

    def range(self, name: str) -> tuple[float, float]:
        """The observer's (low, high) for a tensor."""
        return OBSERVERS[self.observer](self.statistics[name])


def calibrate(layer: MultiHeadAttention, batches: Iterable, *, observer: str = "minmax") -> Calibration:
    """Run ``layer`` over ``batches`` and remember the range of every tensor.

    Parameters
    ----------
    layer : MultiHeadAttention
    batches : iterable
        Each a float array (B, L, E) or (L, E), or a mapping of the layer's call arguments (query, key, value,
        attn_mask, key_padding_mask, is_causal, causal_alignment). A progress bar shows on a terminal.
    observer : {"minmax", "percentile", "mse"}
        How ``quantize`` will turn what was seen into ranges.

    Returns
    -------
    Calibration

    Raises
    ------
    TypeError, ValueError
        No batch; NaN or infinite values; calls of different kinds; shapes that do not fit.
    """
    if not isinstance(layer, MultiHeadAttention):
        raise TypeError(f"layer must be an edgeattn.MultiHeadAttention; got {type(layer).__name__}")
    if observer not in OBSERVERS:
        raise ValueError(f"observer must be one of {', '.join(map(repr, OBSERVERS))}; got {observer!r}")
    total = None
    for i, batch in enumerate(track(batches, "calibrating")):
        one = _observe(layer, batch, observer, f"batches[{i}]")
        total = one if total is None else total.merge(one)
    if total is None:
        raise ValueError("batches must hold at least one batch; got none")
    if total.statistics["scores"].count == 0:
        raise ValueError("batches must hold at least one query with a permitted key; got none")
    return total


def fingerprint(layer: MultiHeadAttention) -> str:
    """Checksum of a layer's weights and head counts: ranges seen in one layer mean nothing in another."""
    digest = hashlib.sha256(f"{layer.num_heads} {layer.num_kv_heads}".encode())
    for name in WEIGHTS:
        array = getattr(layer, name)
        digest.update(f"{name} {None if array is None else array.shape}".encode())
        if array is not None:
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _observe(layer, batch, observer: str, where: str) -> Calibration:
    call = read_call(batch, layer.num_heads, where)
    for name, x, width in (("query", call.query, layer.embed_dim), ("key", call.key, layer.kdim),
                           ("value", call.value, layer.vdim)):
        if x.shape[-1] != width:
            raise ValueError(f"{name} of {where} must have {width} features in its last axis; got shape {x.shape}")
    trace = float_trace(layer, call)
    one = Calibration(fingerprint(layer), observer, call.sources, masked=call.permitted is not None)
    there = np.ones(trace["scores"].shape, bool) if call.permitted is None else call.permitted
    for name, values in trace.items():
        one.statistics[name] = Statistics()
        one.statistics[name].update(values[there] if name == "scores" else values)
    rows = np.where(there, trace["scores"], -np.inf).max(-1, initial=-np.inf)
    one.lowest_row_maximum = float(rows.min(initial=np.inf, where=np.isfinite(rows)))
    p = trace["probabilities"]
    one.underflow = float(np.where(p < 1 / 512, p, 0).sum(-1).max(initial=0.0))
    return one
