"""Multi-head attention in int8 throughout, every scale fixed: equal, bit for bit, to a TFLite kernel set."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

from edgeattn import arithmetic as rules
from edgeattn.arithmetic import CODE_MIN
from edgeattn.checks import (
    FLOAT32,
    as_array,
    check_out,
    checked_softcap,
    count,
    flag,
    float_array,
    is_one_of,
    number,
    result_dtype,
    write_result,
)
from edgeattn.device import place
from edgeattn.executors.numpy_int8 import Int8Ops
from edgeattn.kernels.cpu.layer_int8 import StaticLayer
from edgeattn.kernels.cpu.quantize import Quantizer
from edgeattn.kernels.cpu.records import KernelMask
from edgeattn.layers.attention import forward
from edgeattn.layers.call import check_cache, resolve_call_mask
from edgeattn.layers.fast_path import attend_again
from edgeattn.masks import NO_WINDOW, bool_mask, check_mask_shapes, resolve_mask
from edgeattn.ops import Sequences
from edgeattn.prepared import PreparedCalls, is_read_as_it_is
from edgeattn.quantized.layer import INPUTS, QuantizedMultiHeadAttention
from edgeattn.quantized.parameters import (
    PROBABILITIES,
    QuantizedLinear,
    TensorQuantization,
    check_scales,
    linears_state,
)
from edgeattn.quantized.score_ops import AddMask, MulConstant, ScoreOp, SelectMask, check_masks, fit_mask, score_map

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, SupportsIndex, TypeAlias

    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import Self, Unpack

    from edgeattn.kv_cache import KVCache
    from edgeattn.layers.call import Pieces
    from edgeattn.layers.options import CallOptions, CodeOptions
    from edgeattn.masks import Mask
    from edgeattn.types import (
        Arithmetic,
        Bools,
        CausalAlignment,
        Codes,
        Device,
        Flag,
        Float32s,
        Floats,
        Input,
        MaskOptions,
        MaskShapes,
        Real,
        Shape,
        Sources,
        StaticOnDevice,
        Window,
    )

    Requantization: TypeAlias = tuple[Callable[..., Any], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]

_INT8 = np.dtype(np.int8)
SOURCES = ((0, 0, 0), (0, 1, 1), (0, 1, 2))
# gemmlowp's softmax takes differences of scores in Q5.26; the runtimes that use it abort on a scale below that.
SMALLEST_SOFTMAX_SCALE = 2.0**-26


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
    lowest_single_score : float, optional
        The lowest score of a row with a single permitted key at calibration, None without one or when it is not known.
        The scores' range need not hold it, for such a row gives its key the whole weight; ``with_mask`` makes it do so.
    """

    scheme: Literal["static"] = "static"

    def __init__(self, num_heads: SupportsIndex, linears: Mapping[str, QuantizedLinear],
                 tensors: Mapping[str, TensorQuantization], *, sources: Sources = (0, 0, 0),
                 score_ops: Sequence[ScoreOp] = (), arithmetic: Arithmetic = "litert",
                 mask_margin: Real | None = None, lowest_single_score: Real | None = None):
        self.kernel_set = rules.kernel_set(arithmetic)
        self.arithmetic: Arithmetic = arithmetic
        self.num_heads = self.num_kv_heads = count("num_heads", num_heads)
        self.sources = tuple(sources)
        if self.sources not in SOURCES:
            raise ValueError(f"sources must be one of {SOURCES}; got {self.sources}")
        self.linears = dict(linears)
        self.tensors = {"probabilities": PROBABILITIES, **tensors}
        self.score_ops = tuple(score_ops)
        self.mask_margin = None if mask_margin is None else number("mask_margin", mask_margin)
        self.lowest_single_score = (
            None if lowest_single_score is None else number("lowest_single_score", lowest_single_score))
        self._check_parameters()
        self.embed_dim, self.kdim, self.vdim = (self.linears[name].weight.shape[1] for name in INPUTS)
        self.head_dim = self.linears["query"].weight.shape[0] // self.num_heads
        self.value_dim = self.linears["value"].weight.shape[0] // self.num_heads
        last = self.linears.get("output", self.linears["value"])
        self.output_dim = last.weight.shape[0]
        self._prepare()

    def __repr__(self) -> str:
        return (f"{type(self).__name__}(num_heads={self.num_heads}, embed_dim={self.embed_dim}, kdim={self.kdim}, "
                f"vdim={self.vdim}, head_dim={self.head_dim}, value_dim={self.value_dim}, "
                f"output_dim={self.output_dim}, sources={self.sources}, "
                f"score_ops=[{', '.join(type(op).__name__ for op in self.score_ops)}], "
                f"arithmetic={self.arithmetic!r}, mask_margin={self.mask_margin})")

    def _check_parameters(self) -> None:
        H = self.num_heads
        name: str
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
        check_scales(self.tensors)
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
        check_masks(self.score_ops, H, "masks in score_ops")

    # -- derived once: what the kernels read ---------------------------------------------------------------------------

    def kernel_parameters(self) -> dict[str, Any]:
        """What the kernels of any target read, as ``StaticLayer`` names it."""
        kernel_set, t = self.kernel_set, self.tensors
        linears = {}
        for name, linear in self.linears.items():
            real = rules.fully_connected_multiplier(kernel_set.fully_connected, self.input_of(name).scale, linear.scale,
                                                    t[name].scale)
            linears[name] = (linear.weight, real, linear.bias)

        def batch_matmul(lhs: TensorQuantization, rhs: TensorQuantization, output: TensorQuantization
                         ) -> tuple[str, np.float64]:
            rule = kernel_set.batch_matmul if rhs.zero_point == 0 else kernel_set.batch_matmul_asymmetric
            real = rules.batch_matmul_multiplier(rule, kernel_set.precision, lhs.scale, rhs.scale, output.scale)
            return rule, real[0]

        scores_rule, scores = batch_matmul(t["query"], t["key"], t["scores"])
        context_rule, context = batch_matmul(t["probabilities"], t["value"], t["context"])
        zero_points = {f"{name}_input": self.input_of(name).zero_point for name in INPUTS}
        zero_points |= {name: tensor.zero_point for name, tensor in t.items()}
        return dict(num_heads=self.num_heads, linears=linears, scores=scores, context=context, zero_points=zero_points,
                    project_rule=kernel_set.fully_connected, score_rule=scores_rule, context_rule=context_rule,
                    softmax_table=self.softmax_table, softmax=kernel_set.softmax)

    @functools.cached_property
    def requantizations(self) -> dict[str, Requantization]:
        """How sums of products become codes, by the tensor's name: (rule, q31, shift, real multiplier)."""
        given = self.kernel_parameters()
        found = {name: (given["project_rule"], real) for name, (_, real, _) in given["linears"].items()}
        found |= {name: (given[rule], np.array([given[name]]))
                  for name, rule in (("scores", "score_rule"), ("context", "context_rule"))}
        return {name: (rules.REQUANTIZE[rule], *(a.astype(np.int64) for a in rules.fixed_point(real)), real)
                for name, (rule, real) in found.items()}

    def _prepare(self) -> None:
        self.score_map = score_luts, lut_index, softmax_input = score_map(
            self.score_ops, self.tensors["scores"], self.kernel_set)
        if softmax_input.scale <= SMALLEST_SOFTMAX_SCALE:
            raise ValueError(f"the scores' scale must be above 2**-26, the resolution of TFLite's softmax; got "
                             f"{softmax_input.scale}")
        self.softmax_table = rules.SOFTMAX[self.kernel_set.softmax].table(softmax_input.scale)
        self.score_luts = score_luts if self.score_ops else None
        self.lut_index = np.ascontiguousarray(lut_index) if lut_index.size > 1 else None
        self._kernel = StaticLayer(**self.kernel_parameters())
        self.prepared_calls = PreparedCalls(dtype=_INT8)

    @overload
    def to(self, device: Literal["cpu"]) -> Self: ...

    @overload
    def to(self, device: Literal["cuda"]) -> StaticOnDevice: ...

    def to(self, device: Device) -> Self | StaticOnDevice:
        """The layer on ``device``: "cpu", or "cuda", a GPU (docs/cuda.md); ``.layer`` of that is this one."""
        placed: Self | StaticOnDevice = place(self, device)
        return placed

    @property
    def projections(self) -> dict[str, QuantizedLinear]:
        """The layer's linear maps by their names, as every attention layer has them: ``linears``."""
        return self.linears

    def score_lut_index(self, shape: Shape) -> NDArray[np.uint8]:
        """Which of the tables of ``score_map`` each score of ``shape`` (B, H, L, S) takes."""
        return fit_mask(self.score_map[1], shape)

    def input_of(self, linear: str) -> TensorQuantization:
        """The quantization of the tensor that the linear layer called ``linear`` reads."""
        return self.tensors["context" if linear == "output" else f"{INPUTS[self.sources[INPUTS.index(linear)]]}_input"]

    # -- copies with one thing changed ---------------------------------------------------------------------------------

    def with_arithmetic(self, arithmetic: Arithmetic) -> StaticMultiHeadAttention:
        """The same parameters under another kernel set."""
        return self._replace(arithmetic=arithmetic)

    def with_mask(self, mask: ArrayLike) -> StaticMultiHeadAttention:
        """The layer that carries ``mask``: what an exported graph with that mask computes, bit for bit.

        A masked score gets the lowest code, -128, as the graph's SELECT_V2 gives it, and so keeps a trace of weight,
        ``exp(-scale * (max + 128))``. A mask passed to a call leaves masked keys out altogether. Where the mask leaves
        a row a single key, whose score must stand above that code, the scores' range is extended to ``mask_margin``
        below the lowest such score of calibration.

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
        mask = as_array("mask", mask)
        if mask.dtype != np.bool_:
            raise TypeError(f"mask must be bool (True = attend); got {mask.dtype}")
        if self.mask_margin is not None and any(isinstance(op, AddMask) for op in self.score_ops):  # calibrated here
            raise ValueError("mask needs a layer whose scores get no bias: after that no room is left below for masked "
                             "scores; pass the mask to each call of this layer")
        if self.mask_margin == 0:
            raise ValueError("mask needs a layer that was calibrated with masks: the scores' range of this one leaves "
                             "no room below for masked scores; give quant.calibrate calls with attn_mask, "
                             "key_padding_mask or is_causal, or pass the mask to each call of this layer")
        score_ops = (*self.score_ops, SelectMask(mask))
        check_masks(score_ops, self.num_heads, "mask")
        return self._replace(score_ops=score_ops, tensors=self._tensors_under(score_ops))

    def _tensors_under(self, score_ops: tuple[ScoreOp, ...]) -> dict[str, TensorQuantization]:
        """``tensors``, the scores' range wide enough for what ``score_ops`` permit alone in a row."""
        if self.lowest_single_score is None or not self.mask_margin:
            return self.tensors
        permitted = functools.reduce(np.logical_and, (op.keep for op in score_ops if isinstance(op, SelectMask)))
        if not (np.atleast_1d(permitted).sum(-1) == 1).any():
            return self.tensors
        scores = self.tensors["scores"]
        low, high = (float(scores.dequantize(code)) for code in (CODE_MIN, rules.CODE_MAX))
        needed = self.lowest_single_score - self.mask_margin
        if needed >= low:
            return self.tensors
        return {**self.tensors, "scores": TensorQuantization.over(needed, high)}

    def _replace(self, **changes: Any) -> StaticMultiHeadAttention:
        arguments: dict[str, Any] = dict(
            num_heads=self.num_heads, linears=self.linears, tensors=self.tensors, sources=self.sources,
            score_ops=self.score_ops, arithmetic=self.arithmetic, mask_margin=self.mask_margin,
            lowest_single_score=self.lowest_single_score)
        return StaticMultiHeadAttention(**{**arguments, **changes})

    def to_state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """(config, tensors): all that ``from_state`` needs to build an equal layer."""
        arrays = linears_state(self.linears)
        ops = []
        for i, op in enumerate(self.score_ops):
            row: dict[str, Any] = {"op": type(op).__name__}
            for name, value in vars(op).items():
                if isinstance(value, np.ndarray):
                    arrays[f"score_ops.{i}.{name}"] = value
                else:
                    row[name] = value.to_json() if isinstance(value, TensorQuantization) else value
            ops.append(row)
        return {"num_heads": self.num_heads, "arithmetic": self.arithmetic, "sources": list(self.sources),
                "tensors": {name: t.to_json() for name, t in self.tensors.items()}, "score_ops": ops,
                "mask_margin": self.mask_margin, "lowest_single_score": self.lowest_single_score}, arrays

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, ArrayLike]) -> Self:
        """The layer of which ``to_state`` gave these."""
        if not isinstance(config["tensors"], dict) or not all(isinstance(row, dict) for row in config["score_ops"]):
            raise ValueError("tensors must be an object, and score_ops a list of objects")
        groups: dict[str, dict[str, Any]] = {}
        for name, array in tensors.items():
            group, _, part = name.rpartition(".")
            groups.setdefault(group, {})[part] = array
        ops: list[ScoreOp] = []
        for i, row in enumerate(config["score_ops"]):
            row = {**row, **groups.pop(f"score_ops.{i}", {})}
            kinds: dict[str, Any] = {op.__name__: op for op in (MulConstant, AddMask, SelectMask)}
            kind = kinds.get(row.pop("op"))
            if kind is None:
                raise ValueError(f"score_ops[{i}] must be MulConstant, AddMask or SelectMask")
            ops.append(kind(**{name: TensorQuantization(*value) if isinstance(value, list) else value
                               for name, value in row.items()}))
        return cls(config["num_heads"], {name: QuantizedLinear(**parts) for name, parts in groups.items()},
                   {name: TensorQuantization(*pair) for name, pair in config["tensors"].items()},
                   sources=tuple(config["sources"]), score_ops=tuple(ops), arithmetic=config["arithmetic"],
                   mask_margin=config["mask_margin"], lowest_single_score=config.get("lowest_single_score"))

    # -- running -------------------------------------------------------------------------------------------------------

    @overload
    def __call__(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 need_weights: Literal[False] = False, **options: Unpack[CallOptions]) -> Floats: ...

    @overload
    def __call__(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 need_weights: Literal[True], **options: Unpack[CallOptions]) -> tuple[Floats, Floats]: ...

    @overload
    def __call__(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 need_weights: Flag, **options: Unpack[CallOptions]) -> Floats | tuple[Floats, Floats]: ...

    def __call__(
        self,
        query: Any,  # an ArrayLike; where the kernel reads it as it is, an array
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        *,
        attn_mask: ArrayLike | None = None,
        key_padding_mask: ArrayLike | None = None,
        is_causal: Flag = False,
        causal_alignment: CausalAlignment | None = None,
        window_size: Window = NO_WINDOW,
        softcap: Real = 0.0,
        alibi_slopes: ArrayLike | None = None,
        kv_cache: KVCache | None = None,
        need_weights: Flag = False,
        average_attn_weights: Flag = False,
        out: Floats | None = None,
    ) -> Floats | tuple[Floats, Floats]:
        """Attention on reals: quantize the inputs, ``run_int8``, dequantize.

        Parameters
        ----------
        query, key, value : float16, float32 or float64 arrays
            Otherwise as for ``run_int8``, like the masks. Infinite values saturate.
        softcap, alibi_slopes
            Of float and dynamic layers: refused unless 0 and None.
        average_attn_weights : bool
            Return the mean of the probabilities over the heads.
        out : (B, L, Eo) or (L, Eo) array, optional
            Takes the result; of the result's dtype.

        Returns
        -------
        (B, L, Eo) or (L, Eo) array
            Of the inputs' dtype. The row of a query is NaN when it, or a key or value it may see, holds NaN; with
            ``kv_cache``, whose codes have no NaN, it is refused.
        (B, H, L, S) or (H, L, S) array
            The probabilities, multiples of 1/256, only with ``need_weights``; without the axis H when averaged.
        """
        if type(softcap) is not float or softcap or alibi_slopes is not None:
            _refuse(softcap, alibi_slopes)
        if (key is None and value is None and self.sources == (0, 0, 0) and need_weights is False
                and average_attn_weights is False and is_read_as_it_is(query)):
            check_out(out, (*query.shape[:-1], self.output_dim), FLOAT32)
            codes, some_nan = self._source_quantizer.to_codes(query)
            if not some_nan:
                reals = self._last_quantizer.to_reals(
                    self.run_int8(codes, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal,
                                  causal_alignment=causal_alignment, window_size=window_size, kv_cache=kv_cache))
                return write_result(reals, out, FLOAT32)
        average = flag("average_attn_weights", average_attn_weights)
        masks: MaskOptions = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal,
                              "causal_alignment": causal_alignment, "window_size": window_size}
        inputs: list[Any] = [None if x is None else as_array(name, x)
                  for name, x in zip(INPUTS, self.distinct_inputs(query, key, value), strict=True)]
        codes = [None if x is None else self.quantize_input(x, name) for name, x in zip(INPUTS, inputs, strict=True)]
        nan: list[Any] = [None if x is None else np.isnan(x).any(-1) for x in inputs]
        dtype = result_dtype(*(x for x in inputs if x is not None))
        check_out(out, (*inputs[0].shape[:-1], self.output_dim), dtype)
        some_nan = any(x is not None and x.any() for x in nan)
        if some_nan and kv_cache is not None:
            raise ValueError("query, key and value must hold no NaN with kv_cache: codes cannot keep it")
        given = self.run_int8(*codes, **masks, kv_cache=kv_cache, need_weights=need_weights)
        context, weights = given if isinstance(given, tuple) else (given, None)
        result = self.dequantize_output(context)
        if some_nan:
            result[self._nan_rows([nan[source] for source in self.sources], masks)] = np.nan
        delivered = write_result(result, out, dtype)
        if weights is None:
            return delivered
        probabilities = self.tensors["probabilities"].dequantize(weights)
        return delivered, write_result(probabilities.mean(axis=-3) if average else probabilities, None, dtype)

    def _nan_rows(self, nan: Sequence[Bools], masks: MaskOptions) -> Bools:
        """Whether NaN reaches a query, (..., L); ``nan``: which queries, keys and values hold any, (..., L or S)."""
        query, keys = nan[0], nan[1] | nan[2]
        mask = resolve_mask((*query.shape[:-1], self.num_heads, query.shape[-1], keys.shape[-1]), **masks)
        permitted = mask.permitted()
        seen = np.ones(mask.shape, bool) if permitted is None else np.broadcast_to(permitted, mask.shape)
        for op in self.score_ops:
            if isinstance(op, SelectMask):
                seen = seen & op.keep
        reached: Bools = (seen & keys.reshape(mask.shape[0], 1, 1, -1)).any((1, 3)).reshape(query.shape)
        return query | reached

    def quantize_input(self, x: ArrayLike, name: Input = "query") -> Codes:
        """int8 codes of a float input; ``name`` is "query", "key" or "value"."""
        if not is_one_of(name, INPUTS):
            raise ValueError(f"name must be 'query', 'key' or 'value'; got {name!r}")
        x = as_array(name, x)
        if x.dtype == np.int8:
            raise TypeError(f"{name} must be a float array; got int8 (codes go to run_int8)")
        return self.tensors[f"{INPUTS[self.sources[INPUTS.index(name)]]}_input"].quantize(float_array(name, x))

    def dequantize_output(self, codes: ArrayLike) -> Float32s:
        """float32 reals of ``run_int8``'s codes."""
        return self._last.dequantize(codes)

    @property
    def _last(self) -> TensorQuantization:
        """The quantization of the result."""
        return self.tensors["output" if "output" in self.linears else "context"]

    @functools.cached_property
    def _source_quantizer(self) -> Quantizer:
        """What makes codes of the one input of a layer with one."""
        source = self.tensors["query_input"]
        return Quantizer(source.scale, source.zero_point)

    @functools.cached_property
    def _last_quantizer(self) -> Quantizer:
        """What makes reals of the result."""
        return Quantizer(self._last.scale, self._last.zero_point)

    def distinct_inputs(self, query: Any, key: Any, value: Any) -> list[Any]:
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

    @overload
    def run_int8(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 need_weights: Literal[False] = False, **options: Unpack[CodeOptions]) -> Codes: ...

    @overload
    def run_int8(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 need_weights: Literal[True], **options: Unpack[CodeOptions]) -> tuple[Codes, Codes]: ...

    @overload
    def run_int8(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 need_weights: Flag, **options: Unpack[CodeOptions]) -> Codes | tuple[Codes, Codes]: ...

    def run_int8(
        self,
        query: Any,  # an ArrayLike, and from the checks on an array
        key: Any = None,
        value: Any = None,
        *,
        attn_mask: ArrayLike | None = None,
        key_padding_mask: ArrayLike | None = None,
        is_causal: Flag = False,
        causal_alignment: CausalAlignment | None = None,
        window_size: Window = NO_WINDOW,
        kv_cache: KVCache | None = None,
        need_weights: Flag = False,
        out: Codes | None = None,
    ) -> Codes | tuple[Codes, Codes]:
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
        window_size : (int, int)
            (left, right): a query at position p sees keys p - left to p + right; -1 = unbounded.
        kv_cache : KVCache, optional
            From ``KVCache.for_layer(layer, ...)``: keeps the codes of keys and values, otherwise as for
            ``MultiHeadAttention``. Results do not depend on how a sequence was cut into chunks, bit for bit.
        need_weights : bool
            Return the codes of the probabilities too.
        out : int8 (B, L, Eo), optional
            Where to write the result.

        Returns
        -------
        int8 (B, L, Eo) or (L, Eo)
        int8 (B, H, L, S) or (H, L, S)
            Only with ``need_weights``: the probability of a code is (code + 128) / 256.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        signature = None
        if (need_weights is False and (key is not None or not self.sources[1])
                and (value is not None or self.sources[2] < 2)):
            if (key is None and value is None and attn_mask is None and key_padding_mask is None and kv_cache is None
                    and is_causal is False and causal_alignment is None and window_size is NO_WINDOW and out is None
                    and (again := self.prepared_calls.attend(query)) is not None):
                return again
            again, signature = attend_again(self, query, key, value, out, kv_cache, attn_mask, key_padding_mask,
                                            is_causal, causal_alignment, window_size, None)
            if again is not None:
                return again
        need_weights = flag("need_weights", need_weights)
        query, key, value = self._check_codes(query, key, value)
        lead, L, S = query.shape[:-2], query.shape[-2], key.shape[-2]
        check_out(out, (*lead, L, self.output_dim), _INT8)
        if attn_mask is not None:
            attn_mask = bool_mask(attn_mask)
        if signature is not None and kv_cache is None and query.size and key.size and self.output_dim:
            first = self._run_first(signature, query, key, value, attn_mask, key_padding_mask, is_causal,
                                    causal_alignment, window_size)
            if first is not None:
                return write_result(first, out, _INT8)
        if kv_cache is not None:
            self._check_cache(kv_cache, causal_alignment)
        mask, pieces = resolve_call_mask(
            (*lead, self.num_heads, L, S), kv_cache, attn_mask=attn_mask, key_padding_mask=key_padding_mask,
            is_causal=is_causal, causal_alignment=causal_alignment, window_size=window_size)
        B = mask.shape[0]
        if not lead:
            given, query = (query, key, value), query[None]
            key = query if given[1] is given[0] else key[None]
            value = key if given[2] is given[1] else value[None]
        result = np.empty((B, L, self.output_dim), np.int8)
        record: dict[str, Codes] = {}
        if need_weights:
            with contextlib.nullcontext() if kv_cache is None else kv_cache.transaction():
                result = forward(Int8Ops(self, record, {"probabilities"}), self, query, key, value,
                                 Sequences([mask], cache=kv_cache, pieces=pieces))
        elif kv_cache is not None:
            with kv_cache.transaction():
                self._run_cached(query, key, value, mask, kv_cache, pieces, result)
            self.prepared_calls.learn_step(signature, result.reshape(*lead, L, self.output_dim))
        elif result.size:
            self._run_fused(query, key, value, mask, result)
        result = write_result(result.reshape(*lead, L, self.output_dim), out, _INT8)
        weights = record.get("probabilities")
        return result if weights is None else (result, weights.reshape(*lead, *weights.shape[1:]))

    def _run_first(self, signature: tuple[Any, ...], query: Codes, key: Codes, value: Codes, attn_mask: Bools | None,
                   key_padding_mask: Any, is_causal: Flag, causal_alignment: CausalAlignment | None,
                   window_size: Window) -> Codes | None:
        """The result of a call with a signature; the next is prepared. None where masks are not read as they are."""
        *lead, L, _ = query.shape
        scores = *lead, self.num_heads, L, key.shape[-2]
        mask = resolve_mask(scores, is_causal=is_causal, causal_alignment=causal_alignment, window_size=window_size)
        check_mask_shapes(scores, attn_mask, key_padding_mask)
        if self.lut_index is not None:
            fit_mask(self.lut_index, mask.shape)
        q, k, v = query, key, value
        if not lead:
            q = query[None]
            k = q if key is query else key[None]
            v = k if value is key else value[None]
        prepared = self.prepared_calls.learn(
            signature, functools.partial(self._kernel_for, q, k, v), scores, (*lead, L, self.output_dim), mask,
            attn_mask, key_padding_mask)
        return None if prepared is None else prepared.run(query, key, value, None, attn_mask, key_padding_mask)

    def _check_codes(self, query: Any, key: Any, value: Any) -> tuple[Codes, Codes, Codes]:
        """The three inputs as int8 arrays of agreeing shapes."""
        if (key is None and value is None and self.sources == (0, 0, 0) and is_read_as_it_is(query, _INT8)
                and query.ndim in (2, 3) and query.shape[-1] == self.embed_dim):
            return query, query, query
        inputs = self.distinct_inputs(query, key, value)
        arrays: list[Any] = [None if x is None else _codes(x, name) for name, x in zip(INPUTS, inputs, strict=True)]
        query, key, value = (arrays[source] for source in self.sources)
        if key is query and value is query and query.shape[-1] == self.embed_dim:
            return query, key, value
        lead, S = query.shape[:-2], key.shape[-2]
        for name, x, width in zip(INPUTS, (query, key, value), (self.embed_dim, self.kdim, self.vdim), strict=True):
            if x.ndim != query.ndim:
                raise ValueError(f"{name} must have as many axes as query, {query.ndim}; got shape {x.shape}")
            if x.shape[-1] != width:
                raise ValueError(f"{name} must have {width} features in its last axis; got shape {x.shape}")
        if key.shape[:-2] != lead or value.shape[:-1] != (*lead, S):
            raise ValueError(f"query, key and value must share the batch, and key and value their length; "
                             f"got {query.shape}, {key.shape}, {value.shape}")
        return query, key, value

    @functools.cached_property
    def cache_scales(self) -> tuple[float, float]:
        """The scales of keys and values, for ``KVCache.for_layer``."""
        for name in ("key", "value"):
            if self.tensors[name].zero_point != 0:
                raise ValueError(f"layer must have keys and values without a zero point for a cache; got "
                                 f"{self.tensors[name].zero_point} of its {name}: quantize the float layer with "
                                 "quant.quantize, or give each call the whole sequence")
        return float(self.tensors["key"].scale), float(self.tensors["value"].scale)

    def _check_cache(self, cache: KVCache, causal_alignment: CausalAlignment | None) -> None:
        check_cache(self, cache, causal_alignment)
        self.check_codes_of(cache)

    def check_codes_of(self, cache: KVCache) -> None:
        """Raise unless `cache`, of this layer's sizes, holds codes of this layer's scales."""
        if cache.scales != self.cache_scales:
            raise ValueError(f"kv_cache must have this layer's scales {self.cache_scales}, got {cache.scales}; make it "
                             "with KVCache.for_layer(layer, ...)")
        if self.lut_index is not None:
            raise ValueError("kv_cache needs a layer without a mask of its own, which is for one length; pass masks to "
                             "each call")

    @property
    def fused_kernel(self) -> StaticLayer:
        """The kernel that is the whole layer: (q, k, v, out, keep, band, lut_index, score_luts, cached)."""
        return self._kernel

    def _kernel_for(self, query: Codes, key: Codes, value: Codes, masks: MaskShapes) -> Any:
        """The kernel for inputs and masks of these shapes."""
        return self._kernel.prepare(query, key, value, masks, self.lut_index, self.score_luts)

    def _run_fused(self, query: Codes, key: Codes, value: Codes, mask: Mask, result: Codes) -> None:
        given = mask.for_kernels()
        keep, band = given.keep, given.band
        lut_index = self.lut_index
        if lut_index is not None:
            fit_mask(lut_index, mask.shape)
        if mask.shape[3] == 0:  # one key that is not there
            key, value = (np.zeros((len(x), 1, x.shape[-1]), np.int8) for x in (key, value))
            keep, band, lut_index = np.zeros((1, 1, 1, 1), np.bool_), None, None
        self._kernel(query, key, value, result, keep, band, lut_index, self.score_luts)

    def attend_codes(self, x: Codes, mask: Mask, result: Codes, sequences: Sequences) -> None:
        """Attention of x (B, L, E) to itself under `mask`, and to what the cache of `sequences` holds, to `result`."""
        if not result.size:
            return
        if sequences.cache is None:
            self._run_fused(x, x, x, mask, result)
        else:
            self.check_codes_of(sequences.cache)
            self._run_cached(x, x, x, mask, sequences.cache, list(sequences.pieces), result)

    def attend_on(self, x: Codes, mask: Mask, result: Codes) -> Callable[[], object]:
        """A function that does the same without a cache, see `PreparedCall.on`."""
        given = mask.for_kernels()
        if self.lut_index is not None:
            fit_mask(self.lut_index, mask.shape)
        run: Callable[[], object] = self._kernel.prepare(
            x, x, x, KernelMask(given.keep, band=given.band).shapes, self.lut_index, self.score_luts).on(
                x, x, x, result, given.keep)
        return run

    def take_step(self, x: Codes, cache: KVCache) -> Codes:
        """Attention without masks of one token per batch entry, (B, 1, E) or (1, E), and all before it: (B, 1, Eo)."""
        out, before = np.empty((cache.batch, 1, self.output_dim), np.int8), cache.length
        try:
            cache.take_slots(1)
            self._kernel.step(cache.plans, x, out, cache.key_slots, cache.value_slots, cache.visible_range(),
                              self.score_luts)
        except BaseException:
            cache.restore(before)
            raise
        return out

    def _run_cached(self, query: Codes, key: Codes, value: Codes, mask: Mask, cache: KVCache, pieces: Pieces,
                    result: Codes) -> None:
        for rows, tokens in pieces:
            xk = np.ascontiguousarray(key[:, slice(*tokens)])
            xv = xk if value is key else np.ascontiguousarray(value[:, slice(*tokens)])
            xq = xk if query is key and rows == tokens else np.ascontiguousarray(query[:, slice(*rows)])
            cache.take_slots(tokens[1] - tokens[0])
            given = mask.part(rows, (cache.start, cache.length)).for_kernels()
            keep, band = given.keep, given.band
            held = cache.length - cache.start
            if held == 0:  # one key that is not there
                held, keep, band = 1, np.zeros((1, 1, 1, 1), np.bool_), None
            some = np.empty((*xq.shape[:2], self.output_dim), np.int8)
            self._kernel(xq, xk, xv, some, keep, band, None, self.score_luts,
                         (cache.key_slots, cache.value_slots, cache.first_slot, held))
            result[:, slice(*rows)] = some


def _refuse(softcap: Real, alibi_slopes: ArrayLike | None) -> None:
    """Raise unless both leave the scores as they are."""
    given = [("softcap", "0")] if checked_softcap(softcap) else []
    given += [("alibi_slopes", "None")] if alibi_slopes is not None else []
    for name, none in given:
        raise ValueError(f"{name} must be {none} for a static int8 layer: its scores are codes, and no TFLite kernel "
                         "set has it; layers of quant.quantize(layer, scheme='dynamic') take it")


def _codes(x: ArrayLike, name: str) -> Codes:
    """A C-contiguous int8 view or copy of an input."""
    x = as_array(name, x)
    if x.dtype != np.int8:
        raise TypeError(f"{name} must be int8; got {x.dtype} (floats go to the call itself)")
    if x.ndim not in (2, 3):
        raise ValueError(f"{name} must be (B, L, E) or (L, E); got shape {x.shape}")
    return np.ascontiguousarray(x)
