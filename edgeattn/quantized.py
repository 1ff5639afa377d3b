"""Quantized multi-head attention: its parameters, the static and the dynamic layer."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeattn import arithmetic as rules
from edgeattn.arithmetic import CODE_MAX, CODE_MIN
from edgeattn.checks import check_out, count, deliver, float_array, number, result_dtype, to_float32
from edgeattn.cpu.layer_dynamic import DynamicLayer
from edgeattn.cpu.layer_int8 import StaticLayer
from edgeattn.functional import default_scale
from edgeattn.layers import MultiHeadAttention
from edgeattn.masks import resolve_mask

INPUTS = ("query", "key", "value")
SOURCES = ((0, 0, 0), (0, 1, 1), (0, 1, 2))
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-60, 2.0**60
# gemmlowp's softmax takes differences of scores in Q5.26; the runtimes that use it abort on a scale below that.
SMALLEST_SOFTMAX_SCALE = 2.0**-26


@dataclass(frozen=True)
class TensorQuantization:
    """Per-tensor int8 quantization: ``real = scale * (code - zero_point)``.

    Parameters
    ----------
    scale : float
        In [2**-60, 2**60], where products and quotients of two scales are normal float32 numbers; kept as float32.
    zero_point : int
        In [-128, 127].
    """

    scale: np.float32
    zero_point: int

    def __post_init__(self):
        object.__setattr__(self, "scale", _scale(self.scale, "scale"))
        object.__setattr__(self, "zero_point", operator.index(self.zero_point))
        if not CODE_MIN <= self.zero_point <= CODE_MAX:
            raise ValueError(f"zero_point must lie in [-128, 127]; got {self.zero_point}")

    def to_json(self) -> list:
        """[scale, zero_point]; a float32 survives the way through a JSON number."""
        return [float(self.scale), self.zero_point]

    def quantize(self, real) -> np.ndarray:
        """Nearest codes of ``real``, halves to even, saturated; int8 of the same shape. NaN gets the code of 0."""
        with np.errstate(over="ignore"):
            codes = np.rint(np.asarray(real, np.float32) * (np.float32(1) / self.scale)) + np.float32(self.zero_point)
        codes = np.where(np.isnan(codes), np.float32(self.zero_point), codes)
        return np.clip(codes, CODE_MIN, CODE_MAX).astype(np.int8)

    def dequantize(self, codes) -> np.ndarray:
        """Reals that ``codes`` stand for, float32 of the same shape."""
        return (np.asarray(codes, np.float32) - np.float32(self.zero_point)) * self.scale


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """A fully connected layer: int8 weights, symmetric per output channel, and an int32 bias at input x weight scale.

    Parameters
    ----------
    weight : int8 (out_features, in_features)
        In [-127, 127].
    scale : float32 (out_features,)
        ``real weight = scale * code``.
    bias : int32 (out_features,) or None
    """

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None = None

    def __post_init__(self):
        weight = _frozen(self.weight, np.int8, "weight")
        if weight.ndim != 2:
            raise ValueError(f"weight must be (out_features, in_features); got shape {weight.shape}")
        if (weight == CODE_MIN).any():
            raise ValueError("weight must lie in [-127, 127], as TFLite defines its FULLY_CONNECTED weights; got -128")
        scale = _frozen(np.broadcast_to(self.scale, (weight.shape[0],)), np.float32, "scale")
        if not ((scale >= SMALLEST_SCALE) & (scale <= LARGEST_SCALE)).all():
            raise ValueError("scale of a linear layer must be positive and finite in every channel, within "
                             "[2**-60, 2**60]")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "scale", scale)
        if self.bias is not None:
            bias = _frozen(self.bias, np.int32, "bias")
            if bias.shape != (weight.shape[0],):
                raise ValueError(f"bias must have shape {(weight.shape[0],)}; got {bias.shape}")
            object.__setattr__(self, "bias", bias)


@dataclass(frozen=True)
class MulConstant:
    """Scores times a constant: how other converters write 1/sqrt(D).

    Parameters
    ----------
    code : int
        The constant's int8 code.
    constant, output : TensorQuantization
    """

    code: int
    constant: TensorQuantization
    output: TensorQuantization

    def __post_init__(self):
        object.__setattr__(self, "code", _code(self.code, "code"))


@dataclass(frozen=True, eq=False)
class AddMask:
    """Scores plus a constant mask: how other converters write a mask.

    Parameters
    ----------
    codes : int8, broadcastable to (B, H, L, S)
    mask, output : TensorQuantization
    """

    codes: np.ndarray
    mask: TensorQuantization
    output: TensorQuantization

    def __post_init__(self):
        object.__setattr__(self, "codes", _mask(self.codes, np.int8, "codes"))


@dataclass(frozen=True, eq=False)
class SelectMask:
    """Scores where permitted, a fill code elsewhere: how our exporter writes a mask. Keeps the scores' quantization.

    Parameters
    ----------
    keep : bool, broadcastable to (B, H, L, S)
        True = attend.
    fill : int
        The code of a masked score: the lowest, -128.
    """

    keep: np.ndarray
    fill: int = CODE_MIN

    def __post_init__(self):
        object.__setattr__(self, "keep", _mask(self.keep, np.bool_, "keep"))
        object.__setattr__(self, "fill", _code(self.fill, "fill"))


ScoreOp = MulConstant | AddMask | SelectMask


def _scale(value, name: str) -> np.float32:
    """A scale as float32."""
    value = number(name, value)
    if not SMALLEST_SCALE <= value <= LARGEST_SCALE:
        raise ValueError(f"{name} must be positive and finite, within [2**-60, 2**60]; got {value}")
    return np.float32(value)


def _frozen(array, dtype, name: str) -> np.ndarray:
    """A C-contiguous, read-only copy; refuses a dtype that would have to be converted."""
    array = np.asarray(array)
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype)}; got {array.dtype}")
    array = np.array(array, order="C")
    array.flags.writeable = False
    return array


def _mask(array, dtype, name: str) -> np.ndarray:
    array = _frozen(array, dtype, name)
    if array.ndim > 4:
        raise ValueError(f"{name} must broadcast to (B, H, L, S); got shape {array.shape}")
    return array


def _code(value, name: str) -> int:
    """An int8 code as a Python int."""
    value = operator.index(value)
    if not CODE_MIN <= value <= CODE_MAX:
        raise ValueError(f"{name} must lie in [-128, 127]; got {value}")
    return value


PROBABILITIES = TensorQuantization(rules.PROBABILITY_SCALE, rules.PROBABILITY_ZERO_POINT)


def fit_mask(mask: np.ndarray, shape: tuple[int, int, int, int]) -> np.ndarray:
    """A mask that a layer carries, or what was made of it, as a view of shape (B, H, L, S).

    Raises
    ------
    ValueError
        When it does not broadcast.
    """
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"the mask this layer carries has shape {mask.shape}, which does not broadcast to "
                         f"(B, H, L, S) = {shape}; call the layer with the lengths the mask was made for") from None


class QuantizedMultiHeadAttention:
    """Multi-head attention in int8, as ``quant.quantize`` makes it: a static or a dynamic layer, see ``scheme``."""

    scheme: str


class DynamicMultiHeadAttention(QuantizedMultiHeadAttention):
    """Float in, float out, int8 inside: nothing is calibrated, every token is quantized by its own range at run time.

    Weights are int8 per output channel, activations int8 per token, products accumulate in int32, the softmax is
    float32, and probabilities are quantized per row. Biases, masks and the softmax never meet an int8 range, so long
    rows and masks cost nothing.

    Parameters
    ----------
    num_heads : int
        H.
    weights : mapping
        "query" (H*D, Eq), "key" (Hkv*D, Ek), "value" (Hkv*Dv, Ev) and, with an output projection, "output"
        (Eo, H*Dv): QuantizedLinear without a bias.
    biases : mapping
        By the same names float32 (out_features,), where there is one. A key bias has no influence and may be left out.
    num_kv_heads : int, optional
        Hkv, H unless given.
    """

    scheme = "dynamic"
    _query_name = "query"
    _inputs = MultiHeadAttention._inputs

    def __init__(self, num_heads: int, weights: Mapping[str, QuantizedLinear], biases: Mapping[str, np.ndarray], *,
                 num_kv_heads: int | None = None):
        self.num_heads = count("num_heads", num_heads)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else count("num_kv_heads", num_kv_heads)
        self.weights, self.biases = dict(weights), {}
        names = (*INPUTS, "output")
        unknown = sorted(set(self.weights) - set(names)) + sorted(set(biases) - set(self.weights))
        missing = [name for name in INPUTS if name not in self.weights]
        if missing or unknown:
            raise ValueError(f"weights and biases must be of {', '.join(names)}; "
                             f"missing {missing}, unexpected {unknown}")
        for name, bias in biases.items():
            self.biases[name] = _frozen(bias, np.float32, f"bias of {name}")
            if self.biases[name].shape != self.weights[name].scale.shape:
                raise ValueError(f"bias of {name} must have shape {self.weights[name].scale.shape}; "
                                 f"got {self.biases[name].shape}")
        shapes = {name: linear.weight.shape for name, linear in self.weights.items()}
        (q, self.embed_dim), (k, self.kdim), (v, self.vdim) = (shapes[name] for name in INPUTS)
        H, Hkv = self.num_heads, self.num_kv_heads
        self.head_dim, self.value_dim = q // H, v // Hkv
        fits = H % Hkv == 0 and (q, k, v) == (H * self.head_dim, Hkv * self.head_dim, Hkv * self.value_dim)
        merged = shapes.get("output", (0, H * self.value_dim))[1]
        if not fits or not (self.head_dim and self.value_dim) or merged != H * self.value_dim:
            raise ValueError(f"weights of shapes {shapes} do not fit num_heads = {H} and num_kv_heads = {Hkv}")
        self.output_dim = shapes.get("output", (H * self.value_dim,))[0]
        self.scale = default_scale(self.head_dim)

        def pair(name):
            return (self.weights[name].weight, self.weights[name].scale) if name in self.weights else None

        self._kernel = DynamicLayer(H, Hkv, *map(pair, names), *(self.biases.get(name) for name in names), self.scale)

    def __repr__(self):
        return (f"{type(self).__name__}(num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
                f"embed_dim={self.embed_dim}, kdim={self.kdim}, vdim={self.vdim}, head_dim={self.head_dim}, "
                f"value_dim={self.value_dim}, output_dim={self.output_dim})")

    def __call__(self, query, key=None, value=None, *, attn_mask=None, key_padding_mask=None, is_causal=False,
                 causal_alignment=None, out=None):
        """Attend from ``query`` to ``key`` and ``value``; arguments and result as ``MultiHeadAttention``'s."""
        if key is None and value is None and attn_mask is None and key_padding_mask is None and is_causal is False and (
                out is None and type(query) is np.ndarray and query.dtype == np.float32 and query.ndim == 3
                and query.shape[2] == self.embed_dim == self.kdim == self.vdim and query.flags.carray and query.size
                and self.output_dim):
            # what small layers are called with, again and again: self-attention, nothing masked
            return self._kernel(query, query, query, np.empty((*query.shape[:2], self.output_dim), np.float32))
        query, key, value = self._inputs(query, key, value)
        dtype = result_dtype(query, key, value)
        lead, queries = query.shape[:-2], query.shape[-2]
        check_out(out, (*lead, queries, self.output_dim), dtype)
        mask = resolve_mask((*lead, self.num_heads, queries, key.shape[-2]), attn_mask, key_padding_mask,
                            is_causal=is_causal, causal_alignment=causal_alignment)
        batch = mask.shape[0]
        keep, bias, band = mask.for_kernels()
        if key.shape[-2] == 0:  # one key that is not there
            key, value = (np.zeros((*lead, 1, x.shape[-1]), np.float32) for x in (key, value))
            keep, bias, band = np.zeros((1, 1, 1, 1), np.bool_), None, None
        q = to_float32(query).reshape(batch, queries, self.embed_dim)
        k = q if key is query else to_float32(key).reshape(batch, -1, self.kdim)
        v = k if value is key else to_float32(value).reshape(batch, -1, self.vdim)
        result = np.empty((*lead, queries, self.output_dim), np.float32)
        if result.size:
            self._kernel(q, k, v, result.reshape(batch, queries, self.output_dim), keep, bias, band)
        return deliver(result, out, dtype)

    def _to_state(self):
        """(config, tensors): all that ``_from_state`` needs to build an equal layer."""
        tensors = {f"{name}.{part}": getattr(linear, part) for name, linear in self.weights.items()
                   for part in ("weight", "scale")}
        tensors |= {f"{name}.bias": bias for name, bias in self.biases.items()}
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}, tensors

    @classmethod
    def _from_state(cls, config, tensors):
        groups = {}
        for name, array in tensors.items():
            group, _, part = name.rpartition(".")
            groups.setdefault(group, {})[part] = array
        biases = {name: parts.pop("bias") for name, parts in groups.items() if "bias" in parts}
        return cls(config["num_heads"], {name: QuantizedLinear(**parts) for name, parts in groups.items()}, biases,
                   num_kv_heads=config["num_kv_heads"])


