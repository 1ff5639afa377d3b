"""Operators as the plain ONNX nodes that they stand for: fused ones, Einsum, those upon codes (QOperator)."""

from edgeattn.files.checkpoints.onnx_shapes import PRODUCTS, equation

_FLOAT, _INT, _INTS, _STRING = 1, 2, 7, 3  # onnx.AttributeProto.AttributeType
_EPS = 1e-12  # where a node has none
_DROPPED = ("Transpose", "DequantizeLinear")  # where nothing reads them


def unfused(nodes, outputs=()):
    """The nodes, with those of fused ones in their places, and without what only moves there and back, or to a shape.

    `outputs` names what the graph gives.
    """
    maker = {name: node for node in nodes for name in node.output if name}
    result = []
    for node in nodes:
        write = _WRITERS.get(node.op_type)
        try:
            made = [node] if write is None else write(_Nodes(node, maker))
        except IndexError:  # of a damaged node, which is told where it is read
            made = [node]
        result += made
    maker = {name: node for node in result for name in node.output if name}
    result = [_of_codes_themselves(_turned_back(node, maker), maker) for node in result]
    read = {name for node in result for name in node.input} | set(outputs)
    return [node for node in result if node.op_type not in _DROPPED or read.intersection(node.output)]


def _of_codes_themselves(node, maker):
    """A Shape of the reals of codes as one of the codes."""
    reals = maker.get(node.input[0]) if node.op_type == "Shape" and node.input else None
    if reals is None or reals.op_type != "DequantizeLinear" or not reals.input:
        return node
    same = type(node)()
    same.CopyFrom(node)
    same.input[0] = reals.input[0]
    return same


def _turned_back(node, maker):
    """A Transpose that takes another one back, as a node that does nothing."""
    first = maker.get(node.input[0]) if node.op_type == "Transpose" and node.input else None
    if first is None or first.op_type != "Transpose" or not first.input or not node.output:
        return node
    perms = [list(entry.ints) for each in (first, node) for entry in each.attribute if entry.name == "perm"]
    if len(perms) != 2 or len(perms[0]) != len(perms[1]) or any(
            not 0 <= axis < len(perms[0]) or perms[0][axis] != i for i, axis in enumerate(perms[1])):
        return node
    same = type(node)()
    same.op_type, same.name = "Identity", node.name
    same.input.append(first.input[0])
    same.output.append(node.output[0])
    return same


class _Nodes:
    """Writes nodes in place of one."""

    def __init__(self, node, maker):
        self.node, self.maker, self.made = node, maker, []
        self.attributes = {entry.name: entry for entry in node.attribute}

    def input(self, index):
        return self.node.input[index] if index < len(self.node.input) else ""

    def output(self, index):
        return self.node.output[index] if index < len(self.node.output) else ""

    def add(self, kind, *inputs, to="", **attributes):
        """A node; returns the name of what it gives."""
        made = type(self.node)()
        made.op_type, made.name = kind, self.node.name
        to = to or f"{self.output(0) or self.node.name} {kind} {len(self.made)}"
        made.input.extend(inputs)
        made.output.append(to)
        for name, value in attributes.items():
            entry = made.attribute.add()
            entry.name = name
            if isinstance(value, float):
                entry.type, entry.f = _FLOAT, value
            elif isinstance(value, int):
                entry.type, entry.i = _INT, value
            elif isinstance(value, str):
                entry.type, entry.s = _STRING, value.encode()
            else:
                entry.type = _INTS
                entry.ints.extend(value)
        self.made.append(made)
        return to

    def split(self, value):
        """The names of the halves of a value's last axis."""
        first = self.add("Split", value, axis=-1, num_outputs=2)
        self.made[-1].output.append(second := f"{first} 2")
        return first, second

    @property
    def epsilon(self):
        return self.attributes["epsilon"].f if "epsilon" in self.attributes else _EPS

    def maps(self, name):
        """Whether a value comes straight from a product."""
        node = self.maker.get(name)
        return node is not None and (node.op_type in PRODUCTS or node.op_type == "Mul")


def _skip_norm(w):
    simple = w.node.op_type == "SkipSimplifiedLayerNormalization"
    x, skip, weight = w.node.input[:3]
    beta, bias = ("", w.input(3)) if simple else (w.input(3), w.input(4))
    if w.maps(skip) and not w.maps(x):
        x, skip = skip, x
    x = w.add("Add", x, bias) if bias else x
    total = w.add("Add", x, skip, to=w.output(3))
    if simple:
        w.add("SimplifiedLayerNormalization", total, weight, to=w.output(0), epsilon=w.epsilon)
    else:
        w.add("LayerNormalization", total, weight, *([beta] if beta else []), to=w.output(0), epsilon=w.epsilon)
    return w.made


