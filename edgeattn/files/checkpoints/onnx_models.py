"""Whole models in an ONNX graph: an encoder, the embedding in front of it, and what is made of its tokens."""

import dataclasses
import math
from typing import Any

import numpy as np

from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_elements import trace
from edgeattn.files.checkpoints.onnx_encoders import (
    LONG,
    SHORTER,
    Encoder,
    each_its_own,
    look_further,
    of_size,
    read_encoder,
    refuse_positions,
)
from edgeattn.files.checkpoints.onnx_networks import map_of
from edgeattn.files.checkpoints.onnx_nodes import title
from edgeattn.files.checkpoints.onnx_probes import computed, norm_between
from edgeattn.files.checkpoints.onnx_projections import linear
from edgeattn.files.checkpoints.onnx_relative import real_table
from edgeattn.files.checkpoints.onnx_rows import root_of
from edgeattn.files.checkpoints.onnx_values import NotRead
from edgeattn.files.paths import reason

_FEW_TYPES = 16  # a table with as many rows at most is one of token types
_FEW_VALUES = 24
_ROWS = ("Unsqueeze", "Squeeze", "Reshape", *functions.SAME)  # what leaves rows in their order
_LAYOUT = ("Unsqueeze", "Squeeze", "Reshape", "Expand", "Slice", *functions.SAME)


@dataclasses.dataclass
class Text:
    """A text encoder; tables (rows, features)."""

    tokens: Any
    positions: Any
    types: Any
    padding_id: int | None
    norm: tuple
    projection: tuple | None
    encoder: Encoder
    is_causal: bool
    pooling: str | None = None  # where the graph has one
    normalize: bool = False
    told: str | None = None  # a warning
    places: str = ""  # the value that a Gather makes of the table of positions


@dataclasses.dataclass
class Image:
    """An image encoder; `places` (first tokens + patches, features)."""

    weight: Any  # (features, channels, height, width)
    bias: Any
    places: Any
    stride: tuple
    image_size: tuple
    encoder: Encoder
    norm: tuple  # in front of the layers


def read_text(graphs, nodes_of, ids, bound, arithmetic=None, *, traced=False):
    """The `Text` of a model; `graphs(bound)` gives its graph, `nodes_of(graph)` the attention nodes.

    `ids` and `bound` are what `text_inputs` gives, `arithmetic` is as of `read_encoder`; of a model that was `traced`
    for one length `graphs` gives that of this one, and masks of others need not be in it.

    Raises
    ------
    NotRead
        Naming the node where something else stands than in a text encoder.
    """
    graph = graphs(bound)
    encoder = read_encoder(graph, nodes_of(graph), arithmetic=arithmetic)
    value, projection = encoder.start, None
    if (found := linear(graph, root_of(graph, _before_bias(graph, value)))) is not None:
        projection = map_of(graph, value)
        value = root_of(graph, found.source)
    value, norm = _norm_above(graph, value)
    text = Text(None, None, None, None, norm, projection, encoder, False)
    try:
        for part, factor in _summands(graph, value):
            _take(graph, text, part, ids, factor)
    except NotRead as error:
        raise NotRead(f"{error}; TransformerEncoder.from_onnx reads the layers alone") from None
    if text.tokens is None:
        raise NotRead(f"the embedding of tokens must be a Gather from a constant table by the input {ids!r}, got none "
                      f"in front of {encoder.start[:100]!r}")
    longest = LONG if text.positions is None else min(len(text.positions) - (text.padding_id or -1) - 1, LONG)
    errors: list = []
    for length in (longest, *(n for n in SHORTER if n < longest and text.positions is None)):
        try:
            _look_further(text, graphs(bound, length), nodes_of, length)
            break
        except NotRead as error:
            errors.append(error)
    else:
        if not traced:
            raise errors[0]
    _masks(text)
    text.pooling, text.normalize = _pooling(graphs, bound, encoder.end, ids)
    given = {name: root_of(graph, name) for name in graph.outputs}
    if text.pooling is None and encoder.end not in given.values():
        names = ", ".join(sorted(given))[:200]
        text.told = (f"the model gives {names}, which is neither what its encoder gives, {encoder.end[:100]!r}, nor a "
                     "pooling of it; what it computes behind is not part of the text encoder, whose encode() pools "
                     "tokens as `pooling` says")
    return text


