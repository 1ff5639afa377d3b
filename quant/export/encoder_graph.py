"""Whole encoders as graphs of TFLite operators.

Between the layers there are float32 rows (B, L, E): norms are taken apart (MEAN, SUB, MUL, RSQRT, ...), for no operator
is one, and residuals are ADD. What a static layer computes on codes stands between QUANTIZE and DEQUANTIZE, and equals
the runtime's integers; the weights of a dynamic one are int8, and the runtime quantizes their rows.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.layers import MultiHeadAttention
from edgeattn.layers import attention as layers_attention
from edgeattn.layers.dynamic_linear import DynamicLinear
from edgeattn.layers.positions import refuse_positions
from edgeattn.ops import Sequences
from edgeattn.quantized import DynamicMultiHeadAttention, StaticFeedForward, StaticSelfAttention
from quant.export.attention_graph import (
    FLOAT_VERSIONS,
    FloatTfliteOps,
    Int8TfliteOps,
    check_float,
    check_lengths,
)
from quant.export.feed_forward_graph import FeedForwardOps, check_activation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgeattn.layers import TransformerEncoder
    from edgeattn.quantized import StaticMultiHeadAttention, TensorQuantization
    from edgeattn.tflite_schema import Graph

_VERSIONS = FLOAT_VERSIONS | dict.fromkeys(
    ("MEAN", "SUB", "RSQRT", "LOGISTIC", "RELU", "GELU", "QUANTIZE", "SLICE", "GATHER", "CONCATENATION"), 1) | {
    "DEQUANTIZE": 2}  # the first of int8
_INT8_VERSIONS = {"GATHER": 2, "CONCATENATION": 2, "SLICE": 2}


def encoder_graph(encoder: TransformerEncoder, *, batch: int, sequence_length: int, mask: Any = None) -> Graph:
    """float32 (B, L, E) -> (B, L, E).

    Parameters
    ----------
    encoder : TransformerEncoder
        Of float, dynamic and static halves in any mixture.
    batch, sequence_length : int
        B, L.
    mask : bool array, broadcastable to (B, H, L, L), optional
        True = attend.

    Raises
    ------
    TypeError, ValueError
        Naming the layer that has no such form.
    """
    ops = EncoderTfliteOps(encoder, batch, sequence_length)
    with prepared(encoder, (batch, sequence_length), mask) as sequences:
        x = ops.graph.activation("input", (batch, sequence_length, encoder.embed_dim), np.float32)
        ops.graph.inputs, ops.graph.outputs = [x], [encoder.forward(ops, x, sequences)]
    return ops.graph


@contextlib.contextmanager
def prepared(encoder: TransformerEncoder, shape: tuple[int, int], mask: Any) -> Iterator[list[Sequences]]:
    """What the tokens of each layer see under the mask of a file."""
    with contextlib.ExitStack() as entered:
        try:
            sequences = entered.enter_context(encoder.prepared(shape, attn_mask=mask))
        except ValueError as error:
            raise ValueError(f"{error}; export with the lengths the mask was made for".removeprefix("attn_")) from None
        yield sequences


class EncoderTfliteOps(FloatTfliteOps):
    """`edgeattn.ops.Ops` of whole encoders, upon float32 rows (B, L, features)."""

    def __init__(self, encoder: TransformerEncoder, batch: int, length: int):
        self._shape = batch, length
        super().__init__(check_lengths(encoder.layers[0].attention, (0, 0, 0), batch, length, None))
        self._versions = _VERSIONS
        self._numbers: dict[str, int] = {}

    # -- layers --------------------------------------------------------------------------------------------------------

    def block(self, layer: Any, x: int, sequences: Sequences, name: str) -> int:
        """By the operations of its forward."""
        attention, (mask,) = layer.attention, sequences.masks
        self.lengths = check_lengths(attention, (0, 0, 0), *self._shape, None)
        try:
            if isinstance(attention, (MultiHeadAttention, DynamicMultiHeadAttention)):
                refuse_positions(attention, "a .safetensors or .so holds the encoder whole")
                check_float(attention)
                self.begin(attention, mask.permitted(), f"{name}attention.")
            return layer.forward(self, x, sequences, name)
        except ValueError as error:
            raise ValueError(f"{name.removesuffix('.')}: {error}") from None

    def linear(self, x: int, linear: Any, name: str) -> int:
        """x weight^T + bias."""
        return self._dynamic(x, linear, name) if isinstance(linear, DynamicLinear) else super().linear(x, linear, name)

    def _dynamic(self, x: int, linear: DynamicLinear, name: str) -> int:
        """A hybrid product; inputs that stay float32, and outputs' second codes, are added by a narrow float one."""
        outputs, apart = linear.outputs, linear.outlier_columns
        rest, parts, weights = x, [], []
        if len(apart):
            kept = np.ones(linear.inputs, np.float32)
            kept[apart] = 0
            rest = self._elementwise("MUL", x, self._constant(f"{name}/kept", kept), f"{name}/rest")
            parts.append(self._columns(x, apart, f"{name}/apart"))
            weights.append(linear.outlier_weight)
        y = self.hybrid(rest, linear.codes[:outputs], linear.scale[:outputs], linear.bias, name)
        if len(linear.residual_outputs):
            parts.append(self.hybrid(rest, linear.codes[outputs:], linear.scale[outputs:], None, f"{name}/second"))
            weights.append(_scatter(linear.residual_outputs, outputs))
        if not parts:
            return y
        weight = self._constant(f"{name}/added/weight", np.concatenate(weights, axis=1).astype(np.float32))
        added = self._fully_connected(self._joined(parts, f"{name}/columns"), weight, None, f"{name}/added")
        return self._elementwise("ADD", y, added, f"{name}/sum")

    def static(self, x: int, layer: Any, sequences: Sequences | None, name: str) -> int:
        """A static layer between QUANTIZE and DEQUANTIZE."""
        if isinstance(layer, StaticSelfAttention) and sequences is not None:
            of, (mask,) = layer.attention, sequences.masks
            keep = mask.permitted()
            if keep is not None:
                of = masked(of, keep)
            codes = self._codes(x, of.tensors["query_input"], layer.more_inputs, f"{name}input")
            ops = Int8TfliteOps(self.lengths, of.tensors, self.graph, name)
            return self._reals(layers_attention.forward(ops, of, codes, codes, codes, Sequences([])), f"{name}reals")
        if not isinstance(layer, StaticFeedForward):
            raise TypeError(f"layer must be a StaticSelfAttention or StaticFeedForward; got {type(layer).__name__}")
        check_activation(layer)
        codes = self._codes(x, layer.tensors["input"], layer.more_inputs, f"{name}input")
        y = self._outputs(layer, layer.forward_codes(FeedForwardOps(layer, self.graph, name), codes), name)
        if layer.large is not None:
            y = self.add(y, self.static(x, layer.large, None, f"{name}large."), f"{name}with_large")
        return y

    def _codes(self, x: int, quantization: TensorQuantization, more: tuple[int, ...], name: str) -> int:
        """Codes of rows, those of what their range leaves of some columns behind them."""
        codes = self._quantize(x, quantization, name)
        if not more:
            return codes
        features = self.graph.tensors[x].shape[-1]
        reals, parts, order = x, [codes], list(range(features))
        at = {column: column for column in order}  # where a column stands in `reals` and in the codes of it
        pending = list(enumerate(more, features))
        while pending:
            now = [(column, source) for column, source in pending if source in at]
            sources, step = [at[source] for _, source in now], f"{name}/rest{len(parts)}"
            kept = self._reals(self._columns(parts[-1], sources, f"{step}/codes"), f"{step}/held")
            reals = self._elementwise("SUB", self._columns(reals, sources, f"{step}/columns"), kept, step)
            parts.append(self._quantize(reals, quantization, f"{step}/quantized"))
            order += [column for column, _ in now]
            at = {column: i for i, (column, _) in enumerate(now)}
            pending = [pair for pair in pending if pair not in now]
        codes = self._joined(parts, f"{name}/joined")
        return codes if order == sorted(order) else self._columns(codes, np.argsort(order), f"{name}/ordered")

    def _outputs(self, layer: StaticFeedForward, codes: int, name: str) -> int:
        """The reals of outputs, each with what those behind them add to it."""
        if not layer.more_outputs:
            return self._reals(codes, f"{name}reals")
        quantization, outputs = layer.tensors["linear2"], layer.outputs
        main, more = (self._reals(self._slice(codes, first, size, f"{name}{part}/codes"), f"{name}{part}")
                      for part, first, size in (("reals", 0, outputs), ("more", outputs, len(layer.more_outputs))))
        channels = [channel for channel, _ in layer.more_outputs]
        moved = np.zeros(outputs, np.float32)
        np.subtract.at(moved, channels, quantization.dequantize([none for _, none in layer.more_outputs]))
        weight = self._constant(f"{name}added/weight", _scatter(channels, outputs))
        bias = self._constant(f"{name}added/bias", moved)
        return self.add(main, self._fully_connected(more, weight, bias, f"{name}added"), f"{name}whole")

    # -- operations ----------------------------------------------------------------------------------------------------

    def layer_norm(self, x: int, norm: Any, name: str) -> int:
        """(x - mean) / sqrt(variance + eps) * weight + bias, taken apart."""
        return self._scaled(self._elementwise("SUB", x, self._mean(x, f"{name}/mean"), f"{name}/centred"), norm, name)

    def rms_norm(self, x: int, norm: Any, name: str) -> int:
        """x / sqrt(mean(x^2) + eps) * weight, taken apart."""
        return self._scaled(x, norm, name)

    def _scaled(self, x: int, norm: Any, name: str) -> int:
        variance = self._mean(self._elementwise("MUL", x, x, f"{name}/square"), f"{name}/variance")
        eps = self._constant(f"{name}/eps", np.array(norm.eps, np.float32))
        variance = self._elementwise("ADD", variance, eps, f"{name}/variance_eps")
        shape = self.graph.tensors[variance].shape
        inverse = self._operator("RSQRT", [variance], f"{name}/inverse", shape)
        y = self._elementwise("MUL", x, inverse, f"{name}/normed")
        y = self._elementwise("MUL", y, self._constant(f"{name}/weight", norm.weight), f"{name}/scaled")
        return y if norm.bias is None else self._elementwise("ADD", y, self._constant(f"{name}/bias", norm.bias), name)

    def activation(self, x: int, kind: str, name: str) -> int:
        """GELU, RELU, or MUL and LOGISTIC."""
        shape = self.graph.tensors[x].shape
        if kind in ("gelu", "gelu_tanh"):
            return self._operator("GELU", [x], name, shape, options={"approximate": kind == "gelu_tanh"})
        if kind == "relu":
            return self._operator("RELU", [x], name, shape)
        y = self._operator("LOGISTIC", [x], f"{name}/sigmoid", shape)
        return self._elementwise("MUL", x, y, name) if kind == "silu" else y

    def add(self, a: int, b: int, name: str) -> int:
        """The sum."""
        return self._elementwise("ADD", a, b, name)

    def multiply(self, a: int, b: int, name: str) -> int:
        """The product, element by element."""
        return self._elementwise("MUL", a, b, name)

    def _elementwise(self, operator: str, a: int, b: int, name: str) -> int:
        return self._operator(operator, [a, b], name, self.graph.tensors[a].shape)

    def _mean(self, x: int, name: str) -> int:
        shape = (*self.graph.tensors[x].shape[:-1], 1)
        return self._operator("MEAN", [x, self._indices("last_axis", [2])], name, shape, options={"keep_dims": True})

    def _indices(self, name: str, values: Any) -> int:
        """A constant of int32, once under a name."""
        if name not in self._numbers:
            self._numbers[name] = self._constant(name, np.array(values, np.int32))
        return self._numbers[name]

    def _columns(self, x: int, columns: Any, name: str) -> int:
        return self._moved("GATHER", [x, self._indices(f"{name}/which", columns)], name, len(columns), {"axis": 2})

    def _slice(self, x: int, first: int, size: int, name: str) -> int:
        bounds = [self._indices(f"{name}/{part}", [*lead, value]) for part, lead, value in (
            ("begin", (0, 0), first), ("size", self.graph.tensors[x].shape[:-1], size))]
        return self._moved("SLICE", [x, *bounds], name, size)

    def _joined(self, parts: list[int], name: str) -> int:
        if len(parts) == 1:
            return parts[0]
        width = sum(self.graph.tensors[part].shape[-1] for part in parts)
        return self._moved("CONCATENATION", parts, name, width, {"axis": 2})

    def _moved(self, operator: str, inputs: list[int], name: str, width: int, options: Any = None) -> int:
        """What has the dtype and scale of the first of its inputs."""
        source = self.graph.tensors[inputs[0]]
        quantization = None
        if source.scale is not None:
            quantization = _Quantization(source.scale[0], source.zero_point[0])
        output = self.graph.activation(name, (*source.shape[:-1], width), source.dtype, quantization)
        versions = _VERSIONS if quantization is None else _INT8_VERSIONS
        self.graph.operator(operator, inputs, output, options, versions[operator])
        return output

    def _quantize(self, x: int, quantization: TensorQuantization, name: str) -> int:
        output = self.graph.activation(name, self.graph.tensors[x].shape, np.int8, quantization)
        self.graph.operator("QUANTIZE", [x], output, None, _VERSIONS["QUANTIZE"])
        return output

    def _reals(self, codes: int, name: str) -> int:
        return self._operator("DEQUANTIZE", [codes], name, self.graph.tensors[codes].shape)


def masked(attention: StaticMultiHeadAttention, keep: Any) -> StaticMultiHeadAttention:
    """The attention of a static encoder with a mask of its own."""
    if attention.mask_margin == 0:
        raise ValueError("mask needs attention whose scores leave room below for masked ones: quantize with "
                         "room_for_masks=True, or with attention='float32'")
    return attention.with_mask(keep)


class _Quantization:
    def __init__(self, scale: Any, zero_point: Any):
        self.scale, self.zero_point = scale, zero_point


def _scatter(channels: Any, outputs: int) -> np.ndarray:
    """(outputs, columns): each column is added to the channel that it has."""
    weight = np.zeros((outputs, len(channels)), np.float32)
    weight[channels, np.arange(len(channels))] = 1
    return weight
