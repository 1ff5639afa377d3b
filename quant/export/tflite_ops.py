"""Executors whose operations are TFLite operators of a graph, and attention upon codes.

The form is one that all runtimes in quant.runtimes take and compute alike (tried operator by operator in
each):

- Projections are FULLY_CONNECTED version 5 with keep_num_dims on (B, L, E): no reshape around them.
- Several heads are split by RESHAPE and TRANSPOSE to (B, H, L, D); one head needs neither and stays (B, L,
  D).
- BATCH_MATMUL takes K as it lies, with adj_y, so K needs no second transpose.
- 1/sqrt(D) is folded into the query projection: no MUL of the scores.
- A mask is SELECT_V2 with a constant condition of the scores' rank and a scalar fill. Every runtime
  broadcasts it in all four axes, and unlike ADD it leaves the scores' range to the scores.
- Operators carry the lowest version that knows their int8 form; the float graph, version 1 where that
  suffices.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np

from edgeattn.arithmetic import CODE_MIN
from edgeattn.executors.unfused import attend
from edgeattn.ops import Ops
from edgeattn.quantized import (
    INPUTS,
    AddMask,
    MulConstant,
    Requantize,
    SelectMask,
)
from edgeattn.quantized.score_ops import SCORE_OPS
from edgeattn.tflite_schema import Graph

FULLY_CONNECTED_VERSION = 5  # the first with keep_num_dims
HYBRID_VERSION = 12  # of FULLY_CONNECTED: the first with float rows and int8 weights of a scale for each channel
INT8_VERSIONS = {
    "FULLY_CONNECTED": FULLY_CONNECTED_VERSION,
    "ADD": 2,
    "MUL": 2,
    "QUANTIZE": 1,
    "BATCH_MATMUL": 2,
    "SOFTMAX": 2,
    "TRANSPOSE": 2,
    "RESHAPE": 1,
    "SELECT_V2": 1,
    "NOT_EQUAL": 1,
}
MOVED_INT8_VERSIONS = {"GATHER": 2, "CONCATENATION": 2, "SLICE": 2}
FLOAT_VERSIONS = dict.fromkeys((*INT8_VERSIONS, "CONCATENATION", "MEAN", "SUB", "RSQRT", "SLICE"), 1) | {
    "FULLY_CONNECTED": FULLY_CONNECTED_VERSION}
# exp(MASKED_SCORE - any real score) is 0 in float32, and unlike -inf a row full of it gives no NaN.
MASKED_SCORE = np.float32(-1e30)


@dataclass(frozen=True)
class Lengths:
    """B, H, L, S and the two head sizes of one exported graph."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int

    @property
    def scores(self) -> tuple[int, ...]:
        """Shape of the scores in the layer, (B, H, L, S), whatever rank the graph gives them."""
        return (self.batch, self.heads, self.queries, self.keys)


