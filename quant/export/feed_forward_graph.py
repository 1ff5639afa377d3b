"""Static feed-forwards as graphs of TFLite operators: FULLY_CONNECTED, GELU, MUL, FULLY_CONNECTED."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeattn.ops import Ops
from edgeattn.quantized import StaticFeedForward
from edgeattn.tflite_schema import Graph
from quant.export.tflite_ops import FULLY_CONNECTED_VERSION, INT8_VERSIONS

RELU = 1  # ActivationFunctionType
GELU_VERSION = 2  # the first with int8


class FeedForwardOps(Ops[int]):
    """`edgeattn.ops.Ops` that writes a graph of codes: what it hands on are the numbers of tensors."""

    def __init__(self, layer: StaticFeedForward, graph: Graph | None = None, prefix: str = ""):
        self.graph, self.layer, self.prefix = Graph() if graph is None else graph, layer, prefix

    def linear(self, x: int, linear: Any, name: str) -> int:
        """x weight^T + bias; a ReLU that follows is part of it."""
        graph = self.graph
        weight = graph.constant(f"{self.prefix}{name}/weight", linear.weight, channel_scale=linear.scale)
        operands = [x, weight]
        if linear.bias is not None:
            scale = graph.tensors[x].scale * linear.scale
            operands.append(graph.constant(f"{self.prefix}{name}/bias", linear.bias, channel_scale=scale))
        options = {"keep_num_dims": True, "fused_activation_function": RELU if name == "activation" else 0}
        shape = (*graph.tensors[x].shape[:-1], len(linear.weight))
        return self._operator("FULLY_CONNECTED", operands, name, shape, options, FULLY_CONNECTED_VERSION)

    def activation(self, x: int, kind: str, name: str) -> int:
        """The operator GELU; nothing for a ReLU."""
        if kind == "relu":
            return x
        return self._operator("GELU", [x], name, self.graph.tensors[x].shape, {"approximate": kind == "gelu_tanh"},
                              GELU_VERSION)

    def multiply(self, a: int, b: int, name: str) -> int:
        """The product of gate and hidden features."""
        return self._operator("MUL", [a, b], name, self.graph.tensors[a].shape, None, INT8_VERSIONS["MUL"])

    def _operator(self, operator: str, inputs: list[int], name: str, shape: Any, options: Any, version: int) -> int:
        output = self.graph.activation(self.prefix + name, shape, np.int8, self.layer.tensors[name])
        self.graph.operator(operator, inputs, output, options, version)
        return output


def feed_forward_graph(layer: StaticFeedForward, *, batch: int, sequence_length: int) -> Graph:
    """int8 (B, L, inputs) -> int8 (B, L, outputs), further columns and outputs among them: what ``run_int8`` computes.

    Raises
    ------
    ValueError
        Of a SiLU, which no TFLite operator is, and of a layer with a network of large features.
    """
    check_activation(layer)
    if layer.large is not None:
        raise ValueError("layer must have no network of large features: its result is added in float32")
    ops = FeedForwardOps(layer)
    columns = layer.inputs + len(layer.more_inputs)
    x = ops.graph.activation("input", (batch, sequence_length, columns), np.int8, layer.tensors["input"])
    ops.graph.inputs, ops.graph.outputs = [x], [layer.forward_codes(ops, x)]
    return ops.graph


def check_activation(layer: StaticFeedForward) -> None:
    """Refuse an activation that no TFLite operator is."""
    if layer.activation == "silu":
        raise ValueError("layer must have the activation gelu, gelu_tanh or relu: no TFLite operator is SiLU on int8; "
                         "quantize with scheme='dynamic', whose activations are float32")
