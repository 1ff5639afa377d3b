"""What quantization cost a whole encoder: each half of each layer, alone and with all before it, and the result."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.executors.compiled import CompiledOps
from edgeattn.layers import FeedForward, Linear, MultiHeadAttention
from edgeattn.layers.dynamic_linear import DynamicLinear
from edgeattn.models import TextEncoder
from edgeattn.quantized import DynamicMultiHeadAttention, QuantizedLinear, StaticFeedForward, StaticSelfAttention
from quant.model_calls import encoder_of, on, read_model_calls
from quant.report import Comparison, ModelReport, cosines, pair_order

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from edgeattn.layers import TransformerEncoder, TransformerEncoderLayer
    from edgeattn.ops import Sequences
    from edgeattn.types import Float32s
    from quant.detail import Detail
    from quant.model_calls import Model, ModelCall
    from quant.types import ModelBatch

MOSTLY = 0.5  # lint where attention is more of the error than this
_PARTS = ("attention", "feed_forward")


def compare_model(model: Model, quantized: Model, batches: Iterable[ModelBatch],
                  check_attention: Callable[[MultiHeadAttention, Any], None], detail: Detail | None = None
                  ) -> ModelReport:
    """See ``quant.compare``; detail: takes what lies behind the figures."""
    if type(quantized) is not type(model):
        raise TypeError(f"quantized must be a {type(model).__name__}, as model is; got {type(quantized).__name__}")
    _check_pair(model, quantized, "", check_attention)
    ops = _SideBySide(encoder_of(quantized), detail)
    output, each = Comparison(), []
    for call in read_model_calls(model, batches, "comparing"):
        ops.call = call
        real, got = call.run(on(ops, model)), call.run(quantized)
        for a, b in _sequences(model, call, real, got):
            output.add(a, b)
            each.append((a, b))
    if not any(comparison.count for comparison in ops.alone.values()):
        raise ValueError("batches must hold at least one token that is no padding; got none")
    alone, so_far = ({name: c.result() for name, c in found.items()} for found in (ops.alone, ops.so_far))
    report = ModelReport(alone, so_far, output.result(), cosines(each), [], pair_order(each))
    report.lints.extend(_lints(report, quantized))
    return report


class _SideBySide(CompiledOps):
    """Computes the float model, and beside each half of its layers the int8 one's."""

    def __init__(self, quantized: TransformerEncoder, detail: Detail | None):
        super().__init__()
        self.quantized, self.detail = quantized, detail
        self.call: ModelCall
        self.alone: dict[str, Comparison] = {}
        self.so_far: dict[str, Comparison] = {}

    def block(self, layer: Any, x: Float32s, sequences: Sequences, name: str) -> Float32s:
        """An encoder layer."""
        i = int(name.split(".")[-2])
        if i == 0:
            self.carried = x
        if self.detail is not None:
            self.detail.watch(f"layers.{i}", layer, self.quantized.layers[i], x, sequences, self.call)
        halves = zip(_PARTS, _halves(layer), _halves(self.quantized.layers[i]), strict=True)
        for part, of_float, of_int8 in halves:
            y, alone = of_float(x, sequences), of_int8(x, sequences)
            self.carried = of_int8(self.carried, sequences)
            for comparisons, got in ((self.alone, alone), (self.so_far, self.carried)):
                comparison = comparisons.setdefault(f"layers.{i}.{part}", Comparison())
                comparison.add(self.call.counted(y), self.call.counted(got))
            if self.detail is not None:
                self.detail.add(f"layers.{i}.{part}", self.call.counted(y), self.call.counted(alone))
            x = y
        return x


def _halves(layer: TransformerEncoderLayer) -> list[Callable[[Float32s, Sequences], Float32s]]:
    """Attention and feed-forward with their residuals and norms, as a call of the layer computes them."""
    ops = CompiledOps()
    if layer.stages is None:
        return [lambda x, sequences: layer.attend(ops, x, sequences), lambda x, _: layer.feed(ops, x)]
    attention, feed_forward = layer.stages
    return [attention, feed_forward]


def _sequences(model: Model, call: ModelCall, real: Any, got: Any) -> list[tuple[Float32s, Float32s]]:
    """The results of each sequence: a text's embedding, else those of its tokens that are no padding."""
    if isinstance(real, list) or ("sentences" in call.arguments and isinstance(model, TextEncoder)):
        return list(zip(real, got, strict=True))
    shape = (math.prod(real.shape[:-2]), *real.shape[-2:])
    pairs = list(zip(real.reshape(shape), got.reshape(shape), strict=True))
    if call.real is None:
        return pairs
    return [(a[keep], b[keep]) for (a, b), keep in zip(pairs, call.real.reshape(len(pairs), -1), strict=True)]


