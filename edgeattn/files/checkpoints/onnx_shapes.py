"""The shapes of what nodes of an ONNX graph compute, from those of their inputs."""

import numpy as np

from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_resize import resized_shape

_EMPTY = np.int8(0)
_FIRST_OF = (
    "Softmax",
    "LogSoftmax",
    "Dropout",
    "LeakyRelu",
    "Elu",
    "Selu",
    "HardSigmoid",
    "HardSwish",
    "Swish",
    "BatchNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "LpNormalization",
    "Softplus",
    "QAttention",
    "QLinearSoftmax",
    "QLinearSigmoid",
    "QLinearAdd",
    "QLinearMul",
    "RotaryEmbedding",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "ScatterND",
    "ScatterElements",
    "CumSum",
    "Trilu",
    "EyeLike",
    "Mish",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "PRelu",
    *functions.SAME,
)
# Weights of a linear map: (where the value is, where its weights are)
PRODUCTS = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "MatMulInteger": (0, 1),
    "FusedMatMul": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
}


def shapes_of(graph, node):
    """The shape of a node's output, or a list of those of all; None where it is not known."""
    kind, attributes = node.op_type, graph.attributes(node)
    shapes = [graph.shapes.get(name) if name else None for name in node.input]
    first = shapes[0] if shapes else None
    if kind in ("Constant", "ConstantOfShape", "Range"):
        value = graph.constant(node.output[0])
        return None if value is None else value.shape
    if kind == "Shape":
        return (len(first[attributes.get("start", 0) : attributes.get("end")]),)
    if first is None:
        return None
    if kind == "Size":
        return ()
    if kind == "Gather":
        axis = attributes.get("axis", 0) % len(first)
        return None if shapes[1] is None else first[:axis] + shapes[1] + first[axis + 1 :]
    if kind in functions.LAYOUT:
        rest = [graph.constant(name) if name else None for name in list(node.input)[1:]]
        if any(each is None and name for each, name in zip(rest, list(node.input)[1:], strict=True)):
            return None
        more = {"outputs": len(node.output)} if kind == "Split" else {}
        functions.check_axes(first)
        moved = functions.LAYOUT[kind](attributes, np.broadcast_to(_EMPTY, first), *rest, **more)
        return [part.shape for part in moved] if kind == "Split" else moved.shape
    if kind == "Resize":
        scales, sizes = (graph.constant(graph.input(node, i)) if graph.input(node, i) else None for i in (2, 3))
        return resized_shape(attributes, first, scales, sizes)[0]
    if kind == "GatherElements":
        return shapes[1]
    if kind == "GatherND":
        axes = attributes.get("batch_dims", 0)
        return None if shapes[1] is None else (*shapes[1][:-1], *first[axes + shapes[1][-1]:])
    if kind == "DynamicQuantizeLinear":
        return [first, (), ()]
    if kind in _FIRST_OF:
        return [first] * len(node.output)
    if kind in functions.ELEMENTWISE:
        shapes = [shape for name, shape in zip(node.input, shapes, strict=True) if name]
        return None if None in shapes else np.broadcast_shapes(*shapes)
    if kind == "Concat":
        axis = attributes.get("axis", 0) % len(first)
        return None if None in shapes else first[:axis] + (sum(s[axis] for s in shapes),) + first[axis + 1 :]
    if kind in functions.REDUCED:
        axes = attributes.get("axes")
        if graph.input(node, 1):
            axes = graph.constant(node.input[1]).reshape(-1).tolist()
        axes = {axis % len(first) for axis in axes} if axes else set(range(len(first)))
        keep = attributes.get("keepdims", 1)
        return tuple(1 if i in axes else n for i, n in enumerate(first) if keep or i not in axes)
    return _shape_of_product(graph, node, attributes, shapes, first)


