"""Which row of one value each row of another is: a sequence's tokens, followed through the layouts of an ONNX graph."""

import numpy as np

from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_elements import trace
from edgeattn.files.checkpoints.onnx_nodes import title
from edgeattn.files.checkpoints.onnx_values import NotRead

PLAIN = (*functions.SAME, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
FEW_NODES = 24  # that are followed
ALONE = "MultiHeadAttention.from_onnx(path, node=...) reads attention alone"


def root_of(graph, name):
    """The value whose rows, of a token's features each, a value has in another layout."""
    while (node := graph.maker.get(name)) is not None and node.op_type in PLAIN and graph.constant(name) is None:
        if node.op_type not in functions.SAME:
            try:
                rows_of(graph, name, node.input[0])
            except NotRead:
                break
        name = node.input[0]
    return name


def rows_of(graph, value, root):
    """The row of `root` that each row of `value` is: layouts may exchange rows, not cut them."""
    width = graph.shapes[root][-1] if graph.shapes.get(root) else 1
    elements = trace(graph, value, lambda each: each == root)
    index = elements.terms[0].index if len(elements.terms) == 1 and elements.terms[0].source == root else None
    if index is None or elements.shape[-1] != width or (np.diff(index.reshape(-1, width), axis=1) != 1).any() or (
            index[..., 0] % width).any():
        raise NotRead(f"{value[:100]!r} must have the rows of {root[:100]!r}, got {elements.shape} of "
                      f"{graph.shapes.get(root)}")
    return index.reshape(-1, width)[:, 0] // width


def sum_behind(graph, value, name):
    """(the sum of a value and a computed one, the row of the value that each of it has, the other)."""
    start = value
    for _ in range(FEW_NODES):
        readers = [node for node in graph.readers.get(value, ()) if node.op_type not in ("Shape", "Size")]
        if len(readers) != 1:
            break
        node = readers[0]
        if node.op_type in ("Add", "Sum") and len(node.input) == 2:
            other = node.input[1] if node.input[0] == value else node.input[0]
            total, shape = graph.output(node), graph.shapes.get(other)
            if total and graph.constant(other) is None and shape == graph.shapes.get(value):
                return total, rows_of(graph, value, start), other
        if node.op_type not in PLAIN:
            break
        value = graph.output(node)
    readers = ", ".join(map(title, graph.readers.get(value, ()))) or "nothing"
    raise NotRead(f"what {name} gives must be added to what it was given, as a residual; got {readers[:300]} behind "
                  f"{value[:100]!r}; {ALONE}")