def _look_further(text, graph, nodes_of, length):
    """Take masks, and how positions are numbered, from the graph of longer texts."""
    look_further(text.encoder, graph, nodes_of(graph))
    if text.places:
        node = graph.maker[text.places]
        index = graph.constant(node.input[1])
        if index is None or not _consecutive(index.reshape(-1, index.shape[-1])):
            raise NotRead(f"{title(node)} must gather by positions one after the other, got another rule in texts "
                          f"of {length} tokens")


def _masks(text):
    """Take the masks of the layers."""
    refuse_positions(text.encoder)
    if any(layer.window_size[1] != 0 for layer in text.encoder.layers):
        each_its_own(text.encoder)
    told = [each for each in text.encoder.told if "is causal" not in each]
    if told:
        raise NotRead(f"a text encoder must have no masks but padding, causal ones and windows, got: {told[0]}; "
                      "from_pretrained reads models with relative positions from their folders, and "
                      "TransformerEncoder.from_onnx the layers alone")
    text.is_causal = all(layer.attention.causal or layer.window_size[1] == 0 for layer in text.encoder.layers)


def text_inputs(graph):
    """(the input of token ids, what to take the others for: no padding, one type, positions from 0 on).

    Raises
    ------
    NotRead
        Where nothing is gathered by an input.
    """
    tables = {}
    for node in graph.nodes:
        if node.op_type == "Gather" and len(node.input) == 2 and graph.attributes(node).get("axis", 0) == 0:
            rows = graph.shapes.get(node.input[0])
            name = root_of(graph, node.input[1])
            if name in graph.inputs and rows is not None and len(rows) == 2 and graph.is_known(node.input[0]):
                tables[name] = max(rows[0], tables.get(name, 0))
    if not tables:
        raise NotRead("a text encoder must begin with a Gather from a constant table of embeddings by an input of "
                      "token ids, got none; TransformerEncoder.from_onnx reads the layers alone")
    ids = max(tables, key=lambda name: tables[name])
    bound = {}
    for name in graph.inputs:
        if name == ids or graph.is_known(name):
            continue
        if name not in tables:
            bound[name] = lambda shape: np.ones(shape, np.int64)
        elif tables[name] <= _FEW_TYPES:
            bound[name] = lambda shape: np.zeros(shape, np.int64)
        else:
            bound[name] = lambda shape: np.broadcast_to(np.arange(shape[-1]), shape)
    return ids, bound


def _before_bias(graph, value):
    """The product that a value is, plus a constant."""
    node = graph.maker.get(root_of(graph, value))
    if node is not None and node.op_type == "Add":
        computed_ = [name for name in node.input if graph.constant(name) is None]
        return computed_[0] if len(computed_) == 1 else value
    return value


def _norm_above(graph, value):
    """(the value furthest above whose norm a value is, the norm); (the value, ()) where it is none."""
    todo, seen, found = [value], set(), (value, ())
    while todo and len(seen) < _FEW_VALUES:
        each = todo.pop(0)
        if each in seen or graph.constant(each) is not None:
            continue
        seen.add(each)
        if each != value and (norm := norm_between(graph, each, value)):
            found = each, norm
        node = graph.maker.get(each)
        todo += [] if node is None or node.op_type == "Gather" else [name for name in node.input if name]
    return found


def _summands(graph, value):
    """The values whose sum a value is, each with the number that it is multiplied by."""
    todo, found = [(value, np.float32(1))], []
    while todo:
        each, factor = todo.pop()
        node = graph.maker.get(each)
        if node is not None and node.op_type in ("Add", "Sum"):
            todo.extend((name, factor) for name in node.input)
        elif node is not None and node.op_type in _ROWS and not graph.is_known(each):
            todo.append((node.input[0], factor))
        elif (scaled := _scaled(graph, node)) is not None:
            todo.append((scaled[0], factor * scaled[1]))
        else:
            found.append((each, factor))
        if len(found) + len(todo) > _FEW_VALUES:
            raise NotRead(f"an embedding must be the sum of few tables, got more in front of {value[:100]!r}")
    return found


def _scaled(graph, node):
    """(a value, the number that a node multiplies it by), sqrt(E) or a mask of ones; None for other nodes."""
    if node is None or node.op_type not in ("Mul", "Div"):
        return None
    known = [graph.constant(name) for name in node.input]
    if sum(array is None for array in known) != 1 or (node.op_type == "Div" and known[0] is not None):
        return None
    (number,) = (array for array in known if array is not None)
    if not number.size or (number != number.flat[0]).any() or not (number := np.float32(number.flat[0])):
        return None
    return node.input[known[0] is not None], 1 / number if node.op_type == "Div" else number


