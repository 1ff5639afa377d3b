"""The executor that writes float and hybrid layers as TFLite operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeattn.executors.unfused import attend
from edgeattn.layers import Linear
from edgeattn.layers.dynamic_linear import DynamicLinear
from edgeattn.layers.norm import LayerNorm
from edgeattn.quantized import QuantizedLinear, TensorQuantization
from edgeattn.tflite_schema import Graph
from quant.export.head_positions import HeadPositions, added_scores, tables
from quant.export.static_rows import scatter
from quant.export.tflite_ops import (
    HYBRID_VERSION,
    MASKED_SCORE,
    MOVED_INT8_VERSIONS,
    Lengths,
    TfliteOps,
    mask_to_graph_rank,
)
from quant.models import SPLIT


class FloatTfliteOps(HeadPositions[int], TfliteOps):
    """Of a float layer: float32 (B, L, E) in, float32 (B, L, output width) out. Weights in int8 make hybrid products,
    whose rows the runtime quantizes.

    1/sqrt(D) is multiplied into the query weights, or into those of the queries' norm, key and value heads shared by
    several query heads are repeated, and features that a rotary embedding turns as neighbours lie as halves.
    """

    def __init__(self, lengths: Lengths, graph: Graph | None = None):
        super().__init__(lengths, {}, graph)
        self._factor: dict[str, np.float32] = {}
        self._shared: dict[str, tuple[int, int]] = {}
        self._order: dict[str, tuple[int, np.ndarray]] = {}
        self._mask: np.ndarray | None = None
        self._added: np.ndarray | None = None
        self._apart: dict[tuple[int, ...], tuple[int, int]] = {}
        self._numbers: dict[str, int] = {}

    def begin(self, layer, mask, name: str = "", added: np.ndarray | None = None) -> None:
        """What `forward` of a layer, whose names begin with `name`, is about to find.

        A mask of bool says which keys are seen, and numbers, in it or in `added`, are added to the scores.
        """
        self._factor = {} if layer.q_norm is not None else {f"{name}query": np.float32(layer.scale)}
        heads = {"query": layer.num_heads, "key": layer.num_kv_heads}
        order = _as_halves(layer)
        self._order = {} if order is None else {f"{name}{part}": (count, order) for part, count in heads.items()}
        repeats = layer.num_heads // layer.num_kv_heads
        self._shared = dict.fromkeys((f"{name}key", f"{name}value"), (layer.num_kv_heads, repeats))
        mask = None if mask is None else np.asarray(mask)
        if mask is not None and mask.dtype not in (np.bool_, np.float32):
            raise TypeError(f"mask must be bool (True = attend) or float32 (added to the scores); got {mask.dtype}")
        self._mask = mask if mask is not None and mask.dtype == np.bool_ else None
        if mask is not None and mask.dtype == np.float32 and added is None:
            added = mask
        if added is not None:
            mask_to_graph_rank(added, self.lengths.scores, "mask")
            if np.isnan(added).any():
                raise ValueError("mask must hold no NaN")
        self._added = added_scores(layer, added, self.lengths.queries, self.lengths.keys)

    def attention(self, q: int, k: int, v: int, layer, sequences, name: str) -> int:
        """The heads side by side, normed and turned first."""
        q, k, v = map(self.split_heads, (q, k, v))
        q, k = self.placed(q, k, layer, name)
        return self.merge_heads(attend(self, q, k, v, layer, sequences, name))

    def norm_of_heads(self, norm, layer, part: str):
        """With the scale of the scores, where it is that of the queries; of features that lie as halves."""
        weights = [None if array is None else array * np.float32(layer.scale if part == "query" else 1)
                   for array in (norm.weight, norm.bias)]
        order = _as_halves(layer)
        if order is not None:
            weights = [None if array is None else array[order] for array in weights]
        return type(norm)(weights[0], weights[1], norm.eps) if isinstance(norm, LayerNorm) else type(norm)(
            weights[0], norm.eps)

    def pair(self, x: int, rotary, name: str) -> tuple[int, int]:
        """Both halves of what is turned."""
        half = rotary.rotary_embedding_dim // 2
        return self.part(x, 0, half, f"{name}/first"), self.part(x, half, half, f"{name}/second")

    def angles(self, rotary, part: str, name: str) -> tuple[int, int]:
        """Cosines and sines, constants."""
        cos, sin = tables(rotary, self.lengths.queries if part == "query" else self.lengths.keys)
        return self._constant(f"{name}/cos", cos), self._constant(f"{name}/sin", sin)

    def linear(self, x: int, linear, name: str) -> int:
        """x weight^T + bias."""
        if isinstance(linear, DynamicLinear):
            return self._dynamic(x, linear, name)
        quantized = linear.weight
        if isinstance(quantized, QuantizedLinear):  # a Projection of a dynamic layer
            return self.hybrid(x, quantized.weight, quantized.scale, linear.bias, name)
        constants = [None if array is None else self._constant(f"{name}/{part}", self._folded(name, array))
                     for part, array in (("weight", linear.weight), ("bias", linear.bias))]
        return self._fully_connected(x, *constants, name)

    def hybrid(self, x: int, codes: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, name: str) -> int:
        """x (codes * scale)^T + bias, of rows that the runtime quantizes by ranges of their own."""
        codes = self._repeated(name, codes)
        operands = [x, self._constant(f"{name}/weight", codes, channel_scale=self._folded(name, scale))]
        if bias is not None:
            operands.append(self._constant(f"{name}/bias", self._folded(name, bias)))
        output = self.graph.activation(name, (*self.graph.tensors[x].shape[:-1], len(codes)), np.float32)
        options = {"keep_num_dims": True, "asymmetric_quantize_inputs": True}
        self.graph.operator("FULLY_CONNECTED", operands, output, options, HYBRID_VERSION)
        return output

    def _dynamic(self, x: int, linear: DynamicLinear, name: str) -> int:
        """A hybrid product; inputs that stay float32, and outputs' second codes, are added by a narrow float one."""
        if name.endswith("linear2"):
            linear = _all_in_codes(linear)
        outputs, apart = linear.outputs, linear.outlier_columns
        rest, parts, weights = x, [], []
        if len(apart):
            rest, chosen = self._set_apart(x, apart, name)
            parts.append(chosen)
            weights.append(self._folded(name, linear.outlier_weight))
        y = self.hybrid(rest, linear.codes[:outputs], linear.scale[:outputs], linear.bias, name)
        if len(linear.residual_outputs):
            parts.append(self.hybrid(rest, linear.codes[outputs:], linear.scale[outputs:], None, f"{name}/second"))
            weights.append(scatter(linear.residual_outputs, outputs))
        if not parts:
            return y
        weight = np.concatenate(weights, axis=1).astype(np.float32)
        added = self.narrow(self.joined(parts, f"{name}/columns"), weight, None, f"{name}/added")
        return self._elementwise("ADD", y, added, f"{name}/sum")

    def _set_apart(self, x: int, columns: np.ndarray, name: str) -> tuple[int, int]:
        """Rows without some of their columns, and those; once for queries, keys and values, or a gate."""
        key = (x, *columns.tolist())
        if key not in self._apart:
            width = self.graph.tensors[x].shape[-1]
            kept = np.ones(width, np.float32)
            kept[columns] = 0
            rest = self._elementwise("MUL", x, self._constant(f"{name}/kept", kept), f"{name}/rest")
            self._apart[key] = rest, self.narrow(x, scatter(columns, width).T, None, f"{name}/apart")
        return self._apart[key]

    def narrow(self, x: int, weight: np.ndarray, bias: np.ndarray | None, name: str) -> int:
        """A float product of a few columns."""
        constants = [None if array is None else self._constant(f"{name}/{part}", array)
                     for part, array in (("weight", weight), ("bias", bias))]
        return self._fully_connected(x, *constants, name)

    def layer_norm(self, x: int, norm: Any, name: str) -> int:
        """(x - mean) / sqrt(variance + eps) * weight + bias, taken apart."""
        return self._scaled(self._elementwise("SUB", x, self._mean(x, f"{name}/mean"), f"{name}/centred"), norm, name)

    def rms_norm(self, x: int, norm: Any, name: str) -> int:
        """x / sqrt(mean(x^2) + eps) * weight, taken apart."""
        return self._scaled(x, norm, name)

    def _scaled(self, x: int, norm: Any, name: str) -> int:
        variance = self._mean(self._elementwise("MUL", x, x, f"{name}/square"), f"{name}/variance")
        eps = self._constant(f"{name}/eps", np.array(norm.eps, np.float32))
        variance = self._elementwise("ADD", variance, eps, f"{name}/variance_eps")
        shape = self.graph.tensors[variance].shape
        inverse = self._operator("RSQRT", [variance], f"{name}/inverse", shape)
        y = self._elementwise("MUL", x, inverse, f"{name}/normed")
        if (norm.weight != 1).any():
            y = self._elementwise("MUL", y, self._constant(f"{name}/weight", norm.weight), f"{name}/scaled")
        if norm.bias is not None and norm.bias.any():
            y = self._elementwise("ADD", y, self._constant(f"{name}/bias", norm.bias), name)
        return y

    def add(self, a: int, b: int, name: str) -> int:
        """The sum."""
        return self._elementwise("ADD", a, b, name)

    def multiply(self, a: int, b: int, name: str) -> int:
        """The product, element by element."""
        return self._elementwise("MUL", a, b, name)

    def subtract(self, a: int, b: int, name: str) -> int:
        """The difference."""
        return self._elementwise("SUB", a, b, name)

    def _mean(self, x: int, name: str) -> int:
        shape = (*self.graph.tensors[x].shape[:-1], 1)
        last = len(shape) - 1
        axis = self._indices("last_axis" if last == 2 else f"axis_{last}", [last])
        return self._operator("MEAN", [x, axis], name, shape, options={"keep_dims": True})

    def _indices(self, name: str, values: Any) -> int:
        """A constant of int32, once under a name."""
        if name not in self._numbers:
            self._numbers[name] = self._constant(name, np.array(values, np.int32))
        return self._numbers[name]

    def _elementwise(self, operator: str, a: int, b: int, name: str) -> int:
        return self._operator(operator, [a, b], name, self.graph.tensors[a].shape)

    def part(self, x: int, first: int, size: int, name: str) -> int:
        """Columns beside each other."""
        bounds = [self._indices(f"{name}/{part}", [*lead, value]) for part, lead, value in (
            ("begin", [0] * (len(self.graph.tensors[x].shape) - 1), first),
            ("size", self.graph.tensors[x].shape[:-1], size))]
        return self._moved("SLICE", [x, *bounds], name, size)

    def joined(self, parts: list[int], name: str) -> int:
        """Rows or codes side by side."""
        if len(parts) == 1:
            return parts[0]
        width = sum(self.graph.tensors[part].shape[-1] for part in parts)
        return self._moved("CONCATENATION", parts, name, width, {"axis": len(self.graph.tensors[parts[0]].shape) - 1})

    def _moved(self, operator: str, inputs: list[int], name: str, width: int, options=None) -> int:
        """What has the dtype and scale of the first of its inputs."""
        source = self.graph.tensors[inputs[0]]
        quantization = None
        if source.scale is not None:
            quantization = TensorQuantization(source.scale[0], source.zero_point[0])
        output = self.graph.activation(name, (*source.shape[:-1], width), source.dtype, quantization)
        versions = self._versions if quantization is None else MOVED_INT8_VERSIONS
        self.graph.operator(operator, inputs, output, options, versions[operator])
        return output

    def _repeated(self, name: str, array: np.ndarray) -> np.ndarray:
        if name in self._order:
            heads, order = self._order[name]
            array = array.reshape(heads, -1, *array.shape[1:])[:, order].reshape(array.shape)
        heads, repeats = self._shared.get(name, (1, 1))
        if repeats > 1:
            array = np.repeat(array.reshape(heads, -1, *array.shape[1:]), repeats, axis=0).reshape(
                -1, *array.shape[1:])
        return array

    def _folded(self, name: str, array: np.ndarray) -> np.ndarray:
        array = self._repeated(name, array)
        return array * self._factor[name] if name in self._factor else array

    def padded(self, scores: int) -> int:
        """The scores, those of padding MASKED_SCORE: what `padding` adds to them, and takes them up in rounding.

        Unlike SELECT_V2 ADD is an operator of XNNPACK's, which computes the layers without a stop.
        """
        if self.padding is None:
            return scores
        tensor = self.graph.tensors[scores]
        return self._elementwise("ADD", scores, self.padding[len(tensor.shape)], f"{tensor.name}/tokens")

    def masked(self, scores: int, layer, mask, name: str) -> int:
        """The mask that the file shall hold, and the padding that it is given."""
        name, shape = self.graph.tensors[scores].name, self.graph.tensors[scores].shape
        if self._added is not None:
            added = self._mask_constant(f"{name}/mask", np.maximum(self._added, MASKED_SCORE), "mask")
            scores = self._operator("ADD", [scores, added], f"{name}/added", shape)
        scores = self.padded(scores)
        if self._mask is None:
            return scores
        name = self.graph.tensors[scores].name
        keep = self._mask_constant(f"{name}/keep", self._mask, "mask")
        fill = self._constant(f"{name}/fill", np.array(MASKED_SCORE))
        return self._operator("SELECT_V2", [keep, scores, fill], f"{name}/masked", shape)


