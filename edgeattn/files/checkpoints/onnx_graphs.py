"""Weights around an attention operator of an ONNX graph.

The operator itself has no weights, but for com.microsoft Attention, which projects too. They are found by
walking from its inputs up to the linear maps that feed them, and from its output down to the one that follows:

    x -> MatMul -> Add -> Reshape -> Transpose -> Q  |  Attention -> Transpose -> Reshape -> MatMul -> Add
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import count
from edgeattn.files.checkpoints.onnx_values import NotRead, Values
from edgeattn.files.paths import reading, reason

if TYPE_CHECKING:
    from typing import Any, SupportsIndex

    from numpy.typing import NDArray

    from edgeattn.types import OnnxModel, Path

_OPERATORS = {("", "Attention"), ("com.microsoft", "Attention"), ("com.microsoft", "MultiHeadAttention")}
_HEADS_FIRST = [0, 2, 1, 3]  # (B, L, H, D) -> (B, H, L, D), and back
_SAME_NUMBERS = ("Identity", "Dropout", "Cast")
# Between a projection and its attention node exporters write up to ten nodes. A cycle has no end at all.
_LONGEST_PATH = 64
_LONGEST_SHAPE = 8
_MOST_NODES = 100_000  # ten times those of a language model
_TOLD = 20  # names in an error


def onnx_weights(path_or_model: Path | OnnxModel, node: str | SupportsIndex | None = None
                 ) -> tuple[int, int, dict[str, NDArray[Any]]]:
    """Weights of the attention layer around one node of an ONNX model.

    The node is Attention of opsets 23 to 25, or Attention or MultiHeadAttention of com.microsoft. Its queries,
    keys and values must come from MatMul or Gemm with constant weights, and may pass Add of a bias, Mul or Div by
    a number, Split, Reshape and Transpose on the way; MatMul or Gemm right behind it becomes out_weight. Weights
    of (inputs, outputs) become (outputs, inputs). A scale other than 1 / sqrt(D) goes into q_weight.

    Bool masks mean True = attend, as here. A mask_index (B, S) of com.microsoft is
    key_padding_mask=mask_index != 0, a mask_index (B,) key_padding_mask=numpy.arange(S) < mask_index[:, None], an
    attention_bias attn_mask=attention_bias. is_causal and unidirectional align the first query with the first
    key: causal_alignment="upper_left"; behind a past_key the last with the last: "lower_right". A query with no
    permitted key gives zeros here, but the mean of all values in com.microsoft operators.

    Parameters
    ----------
    path_or_model : path or onnx.ModelProto
    node : str or int, optional
        Name of the node, or its index among the attention nodes. Not needed where there is one.

    Returns
    -------
    num_heads, num_kv_heads : int
    weights : dict of str to array
        q_weight, k_weight, v_weight, out_weight, and the biases where there are any.

    Raises
    ------
    ValueError
        Naming the attention nodes that there are, or what stands where a projection was looked for.

    Warns
    -----
    UserWarning
        When the node is causal, or has a window or a softcap, which here are arguments of each call.
    """
    model, values, source = _load(path_or_model)
    with reading(source, ".onnx file"):  # texts are decoded when they are looked at
        graph = _Graph(model, values, source)
    found = _choose(graph, node)
    # a damaged factor may take weights beyond float32
    with np.errstate(over="ignore", invalid="ignore"):
        return _layer(graph, found)


def _layer(graph, found):
    """(num_heads, num_kv_heads, weights) of the layer around an attention node."""
    name, operator = _title(found), (_domain(found), found.op_type)
    attributes = graph.attributes(found)
    if attributes.get("do_rotary"):
        raise ValueError(f"{name} has do_rotary={attributes['do_rotary']}, which edgeattn layers do not do")
    if operator == ("com.microsoft", "Attention"):
        parts = _packed_projections(graph, found, name, attributes)
    else:
        parts = _projections(graph, found, name, attributes)
    q, k, v = parts
    _check_sizes(name, q, k, v)
    q = q.times(_scale_correction(attributes, operator, q))
    weights = {"q_weight": q.weight, "k_weight": k.weight, "v_weight": v.weight}
    output = _output_projection(graph, found, heads_first=q.heads_first, width=q.heads * v.weight.shape[0] // v.heads)
    if output is not None:
        weights["out_weight"] = output.weight
    biases = {"q_bias": q.bias, "k_bias": k.bias, "v_bias": v.bias, "out_bias": output.bias if output else None}
    _warn_of_masks(name, attributes, found)
    return q.heads, k.heads, weights | {title: bias for title, bias in biases.items() if bias is not None}


@dataclasses.dataclass(frozen=True)
class _Linear:
    """x -> x weight^T + bias, into so many heads."""

    weight: np.ndarray  # (outputs, inputs)
    bias: np.ndarray | None = None
    heads: int | None = None
    heads_first: bool = False  # whether what follows is (B, H, L, D)

    def times(self, factor):
        if factor == 1:
            return self
        scaled = None if self.bias is None else np.asarray(self.bias * factor, np.float32)
        return dataclasses.replace(self, weight=np.asarray(self.weight * factor, np.float32), bias=scaled)

    def plus(self, bias):
        bias = bias.reshape(-1)
        return dataclasses.replace(self, bias=bias if self.bias is None else self.bias + bias)

    def rows(self, rows):
        bias = None if self.bias is None else self.bias[rows]
        return dataclasses.replace(self, weight=self.weight[rows], bias=bias)


class _Graph:
    """Who makes each value, who reads it, and which values are constants."""

    def __init__(self, model, values, source):
        if len(model.graph.node) > _MOST_NODES:
            raise ValueError(f"its graph must have at most {_MOST_NODES} nodes, got {len(model.graph.node)}")
        self.source, self.nodes = source, list(model.graph.node)
        self.outputs = {value.name for value in model.graph.output}
        self.maker = {name: node for node in self.nodes for name in node.output if name}
        self.readers = {}
        for node in self.nodes:
            for name in node.input:
                if name:
                    self.readers.setdefault(name, []).append(node)
        self._values = values
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._known = {}  # arrays of constants that were asked for before

    def attributes(self, node):
        return self._values.attributes(node)

    def input(self, node, index):
        """The name of an input of a node; empty where it has none there."""
        return node.input[index] if index < len(node.input) else ""

    def constant(self, name):
        """The array of a constant, seen through Identity, Cast and Transpose; None for what is computed."""
        if name not in self._known:
            self._known[name] = self._constant(name)
        return self._known[name]

    def _constant(self, name):
        turns = []
        for _ in range(_LONGEST_PATH):
            if name in self._stored:
                array = self._values.array(self._stored[name], name)
                break
            node = self.maker.get(name)
            if node is not None and node.op_type == "Constant":
                array = self._values.of_constant(node)
                break
            if node is None or node.op_type not in ("Identity", "Cast", "Transpose"):
                return None
            if node.op_type == "Transpose":
                turns.append(self.attributes(node).get("perm"))
            name = self.input(node, 0)
        else:
            raise NotRead(f"{name[:100]!r} must come from stored values through {_LONGEST_PATH} nodes at most, "
                          "got more, or a cycle")
        for turn in reversed(turns):
            if turn is not None and sorted(turn) != list(range(array.ndim)):
                raise NotRead(f"a Transpose of {name[:100]!r} must have a permutation of {array.ndim} axes, got "
                              f"{reason(turn)}")
            array = array.transpose(turn)
        return array

    def shape(self, node):
        """The shape that a Reshape asks for, one None for each run of computed entries; empty if all are computed."""
        wanted = self.input(node, 1)
        array = self.constant(wanted)
        if array is not None:
            return array.reshape(-1).tolist() if array.size <= _LONGEST_SHAPE and array.dtype.kind in "iu" else []
        # exporters put (batch, length, H, D) together from numbers known and not
        concat = self.maker.get(wanted)
        if concat is None or concat.op_type != "Concat" or len(concat.input) > _LONGEST_SHAPE:
            return []
        pieces = [self.constant(name) for name in concat.input]
        if any(p is not None and (p.size > _LONGEST_SHAPE or p.dtype.kind not in "iu") for p in pieces):
            return []
        return [entry for p in pieces for entry in ([None] if p is None else p.reshape(-1).tolist())]

    def joins(self, node, width):
        """Whether a Reshape leaves or makes a last axis of `width` in two or three axes."""
        shape = self.shape(node)
        return len(shape) in (2, 3) and shape[-1] in (-1, 0, None, width)

    def swaps_heads(self, node):
        return node.op_type == "Transpose" and list(self.attributes(node).get("perm", ())) == _HEADS_FIRST

    def linear(self, node, value):
        """The linear map of a MatMul or Gemm applied to `value`, None for any other node."""
        if node.op_type not in ("MatMul", "Gemm") or self.input(node, 0) != value:
            return None
        weight = self.constant(self.input(node, 1))
        if weight is None or weight.ndim != 2 or weight.dtype.kind != "f":
            return None
        attributes = self.attributes(node)
        if node.op_type == "MatMul":
            return _Linear(weight.T)
        if attributes.get("transA"):
            return None
        result = _Linear(weight if attributes.get("transB") else weight.T).times(attributes.get("alpha", 1.0))
        if self.input(node, 2):
            bias = self.constant(node.input[2])
            if bias is None or not _along_last(bias, len(result.weight)):
                return None
            result = result.plus(bias * np.float32(attributes.get("beta", 1.0)))
        return result

    def operands(self, node):
        """(value, constant) of a node with two inputs one of which is constant, in any order; else (None, None)."""
        left, right = self.input(node, 0), self.input(node, 1)
        for above, name in ((left, right), (right, left))[:1 if node.op_type == "Div" else 2]:
            constant = self.constant(name)
            if constant is not None and constant.dtype.kind in "fiu":
                return above, constant
        return None, None


def _load(path_or_model):
    """(model, how its values are read, what to call the model in errors)."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError("reading an ONNX model needs onnx: pip install 'edgeattn[checkpoints]'") from error
    if isinstance(path_or_model, onnx.ModelProto):
        return path_or_model, Values(onnx, None), "the model"
    if not isinstance(path_or_model, (str, os.PathLike)):
        raise TypeError(f"path_or_model must be a path or an onnx.ModelProto, got {type(path_or_model).__name__}")
    with open(path_or_model, "rb") as file, reading(path_or_model, ".onnx file"):
        model = onnx.ModelProto.FromString(file.read())
    return model, Values(onnx, os.path.dirname(os.path.abspath(path_or_model))), str(path_or_model)