def _take(graph, text, value, ids, factor):
    """Take one summand of the embedding, multiplied by a number."""
    node = graph.maker.get(value)
    while node is not None and node.op_type in _LAYOUT and graph.constant(value) is not None and (
            graph.is_computed(node.input[0])):
        value, node = node.input[0], graph.maker.get(node.input[0])
    if node is None or node.op_type != "Gather":
        return _take_constant(graph, text, value, factor)
    table, index = graph.constant(node.input[0]), graph.constant(node.input[1])
    if table is None or table.ndim != 2 or graph.attributes(node).get("axis", 0):
        raise NotRead(f"{title(node)} must gather rows of a constant table, got "
                      f"{None if table is None else table.shape}")
    codes, table = table.dtype, real_table(graph, node, table)
    if table is None:
        raise NotRead(f"{title(node)} must gather rows of numbers, or of codes with one scale in a DequantizeLinear "
                      f"behind it, got {codes}")
    table = np.asarray(table, np.float32)
    table = table if factor == 1 else table * factor
    if index is None and root_of(graph, node.input[1]) == ids:
        return _put(text, "tokens", table, title(node))
    if index is None:
        padding = _padding_id(graph, node.input[1], ids, len(table), title(node))
        if padding is None:
            return _put(text, "types", table, title(node))
        text.padding_id = padding
        return _put(text, "positions", table, title(node))
    steps = index.reshape(-1, index.shape[-1]) if index.ndim else index.reshape(1, 1)
    if (steps == 0).all():
        return _put(text, "types", table, title(node))
    if _consecutive(steps):
        text.places = graph.output(node)
        return _put(text, "positions", table[steps[0, 0]:], title(node))
    raise NotRead(f"{title(node)} must gather by token ids, by positions from 0 on, or one type, got "
                  f"{reason(index.tolist())}")


def _consecutive(steps):
    return (steps == steps[:1, :1] + np.arange(steps.shape[1])).all() and steps[0, 0] >= 0


def _take_constant(graph, text, value, factor):
    """Take a summand that is a constant: a part of a table of positions, or the same for each token."""
    array = graph.constant(value)
    if array is None:
        node = graph.maker.get(value)
        raise NotRead("an embedding must be a sum of Gather from constant tables, got "
                      f"{value[:100]!r}, an input of the graph" if node is None else
                      f"an embedding must be a sum of Gather from constant tables, got {title(node)}")
    rows = np.asarray(array, np.float32).reshape(-1, array.shape[-1])
    if (rows == rows[:1]).all():
        return _put(text, "types", rows[:1] * factor, value)
    table = rows
    while (node := graph.maker.get(value)) is not None and node.op_type in _LAYOUT:
        value = node.input[0]
        whole = graph.constant(value)
        if whole.shape[-1] == rows.shape[1]:
            table = np.asarray(whole, np.float32).reshape(-1, rows.shape[1])
    stored = node is None or node.op_type == "Constant"  # of no other length, in a model that was traced for one
    if graph.open_axes and (len(table) <= len(rows) and not stored or (table[:len(rows)] != rows).any()):
        raise NotRead(f"{value[:100]!r} must be the first rows of a table of positions")
    return _put(text, "positions", table if factor == 1 else table * factor, value)


def _put(text, part, table, place):
    if getattr(text, part) is not None:
        raise NotRead(f"an embedding must have one table of {part}, got a second one at {place}")
    setattr(text, part, table)


