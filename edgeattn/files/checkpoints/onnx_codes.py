"""Static int8 layers of a QDQ graph: by the scales of its QuantizeLinear and DequantizeLinear, without data.

What such a graph computes on codes is told by the same maps, heads and activations as of a float one; here the codes of
their weights, and the scales of what they read and give, are looked up. A graph that `quant.export` wrote gives the
layer that was exported.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_elements import trace
from edgeattn.files.checkpoints.onnx_nodes import title
from edgeattn.files.checkpoints.onnx_probes import computed
from edgeattn.files.checkpoints.onnx_projections import is_map_of, linear
from edgeattn.files.checkpoints.onnx_values import NotRead

_MOVED = (*functions.SAME, *functions.LAYOUT)
_LONGEST = 24  # nodes between a value and where it is quantized
_UNSIGNED = 128
_LARGEST = 127  # weights are symmetric
INSTEAD = ("; scheme='float32' reads the float model of the file's weights, which quant.quantize quantizes with data, "
            "or, with scheme='dynamic', without")


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a map of codes reads: rows of features, and behind them columns of what the codes leave of some."""

    source: str  # the value that codes are of
    more: tuple = ()  # the column that each further one goes on from
    scale: tuple | None = None


def rows_read(graph, value):
    """The `Rows` of a value that a map reads."""
    found = _further_inputs(graph, value)
    return Rows(value) if found is None else found


def _pair(graph, node):
    """(scale, zero point of int8 codes) of a QuantizeLinear or DequantizeLinear of a tensor; None of channels."""
    scale = graph.constant(graph.input(node, 1))
    zero = graph.constant(graph.input(node, 2)) if graph.input(node, 2) else np.zeros(1, np.uint8)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.dtype not in (np.uint8, np.int8):
        return None
    scale, zero = float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]) - _UNSIGNED * (zero.dtype == np.uint8)
    return (scale, zero) if math.isfinite(scale) and scale > 0 else None


def _above(graph, value):
    """The pair of the quantizer above a value, through what moves elements; None where there is none."""
    for _ in range(_LONGEST):
        node = graph.maker.get(value)
        if node is None or node.op_type not in _MOVED or not node.input or graph.constant(value) is not None:
            return None
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            return _pair(graph, node)
        value = node.input[0]
    return None


def _below(graph, value):
    """The pair of the quantizer that reads a value."""
    for node in graph.readers.get(value, ()):
        if node.op_type == "QuantizeLinear" and graph.input(node, 0) == value:
            return _pair(graph, node)
    return None


def _scale_of(graph, value, what):
    found = _above(graph, value) or _below(graph, value)
    if found is None:
        raise NotRead(f"static int8 needs the scale of {what}, {value[:100]!r}: QuantizeLinear and DequantizeLinear "
                      f"to 8 bits with one scale and zero point, got none{INSTEAD}")
    return found


# -- queries and keys that are multiplied between codes ----------------------------------------------------------------


def _before_scaling(graph, value, what):
    """(the value of the map's own codes, their pair, the rows of the MulConstant from there to `value`)."""
    pair, rows = _scale_of(graph, value, what), []
    while (found := _multiplied(graph, value)) is not None:
        value, code, constant = found
        if not (math.isfinite(constant[0]) and constant[0] > 0):
            raise NotRead(f"static int8 needs {what} times finite numbers other than 0{INSTEAD}")
        rows.insert(0, {"op": "MulConstant", "code": code, "constant": list(constant), "output": list(pair)})
        pair = _above(graph, value)
    return value, pair, rows


def _multiplied(graph, value):
    """(a value of codes, a code and its pair) where `value` is codes of their product; None of other values."""
    coded = False
    for _ in range(_LONGEST):
        node = graph.maker.get(value)
        if node is None or not node.input or graph.constant(value) is not None:
            return None
        if node.op_type not in _MOVED:
            break
        coded |= node.op_type in ("DequantizeLinear", "QuantizeLinear")
        value = node.input[0]
    if not coded or node.op_type not in ("Mul", "Div") or len(node.input) != 2:
        return None
    # a factor that is multiplied before there are codes is one of the map's weights
    factors = [each for each in node.input if graph.constant(each) is not None]
    codes = [each for each in node.input if each not in factors and _above(graph, each) is not None]
    if len(factors) != 1 or len(codes) != 1 or graph.constant(factors[0]).size != 1 or (
            node.op_type == "Div" and codes[0] != node.input[0]):
        return None
    if node.op_type == "Mul" and (stored := _stored_code(graph, factors[0])) is not None:
        return codes[0], *stored
    number = float(graph.constant(factors[0]).reshape(-1)[0])
    number = number if node.op_type == "Mul" else 1 / number if number else math.inf
    return codes[0], -1 if number < 0 else 1, (abs(number), 0)


