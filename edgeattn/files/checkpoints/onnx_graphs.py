"""Attention in an ONNX graph: found from its Softmax, or from an operator that is attention.

From there elements are followed: up to the linear maps of queries, keys and values, through whatever splits, packs or
turns heads, and down to the map behind. What they are in the file is compared with what attention needs, not with a
list of forms that exporters write.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import warnings
from typing import TYPE_CHECKING

import numpy as np

from edgeattn import arithmetic as rules
from edgeattn.checks import is_one_of
from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_encoders import (
    LONG,
    SHORTER,
    Encoder,
    each_its_own,
    look_further,
    looked_further,
    read_encoder,
    refuse_positions,
)
from edgeattn.files.checkpoints.onnx_layers import attention_at
from edgeattn.files.checkpoints.onnx_models import Image, Text, read_image, read_text, text_inputs
from edgeattn.files.checkpoints.onnx_nodes import Graph, title
from edgeattn.files.checkpoints.onnx_operators import OPERATORS, domain_of
from edgeattn.files.checkpoints.onnx_products import product
from edgeattn.files.checkpoints.onnx_rows import root_of
from edgeattn.files.checkpoints.onnx_values import NotRead, UnknownShape, Values
from edgeattn.files.paths import reading, reason
from edgeattn.hints import FRAMES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, SupportsIndex

    from numpy.typing import NDArray

    from edgeattn.types import Arithmetic, OnnxModel, OnnxScheme, Path

_TOLD = 20  # names in an error
_MOST_RETRIED = 10_000  # nodes: a larger graph is read for one size only
_QUICK = 256  # nodes around a Softmax that are looked at for products: quantizers stand between all
_WAVE = 2000  # samples: of 400 and 320 of one and the next frame, as Wav2Vec2 has them, 6 frames
_FEW, _LONGEST = 4, 4096  # lengths that a graph is tried for, and the longest of them
_FIRST, _LARGEST_IMAGE = 10, 1024  # tokens in front of patches, and the largest image that a graph is tried for


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
        When the graph masks its scores, or has a window or a softcap, which here are arguments of each call; when
        queries, keys and values are not of one value, or something else than a linear map follows.
    """
    graphs = open_graph(path_or_model)
    bound, masks = _padding(graphs)

    def read(batch, _=None, *sizes):
        graph = graphs(batch, bound, *sizes)
        found = attention_at(graph, choose(graph, node))
        for longer in _longer(graphs, graph, batch, bound):
            with contextlib.suppress(NotRead):
                found = looked_further(found, longer, choose(longer, node))
                break
        return found, [*found.told, *_of_padding(graph, masks, [found.node]), *apart(graph, found)]

    found, told = read_graph(graphs, read)
    for text in told:
        warnings.warn(text, stacklevel=3 + FRAMES)
    return found.heads, found.kv_heads, found.arguments


def apart(graph, found):
    """What is to be known of a layer whose inputs are not one, or whose result goes on otherwise than through a map."""
    sources = [root_of(graph, source) for source in found.sources]
    if len(set(sources)) > 1 and not set(sources) <= set(graph.inputs):
        q, k, v = (f"{source[:60]!r}" for source in sources)
        yield (f"{title(found.node)} takes queries of {q}, keys of {k} and values of {v}; pass each in its place in "
               "each call: layer(query, key, value)")
    if found.beyond is not None:
        yield (f"what {title(found.node)} gives goes into {found.beyond}, which is not part of the layer; the layer "
               "has no output projection")


def _longer(graphs, graph, batch, bound):
    """Graphs of longer sequences, the longest first; none of one that was traced for a length, or has short tables."""
    for length in (LONG, *SHORTER) if graph.open_axes else ():
        with contextlib.suppress(NotRead):
            yield graphs(batch, bound, length)


def _padding(graphs):
    """(what inputs of a model of texts are taken for, as `text_inputs` says; those that are taken for no padding).

    Causal masks, windows and positions are then constants of their own, not parts of a computed mask.
    """
    graph = graphs(2)
    try:
        ids, bound = text_inputs(graph)
    except NotRead:
        return None, []
    bound = {name: of for name, of in bound.items() if graph.shapes.get(name) == graph.shapes.get(ids)}
    return bound, [name for name, of in bound.items() if of((1, 2)).all()]


def _of_padding(graph, masks, nodes):
    """What is to be known of masks of padding that attention nodes are computed of."""
    nodes = {id(node) for node in nodes}
    of = [name for name in masks if any(id(node) in nodes for node in graph.nodes_behind(name))]
    if of:
        yield f"{', '.join(map(repr, of))[:200]} masks padding; pass key_padding_mask in each call"


def kernel_set_of(scheme: OnnxScheme, arithmetic: Arithmetic | None) -> Arithmetic | None:
    """What a QDQ graph is to be read as: a kernel set's name for static int8, None for float32."""
    if not is_one_of(scheme, ("float32", "static")):
        raise ValueError(f"scheme must be 'float32' or 'static', got {scheme!r}; quant.quantize(encoder, "
                         "scheme='dynamic') makes a dynamic encoder of the float32 one")
    if arithmetic is None:
        return "litert" if scheme == "static" else None
    rules.kernel_set(arithmetic)
    if scheme != "static":
        raise ValueError(f"arithmetic must be left out but for scheme='static', which is int8; got {arithmetic!r} with "
                         f"scheme={scheme!r}")
    return arithmetic


