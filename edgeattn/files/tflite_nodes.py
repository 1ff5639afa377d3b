"""A float .tflite graph as the ONNX nodes that say the same, for the reader of those.

int8 weights under float activations (hybrid, or behind DEQUANTIZE) are the floats that they stand for. What an operator
without nodes gives is a value of which nothing is known but its shape; its name says of which operator it is. A graph
whose shapes are others than the file says is refused.
"""

from __future__ import annotations

import math
import types

import numpy as np

from edgeattn.files.checkpoints.onnx_nodes import Graph as Nodes
from edgeattn.files.checkpoints.onnx_values import NotRead
from edgeattn.files.paths import reading
from edgeattn.files.tflite_graph import CheckedGraph
from edgeattn.files.tflite_operators import ALIKE, WRITERS
from edgeattn.files.tflite_stand_ins import Attribute, Input, Node, Stored, Values
from edgeattn.tflite_schema import Operator, Tensor

_OPSET = 20  # the first with Gelu


class TooLarge(NotRead):
    """More than a file of this size may ask for."""


class Writer:
    """Writes the operators of a graph as nodes."""

    def __init__(self, graph: CheckedGraph):
        self.graph, self.tensors = graph, graph.graph.tensors
        self.made: list[Node] = []
        self.stored: dict[str, Stored] = {}
        self.hybrid = False
        self.unknown: dict[int, str] = {}  # tensors of which only the shape is known: why
        self.left = graph.most_elements * 4  # elements of constants: tensors may share what the file has once

    def nodes(self) -> Nodes:
        """All of it, as the reader of ONNX graphs takes it."""
        graph = self.graph.graph
        for number, operator in enumerate(graph.operators):
            if not operator.outputs or self.graph.producers.get(operator.outputs[0]) == number:  # else it is left out
                self.write(operator)
        inputs = [Input(self.name(number), self.tensors[number].shape) for number in [*graph.inputs, *self.unknown]]
        outputs = [types.SimpleNamespace(name=self.name(number)) for number in graph.outputs]
        model = types.SimpleNamespace(
            graph=types.SimpleNamespace(node=self.made, input=inputs, output=outputs,
                                        initializer=list(self.stored.values())),
            opset_import=[types.SimpleNamespace(domain="", version=_OPSET)])
        with reading(self.graph.name, ".tflite file"):
            nodes = Nodes(model, Values(), self.graph.name)
        nodes.inputs = [self.name(number) for number in graph.inputs]
        return nodes

    def reason(self, message: str) -> str:
        """Why the first unknown value that an error names is unknown."""
        return next((why for number, why in self.unknown.items() if self.name(number)[:60] in message), "")

    def check_shapes(self, nodes: Nodes) -> None:
        """Refuse a graph where a tensor has another shape than its operator gives."""
        for operator in self.graph.graph.operators:
            for number in operator.outputs:
                if number not in self.graph.producers:
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
            raise TooLarge("its constants, taken apart, must be no larger than the file")
        self.stored[name] = Stored(name, array)
        return name

    def real(self, tensor: Tensor) -> np.ndarray:
        """What a constant stands for: float32, bool, or whole numbers."""
        data = tensor.data
        self.left -= data.size
        if self.left < 0:
            raise TooLarge("its constants, taken apart, must be no larger than the file")
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

    def add(self, kind: str, inputs: list[str], to: str, /, **attributes) -> str:
        """A node; returns the name of what it gives."""
        name = to.rpartition(":")[0]
        self.made.append(Node(kind, name, list(inputs), [to], [Attribute(*each) for each in attributes.items()]))
        return to

    def write(self, operator: Operator) -> None:
        """The nodes of an operator; what it gives is unknown where there are none."""
        made = len(self.made)
        try:
            self._write(operator)
        except TooLarge:
            raise
        except ValueError as error:
            del self.made[made:]
            self.unknown |= dict.fromkeys(operator.outputs, str(error).removeprefix(f"{self.graph.name}: "))

    def _write(self, operator: Operator) -> None:
        kind = operator.name
        special = WRITERS.get(kind)
        if special is None and kind not in ALIKE:
            raise NotRead(f"{kind}, which is not read, gives {self.tensors[operator.outputs[0]].name[:100]!r}"
                          if operator.outputs else f"{kind} is not read")
        if not operator.inputs or not operator.outputs or (
                kind not in ("SPLIT", "UNPACK") and len(operator.outputs) != 1):
            raise NotRead(f"{kind} has {len(operator.inputs)} inputs and {len(operator.outputs)} outputs")
        for number in operator.outputs:
            self.computed(number)
        activation = operator.options.get("fused_activation_function", 0)
        if activation not in (0, 1):
            raise NotRead(f"{kind} has a fused activation function ({activation}); expected none or RELU")
        to = self.name(operator.outputs[0])
        given = f"{to} before RELU:" if activation else to
        if special is None:
            self.add(ALIKE[kind], [self.value(number) for number in operator.inputs], given)
        else:
            special(self, operator, given)
        if activation:
            self.add("Relu", [given], to)
