"""Attention layers as graphs of TFLite operators.

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
from typing import Any

import numpy as np

from edgeattn.arithmetic import CODE_MIN
from edgeattn.executors.unfused import attend
from edgeattn.layers import Linear
from edgeattn.layers.attention import forward
from edgeattn.layers.dynamic_linear import DynamicLinear
from edgeattn.layers.norm import LayerNorm
from edgeattn.ops import Ops, Sequences
from edgeattn.quantized import (
    INPUTS,
    AddMask,
    MulConstant,
    QuantizedLinear,
    SelectMask,
    StaticMultiHeadAttention,
    TensorQuantization,
)
from edgeattn.tflite_schema import Graph
from quant.export.head_positions import HeadPositions, added_scores, tables
from quant.export.static_rows import scatter
from quant.models import SPLIT

FULLY_CONNECTED_VERSION = 5  # the first with keep_num_dims
HYBRID_VERSION = 12  # of FULLY_CONNECTED: the first with float rows and int8 weights of a scale for each channel
INT8_VERSIONS = {
    "FULLY_CONNECTED": FULLY_CONNECTED_VERSION,
    "ADD": 2,
    "MUL": 2,
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
class _Lengths:
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
    lengths : _Lengths
    tensors : mapping of str to TensorQuantization
        By the names of tensors; empty for a graph in float32.
    graph : Graph, optional
        What is written to; one of its own unless given.
    prefix : str
        Before the names that the graph's tensors get.
    """

    def __init__(self, lengths: _Lengths, tensors, graph: Graph | None = None, prefix: str = ""):
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
            else:
                raise TypeError(f"score_ops must be MulConstant, AddMask or SelectMask; got {type(op).__name__}")
        return self.padded(scores, quantization)

    def padded(self, scores: int, quantization) -> int:
        """The codes of scores, those of padding the lowest; `padding` is true for tokens."""
        if self.padding is None:
            return scores
        filling = self._constant("scores/padding", np.array(CODE_MIN, np.int8), quantization)
        shape = self.graph.tensors[scores].shape
        return self._operator("SELECT_V2", [self.padding[len(shape)], scores, filling], "scores/tokens", shape,
                              quantization)