def _stored_code(graph, value):
    """(code, its pair) of a number that a DequantizeLinear gives; None of others."""
    node = graph.maker.get(value)
    codes = graph.constant(graph.input(node, 0)) if node is not None and node.op_type == "DequantizeLinear" else None
    pair = None if codes is None or codes.dtype not in (np.uint8, np.int8) else _pair(graph, node)
    return None if pair is None else (int(codes.reshape(-1)[0]) - _UNSIGNED * (codes.dtype == np.uint8), pair)


def _at(graph, each, value, what):
    """A `Projection` with the factors and offsets that its features have at a value on the way."""
    elements = trace(graph, value, is_map_of(graph))
    if [term.source for term in elements.terms] != [each.source]:
        raise NotRead(f"static int8 needs {what} to be of one map before they are multiplied as codes, got "
                      f"{len(elements.terms)}{INSTEAD}")
    (term,) = elements.terms
    made, at = {}, term.index.reshape(-1) % each.maps.weight.shape[1]
    for part, numbers in (("factor", term.factor), ("offset", 0 if elements.offset is None else elements.offset)):
        of_map = np.zeros(each.maps.weight.shape[1], np.float32)
        of_map[at] = np.broadcast_to(np.float32(numbers), elements.shape).reshape(-1)
        made[part] = of_map[each.features]
    return dataclasses.replace(each, **made)


# -- weights -----------------------------------------------------------------------------------------------------------


def _weight_scale(graph, value, what):
    """The scale of each output of a map, whose weights a DequantizeLinear gives."""
    node = graph.maker.get(value)
    outputs = linear(graph, value).weight.shape[1]
    turned, name = False, "" if node is None else graph.input(node, 1)
    maker = graph.maker.get(name)
    plain = node is not None and node.op_type in ("MatMul", "Gemm") and graph.attributes(node).get("alpha", 1.0) == 1
    if plain:
        turned = bool(graph.attributes(node).get("transB"))
        if maker is not None and maker.op_type == "Transpose":
            turned, maker = not turned, graph.maker.get(graph.input(maker, 0))
    scale = None
    if plain and maker is not None and maker.op_type == "DequantizeLinear":
        scale = graph.constant(graph.input(maker, 1))
        axis = graph.attributes(maker).get("axis", 1) % 2
        if scale is not None and scale.size > 1 and (scale.shape != (outputs,) or axis != (0 if turned else 1)):
            scale = None
    if scale is None:
        raise NotRead(f"static int8 needs {what} as codes with a scale for each output, or one, behind a "
                      f"DequantizeLinear, got {'none' if node is None else title(node)}{INSTEAD}")
    return np.broadcast_to(np.float32(scale).reshape(-1), (outputs,))


def _coded(weight, bias, scale, source, what):
    """{weight, scale, bias} in codes, of float weights (outputs, inputs) that are codes times `scale`."""
    scale = np.float32(scale)
    with np.errstate(all="ignore"):
        codes = weight / scale[:, None]
        whole = np.rint(codes)
        near = np.isfinite(codes).all() and (np.abs(codes - whole) < 1e-2).all()
    largest = float(np.abs(whole).max(initial=0)) if near else math.nan
    if not largest <= _LARGEST:
        found = f"codes up to {largest:g} from the zero point" if near else "others"
        raise NotRead(f"static int8 needs {what} symmetric, in codes from -{_LARGEST} to {_LARGEST}, got "
                      f"{found}{INSTEAD}")
    made = {"weight": whole.astype(np.int8), "scale": scale}
    if bias is not None:
        with np.errstate(all="ignore"):
            steps = np.rint(np.float64(bias) / (np.float64(source[0]) * np.float64(scale)))
        if not (np.abs(steps) < 2**31).all():
            raise NotRead(f"static int8 needs the bias of {what} within 32 bits of its step, got "
                          f"{float(np.abs(steps).max())}")
        made["bias"] = steps.astype(np.int32)
    return made


# -- further columns ---------------------------------------------------------------------------------------------------