def _shape_of_product(graph, node, attributes, shapes, first):
    kind = node.op_type
    if kind in PRODUCTS:
        second = shapes[PRODUCTS[kind][1]]
        if second is None:
            return None
        if kind == "FusedMatMul" or kind in ("Gemm", "QGemm"):
            first = first[:-2] + first[:-3:-1] if attributes.get("transA") else first
            second = second[:-2] + second[:-3:-1] if attributes.get("transB") else second
        if first[-1] != second[-2 if len(second) > 1 else 0]:
            return None
        if len(second) == 1:
            return first[:-1]
        return np.broadcast_shapes(first[:-2], second[:-2]) + (first[-2:-1] + second[-1:])
    if kind == "Einsum":
        left, right, out = equation(attributes.get("equation", ""))
        sizes = dict(zip(left + right, first + shapes[1], strict=True))
        return tuple(sizes[letter] for letter in out)
    if kind in ("Conv", "ConvInteger", "FusedConv", "MaxPool", "AveragePool"):
        return _convolved(attributes, first, None if "Pool" in kind else shapes[1])
    if kind == "GlobalAveragePool":
        return (*first[:2], *[1] * (len(first) - 2))
    if kind == "Tile":
        return tuple(n * m for n, m in zip(first, graph.constant(node.input[1]).reshape(-1).tolist(), strict=True))
    if kind == "Pad":
        pads = attributes.get("pads") or graph.constant(graph.input(node, 1)).reshape(-1).tolist()
        return tuple(n + a + b for n, a, b in zip(first, pads[: len(first)], pads[len(first) :], strict=True))
    if kind == "EmbedLayerNormalization":
        return [(*first, graph.shapes[node.input[2]][1])]
    if kind in ("Attention", "MultiHeadAttention", "GroupQueryAttention"):
        return _shape_of_attention(node, attributes, shapes, first)
    return None


def _shape_of_attention(node, attributes, shapes, first):
    if node.domain == "com.microsoft" and node.op_type == "Attention":
        sizes = attributes.get("qkv_hidden_sizes")
        return [(*first[:2], sizes[2] if sizes else shapes[1][1] // 3)]
    if node.op_type == "GroupQueryAttention":
        if shapes[2] is None:
            heads, kv = attributes["num_heads"], attributes["kv_num_heads"]
            return [(*first[:2], first[2] // (heads + 2 * kv) * heads)]
        return [first]
    if len(first) == 5:  # packed (B, L, H, 3, D)
        return [(*first[:2], first[2] * first[4])]
    value = shapes[2] if len(shapes) > 2 else None
    if len(first) == 3:
        heads, kv = (
            attributes.get(name) or attributes.get("num_heads") for name in ("q_num_heads", "kv_num_heads")
        )
        if value is None or len(value) == 4:
            return [first]
        return [(*first[:2], value[2] // kv * heads)]
    return [(*first[:3], value[3])]


def equation(text):
    """The letters of an Einsum of two inputs: (left, right, out).

    Raises
    ------
    ValueError
        For another Einsum.
    """
    inputs, arrow, out = text.replace(" ", "").partition("->")
    left, comma, right = inputs.partition(",")
    if not arrow or not comma or "." in text or len(set(left)) != len(left) or len(set(right)) != len(right):
        raise ValueError(f"an Einsum must be of two inputs, each letter once in each, got {text[:100]!r}")
    return left, right, out


def _convolved(attributes, shape, weight):
    kernel = weight[2:] if weight is not None else attributes["kernel_shape"]
    axes = len(kernel)
    pads, strides = attributes.get("pads", [0] * 2 * axes), attributes.get("strides", [1] * axes)
    dilations = attributes.get("dilations", [1] * axes)
    if attributes.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        sizes = [-(-n // step) for n, step in zip(shape[2:], strides, strict=True)]
    else:
        ceil = attributes.get("ceil_mode")
        sizes = [
            (n + a + b - d * (k - 1) - 1 + (step - 1 if ceil else 0)) // step + 1
            for n, a, b, d, k, step in zip(shape[2:], pads[:axes], pads[axes:], dilations, kernel, strides, strict=True)
        ]
    if min(sizes) < 1:
        return None
    return (shape[0], shape[1] if weight is None else weight[0], *sizes)
