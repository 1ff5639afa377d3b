"""Whole encoders in an ONNX graph: around each attention layer residuals, norms and the feed-forward network.

Attention is where it begins (`onnx_layers`). From there on values are followed to the next linear maps; what stands
between is computed and compared with norms and activations (`onnx_probes`), so that nothing depends on how a graph
writes them. Which token each row is of is followed too.
"""

import contextlib
import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np

from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_codes import (
    INSTEAD,
    further_outputs,
    rows_read,
    static_attention,
    static_feed_forward,
)
from edgeattn.files.checkpoints.onnx_elements import trace
from edgeattn.files.checkpoints.onnx_layers import ADDED, CAPS, UPPER_LEFT, attention_at
from edgeattn.files.checkpoints.onnx_nodes import title
from edgeattn.files.checkpoints.onnx_outputs import with_bias
from edgeattn.files.checkpoints.onnx_probes import activation_of, between, computed, norm_between, scaled_silu
from edgeattn.files.checkpoints.onnx_projections import is_map_of, linear
from edgeattn.files.checkpoints.onnx_relative import relative_bias
from edgeattn.files.checkpoints.onnx_values import NotRead

_PLAIN = (*functions.SAME, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
_FEW_NODES, _MOST_VALUES = 24, 64
LONG = 150  # tokens: half the widest window of models known is 64
_ROWS = 64  # of numbers that an activation is computed for
ALONE = "MultiHeadAttention.from_onnx(path, node=...) reads attention alone"


@dataclasses.dataclass
class Layer:
    """An encoder layer; weights (outputs, inputs), norms as `norm_between` gives them."""

    attention: Any  # as `attention_at` gives it
    linear1: tuple
    linear2: tuple
    gate: tuple | None
    activation: str
    norm1: tuple
    norm2: tuple
    norm_first: bool
    networks: Any = ()  # the `_Network` of the feed-forward, and that of large features
    static: Any = None  # (config, arrays), of attention and feed-forward in static int8, where that is asked for

    @property
    def window_size(self):
        """(left, right) that each token sees."""
        return self.attention.window


@dataclasses.dataclass
class Encoder:
    """Encoder layers one after the other."""

    layers: list
    norm: tuple
    start: str  # the value that goes into the first layer
    end: str  # what the last layer, or the norm behind it, gives

    @property
    def told(self):
        """What is to be given with each call, once for all layers."""
        texts = [text.replace(title(layer.attention.node), "attention").replace(UPPER_LEFT, "")
                 for layer in self.layers for text in layer.attention.told if "has a window" not in text]
        return list({re.sub("'.*'", "", text): text for text in reversed(texts)}.values())[::-1]


@dataclasses.dataclass
class _Feed:
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
class _Network:
    """Maps and the activation between them."""

    source: str
    activation: str
    value1: str  # features of the first map, where the activation, or the product with it, takes them
    linear1: Any  # a `_Leaf`
    value_gate: str | None
    gate: Any
    second: str  # the value of the second map
    linear2: tuple
    end: str  # what it gives with its bias
    further: Any  # (channels, offset) of outputs that go on where others end, or None
    whole: str  # the sum with these
    rows: Any  # the row of `source` that each row of `whole` is of
    steep: float  # what features are multiplied by before a silu, and divided by behind it

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


def read_encoder(graph, nodes, *, arithmetic=None):
    """The `Encoder` around some attention nodes, in their order; with `arithmetic`, a kernel set's name, static int8.

    Raises
    ------
    NotRead
        Naming the node where something else stands than an encoder layer.
    """
    if not nodes:
        raise NotRead("it must have attention: a Softmax between two products, or an Attention operator; got none")
    layers, start, stream = [], None, None
    for number, node in enumerate(nodes):
        layer, residual, total = _layer(graph, attention_at(graph, node), nodes[number + 1:])
        if arithmetic is not None:
            name = title(node)
            layer.static = (static_attention(graph, layer.attention, name, arithmetic),
                            static_feed_forward(graph, layer.networks, layer.activation, name, arithmetic))
        start = residual if start is None else start
        if layers and not layers[-1].norm_first:
            layers[-1].norm2 = _norm(graph, stream, residual, f"in front of {title(node)}")
        elif layers and residual != stream:
            raise NotRead(f"the residual of {title(node)} must be the sum that the layer before gives, {stream!r}, got "
                          f"{residual!r}: another encoder, or something between two layers; TextEncoder.from_onnx and "
                          f"ImageEncoder.from_onnx read those of a model of texts and images, {ALONE}")
        layers.append(layer)
        stream = total
    if not layers[-1].norm_first:
        stream, layers[-1].norm2 = _norm_behind(graph, stream)
        if not layers[-1].norm2:
            raise NotRead(f"{title(graph.maker[stream])} must have a norm behind it, as the other sums, got none")
    end, norm = _norm_behind(graph, stream)
    return Encoder(layers, norm, start, end)


def look_further(encoder, graph, nodes):
    """Take masks from the graph of longer sequences: a window is not seen in those of a few tokens, nor T5's bias."""
    for layer, node in zip(encoder.layers, nodes, strict=True):
        found = attention_at(graph, node)
        told, arguments = found.told, layer.attention.arguments
        if found.added is not None and (bias := relative_bias(graph, found.added)) is not None:
            told = [text for text in told if ADDED not in text]
            arguments = {**arguments, "position_bias": bias}
        layer.attention = dataclasses.replace(layer.attention, told=told, causal=found.causal, window=found.window,
                                              arguments=arguments)


def each_its_own(encoder):
    """Give layers that are causal among others a window, for a call's is_causal is for all of them."""
    if len({layer.attention.causal for layer in encoder.layers}) > 1:
        for layer in encoder.layers:
            if layer.attention.causal:
                layer.attention = dataclasses.replace(
                    layer.attention, causal=False, window=(layer.attention.window[0], 0),
                    told=[text for text in layer.attention.told if "is causal" not in text])


def refuse_positions(encoder):
    """Refuse a static encoder whose positions showed in the graph of longer sequences."""
    for layer in encoder.layers:
        if layer.static is not None and layer.attention.arguments.get("position_bias") is not None:
            raise NotRead(f"{title(layer.attention.node)} has positions of its own, which static int8 has not{INSTEAD}")


def _layer(graph, attention, following=()):
    """(the `Layer`, the value that goes in, the last sum); of a layer whose norms are behind the sums norm2 is ()."""
    name = title(attention.node)
    if capped := [text for text in attention.told if CAPS in text]:
        raise NotRead(f"{capped[0].partition(';')[0]}, for which an encoder has no place; MultiHeadAttention.from_onnx "
                      "reads it alone")
    read = rows_read(graph, attention.source).source
    sources = {root_of(graph, rows_read(graph, source).source) for source in attention.sources}
    if len(sources) != 1:
        raise NotRead(f"{name} must be attention of a sequence to itself, got queries, keys and values of "
                      f"{', '.join(sorted(map(repr, sources)))[:200]}; "
                      "MultiHeadAttention.from_onnx reads cross-attention")
    if attention.order is None:
        raise NotRead(f"{name} must have a MatMul or Gemm with constant weights behind it, which takes its heads side "
                      "by side; MultiHeadAttention.from_onnx reads it without")
    source = sources.pop()
    total, rows, other = _sum_behind(graph, attention.end, name)
    residual = root_of(graph, other)
    rows = rows_of(graph, read, source)[attention.order[rows]]
    if (rows != rows_of(graph, other, residual)).any():
        raise NotRead(f"the residual of {name} must be of the tokens that it attends from, in their order")
    _refuse_parallel(graph, total, residual, source, name)
    try:
        feed = _feed_forward(graph, total, name)
    except NotRead:
        _refuse_missing(graph, total, name, following)
        raise
    norm_first = feed.residual == total
    if norm_first:
        norm1 = _norm(graph, residual, source, f"in front of {name}", optional=True)
        norm2 = _norm(graph, total, feed.source, f"behind {name}", optional=True)
    else:
        norm1, norm2 = _norm(graph, total, feed.source, f"behind {name}"), ()
        for value, given in ((residual, source), (feed.residual, feed.source)):
            node = graph.maker.get(value)
            if node is not None and node.op_type in ("Mul", "Div") and given in node.input:
                raise NotRead(f"the residual of {name} must be what goes in, got {title(node)}, which multiplies it, "
                              "as DeepNet does; an encoder layer has no place for that")
        if source != residual or feed.residual != feed.source:
            raise NotRead(f"residuals around {name} must be both before norms or both behind them, got {residual!r} "
                          f"beside {source!r}, and {feed.residual!r} beside {feed.source!r}")
    if attention.source != read:  # further columns hold what codes leave of others: nothing, of the float layer
        width = graph.shapes[read][-1]
        attention.arguments |= {f"{part}_weight": attention.arguments[f"{part}_weight"][:, :width] for part in "qkv"}
    return Layer(attention, feed.linear1, feed.linear2, feed.gate, feed.activation, norm1, norm2,
                 norm_first, feed.networks), residual, feed.sum


def _refuse_parallel(graph, total, residual, source, name):
    """Refuse a layer whose feed-forward network stands beside attention, not behind it."""
    reader = graph.reader(total)
    beside = [] if reader is None or reader.op_type not in ("Add", "Sum") else [
        each for each in reader.input if each != total]
    if norm_between(graph, residual, source) is None and graph.made(residual) > graph.made(source):
        beside.append(residual)
    for each in beside:
        if graph.constant(each) is None and _leaf(graph, each, is_map_of(graph)) is not None:
            raise NotRead(f"{name} has a feed-forward network, or another map, beside it, not behind it: what it gives "
                          f"is added to what {title(graph.maker[each])} gives, as in GPT-J and GPT-NeoX, for which "
                          f"an encoder layer has no place; {ALONE}")


def _refuse_missing(graph, total, name, following):
    """Refuse attention behind which the next attention comes, without a feed-forward network between them."""
    first = None
    with contextlib.suppress(NotRead):
        then = attention_at(graph, following[0]) if following else None
        first = then and _next_map(graph, total, name)
    if first and first in {each.source for each in then.apart.projections}:
        raise NotRead(f"between {name} and {title(following[0])} there must be a feed-forward network, got none; "
                      f"{ALONE}")


def root_of(graph, name):
    """The value whose rows, of a token's features each, a value has in another layout."""
    while (node := graph.maker.get(name)) is not None and node.op_type in _PLAIN and graph.constant(name) is None:
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


def _norm(graph, start, end, place, *, optional=False):
    """The norm between two values."""
    found = norm_between(graph, start, end)
    if found is None or not (found or optional):
        raise NotRead(f"{place} there must be a LayerNormalization or RMSNormalization over the features, in one node "
                      f"or taken apart, with constant weights; got {between(graph, {start}, end)}")
    return found


def _norm_behind(graph, value):
    """(the value that a norm of a value gives, the norm); (the value, ()) where there is none."""
    found = value, ()
    for node in itertools.islice(graph.nodes_behind(value), _FEW_NODES):
        end = graph.output(node)
        # a mask of ones, as models are read with, makes no other norm of one
        if node.op_type not in _PLAIN and (norm := norm_between(graph, value, end)) and not _same(norm, found[1]):
            found = end, norm
    return found


def _same(norm, other):
    return bool(other) and norm[0] == other[0] and norm[3] == other[3] and all(
        np.array_equal(*pair) for pair in zip(norm[1:3], other[1:3], strict=True))


def _sum_behind(graph, value, name):
    """(the sum of a value and a computed one, the row of the value that each of it has, the other)."""
    start = value
    for _ in range(_FEW_NODES):
        readers = [node for node in graph.readers.get(value, ()) if node.op_type not in ("Shape", "Size")]
        if len(readers) != 1:
            break
        node = readers[0]
        if node.op_type in ("Add", "Sum") and len(node.input) == 2:
            other = node.input[1] if node.input[0] == value else node.input[0]
            total, shape = graph.output(node), graph.shapes.get(other)
            if total and graph.constant(other) is None and shape == graph.shapes.get(value):
                return total, rows_of(graph, value, start), other
        if node.op_type not in _PLAIN:
            break
        value = graph.output(node)
    readers = ", ".join(map(title, graph.readers.get(value, ()))) or "nothing"
    raise NotRead(f"what {name} gives must be added to what it was given, as a residual; got {readers[:300]} behind "
                  f"{value[:100]!r}")


def _next_map(graph, value, name):
    """The result of the first linear map of what is computed of a value."""
    of = {value}
    for node in graph.nodes_behind(value):
        found = linear(graph, graph.output(node))
        if found is not None and found.source in of:
            return graph.output(node)
        of.update(node.output)
    raise NotRead(f"behind {name} there must be a feed-forward network, of MatMul or Gemm with constant weights, an "
                  f"activation and MatMul or Gemm; got none behind {value[:100]!r}")


@dataclasses.dataclass
class _Leaf:
    """A value that is features of a linear map, each times a number plus a number."""

    map: str
    rows: Any
    features: Any
    factor: Any
    offset: Any
    shape: tuple

    @property
    def part(self):
        return self.map, tuple(self.features.tolist())

    def times(self, number):
        """The same features, multiplied."""
        return self if number == 1 else dataclasses.replace(
            self, factor=self.factor * number, offset=self.offset * number)


def _feed_forward(graph, start, name):
    net = _network(graph, _next_map(graph, start, name), name)
    networks, rows = [net], net.rows
    what = f"the feed-forward network behind {name}"
    total, order, other = _sum_behind(graph, net.whole, what)
    rows, residual = rows[order], root_of(graph, other)
    if residual not in (start, net.source) and (large := _second_network(graph, start, net, name)) is not None and (
            root_of(graph, large.whole) == residual):
        networks.append(large)
        total, order, other = _sum_behind(graph, total, what)
        rows, residual = rows[order], root_of(graph, other)
    linear1, gate, linear2 = net.float_maps(graph)
    for large in networks[1:]:
        more = large.float_maps(graph)
        linear1, gate = (None if one is None else _joined(one, other, 0)
                         for one, other in zip((linear1, gate), more[:2], strict=True))
        linear2 = _joined(linear2, more[2], 1)
    if (rows != rows_of(graph, other, residual)).any():
        raise NotRead(f"{what} must keep the order of tokens")
    return _Feed(net.source, linear1, linear2, gate, net.activation, total, residual, tuple(networks))


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
    """The `_Network` that begins with a map."""
    second = _next_map(graph, first, name)
    found = linear(graph, second)
    top = root_of(graph, found.source)
    leaves = _leaves(graph, top, name)
    place = f"{title(graph.maker[first])} and {title(graph.maker[second])}"
    try:
        activation, value1, value_gate, steep = (
            ("relu", top, None, 1.0) if list(leaves) == [top] and _clipped(graph, found.source)
            else _activation(graph, top, leaves, place))
    except NotRead:  # of features that are scaled in several ways, as GELU's are, before anything else is done
        lifted = _lifted(graph, leaves)
        if lifted.keys() == leaves.keys():
            raise
        leaves = lifted
        activation, value1, value_gate, steep = _activation(graph, top, leaves, place)
    read = {value: rows_read(graph, linear(graph, leaf.map).source).source for value, leaf in leaves.items()}
    sources = {root_of(graph, each) for each in read.values()}
    if len(sources) != 1:
        raise NotRead(f"the feed-forward network behind {name} must be of one input, got {sorted(sources)}"[:500])
    source = sources.pop()
    linear1, gate = leaves[value1], leaves.get(value_gate)
    if gate is None:
        linear1 = linear1.times(steep)
    else:
        gate = gate.times(steep)
    if len(linear1.features) != found.weight.shape[0]:
        raise NotRead(f"{title(graph.maker[second])} must take the {len(linear1.features)} features that come to it, "
                      f"got weights {found.weight.shape}")
    weight = found.weight.T if steep == 1 else found.weight.T / np.float32(steep)
    end, linear2, last = with_bias(graph, second, weight, found.bias)
    ways = [rows_of(graph, read[value], source)[leaf.rows] for value, leaf in leaves.items()]
    if any((way != ways[0]).any() for way in ways):
        raise NotRead(f"the feed-forward network behind {name} must keep the order of tokens")
    further = further_outputs(graph, end)
    whole, further = (end, None) if further is None else (further[0], further[1:])
    return _Network(source, activation, value1, linear1, value_gate, gate, second, linear2, end, further, whole,
                    ways[0][rows_of(graph, found.source, top)][last], steep)


def _leaves(graph, top, name):
    """The `_Leaf`s that a value is computed of, by their names."""
    is_map = is_map_of(graph)
    todo, leaves, seen = [top], {}, set()
    while todo:
        value = todo.pop()
        if value in seen or not value or graph.constant(value) is not None:
            continue
        seen.add(value)
        leaf = _leaf(graph, value, is_map)
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
    for _ in range(_FEW_NODES):
        node = graph.maker.get(value)
        if node is None or node.op_type not in _PLAIN:
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
                above := _leaf(graph, inputs[0], is_map)) is not None:
            lifted[inputs[0]] = above
        else:
            lifted[value] = leaf
    return lifted


