"""Operators that are attention: of ONNX from opset 23 on, and onnxruntime's."""

import math

import numpy as np

from edgeattn.checks import count
from edgeattn.files.checkpoints.onnx_elements import Elements, trace
from edgeattn.files.checkpoints.onnx_projections import (
    Map,
    Parts,
    before_codes,
    check_sources,
    is_map_of,
    no_projection,
    projected,
    real,
)
from edgeattn.files.checkpoints.onnx_values import NotRead

OPERATORS = {
    ("", "Attention"),
    ("com.microsoft", "Attention"),
    ("com.microsoft", "MultiHeadAttention"),
    ("com.microsoft", "QAttention"),
    ("com.microsoft", "GroupQueryAttention"),
}
# Which inputs are masks or added to scores, and which is the keys of the tokens before, 4 unless it is said here.
_MASKS = {
    ("", "Attention"): (3, 6),
    ("com.microsoft", "Attention"): (3, 5),
    ("com.microsoft", "QAttention"): (5,),
    ("com.microsoft", "MultiHeadAttention"): (4, 5),
    ("com.microsoft", "GroupQueryAttention"): (10,),
}
_PAST = {"MultiHeadAttention": 6, "QAttention": 8, "GroupQueryAttention": 3}


def domain_of(node):
    """The domain of a node, empty for ONNX's own."""
    return "" if node.domain == "ai.onnx" else node.domain