def _lints(report: ModelReport, quantized: Model) -> list[str]:
    lints, layers = [], encoder_of(quantized).layers
    static = {f"layers.{i}.{part}" for i, layer in enumerate(layers) for part in _PARTS
              if isinstance(getattr(layer, part), (StaticSelfAttention, StaticFeedForward))}
    some = [name for name in report.overrides() if name in static]
    if some:
        lints.append(f"static int8 ends at a cosine of {report.cosines.mean:.4f}: overrides=report.overrides() makes "
                     f"what costs most dynamic, {len(some)} of {len(static)} halves; in a .tflite their scales are "
                     "found at run time")
    shares = report.shares()
    attention = sum(share for name, share in shares.items() if name.endswith("attention"))
    if attention > MOSTLY and any(not isinstance(layer.attention, MultiHeadAttention)
                                  for layer in layers):
        lints.append(f"attention is {attention:.0%} of the error: attention='float32' leaves it as it is")
    return lints


def _check_pair(a: Any, b: Any, where: str, check_attention: Callable[[Any, Any], None]) -> None:
    """Raise unless `b` is `a`, or what ``quantize`` may have made of it."""
    if isinstance(a, MultiHeadAttention) and isinstance(b, (DynamicMultiHeadAttention, StaticSelfAttention)):
        try:
            check_attention(a, b)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return
    if type(a) is Linear and isinstance(b, DynamicLinear):
        _check_linear(a, b, where)
        return
    if isinstance(a, FeedForward) and isinstance(b, StaticFeedForward):
        _check_static(a, b, where)
        return
    same = type(a) is type(b)
    if same and isinstance(a, np.ndarray):
        same = np.array_equal(a, b)
    elif same and isinstance(a, (tuple, list)):
        same = len(a) == len(b)
        for i, pair in enumerate(zip(a, b, strict=same)):
            _check_pair(*pair, f"{where}[{i}]", check_attention)
    elif same and type(a).__module__.startswith("edgeattn"):
        for name in inspect.signature(type(a)).parameters:
            _check_pair(getattr(a, name), getattr(b, name), f"{where}.{name}".lstrip("."), check_attention)
    elif same:
        same = a == b
    if not same:
        raise _differs(where)


def _differs(where: str) -> ValueError:
    return ValueError(f"quantized does not belong to model: its {where} differs; compare it with the model it was made "
                      "of")


def _check_linear(a: Linear, b: DynamicLinear, where: str) -> None:
    """Raise unless the weights of `b` lie within a step of those of `a`."""
    fits = (a.inputs, a.outputs) == (b.inputs, b.outputs) and (a.bias is None) == (b.bias is None)
    if fits:
        weight = b.codes[:b.outputs] * b.scale[:b.outputs, None]
        weight[b.residual_outputs] += b.codes[b.outputs:] * b.scale[b.outputs:, None]
        weight[:, b.outlier_columns] = b.outlier_weight
        fits = bool((np.abs(weight - a.weight) <= b.scale[:b.outputs, None]).all())
        fits = fits and (a.bias is None or b.bias is None or np.array_equal(a.bias, b.bias))
    if not fits:
        raise _differs(where)


def _check_static(a: FeedForward, b: StaticFeedForward, where: str) -> None:
    """Raise unless the first product's weights of `b` lie within a step of those of `a`, feature by feature."""
    parts = [b] if b.large is None else [b, b.large]
    fits = (a.inputs, a.outputs, a.linear1.outputs) == (b.inputs, b.outputs, sum(part.hidden for part in parts))
    fits = fits and a.activation == b.activation and (a.gate is None) == (not b.gated)
    rest = [_weights(part.linears["linear1"], a.inputs) for part in parts]
    for row in a.linear1.weight if fits else ():
        part = next((part for part in rest if len(part[0]) and _near(row, part[0][0], part[1][0])), None)
        fits = fits and part is not None
        if part is not None:
            part[:] = [array[1:] for array in part]
    if not fits:
        raise _differs(where)


def _weights(linear: QuantizedLinear, features: int) -> list[Any]:
    """[codes of the first features, scales]"""
    return [linear.weight[:, :features], linear.scale]


def _near(row: Float32s, codes: Any, scale: Any) -> bool:
    return bool((np.abs(codes * scale - row) <= scale).all())