class FloatTfliteOps(HeadPositions[int], TfliteOps):
    """Of a float layer: float32 (B, L, E) in, float32 (B, L, output width) out. Weights in int8 make hybrid products,
    whose rows the runtime quantizes.

    1/sqrt(D) is multiplied into the query weights, or into those of the queries' norm, key and value heads shared by
    several query heads are repeated, and features that a rotary embedding turns as neighbours lie as halves.
    """

    def __init__(self, lengths: _Lengths, graph: Graph | None = None):
        super().__init__(lengths, {}, graph)
        self._factor: dict[str, np.float32] = {}
        self._shared: dict[str, tuple[int, int]] = {}
        self._order: dict[str, tuple[int, np.ndarray]] = {}
        self._mask: np.ndarray | None = None
        self._added: np.ndarray | None = None
        self._apart: dict[tuple[int, ...], tuple[int, int]] = {}
        self._numbers: dict[str, int] = {}

    def begin(self, layer, mask, name: str = "", added: np.ndarray | None = None) -> None:
        """What `forward` of a layer, whose names begin with `name`, is about to find.

        A mask of bool says which keys are seen, and numbers, in it or in `added`, are added to the scores.
        """
        self._factor = {} if layer.q_norm is not None else {f"{name}query": np.float32(layer.scale)}
        heads = {"query": layer.num_heads, "key": layer.num_kv_heads}
        order = _as_halves(layer)
        self._order = {} if order is None else {f"{name}{part}": (count, order) for part, count in heads.items()}
        repeats = layer.num_heads // layer.num_kv_heads
        self._shared = dict.fromkeys((f"{name}key", f"{name}value"), (layer.num_kv_heads, repeats))
        mask = None if mask is None else np.asarray(mask)
        if mask is not None and mask.dtype not in (np.bool_, np.float32):
            raise TypeError(f"mask must be bool (True = attend) or float32 (added to the scores); got {mask.dtype}")
        self._mask = mask if mask is not None and mask.dtype == np.bool_ else None
        if mask is not None and mask.dtype == np.float32 and added is None:
            added = mask
        if added is not None:
            mask_to_graph_rank(added, self.lengths.scores, "mask")
            if np.isnan(added).any():
                raise ValueError("mask must hold no NaN")
        self._added = added_scores(layer, added, self.lengths.queries, self.lengths.keys)

    def attention(self, q: int, k: int, v: int, layer, sequences, name: str) -> int:
        """The heads side by side, normed and turned first."""
        q, k, v = map(self.split_heads, (q, k, v))
        q, k = self.placed(q, k, layer, name)
        return self.merge_heads(attend(self, q, k, v, layer, sequences, name))

    def norm_of_heads(self, norm, layer, part: str):
        """With the scale of the scores, where it is that of the queries; of features that lie as halves."""
        weights = [None if array is None else array * np.float32(layer.scale if part == "query" else 1)
                   for array in (norm.weight, norm.bias)]
        order = _as_halves(layer)
        if order is not None:
            weights = [None if array is None else array[order] for array in weights]
        return type(norm)(weights[0], weights[1], norm.eps) if isinstance(norm, LayerNorm) else type(norm)(
            weights[0], norm.eps)

    def pair(self, x: int, rotary, name: str) -> tuple[int, int]:
        """Both halves of what is turned."""
        half = rotary.rotary_embedding_dim // 2
        return self.part(x, 0, half, f"{name}/first"), self.part(x, half, half, f"{name}/second")

    def angles(self, rotary, part: str, name: str) -> tuple[int, int]:
        """Cosines and sines, constants."""
        cos, sin = tables(rotary, self.lengths.queries if part == "query" else self.lengths.keys)
        return self._constant(f"{name}/cos", cos), self._constant(f"{name}/sin", sin)

    def linear(self, x: int, linear, name: str) -> int:
        """x weight^T + bias."""
        if isinstance(linear, DynamicLinear):
            return self._dynamic(x, linear, name)
        quantized = linear.weight
        if isinstance(quantized, QuantizedLinear):  # a Projection of a dynamic layer
            return self.hybrid(x, quantized.weight, quantized.scale, linear.bias, name)
        constants = [None if array is None else self._constant(f"{name}/{part}", self._folded(name, array))
                     for part, array in (("weight", linear.weight), ("bias", linear.bias))]
        return self._fully_connected(x, *constants, name)

    def hybrid(self, x: int, codes: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, name: str) -> int:
        """x (codes * scale)^T + bias, of rows that the runtime quantizes by ranges of their own."""
        codes = self._repeated(name, codes)
        operands = [x, self._constant(f"{name}/weight", codes, channel_scale=self._folded(name, scale))]
        if bias is not None:
            operands.append(self._constant(f"{name}/bias", self._folded(name, bias)))
        output = self.graph.activation(name, (*self.graph.tensors[x].shape[:-1], len(codes)), np.float32)
        options = {"keep_num_dims": True, "asymmetric_quantize_inputs": True}
        self.graph.operator("FULLY_CONNECTED", operands, output, options, HYBRID_VERSION)
        return output

    def _dynamic(self, x: int, linear: DynamicLinear, name: str) -> int:
        """A hybrid product; inputs that stay float32, and outputs' second codes, are added by a narrow float one."""
        if name.endswith("linear2"):
            linear = _all_in_codes(linear)
        outputs, apart = linear.outputs, linear.outlier_columns
        rest, parts, weights = x, [], []
        if len(apart):
            rest, chosen = self._set_apart(x, apart, name)
            parts.append(chosen)
            weights.append(self._folded(name, linear.outlier_weight))
        y = self.hybrid(rest, linear.codes[:outputs], linear.scale[:outputs], linear.bias, name)
        if len(linear.residual_outputs):
            parts.append(self.hybrid(rest, linear.codes[outputs:], linear.scale[outputs:], None, f"{name}/second"))
            weights.append(scatter(linear.residual_outputs, outputs))
        if not parts:
            return y
        weight = np.concatenate(weights, axis=1).astype(np.float32)
        added = self.narrow(self.joined(parts, f"{name}/columns"), weight, None, f"{name}/added")
        return self._elementwise("ADD", y, added, f"{name}/sum")

    def _set_apart(self, x: int, columns: np.ndarray, name: str) -> tuple[int, int]:
        """Rows without some of their columns, and those; once for queries, keys and values, or a gate."""
        key = (x, *columns.tolist())
        if key not in self._apart:
            width = self.graph.tensors[x].shape[-1]
            kept = np.ones(width, np.float32)
            kept[columns] = 0
            rest = self._elementwise("MUL", x, self._constant(f"{name}/kept", kept), f"{name}/rest")
            self._apart[key] = rest, self.narrow(x, scatter(columns, width).T, None, f"{name}/apart")
        return self._apart[key]

    def narrow(self, x: int, weight: np.ndarray, bias: np.ndarray | None, name: str) -> int:
        """A float product of a few columns."""
        constants = [None if array is None else self._constant(f"{name}/{part}", array)
                     for part, array in (("weight", weight), ("bias", bias))]
        return self._fully_connected(x, *constants, name)

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
        if (norm.weight != 1).any():
            y = self._elementwise("MUL", y, self._constant(f"{name}/weight", norm.weight), f"{name}/scaled")
        if norm.bias is not None and norm.bias.any():
            y = self._elementwise("ADD", y, self._constant(f"{name}/bias", norm.bias), name)
        return y

    def add(self, a: int, b: int, name: str) -> int:
        """The sum."""
        return self._elementwise("ADD", a, b, name)

    def multiply(self, a: int, b: int, name: str) -> int:
        """The product, element by element."""
        return self._elementwise("MUL", a, b, name)

    def subtract(self, a: int, b: int, name: str) -> int:
        """The difference."""
        return self._elementwise("SUB", a, b, name)

    def _mean(self, x: int, name: str) -> int:
        shape = (*self.graph.tensors[x].shape[:-1], 1)
        last = len(shape) - 1
        axis = self._indices("last_axis" if last == 2 else f"axis_{last}", [last])
        return self._operator("MEAN", [x, axis], name, shape, options={"keep_dims": True})

    def _indices(self, name: str, values: Any) -> int:
        """A constant of int32, once under a name."""
        if name not in self._numbers:
            self._numbers[name] = self._constant(name, np.array(values, np.int32))
        return self._numbers[name]

    def _elementwise(self, operator: str, a: int, b: int, name: str) -> int:
        return self._operator(operator, [a, b], name, self.graph.tensors[a].shape)

    def part(self, x: int, first: int, size: int, name: str) -> int:
        """Columns beside each other."""
        bounds = [self._indices(f"{name}/{part}", [*lead, value]) for part, lead, value in (
            ("begin", [0] * (len(self.graph.tensors[x].shape) - 1), first),
            ("size", self.graph.tensors[x].shape[:-1], size))]
        return self._moved("SLICE", [x, *bounds], name, size)

    def joined(self, parts: list[int], name: str) -> int:
        """Rows or codes side by side."""
        if len(parts) == 1:
            return parts[0]
        width = sum(self.graph.tensors[part].shape[-1] for part in parts)
        return self._moved("CONCATENATION", parts, name, width, {"axis": len(self.graph.tensors[parts[0]].shape) - 1})

    def _moved(self, operator: str, inputs: list[int], name: str, width: int, options=None) -> int:
        """What has the dtype and scale of the first of its inputs."""
        source = self.graph.tensors[inputs[0]]
        quantization = None
        if source.scale is not None:
            quantization = TensorQuantization(source.scale[0], source.zero_point[0])
        output = self.graph.activation(name, (*source.shape[:-1], width), source.dtype, quantization)
        versions = self._versions if quantization is None else MOVED_INT8_VERSIONS
        self.graph.operator(operator, inputs, output, options, versions[operator])
        return output

    def _repeated(self, name: str, array: np.ndarray) -> np.ndarray:
        if name in self._order:
            heads, order = self._order[name]
            array = array.reshape(heads, -1, *array.shape[1:])[:, order].reshape(array.shape)
        heads, repeats = self._shared.get(name, (1, 1))
        if repeats > 1:
            array = np.repeat(array.reshape(heads, -1, *array.shape[1:]), repeats, axis=0).reshape(
                -1, *array.shape[1:])
        return array

    def _folded(self, name: str, array: np.ndarray) -> np.ndarray:
        array = self._repeated(name, array)
        return array * self._factor[name] if name in self._factor else array

    def padded(self, scores: int) -> int:
        """The scores, those of padding MASKED_SCORE: what `padding` adds to them, and takes them up in rounding.

        Unlike SELECT_V2 ADD is an operator of XNNPACK's, which computes the layers without a stop.
        """
        if self.padding is None:
            return scores
        tensor = self.graph.tensors[scores]
        return self._elementwise("ADD", scores, self.padding[len(tensor.shape)], f"{tensor.name}/tokens")

    def masked(self, scores: int, layer, mask, name: str) -> int:
        """The mask that the file shall hold, and the padding that it is given."""
        name, shape = self.graph.tensors[scores].name, self.graph.tensors[scores].shape
        if self._added is not None:
            added = self._mask_constant(f"{name}/mask", np.maximum(self._added, MASKED_SCORE), "mask")
            scores = self._operator("ADD", [scores, added], f"{name}/added", shape)
        scores = self.padded(scores)
        if self._mask is None:
            return scores
        name = self.graph.tensors[scores].name
        keep = self._mask_constant(f"{name}/keep", self._mask, "mask")
        fill = self._constant(f"{name}/fill", np.array(MASKED_SCORE))
        return self._operator("SELECT_V2", [keep, scores, fill], f"{name}/masked", shape)


