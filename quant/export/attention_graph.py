"""Attention layers as graphs of TFLite operators."""

from __future__ import annotations

import numpy as np

from edgeattn.layers.attention import forward
from edgeattn.ops import Sequences
from edgeattn.quantized import StaticMultiHeadAttention
from edgeattn.tflite_schema import Graph
from quant.export.tflite_float_ops import FloatTfliteOps, check_float
from quant.export.tflite_ops import Int8TfliteOps, TfliteOps, check_lengths


def attention_graph(layer, *, batch: int, sequence_length: int, key_length: int | None = None, mask=None) -> Graph:
    """The graph of a layer: int8 of a static one, its ``score_ops`` included, float32, or hybrid of a dynamic one.

    Parameters
    ----------
    layer : StaticMultiHeadAttention, MultiHeadAttention or DynamicMultiHeadAttention
    batch, sequence_length, key_length : int
        B, L, S; S is L by default.
    mask : bool array, broadcastable to (B, H, L, S), optional
        True = attend. For a float or dynamic layer also float32 numbers that are added to the scores.

    Returns
    -------
    Graph
        Inputs in the order query, key, value, as many as the layer tells apart: a float layer attends to itself where
        the widths are equal and ``key_length`` is not given.
    """
    widths = (layer.embed_dim, layer.kdim, layer.vdim)
    if isinstance(layer, StaticMultiHeadAttention):
        layer, sources = layer if mask is None else layer.with_mask(np.asarray(mask)), layer.sources
        ops: TfliteOps = Int8TfliteOps(check_lengths(layer, sources, batch, sequence_length, key_length), layer.tensors)
    else:
        check_float(layer)
        sources = (0, 0, 0) if widths[0] == widths[1] and key_length is None else (0, 1, 1)
        if widths[1] != widths[2]:
            sources = (0, 1, 2)
        ops = FloatTfliteOps(check_lengths(layer, sources, batch, sequence_length, key_length))
        ops.begin(layer, mask)
    ops.graph.outputs = [forward(ops, layer, *ops.inputs(sources, widths), Sequences([]))]
    return ops.graph
