"""What a part of an ONNX graph is, found by computing it: norms and activations, in whatever nodes they are written.

The part is computed in float64 for numbers made up here, without rounding to codes, and compared with what it may be.
"""

import math

import numpy as np

from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_nodes import title
from edgeattn.files.checkpoints.onnx_values import NotRead

ACTIVATIONS = {
    "gelu": functions.gelu,
    "gelu_tanh": functions.gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * functions.sigmoid(x),
}
_NEAR = 3e-5  # gelu and gelu_tanh differ by 5e-4, constants of graphs are float32
_NEAR_HALF = 2e-4  # sqrt(2) and its like in half precision make 3e-5 of it
_SMALL = 1e-4  # of features whose norm tells what is added to the variance
_MOST_NODES = 64  # of a norm or an activation


def computed(graph, name, leaves):
    """The array of a value with those of `leaves`, arrays by name, in place of theirs; None where that is not enough.

    Raises
    ------
    NotRead
        Naming a node that is not computed.
    """
    if name in leaves:
        return leaves[name]
    missing = []

    def inputs_of(node):
        if any(output in leaves or graph.constant(output) is not None for output in node.output if output):
            return None
        # a shape is known or not, whatever the values are
        return [] if node.op_type == "Shape" else [each for each in node.input if each]

    nodes = graph.way(name, inputs_of)
    arrays = dict(leaves)

    def array(each):
        if each not in arrays:
            arrays[each] = graph.constant(each) if each else None
            if each and arrays[each] is None:
                missing.append(each)
        return arrays[each]

    with np.errstate(all="ignore"):
        for node in nodes:
            inputs = [array(each) for each in node.input]
            if missing:
                return None
            for output, made in zip(node.output, graph.compute(node, inputs, real=True), strict=False):
                arrays[output] = made
        made = array(name)
    return None if missing else made


def between(graph, starts, end):
    """What stands between values and one that is computed of them, for errors."""
    nodes = graph.way(end, lambda node: None if starts.intersection(node.output) else [
        each for each in node.input if each and graph.constant(each) is None])
    return ", ".join(title(node) for node in nodes[:12]) or "nothing"


def norm_between(graph, start, end):
    """(kind, weight, bias or None, eps) of the norm of `start` that `end` is; () where they are the same; else None."""
    if start == end:
        return ()
    shape = graph.shapes.get(start)
    other = graph.shapes.get(end)  # rows may be laid out otherwise: those of all sequences in one axis
    if not shape or not other or shape[-1] != other[-1] or math.prod(shape) != math.prod(other) or not (
            0 < math.prod(shape) <= graph.most_elements):
        return None
    nodes = graph.way(end, lambda node: None if start in node.output else [
        each for each in node.input if each and graph.constant(each) is None])
    if len(nodes) > _MOST_NODES:
        return None
    x = np.random.default_rng(0).standard_normal(shape)

    def of(x):
        made = computed(graph, end, {start: x})
        return None if made is None or made.shape != other or made.dtype.kind != "f" else made.astype(
            np.float64).reshape(shape)

    try:
        offset, plain, small = (of(each) for each in (np.zeros(shape), x, x * _SMALL))
        if offset is None or plain is None or small is None:
            return None
        if (plain == x).all():
            return ()
        for kind in ("LayerNorm", "RMSNorm"):
            found = _norm_of(kind, x, offset, plain, small)
            if found is not None and np.allclose(of(3 * x + 1), _norm(kind, 3 * x + 1, *found), rtol=1e-6, atol=1e-7):
                weight, bias, eps = found
                bias = np.float32(bias) if bias.any() else None
                return None if kind == "RMSNorm" and bias is not None else (
                    kind, np.float32(weight), bias, float(f"{eps:.6g}"))
    except NotRead:
        return None
    return None


def _norm_of(kind, x, offset, plain, small):
    """(weight, bias, eps) by which a norm of x, or of small x, would give these."""
    centred = x - x.mean(-1, keepdims=True) if kind == "LayerNorm" else x
    variance = (centred * centred).mean(-1, keepdims=True)
    with np.errstate(all="ignore"):
        one, other = (plain - offset) / centred, (small - offset) / (centred * _SMALL)
        if not np.isfinite(one).all():
            return None
        largest = np.unravel_index(np.argmax(np.abs(one)), one.shape)
        v, share = float(variance[largest[:-1]][0]), float(one[largest] / other[largest]) ** 2
        # weight^2 / (v + eps) by weight^2 / (small^2 v + eps)
        eps = (share - _SMALL**2) * v / (1 - share) if 0 < share < 1 else 0
        if not 0 < eps < 1:
            return None
        weight = one * np.sqrt(variance + eps)
    weight, bias = weight.reshape(-1, x.shape[-1]), offset.reshape(-1, x.shape[-1])
    if not np.allclose(weight, weight[:1], rtol=1e-6, atol=1e-9) or (bias != bias[:1]).any():
        return None
    return np.median(weight, 0), bias[0], eps


def _norm(kind, x, weight, bias, eps):
    x = x - x.mean(-1, keepdims=True) if kind == "LayerNorm" else x
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight + bias


def scaled_silu(y, x, by=1.0):
    """The number a for which y is x * sigmoid(a x), times `by`, as QuickGelu's 1.702; None where there is none.

    It is silu(a x) / a: a linear map in front, and one behind, take the number.
    """
    with np.errstate(all="ignore"):
        share = y / (x * by)
        found = np.log(share / (1 - share)) / x
    found = found[np.isfinite(found) & (np.abs(x) > 0.5) & (np.abs(x) < 2)]
    a = float(f"{np.median(found):.6g}") if found.size else 0.0
    if not 0 < a < 100 or np.abs(x * functions.sigmoid(a * x) * by - y).max() > _NEAR * max(
            1.0, float(np.abs(by).max())):
        return None
    return a


def multiple_of(y, x, by=1.0, *, half=False):
    """(name of an activation, the number that y is it of x times, times `by`); None where there is none."""
    for name, function in ACTIVATIONS.items():
        values = function(x) * by
        number = float(f"{(y * values).sum() / max(float((values * values).sum()), 1e-30):.6g}")
        if number > 0 and activation_of(y / number, x, by, half=half)[0] == name:
            return name, number
    return None


def activation_of(y, x, by=1.0, *, half=False):
    """(name of the activation that y is of x, times `by`, None), or (None, how far the nearest is, and its name).

    `half` says that constants are in half precision.
    """
    distance = {name: float(np.abs(function(x) * by - y).max()) for name, function in ACTIVATIONS.items()}
    nearest = min(distance, key=lambda name: distance[name])
    if distance[nearest] <= (_NEAR_HALF if half else _NEAR) * max(1.0, float(np.abs(by).max())):
        return nearest, None
    return None, (distance[nearest], f"{nearest}, from which it differs by up to {distance[nearest]:.2g}")
