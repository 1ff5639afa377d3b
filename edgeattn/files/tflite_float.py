"""Float attention in a .tflite file: found by the reader of ONNX graphs, in the nodes that `tflite_nodes` writes."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from edgeattn.files.checkpoints.onnx_elements import trace
from edgeattn.files.checkpoints.onnx_graphs import apart
from edgeattn.files.checkpoints.onnx_layers import attention_at
from edgeattn.files.checkpoints.onnx_nodes import Graph as Nodes
from edgeattn.files.checkpoints.onnx_rows import PLAIN, rows_of
from edgeattn.files.checkpoints.onnx_values import NotRead
from edgeattn.files.tflite_graph import LONGEST_CHAIN, CheckedGraph
from edgeattn.files.tflite_nodes import Writer
from edgeattn.tflite_schema import Operator


def float_attention(graph: CheckedGraph, softmax: Operator, *, alone: bool
                    ) -> tuple[int, int, dict[str, Any], list[str]]:
    """(num_heads, num_kv_heads, arguments of a MultiHeadAttention, what is to be told) of attention in float32.

    alone : whether all of the graph must be this attention
    """
    written = Writer(graph)
    try:
        with np.errstate(all="ignore"):
            nodes = written.nodes()
            if (why := written.unknown.get(softmax.outputs[0])) is not None:
                raise NotRead(why)
            _refuse_codes_around(graph, softmax)
            written.check_shapes(nodes)
            found = attention_at(nodes, nodes.maker[written.name(softmax.outputs[0])])
            if alone and not _is_all(nodes, found):
                raise NotRead("expected attention alone, and rows given in the order in which they came; found other "
                              "operators before or behind it: choose it by block=0")
            for name, array in found.arguments.items():
                if isinstance(array, np.ndarray) and name != "position_bias" and not np.isfinite(array).all():
                    raise NotRead(f"expected weights that are numbers; found NaN or infinity in {name}")
            told = [*found.told, *apart(nodes, found)]
            if (root := _regrouped(nodes, found.source)) is not None:
                told.append(f"{graph.name}: the block takes the rows of {root[:99]!r} in another order, as of windows: "
                            "give calls the rows in the order, and the groups, that the projections take")
            groups, length = found.apart.projections[0].rows.shape
            told += graph.tokens_first(nodes.shapes.get(_root(nodes, found.source)), groups // found.heads, length)
    except ValueError as error:
        text = str(error).removeprefix(f"{graph.name}: ")
        raise graph.error(f"{text}; {why}" if (why := written.reason(text)) else text) from None
    if written.hybrid:
        told.append(f"{graph.name} has int8 weights, and a runtime that quantizes the rows they meet: this is the "
                    "float32 layer of these weights; quant.quantize(layer, scheme='dynamic') makes an int8 one")
    return found.heads, found.kv_heads, found.arguments, told


def _refuse_codes_around(graph: CheckedGraph, softmax: Operator) -> None:
    """Refuse a float32 softmax of scores that are codes before and behind."""
    todo = list(softmax.inputs)
    for _ in range(LONGEST_CHAIN):
        number = graph.producers.get(todo.pop()) if todo else None
        operator = None if number is None else graph.graph.operators[number]
        if operator is None or operator.name not in ("MUL", "ADD", "SELECT_V2", "RESHAPE", "DEQUANTIZE"):
            continue
        computed = [each for each in operator.inputs if each >= 0 and not graph.is_constant(each)]
        if operator.name == "DEQUANTIZE" and computed:
            raise NotRead(f"its softmax is float32 of int8 scores, {graph.tensor(operator.outputs[0]).name[:60]!r} (of "
                          "DEQUANTIZE): neither a float32 layer nor a static one. Quantize SOFTMAX too, or read the "
                          "float file that this was made of, and quant.quantize it")
        todo += computed


def _root(nodes: Nodes, name: str) -> str:
    """The furthest value whose rows, of a token's features each, a value has in another layout."""
    root = name
    while (node := nodes.maker.get(name)) is not None and node.op_type in PLAIN and nodes.constant(name) is None:
        name = node.input[0]
        with contextlib.suppress(NotRead):
            rows_of(nodes, root, name)
            root = name
    return root


def _regrouped(nodes: Nodes, source: str) -> str | None:
    """The value whose rows another has in another order; None where they are in theirs."""
    root = _root(nodes, source)
    return None if (np.diff(rows_of(nodes, source, root)) == 1).all() else root


def _is_all(nodes: Nodes, found) -> bool:
    """Whether a graph is attention from its inputs to its output, and gives the rows of the first in their order."""
    if len(nodes.outputs) != 1 or any(_root(nodes, source) not in nodes.inputs for source in found.sources):
        return False
    (output,) = nodes.outputs
    came = rows_of(nodes, found.source, _root(nodes, found.source))
    if found.order is not None:
        if _root(nodes, output) != _root(nodes, found.end):
            return False
        rows = came[found.order[rows_of(nodes, output, found.end)]]
        return bool((rows == np.arange(rows.size)).all())
    q, _, v = found.apart.projections  # without a map behind the heads of a token must be side by side
    (groups, length), heads, size = q.rows.shape, found.heads, v.features.shape[1]
    number = np.arange(groups)
    elements = trace(nodes, output, lambda name: name == found.end)
    wanted = np.arange(groups * length * size).reshape(-1, heads, length, size).swapaxes(1, 2)
    return (found.apart.groups == list(range(heads)) and [term.source for term in elements.terms] == [found.end]
            and np.array_equal(elements.terms[0].index.ravel(), wanted.ravel())
            and bool(np.all(elements.terms[0].factor == 1)) and elements.offset is None
            and bool((q.features == q.features[number % heads]).all())
            and bool((came[q.rows] == (number // heads * length)[:, None] + np.arange(length)).all()))
