"""What quantization cost: every tensor of the int8 layer against the float layer's."""

from __future__ import annotations

import collections
from collections.abc import Iterable

import numpy as np

from edgeattn.layers import MultiHeadAttention
from edgeattn.quantized import MulConstant, StaticMultiHeadAttention
from quant.progress import track
from quant.report import Comparison, Report
from quant.trace import float_trace, read_call, static_trace

UNDERFLOW_LIMIT = 0.05  # lint when rows lose more of their probability than this to the fixed 1/256 scale
SATURATION_LIMIT = 0.01  # lint when more of a tensor than this lies outside its range


def compare(layer: MultiHeadAttention, quantized: StaticMultiHeadAttention, batches: Iterable) -> Report:
    """Compare every tensor and every head of ``quantized`` with the float ``layer`` on ``batches``.

    Parameters
    ----------
    layer : MultiHeadAttention
    quantized : StaticMultiHeadAttention
        What ``quantize`` made of it.
    batches : iterable
        As for ``calibrate``; better other data than was calibrated on.

    Returns
    -------
    Report
        SQNR = 10 log10(sum(real**2) / sum((real - dequantized)**2)) in dB, cosine similarity, saturation (the share of
        elements outside the int8 range), by tensor and, for the context, by head. Masked scores do not count.

    Raises
    ------
    TypeError, ValueError
        Layers that do not belong together, no batch, batches that do not fit.
    """
    if not isinstance(layer, MultiHeadAttention):
        raise TypeError(f"layer must be an edgeattn.MultiHeadAttention; got {type(layer).__name__}")
    if not isinstance(quantized, StaticMultiHeadAttention):
        raise TypeError(f"quantized must be a static layer from quant.quantize; got {type(quantized).__name__}")
    for name in ("num_heads", "embed_dim", "kdim", "vdim", "head_dim", "value_dim"):
        if getattr(layer, name) != getattr(quantized, name):
            raise ValueError(f"quantized does not belong to layer: {name} is {getattr(quantized, name)}, "
                             f"the layer's is {getattr(layer, name)}")
    # our layers carry 1/sqrt(D) in the query; other converters multiply the scores by it
    scale, folded = np.float32(layer.scale), not any(isinstance(op, MulConstant) for op in quantized.score_ops)
    factor = collections.defaultdict(lambda: np.float32(1), {"query": scale} if folded else {"scores": 1 / scale})
    tensors: dict[str, Comparison] = {}
    heads = [Comparison() for _ in range(layer.num_heads)]
    underflow = []
    for i, batch in enumerate(track(batches, "comparing")):
        call = read_call(batch, layer.num_heads, f"batches[{i}]")
        if call.sources != quantized.sources:
            raise ValueError(f"batches[{i}] calls the layer with inputs {call.sources}; it was quantized for "
                             f"{quantized.sources}")
        real, codes = float_trace(layer, call), static_trace(quantized, call)
        there = np.ones(real["scores"].shape, bool) if call.permitted is None else call.permitted
        for name, values in real.items():
            kept = (values * factor[name])[there] if name == "scores" else values * factor[name]
            tensors.setdefault(name, Comparison()).update(
                kept, codes[name][there] if name == "scores" else codes[name], quantized.tensors[name])
        for head, comparison in enumerate(heads):
            comparison.update(real["context"][:, head], codes["context"][:, head], quantized.tensors["context"])
        p = real["probabilities"]
        underflow.append(float(np.where(p < 1 / 512, p, 0).sum(-1).mean()))
    if not tensors:
        raise ValueError("batches must hold at least one batch; got none")
    return Report({name: c.result() for name, c in tensors.items()}, [c.result() for c in heads],
                  _lints(tensors, float(np.mean(underflow))))


def _lints(tensors: dict[str, Comparison], underflow: float) -> list[str]:
    """What a reader of the numbers should know."""
    lints = []
    if underflow > UNDERFLOW_LIMIT:
        lints.append(f"probability underflow: rows lose {underflow:.0%} of their probability on average, because int8 "
                     f"probabilities are multiples of 1/256; shorter sequences, or scheme='dynamic', do not")
    for name, comparison in tensors.items():
        saturation = comparison.result().saturation
        if saturation > SATURATION_LIMIT and name != "probabilities":
            lints.append(f"saturation: {saturation:.1%} of {name} lies outside its int8 range; calibrate on data like "
                         f"this")
    return lints
