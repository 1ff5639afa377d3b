"""Whole encoders as graphs of TFLite operators.

Between the layers there are float32 rows (B, L, E): norms are taken apart (MEAN, SUB, MUL, RSQRT, ...), for no operator
is one, and residuals are ADD. What a static layer computes on codes stands between QUANTIZE and DEQUANTIZE, and equals
the runtime's integers; the weights of a dynamic one are int8, and the runtime quantizes their rows.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.layers import MultiHeadAttention
from edgeattn.quantized import DynamicMultiHeadAttention, StaticFeedForward
from quant.export.feed_forward_graph import FeedForwardOps, check_activation
from quant.export.static_rows import PADDING, StaticBetweenRows, prepared, scatter
from quant.export.tflite_float_ops import FloatTfliteOps, check_float
from quant.export.tflite_ops import FLOAT_VERSIONS, MASKED_SCORE, Int8TfliteOps, check_lengths

if TYPE_CHECKING:
    from edgeattn.layers import TransformerEncoder
    from edgeattn.ops import Ops, Sequences
    from edgeattn.quantized import TensorQuantization
    from edgeattn.tflite_schema import Graph

_VERSIONS = FLOAT_VERSIONS | dict.fromkeys(("LOGISTIC", "RELU", "GELU", "QUANTIZE", "GATHER"), 1) | {
    "DEQUANTIZE": 2}  # the first of int8


def encoder_graph(encoder: TransformerEncoder, *, batch: int, sequence_length: int, mask: Any = None,
                  padding: bool = False) -> Graph:
    """float32 (B, L, E) -> (B, L, E).

    Parameters
    ----------
    encoder : TransformerEncoder
        Of float, dynamic and static halves in any mixture.
    batch, sequence_length : int
        B, L.
    mask : bool array, broadcastable to (B, H, L, L), optional
        True = attend.
    padding : bool
        Whether there is an input for what is padding, int32 (B, L).

    Raises
    ------
    TypeError, ValueError
        Naming the layer that has no such form.
    """
    ops = EncoderTfliteOps(encoder, batch, sequence_length)
    with prepared(encoder, (batch, sequence_length), mask) as sequences:
        x = ops.graph.activation("input", (batch, sequence_length, encoder.embed_dim), np.float32)
        ops.graph.inputs = [x, ops.tokens(encoder)] if padding else [x]
        result = encoder.forward(ops, x, sequences)
    ops.graph.outputs = [result]
    ops.graph.tensors[result] = dataclasses.replace(ops.graph.tensors[result], name="output")  # as a layer's is named
    return ops.graph


class EncoderTfliteOps(StaticBetweenRows[int], FloatTfliteOps):
    """`edgeattn.ops.Ops` of whole encoders, upon float32 rows (B, L, features)."""

    def __init__(self, encoder: TransformerEncoder, batch: int, length: int):
        self._shape = batch, length
        super().__init__(check_lengths(encoder.layers[0].attention, (0, 0, 0), batch, length, None))
        self._versions = _VERSIONS
        self._tokens: dict[int, int] | None = None  # bool, by the rank of scores: which keys are tokens

    def tokens(self, encoder: TransformerEncoder) -> int:
        """The input that says which tokens are none."""
        batch, length = self._shape
        given, none = self.graph.activation(PADDING, (batch, length), np.int32), np.array(0, np.int32)
        self.padding, self._tokens = {}, {}
        ranks: dict[int, list[Any]] = {}
        for layer in encoder.layers:
            ranks.setdefault(3 if layer.attention.num_heads == 1 else 4, []).append(layer)
        for rank, layers in sorted(ranks.items()):
            shape = (batch, *[1] * (rank - 2), length)
            name, target = f"{PADDING}/{rank}", np.array(shape, np.int32)
            keys = self.graph.activation(f"{name}/keys", shape, np.int32)
            self.graph.operator("RESHAPE", [given, self._constant(f"{name}/shape", target)], keys,
                                {"new_shape": target})
            self._tokens[rank] = self.graph.activation(f"{name}/tokens", shape, np.bool_)
            self.graph.operator("NOT_EQUAL", [keys, self._constant(f"{name}/none", none)], self._tokens[rank])
            if any(isinstance(layer.attention, (MultiHeadAttention, DynamicMultiHeadAttention)) for layer in layers):
                added = (self._constant(f"{name}/{part}", value) for part, value in (
                    ("unchanged", np.zeros(1, np.float32)), ("masked", np.full(1, MASKED_SCORE))))
                self.padding[rank] = self._operator("SELECT_V2", [self._tokens[rank], *added], f"{name}/added", shape)
        return given

    # -- layers --------------------------------------------------------------------------------------------------------

    def block(self, layer: Any, x: int, sequences: Sequences, name: str) -> int:
        """By the operations of its forward."""
        attention, (mask,) = layer.attention, sequences.masks
        self.lengths = check_lengths(attention, (0, 0, 0), *self._shape, None)
        try:
            if isinstance(attention, (MultiHeadAttention, DynamicMultiHeadAttention)):
                check_float(attention)
                self.begin(attention, mask.permitted(), f"{name}attention.", mask.bias)
            return layer.forward(self, x, sequences, name)
        except ValueError as error:
            raise ValueError(f"{name.removesuffix('.')}: {error}") from None

    def codes_ops(self, layer: Any, name: str) -> Ops[int]:
        """The executor of a static layer's own operations."""
        if isinstance(layer, StaticFeedForward):
            check_activation(layer)
            return FeedForwardOps(layer, self.graph, name)
        ops = Int8TfliteOps(self.lengths, layer.tensors, self.graph, name)
        ops.padding = self._tokens
        return ops

    # -- operations ----------------------------------------------------------------------------------------------------

    def activation(self, x: int, kind: str, name: str) -> int:
        """GELU, RELU, or MUL and LOGISTIC."""
        shape = self.graph.tensors[x].shape
        if kind in ("gelu", "gelu_tanh"):
            return self._operator("GELU", [x], name, shape, options={"approximate": kind == "gelu_tanh"})
        if kind == "relu":
            return self._operator("RELU", [x], name, shape)
        y = self._operator("LOGISTIC", [x], f"{name}/sigmoid", shape)
        return self._elementwise("MUL", x, y, name) if kind == "silu" else y

    def columns(self, x: int, columns: Any, name: str) -> int:
        """Some columns of rows or codes; of rows by a product with ones and zeros, for a delegate takes no GATHER."""
        source = self.graph.tensors[x]
        if source.scale is None:
            return self.narrow(x, scatter(columns, source.shape[-1]).T, None, name)
        return self._moved("GATHER", [x, self._indices(f"{name}/which", columns)], name, len(columns), {"axis": 2})

    def quantized(self, x: int, quantization: TensorQuantization, name: str) -> int:
        """Codes of rows."""
        output = self.graph.activation(name, self.graph.tensors[x].shape, np.int8, quantization)
        self.graph.operator("QUANTIZE", [x], output, None, _VERSIONS["QUANTIZE"])
        return output

    def reals(self, codes: int, name: str) -> int:
        """The rows that codes stand for."""
        return self._operator("DEQUANTIZE", [codes], name, self.graph.tensors[codes].shape)
