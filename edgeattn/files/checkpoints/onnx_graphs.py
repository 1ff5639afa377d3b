"""Attention in an ONNX graph: found from its Softmax, or from an operator that is attention.

From there elements are followed: up to the linear maps of queries, keys and values, through whatever splits, packs or
turns heads, and down to the map behind. What they are in the file is compared with what attention needs, not with a
list of forms that exporters write.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import count
from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_elements import Elements, Term, trace
from edgeattn.files.checkpoints.onnx_nodes import Graph, equation, title
from edgeattn.files.checkpoints.onnx_projections import (
    Map,
    Projection,
    check_sources,
    linear,
    no_projection,
    projected,
)
from edgeattn.files.checkpoints.onnx_values import NotRead, Values
from edgeattn.files.paths import reading

if TYPE_CHECKING:
    from typing import Any, SupportsIndex

    from numpy.typing import NDArray

    from edgeattn.types import OnnxModel, Path

_OPERATORS = {
    ("", "Attention"),
    ("com.microsoft", "Attention"),
    ("com.microsoft", "MultiHeadAttention"),
    ("com.microsoft", "QAttention"),
    ("com.microsoft", "GroupQueryAttention"),
}
_BLOCKED = -9e3  # what is added to a score is a mask from here on
_FAR_BEHIND = 24  # nodes between attention and the end of its output projection
_TOLD = 20  # names in an error


def onnx_weights(
    path_or_model: Path | OnnxModel, node: str | SupportsIndex | None = None
) -> tuple[int, int, dict[str, NDArray[Any]]]:
    """Weights of the attention layer around one node of an ONNX model.

    The node is a Softmax between two products, Attention of opsets 23 to 25, or Attention, QAttention,
    MultiHeadAttention or GroupQueryAttention of com.microsoft. Its queries, keys and values must come from MatMul or
    Gemm with constant weights, float or int8, and may be scaled, packed, split into heads, shared by groups of heads
    and turned by a rotary embedding in any way on the way; MatMul or Gemm behind it becomes out_weight. Weights of
    (inputs, outputs) become (outputs, inputs). A scale other than 1 / sqrt(D) goes into q_weight. QuantizeLinear and
    DequantizeLinear are passed: the layer is float.

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
        q_weight, k_weight, v_weight, out_weight, and the biases where there are any; of a rotary embedding
        "rotary": (features turned, base, interleaved), and position_bias.

    Raises
    ------
    ValueError
        Naming the attention nodes that there are, or what stands where a projection was looked for.

    Warns
    -----
    UserWarning
        When the graph masks its scores, or has a window or a softcap, which here are arguments of each call.
    """
    graphs = open_graph(path_or_model)
    found = read_attention(graphs, lambda graph: choose(graph, node))
    for told in found.told:
        warnings.warn(told, stacklevel=3)
    return found.heads, found.kv_heads, found.arguments


def open_graph(path_or_model):
    """A function (batch) -> the `Graph` of a model with that batch."""
    model, values, source = _load(path_or_model)

    def graph(batch):
        with reading(source, ".onnx file"):  # texts are decoded when they are looked at
            return Graph(model, values, source, batch)

    return graph


def read_attention(graphs, chosen):
    """The `Attention` at the node that `chosen(graph)` gives; a model traced for one sequence is read as such."""
    # a damaged factor may take weights beyond float32
    with np.errstate(all="ignore"):
        graph = graphs(2)
        try:
            return attention_at(graph, chosen(graph))
        except NotRead as error:
            graph = graphs(1)
            try:
                return attention_at(graph, chosen(graph))
            except NotRead:
                raise error from None


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


def attention_nodes(graph):
    """The attention nodes of a graph: operators, and each Softmax whose scores are a product."""
    return [
        node
        for node in graph.nodes
        if (_domain(node), node.op_type) in _OPERATORS
        or (node.op_type in ("Softmax", "QLinearSoftmax") and _is_attention(graph, node))
    ]


def _is_attention(graph, node):
    """Whether a Softmax stands between two products; a quick look, which what follows does for good."""
    found = False
    for step in (
        lambda each: [graph.maker[name] for name in each.input if name in graph.maker],
        lambda each: [reader for name in each.output for reader in graph.readers.get(name, ())],
    ):
        todo, seen = [node], set()
        found = False
        while todo and not found and len(seen) < 48:
            for each in step(todo.pop(0)):
                if id(each) not in seen:
                    seen.add(id(each))
                    if product(graph, each) is not None:
                        found = True
                    todo.append(each)
        if not found:
            return False
    return found


def choose(graph, wanted):
    """The attention node that is asked for."""
    nodes = attention_nodes(graph)
    known = ", ".join(f"{index}: {title(node)}" for index, node in enumerate(nodes[:_TOLD])) or (
        "none: no Softmax between two products, and no Attention operator"
    )
    known += f" and {len(nodes) - _TOLD} more" if len(nodes) > _TOLD else ""
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


@dataclasses.dataclass
class Product:
    """A product of two computed values, as (..., rows, inner) and (..., inner, columns)."""

    node: Any
    left: Any  # () of elements of input 0 -> (..., rows, inner)
    right: Any
    codes: Any  # (shape of (..., rows, columns)) -> the flat index there of each element of the output
    factor: float = 1.0


def product(graph, node):
    """The `Product` of a node; None for others, and for linear maps."""
    if node is None or node.op_type not in ("MatMul", "FusedMatMul", "Gemm", "Einsum", "QLinearMatMul"):
        return None
    second = graph.input(node, 3 if node.op_type == "QLinearMatMul" else 1)
    if any(not name or graph.constant(name) is not None for name in (graph.input(node, 0), second)):
        return None
    attributes = graph.attributes(node)

    def plain(shape):
        return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)

    if node.op_type == "Einsum":
        try:
            left, right, out = equation(attributes.get("equation", ""))
        except ValueError:
            return None
        inner = [letter for letter in left if letter in right and letter not in out]
        rows, columns = (
            [letter for letter in side if letter not in other] for side, other in ((left, right), (right, left))
        )
        lead = [letter for letter in out if letter in left and letter in right]
        if len(inner) != 1 or len(rows) != 1 or len(columns) != 1 or set(out) != {*lead, *rows, *columns}:
            return None

        def order(given, wanted):
            return lambda x: x.transpose([given.index(letter) for letter in wanted])

        return Product(
            node,
            order(left, [*lead, *rows, *inner]),
            order(right, [*lead, *inner, *columns]),
            lambda shape: order([*lead, *rows, *columns], out)(plain(shape)),
        )

    def side(name):
        return (lambda x: x.swapaxes(-1, -2)) if attributes.get(name) else lambda x: x

    return Product(node, side("transA"), side("transB"), plain, attributes.get("alpha", 1.0))


@dataclasses.dataclass
class Attention:
    """The attention around one node."""

    node: Any
    heads: int
    kv_heads: int
    arguments: dict  # of edgeattn.MultiHeadAttention
    told: list  # warnings
    source: str  # the value that queries are projected from
    sources: tuple
    end: str  # the value that the layer gives
    causal: bool = False


def attention_at(graph, node):
    """The `Attention` around an attention node.

    Raises
    ------
    NotRead
        Naming the node and what stands where something else was needed.
    """
    name = title(node)
    found = (
        _from_softmax(graph, node, name)
        if node.op_type in ("Softmax", "QLinearSoftmax")
        else (_from_operator(graph, node, name))
    )
    return _assembled(graph, node, name, found)


@dataclasses.dataclass
class _Parts:
    q: Projection
    k: Projection
    v: Projection
    value_groups: Any  # the group of queries of each group of values
    context: str
    codes: Any  # flat index in (groups of values, L, Dv) of each element of `context`
    scale: Any  # of scores, for each group of queries; 1 / sqrt(D) not taken off
    bias: Any = None  # (groups of values, L, S)
    told: Any = ()
    causal: bool = False
    rotary: Any = None


def _groups(lead):
    """A function that makes (..., rows, columns) to (groups, rows, columns), `lead` the axes of the product."""
    return lambda x: np.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, *x.shape[-2:])


def _from_softmax(graph, node, name):
    def scores_source(each):
        maker = graph.maker.get(each)
        return product(graph, maker) is not None or (maker is not None and maker.op_type == "Tanh")

    told = []
    scores = trace(graph, graph.input(node, 0), scores_source)
    axis = graph.attributes(node).get("axis", -1 if graph.opset >= 13 else len(scores.shape) - 1)
    if axis % len(scores.shape) != len(scores.shape) - 1:
        raise NotRead(f"{name} must be over the last axis, the keys, got axis {axis}")
    term, masks = _scores_term(graph, scores, name)
    offset = scores.offset
    if graph.maker[term.source].op_type == "Tanh":
        softcap = float(np.max(term.factor))
        inner = trace(
            graph, graph.maker[term.source].input[0], lambda each: product(graph, graph.maker.get(each)) is not None
        )
        below, more = _scores_term(graph, inner, name)
        told.append(f"{name} caps its scores; pass softcap={softcap:g} in each call")
        term = Term(below.source, below.index.reshape(-1)[term.index], np.float32(below.factor) * softcap)
        masks += more
    first = product(graph, graph.maker[term.source])
    scale = np.broadcast_to(np.float32(term.factor) * np.float32(first.factor), scores.shape)

    def to_product(each):
        return each == graph.output(node)

    second, side, weights = _reader_product(graph, node, name, to_product)
    if len(weights.terms) != 1 or np.ndim(weights.terms[0].factor) and not (weights.terms[0].factor == 1).all():
        raise NotRead(f"the probabilities of {name} must be multiplied by the values as they are")

    q_name, k_name = (
        graph.input(first.node, 0),
        graph.input(first.node, 3 if first.node.op_type == "QLinearMatMul" else 1),
    )
    is_map = _is_map(graph)
    left, right = (
        trace(graph, q_name, is_map).moved(first.left),
        trace(graph, k_name, is_map).moved(lambda x: first.right(x).swapaxes(-1, -2)),
    )
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    length, keys = left.shape[-2], right.shape[-2]
    codes = first.codes((*lead, length, keys)).reshape(-1)
    comp = codes[term.index.reshape(-1)]  # of each score, where it is in the product
    values = trace(graph, side, is_map).moved(second.right)
    probabilities = weights.moved(second.left)
    lead2 = np.broadcast_shapes(probabilities.shape[:-2], values.shape[:-2])
    place = np.broadcast_to(probabilities.terms[0].index, (*lead2, *probabilities.shape[-2:])).reshape(
        -1, *probabilities.shape[-2:]
    )
    at = comp[place]
    if (
        at.shape[1:] != (length, keys)
        or (at - at[:, :1, :1] != np.arange(length * keys).reshape(length, keys)).any()
        or (at[:, 0, 0] % (length * keys)).any()
    ):
        raise NotRead(f"{name} must weigh values by rows of queries and columns of keys, got scores in another order")
    factors = scale.reshape(-1)[place]
    if (factors != factors[:, :1, :1]).any():
        raise NotRead(f"the scores of {name} must be scaled by one number in a head")
    q = projected(graph, left, _groups(lead), f"the queries of {name}")
    k = projected(graph, right, _groups(lead), f"the keys of {name}")
    v = projected(graph, values, _groups(lead2), f"the values of {name}")
    bias = None
    if offset is not None and np.any(offset) and not masks:  # else a part of the mask
        bias = np.broadcast_to(np.float32(offset), scores.shape).reshape(-1)[place]
    for mask in sorted(set(masks)):
        told.append(
            f"{name} adds {mask} to its scores; pass it, if it masks, as attn_mask or key_padding_mask in each call"
        )
    context = graph.output(second.node)
    return _Parts(
        q,
        k,
        v,
        at[:, 0, 0] // (length * keys),
        context,
        second.codes((*lead2, length, values.shape[-1])),
        factors[:, 0, 0],
        bias,
        told,
    )


def _is_map(graph):
    return lambda each: linear(graph, each) is not None


def _scores_term(graph, scores, name):
    """(the term of the product, names of what else is added)."""

    def is_product(term):
        maker = graph.maker.get(term.source)
        return product(graph, maker) is not None or (maker is not None and maker.op_type == "Tanh")

    terms = [term for term in scores.terms if is_product(term)]
    if len(terms) > 1:  # a product may be under a computed mask too
        raise NotRead(f"the scores of {name} must be one product of queries and keys, got {len(terms)}")
    if not terms:
        through = _behind_mask(graph, scores, name)
        if through is not None:
            return through
        raise no_projection_of_scores(graph, scores, name)
    others = [_called(graph, term.source) for term in scores.terms if term is not terms[0]]
    return terms[0], others


def _called(graph, name):
    node = graph.maker.get(name)
    return f"{name[:60]!r}" if node is None else f"{name[:60]!r} (of a {node.op_type} node)"


def _behind_mask(graph, scores, name):
    """The term behind a Where whose condition is computed."""
    if len(scores.terms) != 1:
        return None
    node = graph.maker.get(scores.terms[0].source)
    if node is None or node.op_type != "Where":
        return None
    for i in (1, 2):
        if graph.constant(graph.input(node, i)) is None:
            inner = trace(graph, graph.input(node, i), lambda each: product(graph, graph.maker.get(each)) is not None)
            term, masks = _scores_term(graph, inner, name)
            if inner.shape != graph.shapes[graph.output(node)]:
                return None
            outer = scores.terms[0]
            factor = np.broadcast_to(np.float32(term.factor), term.index.shape).reshape(-1)[outer.index]
            return Term(term.source, term.index.reshape(-1)[outer.index], factor * np.float32(outer.factor)), [
                *masks,
                f"{graph.input(node, 0)[:60]!r} (of a Where node)",
            ]
    return None


def no_projection_of_scores(graph, scores, name):
    """The error for a Softmax over something else than a product."""
    found = ", ".join(_called(graph, term.source) for term in scores.terms) or "constants"
    return NotRead(f"the scores of {name} must be a product of queries and keys, scaled and masked, got {found}")


def _reader_product(graph, node, name, is_source):
    """(the product of probabilities and values, the values' name, the probabilities' elements)."""
    value = graph.output(node)
    for _ in range(_FAR_BEHIND):
        readers = [each for each in graph.readers.get(value, ()) if each.op_type not in ("Shape", "IsNaN", "Size")]
        for reader in readers:
            found = product(graph, reader)
            if found is not None and graph.input(reader, 0) == value:
                elements = (
                    trace(graph, value, is_source) if not _cleaned(graph, value) else _past_nan(graph, value, is_source)
                )
                return found, graph.input(reader, 3 if reader.op_type == "QLinearMatMul" else 1), elements
        following = [each for each in readers if each.op_type in (*functions.SAME, *functions.LAYOUT, "Where")]
        if not following:
            break
        value = graph.output(following[0])
    raise NotRead(f"the probabilities of {name} must be the left side of a MatMul with the values")


def _cleaned(graph, value):
    node = graph.maker.get(value)
    return node is not None and node.op_type == "Where"


def _past_nan(graph, value, is_source):
    """Probabilities behind Where(IsNaN(p), 0, p), which exporters write for rows without keys."""
    node = graph.maker[value]
    return trace(graph, graph.input(node, 2), is_source)


# -- operators that are attention


def _from_operator(graph, node, name):
    attributes, domain = graph.attributes(node), _domain(node)
    kind = node.op_type
    told = []
    if attributes.get("do_rotary") and kind != "GroupQueryAttention":
        raise NotRead(f"{name} has do_rotary={attributes['do_rotary']}, which edgeattn layers do not do")
    rotary = None
    if kind in ("Attention", "QAttention") and domain:
        q, k, v, heads = _packed_operator(graph, node, name, attributes)
        kv_heads = heads
    else:
        q, k, v, heads, kv_heads = _operator_inputs(graph, node, name, attributes)
    parts = []
    for elements, number, role in ((q, heads, "queries"), (k, kv_heads, "keys"), (v, kv_heads, "values")):
        place = f"input {('queries', 'keys', 'values').index(role)} of {name}"
        check_sources(graph, elements, place)
        if len(elements.shape) == 3:
            if number is None:
                raise NotRead(f"{name} must have q_num_heads and kv_num_heads for inputs (B, L, H * D), got none")
            if elements.shape[2] % number:
                raise NotRead(
                    f"{name} has projections that do not fit it: {elements.shape[2]} {role} in {number} heads"
                )
            elements = elements.moved(lambda x, number=number: x.reshape(*x.shape[:2], number, -1).swapaxes(1, 2))
        if len(elements.shape) != 4:
            raise NotRead(f"{place} must have 3 or 4 axes, got {elements.shape}")
        parts.append((elements, place))
    if len({len(elements.shape) for elements in (q, k, v)}) > 1:
        raise NotRead(f"{name} must have query, key and value as one layout, all (B, L, H * D) or all (B, H, L, D)")
    heads, kv_heads = parts[0][0].shape[1], parts[1][0].shape[1]
    if (
        kv_heads != parts[2][0].shape[1]
        or not kv_heads
        or heads % kv_heads
        or (parts[0][0].shape[3] != parts[1][0].shape[3])
    ):
        raise NotRead(
            f"{name} has projections that do not fit it: {heads * parts[0][0].shape[3]} outputs for {heads} "
            f"query heads, {kv_heads * parts[1][0].shape[3]} for {kv_heads} key heads, "
            f"{parts[2][0].shape[1] * parts[2][0].shape[3]} for {parts[2][0].shape[1]} value heads"
        )
    shared = heads // kv_heads

    def groups(x):
        x = x if x.shape[1] == heads else np.repeat(x, shared, 1)
        return x.reshape(-1, *x.shape[2:])

    q, k, v = (projected(graph, elements, groups, place) for elements, place in parts)
    batch, length, value_dim = parts[0][0].shape[0], parts[0][0].shape[2], parts[2][0].shape[3]
    codes = np.arange(batch * heads * length * value_dim, dtype=np.int32).reshape(batch, heads, length, value_dim)
    if not (len(graph.shapes[node.input[0]]) == 4 and not domain):
        codes = codes.swapaxes(1, 2).reshape(batch, length, -1)
    scale = attributes.get("scale")
    if scale is None or (scale == 0 and domain):  # com.microsoft operators read 0 as "not given"
        scale = 1 / math.sqrt(parts[0][0].shape[3])
    causal = bool(attributes.get("is_causal") or attributes.get("unidirectional"))
    if kind == "GroupQueryAttention":
        causal = True
        rotary = _operator_rotary(graph, node, name, attributes, parts[0][0].shape[3])
    bias = None
    if causal:
        past = [*node.input, *[""] * 9][
            6
            if kind == "MultiHeadAttention"
            else 8
            if kind == "QAttention"
            else 3
            if kind == "GroupQueryAttention"
            else 4
        ]
        told.append(
            f"{name} is causal; pass is_causal=True, "
            f"causal_alignment={'lower_right' if past else 'upper_left'!r} in each call"
        )
    sides = [attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
    if attributes.get("local_window_size", -1) > 0:
        sides[0] = attributes["local_window_size"] - 1
    if sides != [-1, -1]:
        told.append(f"{name} has a window; pass window_size=({sides[0]}, {sides[1]}) in each call")
    if attributes.get("softcap"):
        told.append(f"{name} caps its scores; pass softcap={attributes['softcap']:g} in each call")
    masks = {
        ("", "Attention"): (3,),
        ("com.microsoft", "Attention"): (3, 5),
        ("com.microsoft", "QAttention"): (5,),
        ("com.microsoft", "MultiHeadAttention"): (4, 5),
    }.get((domain, kind), ())
    for i in masks:
        given = graph.input(node, i)
        if not given:
            continue
        array = graph.constant(given)
        if array is not None and array.dtype.kind == "f" and (i != 3 or not domain) and not graph.open_axes:
            bias = np.broadcast_to(array, (batch, heads, *array.shape[-2:])).reshape(batch * heads, *array.shape[-2:])
        elif array is None or (array.dtype.kind == "b" and not array.all()) or array.dtype.kind != "b":
            told.append(f"{name} has a mask, {given[:60]!r}; pass it as attn_mask or key_padding_mask in each call")
    return _Parts(
        q,
        k,
        v,
        np.arange(batch * heads),
        graph.output(node),
        codes,
        np.full(batch * heads, scale, np.float32),
        bias,
        told,
        causal,
        rotary,
    )


def _operator_rotary(graph, node, name, attributes, size):
    if not attributes.get("do_rotary"):
        return None
    cosines, sines = (graph.constant(graph.input(node, i)) for i in (7, 8))
    if cosines is None or sines is None or cosines.shape != sines.shape or cosines.ndim != 2 or len(cosines) < 2:
        raise NotRead(f"{name} must have constant tables of cosines and sines in inputs 7 and 8")
    half = cosines.shape[1]
    angles = np.arctan2(np.float64(sines[1]), np.float64(cosines[1]))
    if (angles <= 0).any() or 2 * half > size:
        raise NotRead(f"{name} must have tables of positive angles for at most {size // 2} pairs")
    base = 1e4 if half < 2 else math.exp(-np.log(angles[1:] / angles[0]).sum() / np.arange(1, half).sum() * half)
    base = round(base) if abs(base - round(base)) < 1e-2 * base and base > 100 else base
    wanted = np.arange(len(sines))[:, None] * base ** (-np.arange(half) / half)
    if not (np.allclose(sines, np.sin(wanted), atol=1e-2) and np.allclose(cosines, np.cos(wanted), atol=1e-2)):
        raise NotRead(f"{name} must have tables of angles p * base^(-2 i / R)")
    return 2 * half, float(base), bool(attributes.get("rotary_interleaved"))


def _told_heads(name, attributes, key):
    """A number of heads that a node must tell."""
    if key not in attributes:
        raise NotRead(f"{name} must have an attribute {key}, got none")
    return count(f"{key} of {name}", attributes[key])


def _packed_operator(graph, node, name, attributes):
    """Queries, keys and values of com.microsoft Attention and QAttention, whose input 1 is the weights of all three."""
    weight, bias = (graph.constant(graph.input(node, i)) if graph.input(node, i) else None for i in (1, 2))
    if node.op_type == "QAttention" and weight is not None:
        scale, zero = (graph.constant(graph.input(node, i)) if graph.input(node, i) else None for i in (4, 7))
        if scale is None:
            raise NotRead(f"{name} must have a constant scale of its weights in input 4")
        weight = (weight.astype(np.float32) - (0 if zero is None else zero.astype(np.float32))) * scale
    if weight is None or weight.ndim != 2 or (bias is None and graph.input(node, 2)):
        raise NotRead(f"{name} must have constant weights (E, Q + K + V) and bias, got computed ones")
    heads, columns = _told_heads(name, attributes, "num_heads"), weight.shape[1]
    sizes = list(attributes.get("qkv_hidden_sizes", ())) or [columns // 3] * 3
    if len(sizes) != 3 or min(sizes) < 1 or sum(sizes) != columns or (bias is not None and bias.shape != (columns,)):
        raise NotRead(
            f"{name} must have weights (E, {' + '.join(map(str, sizes))}) and one bias per column, got weights "
            f"{weight.shape}, bias {None if bias is None else bias.shape}"
        )
    rows = graph.shapes.get(node.input[0])
    if rows is None or len(rows) != 3 or rows[2] != weight.shape[0]:
        raise NotRead(f"{name} must have weights (E, Q + K + V) of its input's E, got {weight.shape} for {rows}")
    made = f"{graph.output(node)} before"  # the product that the operator makes first
    graph.shapes[made] = (*rows[:2], columns)
    graph.maker.setdefault(made, node)
    graph.maps[made] = Map(node.input[0], weight, bias)
    whole = Elements.of(made, graph.shapes[made])
    return (
        *(
            whole.moved(lambda x, end=end, size=size: x[..., end - size : end])
            for size, end in zip(sizes, np.cumsum(sizes), strict=True)
        ),
        heads,
    )


def _operator_inputs(graph, node, name, attributes):
    """(q, k, v as elements, heads of queries, of keys) of an operator that takes them as inputs."""
    inputs = [*node.input, "", "", "", ""][:4]
    is_map = _is_map(graph)
    domain = _domain(node)
    if not inputs[0]:
        raise NotRead(f"{name} must have queries in input 0, got none")
    if graph.constant(inputs[0]) is not None:
        raise no_projection(graph, None, f"input 0 of {name}")
    q = trace(graph, inputs[0], is_map)
    heads, kv_heads = (
        (_told_heads(name, attributes, "num_heads"),) * 2
        if domain
        else tuple(
            _told_heads(name, attributes, key) if key in attributes else None for key in ("q_num_heads", "kv_num_heads")
        )
    )
    if node.op_type == "GroupQueryAttention":
        kv_heads = _told_heads(name, attributes, "kv_num_heads")
        if not inputs[1]:
            size = q.shape[2] // (heads + 2 * kv_heads)
            cuts = (0, heads * size, (heads + kv_heads) * size, (heads + 2 * kv_heads) * size)
            return (*(q.moved(lambda x, i=i: x[..., cuts[i] : cuts[i + 1]]) for i in range(3)), heads, kv_heads)
    elif domain and not inputs[1] and len(q.shape) == 5 and q.shape[3] == 3:
        return (*(q.moved(lambda x, i=i: x[:, :, :, i].reshape(*x.shape[:2], -1)) for i in range(3)), heads, heads)
    if not all(inputs[:2]) or (not inputs[2] and not domain):
        raise NotRead(f"{name} must have inputs query, key and value apart, got packed ones: {list(node.input)}")
    k = trace(graph, inputs[1], is_map)
    if not inputs[2]:
        if len(k.shape) != 5 or k.shape[3] != 2:
            raise NotRead(f"{name} must have inputs query, key and value apart, got packed ones: {list(node.input)}")
        k, v = (k.moved(lambda x, i=i: x[:, :, :, i].reshape(*x.shape[:2], -1)) for i in range(2))
    else:
        v = trace(graph, inputs[2], is_map)
    if node.op_type == "MultiHeadAttention":
        k, v = (
            each.moved(lambda x: x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)) if len(each.shape) == 4 else each
            for each in (k, v)
        )
        if inputs[3]:
            bias = graph.constant(inputs[3])
            sizes = [each.shape[-1] for each in (q, k, v)]
            if bias is None or bias.shape != (sum(sizes),):
                raise NotRead(f"{name} must have a constant bias of {sum(sizes)} elements in input 3")
            q, k, v = (
                each.plus(Elements(part.shape, (), part))
                for each, part in zip((q, k, v), np.split(bias, np.cumsum(sizes)[:-1]), strict=True)
            )
    return q, k, v, heads, kv_heads


# -- the layer


def _assembled(graph, node, name, parts):
    """The `Attention` of projections, scores and context."""
    q, k, v = parts.q, parts.k, parts.v
    groups = parts.value_groups
    q = dataclasses.replace(
        q, rows=q.rows[groups], features=q.features[groups], factor=q.factor[groups], offset=q.offset[groups]
    )
    k = dataclasses.replace(
        k, rows=k.rows[groups], features=k.features[groups], factor=k.factor[groups], offset=k.offset[groups]
    )
    head_of, row_of = _numbered(q.features), _numbered(q.rows)
    key_of, value_of, key_row = _numbered(k.features), _numbered(v.features), _numbered(k.rows)
    heads, batch = head_of.max() + 1, row_of.max() + 1
    if len({(h, b) for h, b in zip(head_of, row_of, strict=True)}) != len(head_of) or heads * batch != len(head_of):
        raise NotRead(
            f"{name} must have each head once for each sequence, got {len(head_of)} pairs of {heads} heads and "
            f"{batch} sequences"
        )
    if not len(head_of) == len(key_of) == len(value_of) == len(key_row):
        raise NotRead(f"{name} must have keys and values for each head of each sequence, got {len(key_of)} and "
                      f"{len(value_of)} for {len(head_of)}")
    first = [int(np.flatnonzero(head_of == h)[0]) for h in range(heads)]
    for each in (key_of, value_of):
        if any(len(set(each[head_of == h].tolist())) != 1 for h in range(heads)):
            raise NotRead(f"{name} must have the same keys and values of a head in each sequence")
    if any(len(set(key_row[row_of == b].tolist())) != 1 for b in range(batch)) or (k.rows != v.rows).any():
        raise NotRead(f"{name} must have keys and values of the same tokens for each head")
    if q.maps.source == k.maps.source and q.rows.shape == k.rows.shape and (q.rows != k.rows).any():
        raise NotRead(f"{name} must have queries and keys of the same tokens")
    # heads that share keys side by side
    order = sorted(range(heads), key=lambda h: (key_of[first[h]], value_of[first[h]], h))
    first = [first[h] for h in order]
    kv = [
        first[i]
        for i in range(heads)
        if i == 0 or (key_of[first[i]], value_of[first[i]]) != (key_of[first[i - 1]], value_of[first[i - 1]])
    ]
    kv_heads = len(kv)
    if heads % kv_heads or any(
        (key_of[first[i]], value_of[first[i]])
        != (key_of[kv[i * kv_heads // heads]], value_of[kv[i * kv_heads // heads]])
        for i in range(heads)
    ):
        kv, kv_heads = first, heads
    arguments = {}
    size = q.features.shape[1]
    correction = parts.scale[groups] * np.float32(math.sqrt(size)) if len(parts.scale) == len(groups) else parts.scale
    correction = np.where(np.isclose(correction, 1, rtol=2e-6, atol=0), np.float32(1), correction)
    if (correction != 1).any():
        q = dataclasses.replace(q, factor=q.factor * correction[:, None], offset=q.offset * correction[:, None])
    for short, each, which in (("q", q, first), ("k", k, kv), ("v", v, kv)):
        arguments[f"{short}_weight"], bias = each.weights(which)
        if bias is not None:
            arguments[f"{short}_bias"] = bias
    rotary = parts.rotary or q.rotary
    if (q.rotary != k.rotary) and not parts.rotary:
        raise NotRead(f"{name} must turn queries and keys by the same rotary embedding, got {q.rotary} and {k.rotary}")
    if v.rotary:
        raise NotRead(f"{name} must have values that no rotary embedding turns")
    if rotary:
        arguments["rotary"] = rotary
    told, causal = list(parts.told), parts.causal
    if parts.bias is not None:
        bias = parts.bias
        by_head = np.stack([bias[g] for g in first])
        per_batch = all((bias[g] == by_head[order.index(head_of[g])]).all() for g in range(len(groups)))
        causal_mask = np.triu(np.ones(bias.shape[1:], bool), 1)
        if (bias[:, ~causal_mask] == 0).all() and (bias[:, causal_mask] <= _BLOCKED).all() and causal_mask.any():
            causal = True
            told.append(f"{name} is causal; pass is_causal=True, causal_alignment='upper_left' in each call")
        elif per_batch and not graph.open_axes and np.isfinite(by_head).all():
            arguments["position_bias"] = by_head
        else:
            told.append(
                f"{name} adds a mask or bias of {bias.shape[1:]} to its scores, which may differ with the length; "
                "pass it as attn_mask in each call"
            )
    codes = np.asarray(parts.codes, np.int32)
    value_dim = v.features.shape[1]
    position = {h: i for i, h in enumerate(order)}
    # of each group: where its head is among the heads side by side
    place = np.array([position[h] for h in head_of])
    end, output = _output_map(graph, parts.context, codes, place, row_of, q.rows.shape[1], value_dim, heads)
    if output is not None:
        arguments["out_weight"], bias = output
        if bias is not None:
            arguments["out_bias"] = bias
    source = q.maps.source
    return Attention(
        node,
        int(heads),
        int(kv_heads),
        arguments,
        told,
        source,
        (q.maps.source, k.maps.source, v.maps.source),
        end,
        causal,
    )


def _numbered(rows):
    """The number of each row among the different ones, in the order of their first elements."""
    distinct = sorted({tuple(row) for row in rows.tolist()})
    number = {row: i for i, row in enumerate(distinct)}
    return np.array([number[tuple(row)] for row in rows.tolist()])


def _output_map(graph, context, codes, place, row_of, length, value_dim, heads):
    """(value that the layer gives, (weight, bias) of the map behind or None)."""
    value = context
    way = [context]
    for _ in range(_FAR_BEHIND):
        node = graph.reader(value)
        if node is None:
            return context, None
        result = _result(graph, node)
        found = linear(graph, result) if result else None
        if found is not None and found.source == value:
            break
        if node.op_type not in (*functions.SAME, *functions.LAYOUT, "DynamicQuantizeLinear"):
            return context, None
        value = graph.output(node)
        way.append(value)
    else:
        return context, None
    elements = trace(graph, found.source, lambda each: each == context)
    if len(elements.terms) != 1 or elements.terms[0].source != context or elements.shape[-1] != found.weight.shape[0]:
        return context, None
    code = codes.reshape(-1)[elements.terms[0].index.reshape(-1, elements.shape[-1])]
    group, row, feature = code // (length * value_dim), code // value_dim % length, code % value_dim
    column = place[group] * value_dim + feature
    token = row_of[group] * length + row
    if (
        (column != column[:1]).any()
        or (token != token[:, :1]).any()
        or (sorted(column[0].tolist()) != list(range(heads * value_dim)))
    ):
        return context, None
    weight = np.zeros((found.weight.shape[1], heads * value_dim), np.float32)
    weight[:, column[0]] = found.weight.T
    return _with_bias(graph, result, weight, found.bias)


def _result(graph, node):
    """The value of the map that a node begins; of MatMulInteger that after Cast and Mul."""
    value = graph.output(node)
    if node.op_type == "DynamicQuantizeLinear":
        readers = [each for each in graph.readers.get(value, ()) if each.op_type == "MatMulInteger"]
        return _result(graph, readers[0]) if len(readers) == 1 else ""
    if node.op_type == "MatMulInteger":
        for _ in range(2):
            reader = graph.reader(value)
            if reader is None:
                return ""
            value = graph.output(reader)
    return value


def _with_bias(graph, value, weight, bias):
    """(value, (weight, bias)) with what is added, and multiplied, for each feature behind a map."""
    start, end = value, value
    best = None
    for _ in range(_FAR_BEHIND):
        node = graph.reader(value)
        if node is None or node.op_type not in (
            "Add",
            "Mul",
            *functions.SAME,
            "Reshape",
            "Transpose",
            "Squeeze",
            "Unsqueeze",
        ):
            break
        if node.op_type in ("Add", "Mul") and all(graph.constant(name) is None for name in node.input):
            break
        value = graph.output(node)
        elements = trace(graph, value, lambda each: each == start)
        if len(elements.terms) != 1 or elements.shape[-1] != len(weight):
            continue
        factor, offset = np.broadcast_to(elements.terms[0].factor, elements.shape), elements.known()
        index = elements.terms[0].index.reshape(-1, len(weight)) % len(weight)
        factor, offset = factor.reshape(-1, len(weight)), offset.reshape(-1, len(weight))
        if (factor != factor[:1]).any() or (offset != offset[:1]).any() or (index != np.arange(len(weight))).any():
            break
        end, best = value, (factor[0], offset[0], elements.offset is not None)
    if best is None:
        return start, (weight, bias)
    factor, offset, biased = best
    if (factor != 1).any():
        weight, bias = weight * np.float32(factor)[:, None], None if bias is None else bias * factor
    if biased:
        bias = offset if bias is None else bias + offset
    return end, (np.asarray(weight, np.float32), None if bias is None else np.asarray(bias, np.float32))