def onnx_encoder(path_or_model: Path | OnnxModel, arithmetic: Arithmetic | None = None,
                 nodes: Iterable[SupportsIndex] | None = None) -> Encoder:
    """The encoder layers of an ONNX model, and the norm behind them; `arithmetic` as `kernel_set_of` gives it.

    All attention of the model must be one encoder's, or that of `nodes`, indices. Around it there may be anything, as
    `onnx_weights` says; what goes into the first layer and what the last one gives are told by their names.

    Raises
    ------
    ValueError
        Naming the node where something else stands than an encoder layer.

    Warns
    -----
    UserWarning
        As `onnx_weights`; and where the model's input and output are not the encoder's.
    """
    graphs = open_graph(path_or_model)
    bound, masks = _padding(graphs)
    indices = None if nodes is None else _indices(nodes)

    def of_layers(graph):
        found = attention_nodes(graph)
        if indices is None:
            return found
        if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < len(found):
            raise ValueError(f"nodes must be indices of attention nodes in their order, got {reason(indices)}; "
                             f"{_listing(graph, found)}")
        return [found[index] for index in indices]

    def read(batch, _=None, *sizes):
        graph = graphs(batch, bound, *sizes)
        layers = of_layers(graph)
        found = read_encoder(graph, layers, arithmetic=arithmetic)
        for longer in _longer(graphs, graph, batch, bound):
            with contextlib.suppress(NotRead):
                look_further(found, longer, of_layers(longer))
                break
        refuse_positions(found)
        each_its_own(found)
        ends = {root_of(graph, name) for name in graph.outputs}
        whole = found.start in graph.inputs and found.end in ends
        return found, whole, list(_of_padding(graph, masks, layers))

    found, whole, padding = read_graph(graphs, read)
    for told in found.told + padding + ([] if whole else [
            f"the encoder takes {found.start!r} and gives {found.end!r}; what the model computes before and behind is "
            "not part of it"]):
        warnings.warn(told, stacklevel=3 + FRAMES)
    return found


def onnx_text(path_or_model: Path | OnnxModel, arithmetic: Arithmetic | None = None) -> Text:
    """The text encoder of an ONNX model whose first nodes gather embeddings of token ids.

    Its inputs besides the ids are taken for no padding, one type of tokens, and positions from 0 on.

    Raises
    ------
    ValueError
        Naming the node where something else stands than in a text encoder.

    Warns
    -----
    UserWarning
        When the model gives neither what its encoder gives nor a pooling of it.
    """
    graphs = open_graph(path_or_model)
    inputs = text_inputs(graphs(2))

    def read(batch, _=None, length=None, image=None):
        def graph(bound, at=length):
            return graphs(batch, bound, at, image)

        def nodes_of(graph):
            return _of_inputs(graph, inputs[:1])

        return read_text(graph, nodes_of, *inputs, arithmetic, traced=length is not None)

    found = read_graph(graphs, read)
    if found.told is not None:
        warnings.warn(found.told, stacklevel=3 + FRAMES)
    return found


def onnx_image(path_or_model: Path | OnnxModel, arithmetic: Arithmetic | None = None) -> Image:
    """The image encoder of an ONNX model whose first node makes patches of pixels, a Conv.

    Raises
    ------
    ValueError
        Naming the node where something else stands than in an image encoder.
    """
    graphs = open_graph(path_or_model)

    def read(*sizes):
        graph = graphs(*sizes)
        images = [name for name in graph.inputs if len(graph.shapes.get(name) or ()) == 4]
        return read_image(graph, _of_inputs(graph, images), arithmetic)

    return read_graph(graphs, read)


def open_graph(path_or_model):
    """A function that gives the `Graph` of a model; arguments as its own from `batch` on."""
    model, values, source = _load(path_or_model)

    def graph(batch, *options):
        with reading(source, ".onnx file"):  # texts are decoded when they are looked at
            return Graph(model, values, source, batch, *options)

    graph.nodes = model.graph.node
    return graph


def read_graph(graphs, read):
    """What `read(*sizes)` gives of a model, sizes as `graphs` takes them; one that was traced for some is read so."""
    # a damaged factor may take weights beyond float32
    with np.errstate(all="ignore"):
        try:
            return read(2)
        except NotRead as error:
            if len(graphs.nodes) > _MOST_RETRIED:
                raise
            # of layouts with the length first, too, where it is taken for the batch
            graph = graphs(2)
            lengths = _lengths(graph) if isinstance(error, UnknownShape) else []
            images = [(2, None, None, size) for size in _image_sizes(graph)]
            others = [*((length,) for length in lengths), *((2, None, length) for length in lengths)]
            for sizes in (*images, (1,), *others):
                try:
                    return read(*sizes)
                except ValueError as other:  # of a size whose shapes are known: what stands there is the fault
                    if isinstance(error, UnknownShape) and isinstance(other, NotRead):
                        error = other
            raise error from None