def _padding_id(graph, index, ids, entries, place):
    """The id whose tokens have no position, where positions are numbered as RoBERTa's; None where all are 0."""
    shape = graph.shapes[ids]

    def positions(tokens):
        found = computed(graph, index, {ids: tokens})
        if found is None:
            return None
        return found.reshape(shape) if found.size == math.prod(shape) else np.broadcast_to(found, shape)

    tokens = np.full(shape, min(entries, 100) - 1, np.int64)
    found = positions(tokens)
    if found is not None and not found.any():
        return None
    if found is not None and (padding := int(found[0, 0]) - 1) >= 0:
        tokens[-1, shape[1] // 2:] = padding
        real = tokens != padding
        if (positions(tokens) == padding + real * np.cumsum(real, 1)).all():
            return padding
    raise NotRead(f"{place} must gather by positions from 0 on, or numbered as RoBERTa's from behind the padding id, "
                  "got another rule")


def _pooling(graphs, bound, end, ids):
    """(pooling, whether it is normalized) of the first output of a graph that is a vector of a text; (None, False)."""
    def mask(shape):
        array = np.ones(shape, np.int64)
        array[-1, shape[-1] // 2 + 1:] = 0
        return array

    masks = {name for name, of in bound.items() if of((1, 2)).all()}
    graph = graphs({name: mask if name in masks else of for name, of in bound.items()})
    shape = graph.shapes.get(end)
    if shape is None or len(shape) != 3:
        return None, False
    x = np.random.default_rng(0).standard_normal(shape)
    real = mask(shape[:2]).astype(bool) if masks else np.ones(shape[:2], bool)
    pools = {"mean": lambda rows: rows.mean(0), "cls": lambda rows: rows[0], "max": lambda rows: rows.max(0),
             "last": lambda rows: rows[-1]}
    for name in graph.outputs:
        try:
            made = computed(graph, name, {end: x, ids: np.zeros(graph.shapes[ids], np.int64)})
        except NotRead:
            continue
        if made is None or math.prod(made.shape) != shape[0] * shape[2]:
            continue
        for pooling, of in pools.items():
            rows = np.stack([of(x[i][real[i]]) for i in range(len(x))])
            for normalize in (False, True):
                if np.allclose(made.reshape(rows.shape), rows, rtol=1e-4, atol=1e-6):
                    return pooling, normalize
                rows = rows / np.sqrt((rows * rows).sum(1, keepdims=True))
    return None, False


def read_image(graph, nodes, arithmetic=None):
    """The `Image` of a model whose patches a Conv makes of its input; `arithmetic` as of `read_encoder`.

    Raises
    ------
    NotRead
        Naming the node where something else stands than in an image encoder.
    """
    encoder = read_encoder(graph, nodes, arithmetic=arithmetic)
    for layer in encoder.layers:
        of_size(layer)
    if encoder.told:
        raise NotRead(f"an image encoder must have no masks, got: {encoder.told[0]}; TransformerEncoder.from_onnx "
                      "reads the layers")

    def is_conv(name):
        return name in graph.maker and graph.maker[name].op_type == "Conv"

    value, norm = _norm_above(graph, encoder.start)
    start = trace(graph, value, is_conv)
    if len(start.terms) != 1 or not is_conv(start.terms[0].source):
        found = [graph.maker.get(term.source) for term in start.terms]
        raise NotRead("an image encoder must begin with a Conv that makes patches of an input of the graph, plus "
                      f"constants, got {', '.join(title(node) if node is not None else 'an input' for node in found)}; "
                      "TransformerEncoder.from_onnx reads the layers alone")
    term = start.terms[0]
    conv = graph.maker[term.source]
    attributes, weight = graph.attributes(conv), graph.constant(conv.input[1])
    bias = graph.constant(graph.input(conv, 2)) if graph.input(conv, 2) else None
    pixels = graph.shapes.get(root_of(graph, conv.input[0]))
    if root_of(graph, conv.input[0]) not in graph.inputs or weight is None or weight.ndim != 4 or pixels is None or (
            any(attributes.get("pads", ())) or attributes.get("group", 1) != 1 or weight.shape[1] != pixels[1]
            or any(step != 1 for step in attributes.get("dilations", ()))):
        raise NotRead(f"{title(conv)} must make patches of an input (B, C, height, width) of the graph without "
                      "padding, groups or dilations")
    batch, features, rows, columns = graph.shapes[term.source]
    patches = rows * columns
    tokens = start.shape[1]
    first = tokens - patches
    wanted = np.arange(batch * features * patches).reshape(batch, features, patches).swapaxes(1, 2)
    index, factor = (np.broadcast_to(each, start.shape) for each in (term.index, np.float32(term.factor)))
    if start.shape != (batch, tokens, features) or first < 0 or (index[:, first:] != wanted).any() or (
            (factor[:, first:] != 1).any() or factor[:, :first].any()):
        raise NotRead(f"{title(conv)} must give a token for each patch, row by row, behind the tokens that are none")
    added = start.known()
    if (added != added[:1]).any():
        raise NotRead(f"what is added to the patches of {title(conv)} must be the same for each image")
    bias = np.zeros(features, np.float32) if bias is None else np.asarray(bias, np.float32)
    places = np.array(added[0], np.float32)
    places[:first] -= bias
    return Image(np.asarray(weight, np.float32), bias, places, tuple(attributes.get("strides", (1, 1))), pixels[2:],
                 encoder, norm)
