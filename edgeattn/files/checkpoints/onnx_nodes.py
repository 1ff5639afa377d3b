"""The nodes of an ONNX graph: who makes and reads each value, its shape, and its array where that is known.

A graph with open axes is looked at for some lengths: what is computed of shapes is then as known as stored constants.
"""

import math

import numpy as np

from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_values import NotRead
from edgeattn.files.paths import reason

_MOST_NODES = 100_000  # ten times those of a language model
_FEW_ELEMENTS, _MOST_ELEMENTS = 2**22, 2**24
_LONGEST_WAY = 400
_EMPTY = np.int8(0)
_BATCH, _LENGTH, _IMAGE = 2, 5, 224
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
    "Mish",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "PRelu",
    *functions.SAME,
)
# Weights of a linear map: (where the value is, where its weights are)
_PRODUCTS = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "MatMulInteger": (0, 1),
    "FusedMatMul": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
}


class Graph:
    """Who makes each value, who reads it, what shape it has, and which values are known.

    Parameters
    ----------
    model : onnx.ModelProto
    values : Values
    source : str
        What to call the model in errors.
    batch : int
        What an open first axis is taken for.
    """

    def __init__(self, model, values, source, batch=_BATCH):
        if len(model.graph.node) > _MOST_NODES:
            raise NotRead(f"its graph must have at most {_MOST_NODES} nodes, got {len(model.graph.node)}")
        self.source, self.nodes = source, list(model.graph.node)
        self.outputs = {value.name for value in model.graph.output}
        self.opset = max([entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")] or [23])
        self._values, self._batch = values, batch
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.maker, self.readers, self.number = {}, {}, {}
        for number, node in enumerate(self.nodes):
            for name in node.output:
                if name:
                    self.maker[name] = node
            self.number[id(node)] = number
            for name in node.input:
                if name:
                    self.readers.setdefault(name, []).append(node)
        stored = sum(_elements(tensor.dims) for tensor in model.graph.initializer)
        self.most_elements = min(_MOST_ELEMENTS, max(_FEW_ELEMENTS, 4 * stored))
        self._left = 8 * self.most_elements  # elements that may yet be computed
        self._attributes, self._arrays, self._known = {}, {}, {}
        self.maps = {}  # linear maps within operators, by names made up for what they give
        self.shapes = {name: tuple(tensor.dims) for name, tensor in self._stored.items()}
        self.open_axes = False  # whether lengths, not only the batch, are taken for numbers
        self._open = {}
        self._input_shapes(model)
        for node in self.nodes:
            self._follow(node)

    def attributes(self, node):
        """The attributes of a node that are asked for, by name."""
        if id(node) not in self._attributes:
            self._attributes[id(node)] = self._values.attributes(node)
        return self._attributes[id(node)]

    @staticmethod
    def input(node, index):
        """The name of an input of a node; empty where it has none there."""
        return node.input[index] if index < len(node.input) else ""

    @staticmethod
    def output(node):
        """The name of a node's first output; empty where it has none."""
        return node.output[0] if node.output else ""

    # -- shapes

    def _input_shapes(self, model):
        for value in model.graph.input:
            if value.name in self._stored:
                continue
            tensor = value.type.tensor_type
            dims = tensor.shape.dim if tensor.HasField("shape") else None
            if dims is None:  # of unknown rank: rows of tokens, as wide as weights are high
                width = self._width(value.name)
                shape = None if width is None else (self._batch, _LENGTH, width)
                self.open_axes = True
            else:
                shape = tuple(self._axis(value.name, dim, i, len(dims)) for i, dim in enumerate(dims))
            self.shapes[value.name] = shape

    def _axis(self, name, dim, i, axes):
        if dim.dim_value > 0:
            return dim.dim_value
        if i:
            self.open_axes = True
        if i == axes - 1 and axes < 4 and (width := self._width(name)) is not None:
            return width
        usual = self._batch if i == 0 else (3 if i == 1 else _IMAGE) if axes == 4 else _LENGTH
        return self._open.setdefault(dim.dim_param, usual) if dim.dim_param else usual

    def _width(self, name):
        """The length of the last axis of a graph's input, from the weights it meets."""
        for node in self.readers.get(name, ()):
            if node.op_type in ("MatMul", "Gemm", "FusedMatMul") and self.input(node, 0) == name:
                shape = self.shapes.get(self.input(node, 1))
                if shape is not None and len(shape) == 2:
                    return shape[1 if self.attributes(node).get("transB") else 0]
                maker = self.maker.get(self.input(node, 1))
                shape = self.shapes.get(self.input(maker, 0)) if maker is not None and maker.input else None
                if shape is not None and len(shape) == 2 and maker.op_type == "Transpose":
                    return shape[1]
                if shape is not None and len(shape) == 2 and maker.op_type in functions.SAME:
                    return shape[0]
            if node.op_type in ("Attention", "QAttention") and node.domain == "com.microsoft":
                shape = self.shapes.get(self.input(node, 1))
                if shape is not None and len(shape) == 2:
                    return shape[0]
            if node.op_type in (*functions.SAME, "DynamicQuantizeLinear") and node.output and node.output[0] != name:
                for reader in self.readers.get(node.output[0], ()):
                    shape = self.shapes.get(self.input(reader, 1))
                    if reader.op_type in _PRODUCTS and shape is not None and len(shape) == 2:
                        return shape[0]
        return None

    def _follow(self, node):
        """The shapes of a node's outputs, None where they are not known, and whether they can be computed."""
        kind = node.op_type
        known = all(not name or self._is_known(name) for name in node.input)
        if kind == "Shape":
            known = self.shapes.get(self.input(node, 0)) is not None
        elif (
            kind not in ("Constant", "ConstantOfShape")
            and kind not in functions.LAYOUT
            and (
                kind not in functions.ELEMENTWISE
                and kind not in functions.OTHERS
                and kind not in functions.REDUCED
                and kind not in functions.SAME
            )
        ):
            known = False
        for name in node.output:
            if name:
                self._known[name] = known
        try:
            shapes = self._shapes_of(node)
        except (ValueError, TypeError, IndexError, OverflowError, ArithmeticError):
            shapes = None  # of a damaged node, or one of a kind that is not followed
        if not isinstance(shapes, list):
            shapes = [shapes]
        for i, name in enumerate(node.output):
            if name:
                self.shapes[name] = shapes[i] if i < len(shapes) else None

    def _is_known(self, name):
        return name in self._stored or self._known.get(name, False)

    def _shapes_of(self, node):
        kind, attributes = node.op_type, self.attributes(node)
        shapes = [self.shapes.get(name) if name else None for name in node.input]
        first = shapes[0] if shapes else None
        if kind in ("Constant", "ConstantOfShape", "Range"):
            value = self.constant(node.output[0])
            return None if value is None else value.shape
        if kind == "Shape":
            return (len(first[attributes.get("start", 0) : attributes.get("end")]),)
        if first is None:
            return None
        if kind == "Gather":
            axis = attributes.get("axis", 0) % len(first)
            return None if shapes[1] is None else first[:axis] + shapes[1] + first[axis + 1 :]
        if kind in functions.LAYOUT:
            rest = [self.constant(name) if name else None for name in list(node.input)[1:]]
            if any(each is None and name for each, name in zip(rest, list(node.input)[1:], strict=True)):
                return None
            more = {"outputs": len(node.output)} if kind == "Split" else {}
            functions.check_axes(first)
            moved = functions.LAYOUT[kind](attributes, np.broadcast_to(_EMPTY, first), *rest, **more)
            return [part.shape for part in moved] if kind == "Split" else moved.shape
        if kind == "DynamicQuantizeLinear":
            return [first, (), ()]
        if kind in _FIRST_OF:
            return [first] * len(node.output)
        if kind in functions.ELEMENTWISE:
            return None if None in shapes else np.broadcast_shapes(*shapes)
        if kind == "Concat":
            axis = attributes.get("axis", 0) % len(first)
            return None if None in shapes else first[:axis] + (sum(s[axis] for s in shapes),) + first[axis + 1 :]
        if kind in functions.REDUCED:
            axes = attributes.get("axes")
            if self.input(node, 1):
                axes = self.constant(node.input[1]).reshape(-1).tolist()
            axes = {axis % len(first) for axis in axes} if axes else set(range(len(first)))
            keep = attributes.get("keepdims", 1)
            return tuple(1 if i in axes else n for i, n in enumerate(first) if keep or i not in axes)
        return self._shape_of_product(node, attributes, shapes, first)

    def _shape_of_product(self, node, attributes, shapes, first):
        kind = node.op_type
        if kind in _PRODUCTS:
            second = shapes[_PRODUCTS[kind][1]]
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
            return tuple(n * m for n, m in zip(first, self.constant(node.input[1]).reshape(-1).tolist(), strict=True))
        if kind == "Pad":
            pads = attributes.get("pads") or self.constant(self.input(node, 1)).reshape(-1).tolist()
            return tuple(n + a + b for n, a, b in zip(first, pads[: len(first)], pads[len(first) :], strict=True))
        if kind == "EmbedLayerNormalization":
            return [(*first, self.shapes[node.input[2]][1])]
        if kind in ("Attention", "MultiHeadAttention", "GroupQueryAttention"):
            return self._shape_of_attention(node, attributes, shapes, first)
        return None

    def _shape_of_attention(self, node, attributes, shapes, first):
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

    # -- constants

    def constant(self, name):
        """The array of a stored value, or of one that is computed of these and of shapes; None for any other."""
        if name in self._arrays:
            return self._arrays[name]
        if not self._is_known(name):
            return None
        todo, found = [name], {}
        while todo:
            each = todo.pop()
            node = self.maker.get(each)
            if each in self._arrays or each in self._stored or node is None or id(node) in found:
                continue
            found[id(node)] = node
            if node.op_type != "Shape":
                todo.extend(name for name in node.input if name)
        for node in sorted(found.values(), key=lambda node: self.number[id(node)]):
            for output, array in zip(node.output, self._computed(node), strict=False):
                self._arrays[output] = array
        return self._stored_array(name)

    def _stored_array(self, name):
        if name not in self._arrays and name in self._stored:
            self._arrays[name] = self._values.array(self._stored[name], name)
        return self._arrays.get(name)

    def _computed(self, node):
        """The arrays of a node's outputs, all of whose inputs are known."""
        kind, attributes = node.op_type, self.attributes(node)
        if kind == "Constant":
            return [self._values.of_constant(node)]
        if kind == "Shape":
            shape = self.shapes[node.input[0]]
            return [np.array(shape[attributes.get("start", 0) : attributes.get("end")], np.int64)]
        inputs = [self._stored_array(name) if name else None for name in node.input]
        if any(array is None and name for array, name in zip(inputs, node.input, strict=True)) or not inputs:
            raise NotRead(f"{title(node)} reads {reason(list(node.input))} before it is computed")
        try:
            if kind == "ConstantOfShape":
                shape = functions.whole_numbers(inputs[0], "a shape")
                self._spend(_elements(shape))
                return [np.full(shape, self._values.filled(node))]
            self._spend(max((array.size for array in inputs if array is not None), default=0))
            if (shape := self.shapes.get(self.output(node))) is not None and kind not in functions.LAYOUT:
                self._spend(_elements(shape))
            if kind == "Cast":
                return [inputs[0].astype(self._values.dtype(attributes.get("to", 1)))]
            if kind == "DequantizeLinear":
                return [functions.dequantized(attributes, *inputs)]
            if kind in functions.SAME:
                return [inputs[0]]
            if kind in functions.LAYOUT:
                more = {"outputs": len(node.output)} if kind == "Split" else {}
                made = functions.LAYOUT[kind](attributes, *inputs, **more)
                return made if kind == "Split" else [made]
            for table in (functions.ELEMENTWISE, functions.REDUCED, functions.OTHERS):
                if kind in table:
                    with np.errstate(all="ignore"):
                        return [np.asarray(table[kind](attributes, *inputs))]
        except NotRead:
            raise
        except (ValueError, TypeError, IndexError, OverflowError, ArithmeticError, AttributeError) as error:
            raise NotRead(f"{title(node)} cannot be computed of its constants: {reason(error)}") from None
        raise NotRead(f"{title(node)} of constants must be of a kind that is read")

    def _spend(self, elements):
        self._left -= max(elements, 1)
        if elements > self.most_elements or self._left < 0:
            raise NotRead("what it computes of constants must be no larger than they are")

    # -- ways

    def way(self, start, inputs_of):
        """The nodes above `start`, in their order, each of whose inputs `inputs_of(node)` are followed; None: stop."""
        todo, found = [start], {}
        while todo:
            node = self.maker.get(todo.pop())
            if node is None or id(node) in found:
                continue
            inputs = inputs_of(node)
            if inputs is None:
                continue
            found[id(node)] = node
            if len(found) > _LONGEST_WAY:
                raise NotRead(
                    f"between a projection and attention there must be at most {_LONGEST_WAY} nodes; found "
                    "more, or a cycle"
                )
            todo.extend(inputs)
        return sorted(found.values(), key=lambda node: self.number[id(node)])

    def reader(self, name):
        """The one node that reads a value, but for its shape; None where there are others, or none."""
        found = [node for node in self.readers.get(name, ()) if node.op_type not in ("Shape", "Size")]
        return found[0] if len(found) == 1 and name not in self.outputs else None


def title(node):
    """A node, as errors call it."""
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain} "
    return f"{domain}{node.op_type} node {node.name[:100]!r}"


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


def _elements(shape):
    return math.prod(max(n, 0) for n in shape)
