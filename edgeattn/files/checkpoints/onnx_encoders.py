"""Whole encoders in an ONNX graph: around each attention layer residuals, norms and the feed-forward network.

Attention is where it begins (`onnx_layers`). From there on values are followed: to the residual's sum, a norm, the
feed-forward network (`onnx_networks`), and the next sum. Which token each row is of is followed too (`onnx_rows`).
"""

import contextlib
import dataclasses
import itertools
import re
from typing import Any

import numpy as np

from edgeattn.files.checkpoints.onnx_codes import INSTEAD, rows_read, static_attention, static_feed_forward
from edgeattn.files.checkpoints.onnx_layers import ADDED, CAPS, UPPER_LEFT, attention_at
from edgeattn.files.checkpoints.onnx_networks import feed_forward, leaf_of, next_map
from edgeattn.files.checkpoints.onnx_nodes import title
from edgeattn.files.checkpoints.onnx_probes import between, norm_between
from edgeattn.files.checkpoints.onnx_projections import is_map_of
from edgeattn.files.checkpoints.onnx_relative import relative_bias
from edgeattn.files.checkpoints.onnx_rows import ALONE, FEW_NODES, PLAIN, root_of, rows_of, sum_behind
from edgeattn.files.checkpoints.onnx_values import NotRead

LONG = 150  # tokens: half the widest window of models known is 64
SHORTER = (128, 64, 32)  # of models whose tables, of a rotary embedding say, have no more rows
PART = "TransformerEncoder.from_onnx(path, nodes=range(...)) the layers of one part"


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
    networks: Any = ()  # the `Network` of the feed-forward, and that of large features
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
                          f"ImageEncoder.from_onnx read those of a model of texts and images, {PART}, {ALONE}")
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
        layer.attention = looked_further(layer.attention, graph, node)


def of_size(layer):
    """Take what scores have added, as BEiT's tables of distances in two directions, for images of the graph's size."""
    if layer.attention.added is not None:
        layer.attention = dataclasses.replace(
            layer.attention, told=[text for text in layer.attention.told if ADDED not in text],
            arguments={**layer.attention.arguments, "position_bias": layer.attention.added})


def looked_further(attention, graph, node):
    """The same with the masks, and T5's bias, that a graph of longer sequences shows."""
    found = attention_at(graph, node)
    told, arguments = found.told, attention.arguments
    if found.added is not None and (bias := relative_bias(graph, found.added)) is not None:
        told = [text for text in told if ADDED not in text]
        arguments = {**arguments, "position_bias": bias}
    return dataclasses.replace(attention, told=told, causal=found.causal, window=found.window, arguments=arguments)


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
    total, rows, other = sum_behind(graph, attention.end, name)
    residual = root_of(graph, other)
    rows = rows_of(graph, read, source)[attention.order[rows]]
    if (rows != rows_of(graph, other, residual)).any():
        raise NotRead(f"the residual of {name} must be of the tokens that it attends from, in their order")
    _refuse_parallel(graph, total, residual, source, name)
    try:
        feed = feed_forward(graph, total, name)
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
        if graph.constant(each) is None and leaf_of(graph, each, is_map_of(graph)) is not None:
            raise NotRead(f"{name} has a feed-forward network, or another map, beside it, not behind it: what it gives "
                          f"is added to what {title(graph.maker[each])} gives, as in GPT-J and GPT-NeoX, for which "
                          f"an encoder layer has no place; {ALONE}")


def _refuse_missing(graph, total, name, following):
    """Refuse attention behind which the next attention comes, without a feed-forward network between them."""
    first = None
    with contextlib.suppress(NotRead):
        then = attention_at(graph, following[0]) if following else None
        first = then and next_map(graph, total, name)
    if first and first in {each.source for each in then.apart.projections}:
        raise NotRead(f"between {name} and {title(following[0])} there must be a feed-forward network, got none; "
                      f"{ALONE}")


def _norm(graph, start, end, place, *, optional=False):
    """The norm between two values."""
    found = norm_between(graph, start, end)
    if found is None or not (found or optional):
        raise NotRead(f"{place} there must be a LayerNormalization or RMSNormalization over the features, in one node "
                      f"or taken apart, with constant weights; got {between(graph, {start}, end)}; {ALONE}")
    return found


def _norm_behind(graph, value):
    """(the value that a norm of a value gives, the norm); (the value, ()) where there is none."""
    found = value, ()
    if any(node.op_type in ("Add", "Sum") and all(graph.constant(name) is None for name in node.input)
           for node in graph.readers.get(value, ())):
        return found  # more layers follow, to which the norm belongs: the value is their residual
    for node in itertools.islice(graph.nodes_behind(value), FEW_NODES):
        end = graph.output(node)
        # a mask of ones, as models are read with, makes no other norm of one
        if node.op_type not in PLAIN and (norm := norm_between(graph, value, end)) and not _same(norm, found[1]):
            found = end, norm
    return found


def _same(norm, other):
    return bool(other) and norm[0] == other[0] and norm[3] == other[3] and all(
        np.array_equal(*pair) for pair in zip(norm[1:3], other[1:3], strict=True))
