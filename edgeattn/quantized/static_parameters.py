"""What a static layer holds, and what the kernels read of it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn import arithmetic as rules
from edgeattn.arithmetic import CODE_MIN
from edgeattn.checks import as_array, count, number
from edgeattn.kernels.cpu.layer_int8 import StaticLayer
from edgeattn.prepared import PreparedCalls
from edgeattn.quantized.layer import INPUTS, QuantizedMultiHeadAttention
from edgeattn.quantized.parameters import (
    PROBABILITIES,
    QuantizedLinear,
    TensorQuantization,
    check_scales,
    linears_state,
)
from edgeattn.quantized.score_ops import (
    SCORE_OPS,
    AddMask,
    MulConstant,
    ScoreOp,
    SelectMask,
    check_masks,
    check_scaling,
    fit_mask,
    score_map,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, SupportsIndex, TypeAlias

    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import Self

    from edgeattn.types import Arithmetic, Codes, Real, Shape, Sources

    Requantization: TypeAlias = tuple[Callable[..., Any], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]

SOURCES = ((0, 0, 0), (0, 1, 1), (0, 1, 2))
# gemmlowp's softmax takes differences of scores in Q5.26; the runtimes that use it abort on a scale below that.
SMALLEST_SOFTMAX_SCALE = 2.0**-26


class StaticParameters(QuantizedMultiHeadAttention):
    """The parameters of a ``StaticMultiHeadAttention``, which names them; its state in files, its copies."""

    def __init__(self, num_heads: SupportsIndex, linears: Mapping[str, QuantizedLinear],
                 tensors: Mapping[str, TensorQuantization], *, sources: Sources = (0, 0, 0),
                 score_ops: Sequence[ScoreOp] = (), arithmetic: Arithmetic = "litert",
                 mask_margin: Real | None = None, lowest_single_score: Real | None = None,
                 query_ops: Sequence[MulConstant] = (), key_ops: Sequence[MulConstant] = ()):
        self.kernel_set = rules.kernel_set(arithmetic)
        self.arithmetic: Arithmetic = arithmetic
        self.num_heads = self.num_kv_heads = count("num_heads", num_heads)
        self.sources = tuple(sources)
        if self.sources not in SOURCES:
            raise ValueError(f"sources must be one of {SOURCES}; got {self.sources}")
        self.linears = dict(linears)
        self.tensors = {"probabilities": PROBABILITIES, **tensors}
        self.score_ops = tuple(score_ops)
        self.query_ops, self.key_ops = tuple(query_ops), tuple(key_ops)
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
        for name, ops in (("query_ops", self.query_ops), ("key_ops", self.key_ops)):
            check_scaling(ops, name)

    # -- derived once: what the kernels read ---------------------------------------------------------------------------

    def kernel_parameters(self) -> dict[str, Any]:
        """What the kernels of any target read, as ``StaticLayer`` names it."""
        kernel_set, t = self.kernel_set, self.tensors
        linears = {}
        for name, linear in self.linears.items():
            real = rules.fully_connected_multiplier(kernel_set.fully_connected, self.input_of(name).scale, linear.scale,
                                                    t[name].scale)
            linears[name] = (linear.weight, real, linear.bias)
        t = self.product_tensors

        def batch_matmul(lhs: TensorQuantization, rhs: TensorQuantization, output: TensorQuantization
                         ) -> tuple[str, np.float64]:
            rule = kernel_set.batch_matmul if rhs.zero_point == 0 else kernel_set.batch_matmul_asymmetric
            real = rules.batch_matmul_multiplier(rule, kernel_set.precision, lhs.scale, rhs.scale, output.scale)
            return rule, real[0]

        scores_rule, scores = batch_matmul(t["query"], t["key"], t["scores"])
        context_rule, context = batch_matmul(t["probabilities"], t["value"], t["context"])
        zero_points = {f"{name}_input": self.input_of(name).zero_point for name in INPUTS}
        zero_points |= {name: tensor.zero_point for name, tensor in t.items()}
        tables = {name: (table, self.tensors[name].zero_point) for name, table in self.projection_tables.items()}
        return dict(num_heads=self.num_heads, linears=linears, scores=scores, context=context, zero_points=zero_points,
                    project_rule=kernel_set.fully_connected, score_rule=scores_rule, context_rule=context_rule,
                    softmax_table=self.softmax_table, softmax=kernel_set.softmax, tables=tables)

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
        # of codes of queries and keys, at code + 128, what their operators make of them; nothing of those without
        self.projection_tables: dict[str, Codes] = {}
        self.product_tensors = dict(self.tensors)  # as the products read them
        for name, ops in (("query", self.query_ops), ("key", self.key_ops)):
            if ops:
                (self.projection_tables[name],), _, self.product_tensors[name] = score_map(
                    ops, self.tensors[name], self.kernel_set)
        self.score_map = score_luts, lut_index, softmax_input = score_map(
            self.score_ops, self.tensors["scores"], self.kernel_set)
        if softmax_input.scale <= SMALLEST_SOFTMAX_SCALE:
            raise ValueError(f"the scores' scale must be above 2**-26, the resolution of TFLite's softmax; got "
                             f"{softmax_input.scale}")
        self.softmax_table = rules.SOFTMAX[self.kernel_set.softmax].table(softmax_input.scale)
        self.score_luts = score_luts if self.score_ops else None
        self.lut_index = np.ascontiguousarray(lut_index) if lut_index.size > 1 else None
        self._kernel = StaticLayer(**self.kernel_parameters())
        self.prepared_calls = PreparedCalls(dtype=np.dtype(np.int8))

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

    def with_arithmetic(self, arithmetic: Arithmetic) -> Self:
        """The same parameters under another kernel set.

        Parameters
        ----------
        arithmetic : str
            A name in ``edgeattn.arithmetic.KERNEL_SETS``.

        Returns
        -------
        layer of this class

        Raises
        ------
        ValueError
            For another name, with those there are.
        """
        return self._replace(arithmetic=arithmetic)

    def with_mask(self, mask: ArrayLike) -> Self:
        """The layer that carries ``mask``: what an exported graph with that mask computes, bit for bit.

        A masked score gets the lowest code, -128, as the graph's SELECT_V2 gives it, and so keeps a trace of weight,
        ``exp(-scale * (max + 128))``. A mask passed to a call leaves masked keys out altogether. Where the mask leaves
        a row a single key, whose score must stand above that code, the scores' range is extended to ``mask_margin``
        below the lowest such score of calibration.

        Parameters
        ----------
        mask : bool, broadcastable to (B, H, L, S)
            True = attend.

        Returns
        -------
        layer of this class

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

    def _replace(self, **changes: Any) -> Self:
        arguments: dict[str, Any] = dict(
            num_heads=self.num_heads, linears=self.linears, tensors=self.tensors, sources=self.sources,
            score_ops=self.score_ops, arithmetic=self.arithmetic, mask_margin=self.mask_margin,
            lowest_single_score=self.lowest_single_score, query_ops=self.query_ops, key_ops=self.key_ops)
        return type(self)(**{**arguments, **changes})

    # -- in files ------------------------------------------------------------------------------------------------------

    def to_state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """(config, tensors): all that ``from_state`` needs to build an equal layer."""
        arrays = linears_state(self.linears)
        ops: dict[str, list[dict[str, Any]]] = {"score_ops": []}  # those of others only where there are any
        for which in ("score_ops", "query_ops", "key_ops"):
            for i, op in enumerate(getattr(self, which)):
                row: dict[str, Any] = {"op": type(op).__name__}
                for name, value in vars(op).items():
                    if isinstance(value, np.ndarray):
                        arrays[f"{which}.{i}.{name}"] = value
                    else:
                        row[name] = value.to_json() if isinstance(value, TensorQuantization) else value
                ops.setdefault(which, []).append(row)
        return {"num_heads": self.num_heads, "arithmetic": self.arithmetic, "sources": list(self.sources),
                "tensors": {name: t.to_json() for name, t in self.tensors.items()}, **ops,
                "mask_margin": self.mask_margin, "lowest_single_score": self.lowest_single_score}, arrays

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, ArrayLike]) -> Self:
        """The layer of which ``to_state`` gave these."""
        given = {"query_ops": [], "key_ops": [], **config}
        named = "score_ops", "query_ops", "key_ops"
        if not isinstance(config["tensors"], dict) or not all(isinstance(row, dict)
                                                              for which in named for row in given[which]):
            raise ValueError("tensors must be an object, and score_ops, query_ops and key_ops lists of objects")
        groups: dict[str, dict[str, Any]] = {}
        for name, array in tensors.items():
            group, _, part = name.rpartition(".")
            groups.setdefault(group, {})[part] = array
        ops: dict[str, list[Any]] = {which: [] for which in named}
        for which in named:
            for i, row in enumerate(given[which]):
                row = {**row, **groups.pop(f"{which}.{i}", {})}
                kind: Any = SCORE_OPS.get(row.pop("op"))
                if kind is None:
                    raise ValueError(f"{which}[{i}] must be {', '.join(SCORE_OPS)}")
                ops[which].append(kind(**{name: TensorQuantization(*value) if isinstance(value, list) else value
                                          for name, value in row.items()}))
        return cls(config["num_heads"], {name: QuantizedLinear(**parts) for name, parts in groups.items()},
                   {name: TensorQuantization(*pair) for name, pair in config["tensors"].items()},
                   sources=tuple(config["sources"]), arithmetic=config["arithmetic"],
                   mask_margin=config["mask_margin"], lowest_single_score=config.get("lowest_single_score"), **ops)