class TfliteOps(Ops[int]):
    """`edgeattn.ops.Ops` that writes a graph: what it hands on are the numbers of tensors.

    Parameters
    ----------
    lengths : Lengths
    tensors : mapping of str to TensorQuantization
        By the names of tensors; empty for a graph in float32.
    graph : Graph, optional
        What is written to; one of its own unless given.
    prefix : str
        Before the names that the graph's tensors get.
    """

    def __init__(self, lengths: Lengths, tensors, graph: Graph | None = None, prefix: str = ""):
        self.graph = Graph() if graph is None else graph
        self.prefix = prefix
        self.lengths = lengths
        self.tensors = tensors
        self.dtype = np.dtype(np.int8 if tensors else np.float32)
        self._versions = INT8_VERSIONS if tensors else FLOAT_VERSIONS
        self.padding: dict[int, int] | None = None  # by the rank of scores: which keys are tokens, as `padded` takes it
        self._heads_first = None  # the permutation (B, L, H, D) <-> (B, H, L, D), made when first needed

    def inputs(self, sources, widths) -> list[int]:
        """One graph input per distinct source; returns the tensor that feeds each of the three projections."""
        inputs: list[int] = []
        for role, source in enumerate(sources):
            if source == len(inputs):
                length = self.lengths.queries if source == 0 else self.lengths.keys
                name = "input" if max(sources) == 0 else f"{INPUTS[source]}_input"
                inputs.append(self.graph.activation(name, (self.lengths.batch, length, widths[role]), self.dtype,
                                                    self.tensors.get(f"{INPUTS[source]}_input")))
        self.graph.inputs = inputs
        return [inputs[source] for source in sources]

    def attention(self, q: int, k: int, v: int, layer, sequences, name: str) -> int:
        """The heads side by side; one head is left alone."""
        q, k, v = map(self.split_heads, (q, k, v))
        return self.merge_heads(attend(self, q, k, v, layer, sequences, name))

    def scores(self, q: int, k: int, layer, name: str) -> int:
        """q k^T: the scale lies in q."""
        return self._batch_matmul(q, k, name, self.lengths.keys, adj_y=True)

    def softmax(self, scores: int, name: str) -> int:
        """Over the keys."""
        return self._operator("SOFTMAX", [scores], name, self.graph.tensors[scores].shape, options={"beta": 1.0})

    def context(self, probabilities: int, v: int, name: str) -> int:
        """Probabilities v."""
        return self._batch_matmul(probabilities, v, name, self.lengths.value_dim, adj_y=False)

    def split_heads(self, x: int) -> int:
        """(B, L, H*D) -> (B, H, L, D); one head is left alone, and what is split already."""
        tensor, B, H = self.graph.tensors[x], self.lengths.batch, self.lengths.heads
        if H == 1 or len(tensor.shape) == 4:
            return x
        _, length, width = tensor.shape
        name = tensor.name.removeprefix(self.prefix)
        split = self._reshape(x, f"{name}/split", (B, length, H, width // H))
        return self._transpose_heads(split, f"{name}/heads")

    def merge_heads(self, x: int) -> int:
        """(B, H, L, Dv) -> (B, L, H*Dv); one head is left alone."""
        if self.lengths.heads == 1:
            return x
        tensor = self.graph.tensors[x]
        (B, H, L, width), name = tensor.shape, tensor.name.removeprefix(self.prefix)
        return self._reshape(self._transpose_heads(x, f"{name}/heads"), f"{name}/merged", (B, L, H * width))

    def _fully_connected(self, x: int, weight: int, bias: int | None, name: str) -> int:
        shape = (*self.graph.tensors[x].shape[:-1], self.graph.tensors[weight].shape[0])
        operands = [x, weight] if bias is None else [x, weight, bias]
        return self._operator("FULLY_CONNECTED", operands, name, shape, options={"keep_num_dims": True})

    def _batch_matmul(self, lhs: int, rhs: int, name: str, columns: int, *, adj_y: bool) -> int:
        shape = (*self.graph.tensors[lhs].shape[:-1], columns)
        return self._operator("BATCH_MATMUL", [lhs, rhs], name, shape, options={"adj_x": False, "adj_y": adj_y})

    def _reshape(self, x: int, name: str, shape) -> int:
        target = np.array(shape, np.int32)
        constant = self._constant(f"{name}/shape", target)
        return self._operator("RESHAPE", [x, constant], name, shape, options={"new_shape": target})

    def _transpose_heads(self, x: int, name: str) -> int:
        if self._heads_first is None:
            self._heads_first = self._constant("heads_first", np.array([0, 2, 1, 3], np.int32))
        shape = [self.graph.tensors[x].shape[axis] for axis in (0, 2, 1, 3)]
        return self._operator("TRANSPOSE", [x, self._heads_first], name, shape)

    def _operator(self, operator: str, inputs: list[int], name: str, shape, quantization=None, options=None) -> int:
        # what is only moved, "query/split", is quantized as "query" is
        quantization = quantization or self.tensors.get(name.partition("/")[0])
        output = self.graph.activation(self.prefix + name, shape, self.dtype, quantization)
        self.graph.operator(operator, inputs, output, options, self._versions[operator])
        return output

    def _constant(self, name: str, values: np.ndarray, quantization=None, *, channel_scale=None) -> int:
        return self.graph.constant(self.prefix + name, values, quantization, channel_scale=channel_scale)

    def _mask_constant(self, name: str, values: np.ndarray, what: str, quantization=None) -> int:
        """A constant of the scores' rank, from ``values`` that broadcast to (B, H, L, S)."""
        return self._constant(name, mask_to_graph_rank(values, self.lengths.scores, what), quantization)


class Int8TfliteOps(TfliteOps):
    """Of a static layer: int8 (B, L, E) in, int8 (B, L, output width) out."""

    def linear(self, x: int, linear, name: str) -> int:
        """x weight^T + bias; heads are split right behind it."""
        weight = self._constant(f"{name}/weight", linear.weight, channel_scale=linear.scale)
        bias = None
        if linear.bias is not None:
            input_scale = self.graph.tensors[x].scale
            bias = self._constant(f"{name}/bias", linear.bias, channel_scale=input_scale * linear.scale)
        y = self._fully_connected(x, weight, bias, name)
        return self.split_heads(y) if name in INPUTS else y

    def attention(self, q: int, k: int, v: int, layer, sequences, name: str) -> int:
        """The heads side by side, after the layer's ``query_ops`` and ``key_ops``."""
        for number, op in enumerate(layer.query_ops):
            q = self._scaled(q, op, f"query/{number}")
        for number, op in enumerate(layer.key_ops):
            k = self._scaled(k, op, f"key/{number}")
        return super().attention(q, k, v, layer, sequences, name)

    def _scaled(self, x: int, op: MulConstant, name: str) -> int:
        constant = self._constant(f"{name}/constant", np.array(op.code, np.int8), op.constant)
        return self._operator("MUL", [x, constant], f"{name}/scaled", self.graph.tensors[x].shape, op.output)

    def masked(self, scores: int, layer, mask, name: str) -> int:
        """The layer's ``score_ops``, elementwise operators."""
        shape, quantization = self.graph.tensors[scores].shape, self.tensors["scores"]
        for number, op in enumerate(layer.score_ops):
            name = f"scores/{number}"
            if isinstance(op, MulConstant):
                scores, quantization = self._scaled(scores, op, name), op.output
            elif isinstance(op, AddMask):
                added = self._mask_constant(f"{name}/mask", op.codes, "mask of the layer's AddMask", op.mask)
                quantization = op.output
                scores = self._operator("ADD", [scores, added], f"{name}/masked", shape, quantization)
            elif isinstance(op, SelectMask):
                keep = self._mask_constant(f"{name}/keep", op.keep, "mask of the layer's SelectMask")
                fill = self._constant(f"{name}/fill", np.array(op.fill, np.int8), quantization)
                scores = self._operator("SELECT_V2", [keep, scores, fill], f"{name}/masked", shape, quantization)
            elif isinstance(op, Requantize):
                quantization = op.output
                scores = self._operator("QUANTIZE", [scores], f"{name}/codes", shape, quantization)
            else:
                raise TypeError(f"score_ops must be {', '.join(SCORE_OPS)}; got {type(op).__name__}")
        return self.padded(scores, quantization)

    def padded(self, scores: int, quantization) -> int:
        """The codes of scores, those of padding the lowest; `padding` is true for tokens."""
        if self.padding is None:
            return scores
        filling = self._constant("scores/padding", np.array(CODE_MIN, np.int8), quantization)
        shape = self.graph.tensors[scores].shape
        return self._operator("SELECT_V2", [self.padding[len(shape)], scores, filling], "scores/tokens", shape,
                              quantization)


def mask_to_graph_rank(values: np.ndarray, scores: tuple[int, ...], what: str) -> np.ndarray:
    """``values``, broadcastable to ``scores`` = (B, H, L, S), with the scores' rank in the graph: 4, or 3 for
    one head.

    Raises
    ------
    ValueError
        When they do not broadcast; the message calls them ``what``.
    """
    try:
        fits = np.broadcast_shapes(values.shape, scores) == scores
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{what} must broadcast to (B, H, L, S) = {scores}; got shape {values.shape}; "
                         "export with the lengths the mask was made for")
    values = values.reshape((1,) * (4 - values.ndim) + values.shape)
    return values[:, 0] if scores[1] == 1 else values


def check_lengths(layer, sources, batch, sequence_length, key_length) -> Lengths:
    """B, H, L, S and the head sizes of an export; refuses lengths that are not positive or do not fit the inputs."""
    sizes = {"batch": batch, "sequence_length": sequence_length,
             "key_length": sequence_length if key_length is None else key_length}
    for name, value in sizes.items():
        try:
            sizes[name] = operator.index(value)
        except TypeError:
            raise TypeError(
                f"{name} must be an integer; got {type(value).__name__}: a .tflite graph has fixed lengths"
            ) from None
        if not 1 <= sizes[name] < 2**31:
            raise ValueError(f"{name} must be at least 1 and fit int32; got {value}")
    if sources[1] == sources[0] and sizes["key_length"] != sizes["sequence_length"]:
        raise ValueError(
            "key_length must be left out or equal sequence_length where keys and queries are one input; "
            f"got {sizes['key_length']} and {sizes['sequence_length']}"
        )
    return Lengths(sizes["batch"], layer.num_heads, sizes["sequence_length"], sizes["key_length"],
                    layer.head_dim, layer.value_dim)
