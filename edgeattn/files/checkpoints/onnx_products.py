"""Products of two computed values in an ONNX graph: of queries and keys, of probabilities and values."""

import dataclasses
import math
from typing import Any

import numpy as np

from edgeattn.files.checkpoints.onnx_shapes import equation


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
        if len(inner) != 1 or not rows or len(columns) != 1 or set(out) != {*lead, *rows, *columns}:
            return None
        # what the right side lacks but for rows are heads that share keys, or values
        rows = sorted(rows, key=out.index)
        alone, rows = rows[:-1], rows[-1:]

        def order(given, wanted):
            return lambda x: x.transpose([given.index(letter) for letter in wanted])

        axes = tuple(range(len(lead), len(lead) + len(alone)))
        return Product(
            node,
            order(left, [*lead, *alone, *rows, *inner]),
            lambda x: np.expand_dims(order(right, [*lead, *inner, *columns])(x), axes),
            lambda shape: order([*lead, *alone, *rows, *columns], out)(plain(shape)),
        )

    def side(name):
        return (lambda x: x.swapaxes(-1, -2)) if attributes.get(name) else lambda x: x

    return Product(node, side("transA"), side("transB"), plain, attributes.get("alpha", 1.0))
