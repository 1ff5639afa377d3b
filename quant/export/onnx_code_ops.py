"""What a static layer computes on codes, as nodes of an ONNX graph.

It stands between pairs of QuantizeLinear and DequantizeLinear, which runtimes make integer products of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.arithmetic import CODE_MIN
from edgeattn.executors.unfused import attend
from edgeattn.ops import Ops, Sequences
from edgeattn.quantized import AddMask, MulConstant, Requantize, SelectMask, StaticFeedForward

if TYPE_CHECKING:
    from edgeattn.quantized import QuantizedLinear, TensorQuantization

# Codes are written as uint8: onnxruntime's products of uint8 by int8 saturate on processors without VNNI, and it makes
# uint8 of int8 activations on its own; those of uint8 by uint8 are exact everywhere.
UNSIGNED = 128


class CodesOps(Ops[str]):
    """Of a static layer: what an operation gives is quantized by the tensor of its name.

    Parameters
    ----------
    rows : OnnxOps
        Which writes the nodes, and the rows around the layer.
    layer : StaticMultiHeadAttention or StaticFeedForward
    prefix : str
        Of the names of values.
    """

    def __init__(self, rows: Any, layer: Any, prefix: str):
        self.rows, self.layer, self.prefix = rows, layer, prefix

    def linear(self, x: str, linear: QuantizedLinear, name: str) -> str:
        """x weight^T + bias."""
        rows, full, source = self.rows, self.prefix + name, self._source(linear)
        scale = rows.constant(f"{full}/weight/scale", linear.scale)
        codes = rows.constant(f"{full}/weight", (linear.weight.T.astype(np.int16) + UNSIGNED).astype(np.uint8))
        zero = rows.constant(f"{full}/weight/zero_point", np.full(len(linear.weight), UNSIGNED, np.uint8))
        weight = rows.node("DequantizeLinear", [codes, scale, zero], f"{full}/weight/reals", axis=1)
        bias = None
        if linear.bias is not None:
            steps = rows.constant(f"{full}/bias/scale", (source.scale * linear.scale).astype(np.float32))
            bias = rows.node("DequantizeLinear", [rows.constant(f"{full}/bias", linear.bias), steps],
                             f"{full}/bias/reals", axis=0)
        y = rows.product(x, weight, bias, f"{full}/sum")
        if isinstance(self.layer, StaticFeedForward) and self.layer.activation == "relu" and name == "activation":
            y = rows.node("Relu", [y], f"{full}/relu")
        return self._coded(y, name)

    def _source(self, linear: QuantizedLinear) -> TensorQuantization:
        (name,) = (name for name, each in self.layer.linears.items() if each is linear)
        found: TensorQuantization = self.layer.input_of(name)
        return found

    def activation(self, x: str, kind: str, name: str) -> str:
        """Of codes; a ReLU is part of the product before it."""
        return x if kind == "relu" else self._coded(self.rows.activation(x, kind, f"{self.prefix}{name}/value"), name)

    def multiply(self, a: str, b: str, name: str) -> str:
        """The product, element by element."""
        return self._coded(self.rows.multiply(a, b, f"{self.prefix}{name}/value"), name)

    def attention(self, q: str, k: str, v: str, layer: Any, sequences: Sequences, name: str) -> str:
        """The heads side by side."""
        q, k, v = (self.rows.split_heads(x, layer.num_heads, f"{self.prefix}{part}")
                   for x, part in ((q, "query"), (k, "key"), (v, "value")))
        q, k = self._scaled(q, layer.query_ops, "query"), self._scaled(k, layer.key_ops, "key")
        heads = attend(self, q, k, v, layer, sequences, name)
        return self.rows.merge_heads(heads, f"{self.prefix}context")

    def _scaled(self, x: str, ops: tuple[MulConstant, ...], name: str) -> str:
        for number, op in enumerate(ops):
            full = f"{self.prefix}{name}/{number}"
            scale = self.rows.constant(f"{full}/constant/scale", np.array(op.constant.scale, np.float32))
            code, zero = (self.rows.constant(f"{full}/constant{part}", np.array(number + UNSIGNED, np.uint8))
                          for part, number in (("", op.code), ("/zero_point", op.constant.zero_point)))
            factor = self.rows.node("DequantizeLinear", [code, scale, zero], f"{full}/constant/reals")
            x = self.rows.quantized(self.rows.node("Mul", [x, factor], f"{full}/scaled"), op.output, f"{full}/codes")
        return x

    def scores(self, q: str, k: str, layer: Any, name: str) -> str:
        """q k^T: the scale lies in q."""
        full = self.prefix + name
        turned = self.rows.node("Transpose", [k], f"{full}/keys", perm=[0, 1, 3, 2])
        return self._coded(self.rows.node("MatMul", [q, turned], f"{full}/product"), name)

    def masked(self, scores: str, layer: Any, mask: Any, name: str) -> str:
        """The layer's ``score_ops``."""
        rows, quantization = self.rows, layer.tensors["scores"]
        for number, op in enumerate(layer.score_ops):
            full = f"{self.prefix}scores/{number}"
            if isinstance(op, MulConstant):
                factor = rows.constant(f"{full}/constant", op.constant.dequantize(op.code))
                scores, quantization = rows.node("Mul", [scores, factor], f"{full}/scaled"), op.output
            elif isinstance(op, AddMask):
                added = rows.constant(f"{full}/mask", op.mask.dequantize(op.codes))
                scores, quantization = rows.node("Add", [scores, added], f"{full}/added"), op.output
            elif isinstance(op, Requantize):
                quantization = op.output
            elif isinstance(op, SelectMask):
                fill = rows.constant(f"{full}/fill", quantization.dequantize(op.fill))
                scores = rows.node("Where", [rows.constant(f"{full}/keep", op.keep), scores, fill], f"{full}/masked")
                continue
            scores = rows.quantized(scores, quantization, f"{full}/codes")
        return rows.padded(scores, quantization.dequantize(CODE_MIN), f"{self.prefix}scores")

    def softmax(self, scores: str, name: str) -> str:
        """Over the keys."""
        return self._coded(self.rows.softmax(scores, f"{self.prefix}{name}/value"), name)

    def context(self, probabilities: str, v: str, name: str) -> str:
        """Probabilities v."""
        return self._coded(self.rows.context(probabilities, v, f"{self.prefix}{name}/value"), name)

    def _coded(self, x: str, name: str) -> str:
        return self.rows.quantized(x, self.layer.tensors[name], self.prefix + name)