def _all_in_codes(linear: DynamicLinear) -> DynamicLinear:
    """The layer without inputs that stay float32: hidden features have none so large that a file gains by them."""
    if not len(linear.outlier_columns):
        return linear
    weight = linear.codes * linear.scale[:, None]
    np.add.at(weight, linear.residual_outputs, weight[linear.outputs:])
    weight = weight[:linear.outputs]
    weight[:, linear.outlier_columns] = linear.outlier_weight
    split = SPLIT if len(linear.residual_outputs) else None
    return DynamicLinear.quantized_from(Linear(weight, linear.bias), split=split)


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


def _as_halves(layer) -> np.ndarray | None:
    """Where each feature of a head comes from, so that neighbours which are turned together lie as halves."""
    if layer.rotary is None or not layer.rotary.interleaved:
        return None
    turned = layer.rotary.rotary_embedding_dim
    return np.concatenate([np.arange(0, turned, 2), np.arange(1, turned, 2), np.arange(turned, layer.head_dim)])


def check_float(layer) -> None:
    """Refuse a float or dynamic layer that has what the graph has no place for."""
    if layer.extra_keys:
        raise ValueError("layer must have no bias_k, bias_v and add_zero_attn: the graph has no place for added keys; "
                         f"got {layer.extra_keys}")
    if layer.gated:
        raise ValueError("layer must have no gate_weight: the graph has no place for a gate")


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


def check_lengths(layer, sources, batch, sequence_length, key_length) -> _Lengths:
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
    return _Lengths(sizes["batch"], layer.num_heads, sizes["sequence_length"], sizes["key_length"],
                    layer.head_dim, layer.value_dim)