def _embedding(w):
    ids, types, tokens, places, table, weight, bias = w.node.input[:7]
    mask, positions = w.input(7), w.input(8)
    x = w.add("Gather", tokens, ids)
    if not positions:
        length = w.add("Shape", ids, start=1, end=2)
        positions = w.add("Range", w.add("Constant", value_int=0), length, w.add("Constant", value_int=1))
    x = w.add("Add", x, w.add("Gather", places, positions))
    if types and table:
        x = w.add("Add", x, w.add("Gather", table, types))
    x = w.add("Identity", x, to=w.output(2)) if w.output(2) else x
    w.add("LayerNormalization", x, weight, bias, to=w.output(0), epsilon=w.epsilon)
    if mask and w.output(1):
        w.add("ReduceSum", mask, to=w.output(1), axes=[1], keepdims=0)
    return w.made


def _biased(w):
    x, bias = w.node.input[0], w.input(1)
    x = w.add("Add", x, bias) if bias else x
    w.add("Gelu", x, to=w.output(0), approximate="none" if w.node.op_type == "BiasGelu" else "tanh")
    return w.made


def _rotary(w):
    x, cosines, sines = w.node.input[:3]
    given = {name: entry.i for name, entry in w.attributes.items()}
    maker = w.maker.get(x)
    heads_apart = maker is not None and any(entry.name == "perm" and len(entry.ints) == 4 for entry in maker.attribute)
    if w.node.domain not in ("", "ai.onnx") or given.get("interleaved") or given.get("rotary_embedding_dim") or not (
            heads_apart):
        return [w.node]
    tables = [w.add("Gather", table, w.input(3)) if w.input(3) else table for table in (cosines, sines)]
    cosines, sines = (w.add("Unsqueeze", table, axes=[1]) for table in tables)
    first, second = w.split(x)
    w.add("Concat", w.add("Sub", w.add("Mul", first, cosines), w.add("Mul", second, sines)),
          w.add("Add", w.add("Mul", first, sines), w.add("Mul", second, cosines)), to=w.output(0), axis=-1)
    return w.made


def _quick_gelu(w):
    x, alpha = w.node.input[0], w.attributes["alpha"].f if "alpha" in w.attributes else (
        1.702 if w.node.op_type == "QuickGelu" else 1.0)
    steep = w.add("Mul", x, w.add("Constant", value_float=alpha)) if alpha != 1 else x
    w.add("Mul", x, w.add("Sigmoid", steep), to=w.output(0))
    return w.made


def _einsum(w):
    """Of rows and weights: a product of two axes each, between reshapes."""
    try:
        left, right, out = equation(w.attributes["equation"].s.decode())
    except (ValueError, KeyError):
        return [w.node]
    inner = "".join(letter for letter in left if letter in right)
    lead, outer = ("".join(letter for letter in side if letter not in inner) for side in (left, right))
    made = lead + outer
    if not inner or not outer or sorted(out) != sorted(made) or len(lead) < 2:
        return [w.node]
    (x, weight), kept = w.node.input[:2], [0] * len(lead)
    if left != lead + inner:
        x = w.add("Transpose", x, perm=[left.index(letter) for letter in lead + inner])
    if right != inner + outer:
        weight = w.add("Transpose", weight, perm=[right.index(letter) for letter in inner + outer])
    sizes = w.add("Shape", weight)
    if len(inner) > 1:
        x = w.add("Reshape", x, w.add("Constant", value_ints=[*kept, -1]))
    if len(inner) > 1 or len(outer) > 1:
        rows = w.add("Slice", sizes, *(w.add("Constant", value_ints=[number]) for number in (len(inner), 2**31)))
        wide = w.add("ReduceProd", rows, axes=[0], keepdims=1)
        weight = w.add("Reshape", weight, w.add("Concat", w.add("Constant", value_ints=[-1]), wide, axis=0))
    turned = [] if out == made else [made.index(letter) for letter in out]
    product = w.add("MatMul", x, weight, to="" if turned or len(outer) > 1 else w.output(0))
    if len(outer) > 1:
        heads = w.add("Concat", w.add("Constant", value_ints=kept), rows, axis=0)
        product = w.add("Reshape", product, heads, to="" if turned else w.output(0))
    if turned:
        w.add("Transpose", product, to=w.output(0), perm=turned)
    return w.made


