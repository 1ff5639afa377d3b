"""The nodes of an ONNX graph: who makes and reads each value, its shape, and its array where that is known.

A graph with open axes is looked at for some lengths: what is computed of shapes is then as known as stored constants.
"""

import math

import numpy as np

from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_shapes import PRODUCTS, shapes_of
from edgeattn.files.checkpoints.onnx_unfused import unfused
from edgeattn.files.checkpoints.onnx_values import NotRead
from edgeattn.files.paths import reason

_MOST_NODES = 100_000  # ten times those of a language model
_FEW_ELEMENTS, _MOST_ELEMENTS = 2**22, 2**24
_LONGEST_WAY = 400
_BATCH, _LENGTH, _IMAGE = 2, 5, 224


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
    bound : dict of str to function
        Inputs of the graph that are taken for known, name -> (shape) -> array.
    length : int, optional
        What other open axes are taken for,
    image : int, optional
        and those of an image's height and width.
    """

    def __init__(self, model, values, source, batch=_BATCH, bound=None, length=None, image=None):
        if len(model.graph.node) > _MOST_NODES:
            raise NotRead(f"its graph must have at most {_MOST_NODES} nodes, got {len(model.graph.node)}")
        self.inputs = [value.name for value in model.graph.input]
        self.outputs = {value.name for value in model.graph.output}
        self.source, self.nodes = source, unfused(model.graph.node, self.outputs)
        self.opset = max([entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")] or [23])
        self._values, self._batch, self._length, self._image = values, batch, length or _LENGTH, image or _IMAGE
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.half = any(values.is_half(tensor) for tensor in model.graph.initializer)
        self.maker, self.readers, self.number = {}, {}, {}
        for number, node in enumerate(self.nodes):
            for name in node.output:
                if name:
                    self.maker[name] = node
            self.number[id(node)] = number
            for name in node.input:
                if name:
                    self.readers.setdefault(name, []).append(node)
        stored = [_elements(tensor.dims) for tensor in model.graph.initializer]
        self.most_elements = min(_MOST_ELEMENTS, max(_FEW_ELEMENTS, 4 * sum(stored)))
        self._largest = max([self.most_elements, *stored])
        self._left = 8 * self.most_elements + 2 * sum(stored)  # elements that may yet be computed
        self._attributes, self._arrays, self._known = {}, {}, {}
        self.maps = {}  # linear maps within operators, by names made up for what they give
        self.norms = {}  # what is above values that are norms of heads, as far as it was looked for
        self.shapes = {name: tuple(tensor.dims) for name, tensor in self._stored.items()}
        self.open_axes = False  # whether lengths, not only the batch, are taken for numbers
        self._open = {}
        self._input_shapes(model)
        for name, array_of in (bound or {}).items():
            if self.shapes.get(name) is not None:
                self._arrays[name], self._known[name] = array_of(self.shapes[name]), True
        for node in self.nodes:
            self._follow(node)

    def stored_shapes(self):
        """(name, shape) of each stored value."""
        return [(name, tuple(tensor.dims)) for name, tensor in self._stored.items()]

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
                shape = None if width is None else (self._batch, self._length, width)
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
        usual = self._batch if i == 0 else (3 if i == 1 else self._image) if axes == 4 else self._length
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
                    if reader.op_type in PRODUCTS and shape is not None and len(shape) == 2:
                        return shape[0]
        return None

    def _follow(self, node):
        """The shapes of a node's outputs, None where they are not known, and whether they can be computed."""
        kind = node.op_type
        known = all(not name or self.is_known(name) for name in node.input)
        if kind in ("Shape", "Size"):
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
            shapes = shapes_of(self, node)
        except (ValueError, TypeError, IndexError, OverflowError, ArithmeticError):
            shapes = None  # of a damaged node, or one of a kind that is not followed
        if not isinstance(shapes, list):
            shapes = [shapes]
        for i, name in enumerate(node.output):
            if name:
                self.shapes[name] = shapes[i] if i < len(shapes) else None

    def is_known(self, name):
        """Whether a value is stored, or computed of these and of shapes."""
        return name in self._stored or self._known.get(name, False)

    def is_computed(self, name):
        """Whether a node makes a known value."""
        return name in self.maker and self.is_known(name)

    # -- constants

    def constant(self, name):
        """The array of a stored value, or of one that is computed of these and of shapes; None for any other."""
        if name in self._arrays:
            return self._arrays[name]
        if not self.is_known(name):
            return None
        todo, found = [name], {}
        while todo:
            each = todo.pop()
            node = self.maker.get(each)
            if each in self._arrays or each in self._stored or node is None or id(node) in found:
                continue
            found[id(node)] = node
            if node.op_type not in ("Shape", "Size"):
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
        if kind == "Size":
            return [np.array(_elements(self.shapes[node.input[0]]), np.int64)]
        inputs = [self._stored_array(name) if name else None for name in node.input]
        if any(array is None and name for array, name in zip(inputs, node.input, strict=True)) or not inputs:
            raise NotRead(f"{title(node)} reads {reason(list(node.input))} before it is computed")
        return self.compute(node, inputs)

    def compute(self, node, inputs, *, real=False):
        """The arrays of a node's outputs from those of its inputs; with `real` no rounding, to codes or half, is done.

        Raises
        ------
        NotRead
            Naming the node, where it is of a kind that is not computed, or damaged.
        """
        kind, attributes = node.op_type, self.attributes(node)
        try:
            if not inputs or inputs[0] is None:
                raise ValueError("its first input is missing")
            if kind == "ConstantOfShape":
                shape = functions.whole_numbers(inputs[0], "a shape")
                self._spend(_elements(shape))
                return [np.full(shape, self._values.filled(node))]
            if kind in ("Identity", "Dropout"):  # of weights that layers share: nothing is copied
                return [inputs[0]]
            self._spend(max((array.size for array in inputs if array is not None), default=0))
            if (shape := self.shapes.get(self.output(node))) is not None and kind not in functions.LAYOUT:
                self._spend(_elements(shape))
            if kind == "Cast":
                dtype = self._values.dtype(attributes.get("to", 1))
                return [inputs[0] if real and dtype.kind == inputs[0].dtype.kind else inputs[0].astype(dtype)]
            if kind == "DequantizeLinear" and inputs[0].dtype.kind in "iu":
                return [functions.dequantized(attributes, *inputs)]
            if kind == "QuantizeLinear" and node.input[0] in self._stored:  # weights; others pass as they are
                return [functions.quantized(attributes, *inputs)]
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
            raise NotRead(f"{title(node)} cannot be computed of its inputs: {reason(error)}") from None
        raise NotRead(f"{title(node)} must be of a kind that is computed")

    def _spend(self, elements):
        self._left -= max(elements, 1)
        if elements > self._largest or self._left < 0:
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

    def made(self, name):
        """The number of the node that makes a value, -1 for what none makes."""
        return self.number[id(self.maker[name])] if name in self.maker else -1

    def nodes_behind(self, name):
        """The nodes that compute with a value, or with what others of them gave, in their order."""
        of = {name}
        for node in self.nodes[self.made(name) + 1 :]:
            if node.op_type not in ("Shape", "Size") and not of.isdisjoint(node.input):
                of.update(filter(None, node.output))
                yield node

    def reader(self, name):
        """The one node that reads a value, but for its shape; None where there are others, or none."""
        found = [node for node in self.readers.get(name, ()) if node.op_type not in ("Shape", "Size")]
        return found[0] if len(found) == 1 and name not in self.outputs else None


def title(node):
    """A node, as errors call it."""
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain} "
    return f"{domain}{node.op_type} node {node.name[:100]!r}"


def _elements(shape):
    return math.prod(max(n, 0) for n in shape)
