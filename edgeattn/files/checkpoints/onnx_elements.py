"""Where the elements of a tensor come from: each is a sum of others', times numbers, plus a number.

Layout moves elements, Mul and Add with known arrays change the numbers. What else a node may compute is a source, whose
elements are numbered. So heads split, packed, turned or scaled in any way come out as one table of numbers.
"""

import dataclasses
from typing import Any

import numpy as np

from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_nodes import title
from edgeattn.files.checkpoints.onnx_values import NotRead, UnknownShape
from edgeattn.files.paths import reason

BLOCKED = -9e3  # what is added to a score is a mask from here on
_MOST_TERMS = 6
_LINEAR = ("Add", "Sub", "Mul", "Div", "Neg", "Sum", "Concat", "Where", "Max", *functions.SAME, *functions.LAYOUT)


@dataclasses.dataclass(frozen=True)
class Term:
    """Elements of a source by their flat index, -1 for none, times numbers."""

    source: str
    index: np.ndarray
    factor: Any  # array of index's shape, or one number


@dataclasses.dataclass(frozen=True)
class Elements:
    """A tensor as the sum of terms and an offset."""

    shape: tuple
    terms: tuple = ()
    offset: Any = None

    @classmethod
    def of(cls, name, shape):
        """The elements of a source."""
        return cls(tuple(shape), (Term(name, np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape), 1.0),))

    def moved(self, move):
        """What a function that only moves elements makes of them."""
        shape = move(np.broadcast_to(np.int8(0), self.shape)).shape

        def each(numbers):
            return numbers if numbers is None or np.ndim(numbers) == 0 else move(np.broadcast_to(numbers, self.shape))

        return Elements(
            shape, tuple(Term(t.source, move(t.index), each(t.factor)) for t in self.terms), each(self.offset)
        )

    def times(self, factor):
        """All numbers times an array, or one number."""
        factor = _narrow(factor)
        shape = np.broadcast_shapes(self.shape, np.shape(factor))
        terms = tuple(Term(t.source, np.broadcast_to(t.index, shape), t.factor * factor) for t in self.terms)
        return Elements(shape, terms, None if self.offset is None else self.offset * factor)

    def plus(self, other):
        """The sum."""
        shape = np.broadcast_shapes(self.shape, other.shape)
        terms = [Term(t.source, np.broadcast_to(t.index, shape), t.factor) for t in (*self.terms, *other.terms)]
        if len(terms) > _MOST_TERMS:
            raise NotRead(f"a sum of more than {_MOST_TERMS} tensors is no projection")
        offsets = [each.offset for each in (self, other) if each.offset is not None]
        return Elements(shape, tuple(terms), sum(offsets[1:], offsets[0]) if offsets else None)

    def known(self):
        """The array of what has no source."""
        return np.broadcast_to(0.0 if self.offset is None else self.offset, self.shape)


def _narrow(array):
    array = np.asarray(array)
    return float(array.reshape(-1)[0]) if array.size == 1 else array.astype(np.float32)


def _joined(parts, axis):
    """Elements side by side; terms of the same source are put together."""
    rows = []
    for number, part in enumerate(parts):
        count = {}
        for term in part.terms:
            key = term.source, count.get(term.source, 0)
            count[term.source] = key[1] + 1
            row = next((row for row in rows if row[0] == key), None)
            if row is None:
                rows.append(row := (key, {}))
            row[1][number] = term
    shape = np.concatenate([np.broadcast_to(np.int8(0), part.shape) for part in parts], axis).shape
    terms = []
    for (source, _), found in rows:
        index = np.concatenate(
            [found[i].index if i in found else np.full(part.shape, -1, np.int32) for i, part in enumerate(parts)], axis
        )
        factor = np.concatenate(
            [
                np.broadcast_to(np.float32(found[i].factor if i in found else 0), part.shape)
                for i, part in enumerate(parts)
            ],
            axis,
        )
        terms.append(Term(source, index, factor))
    offset = (
        None if all(part.offset is None for part in parts) else np.concatenate([part.known() for part in parts], axis)
    )
    return Elements(shape, tuple(terms), offset)


def _chosen(condition, yes, no):
    """Where of Elements."""
    shape = np.broadcast_shapes(condition.shape, yes.shape, no.shape)
    terms = [
        Term(t.source, np.broadcast_to(t.index, shape), t.factor * side.astype(np.float32))
        for each, side in ((yes, condition), (no, ~condition))
        for t in each.terms
    ]
    if len(terms) > _MOST_TERMS:
        raise NotRead(f"a choice among more than {_MOST_TERMS} tensors is no projection")
    offset = None if yes.offset is None and no.offset is None else np.where(condition, yes.known(), no.known())
    return Elements(shape, tuple(terms), offset)


def trace(graph, name, is_source):
    """The elements of a value, back to sources: where `is_source(name)` holds, and what is not followed.

    Raises
    ------
    NotRead
        Where the way is too long, or the tensors too large.
    """

    def followed(node):
        if any(is_source(output) for output in node.output):
            return None
        return _inputs(graph, node)

    made = {}
    for node in graph.way(name, followed):
        for output, elements in zip(node.output, _step(graph, node, made), strict=False):
            made[output] = elements
    return _operand(graph, name, made)


