"""Layers as onnxruntime's own optimizer leaves them: in its fused operators, float32 or int8 quantized on the fly.

An encoder layer is Attention, a product, the sum with its norm, a product, GELU with its bias, a product, the sum with
its norm; in int8, QAttention and DynamicQuantizeMatMul take the products' places, as after quantize_dynamic.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

import edgeattn

OWN = "com.microsoft"


class Graph:
    """Nodes one after another; each method returns the name of what it computes."""

    def __init__(self, dynamic: bool):
        self.dynamic, self.nodes, self.constants = dynamic, [], []

    def add(self, operator: str, inputs: list[str], outputs: int = 1, **attributes: object) -> list[str]:
        """One more node; the names of its outputs."""
        names = [f"t{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def constant(self, values: np.ndarray) -> str:
        """One more constant."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def codes(self, weight: np.ndarray) -> tuple[str, str, str]:
        """A weight's codes, its scale, its zero point: one scale for all, which takes the fewest instructions."""
        scale = np.float32(np.abs(weight).max() / 127)
        codes = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
        return self.constant(codes), self.constant(scale), self.constant(np.int8(0))

    def linear(self, x: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        """``weight`` is (outputs, inputs)."""
        if self.dynamic:
            bias_name = [] if bias is None else [self.constant(bias)]
            return self.add("DynamicQuantizeMatMul", [x, *self.codes(weight.T), *bias_name], domain=OWN)[0]
        product, = self.add("MatMul", [x, self.constant(weight.T)])
        return product if bias is None else self.add("Add", [product, self.constant(bias)])[0]

    def attention(self, x: str, layer: edgeattn.MultiHeadAttention, with_bias: bool = True) -> str:
        """Without the output's bias where a sum with a norm follows, which adds it."""
        weight = np.concatenate([layer.q_weight, layer.k_weight, layer.v_weight]).T
        bias = self.constant(np.concatenate([layer.q_bias, layer.k_bias, layer.v_bias]))
        own = {"domain": OWN, "num_heads": layer.num_heads}
        if self.dynamic:
            codes, scale, zero = self.add("DynamicQuantizeLinear", [x], 3)
            weight_codes, weight_scale, weight_zero = self.codes(weight)
            inputs = [codes, weight_codes, bias, scale, weight_scale, "", zero, weight_zero]
            mixed, = self.add("QAttention", inputs, **own)
        else:
            mixed, = self.add("Attention", [x, self.constant(weight), bias], **own)
        return self.linear(mixed, layer.out_weight, layer.out_bias if with_bias else None)

    def norm_of_sum(self, x: str, other: str, norm: edgeattn.LayerNorm, bias: np.ndarray) -> str:
        """The norm of x + other + bias."""
        zeros = np.zeros_like(norm.weight) if norm.bias is None else norm.bias
        inputs = [other, x, *(self.constant(each) for each in (norm.weight, zeros, bias))]
        return self.add("SkipLayerNormalization", inputs, domain=OWN, epsilon=float(norm.eps))[0]

    def encoder_layer(self, x: str, layer: edgeattn.TransformerEncoderLayer) -> str:
        """Norms behind the sums, GELU, as MiniLM has them."""
        one, two = layer.feed_forward.linear1, layer.feed_forward.linear2
        x = self.norm_of_sum(x, self.attention(x, layer.attention, with_bias=False), layer.norm1,
                             layer.attention.out_bias)
        hidden, = self.add("BiasGelu", [self.linear(x, one.weight, None), self.constant(one.bias)], domain=OWN)
        return self.norm_of_sum(x, self.linear(hidden, two.weight, None), layer.norm2, two.bias)


def write(module: edgeattn.MultiHeadAttention | edgeattn.TransformerEncoder, shape: tuple[int, ...], dynamic: bool,
          path: Path) -> None:
    """Write a file for inputs of one shape."""
    graph, last = Graph(dynamic), "x"
    if isinstance(module, edgeattn.TransformerEncoder):
        for layer in module.layers:
            last = graph.encoder_layer(last, layer)
    else:
        last = graph.attention(last, module)
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))] for name in ("x", last)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(OWN, 1)]
    made = helper.make_graph(graph.nodes, "layer", *ends, graph.constants)
    path.write_bytes(helper.make_model(made, opset_imports=opsets, ir_version=9).SerializeToString())
