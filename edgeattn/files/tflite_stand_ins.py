"""What the reader of ONNX graphs takes for onnx's own classes: nodes, constants and inputs of a .tflite graph."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import numpy as np


@dataclasses.dataclass
class Attribute:
    """An attribute of a node."""

    name: str
    value: Any

    @property
    def ints(self):
        """Its whole numbers."""
        return self.value


@dataclasses.dataclass(eq=False)
class Node:
    """A node, as `onnx_nodes.Graph` looks at them."""

    op_type: str = ""
    name: str = ""
    input: list = dataclasses.field(default_factory=list)
    output: list = dataclasses.field(default_factory=list)
    attribute: list = dataclasses.field(default_factory=list)
    domain: str = ""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A constant."""

    name: str
    array: np.ndarray

    @property
    def dims(self):
        """Its shape."""
        return self.array.shape


class Values:
    """Reads attributes and constants, as `onnx_values.Values` does."""

    @staticmethod
    def attributes(node):
        """The attributes of a node, by name."""
        return {entry.name: entry.value for entry in node.attribute}

    @staticmethod
    def array(stored, _):
        """What a constant holds."""
        return stored.array

    @staticmethod
    def dtype(dtype):
        """What a Cast makes."""
        return dtype

    @staticmethod
    def is_half(_):
        """Whether a constant is in half precision."""
        return False


class Input:
    """An input of the graph, and its type."""

    def __init__(self, name, shape):
        self.name = name
        dims = [types.SimpleNamespace(dim_value=n, dim_param="") for n in shape]
        self.type = types.SimpleNamespace(tensor_type=self)
        self.shape = types.SimpleNamespace(dim=dims)

    @staticmethod
    def HasField(_):
        """Whether a field is set: all are."""
        return True