def _quantized(graph, value):
    """(the value that a DequantizeLinear of a QuantizeLinear gives the codes of, the pair); else None."""
    node = graph.maker.get(value)
    codes = graph.maker.get(graph.input(node, 0)) if node is not None and node.op_type == "DequantizeLinear" else None
    if codes is None or codes.op_type != "QuantizeLinear" or graph.constant(value) is not None:
        return None
    pair = _pair(graph, node)
    return None if pair is None or pair != _pair(graph, codes) else (graph.input(codes, 0), pair)


def _chosen(graph, value):
    """(source, columns) of a Gather of columns."""
    node = graph.maker.get(value)
    which = graph.constant(graph.input(node, 1)) if node is not None and node.op_type == "Gather" else None
    shape = None if which is None else graph.shapes.get(graph.input(node, 0))
    axis = graph.attributes(node).get("axis", 0) if which is not None else 0
    if which is None or which.ndim != 1 or not shape or axis not in (-1, len(shape) - 1):
        return None
    return graph.input(node, 0), which.tolist()


def _further_inputs(graph, value):
    """The `Rows` of codes beside codes of what those leave of some columns: a Concat, and a Gather that orders them."""
    for _ in range(_LONGEST):  # past what keeps columns
        node = graph.maker.get(value)
        if node is None or node.op_type not in ("Identity", "Reshape", "Cast") or graph.constant(value) is not None:
            break
        value = node.input[0]
    ordered = _chosen(graph, value)
    node = graph.maker.get(value if ordered is None else ordered[0])
    if node is None or node.op_type != "Concat":
        return None
    shapes = [graph.shapes.get(name) for name in node.input]
    first = _quantized(graph, node.input[0])
    if first is None or None in shapes or graph.attributes(node).get("axis", 0) not in (-1, len(shapes[0]) - 1):
        return None
    x, pair = first
    width, total = shapes[0][-1], sum(shape[-1] for shape in shapes)
    order = list(range(total)) if ordered is None else ordered[1]
    if sorted(order) != list(range(total)) or order[:width] != list(range(width)):
        return None
    column_of = np.argsort(order).tolist()  # of each place in the Concat
    more, reals, before, at = [0] * (total - width), x, list(range(width)), width
    for name, shape in zip(node.input[1:], shapes[1:], strict=True):
        rest = _quantized(graph, name)
        sub = None if rest is None or rest[1] != pair else graph.maker.get(rest[0])
        if sub is None or sub.op_type != "Sub" or len(sub.input) != 2:
            return None
        chosen, kept = _chosen(graph, sub.input[0]), _quantized(graph, sub.input[1])
        if chosen is None or chosen[0] != reals or kept != (sub.input[0], pair) or len(chosen[1]) != shape[-1]:
            return None
        for place, column in enumerate(chosen[1]):
            if not 0 <= column < len(before):
                return None
            more[column_of[at + place] - width] = before[column]
        before, reals = column_of[at:at + shape[-1]], graph.output(sub)
        at += shape[-1]
    return Rows(x, tuple(more), pair)


def further_outputs(graph, value):
    """(the sum, the channel of each output behind the first, what is added to each channel) of outputs that go on.

    None where the outputs of a map are read as they are.
    """
    width = graph.shapes[value][-1]
    readers = graph.readers.get(value, ())
    if len(readers) != 2 or any(node.op_type != "Slice" for node in readers):
        return None
    of, weight = {value}, None
    for node in graph.nodes_behind(value):
        weight = graph.constant(graph.input(node, 1)) if node.op_type == "MatMul" else weight
        if not of.issuperset(name for name in node.input if graph.constant(name) is None):
            return None
        of.update(node.output)
        if len(of) > _LONGEST:
            return None
        if node.op_type == "Add" and all(graph.constant(name) is None for name in node.input):
            break
    else:
        return None
    shape = graph.shapes.get(graph.output(node))
    outputs = shape[-1] if shape else width
    if not 0 < outputs < width or weight is None or weight.shape != (width - outputs, outputs):
        return None
    probe = np.random.default_rng(0).standard_normal((1, 4, width))
    probe[0, 0] = 0
    made = computed(graph, graph.output(node), {value: probe})
    if made is None or made.shape != (1, 4, outputs):
        return None
    offset, channels = made[0, 0], np.abs(weight).argmax(1)
    wanted = probe[0, :, :outputs] + offset
    np.add.at(wanted, (slice(None), channels), probe[0, :, outputs:])
    return (graph.output(node), channels.tolist(), offset) if np.allclose(made[0], wanted) else None


