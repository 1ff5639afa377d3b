"""Attention layers and whole encoders written as ONNX models, with the ``onnx`` package.

Shapes are free where no length is given. From opset 23 on attention is the operator Attention; before, and between
codes (`onnx_code_ops`), it is taken apart. Rows between layers, norms and residuals are float32.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.executors.unfused import attend
from edgeattn.layers import MultiHeadAttention, TransformerEncoder
from edgeattn.layers import attention as layers_attention
from edgeattn.ops import Ops, Sequences
from edgeattn.quantized import INPUTS, DynamicMultiHeadAttention, StaticMultiHeadAttention
from quant.export.head_positions import added_scores
from quant.export.onnx_code_ops import UNSIGNED, CodesOps
from quant.export.onnx_positions import OnnxPositions
from quant.export.static_rows import PADDING, StaticBetweenRows, prepared
from quant.export.tflite_float_ops import check_float
from quant.export.tflite_ops import MASKED_SCORE, check_lengths

if TYPE_CHECKING:
    from edgeattn.quantized import TensorQuantization

OPSETS = range(17, 24)  # from the first with LayerNormalization to the first with Attention
_GELU, _ATTENTION = 20, 23  # the first opsets that have the operators
_IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
PRODUCER = "edgeattn"
INSTALL = "pip install 'edgeattn[checkpoints]'"
# As many elements as a protobuf message of 2 GiB can hold in float32, less room for all else.
_MOST_BYTES = 2**31 - 2**20


def write_onnx(layer: Any, *, batch: int | None = None, sequence_length: int | None = None,
               key_length: int | None = None, mask: Any = None, opset: int = 17, padding: bool = False) -> bytes:
    """The bytes of an ONNX model that computes ``layer``.

    Parameters
    ----------
    layer : MultiHeadAttention, StaticMultiHeadAttention or TransformerEncoder
        float32 in and out; of a static layer, too, whose codes begin behind a QuantizeLinear.
    batch, sequence_length, key_length : int, optional
        B, L and S; free unless given. A float layer has an input for the keys where ``key_length`` is given.
    mask : bool array, broadcastable to (B, H, L, S), optional
        True = attend; needs ``sequence_length``. A query with no permitted key gets the mean of all values. For a float
        layer also float32 numbers that are added to the scores.
    opset : int
        17 to 23; from 23 on attention in float32 is one operator, but of a file with padding.
    padding : bool
        Of an encoder: whether the file has an input more, ``attention_mask``, int64 (B, L): 1 = token, 0 = padding.

    Raises
    ------
    ImportError
        When ``onnx`` is not installed.
    TypeError, ValueError
        Naming the layer or argument that has no such form.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset must be one of {OPSETS[0]} to {OPSETS[-1]}; got {opset}")
    if sequence_length is None and mask is not None:
        raise ValueError("mask needs sequence_length: without one the file takes any")
    ops = OnnxOps(opset)
    if isinstance(layer, TransformerEncoder):
        if key_length is not None:
            raise ValueError(f"key_length must be left out for an encoder, which attends to itself; got {key_length}")
        return ops.encoder(layer, batch, sequence_length, mask, padding=padding)
    if isinstance(layer, DynamicMultiHeadAttention) or not isinstance(
            layer, (MultiHeadAttention, StaticMultiHeadAttention)):
        raise TypeError(f"layer must be a MultiHeadAttention, a static one or a TransformerEncoder; got "
                        f"{type(layer).__name__}, which has no ONNX form: quantize with scheme='static'")
    return ops.layer(layer, batch, sequence_length, key_length, mask)


