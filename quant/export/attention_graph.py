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

import numpy as np

from edgeattn.quantized import INPUTS, AddMask, MulConstant, SelectMask
from edgeattn.tflite_schema import Graph

FULLY_CONNECTED_VERSION = 5  # the first with keep_num_dims
INT8_VERSIONS = {
    "ADD": 2,
    "MUL": 2,
    "BATCH_MATMUL": 2,
    "SOFTMAX": 2,
    "TRANSPOSE": 2,
    "RESHAPE": 1,
    "SELECT_V2": 1,
}
FLOAT_VERSIONS = dict.fromkeys(INT8_VERSIONS, 1)
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


class _Builder:
    """The parts of an attention graph that int8 and float32 share."""

    def __init__(self, lengths: _Lengths, dtype, versions):
        self.graph = Graph()
        self.lengths = lengths
        self.dtype = np.dtype(dtype)
        self._versions = versions
        self._heads_first = None  # the permutation (B, L, H, D) <-> (B, H, L, D), made when first needed

    def operator(self, name, inputs, output_name, shape, quantization=None, options=None) -> int:
        output = self.graph.activation(output_name, shape, self.dtype, quantization)
        self.graph.operator(name, inputs, output, options, self._versions[name])
        return output

    def fully_connected(self, x, weight, bias, output_name, quantization=None) -> int:
        shape = (*self.graph.tensors[x].shape[:-1], self.graph.tensors[weight].shape[0])
        output = self.graph.activation(output_name, shape, self.dtype, quantization)
        self.graph.operator("FULLY_CONNECTED", [x, weight] if bias is None else [x, weight, bias], output,
                            {"keep_num_dims": True}, FULLY_CONNECTED_VERSION)
        return output

    def batch_matmul(self, lhs, rhs, output_name, columns, quantization=None, *, adj_y) -> int:
        shape = (*self.graph.tensors[lhs].shape[:-1], columns)
        return self.operator("BATCH_MATMUL", [lhs, rhs], output_name, shape, quantization,
                             {"adj_x": False, "adj_y": adj_y})

    def softmax(self, x, quantization=None) -> int:
        return self.operator(
            "SOFTMAX", [x], "probabilities", self.graph.tensors[x].shape, quantization, {"beta": 1.0}
        )

    def split_heads(self, x, quantization=None) -> int:
        """(B, L, H*D) -> (B, H, L, D); one head is left alone."""
        B, H = self.lengths.batch, self.lengths.heads
        if H == 1:
            return x
        _, length, width = self.graph.tensors[x].shape
        name = self.graph.tensors[x].name
        split = self.reshape(x, f"{name}/split", (B, length, H, width // H), quantization)
        return self.transpose_heads(split, f"{name}/heads", quantization)

    def merge_heads(self, x, quantization=None) -> int:
        """(B, H, L, Dv) -> (B, L, H*Dv); one head is left alone."""
        if self.lengths.heads == 1:
            return x
        B, H, L, width = self.graph.tensors[x].shape
        swapped = self.transpose_heads(x, "context/heads", quantization)
        return self.reshape(swapped, "context/merged", (B, L, H * width), quantization)

    def reshape(self, x, output_name, shape, quantization=None) -> int:
        target = np.array(shape, np.int32)
        constant = self.graph.constant(f"{output_name}/shape", target)
        return self.operator(
            "RESHAPE", [x, constant], output_name, shape, quantization, {"new_shape": target}
        )

    def transpose_heads(self, x, output_name, quantization=None) -> int:
        if self._heads_first is None:
            self._heads_first = self.graph.constant("heads_first", np.array([0, 2, 1, 3], np.int32))
        shape = [self.graph.tensors[x].shape[axis] for axis in (0, 2, 1, 3)]
        return self.operator("TRANSPOSE", [x, self._heads_first], output_name, shape, quantization)

    def mask_constant(self, name, values, what, quantization=None) -> int:
        """A constant of the scores' rank, from ``values`` that broadcast to (B, H, L, S)."""
        return self.graph.constant(name, mask_to_graph_rank(values, self.lengths.scores, what), quantization)


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


def _add_inputs(builder: _Builder, sources, widths, quantizations) -> list[int]:
    """One graph input per distinct source; returns the tensor that feeds each of the three projections."""
    lengths = builder.lengths
    inputs: list[int] = []
    for role, source in enumerate(sources):
        if source == len(inputs):
            length = lengths.queries if source == 0 else lengths.keys
            name = "input" if max(sources) == 0 else f"{INPUTS[source]}_input"
            inputs.append(builder.graph.activation(name, (lengths.batch, length, widths[role]), builder.dtype,
                                                   quantizations[source]))
    builder.graph.inputs = inputs
    return [inputs[source] for source in sources]


def static_graph(layer, *, batch: int, sequence_length: int, key_length: int | None = None) -> Graph:
    """The int8 graph of a static layer, its ``score_ops`` included.

    Parameters
    ----------
    layer : StaticMultiHeadAttention
    batch, sequence_length, key_length : int
        B, L, S; S is L by default.

    Returns
    -------
    Graph
        int8 (B, L, E) in, int8 (B, L, output width) out.
    """
    lengths = check_lengths(layer, layer.sources, batch, sequence_length, key_length)
    builder = _Builder(lengths, np.int8, INT8_VERSIONS)
    tensors = layer.tensors
    input_names = [f"{name}_input" for name in INPUTS]
    feeds = _add_inputs(builder, layer.sources, (layer.embed_dim, layer.kdim, layer.vdim),
                        [tensors.get(name) for name in input_names])

    def project(name, x):
        linear = layer.linears[name]
        weight = builder.graph.constant(f"{name}/weight", linear.weight, channel_scale=linear.scale)
        bias = None
        if linear.bias is not None:
            input_scale = builder.graph.tensors[x].scale
            bias = builder.graph.constant(
                f"{name}/bias", linear.bias, channel_scale=input_scale * linear.scale
            )
        return builder.fully_connected(x, weight, bias, name, tensors[name])

    query, key, value = (
        builder.split_heads(project(name, x), tensors[name]) for name, x in zip(INPUTS, feeds, strict=True)
    )
    scores = builder.batch_matmul(query, key, "scores", lengths.keys, tensors["scores"], adj_y=True)
    scores = _add_score_ops(builder, layer.score_ops, scores, tensors["scores"])
    probabilities = builder.softmax(scores, tensors["probabilities"])
    context = builder.batch_matmul(
        probabilities, value, "context", lengths.value_dim, tensors["context"], adj_y=False
    )
    context = builder.merge_heads(context, tensors["context"])
    builder.graph.outputs = [project("output", context) if "output" in layer.linears else context]
    return builder.graph


def _add_score_ops(builder: _Builder, score_ops, scores: int, quantization) -> int:
    """The elementwise operators between the first product and the softmax."""
    shape = builder.graph.tensors[scores].shape
    for number, op in enumerate(score_ops):
        name = f"scores/{number}"
        if isinstance(op, MulConstant):
            constant = builder.graph.constant(f"{name}/constant", np.array(op.code, np.int8), op.constant)
            quantization = op.output
            scores = builder.operator("MUL", [scores, constant], f"{name}/scaled", shape, quantization)
        elif isinstance(op, AddMask):
            mask = builder.mask_constant(f"{name}/mask", op.codes, "mask of the layer's AddMask", op.mask)
            quantization = op.output
            scores = builder.operator("ADD", [scores, mask], f"{name}/masked", shape, quantization)
        elif isinstance(op, SelectMask):
            keep = builder.mask_constant(f"{name}/keep", op.keep, "mask of the layer's SelectMask")
            fill = builder.graph.constant(f"{name}/fill", np.array(op.fill, np.int8), quantization)
            scores = builder.operator(
                "SELECT_V2", [keep, scores, fill], f"{name}/masked", shape, quantization
            )
        else:
            raise TypeError(f"score_ops must be MulConstant, AddMask or SelectMask; got {type(op).__name__}")
    return scores


def float_graph(layer, *, batch: int, sequence_length: int, key_length: int | None = None, mask=None,
                sources: tuple[int, int, int] | None = None) -> Graph:
    """The float32 graph of a float layer.

    1/sqrt(D) is multiplied into the query weights, and key and value heads shared by several query heads are
    repeated.

    Parameters
    ----------
    layer : MultiHeadAttention
    batch, sequence_length, key_length : int
        B, L, S; S is L by default.
    mask : bool or float32 array, broadcastable to (B, H, L, S), optional
        True = attend, or numbers added to the scores.
    sources : tuple of int, optional
        Which input feeds the query, key and value projection. Default: (0, 0, 0), self-attention, where the
        widths are equal and ``key_length`` is not given; else (0, 1, 1), or (0, 1, 2) where keys and values
        differ in width.

    Returns
    -------
    Graph
        float32 (B, L, E) in, float32 (B, L, output width) out.
    """
    if layer.extra_keys:
        raise ValueError("layer must have no bias_k, bias_v and add_zero_attn: the graph has no place for added keys; "
                         f"got {layer.extra_keys}")
    if layer.gated:
        raise ValueError("layer must have no gate_weight: the graph has no place for a gate")
    widths = (layer.embed_dim, layer.kdim, layer.vdim)
    if sources is None and widths[1] != widths[2]:
        sources = (0, 1, 2)
    elif sources is None:
        sources = (0, 0, 0) if widths[0] == widths[1] and key_length is None else (0, 1, 1)
    lengths = check_lengths(layer, sources, batch, sequence_length, key_length)
    builder = _Builder(lengths, np.float32, FLOAT_VERSIONS)
    feeds = _add_inputs(builder, sources, widths, (None, None, None))
    repeats = layer.num_heads // layer.num_kv_heads

    def project(name, x, weight, bias, scale=None, head_size=None):
        values = []
        for array in (weight, bias):
            if array is not None and head_size is not None and repeats > 1:
                array = np.repeat(array.reshape(-1, head_size, *array.shape[1:]), repeats, axis=0).reshape(
                    -1, *array.shape[1:])
            values.append(array if array is None or scale is None else array * scale)
        constants = [None if array is None else builder.graph.constant(f"{name}/{part}", array)
                     for part, array in zip(("weight", "bias"), values, strict=True)]
        return builder.fully_connected(x, *constants, name)

    query = project("query", feeds[0], layer.q_weight, layer.q_bias, np.float32(layer.scale))
    key = project("key", feeds[1], layer.k_weight, layer.k_bias, None, lengths.head_dim)
    value = project("value", feeds[2], layer.v_weight, layer.v_bias, None, lengths.value_dim)
    query, key, value = map(builder.split_heads, (query, key, value))
    scores = builder.batch_matmul(query, key, "scores", lengths.keys, adj_y=True)
    if mask is not None:
        scores = _add_float_mask(builder, np.asarray(mask), scores)
    probabilities = builder.softmax(scores)
    context = builder.batch_matmul(probabilities, value, "context", lengths.value_dim, adj_y=False)
    context = builder.merge_heads(context)
    builder.graph.outputs = [context if layer.out_weight is None
                             else project("output", context, layer.out_weight, layer.out_bias)]
    return builder.graph


def _add_float_mask(builder: _Builder, mask: np.ndarray, scores: int) -> int:
    shape = builder.graph.tensors[scores].shape
    if mask.dtype == np.bool_:
        keep = builder.mask_constant("scores/keep", mask, "mask")
        fill = builder.graph.constant("scores/fill", np.array(MASKED_SCORE))
        return builder.operator("SELECT_V2", [keep, scores, fill], "scores/masked", shape)
    if mask.dtype != np.float32:
        raise TypeError(
            f"mask must be bool (True = attend) or float32 (added to the scores); got {mask.dtype}"
        )
    if np.isnan(mask).any():
        raise ValueError("mask must hold no NaN")
    added = builder.mask_constant("scores/mask", np.maximum(mask, MASKED_SCORE), "mask")
    return builder.operator("ADD", [scores, added], "scores/masked", shape)