class StaticMultiHeadAttention(QuantizedMultiHeadAttention):
    """int8 in, int8 out, every scale fixed at calibration: equal, bit for bit, to a TFLite kernel set.

    ``scores = q k^T`` (1/sqrt(D) lies in q's scale), ``probabilities = softmax(scores)``,
    ``context = probabilities v``, each requantized to int8 as the named kernel set rounds (see
    ``edgeattn.arithmetic``).

    Parameters
    ----------
    num_heads : int
        H. Every head has its own key and value head; grouped heads are repeated at quantization.
    linears : mapping
        "query" (H*D, Eq), "key" (H*D, Ek), "value" (H*Dv, Ev) and, with an output projection, "output" (Eo, H*Dv):
        QuantizedLinear.
    tensors : mapping
        TensorQuantization of "query_input" (and "key_input", "value_input" where ``sources`` has them), "query", "key",
        "value", "scores", "context" and, with an output projection, "output". "probabilities" are always 1/256, -128.
    sources : tuple of int
        Which input feeds the query, key and value projection: (0, 0, 0) self-attention, (0, 1, 1) the value is the
        key, (0, 1, 2) three inputs.
    score_ops : sequence of MulConstant, AddMask, SelectMask
        What happens to the scores' codes before the softmax.
    arithmetic : str
        A name in ``edgeattn.arithmetic.KERNEL_SETS``.
    mask_margin : float, optional
        How far the scores' range reaches below the lowest row maximum seen at calibration: the room that a masked score
        needs. 0 when calibration saw no mask, None when it is not known.
    """

    scheme = "static"

    def __init__(self, num_heads: int, linears: Mapping[str, QuantizedLinear],
                 tensors: Mapping[str, TensorQuantization], *, sources: tuple[int, int, int] = (0, 0, 0),
                 score_ops: tuple[ScoreOp, ...] = (), arithmetic: str = "litert", mask_margin: float | None = None):
        self._kernel_set = rules.kernel_set(arithmetic)
        self.arithmetic = arithmetic
        self.num_heads = self.num_kv_heads = count("num_heads", num_heads)
        self.sources = tuple(sources)
        if self.sources not in SOURCES:
            raise ValueError(f"sources must be one of {SOURCES}; got {self.sources}")
        self.linears = dict(linears)
        self.tensors = {"probabilities": PROBABILITIES, **tensors}
        self.score_ops = tuple(score_ops)
        self.mask_margin = None if mask_margin is None else number("mask_margin", mask_margin)
        self._check_parameters()
        self.embed_dim, self.kdim, self.vdim = (self.linears[name].weight.shape[1] for name in INPUTS)
        self.head_dim = self.linears["query"].weight.shape[0] // self.num_heads
        self.value_dim = self.linears["value"].weight.shape[0] // self.num_heads
        last = self.linears.get("output", self.linears["value"])
        self.output_dim = last.weight.shape[0]
        self._prepare()

    def __repr__(self):
        return (f"{type(self).__name__}(num_heads={self.num_heads}, embed_dim={self.embed_dim}, kdim={self.kdim}, "
                f"vdim={self.vdim}, head_dim={self.head_dim}, value_dim={self.value_dim}, "
                f"output_dim={self.output_dim}, sources={self.sources}, "
                f"score_ops=[{', '.join(type(op).__name__ for op in self.score_ops)}], "
                f"arithmetic={self.arithmetic!r}, mask_margin={self.mask_margin})")

    def _check_parameters(self):
        H = self.num_heads
        for name in INPUTS:
            if name not in self.linears:
                raise ValueError(f"linears must hold {', '.join(map(repr, INPUTS))}; {name!r} is missing")
        for name in sorted(set(self.linears) - {*INPUTS, "output"}):
            raise ValueError(f"linears has an unexpected entry {name!r}")
        required = [f"{INPUTS[source]}_input" for source in sorted(set(self.sources))]
        required += [*INPUTS, "scores", "probabilities", "context"] + ["output"] * ("output" in self.linears)
        for name in required:
            if name not in self.tensors:
                raise ValueError(f"tensors must hold the quantization of {name!r}")
        for name in sorted(set(self.tensors) - set(required)):
            raise ValueError(f"tensors has an unexpected entry {name!r}; this layer has {', '.join(required)}")
        if self.tensors["probabilities"] != PROBABILITIES:
            raise ValueError(f"probabilities must have the scale 1/256 and the zero point -128 of every int8 softmax; "
                             f"got {self.tensors['probabilities']}")
        self.tensors = {name: self.tensors[name] for name in required}  # in the order of the computation
        q, k, v = (self.linears[name].weight for name in INPUTS)
        if q.shape[0] % H or q.shape[0] != k.shape[0] or v.shape[0] % H:
            raise ValueError(f"num_heads = {H} does not fit projections of {q.shape[0]} query, {k.shape[0]} key and "
                             f"{v.shape[0]} value features: query and key must agree, all be multiples of num_heads")
        for name, source in zip(INPUTS, self.sources, strict=True):
            width, other = (self.linears[linear].weight.shape[1] for linear in (name, INPUTS[source]))
            if width != other:
                raise ValueError(f"the {name} projection takes {width} features; the {INPUTS[source]} projection of "
                                 f"the same input takes {other}")
        if "output" in self.linears and self.linears["output"].weight.shape[1] != v.shape[0]:
            raise ValueError(f"the output projection takes {self.linears['output'].weight.shape[1]} features; "
                             f"the heads give {v.shape[0]}")

    # -- derived once: what the kernels read ---------------------------------------------------------------------------

    def _prepare(self):
        kernel_set, t = self._kernel_set, self.tensors
        linears = {}
        for name, linear in self.linears.items():
            real = rules.fully_connected_multiplier(kernel_set.fully_connected, self.input_of(name).scale, linear.scale,
                                                    t[name].scale)
            linears[name] = (linear.weight, real, linear.bias)

        def batch_matmul(lhs, rhs, output):
            rule = kernel_set.batch_matmul if rhs.zero_point == 0 else kernel_set.batch_matmul_asymmetric
            real = rules.batch_matmul_multiplier(rule, kernel_set.precision, lhs.scale, rhs.scale, output.scale)
            return rule, real[0]

        scores_rule, scores = batch_matmul(t["query"], t["key"], t["scores"])
        context_rule, context = batch_matmul(t["probabilities"], t["value"], t["context"])
        tables, classes, softmax_input = score_map(self.score_ops, t["scores"], kernel_set)
        if softmax_input.scale <= SMALLEST_SOFTMAX_SCALE:
            raise ValueError(f"the scores' scale must be above 2**-26, the resolution of TFLite's softmax; got "
                             f"{softmax_input.scale}")
        self._tables = tables if self.score_ops else None
        self._classes = np.ascontiguousarray(classes) if classes.size > 1 else None
        zero_points = {f"{name}_input": self.input_of(name).zero_point for name in INPUTS}
        zero_points |= {name: tensor.zero_point for name, tensor in t.items()}
        self._kernel = StaticLayer(
            self.num_heads, linears, scores, context, zero_points, kernel_set.fully_connected, scores_rule,
            context_rule, rules.SOFTMAX[kernel_set.softmax].table(softmax_input.scale),
            kernel_set.softmax == "fixed")

    def input_of(self, linear: str) -> TensorQuantization:
        """The quantization of the tensor that the linear layer called ``linear`` reads."""
        return self.tensors["context" if linear == "output" else f"{INPUTS[self.sources[INPUTS.index(linear)]]}_input"]

    # -- copies with one thing changed ---------------------------------------------------------------------------------

    def with_arithmetic(self, arithmetic: str) -> StaticMultiHeadAttention:
        """The same parameters under another kernel set."""
        return self._replace(arithmetic=arithmetic)

    def with_mask(self, mask) -> StaticMultiHeadAttention:
        """The layer that carries ``mask``: what an exported graph with that mask computes, bit for bit.

        A masked score gets the lowest code, -128, as the graph's SELECT_V2 gives it, and so keeps a trace of weight,
        ``exp(-scale * (max + 128))``. A mask passed to a call leaves masked keys out altogether.

        Parameters
        ----------
        mask : bool, broadcastable to (B, H, L, S)
            True = attend.

        Raises
        ------
        TypeError, ValueError
            For another kind of mask, and for a layer that was calibrated without masks: its lowest code may stand for a
            score like any other.
        """
        mask = np.asarray(mask)
        if mask.dtype != np.bool_:
            raise TypeError(f"mask must be bool (True = attend); got {mask.dtype}")
        if self.mask_margin == 0:
            raise ValueError("mask needs a layer that was calibrated with masks: the scores' range of this one leaves "
                             "no room below for masked scores; give quant.calibrate calls with attn_mask, "
                             "key_padding_mask or is_causal, or pass the mask to each call of this layer")
        return self._replace(score_ops=(*self.score_ops, SelectMask(mask)))

    def _replace(self, **changes) -> StaticMultiHeadAttention:
        arguments = dict(num_heads=self.num_heads, linears=self.linears, tensors=self.tensors, sources=self.sources,
                         score_ops=self.score_ops, arithmetic=self.arithmetic, mask_margin=self.mask_margin)
        return StaticMultiHeadAttention(**{**arguments, **changes})

    def _to_state(self):
        """(config, tensors): all that ``_from_state`` needs to build an equal layer."""
        arrays = {}
        for name, linear in self.linears.items():
            arrays |= {f"{name}.{part}": array for part in ("weight", "scale", "bias")
                       if (array := getattr(linear, part)) is not None}
        ops = []
        for i, op in enumerate(self.score_ops):
            row = {"op": type(op).__name__}
            for f in dataclasses.fields(op):
                value = getattr(op, f.name)
                if isinstance(value, np.ndarray):
                    arrays[f"score_ops.{i}.{f.name}"] = value
                else:
                    row[f.name] = value.to_json() if isinstance(value, TensorQuantization) else value
            ops.append(row)
        return {"num_heads": self.num_heads, "arithmetic": self.arithmetic, "sources": list(self.sources),
                "tensors": {name: t.to_json() for name, t in self.tensors.items()}, "score_ops": ops,
                "mask_margin": self.mask_margin}, arrays

    @classmethod
    def _from_state(cls, config, tensors):
        if not isinstance(config["tensors"], dict) or not all(isinstance(row, dict) for row in config["score_ops"]):
            raise ValueError("tensors must be an object, and score_ops a list of objects")
        groups = {}
        for name, array in tensors.items():
            group, _, part = name.rpartition(".")
            groups.setdefault(group, {})[part] = array
        ops = []
        for i, row in enumerate(config["score_ops"]):
            row = {**row, **groups.pop(f"score_ops.{i}", {})}
            kind = {op.__name__: op for op in (MulConstant, AddMask, SelectMask)}.get(row.pop("op"))
            if kind is None:
                raise ValueError(f"score_ops[{i}] must be MulConstant, AddMask or SelectMask")
            ops.append(kind(**{name: TensorQuantization(*value) if isinstance(value, list) else value
                               for name, value in row.items()}))
        return cls(config["num_heads"], {name: QuantizedLinear(**parts) for name, parts in groups.items()},
                   {name: TensorQuantization(*pair) for name, pair in config["tensors"].items()},
                   sources=tuple(config["sources"]), score_ops=tuple(ops), arithmetic=config["arithmetic"],
                   mask_margin=config["mask_margin"])

    # -- running -------------------------------------------------------------------------------------------------------

    def __call__(self, query, key=None, value=None, *, attn_mask=None, key_padding_mask=None, is_causal=False,
                 causal_alignment=None, out=None):
        """Attention on reals: quantize the inputs, ``run_int8``, dequantize.

        Parameters
        ----------
        query, key, value : float16, float32 or float64 arrays
            Otherwise as for ``run_int8``, like the masks. Infinite values saturate.
        out : (B, L, Eo) or (L, Eo) array, optional
            Takes the result; of the result's dtype.

        Returns
        -------
        (B, L, Eo) or (L, Eo) array
            Of the inputs' dtype. The row of a query is NaN when it, or a key or value it may see, holds NaN.
        """
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal,
                 "causal_alignment": causal_alignment}
        inputs = [None if x is None else np.asarray(x) for x in self._distinct(query, key, value)]
        codes = [None if x is None else self.quantize_input(x, name) for name, x in zip(INPUTS, inputs, strict=True)]
        result = self.dequantize_output(self.run_int8(*codes, **masks))
        dtype = result_dtype(*(x for x in inputs if x is not None))
        check_out(out, result.shape, dtype)
        nan = [None if x is None else np.isnan(x).any(-1) for x in inputs]
        if any(x is not None and x.any() for x in nan):
            result[self._nan_rows([nan[source] for source in self.sources], masks)] = np.nan
        return deliver(result, out, dtype)

    def _nan_rows(self, nan, masks) -> np.ndarray:
        """Whether NaN reaches a query, (..., L); ``nan``: which queries, keys and values hold any, (..., L or S)."""
        query, keys = nan[0], nan[1] | nan[2]
        mask = resolve_mask((*query.shape[:-1], self.num_heads, query.shape[-1], keys.shape[-1]), **masks)
        permitted = mask.permitted()
        seen = np.ones(mask.shape, bool) if permitted is None else np.broadcast_to(permitted, mask.shape)
        for op in self.score_ops:
            if isinstance(op, SelectMask):
                seen = seen & op.keep
        return query | (seen & keys.reshape(mask.shape[0], 1, 1, -1)).any((1, 3)).reshape(query.shape)

    def quantize_input(self, x, name: str = "query") -> np.ndarray:
        """int8 codes of a float input; ``name`` is "query", "key" or "value"."""
        x = np.asarray(x)
        if x.dtype == np.int8:
            raise TypeError(f"{name} must be a float array; got int8 (codes go to run_int8)")
        return self.tensors[f"{INPUTS[self.sources[INPUTS.index(name)]]}_input"].quantize(float_array(name, x))

    def dequantize_output(self, codes) -> np.ndarray:
        """float32 reals of ``run_int8``'s codes."""
        return self.tensors["output" if "output" in self.linears else "context"].dequantize(codes)

    def _distinct(self, query, key, value):
        """The inputs this layer reads, None where it reads an earlier one; refuses others."""
        given = [query, key, value]
        for i, name in enumerate(INPUTS):
            source = self.sources[i]
            if source < i:
                if given[i] is not None and given[i] is not given[source]:
                    raise ValueError(f"{name} must be left out: this layer was quantized with {INPUTS[source]} as its "
                                     f"{name}")
                given[i] = None
            elif given[i] is None:
                raise ValueError(f"{name} is required: this layer was quantized with a {name} of its own")
        return given

    def run_int8(self, query, key=None, value=None, *, attn_mask=None, key_padding_mask=None, is_causal=False,
                 causal_alignment=None, out=None) -> np.ndarray:
        """Attention on codes, equal to the named kernel set.

        Parameters
        ----------
        query : int8 (B, L, Eq) or (L, Eq)
        key : int8 (B, S, Ek), optional
            Required when the layer has an input of its own for it, and left out otherwise; likewise ``value``.
        value : int8 (B, S, Ev), optional
        attn_mask : bool, broadcastable to (B, H, L, S), optional
            True = attend. A masked key is not there at all; a row with no key gives a context of real 0.
        key_padding_mask : bool (B, S), optional
            True = a real key.
        is_causal : bool
        causal_alignment : {"upper_left", "lower_right"}, optional
            Required for causal attention with L != S.
        out : int8 (B, L, Eo), optional
            Where to write the result.

        Returns
        -------
        int8 (B, L, Eo) or (L, Eo)
        """
        if key is None and value is None and attn_mask is None and key_padding_mask is None and is_causal is False and (
                out is None and self._classes is None and type(query) is np.ndarray and query.dtype == np.int8
                and query.ndim == 3 and query.shape[2] == self.embed_dim and query.flags.carray and query.size
                and self.sources == (0, 0, 0) and self.output_dim):
            # what small layers are called with, again and again: self-attention, nothing masked
            result = np.empty((*query.shape[:2], self.output_dim), np.int8)
            return self._kernel(query, query, query, result, None, None, None, self._tables)
        inputs = self._distinct(query, key, value)
        arrays = [None if x is None else _codes(x, name) for name, x in zip(INPUTS, inputs, strict=True)]
        query, key, value = (arrays[source] for source in self.sources)
        lead, L, S = query.shape[:-2], query.shape[-2], key.shape[-2]
        for name, x, width in zip(INPUTS, (query, key, value), (self.embed_dim, self.kdim, self.vdim), strict=True):
            if x.ndim != query.ndim:
                raise ValueError(f"{name} must have as many axes as query, {query.ndim}; got shape {x.shape}")
            if x.shape[-1] != width:
                raise ValueError(f"{name} must have {width} features in its last axis; got shape {x.shape}")
        if key.shape[:-2] != lead or value.shape[:-1] != (*lead, S):
            raise ValueError(f"query, key and value must share the batch, and key and value their length; "
                             f"got {query.shape}, {key.shape}, {value.shape}")
        check_out(out, (*lead, L, self.output_dim), np.dtype(np.int8))
        if attn_mask is not None and np.asarray(attn_mask).dtype != np.bool_:
            raise TypeError(f"attn_mask must be bool for int8 (True = attend); got {np.asarray(attn_mask).dtype}; "
                            "for a mask with -inf pass mask == 0")
        mask = resolve_mask((*lead, self.num_heads, L, S), attn_mask, key_padding_mask, is_causal=is_causal,
                            causal_alignment=causal_alignment)
        B = mask.shape[0]
        result = np.empty((B, L, self.output_dim), np.int8)
        if result.size:
            query, key, value = (x.reshape(B, *x.shape[-2:]) for x in (query, key, value))
            keep, _, band = mask.for_kernels()
            classes = self._classes
            if classes is not None:
                fit_mask(classes, mask.shape)
            if S == 0:  # one key that is not there
                key, value = (np.zeros((B, 1, x.shape[-1]), np.int8) for x in (key, value))
                keep, band, classes = np.zeros((1, 1, 1, 1), np.bool_), None, None
            self._kernel(query, key, value, result, keep, band, classes, self._tables)
        return deliver(result.reshape(*lead, L, self.output_dim), out, np.dtype(np.int8))