def _pieces(channels, offset, pair, what):
    """(channel, the code that adds nothing) of outputs behind the first: the lowest code of some, or the highest."""
    scale, zero = pair
    found: Any = []
    for channel in dict.fromkeys(channels):
        count = channels.count(channel)
        sum_ = -float(offset[channel]) / scale + count * zero
        highest = (sum_ + 128 * count) / 255
        if abs(highest - round(highest)) > 1e-2 or not 0 <= round(highest) <= count:
            raise NotRead(f"further outputs of {what} must begin at the lowest or highest code, got an offset of "
                          f"{offset[channel]:g}{INSTEAD}")
        nones = iter([-128] * (count - round(highest)) + [127] * round(highest))
        found += [(i, [channel, next(nones)]) for i, each in enumerate(channels) if each == channel]
    return [pair for _, pair in sorted(found)]


# -- layers ------------------------------------------------------------------------------------------------------------


def static_attention(graph, found, name, arithmetic):
    """(config, arrays) of the StaticSelfAttention that an attention layer is, as its `from_state` takes them."""
    apart = found.apart
    if found.arguments.get("position_bias") is not None or any(
            found.arguments.get(part) for part in ("rotary", "q_norm", "k_norm")):
        raise NotRead(f"{name} has positions of its own, which static int8 has not{INSTEAD}")
    if apart.products is None or any(node.op_type != "MatMul" for node in apart.products) or apart.output is None:
        raise NotRead(f"{name} must be taken apart, a Softmax between MatMul, to have a scale for each part{INSTEAD}")
    factor = np.unique(apart.scale)
    if len(factor) != 1 or not factor[0] > 0:
        raise NotRead(f"{name} must scale the scores of all heads by one number, got {len(factor)}{INSTEAD}")
    factor = float(factor[0])
    first, second = apart.products
    source = rows_read(graph, found.source)
    given = source.scale or _scale_of(graph, found.source, f"the input of {name}")
    k_value, key, key_ops = _before_scaling(graph, graph.input(first, 1), f"the keys of {name}")
    tensors = {"query_input": given, "key": key,
               "value": _scale_of(graph, graph.input(second, 1), f"the values of {name}"),
               "scores": _score_scale(graph, first, factor, name),
               "context": _scale_of(graph, linear(graph, apart.output).source, f"the heads of {name}"),
               "output": _scale_of(graph, found.end, f"the output of {name}")}
    q_value, (scale, zero), query_ops = _before_scaling(graph, graph.input(first, 0), f"the queries of {name}")
    tensors["query"] = scale * factor, zero
    for row in query_ops:
        row["output"][0] *= factor
    q, k, v = apart.projections
    q = _at(graph, q, q_value, f"the queries of {name}") if query_ops else q
    k = _at(graph, k, k_value, f"the keys of {name}") if key_ops else k
    probabilities = _scale_of(graph, graph.input(second, 0), f"the probabilities of {name}")
    if probabilities[0] > 1 / 254 or probabilities[1] != -128:  # ours are of 1/256 always
        raise NotRead(f"{name} must have probabilities in codes of 1/255 or less, from 0 on, got a scale of "
                      f"{probabilities[0]:g} and a zero point of {probabilities[1]}{INSTEAD}")
    arrays = {}
    for role, each, by in zip(("query", "key", "value"), (q, k, v), (factor, 1.0, 1.0), strict=True):
        weight, bias = each.weights(apart.groups)
        scales = _weight_scale(graph, each.source, f"the weights of the {role} of {name}")
        scales = (scales[each.features[apart.groups]] * each.factor[apart.groups]).reshape(-1)
        if not (scales > 0).all():
            raise NotRead(f"{name} must scale its {role} by positive numbers{INSTEAD}")
        weight, bias = weight * np.float32(by), None if bias is None else bias * np.float32(by)
        arrays |= {f"{role}.{part}": array for part, array in _coded(
            weight, bias, scales * np.float32(by), given, f"the weights of the {role} of {name}").items()}
    arrays |= {f"output.{part}": array for part, array in _coded(
        found.arguments["out_weight"], found.arguments.get("out_bias"),
        _weight_scale(graph, apart.output, f"the output weights of {name}"), tensors["context"],
        f"the output weights of {name}").items()}
    return {"num_heads": found.heads, "arithmetic": arithmetic, "sources": [0, 0, 0], "score_ops": [],
            "mask_margin": None, "lowest_single_score": None, "more_inputs": list(source.more),
            "tensors": {role: list(pair) for role, pair in tensors.items()},
            **{which: rows for which, rows in (("query_ops", query_ops), ("key_ops", key_ops)) if rows}}, arrays