def from_operator(graph, node, name):
    """The `Parts` of an operator that is attention."""
    attributes, domain = graph.attributes(node), domain_of(node)
    kind = node.op_type
    told = []
    if attributes.get("do_rotary") and kind != "GroupQueryAttention":
        raise NotRead(f"{name} has do_rotary={attributes['do_rotary']}, which edgeattn layers do not do")
    if attributes.get("smooth_softmax") == 1 or (kind == "GroupQueryAttention" and graph.input(node, 11)):
        raise NotRead(f"{name} has an attention sink (smooth_softmax or head_sink), which takes a part of the weight "
                      "and has no place in a layer")
    if kind in ("Attention", "QAttention") and domain:
        q, k, v, heads = _packed_operator(graph, node, name, attributes)
        kv_heads = heads
    else:
        q, k, v, heads, kv_heads = _operator_inputs(graph, node, name, attributes)
    parts = _in_heads(graph, name, ((q, heads, "queries"), (k, kv_heads, "keys"), (v, kv_heads, "values")))
    (batch, heads, length, size), keys, value_dim = parts[0][0].shape, parts[1][0].shape[2], parts[2][0].shape[3]

    def groups(x):
        x = x if x.shape[1] == heads else np.repeat(x, heads // x.shape[1], 1)
        return x.reshape(-1, *x.shape[2:])

    q, k, v = (projected(graph, elements, groups, place) for elements, place in parts)
    codes = np.arange(batch * heads * length * value_dim, dtype=np.int32).reshape(batch, heads, length, value_dim)
    if not (len(graph.shapes[node.input[0]]) == 4 and not domain):
        codes = codes.swapaxes(1, 2).reshape(batch, length, -1)
    scale = attributes.get("scale")
    if scale is None or (scale == 0 and domain):  # com.microsoft operators read 0 as "not given"
        scale = 1 / math.sqrt(size)
    causal, rotary = bool(attributes.get("is_causal") or attributes.get("unidirectional")), None
    if kind == "GroupQueryAttention":
        causal = True
        rotary = _operator_rotary(graph, node, name, attributes, size)
    if causal:
        past = graph.input(node, _PAST.get(kind, 4))
        told.append(
            f"{name} is causal; pass is_causal=True, "
            f"causal_alignment={'lower_right' if past else 'upper_left'!r} in each call"
        )
    sides = [attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
    if attributes.get("local_window_size", -1) > 0:
        sides[0] = attributes["local_window_size"] - 1
    if sides != [-1, -1]:
        told.append(f"{name} has a window; pass window_size=({sides[0]}, {sides[1]}) in each call")
    if attributes.get("softcap"):
        told.append(f"{name} caps its scores; pass softcap={attributes['softcap']:g} in each call")
    bias, masked = _masks(graph, node, name, (batch, heads), keys)
    return Parts(q, k, v, np.arange(batch * heads), graph.output(node), codes,
                 np.full(batch * heads, scale, np.float32), bias, told + masked, causal, rotary, tuple(sides))


def _in_heads(graph, name, given):
    """[(elements (B, heads, L, D), what they are called)] of queries, keys and values, which fit each other.

    given : of each (elements, number of heads or None, what it is)
    """
    parts = []
    for i, (elements, number, role) in enumerate(given):
        place = f"input {i} of {name}"
        check_sources(graph, elements, place)
        if len(elements.shape) == 3:
            if number is None:
                raise NotRead(f"{name} must have q_num_heads and kv_num_heads for inputs (B, L, H * D), got none")
            if elements.shape[2] % number:
                raise NotRead(
                    f"{name} has projections that do not fit it: {elements.shape[2]} {role} in {number} heads"
                )
            elements = elements.moved(lambda x, number=number: x.reshape(*x.shape[:2], number, -1).swapaxes(1, 2))
        if len(elements.shape) != 4:
            raise NotRead(f"{place} must have 3 or 4 axes, got {elements.shape}")
        parts.append((elements, place))
    if len({len(elements.shape) for elements, _, _ in given}) > 1:
        raise NotRead(f"{name} must have query, key and value as one layout, all (B, L, H * D) or all (B, H, L, D)")
    (_, heads, _, size), (_, kv_heads, _, key_size), (_, value_heads, _, value_dim) = (
        elements.shape for elements, _ in parts)
    if kv_heads != value_heads or not kv_heads or heads % kv_heads or size != key_size:
        raise NotRead(
            f"{name} has projections that do not fit it: {heads * size} outputs for {heads} query heads, "
            f"{kv_heads * key_size} for {kv_heads} key heads, {value_heads * value_dim} for {value_heads} value heads"
        )
    return parts


def _masks(graph, node, name, groups, keys):
    """(what constants add to the scores, (B * H, L, S) or None; what is told of other masks); groups: (B, H)."""
    domain, bias, told = domain_of(node), None, []
    for i in _MASKS.get((domain, node.op_type), ()):
        given = graph.input(node, i)
        if not given:
            continue
        array = graph.constant(given)
        if array is not None and array.dtype.kind in "fb" and (i != 3 or not domain):
            if array.dtype.kind == "b":
                array = np.where(array, np.float32(0), np.float32(-np.inf))
            bias = np.broadcast_to(array, (*groups, *array.shape[-2:])).reshape(math.prod(groups), *array.shape[-2:])
        elif array is None or not _sees_all(array, keys):
            told.append(f"{name} has a mask, {given[:60]!r}; pass it as attn_mask or key_padding_mask in each call")
    return bias, told


def _sees_all(mask, keys):
    """Whether a known mask_index, flags (B, S) or numbers of keys (B,), leaves all keys."""
    return bool((mask == keys).all() if mask.ndim == 1 else mask.all())


def _operator_rotary(graph, node, name, attributes, size):
    if not attributes.get("do_rotary"):
        return None
    cosines, sines = (graph.constant(graph.input(node, i)) for i in (7, 8))
    if cosines is None or sines is None or cosines.shape != sines.shape or cosines.ndim != 2 or len(cosines) < 2:
        raise NotRead(f"{name} must have constant tables of cosines and sines in inputs 7 and 8")
    half = cosines.shape[1]
    angles = np.arctan2(np.float64(sines[1]), np.float64(cosines[1]))
    if (angles <= 0).any() or 2 * half > size:
        raise NotRead(f"{name} must have tables of positive angles for at most {size // 2} pairs")
    base = 1e4 if half < 2 else math.exp(-np.log(angles[1:] / angles[0]).sum() / np.arange(1, half).sum() * half)
    base = round(base) if abs(base - round(base)) < 1e-2 * base and base > 100 else base
    wanted = np.arange(len(sines))[:, None] * base ** (-np.arange(half) / half)
    if not (np.allclose(sines, np.sin(wanted), atol=1e-2) and np.allclose(cosines, np.cos(wanted), atol=1e-2)):
        raise NotRead(f"{name} must have tables of angles p * base^(-2 i / R)")
    return 2 * half, float(base), bool(attributes.get("rotary_interleaved"))


def _told_heads(name, attributes, key):
    """A number of heads that a node must tell."""
    if key not in attributes:
        raise NotRead(f"{name} must have an attribute {key}, got none")
    return count(f"{key} of {name}", attributes[key])


def _packed_operator(graph, node, name, attributes):
    """Queries, keys and values of com.microsoft Attention and QAttention, whose input 1 is the weights of all three."""
    weight, bias = (graph.constant(graph.input(node, i)) if graph.input(node, i) else None for i in (1, 2))
    if node.op_type == "QAttention" and weight is not None:
        scale, zero = (graph.constant(graph.input(node, i)) if graph.input(node, i) else None for i in (4, 7))
        if scale is None:
            raise NotRead(f"{name} must have a constant scale of its weights in input 4")
        weight = real(weight, scale, zero)
    if weight is None or weight.ndim != 2 or (bias is None and graph.input(node, 2)):
        raise NotRead(f"{name} must have constant weights (E, Q + K + V) and bias, got computed ones")
    heads, columns = _told_heads(name, attributes, "num_heads"), weight.shape[1]
    sizes = list(attributes.get("qkv_hidden_sizes", ())) or [columns // 3] * 3
    if len(sizes) != 3 or min(sizes) < 1 or sum(sizes) != columns or (bias is not None and bias.shape != (columns,)):
        raise NotRead(
            f"{name} must have weights (E, {' + '.join(map(str, sizes))}) and one bias per column, got weights "
            f"{weight.shape}, bias {None if bias is None else bias.shape}"
        )
    rows = graph.shapes.get(node.input[0])
    if rows is None or len(rows) != 3 or rows[2] != weight.shape[0]:
        raise NotRead(f"{name} must have weights (E, Q + K + V) of its input's E, got {weight.shape} for {rows}")
    made = f"{graph.output(node)} before"  # the product that the operator makes first
    graph.shapes[made] = (*rows[:2], columns)
    graph.maker.setdefault(made, node)
    graph.maps[made] = Map(before_codes(graph, node.input[0]), weight, bias)
    whole = Elements.of(made, graph.shapes[made])
    return (
        *(
            whole.moved(lambda x, end=end, size=size: x[..., end - size : end])
            for size, end in zip(sizes, np.cumsum(sizes), strict=True)
        ),
        heads,
    )


def _operator_inputs(graph, node, name, attributes):
    """(q, k, v as elements, heads of queries, of keys) of an operator that takes them as inputs."""
    inputs = [*node.input, "", "", "", ""][:4]
    is_map = is_map_of(graph)
    domain = domain_of(node)
    if not inputs[0]:
        raise NotRead(f"{name} must have queries in input 0, got none")
    if graph.constant(inputs[0]) is not None:
        raise no_projection(graph, None, f"input 0 of {name}")
    q = trace(graph, inputs[0], is_map)
    heads, kv_heads = (
        (_told_heads(name, attributes, "num_heads"),) * 2
        if domain
        else tuple(
            _told_heads(name, attributes, key) if key in attributes else None for key in ("q_num_heads", "kv_num_heads")
        )
    )
    if node.op_type == "GroupQueryAttention":
        kv_heads = _told_heads(name, attributes, "kv_num_heads")
        if not inputs[1]:
            size = q.shape[2] // (heads + 2 * kv_heads)
            cuts = (0, heads * size, (heads + kv_heads) * size, (heads + 2 * kv_heads) * size)
            return (*(q.moved(lambda x, i=i: x[..., cuts[i] : cuts[i + 1]]) for i in range(3)), heads, kv_heads)
    elif domain and not inputs[1] and len(q.shape) == 5 and q.shape[3] == 3:
        return (*(q.moved(lambda x, i=i: x[:, :, :, i].reshape(*x.shape[:2], -1)) for i in range(3)), heads, heads)
    if not all(inputs[:2]) or (not inputs[2] and not domain):
        raise NotRead(f"{name} must have inputs query, key and value apart, got packed ones: {list(node.input)}")
    k = trace(graph, inputs[1], is_map)
    if not inputs[2]:
        if len(k.shape) != 5 or k.shape[3] != 2:
            raise NotRead(f"{name} must have inputs query, key and value apart, got packed ones: {list(node.input)}")
        k, v = (k.moved(lambda x, i=i: x[:, :, :, i].reshape(*x.shape[:2], -1)) for i in range(2))
    else:
        v = trace(graph, inputs[2], is_map)
    if node.op_type == "MultiHeadAttention":
        k, v = (
            each.moved(lambda x: x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)) if len(each.shape) == 4 else each
            for each in (k, v)
        )
        if inputs[3]:
            bias = graph.constant(inputs[3])
            sizes = [each.shape[-1] for each in (q, k, v)]
            if bias is None or bias.shape != (sum(sizes),):
                raise NotRead(f"{name} must have a constant bias of {sum(sizes)} elements in input 3")
            q, k, v = (
                each.plus(Elements(part.shape, (), part))
                for each, part in zip((q, k, v), np.split(bias, np.cumsum(sizes)[:-1]), strict=True)
            )
    return q, k, v, heads, kv_heads