def _pointwise(w):
    """A convolution of one token or pixel at a time: a product, between transpositions."""
    given = {name: list(entry.ints) for name, entry in w.attributes.items() if entry.type == _INTS}
    axes = len(given.get("kernel_shape", ()))
    group = w.attributes["group"].i if "group" in w.attributes else 1
    if axes not in (1, 2) or group != 1 or any(given.get("pads", ())) or any(
            size != 1 for name in ("kernel_shape", "strides", "dilations") for size in given.get(name, ())):
        return [w.node]
    last = w.add("Transpose", w.node.input[0], perm=[0, *range(2, axes + 2), 1])
    weight = w.add("Squeeze", w.node.input[1], w.add("Constant", value_ints=list(range(2, axes + 2))))
    rows = w.add("MatMul", last, w.add("Transpose", weight, perm=[1, 0]))
    rows = w.add("Add", rows, w.input(2)) if w.input(2) else rows
    w.add("Transpose", rows, to=w.output(0), perm=[0, axes + 1, *range(1, axes + 1)])
    return w.made


def _of_codes(w):
    """An elementwise operator upon codes, between what makes reals of them and codes again."""
    kind = w.node.op_type.removeprefix("QLinear")
    first = 1 if kind == "Where" else 0
    count = 1 if kind == "Sigmoid" else 2
    reals = [w.add("DequantizeLinear", *w.node.input[i : i + 3]) for i in range(first, first + 3 * count, 3)]
    made = w.add(kind, *w.node.input[:first], *reals)
    scales = w.node.input[first + 3 * count :]
    w.add("QuantizeLinear", made, scales[0], *scales[1:], to=w.output(0))
    return w.made


def _concat_of_codes(w):
    scales, parts = w.node.input[:2], w.node.input[2:]
    reals = [w.add("DequantizeLinear", *parts[i : i + 3]) for i in range(0, len(parts), 3)]
    axis = w.attributes["axis"].i if "axis" in w.attributes else 0
    w.add("QuantizeLinear", w.add("Concat", *reals, axis=axis), *scales, to=w.output(0))
    return w.made


def _convolution_of_codes(w):
    x, weight, scales, bias = w.node.input[:3], w.node.input[3:6], w.node.input[6:8], w.input(8)
    reals = [w.add("DequantizeLinear", *x), w.add("DequantizeLinear", *weight, axis=0)]
    if bias:
        reals.append(w.add("DequantizeLinear", bias, w.add("Mul", x[1], weight[1]), axis=0))
    made = w.add("Conv", *reals)
    w.made[-1].attribute.extend(w.node.attribute)
    w.add("QuantizeLinear", made, *scales, to=w.output(0))
    return w.made


def _dynamic_convolution(w):
    """The Mul that makes reals of the sums of a ConvInteger, as quantize_dynamic writes them: a Conv of reals."""
    for sums, scales in (list(w.node.input), list(w.node.input)[::-1]) if len(w.node.input) == 2 else ():
        cast, both = w.maker.get(sums), w.maker.get(scales)
        if cast is None or cast.op_type != "Cast" or both is None or both.op_type != "Mul":
            continue
        convolution = w.maker.get(cast.input[0])
        if convolution is None or convolution.op_type != "ConvInteger":
            continue
        codes = w.maker.get(convolution.input[0])
        rest = [name for name in both.input if codes is None or name not in codes.output]
        if codes is None or codes.op_type != "DynamicQuantizeLinear" or len(rest) != 1 or len(both.input) != 2:
            continue
        weight = w.add("DequantizeLinear", convolution.input[1], rest[0], *convolution.input[3:4], axis=0)
        w.add("Conv", codes.input[0], weight, to=w.output(0))
        w.made[-1].attribute.extend(convolution.attribute)
        return w.made
    return [w.node]


_WRITERS = {
    "Mul": _dynamic_convolution,
    "QLinearConcat": _concat_of_codes,
    "QLinearConv": _convolution_of_codes,
    **dict.fromkeys(("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearWhere"), _of_codes),
    "Conv": _pointwise,
    "QuickGelu": _quick_gelu,
    "Swish": _quick_gelu,
    "Einsum": _einsum,
    "RotaryEmbedding": _rotary,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "EmbedLayerNormalization": _embedding,
    "BiasGelu": _biased,
    "FastGelu": _biased,
}
