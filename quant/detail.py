"""What lies behind the figures of a comparison: values of tensors, maps of heads, channels of inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeattn.executors.compiled import CompiledOps
from edgeattn.executors.numpy_int8 import Int8Ops
from edgeattn.layers import MultiHeadAttention
from edgeattn.layers.attention import forward
from edgeattn.layers.dynamic_linear import DynamicLinear
from edgeattn.ops import Sequences
from edgeattn.quantized import StaticSelfAttention
from edgeattn.quantized.static_rows import codes_of_rows
from quant.model_calibration import read_by_attention
from quant.observers import Statistics
from quant.report import Comparison
from quant.trace import FloatTrace, counted

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.quantized import TensorQuantization
    from edgeattn.types import Float32s
    from quant.model_calls import ModelCall
    from quant.report import TensorReport
    from quant.trace import Call

SHOWN_TOKENS = 48  # of a map
_BY_HEAD = ("query", "key", "value", "context")


class Map(NamedTuple):
    """Probabilities (L, S) of one head of one sequence, in float32 and of the int8 layer."""

    real: Float32s
    got: Float32s


@dataclass
class TensorDetail:
    """Values of a tensor of the float layer, and those in their place."""

    real: Statistics = field(default_factory=Statistics)
    got: Statistics = field(default_factory=Statistics)
    comparison: Comparison = field(default_factory=Comparison)
    has_range: bool = False  # whether codes end somewhere

    def add(self, real: Float32s, got: Float32s, quantization: TensorQuantization | None = None) -> None:
        """Take in values of one shape; what is not finite is left out of the histograms."""
        self.comparison.add(real, got)
        if quantization is not None:
            self.has_range = True
            self.comparison.saturated(real, quantization)
        self.real.update(real[np.isfinite(real)])
        self.got.update(got[np.isfinite(got)])

    def result(self) -> TensorReport:
        """Its figures."""
        return self.comparison.result()


@dataclass
class Channels:
    """The largest magnitude of each channel of an input, before and after outliers are taken out of its codes."""

    before: Float32s
    after: Float32s


@dataclass
class Detail:
    """All of a comparison.

    Attributes
    ----------
    tensors : dict of TensorDetail
        "layers.0.attention.query", ...
    heads : dict of list of Comparison
        By attention layer, of the context of each head.
    maps : dict of list of Map
        By attention layer, of each head for the first sequence.
    channels : dict of Channels
        By attention layer.
    """

    tensors: dict[str, TensorDetail] = field(default_factory=dict)
    heads: dict[str, list[Comparison]] = field(default_factory=dict)
    maps: dict[str, list[Map]] = field(default_factory=dict)
    channels: dict[str, Channels] = field(default_factory=dict)

    def add(self, name: str, real: Float32s, got: Float32s, quantization: TensorQuantization | None = None) -> None:
        """Values of a tensor."""
        self.tensors.setdefault(name, TensorDetail()).add(real, got, quantization)

    def add_heads(self, name: str, real: Float32s, got: Float32s) -> None:
        """Contexts (tokens, H, Dv)."""
        found = self.heads.setdefault(name, [Comparison() for _ in range(real.shape[1])])
        for h, comparison in enumerate(found):
            comparison.add(real[:, h], got[:, h])

    def add_maps(self, name: str, real: Float32s, got: Float32s) -> None:
        """Probabilities (B, H, L, S); the first sequence is kept, once."""
        some = slice(SHOWN_TOKENS)
        if name not in self.maps and real.shape[0] and real.shape[3]:
            self.maps[name] = [Map(a[some, some].copy(), b[some, some].copy())
                               for a, b in zip(real[0], got[0], strict=True)]

    def watch(self, name: str, layer: Any, int8: Any, x: Float32s, sequences: Sequences, call: ModelCall) -> None:
        """Both ways through an encoder layer's parts, upon the same rows x; name: "layers.0"."""
        read = np.ascontiguousarray(read_by_attention(layer, x))
        self._watch_attention(f"{name}.attention", layer.attention, int8.attention, read, sequences, call)
        linear1 = getattr(int8.feed_forward, "linear1", None)
        if isinstance(linear1, DynamicLinear):
            x = layer.attend(CompiledOps(), x, sequences)
            normed = layer.norm_first and layer.norm2 is not None
            read = np.ascontiguousarray(layer.norm2.forward(CompiledOps(), x) if normed else x)
            real, got = (part.packed(read) for part in (layer.feed_forward.linear1, linear1))
            self.add(f"{name}.feed_forward.linear1", call.counted(real), call.counted(got))

    def add_layer_tensor(self, name: str, real: Float32s, codes: Any, quantization: TensorQuantization, call: Call
                         ) -> None:
        """A tensor of a static layer, and the codes in its place."""
        got = quantization.dequantize(codes)
        self.add(name, counted(name, real, call), counted(name, got, call), quantization)
        if name == "probabilities":
            self.add_maps("layer", real, got)
        elif name == "context" and call.permitted is None:
            self.add_heads("layer", *(x.swapaxes(1, 2).reshape(-1, *x.shape[1::2]) for x in (real, got)))
        elif name == "query_input":
            self._see_channels("layer", None, real.reshape(-1, real.shape[-1]))

    def add_layer_call(self, layer: MultiHeadAttention, int8: Any, call: Call, real: Float32s, got: Float32s) -> None:
        """The results of a dynamic layer."""
        self._see_channels("layer", int8, call.query.reshape(-1, call.query.shape[-1]))
        in_float, in_int8 = (
            each(call.query, call.key, call.value, attn_mask=call.permitted, need_weights=True)[1]
            for each in (layer, int8))
        self.add("probabilities", in_float, in_int8)
        self.add_maps("layer", in_float, in_int8)
        self.add("output", real, got)

    def _watch_attention(self, name: str, layer: MultiHeadAttention, int8: Any, read: Float32s, sequences: Sequences,
                         call: ModelCall) -> None:
        if isinstance(int8, MultiHeadAttention):  # it reads no codes
            return
        self._see_channels(name, int8, call.counted(read))
        if isinstance(int8, StaticSelfAttention):
            real, got = _static_traces(layer, int8, read, sequences)
            tensors: Any = int8.attention.tensors
        else:
            real, got = ({}, {})
            for record, each in ((real, layer), (got, int8)):
                each.forward(_Traced(record), read, read, read, sequences)
            tensors = {}
        for key, values in real.items():
            part, kind = key.rpartition(".")[0], key.rpartition(".")[2]
            if kind == "probabilities":
                self.add_maps(name, values, got[key])
                self.add(f"{name}.{kind}", values, got[key])
            elif kind in _BY_HEAD:
                heads = layer.num_kv_heads if kind in ("key", "value") and values.ndim == 2 else layer.num_heads
                a, b = (_by_head(v, heads) for v in (values, got[key]))
                a, b = (a, b) if part else (call.counted(a), call.counted(b))
                self.add(f"{name}.{kind}", a, b, tensors.get(kind))
                if kind == "context":
                    self.add_heads(name, a, b)

    def _see_channels(self, name: str, int8: Any, read: Float32s) -> None:
        before = np.abs(read).max(axis=0, initial=0)
        if name in self.channels:
            before = np.maximum(before, self.channels[name].before)
        after = before.copy()
        if isinstance(int8, StaticSelfAttention):
            of = int8.attention.tensors["query_input"]
            after = np.minimum(after, max(abs(float(of.dequantize(code))) for code in (-128, 127)))
        else:
            after[getattr(int8, "outlier_columns", np.zeros(0, np.int64))] = 0
        self.channels[name] = Channels(before, after)