def _score_scale(graph, first, factor, name):
    """The pair of the scores as the Softmax takes them: the first quantizer behind the product, before any mask."""
    value, by = graph.output(first), 1.0
    for _ in range(_LONGEST):
        pair = _below(graph, value)
        if pair is not None:
            return pair[0] * factor / by, pair[1]
        readers = [node for node in graph.readers.get(value, ()) if node.op_type in ("Mul", "Div", *_MOVED)]
        if len(readers) != 1:
            break
        node = readers[0]
        if node.op_type in ("Mul", "Div"):
            known = [graph.constant(each) for each in node.input if each != value]
            if len(known) != 1 or known[0] is None or known[0].size != 1 or (
                    node.op_type == "Div" and node.input[0] != value):
                break
            number = float(known[0].reshape(-1)[0])
            if not number > 0:
                break
            by = by * number if node.op_type == "Mul" else by / number
        value = graph.output(node)
    return _scale_of(graph, value, f"the scores of {name}")


def static_feed_forward(graph, networks, activation, name, arithmetic):
    """(config, arrays) of the StaticFeedForward of a network and, where there is a second, that of large features."""
    config, arrays = _static_network(graph, networks[0], activation, name, arithmetic)
    if len(networks) > 1:
        config["large"], others = _static_network(graph, networks[1], activation, name, arithmetic)
        arrays |= {f"large.{part}": array for part, array in others.items()}
    return config, arrays


def _static_network(graph, net, activation, name, arithmetic):
    what = f"the feed-forward network behind {name}"
    hidden = linear(graph, net.second).source
    rows = rows_read(graph, linear(graph, net.linear1.map).source)
    given = rows.scale or _scale_of(graph, linear(graph, net.linear1.map).source, f"the input of {what}")
    tensors = {"input": given}
    if net.gate is None:
        if activation != "relu":
            tensors["linear1"] = _scale_of(graph, net.value1, f"the first map of {what}")
        tensors["activation"] = _scale_of(graph, hidden, f"the activation of {what}")
    else:
        tensors["linear1"] = _scale_of(graph, net.value1, f"the first map of {what}")
        if activation != "relu":
            tensors["gate"] = _scale_of(graph, net.value_gate, f"the gate of {what}")
        tensors["gated"] = _scale_of(graph, hidden, f"the hidden features of {what}")
        tensors["activation"] = _activation_scale(graph, hidden, net, what)
    tensors["linear2"] = _scale_of(graph, net.end, f"the output of {what}")
    for role, number in (("linear1" if net.gate is None else "gate", net.before), ("activation", net.behind),
                         ("gated", net.behind)):
        if number != 1 and role in tensors:
            tensors[role] = tensors[role][0] * number, tensors[role][1]
    arrays = {}
    for role, leaf in (("linear1", net.linear1), ("gate", net.gate)):
        if leaf is not None:
            weight, bias = net.weights(graph, leaf)
            scale = _weight_scale(graph, leaf.map, f"the weights of {what}")[leaf.features] * np.float32(leaf.factor)
            if not (scale > 0).all():
                raise NotRead(f"{what} must scale its maps by positive numbers{INSTEAD}")
            arrays |= {f"{role}.{part}": array
                       for part, array in _coded(weight, bias, scale, given, f"the weights of {what}").items()}
    arrays |= {f"linear2.{part}": array for part, array in _coded(
        *net.linear2, _weight_scale(graph, net.second, f"the second weights of {what}") / np.float32(net.behind),
        tensors["activation" if net.gate is None else "gated"], f"the second weights of {what}").items()}
    further = [] if net.further is None else _pieces(*net.further, tensors["linear2"], what)
    return {"activation": activation, "arithmetic": arithmetic, "more_inputs": list(rows.more), "more_outputs": further,
            "tensors": {role: list(pair) for role, pair in tensors.items()}}, arrays


def _activation_scale(graph, hidden, net, what):
    """The pair of the side of a product that is the activation of the gate."""
    value = hidden
    for _ in range(_LONGEST):
        node = graph.maker.get(value)
        if node is None or node.op_type not in _MOVED:
            break
        value = node.input[0]
    sides = list(node.input) if node is not None and node.op_type == "Mul" and len(node.input) == 2 else []

    def is_map(each):
        elements = trace(graph, each, lambda name: name == net.linear1.map)
        return len(elements.terms) == 1 and elements.terms[0].source == net.linear1.map

    others = [each for each in sides if not is_map(each)]
    return _scale_of(graph, others[0] if len(others) == 1 else hidden, f"the activation of the gate of {what}")