def _codes(x, name: str) -> np.ndarray:
    """A C-contiguous int8 view or copy of an input."""
    x = np.asarray(x)
    if x.dtype != np.int8:
        raise TypeError(f"{name} must be int8; got {x.dtype} (floats go to the call itself)")
    if x.ndim not in (2, 3):
        raise ValueError(f"{name} must be (B, L, E) or (L, E); got shape {x.shape}")
    return np.ascontiguousarray(x)


def score_map(ops: tuple[ScoreOp, ...], scores: TensorQuantization, kernel_set: rules.KernelSet
              ) -> tuple[np.ndarray, np.ndarray, TensorQuantization]:
    """Any chain of elementwise operators on int8 scores, as one table per class of position.

    Returns
    -------
    tables : int8 (n, 256)
        ``tables[class, code + 128]`` is the code the softmax sees.
    classes : uint8, broadcastable to (B, H, L, S)
    quantization : TensorQuantization
        Of the tables' entries.
    """
    tables = np.arange(CODE_MIN, CODE_MAX + 1, dtype=np.int8)[None]
    classes = np.zeros((1, 1, 1, 1), np.int64)
    for op in ops:
        q = (scores.scale, scores.zero_point)
        if isinstance(op, MulConstant):
            to = (op.output.scale, op.output.zero_point)
            constant = (op.constant.scale, op.constant.zero_point)
            tables = rules.mul_codes(kernel_set.mul, kernel_set.precision, tables, q, op.code, constant, to)
            scores = op.output
            continue
        # one class per pair of a class so far and a value of the mask
        mask = op.codes if isinstance(op, AddMask) else op.keep
        values, index = np.unique(mask, return_inverse=True)
        index = index.reshape((1,) * (4 - mask.ndim) + mask.shape)
        classes = classes * len(values) + index
        if isinstance(op, AddMask):
            to = (op.output.scale, op.output.zero_point)
            mapped = [rules.add_codes(kernel_set.add, tables, q, value, (op.mask.scale, op.mask.zero_point), to)
                      for value in values]
            scores = op.output
        else:
            mapped = [tables if keep else np.full_like(tables, op.fill) for keep in values]
        tables = np.stack(mapped, axis=1).reshape(-1, 256)
    if len(tables) > 256:
        raise ValueError(f"score_ops distinguish {len(tables)} kinds of position; at most 256 are supported")
    return tables, classes.astype(np.uint8), scores