def _leaf(graph, value, is_map):
    elements = trace(graph, value, is_map)
    if len(elements.terms) != 1 or not is_map(elements.terms[0].source) or not elements.shape:
        return None
    term, shape = elements.terms[0], elements.shape
    width = linear(graph, term.source).weight.shape[1]
    rows, features = np.divmod(term.index.reshape(-1, shape[-1]), width)
    factor, offset = (np.broadcast_to(each, shape).reshape(-1, shape[-1]) for each in (term.factor, elements.known()))
    if any((each != each[:1]).any() for each in (features, factor, offset)) or (rows != rows[:, :1]).any():
        return None
    return _Leaf(term.source, rows[:, 0], features[0], factor[0], offset[0], shape)


def _activation(graph, top, leaves, place):
    """(name, linear1, gate or None, factor) of the activation that a value is of features of maps, by their names.

    With a factor it is of that many times the features, and divided by it.
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
    tried, steepened = [], None
    for part in parts:
        other = next((each for each in parts if each != part), None)
        for leaf in (leaf for leaf in leaves.values() if leaf.part == part):
            x = given[part] * leaf.factor + leaf.offset
            for beside in [None] if other is None else [leaf for leaf in leaves.values() if leaf.part == other]:
                by = 1.0 if beside is None else given[other] * beside.factor + beside.offset
                activation, near = activation_of(made, x, by, half=graph.half)
                if activation is not None:
                    name = names[id(leaf)]
                    return (activation, name, None, 1.0) if beside is None else (
                        activation, names[id(beside)], name, 1.0)
                tried.append(near)
                if (steep := scaled_silu(made, x, by)) is not None:
                    steepened = ("silu", names[id(leaf)], None, steep) if beside is None else (
                        "silu", names[id(beside)], names[id(leaf)], steep)
    if steepened is not None:
        return steepened
    raise NotRead(f"between {place} there must be gelu, gelu_tanh, relu or silu, times another map or not, in whatever "
                  f"nodes; got {between(graph, starts, top)}: the nearest is {min(tried)[1]}")


def map_of(graph, value):
    """(weight, bias or None) of the linear map whose features a value is.

    Raises
    ------
    NotRead
        Where it is none.
    """
    leaf = _leaf(graph, value, is_map_of(graph))
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
