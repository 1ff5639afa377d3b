"""The linear map behind attention: what becomes out_weight, and what is added to it."""

import itertools

import numpy as np

from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_elements import trace
from edgeattn.files.checkpoints.onnx_nodes import title
from edgeattn.files.checkpoints.onnx_projections import linear
from edgeattn.files.checkpoints.onnx_values import NotRead

FAR_BEHIND = 24  # nodes between attention and the end of its output projection


def output_map(graph, context, codes, place, row_of, length, value_dim, heads):
    """(value that the layer gives, (weight, bias) of the map behind or None, the token of each row of it, the map).

    Raises
    ------
    NotRead
        For a map whose inputs are not the heads of a token side by side.
    """
    result, found, elements = _map_behind(graph, context)
    if found is None:
        return context, None, None, None
    term, width = elements.terms[0], elements.shape[-1]
    code = codes.reshape(-1)[term.index.reshape(-1, width)]
    group, row, feature = code // (length * value_dim), code // value_dim % length, code % value_dim
    column = place[group] * value_dim + feature
    token = row_of[group] * length + row
    factor, offset = (np.broadcast_to(np.float32(each), elements.shape).reshape(-1, width)
                      for each in (term.factor, elements.known()))
    if width != found.weight.shape[0] or any((each != each[:1]).any() for each in (column, factor, offset)) or (
            token != token[:, :1]).any() or sorted(column[0].tolist()) != list(range(heads * value_dim)):
        raise NotRead(f"{title(graph.maker[result])} must take the {heads} heads of a token side by side, as they come "
                      "of the values; got elements in another order, so it mixes tokens, or is no output projection")
    rows, bias = found.weight, found.bias
    if offset.any():
        bias = offset[0] @ rows + (0 if bias is None else bias)
    rows = rows if (factor == 1).all() else rows * factor[0][:, None]
    weight = np.zeros((rows.shape[1], heads * value_dim), np.float32)
    weight[:, column[0]] = rows.T
    end, output, rows = with_bias(graph, result, weight, bias)
    return end, output, token[:, 0][rows], result


def _map_behind(graph, context):
    """(the value of the map that takes what attention gives and nothing else, the map, where its inputs come from)."""
    for node in itertools.islice(graph.nodes_behind(context), FAR_BEHIND):
        result = _result(graph, node)
        found = linear(graph, result) if result else None
        if found is None:
            continue
        elements = trace(graph, found.source, lambda each: each == context)
        if [term.source for term in elements.terms] != [context] or (elements.terms[0].index < 0).any():
            break
        way = graph.way(found.source, lambda node: None if context in node.output else [
            name for name in node.input if name and graph.constant(name) is None])
        values = [context, *(output for each in way for output in each.output)]
        readers = {id(reader) for value in values for reader in graph.readers.get(value, ())
                   if reader.op_type not in ("Shape", "Size")}
        beside = readers - {id(each) for each in way} - {id(graph.reader(found.source))}
        if beside or graph.reader(found.source) is None or graph.outputs.intersection(values):
            break
        return result, found, elements
    return None, None, None


def beyond(graph, context):
    """The node, as errors call it, that computes with what attention gives where no map was found; None: nothing."""
    for node in itertools.islice(graph.nodes_behind(context), FAR_BEHIND):
        if node.op_type not in (*functions.SAME, *functions.LAYOUT, "Concat"):
            return title(node)
    return None


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


def with_bias(graph, value, weight, bias):
    """(value, (weight, bias), rows) with what is added, and multiplied, for each feature behind a map."""
    start, end = value, value
    best = None
    for _ in range(FAR_BEHIND):
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
        rows, index = np.divmod(elements.terms[0].index.reshape(-1, len(weight)), len(weight))
        factor, offset = factor.reshape(-1, len(weight)), offset.reshape(-1, len(weight))
        if (factor != factor[:1]).any() or (offset != offset[:1]).any() or (index != np.arange(len(weight))).any():
            break
        end, best = value, (factor[0], offset[0], elements.offset is not None, rows[:, 0])
    if best is None:
        return start, (weight, bias), np.arange(np.prod(graph.shapes[start][:-1], dtype=int))
    factor, offset, biased, rows = best
    if (factor != 1).any():
        weight, bias = weight * np.float32(factor)[:, None], None if bias is None else bias * factor
    if biased:
        bias = offset if bias is None else bias + offset
    return end, (np.asarray(weight, np.float32), None if bias is None else np.asarray(bias, np.float32)), rows
