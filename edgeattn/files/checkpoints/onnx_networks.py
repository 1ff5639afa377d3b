"""Feed-forward networks in an ONNX graph: linear maps, and what is computed of their features.

Values are followed from what goes into a network to the next linear maps; what stands between is computed and compared
with activations (`onnx_probes`), so that nothing depends on how a graph writes them.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from edgeattn.files.checkpoints.onnx_codes import further_outputs, rows_read
from edgeattn.files.checkpoints.onnx_elements import trace
from edgeattn.files.checkpoints.onnx_nodes import title
from edgeattn.files.checkpoints.onnx_outputs import with_bias
from edgeattn.files.checkpoints.onnx_probes import activation_of, between, computed, multiple_of, scaled_silu
from edgeattn.files.checkpoints.onnx_projections import is_map_of, linear
from edgeattn.files.checkpoints.onnx_rows import FEW_NODES, PLAIN, root_of, rows_of, sum_behind
from edgeattn.files.checkpoints.onnx_values import NotRead

_MOST_VALUES = 64
_ROWS = 64  # of numbers that an activation is computed for


@dataclasses.dataclass
class Feed:
    """The feed-forward network behind a sum, to the sum behind it."""

    source: str  # what goes into its first maps
    linear1: tuple
    linear2: tuple
    gate: tuple | None
    activation: str
    sum: str
    residual: str  # the other side of that sum
    networks: tuple


@dataclasses.dataclass
class Network:
    """Maps and the activation between them."""

    source: str
    activation: str
    value1: str  # features of the first map, where the activation, or the product with it, takes them
    linear1: Any  # a `Leaf`
    value_gate: str | None
    gate: Any
    second: str  # the value of the second map
    linear2: tuple
    end: str  # what it gives with its bias
    further: Any  # (channels, offset) of outputs that go on where others end, or None
    whole: str  # the sum with these
    rows: Any  # the row of `source` that each row of `whole` is of
    before: float  # what features are multiplied by to have this activation: of a steeper silu
    behind: float  # what the graph's values are multiplied by to be those of the activation

    def weights(self, graph, leaf):
        """(weight, bias) of a first map."""
        return _map_of(graph, leaf)

    def float_maps(self, graph):
        """linear1, gate and linear2 without further columns and outputs: of the float network these add nothing."""
        inputs = graph.shapes[self.source][-1]
        maps = [None if leaf is None else _map_of(graph, leaf) for leaf in (self.linear1, self.gate)]
        weight, bias = self.linear2
        outputs = graph.shapes[self.whole][-1]
        return (*(each and (each[0][:, :inputs], each[1]) for each in maps),
                (weight[:outputs], None if bias is None else bias[:outputs]))


@dataclasses.dataclass
class Leaf:
    """A value that is features of a linear map, each times a number plus a number."""

    map: str
    rows: Any
    features: Any
    factor: Any
    offset: Any
    shape: tuple

    @property
    def part(self):
        """What is equal for the same features of the same map."""
        return self.map, tuple(self.features.tolist())

    def times(self, number):
        """The same features, multiplied."""
        return self if number == 1 else dataclasses.replace(
            self, factor=self.factor * number, offset=self.offset * number)


def feed_forward(graph, start, name):
    """The `Feed` of a sum, to the sum behind it; name: of the attention, for errors."""
    net = _network(graph, next_map(graph, start, name), name)
    networks, rows = [net], net.rows
    what = f"the feed-forward network behind {name}"
    total, order, other = sum_behind(graph, net.whole, what)
    rows, residual = rows[order], root_of(graph, other)
    if residual not in (start, net.source) and (large := _second_network(graph, start, net, name)) is not None and (
            root_of(graph, large.whole) == residual):
        networks.append(large)
        total, order, other = sum_behind(graph, total, what)
        rows, residual = rows[order], root_of(graph, other)
    linear1, gate, linear2 = net.float_maps(graph)
    for large in networks[1:]:
        more = large.float_maps(graph)
        linear1, gate = (None if one is None else _joined(one, other, 0)
                         for one, other in zip((linear1, gate), more[:2], strict=True))
        linear2 = _joined(linear2, more[2], 1)
    if (rows != rows_of(graph, other, residual)).any():
        raise NotRead(f"{what} must keep the order of tokens")
    return Feed(net.source, linear1, linear2, gate, net.activation, total, residual, tuple(networks))


def _joined(one, other, axis):
    """(weight, bias) of two maps: outputs side by side (axis 0), or inputs, whose results are added."""
    biases = [each for _, each in (one, other) if each is not None]
    if axis == 0 and biases:
        biases = [np.zeros(len(weight), np.float32) if bias is None else bias for weight, bias in (one, other)]
    bias = None if not biases else np.concatenate(biases) if axis == 0 else sum(biases[1:], biases[0])
    return np.concatenate([one[0], other[0]], axis), bias


def _second_network(graph, start, net, name):
    """A further network of the same input, as `_network`; None where there is none."""
    known = {net.linear1.map, net.second} | ({net.gate.map} if net.gate is not None else set())
    of = {start}
    for node in graph.nodes_behind(start):
        found = linear(graph, graph.output(node))
        if found is not None and found.source in of and graph.output(node) not in known and (
                root_of(graph, rows_read(graph, found.source).source) == net.source):
            large = _network(graph, graph.output(node), name)
            same = (large.source, large.activation, large.gate is None) == (
                net.source, net.activation, net.gate is None)
            return large if same and large.second not in known else None
        of.update(node.output)
    return None


def _network(graph, first, name):
    """The `Network` that begins with a map."""
    second = next_map(graph, first, name)
    found = linear(graph, second)
    top = root_of(graph, found.source)
    leaves = _leaves(graph, top, name)
    place = f"{title(graph.maker[first])} and {title(graph.maker[second])}"
    try:
        activation, value1, value_gate, before, behind = (
            ("relu", top, None, 1.0, 1.0) if list(leaves) == [top] and _clipped(graph, found.source)
            else _activation(graph, top, leaves, place))
    except NotRead:  # of features that are scaled in several ways, as GELU's are, before anything else is done
        lifted = _lifted(graph, leaves)
        if lifted.keys() == leaves.keys():
            raise
        leaves = lifted
        activation, value1, value_gate, before, behind = _activation(graph, top, leaves, place)
    read = {value: rows_read(graph, linear(graph, leaf.map).source).source for value, leaf in leaves.items()}
    sources = {root_of(graph, each) for each in read.values()}
    if len(sources) != 1:
        raise NotRead(f"the feed-forward network behind {name} must be of one input, got {sorted(sources)}"[:500])
    source = sources.pop()
    linear1, gate = leaves[value1], leaves.get(value_gate)
    if gate is None:
        linear1 = linear1.times(before)
    else:
        gate = gate.times(before)
    if len(linear1.features) != found.weight.shape[0]:
        raise NotRead(f"{title(graph.maker[second])} must take the {len(linear1.features)} features that come to it, "
                      f"got weights {found.weight.shape}")
    weight = found.weight.T if behind == 1 else found.weight.T / np.float32(behind)
    end, linear2, last = with_bias(graph, second, weight, found.bias)
    ways = [rows_of(graph, read[value], source)[leaf.rows] for value, leaf in leaves.items()]
    if any((way != ways[0]).any() for way in ways):
        raise NotRead(f"the feed-forward network behind {name} must keep the order of tokens")
    further = further_outputs(graph, end)
    whole, further = (end, None) if further is None else (further[0], further[1:])
    return Network(source, activation, value1, linear1, value_gate, gate, second, linear2, end, further, whole,
                    ways[0][rows_of(graph, found.source, top)][last], before, behind)


def next_map(graph, value, name):
    """The result of the first linear map of what is computed of a value."""
    of = {value}
    for node in graph.nodes_behind(value):
        found = linear(graph, graph.output(node))
        if found is not None and found.source in of:
            return graph.output(node)
        of.update(node.output)
    raise NotRead(f"behind {name} there must be a feed-forward network, of MatMul or Gemm with constant weights, an "
                  f"activation and MatMul or Gemm; got none behind {value[:100]!r}")


def _leaves(graph, top, name):
    """The `Leaf`s that a value is computed of, by their names."""
    is_map = is_map_of(graph)
    todo, leaves, seen = [top], {}, set()
    while todo:
        value = todo.pop()
        if value in seen or not value or graph.constant(value) is not None:
            continue
        seen.add(value)
        leaf = leaf_of(graph, value, is_map)
        if leaf is not None:
            leaves[value] = leaf
            continue
        node = graph.maker.get(value)
        if node is None or len(seen) > _MOST_VALUES:
            raise NotRead(f"the feed-forward network behind {name} must have an activation of what its first MatMul or "
                          f"Gemm gives, got one of {value[:100]!r}")
        todo.extend(node.input)
    if len({leaf.shape for leaf in leaves.values()}) != 1 or {graph.shapes.get(top)} != {
            leaf.shape for leaf in leaves.values()}:
        raise NotRead(f"the activation behind {name} must keep the shape of what comes to it, got "
                      f"{[leaf.shape for leaf in leaves.values()]} and {graph.shapes.get(top)}")
    return leaves


def _clipped(graph, value):
    """Whether codes of a value have none below zero: quantizers leave a ReLU out in front of these."""
    for _ in range(FEW_NODES):
        node = graph.maker.get(value)
        if node is None or node.op_type not in PLAIN:
            break
        value = node.input[0]
        if node.op_type == "QuantizeLinear":
            zero = graph.constant(graph.input(node, 2)) if graph.input(node, 2) else np.zeros(1, np.uint8)
            if zero is not None and zero.dtype.kind in "iu" and (zero == np.iinfo(zero.dtype).min).all():
                return True
    return False


def _lifted(graph, leaves):
    """The same, those that are a number times such a value by that value."""
    lifted, is_map = {}, is_map_of(graph)
    for value, leaf in leaves.items():
        node = graph.maker.get(value)
        inputs = [] if node is None or node.op_type not in ("Mul", "Div") else [
            name for name in node.input if graph.constant(name) is None]
        numbers = [] if not inputs else [graph.constant(name) for name in node.input if name not in inputs]
        if len(inputs) == len(numbers) == 1 and numbers[0].size == 1 and (
                above := leaf_of(graph, inputs[0], is_map)) is not None:
            lifted[inputs[0]] = above
        else:
            lifted[value] = leaf
    return lifted


def leaf_of(graph, value, is_map):
    """The `Leaf` that a value is; None where it is computed otherwise."""
    elements = trace(graph, value, is_map)
    if len(elements.terms) != 1 or not is_map(elements.terms[0].source) or not elements.shape:
        return None
    term, shape = elements.terms[0], elements.shape
    width = linear(graph, term.source).weight.shape[1]
    rows, features = np.divmod(term.index.reshape(-1, shape[-1]), width)
    factor, offset = (np.broadcast_to(each, shape).reshape(-1, shape[-1]) for each in (term.factor, elements.known()))
    if any((each != each[:1]).any() for each in (features, factor, offset)) or (rows != rows[:, :1]).any():
        return None
    return Leaf(term.source, rows[:, 0], features[0], factor[0], offset[0], shape)


def _activation(graph, top, leaves, place):
    """(name, linear1, gate or None, before, behind) of the activation that a value is of features of maps.

    These are names of values, and what `Network` has of these names: exporters move numbers to the next map.
    """
    names = {id(leaf): value for value, leaf in leaves.items()}
    parts = list(dict.fromkeys(leaf.part for leaf in leaves.values()))
    starts = set(leaves)
    if len(parts) > 2:
        raise NotRead(f"between {place} there must be an activation, of one map or of a gate's and another's, got "
                      f"{len(parts)} maps")
    axes, width = len(graph.shapes[top]), graph.shapes[top][-1]
    made = None
    for rows in ((1,) * (axes - 2) + (_ROWS,), graph.shapes[top][:-1]):
        numbers = np.random.default_rng(0)
        given = {part: 3 * numbers.standard_normal((math.prod(rows), width)) for part in parts}
        try:
            made = computed(graph, top, {value: (given[leaf.part] * leaf.factor + leaf.offset).reshape(*rows, width)
                                         for value, leaf in leaves.items()})
        except NotRead:
            continue
        if made is not None and made.shape == (*rows, width):
            break
    else:
        raise NotRead(f"between {place} there must be an activation of features, got "
                      f"{between(graph, starts, top)}")
    made = made.reshape(-1, width)
    tried, scaled = [], None
    for part in parts:
        other = next((each for each in parts if each != part), None)
        for leaf in (leaf for leaf in leaves.values() if leaf.part == part):
            x = given[part] * leaf.factor + leaf.offset
            for beside in [None] if other is None else [leaf for leaf in leaves.values() if leaf.part == other]:
                by = 1.0 if beside is None else given[other] * beside.factor + beside.offset
                activation, near = activation_of(made, x, by, half=graph.half)
                which = (names[id(leaf)], None) if beside is None else (names[id(beside)], names[id(leaf)])
                if activation is not None:
                    return activation, *which, 1.0, 1.0
                tried.append(near)
                if (steep := scaled_silu(made, x, by)) is not None:
                    scaled = "silu", *which, steep, steep
                elif (found := multiple_of(made, x, by, half=graph.half)) is not None:
                    scaled = found[0], *which, 1.0, 1 / found[1]
    if scaled is not None:
        return scaled
    raise NotRead(f"between {place} there must be gelu, gelu_tanh, relu or silu, times another map or not, in whatever "
                  f"nodes; got {between(graph, starts, top)}: the nearest is {min(tried)[1]}")


def map_of(graph, value):
    """(weight, bias or None) of the linear map whose features a value is.

    Raises
    ------
    NotRead
        Where it is none.
    """
    leaf = leaf_of(graph, value, is_map_of(graph))
    if leaf is None:
        raise NotRead(f"{value[:100]!r} must be what a MatMul or Gemm with constant weights gives, plus a bias")
    return _map_of(graph, leaf)


def _map_of(graph, leaf):
    """(weight, bias or None) of the features of a leaf."""
    found = linear(graph, leaf.map)
    weight, factor = found.weight.T[leaf.features], np.float32(leaf.factor)
    bias = None if found.bias is None else found.bias[leaf.features] * factor
    if leaf.offset.any():
        bias = leaf.offset if bias is None else bias + leaf.offset
    return (np.asarray(weight if (factor == 1).all() else weight * factor[:, None], np.float32),
            None if bias is None else np.asarray(bias, np.float32))