def _inputs(graph, node):
    """The inputs of a node that elements are followed through; None where they are not."""
    kind = node.op_type
    if kind not in _LINEAR or not node.input or node.domain not in ("", "ai.onnx"):
        return None
    rest = [name for name in list(node.input)[1:] if name]
    computed = [name for name in node.input if name and graph.constant(name) is None]
    if not computed:
        return None
    if kind in functions.SAME:
        return [node.input[0]]
    if kind == "Max":  # that keeps masked scores finite
        known = [graph.constant(name) for name in node.input if name not in computed]
        return computed if len(computed) == 1 and known and all(
            array.size == 1 and array.reshape(-1)[0] <= BLOCKED for array in known) else None
    if kind in functions.LAYOUT:
        return (
            [node.input[0]]
            if graph.shapes.get(node.input[0]) and all(graph.constant(name) is not None for name in rest)
            else None
        )
    if kind == "Where":
        return [name for name in rest if name in computed] if graph.constant(node.input[0]) is not None else None
    if kind in ("Mul", "Div") and (len(computed) != 1 or (kind == "Div" and computed[0] != node.input[0])):
        return None
    if any(graph.shapes.get(name) is None for name in node.input):
        return None
    return computed


def _operand(graph, name, made):
    if name in made:
        return made[name]
    array = graph.constant(name)
    if array is not None:
        return Elements(array.shape, (), array if array.size > 1 else np.float64(array.reshape(-1)[0]))
    shape = graph.shapes.get(name)
    size = None if shape is None else int(np.prod(shape, dtype=np.float64))
    if shape is None or not 0 < size <= graph.most_elements:
        maker = graph.maker.get(name)
        first = _first_unknown(graph, name) if shape is None else None
        raise UnknownShape(
            f"the shape of {name[:100]!r}"
            + (f", which a {maker.op_type} node makes," if maker else "")
            + f" must be known and hold 1 to {graph.most_elements} elements, got {shape}"
            + (f": what {title(first)} gives of {', '.join(str(graph.shapes.get(each)) for each in first.input)[:100]} "
               "is not followed" if first is not None and first is not maker else "")
        )
    return Elements.of(name, shape)


def _first_unknown(graph, name):
    """The node above a value that gives no known shape, or no known numbers of a shape, of inputs that are known."""
    seen, shapes = set(), True
    while (node := graph.maker.get(name)) is not None and name not in seen:
        seen.add(name)
        above = [each for each in node.input if each and (
            graph.shapes.get(each) is None if shapes else not graph.is_known(each))]
        if not above and shapes and node.op_type in functions.LAYOUT:
            above, shapes = [each for each in list(node.input)[1:] if each and not graph.is_known(each)], False
        if not above or (not shapes and node.op_type == "Shape"):
            return node
        name = above[0]
    return None


def _step(graph, node, made):
    kind, attributes = node.op_type, graph.attributes(node)
    if kind in functions.LAYOUT:
        rest = [graph.constant(name) if name else None for name in list(node.input)[1:]]
        elements = _operand(graph, node.input[0], made)
        if kind == "Split":
            return [
                elements.moved(lambda x, i=i: functions.split(attributes, x, *rest, outputs=len(node.output))[i])
                for i in range(len(node.output))
            ]
        return [elements.moved(lambda x: functions.LAYOUT[kind](attributes, x, *rest))]
    if kind in functions.SAME:
        return [_operand(graph, node.input[0], made)]
    if kind == "Max":
        return [_operand(graph, next(name for name in node.input if graph.constant(name) is None), made)]
    inputs = [_operand(graph, name, made) for name in node.input]
    if kind in ("Add", "Sub", "Mul") and any(
            (array := graph.constant(name)) is not None and array.dtype == bool for name in node.input):
        raise NotRead(f"{title(node)} must take numbers, got a mask of bool, which no ONNX operator of sums takes: the "
                      "exporter that wrote it lost the mask; export for another opset")
    if (
        graph.shapes.get(node.output[0]) is None
        or np.prod(graph.shapes[node.output[0]], dtype=np.float64) > graph.most_elements
    ):
        raise NotRead(
            f"the tensors must have at most {graph.most_elements} elements, got "
            f"{reason(graph.shapes.get(node.output[0]))}"
        )
    if kind == "Concat":
        try:
            return [_joined(inputs, attributes.get("axis", 0))]
        except ValueError:
            raise UnknownShape(f"{title(node)} must have inputs that fit each other, got "
                               f"{reason([each.shape for each in inputs])}") from None
    if kind == "Where":
        return [_chosen(graph.constant(node.input[0]).astype(bool), *inputs[1:])]
    if kind == "Neg":
        return [inputs[0].times(-1.0)]
    if kind in ("Add", "Sum"):
        total = inputs[0]
        for each in inputs[1:]:
            total = total.plus(each)
        return [total]
    if kind == "Sub":
        return [inputs[0].plus(inputs[1].times(-1.0))]
    left, right = inputs if inputs[0].terms else inputs[::-1]
    factor = right.known()
    if kind == "Div" and not np.all(factor):
        raise NotRead("a Div by 0 is no scale")
    return [left.times(1 / factor if kind == "Div" else factor)]