def _lengths(graph):
    """Lengths that the shapes of a graph have as constants where they have others computed; of sound, a few frames."""
    found = [_WAVE] if graph.open_axes and any(node.op_type == "Conv" for node in graph.nodes) else []
    for node in graph.nodes:
        if node.op_type == "Concat" and any(
                reader.op_type == "Reshape" for reader in graph.readers.get(graph.output(node), ())):
            for name in node.input:
                maker = graph.maker.get(name)
                array = graph.constant(name) if maker is None or maker.op_type == "Constant" else None
                if array is not None and array.size == 1 and array.dtype.kind in "iu" and 1 < array.item() <= _LONGEST:
                    found.append(array.item())
    return list(dict.fromkeys(found))[:_FEW]


def _image_sizes(graph):
    """Sizes of images, where they are open, with as many patches as a table of positions has rows, but for a few."""
    patches = [node for node in graph.nodes if node.op_type == "Conv" and root_of(graph, node.input[0]) in graph.inputs]
    shapes = [graph.shapes.get(graph.input(node, 1)) for node in patches]
    if not graph.open_axes or not patches or shapes[0] is None or len(shapes[0]) != 4:
        return []
    features, _, kernel, _ = shapes[0]
    step = (graph.attributes(patches[0]).get("strides") or [1])[0]
    gathered = {graph.input(node, 0) for node in graph.nodes if node.op_type == "Gather"}
    tables = [shape for name, shape in graph.stored_shapes() if shape[-1:] == (features,) and (
        len(shape) == 3 and shape[0] == 1 or len(shape) == 2 and name in gathered)]
    sides = [math.isqrt(shape[-2] - first) for shape in tables for first in range(min(_FIRST, shape[-2]))
             if math.isqrt(shape[-2] - first) ** 2 == shape[-2] - first]
    sizes = dict.fromkeys((side - 1) * step + kernel for side in sides if side > 1)
    return [size for size in sizes if size <= _LARGEST_IMAGE][:_FEW]


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


def attention_nodes(graph):
    """The attention nodes of a graph: operators, and each Softmax whose scores are a product."""
    return [
        node
        for node in graph.nodes
        if ((domain_of(node), node.op_type) in OPERATORS and not graph.is_known(graph.input(node, 0)))
        or (node.op_type in ("Softmax", "QLinearSoftmax") and _is_attention(graph, node))
    ]


def _of_inputs(graph, names):
    """The attention nodes of what is computed of some inputs: those of texts, or of images, in a model of both."""
    of = {id(node) for name in names for node in graph.nodes_behind(name)}
    nodes = attention_nodes(graph)
    return [node for node in nodes if id(node) in of] or nodes


def _is_attention(graph, node):
    """Whether a Softmax stands between two products; a quick look, which what follows does for good."""
    found = False
    for step in (
        lambda each: [graph.maker[name] for name in each.input if name in graph.maker],
        lambda each: [reader for name in each.output for reader in graph.readers.get(name, ())],
    ):
        todo, seen = [node], set()
        found = False
        while todo and not found and len(seen) < _QUICK:
            for each in step(todo.pop(0)):
                if id(each) not in seen:
                    seen.add(id(each))
                    if product(graph, each) is not None:
                        found = True
                    todo.append(each)
        if not found:
            return False
    return found and not _asks_for_constants(graph, node)


def _asks_for_constants(graph, node):
    """Whether the queries of a Softmax are stored: a head that pools what an encoder gives, as SigLIP's images have."""
    todo, seen = [graph.input(node, 0)], set()
    while todo and len(seen) < _QUICK:
        each = todo.pop()
        maker = graph.maker.get(each)
        if each in seen or maker is None or graph.is_known(each):
            continue
        seen.add(each)
        if product(graph, maker) is not None:
            return False
        if maker.op_type in ("MatMul", "Einsum", "Gemm"):
            return graph.is_known(graph.input(maker, 0))
        if maker.op_type in (*functions.SAME, *functions.LAYOUT, *functions.ELEMENTWISE):
            todo.extend(name for name in maker.input if name)
    return False


def choose(graph, wanted):
    """The attention node that is asked for."""
    nodes = attention_nodes(graph)
    if not nodes:
        raise ValueError(f"{graph.source} must hold attention: found no Softmax between two products, and no Attention "
                         "operator")
    known = _listing(graph, nodes)
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


def _indices(nodes):
    """The indices of attention nodes as a list."""
    try:
        return [operator.index(each) for each in nodes]
    except TypeError:
        raise TypeError(f"nodes must be indices of attention nodes, as range(6), got {reason(nodes)}") from None


def _listing(graph, nodes):
    """Attention nodes and their indices, as errors tell them."""
    known = ", ".join(f"{index}: {title(node)}" for index, node in enumerate(nodes[:_TOLD]))
    return f"attention nodes of {graph.source}: {known}" + (
        f" and {len(nodes) - _TOLD} more" if len(nodes) > _TOLD else "")