def _all_in_codes(linear: DynamicLinear) -> DynamicLinear:
    """The layer without inputs that stay float32: hidden features have none so large that a file gains by them."""
    if not len(linear.outlier_columns):
        return linear
    weight = linear.codes * linear.scale[:, None]
    np.add.at(weight, linear.residual_outputs, weight[linear.outputs:])
    weight = weight[:linear.outputs]
    weight[:, linear.outlier_columns] = linear.outlier_weight
    split = SPLIT if len(linear.residual_outputs) else None
    return DynamicLinear.quantized_from(Linear(weight, linear.bias), split=split)


def _as_halves(layer) -> np.ndarray | None:
    """Where each feature of a head comes from, so that neighbours which are turned together lie as halves."""
    if layer.rotary is None or not layer.rotary.interleaved:
        return None
    turned = layer.rotary.rotary_embedding_dim
    return np.concatenate([np.arange(0, turned, 2), np.arange(1, turned, 2), np.arange(turned, layer.head_dim)])


def check_float(layer) -> None:
    """Refuse a float or dynamic layer that has what the graph has no place for."""
    if layer.extra_keys:
        raise ValueError("layer must have no bias_k, bias_v and add_zero_attn: the graph has no place for added keys; "
                         f"got {layer.extra_keys}")
    if layer.gated:
        raise ValueError("layer must have no gate_weight: the graph has no place for a gate")