class OnnxOps(OnnxPositions, StaticBetweenRows[str], Ops[str]):
    """`edgeattn.ops.Ops` that writes nodes upon float32 rows (B, L, features): what it hands on are names of values.

    Codes are handed on as the reals that a DequantizeLinear makes of them.
    """

    def __init__(self, opset: int):
        try:
            import onnx.helper
            import onnx.numpy_helper
        except ImportError as error:
            raise ImportError(f"writing .onnx needs the package onnx: {INSTALL}", name="onnx") from error
        super().__init__()
        self.onnx, self.opset, self.shapes_known = onnx, opset, True
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._known: dict[bytes, str] = {}
        self._keep: Any = None

    # -- models --------------------------------------------------------------------------------------------------------

    def encoder(self, encoder: TransformerEncoder, batch: int | None, length: int | None, mask: Any, *,
                padding: bool = False) -> bytes:
        """A whole encoder."""
        self.shapes_known, self.lengths = length is not None, None if length is None else (length, length)
        for i, layer in enumerate(encoder.layers):
            if length is None and layer.window_size != (-1, -1):
                raise ValueError(f"layers.{i} has a window, for which the file must have one length: give "
                                 "sequence_length")
        inputs: dict[str, tuple[Any, ...]] = {"input": (batch, length, encoder.embed_dim)}
        if padding:
            inputs[PADDING] = (batch, length)
            flags = self.node("Cast", [PADDING], f"{PADDING}/flags", to=self.onnx.TensorProto.BOOL)
            axes = self.constant(f"{PADDING}/axes", np.array([1, 2], np.int64))
            self.padding = self.node("Unsqueeze", [flags, axes], f"{PADDING}/tokens")
        with prepared(encoder, (batch or 1, length or 1), mask) as sequences:
            result = encoder.forward(self, "input", sequences)
        return self._model("encoder", inputs, result, (batch, length, encoder.embed_dim))

    def layer(self, layer: Any, batch: int | None, length: int | None, key_length: int | None, mask: Any) -> bytes:
        """One attention layer."""
        self.shapes_known = length is not None
        widths = (layer.embed_dim, layer.kdim, layer.vdim)
        static = isinstance(layer, StaticMultiHeadAttention)
        if static:
            sources = layer.sources
        else:
            sources = (0, 0, 0) if widths[0] == widths[1] and key_length is None else (0, 1, 1)
            sources = (0, 1, 2) if widths[1] != widths[2] else sources
        if length is not None:
            lengths = check_lengths(layer, sources, batch or 1, length, key_length)
            keys: int | None = lengths.keys
            if mask is not None:
                mask = _four_axes(mask, lengths.scores)
        else:
            keys = key_length
        inputs, feeds = {}, []
        for role, source in enumerate(sources):
            name = "input" if max(sources) == 0 else f"{INPUTS[source]}_input"
            inputs.setdefault(name, (batch, length if source == 0 else keys, widths[role]))
            feeds.append(name)
        if static:
            layer = layer if mask is None else layer.with_mask(mask)
            codes = {name: self.quantized(name, layer.tensors[f"{INPUTS[source]}_input"], f"{name}/codes")
                     for name, source in dict(zip(feeds, sources, strict=True)).items()}
            result = layers_attention.forward(self.codes_ops(layer, ""), layer, *(codes[name] for name in feeds),
                                              Sequences([]))
        else:
            check_float(layer)
            self._keep, self.numbers = (None, mask) if mask is not None and mask.dtype != np.bool_ else (mask, None)
            self.lengths = None if length is None else (lengths.queries, lengths.keys)
            self.feeds = {"query": feeds[0], "key": feeds[1]}
            result = layers_attention.forward(self, layer, *feeds, Sequences([]))
        return self._model("attention", inputs, result, (batch, length, layer.output_dim))

    def _model(self, name: str, inputs: dict[str, tuple[Any, ...]], result: str, shape: tuple[Any, ...]) -> bytes:
        onnx, helper = self.onnx, self.onnx.helper

        def described(value: str, sizes: tuple[Any, ...]) -> Any:
            lengths = "key_length" if value.startswith(("key", "value")) else "sequence_length"
            kind = onnx.TensorProto.INT64 if value == PADDING else onnx.TensorProto.FLOAT
            return helper.make_tensor_value_info(value, kind, [
                free if size is None else size for size, free in zip(sizes, ("batch", lengths, ""), strict=False)])

        if result != "output":
            self.nodes.append(helper.make_node("Identity", [result], ["output"], name="output"))
        graph = helper.make_graph(self.nodes, name, [described(*pair) for pair in inputs.items()],
                                  [described("output", shape)], self.initializers)
        size = sum(len(tensor.raw_data) for tensor in self.initializers)
        if size > _MOST_BYTES:
            raise ValueError(f"layer has {size:,} bytes of weights; an .onnx file holds 2 GiB: export its layers, "
                             "encoder.layers[i], one by one, or a .safetensors")
        model = helper.make_model(graph, producer_name=PRODUCER, ir_version=_IR_VERSIONS[self.opset],
                                  opset_imports=[helper.make_opsetid("", self.opset)])
        onnx.checker.check_model(model)
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    # -- layers --------------------------------------------------------------------------------------------------------

    def block(self, layer: Any, x: str, sequences: Sequences, name: str) -> str:
        """By the operations of its forward."""
        attention, (mask,) = layer.attention, sequences.masks
        try:
            if isinstance(attention, DynamicMultiHeadAttention):
                raise ValueError("attention is dynamic int8, which has no ONNX form: quantize with scheme='static', or "
                                 "export the float encoder; a .tflite holds it")
            if isinstance(attention, MultiHeadAttention):
                check_float(attention)
                self._keep, self.numbers = mask.permitted(), mask.bias
            elif not self.shapes_known and attention.attention.score_ops:
                raise ValueError("attention has a position bias, for which the file must have one length: give "
                                 "sequence_length")
            return layer.forward(self, x, sequences, name)
        except ValueError as error:
            raise ValueError(f"{name.removesuffix('.')}: {error}") from None

    def codes_ops(self, layer: Any, name: str) -> Ops[str]:
        """The executor of a static layer's own operations."""
        return CodesOps(self, layer, name)

    def linear(self, x: str, linear: Any, name: str) -> str:
        """x weight^T + bias."""
        if hasattr(linear, "codes"):
            raise ValueError(f"{name} is dynamic int8, which has no ONNX form: quantize with scheme='static', or "
                             "export the float encoder; a .tflite holds it")
        return self.product(x, self.constant(f"{name}/weight", linear.weight.T), linear.bias, name)

    def product(self, x: str, weight: str, bias: Any, name: str) -> str:
        """x weight + bias, of arrays or of a value's name."""
        if bias is None:
            return self.node("MatMul", [x, weight], name)
        y = self.node("MatMul", [x, weight], f"{name}/product")
        return self.node("Add", [y, bias if isinstance(bias, str) else self.constant(f"{name}/bias", bias)], name)

    def attention(self, q: str, k: str, v: str, layer: Any, sequences: Sequences, name: str) -> str:
        """The heads side by side."""
        whole = self.opset >= _ATTENTION and self.padding is None
        mask = [] if not whole else [each for each in (self._masks(layer, name),) if each is not None]
        apart = any(part is not None for part in (layer.rotary, layer.q_norm, layer.k_norm))
        if whole and not apart:
            return self.node("Attention", [q, k, v, *mask], f"{name}context", q_num_heads=layer.num_heads,
                             kv_num_heads=layer.num_kv_heads, scale=float(layer.scale))
        heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
        q, k, v = (self.split_heads(x, count, f"{name}{part}")
                   for x, count, part in zip((q, k, v), heads, INPUTS, strict=True))
        q, k = self.placed(q, k, layer, name)
        if whole:
            context = self.node("Attention", [q, k, v, *mask], f"{name}context/heads", scale=float(layer.scale))
            return self.merge_heads(context, f"{name}context")
        if layer.num_kv_heads != layer.num_heads:
            k, v = (self._repeated(x, layer, f"{name}{part}") for x, part in ((k, "key"), (v, "value")))
        return self.merge_heads(attend(self, q, k, v, layer, sequences, name), f"{name}context")

    def _masks(self, layer: Any, name: str) -> str | None:
        """The mask as Attention takes it: of a row that sees nothing, scores that are all equal."""
        if self._keep is None:
            return self.added(layer, name)
        keep = np.where(self._keep, np.float32(0), MASKED_SCORE).astype(np.float32)
        numbers = None if self.lengths is None else added_scores(layer, self.numbers, *self.lengths)
        return self.constant(f"{name}mask", keep if numbers is None else np.maximum(keep + numbers, MASKED_SCORE))

    def scores(self, q: str, k: str, layer: Any, name: str) -> str:
        """q k^T, scaled."""
        turned = self.node("Transpose", [k], f"{name}/keys", perm=[0, 1, 3, 2])
        y = self.node("MatMul", [q, turned], f"{name}/product")
        return self.node("Mul", [y, self.constant(f"{name}/scale", np.array(layer.scale, np.float32))], name)

    def masked(self, scores: str, layer: Any, mask: Any, name: str) -> str:
        """The mask that the file shall hold, and the padding that it is given."""
        added = self.added(layer, name.removesuffix("masked_scores"))
        if added is not None:
            scores = self.node("Add", [scores, added], f"{name}/added")
        scores = self.padded(scores, np.array(MASKED_SCORE), name)
        if self._keep is None:
            return scores
        keep = self.constant(f"{name}/keep", self._keep)
        return self.node("Where", [keep, scores, self.constant(f"{name}/fill", np.array(MASKED_SCORE))], name)

    def padded(self, scores: str, fill: Any, name: str) -> str:
        """The scores, those of padding replaced."""
        if self.padding is None:
            return scores
        return self.node("Where", [self.padding, scores, self.constant(f"{name}/padding", fill)], f"{name}/tokens")

    def softmax(self, scores: str, name: str) -> str:
        """Over the keys."""
        return self.node("Softmax", [scores], name, axis=-1)

    def context(self, probabilities: str, v: str, name: str) -> str:
        """Probabilities v."""
        return self.node("MatMul", [probabilities, v], f"{name}/heads")

    def split_heads(self, x: str, heads: int, name: str) -> str:
        """(B, L, H * size) -> (B, H, L, size)."""
        shape = self.constant(f"{name}/shape", np.array([0, 0, heads, -1], np.int64))
        return self.node("Transpose", [self.node("Reshape", [x, shape], f"{name}/split")], f"{name}/heads",
                         perm=[0, 2, 1, 3])

    def merge_heads(self, x: str, name: str) -> str:
        """(B, H, L, size) -> (B, L, H * size)."""
        shape = self.constant(f"{name}/shape", np.array([0, 0, -1], np.int64))
        turned = self.node("Transpose", [x], f"{name}/tokens", perm=[0, 2, 1, 3])
        return self.node("Reshape", [turned, shape], f"{name}/merged")

    def _repeated(self, x: str, layer: Any, name: str) -> str:
        which = np.repeat(np.arange(layer.num_kv_heads), layer.num_heads // layer.num_kv_heads)
        return self.node("Gather", [x, self.constant(f"{name}/which", which)], f"{name}/repeated", axis=1)

    # -- operations ----------------------------------------------------------------------------------------------------

    def layer_norm(self, x: str, norm: Any, name: str) -> str:
        """(x - mean) / sqrt(variance + eps) * weight + bias."""
        parts = [self.constant(f"{name}/{part}", array) for part, array in (
            ("weight", norm.weight), ("bias", norm.bias)) if array is not None]
        return self.node("LayerNormalization", [x, *parts], name, axis=-1, epsilon=norm.eps)

    def rms_norm(self, x: str, norm: Any, name: str) -> str:
        """x / sqrt(mean(x^2) + eps) * weight, taken apart."""
        square = self.node("Mul", [x, x], f"{name}/square")
        axes = [self.constant(f"{name}/axes", np.array([-1], np.int64))] if self.opset >= 18 else []
        options: dict[str, Any] = {} if axes else {"axes": [-1]}
        mean = self.node("ReduceMean", [square, *axes], f"{name}/mean", keepdims=1, **options)
        eps = self.constant(f"{name}/eps", np.array(norm.eps, np.float32))
        root = self.node("Sqrt", [self.node("Add", [mean, eps], f"{name}/mean_eps")], f"{name}/sqrt")
        normed = self.node("Div", [x, root], f"{name}/normed")
        return self.node("Mul", [normed, self.constant(f"{name}/weight", norm.weight)], name)

    def activation(self, x: str, kind: str, name: str) -> str:
        """One node where the opset has it."""
        if kind == "relu":
            return self.node("Relu", [x], name)
        if kind == "sigmoid":
            return self.node("Sigmoid", [x], name)
        if kind == "silu":
            return self.node("Mul", [x, self.node("Sigmoid", [x], f"{name}/sigmoid")], name)
        if self.opset >= _GELU:
            return self.node("Gelu", [x], name, approximate="tanh" if kind == "gelu_tanh" else "none")

        def number(part: str, value: float) -> str:
            return self.constant(f"{name}/{part}", np.array(value, np.float32))

        if kind == "gelu":
            inner = self.node("Erf", [self.node("Div", [x, number("divisor", math.sqrt(2))], f"{name}/scaled")],
                              f"{name}/erf")
        else:
            cube = self.node("Mul", [self.node("Mul", [x, x], f"{name}/square"), x], f"{name}/cube")
            sum_ = self.node("Add", [x, self.node("Mul", [cube, number("factor", 0.044715)], f"{name}/part")],
                             f"{name}/sum")
            inner = self.node("Tanh", [self.node("Mul", [sum_, number("outer", math.sqrt(2 / math.pi))],
                                                 f"{name}/scaled")], f"{name}/tanh")
        upper = self.node("Add", [inner, number("one", 1)], f"{name}/upper")
        return self.node("Mul", [self.node("Mul", [x, upper], f"{name}/twice"), number("half", 0.5)], name)

    def add(self, a: str, b: str, name: str) -> str:
        """The sum."""
        return self.node("Add", [a, b], name)

    def subtract(self, a: str, b: str, name: str) -> str:
        """The difference."""
        return self.node("Sub", [a, b], name)

    def multiply(self, a: str, b: str, name: str) -> str:
        """The product, element by element."""
        return self.node("Mul", [a, b], name)

    def quantized(self, x: str, quantization: TensorQuantization, name: str) -> str:
        """Codes of rows, as reals."""
        scale = self.constant(f"{name}/scale", np.array(quantization.scale, np.float32))
        zero = self.constant(f"{name}/zero_point", np.array(quantization.zero_point + UNSIGNED, np.uint8))
        codes = self.node("QuantizeLinear", [x, scale, zero], f"{name}/quantized")
        return self.node("DequantizeLinear", [codes, scale, zero], f"{name}/reals")

    def reals(self, codes: str, _: str) -> str:
        """They are reals."""
        return codes

    def columns(self, x: str, columns: Any, name: str) -> str:
        """Some columns of rows."""
        return self.node("Gather", [x, self.constant(f"{name}/which", np.array(columns, np.int64))], name, axis=-1)

    def part(self, x: str, first: int, size: int, name: str, step: int = 1) -> str:
        """Columns beside each other, or each `step`-th of them."""
        bounds = [self.constant(f"{name}/{part}", np.array([value], np.int64)) for part, value in (
            ("first", first), ("last", first + size), ("axis", -1), ("step", step)) if part != "step" or step > 1]
        return self.node("Slice", [x, *bounds], name)

    def joined(self, parts: list[str], name: str) -> str:
        """Rows side by side."""
        return self.node("Concat", parts, name, axis=-1)

    def narrow(self, x: str, weight: np.ndarray, bias: np.ndarray | None, name: str) -> str:
        """A float product of a few columns."""
        return self.product(x, self.constant(f"{name}/weight", weight.T), bias, name)

    def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node with one output, of its name."""
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, values: Any) -> str:
        """Add an array, and return its name; what was added before goes by the name that it has."""
        array = np.ascontiguousarray(values).reshape(np.shape(values))
        digest = hashlib.blake2b(array)
        digest.update(repr((array.dtype.str, array.shape)).encode())
        key = digest.digest()
        if key not in self._known:
            self._known[key] = name
            self.initializers.append(self.onnx.numpy_helper.from_array(array, name))
        return self._known[key]


def _four_axes(mask: np.ndarray, scores: tuple[int, ...]) -> np.ndarray:
    """A mask that broadcasts to the scores, (B, H, L, S)."""
    try:
        fits = np.broadcast_shapes(mask.shape, scores) == scores
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"mask must broadcast to (B, H, L, S) = {scores}; got shape {mask.shape}; export with the "
                         "lengths the mask was made for")
    return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
