"""A float .tflite graph as the ONNX nodes that say the same, for the reader of those.

int8 weights under float activations (hybrid, or behind DEQUANTIZE) are the floats that they stand for. What has no row
here is refused by its name, and so is a graph whose shapes are others than the file says.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import numpy as np

from edgeattn.files.checkpoints.onnx_nodes import Graph as Nodes
from edgeattn.files.checkpoints.onnx_values import NotRead
from edgeattn.files.paths import reading
from edgeattn.files.tflite_graph import CheckedGraph
from edgeattn.tflite_schema import Operator, Tensor

_OPSET = 20  # the first with Gelu
# Operators of the same meaning, whose inputs broadcast alike and whose options say nothing but an activation.
_ALIKE = {
    "ABS": "Abs", "ADD": "Add", "COS": "Cos", "EXP": "Exp", "LESS": "Less", "LESS_EQUAL": "LessOrEqual",
    "GREATER": "Greater", "GREATER_EQUAL": "GreaterOrEqual", "EQUAL": "Equal", "LOGICAL_AND": "And",
    "LOGICAL_NOT": "Not", "LOGICAL_OR": "Or", "LOGISTIC": "Sigmoid", "MAXIMUM": "Max", "MINIMUM": "Min", "MUL": "Mul",
    "NEG": "Neg", "POW": "Pow", "RELU": "Relu", "SELECT_V2": "Where", "SIN": "Sin", "SQRT": "Sqrt", "SUB": "Sub",
    "TANH": "Tanh",
}


@dataclasses.dataclass
class _Attribute:
    name: str
    value: Any

    @property
    def ints(self):
        return self.value


@dataclasses.dataclass(eq=False)
class _Node:
    """A node, as `onnx_nodes.Graph` looks at them."""

    op_type: str = ""
    name: str = ""
    input: list = dataclasses.field(default_factory=list)
    output: list = dataclasses.field(default_factory=list)
    attribute: list = dataclasses.field(default_factory=list)
    domain: str = ""


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A constant."""

    name: str
    array: np.ndarray

    @property
    def dims(self):
        return self.array.shape


class _Values:
    """Reads attributes and constants, as `onnx_values.Values` does."""

    @staticmethod
    def attributes(node):
        return {entry.name: entry.value for entry in node.attribute}

    @staticmethod
    def array(stored, _):
        return stored.array

    @staticmethod
    def is_half(_):
        return False


class _Input:
    """An input of the graph, and its type."""

    def __init__(self, name, shape):
        self.name = name
        dims = [types.SimpleNamespace(dim_value=n, dim_param="") for n in shape]
        self.type = types.SimpleNamespace(tensor_type=self)
        self.shape = types.SimpleNamespace(dim=dims)

    @staticmethod
    def HasField(_):
        return True