class _Traced(CompiledOps):
    """Keeps projections, probabilities and contexts by their names."""

    def __init__(self, record: dict[str, Any]):
        super().__init__(record)

    def attention(self, q: Float32s, k: Float32s, v: Float32s, layer: Any, sequences: Sequences, name: str) -> Float32s:
        """The heads side by side."""
        return self._keep(f"{name}context", super().attention(q, k, v, layer, sequences, name))


def _static_traces(layer: MultiHeadAttention, int8: StaticSelfAttention, x: Float32s, sequences: Sequences
                   ) -> tuple[dict[str, Float32s], dict[str, Float32s]]:
    """Tensors of both, by their names, of several groups of sequences behind "0." and so on; queries scaled."""
    of, real, got, row = int8.attention, {}, {}, 0
    codes = codes_of_rows(x, of.tensors["query_input"], int8.more_inputs)
    for i, mask in enumerate(sequences.masks):
        batch, _, length, _ = mask.shape
        rows, row = slice(row, row + batch * length), row + batch * length
        prefix = "" if len(sequences.masks) == 1 else f"{i}."
        some, one = Sequences([mask]), codes[rows].reshape(batch, length, -1)
        exact: dict[str, Any] = {}
        found: dict[str, Any] = {}
        read = x[rows]
        forward(FloatTrace(exact, key_bias=False), layer, read, read, read, some)
        forward(Int8Ops(of, found), of, one, one, one, some)
        for name in (*_BY_HEAD, "probabilities"):
            scale = np.float32(layer.scale if name == "query" else 1)
            real[prefix + name], got[prefix + name] = exact[name] * scale, of.tensors[name].dequantize(found[name])
    return real, got


def _by_head(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """(B, H, L, D), or rows (tokens, H * D), as (tokens, H, D)."""
    if values.ndim == 4:
        return values.swapaxes(1, 2).reshape(-1, *values.shape[1::2])
    return values.reshape(len(values), heads, -1)