def _domain(node):
    return "" if node.domain == "ai.onnx" else node.domain


def _title(node):
    return f"{node.domain + ' ' if _domain(node) else ''}{node.op_type} node {node.name[:100]!r}"


def _choose(graph, wanted):
    nodes = [node for node in graph.nodes if (_domain(node), node.op_type) in _OPERATORS]
    known = ", ".join(f"{index}: {_title(node)}" for index, node in enumerate(nodes[:_TOLD])) or (
        "none; onnxruntime's transformers optimizer fuses what exporters take apart"
    )
    known = f"attention nodes of {graph.source}: {known}"
    if wanted is None:
        chosen = nodes
    elif isinstance(wanted, str):
        chosen = [node for node in nodes if node.name == wanted]
    elif isinstance(wanted, (int, np.integer)) and not isinstance(wanted, bool):
        chosen = nodes[wanted : wanted + 1] if wanted >= 0 else []
    else:
        raise TypeError(f"node must be a name or an index, got {wanted!r}; {known}")
    if len(chosen) != 1:
        asked = "node must be given" if wanted is None else f"node must be one of these, got {wanted!r}"
        raise ValueError(f"{asked}; {known}")
    return chosen[0]


def _packed_projections(graph, node, name, attributes):
    """Queries, keys and values of com.microsoft Attention, whose input 1 is the weights of all three."""
    weight = graph.constant(graph.input(node, 1))
    bias = graph.constant(graph.input(node, 2)) if graph.input(node, 2) else None
    if weight is None or weight.ndim != 2 or (bias is None and graph.input(node, 2)):
        raise ValueError(f"{name} must have constant weights (E, Q + K + V) and bias, got computed ones")
    heads, columns = _told_heads(name, attributes, "num_heads"), weight.shape[1]
    sizes = list(attributes.get("qkv_hidden_sizes", ())) or [columns // 3] * 3
    if len(sizes) != 3 or min(sizes) < 1 or sum(sizes) != columns or (bias is not None and bias.shape != (columns,)):
        raise ValueError(
            f"{name} must have weights (E, {' + '.join(map(str, sizes))}) and one bias per column, got weights "
            f"{weight.shape}, bias {None if bias is None else bias.shape}"
        )
    whole = _Linear(weight.T, bias, heads)
    return [whole.rows(slice(end - size, end)) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]


def _projections(graph, node, name, attributes):
    """Queries, keys and values of an operator that takes them as inputs."""
    inputs = [*node.input, "", "", "", ""][:4]
    if not all(inputs[:3]):
        raise ValueError(f"{name} must have inputs query, key and value apart, got packed ones: {list(node.input)}")
    parts = [_walk_up(graph, value, f"input {index} of {name}") for index, value in enumerate(inputs[:3])]
    if node.domain == "com.microsoft":
        told = [_told_heads(name, attributes, "num_heads")] * 3
        if inputs[3]:
            bias = graph.constant(inputs[3])
            rows = np.cumsum([len(part.weight) for part in parts])
            if bias is None or bias.shape != (rows[-1],):
                raise ValueError(f"{name} must have a constant bias of {rows[-1]} elements in input 3")
            parts = [p.plus(b) for p, b in zip(parts, np.split(bias, rows[:-1]), strict=True)]
    else:
        told = [_told_heads(name, attributes, key) if key in attributes else None
                for key in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    layouts = {part.heads_first for part in parts}
    if len(layouts) > 1 or (parts[0].heads_first and node.domain == "com.microsoft"):
        wanted = "(B, L, H * D)" if _domain(node) else "one layout, all (B, L, H * D) or all (B, H, L, D)"
        raise ValueError(f"{name} must have query, key and value as {wanted}")
    heads = [part.heads or number for number, part in zip(told, parts, strict=True)]
    if None in heads:
        raise ValueError(f"{name} must have q_num_heads and kv_num_heads for inputs (B, L, H * D), got {told}")
    return [dataclasses.replace(part, heads=number) for number, part in zip(heads, parts, strict=True)]


def _told_heads(name, attributes, key):
    """A number of heads that a node must tell."""
    if key not in attributes:
        raise ValueError(f"{name} must have an attribute {key}, got none")
    return count(f"{key} of {name}", attributes[key])


def _walk_up(graph, value, place):
    """The linear map that a value comes from, with all that happens to it on the way."""
    changes, heads_first, head_sizes = [], False, None
    layout = None  # "split": (B, L, H, D); "joined": (B, L, H * D); None: as the attention node takes it
    for _ in range(_LONGEST_PATH):
        node = graph.maker.get(value)
        if node is None:
            break
        if layout is None and graph.swaps_heads(node):
            layout, heads_first, value = "split", True, graph.input(node, 0)
        elif layout == "split" and node.op_type == "Reshape" and len(shape := graph.shape(node)) >= 2:
            # four axes in all, since the Transpose behind it has four
            layout, head_sizes, value = "joined", shape[-2:], graph.input(node, 0)
        elif layout != "split" and (linear := graph.linear(node, graph.input(node, 0))) is not None:
            for passed, change in reversed(changes):
                linear = change(linear)
                if linear is None:
                    raise _no_projection(place, passed, value)
            heads = _heads(head_sizes, len(linear.weight), place) if heads_first else None
            return dataclasses.replace(linear, heads=heads, heads_first=heads_first)
        else:
            above, change = _step_up(graph, node, value, layout == "split")
            if above is None:
                break
            if node.op_type in ("Add", "Split", "Reshape"):
                layout = "joined"
            value = above
            changes.append((node, change))
    else:
        raise ValueError(f"{place} must come from a MatMul or Gemm through at most {_LONGEST_PATH} nodes; found more, "
                         "or a cycle")
    raise _no_projection(place, node, value)


def _no_projection(place, node, value):
    """The error for an input that comes from something else."""
    found = f"{node.op_type} node {node.name!r}" if node is not None else f"{value!r}, an input of the graph"
    return ValueError(
        f"{place} must come from a MatMul or Gemm with constant weights, through nothing but Add of a bias, Mul or Div "
        f"by a number, Split, and Reshape and Transpose between (B, L, H * D) and (B, H, L, D), got {found}"
    )


def _heads(head_sizes, width, place):
    """H, from the last two axes (H, D) that a Reshape made of `width`."""
    heads, size = (entry if entry and entry > 0 else None for entry in head_sizes)
    if heads is None and size is not None and width % size == 0:
        heads = width // size
    if heads is None or (size is not None and heads * size != width):
        raise ValueError(f"{place} must be split into heads by a Reshape to known H and D, got {head_sizes} of {width}")
    return heads


def _step_up(graph, node, value, split):
    """(input of a node that a projection may pass, what the node does to the linear map); (None, None) for others.

    What a node does is a function of a _Linear that gives a _Linear, or None if the two do not fit.
    """
    kind, nothing = node.op_type, (None, None)
    if kind in _SAME_NUMBERS:
        return graph.input(node, 0), lambda linear: linear
    if kind in ("Mul", "Div"):
        above, constant = graph.operands(node)
        if constant is None or constant.size != 1:
            return nothing
        factor = float(constant.reshape(-1)[0])
        if factor == 0 and kind == "Div":
            return nothing
        return above, lambda linear: linear.times(factor if kind == "Mul" else 1 / factor)
    if split:
        return nothing  # what follows runs along the outputs of the map, which are now two axes
    if kind == "Reshape":
        return graph.input(node, 0), lambda linear: linear if graph.joins(node, len(linear.weight)) else None
    if kind == "Add":
        above, constant = graph.operands(node)
        if constant is None:
            return nothing
        return above, lambda linear: linear.plus(constant) if _along_last(constant, len(linear.weight)) else None
    if kind == "Split":
        return graph.input(node, 0), lambda linear: _piece(graph, node, list(node.output).index(value), linear)
    return nothing


def _piece(graph, node, index, linear):
    """The rows of a linear map behind one output of a Split."""
    attributes = graph.attributes(node)
    sizes = attributes.get("split")  # before opset 13
    if graph.input(node, 1):
        sizes = graph.constant(node.input[1])
        if sizes is None or sizes.dtype.kind not in "iu":
            return None
        sizes = sizes.reshape(-1).tolist()
    if sizes is None:
        sizes = [len(linear.weight) // len(node.output)] * len(node.output)
    if len(sizes) != len(node.output) or min(sizes) < 0 or sum(sizes) != len(linear.weight):
        return None
    ends = np.cumsum(sizes)
    if attributes.get("axis", 0) not in (-1, 2):
        return None
    return linear.rows(slice(ends[index] - sizes[index], ends[index]))


def _output_projection(graph, node, heads_first, width):
    """The linear map right behind the node; None if something else follows, or several nodes do."""
    value, layout = _output(node), "heads first" if heads_first else "joined"
    for _ in range(_LONGEST_PATH):
        reader = _only_reader(graph, value)
        if reader is None:
            return None
        if layout == "joined" and (linear := graph.linear(reader, value)) is not None:
            return _with_bias(graph, _output(reader), linear) if linear.weight.shape[1] == width else None
        if layout == "heads first" and graph.swaps_heads(reader):
            layout = "split"
        elif layout != "heads first" and reader.op_type == "Reshape" and graph.joins(reader, width):
            layout = "joined"
        elif reader.op_type not in _SAME_NUMBERS:
            return None
        value = _output(reader)
    raise ValueError(f"what follows {_title(node)} must be a MatMul or Gemm within {_LONGEST_PATH} nodes, or something "
                     "else than these pass; found more nodes, or a cycle")


def _output(node):
    """The name of a node's first output; empty where it has none."""
    return node.output[0] if node.output else ""


def _with_bias(graph, value, linear):
    """The map and the bias that is added to it at once, if one is."""
    reader = _only_reader(graph, value)
    if linear.bias is None and reader is not None and reader.op_type == "Add":
        _, constant = graph.operands(reader)
        if constant is not None and _along_last(constant, len(linear.weight)):
            return linear.plus(constant)
    return linear


def _only_reader(graph, value):
    readers = graph.readers.get(value, ())
    return readers[0] if len(readers) == 1 and value not in graph.outputs else None


def _along_last(array, length):
    return array.shape[-1:] == (length,) and array.size == length


def _check_sizes(name, q, k, v):
    """Head counts and sizes that do not go together are no projections of this node."""
    size = len(q.weight) // q.heads
    fits = len(q.weight) == q.heads * size and len(k.weight) == k.heads * size
    if not fits or k.heads != v.heads or len(v.weight) % v.heads or q.heads % k.heads:
        raise ValueError(
            f"{name} has projections that do not fit it: {len(q.weight)} outputs for {q.heads} query heads, "
            f"{len(k.weight)} for {k.heads} key heads, {len(v.weight)} for {v.heads} value heads"
        )


def _scale_correction(attributes, operator, q):
    """What queries are to be multiplied by so that 1 / sqrt(D) gives the scale of the node."""
    size = len(q.weight) // q.heads
    scale = attributes.get("scale")
    # com.microsoft operators read 0 as "not given".
    if scale is None or (scale == 0 and operator[0]) or np.float32(scale) == np.float32(1 / math.sqrt(size)):
        return 1.0
    return scale * math.sqrt(size)


def _warn_of_masks(name, attributes, node):
    if attributes.get("is_causal") or attributes.get("unidirectional"):
        past = [*node.input, *[""] * 7][6 if node.op_type == "MultiHeadAttention" else 4]
        alignment = "lower_right" if past else "upper_left"
        warnings.warn(
            f"{name} is causal; pass is_causal=True, causal_alignment={alignment!r} in each call",
            stacklevel=5,
        )
    sides = [attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
    if sides != [-1, -1]:
        warnings.warn(
            f"{name} has a window; pass window_size=({sides[0]}, {sides[1]}) in each call", stacklevel=5)
    if attributes.get("softcap"):
        warnings.warn(f"{name} caps its scores; pass softcap={attributes['softcap']:g} in each call", stacklevel=5)