class Writer:
    """Writes the operators of a graph as nodes."""

    def __init__(self, graph: CheckedGraph):
        self.graph, self.tensors = graph, graph.graph.tensors
        self.made: list[_Node] = []
        self.stored: dict[str, _Stored] = {}
        self.hybrid = False
        self.left = graph.most_elements * 4  # elements of constants: tensors may share what the file has once

    def nodes(self) -> Nodes:
        """All of it, as the reader of ONNX graphs takes it."""
        graph = self.graph.graph
        for operator in graph.operators:
            if not operator.outputs or not self.graph.is_constant(operator.outputs[0]):  # else it was folded already
                self.write(operator)
        inputs = [_Input(self.name(number), self.computed(number).shape) for number in graph.inputs]
        outputs = [types.SimpleNamespace(name=self.name(number)) for number in graph.outputs]
        model = types.SimpleNamespace(
            graph=types.SimpleNamespace(node=self.made, input=inputs, output=outputs,
                                        initializer=list(self.stored.values())),
            opset_import=[types.SimpleNamespace(domain="", version=_OPSET)])
        with reading(self.graph.name, ".tflite file"):
            return Nodes(model, _Values(), self.graph.name)

    def check_shapes(self, nodes: Nodes) -> None:
        """Refuse a graph where a tensor has another shape than its operator gives."""
        for operator in self.graph.graph.operators:
            for number in operator.outputs:
                if self.graph.is_constant(number):
                    continue
                found, said = nodes.shapes.get(self.name(number)), self.tensors[number].shape
                if found is not None and tuple(found) != said:
                    raise NotRead(f"{operator.name} gives {self.tensors[number].name!r} shape {said}; expected "
                                  f"{tuple(found)}")

    # -- tensors

    def name(self, number: int) -> str:
        """The name of a tensor's value: tensors may share theirs."""
        return f"{self.tensors[number].name[:200]}:{number}"

    def computed(self, number: int) -> Tensor:
        """A tensor that is computed at run time, which must be of a plain type."""
        tensor = self.tensors[number]
        if tensor.scale is not None or tensor.dtype not in (np.float32, np.bool_, np.int32, np.int64):
            raise NotRead(f"expected {tensor.name!r} in float32; found {tensor.dtype}")
        if not 1 <= math.prod(tensor.shape) <= self.graph.most_elements:
            raise NotRead(f"tensor {tensor.name!r} of shape {tensor.shape} has {math.prod(tensor.shape)} elements; "
                          f"expected 1 to {self.graph.most_elements} in a file of this size")
        return tensor

    def value(self, number: int) -> str:
        """The name of an input of an operator; constants are stored as the numbers that they stand for."""
        if number < 0:
            raise NotRead("an operator lacks an input")
        name = self.name(number)
        if self.graph.is_constant(number) and name not in self.stored:
            self.store(name, self.real(self.tensors[number]))
        return name

    def store(self, name: str, array: np.ndarray) -> str:
        """A constant; returns its name."""
        self.left -= array.size + 1
        if self.left < 0:
            raise NotRead("its constants, taken apart, must be no larger than the file")
        self.stored[name] = _Stored(name, array)
        return name

    def real(self, tensor: Tensor) -> np.ndarray:
        """What a constant stands for: float32, bool, or whole numbers."""
        data = tensor.data
        self.left -= data.size
        if self.left < 0:
            raise NotRead("its constants, taken apart, must be no larger than the file")
        if tensor.scale is not None:
            if data.dtype.kind not in "iu":
                raise NotRead(f"expected the codes of {tensor.name!r} to be whole numbers; found {data.dtype}")
            shape = [1] * data.ndim
            if tensor.scale.size > 1:
                if not 0 <= tensor.channel_axis < data.ndim:
                    raise NotRead(f"{tensor.name!r} has scales along axis {tensor.channel_axis} of {data.ndim}")
                shape[tensor.channel_axis] = tensor.scale.size
            if not ((tensor.scale > 0) & np.isfinite(tensor.scale)).all():
                raise NotRead(f"expected positive scales of {tensor.name!r}")
            if tensor.scale.size > 1 and data.shape[tensor.channel_axis] != tensor.scale.size:
                raise NotRead(f"{tensor.name!r} of shape {data.shape} has {tensor.scale.size} scales")
            codes = data.astype(np.float32) - tensor.zero_point.astype(np.float32).reshape(shape)
            return codes * tensor.scale.reshape(shape)
        if data.dtype == np.bool_:
            return data.view(np.uint8) != 0
        return data.astype(np.float32 if data.dtype.kind == "f" else np.int64)

    def whole(self, number: int, role: str) -> list[int]:
        """The whole numbers of a constant."""
        return self.graph.constant(number, np.int32, role).ravel().tolist()

    # -- operators

    def add(self, kind: str, inputs: list[str], to: str, **attributes) -> str:
        """A node; returns the name of what it gives."""
        name = to.rpartition(":")[0]
        self.made.append(_Node(kind, name, list(inputs), [to], [_Attribute(*each) for each in attributes.items()]))
        return to

    def write(self, operator: Operator) -> None:
        """The nodes of an operator."""
        kind = operator.name
        special = getattr(self, f"_{kind.lower()}", None) if kind in _SPECIAL else None
        if special is None and kind not in _ALIKE:
            raise NotRead(f"expected float32 operators of attention; found {kind}, which is not read")
        if not operator.inputs or not operator.outputs or (kind != "SPLIT" and len(operator.outputs) != 1):
            raise NotRead(f"{kind} has {len(operator.inputs)} inputs and {len(operator.outputs)} outputs")
        for number in operator.outputs:
            self.computed(number)
        activation = operator.options.get("fused_activation_function", 0)
        if activation not in (0, 1):
            raise NotRead(f"{kind} has a fused activation function ({activation}); expected none or RELU")
        to = self.name(operator.outputs[0])
        given = f"{to} before RELU:" if activation else to
        if special is None:
            self.add(_ALIKE[kind], [self.value(number) for number in operator.inputs], given)
        else:
            special(operator, given)
        if activation:
            self.add("Relu", [given], to)

    def _fully_connected(self, operator, to):
        inputs, options = operator.inputs, operator.options
        if len(inputs) not in (2, 3) or options["weights_format"] != 0 or min(inputs[:2]) < 0:
            raise NotRead(f"FULLY_CONNECTED has {len(inputs)} inputs and format {options['weights_format']}")
        weight = self.tensors[inputs[1]]
        self.hybrid |= weight.scale is not None
        if len(weight.shape) != 2:
            raise NotRead(f"FULLY_CONNECTED has weights of shape {weight.shape}; expected 2 axes")
        if weight.scale is not None and weight.zero_point.any():
            raise NotRead(f"FULLY_CONNECTED has weights {weight.name!r} with a zero point; expected none")
        x = self.value(inputs[0])
        if not options["keep_num_dims"] and len(self.tensors[inputs[0]].shape) > 2:
            rows = self.store(f"{to} rows", np.array([-1, weight.shape[1]], np.int64))
            x = self.add("Reshape", [x, rows], f"{to} flat:")
        if self.graph.is_constant(inputs[1]):
            turned = self.store(f"{to} weight", np.ascontiguousarray(self.real(weight).T))
        else:
            turned = self.add("Transpose", [self.value(inputs[1])], f"{to} turned:", perm=[1, 0])
        biased = len(inputs) == 3 and inputs[2] >= 0
        product = self.add("MatMul", [x, turned], f"{to} product:" if biased else to)
        if biased:
            self.add("Add", [product, self.value(inputs[2])], to)

    def _batch_matmul(self, operator, to):
        x, y = self.graph.operands(operator, (2,))
        turned = [bool(operator.options[side]) for side in ("adj_x", "adj_y")]
        if self.graph.producer(y, ("SOFTMAX",)) is None:
            sides = [self.turned(x, turned[0], f"{to} x:"), self.turned(y, turned[1], f"{to} y:")]
            return self.add("MatMul", sides, to)
        # the reader of ONNX graphs knows probabilities on the left: x y = (y' x')'
        sides = [self.turned(y, not turned[1], f"{to} y:"), self.turned(x, not turned[0], f"{to} x:")]
        product = self.add("MatMul", sides, f"{to} turned:")
        return self.add("Transpose", [product], to, perm=_last_two(len(self.tensors[operator.outputs[0]].shape)))

    def turned(self, number, wanted, to):
        """A tensor, with its last two axes exchanged where that is wanted."""
        axes = len(self.tensors[number].shape)
        if axes < 2:
            raise NotRead(f"BATCH_MATMUL takes {self.tensors[number].name!r} of {axes} axes; expected 2 or more")
        return self.add("Transpose", [self.value(number)], to, perm=_last_two(axes)) if wanted else self.value(number)

    def _softmax(self, operator, to):
        (scores,) = self.graph.operands(operator, (1,))
        name, beta = self.value(scores), operator.options["beta"]
        if not (math.isfinite(beta) and beta > 0):
            raise NotRead(f"expected SOFTMAX with a positive beta; found {beta}")
        if beta != 1:
            name = self.add("Mul", [name, self.store(f"{to} beta", np.float32(beta).reshape(()))], f"{to} times beta:")
        self.add("Softmax", [name], to, axis=-1)

    def _reshape(self, operator, to):
        inputs, output = self.graph.operands(operator, (1, 2)), self.tensors[operator.outputs[0]].shape
        wanted = (self.whole(inputs[1], "the shape of RESHAPE") if len(inputs) == 2
                  else np.asarray(operator.options.get("new_shape", ())).tolist())
        if len(wanted) != len(output) or wanted.count(-1) > 1 or any(
                n not in (-1, m) for n, m in zip(wanted, output, strict=True)):
            raise NotRead(f"RESHAPE to {wanted[:8]} gives a tensor of shape {output}; expected them to agree")
        shape = self.store(f"{to} shape", np.array(output, np.int64))
        self.add("Reshape", [self.value(inputs[0]), shape], to)

    def _broadcast_to(self, operator, to):
        x, shape = self.graph.operands(operator, (2,))
        shape = np.array(self.whole(shape, "the shape of BROADCAST_TO"), np.int64)
        self.add("Expand", [self.value(x), self.store(f"{to} shape", shape)], to)

    def _transpose(self, operator, to):
        x, perm = self.graph.operands(operator, (2,))
        self.add("Transpose", [self.value(x)], to, perm=self.whole(perm, "the permutation of TRANSPOSE"))

    def _slice(self, operator, to):
        x, begin, size = self.graph.operands(operator, (3,))
        begin, size = self.whole(begin, "the begin of SLICE"), self.whole(size, "the size of SLICE")
        shape = self.tensors[x].shape
        if not len(begin) == len(size) == len(shape) or any(
                at < 0 or n < -1 or at + max(n, 0) > most for at, n, most in zip(begin, size, shape, strict=True)):
            raise NotRead(f"SLICE begins at {begin[:8]} with {size[:8]} elements; its input has shape {shape}")
        end = [most if n < 0 else at + n for at, n, most in zip(begin, size, shape, strict=True)]
        self.add("Slice", [self.value(x), *(self.store(f"{to} {what}", np.array(numbers, np.int64)) for what, numbers
                                            in (("begin", begin), ("end", end)))], to)

    def _split(self, operator, to):
        axis, x = operator.inputs if len(operator.inputs) == 2 else (-1, -1)
        axes, parts = self.whole(axis, "the axis of SPLIT") if axis >= 0 else [], len(operator.outputs)
        shape = self.tensors[x].shape
        if len(axes) != 1 or not -len(shape) <= axes[0] < len(shape) or shape[axes[0]] % parts:
            raise NotRead(f"SPLIT of shape {shape} along {axes[:8]} in {parts} parts; expected equal parts of one axis")
        self.add("Split", [self.value(x)], to, axis=axes[0])
        self.made[-1].output = [self.name(number) for number in operator.outputs]

    def _concatenation(self, operator, to):
        self.add("Concat", [self.value(number) for number in operator.inputs], to, axis=operator.options["axis"])

    def _mean(self, operator, to):
        x, axes = self.graph.operands(operator, (2,))
        axes = np.array(self.whole(axes, "the axes of MEAN"), np.int64)
        if not axes.size:
            raise NotRead("MEAN has no axes; expected one or more")
        self.add("ReduceMean", [self.value(x), self.store(f"{to} axes", axes)], to,
                 keepdims=int(operator.options["keep_dims"]))

    def _rsqrt(self, operator, to):
        (x,) = self.graph.operands(operator, (1,))
        self.add("Reciprocal", [self.add("Sqrt", [self.value(x)], f"{to} root:")], to)

    def _square(self, operator, to):
        (x,) = self.graph.operands(operator, (1,))
        self.add("Mul", [self.value(x)] * 2, to)

    def _squared_difference(self, operator, to):
        sides = [self.value(number) for number in self.graph.operands(operator, (2,))]
        self.add("Mul", [self.add("Sub", sides, f"{to} difference:")] * 2, to)

    def _gelu(self, operator, to):
        (x,) = self.graph.operands(operator, (1,))
        self.add("Gelu", [self.value(x)], to, approximate="tanh" if operator.options["approximate"] else "none")

    def _dequantize(self, operator, to):
        (x,) = self.graph.operands(operator, (1,))
        if not self.graph.is_constant(x):
            raise NotRead("expected DEQUANTIZE of weights alone; found it of a computed tensor")
        self.store(to, self.real(self.tensors[x]))


def _last_two(axes: int) -> list[int]:
    return [*range(axes - 2), axes - 1, axes - 2]


_SPECIAL = {name[1:].upper() for name in vars(Writer) if name.startswith("_") and not name.startswith("__")}
