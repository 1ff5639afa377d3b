"""A feed-forward network in int8, every scale fixed: equal, bit for bit, to operators of a TFLite kernel set."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn import arithmetic as rules
from edgeattn.checks import as_array, is_one_of
from edgeattn.kernels.cpu import encoder_int8
from edgeattn.layers.feed_forward import ACTIVATIONS
from edgeattn.layers.module import TokenWise
from edgeattn.quantized.parameters import QuantizedLinear, TensorQuantization, check_scales, linears_of, linears_state
from edgeattn.quantized.static_rows import StaticRows, checked_more, codes_of_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import Self

    from edgeattn.executors.stages import Stage
    from edgeattn.ops import Activation, Ops, Sequences, T
    from edgeattn.types import Arithmetic, Codes, Float32s


class StaticFeedForward(StaticRows, TokenWise):
    """linear2(activation(linear1(x))) or linear2(activation(gate(x)) * linear1(x)), int8 from the input's codes on.

    float32 in and out: QUANTIZE, FULLY_CONNECTED, the activation's table of 256 codes, MUL where there is a gate,
    FULLY_CONNECTED, DEQUANTIZE. The activation is the operator GELU; "relu" is fused into the product before it; for
    "silu", which no operator is, the table is made by the same rule.

    Parameters
    ----------
    linears : mapping
        "linear1" (F, E + n), "linear2" (Eo + m, F) and, with a gate, "gate" (F, E + n): QuantizedLinear.
    tensors : mapping
        TensorQuantization of "input", "linear1", "activation", "linear2" and, with a gate, of "gate" and "gated". The
        product before a "relu" gives "activation" itself.
    activation : {"gelu", "gelu_tanh", "relu", "silu"}
        What stands between the products.
    arithmetic : str
        A name in ``edgeattn.arithmetic.KERNEL_SETS``.
    more_inputs : sequence of int
        The n columns behind E, of features that reach beyond the range of the codes: each holds what the range leaves
        of the column it names.
    more_outputs : sequence of (int, int)
        The m outputs behind Eo, of outputs that reach beyond the range: each goes on where the one it names ends, and
        what its codes are more than the second number is added to it.
    large : StaticFeedForward, optional
        Of hidden features with values much larger than the others': a network of their own, with scales of their own,
        whose result is added in float32.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    def __init__(self, linears: Mapping[str, QuantizedLinear], tensors: Mapping[str, TensorQuantization], *,
                 activation: Activation = "gelu", arithmetic: Arithmetic = "litert", more_inputs: Iterable[int] = (),
                 more_outputs: Iterable[tuple[int, int]] = (), large: StaticFeedForward | None = None):
        self.kernel_set = rules.kernel_set(arithmetic)
        self.arithmetic: Arithmetic = arithmetic
        if not is_one_of(activation, ACTIVATIONS):
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation: Activation = activation
        self.linears, self.tensors = dict(linears), dict(tensors)
        self.gated = "gate" in self.linears
        # the product that the activation reads, and the tensor it gives
        self.active = "gate" if self.gated else "linear1"
        self.factors = "activation", "linear1"  # of the product with the gate
        _require("linears", self.linears, ["linear1", "linear2", *["gate"] * self.gated])
        names = ["input", "linear1", *["gate"] * self.gated, "activation", *["gated"] * self.gated, "linear2"]
        if activation == "relu":
            names.remove(self.active)
        _require("tensors", self.tensors, names)
        self.tensors = {name: self.tensors[name] for name in names}  # in the order of the computation
        check_scales(self.tensors)
        shapes = {name: linear.weight.shape for name, linear in self.linears.items()}
        (hidden, columns), (channels, read) = shapes["linear1"], shapes["linear2"]
        if read != hidden or shapes.get("gate", (hidden, columns)) != (hidden, columns):
            raise ValueError(f"linears must fit each other; got weights of {shapes}")
        more_inputs, more_outputs = tuple(more_inputs), tuple((int(i), int(code)) for i, code in more_outputs)
        self.inputs, self.outputs, self.hidden = columns - len(more_inputs), channels - len(more_outputs), hidden
        self.more_inputs, self.more_outputs = checked_more("more_inputs", more_inputs, self.inputs), more_outputs
        if self.inputs < 0 or self.outputs < 0 or not all(
                0 <= i < self.outputs and -128 <= code <= 127 for i, code in more_outputs):
            raise ValueError(f"more_outputs must be pairs of an output below {self.outputs} and a code; got "
                             f"{more_outputs}")
        if large is not None and (not isinstance(large, StaticFeedForward) or large.inputs != self.inputs
                                  or large.outputs != self.outputs):
            raise ValueError(f"large must be a StaticFeedForward of {self.inputs} inputs and {self.outputs} outputs; "
                             f"got {large}")
        self.large = large
        self.table: Codes = rules.activation_table(
            activation, *(_pair(self.tensors[name]) for name in (self.product_of(self.active), "activation")))

    def __repr__(self) -> str:
        more = "" if self.large is None else f", large={self.large.hidden}"
        return (f"StaticFeedForward(inputs={self.inputs}, hidden={self.hidden}, outputs={self.outputs}, "
                f"activation={self.activation!r}, gate={self.gated}, arithmetic={self.arithmetic!r}, "
                f"more_inputs={len(self.more_inputs)}, more_outputs={len(self.more_outputs)}{more})")

    def product_of(self, linear: str) -> str:
        """The tensor that the linear layer of that name gives."""
        return "activation" if self.activation == "relu" and linear == self.active else linear

    def input_of(self, linear: str) -> TensorQuantization:
        """The quantization of the tensor that the linear layer of that name reads."""
        hidden = "gated" if self.gated else "activation"
        return self.tensors[hidden if linear == "linear2" else "input"]

    @functools.cached_property
    def requantizations(self) -> dict[str, Any]:
        """How sums of products become codes, by the tensor's name: (rule, q31, shift, real multiplier)."""
        rule = self.kernel_set.fully_connected
        return {name: (rules.REQUANTIZE[rule], *(a.astype(np.int64) for a in rules.fixed_point(real)), real)
                for name, real in ((self.product_of(name), self._multiplier(name)) for name in self.linears)}

    def _multiplier(self, name: str) -> NDArray[np.float64]:
        return rules.fully_connected_multiplier(
            self.kernel_set.fully_connected, self.input_of(name).scale, self.linears[name].scale,
            self.tensors[self.product_of(name)].scale)

    # -- what it computes ----------------------------------------------------------------------------------------------

    def forward(self, ops: Ops[T], x: T, name: str = "") -> T:
        """(tokens, E) -> (tokens, Eo)."""
        return ops.static(x, self, None, name)

    def forward_codes(self, ops: Ops[T], x: T) -> T:
        """Codes (tokens, E + n) -> (tokens, Eo + m)."""
        active = ops.linear(x, self.linears[self.active], self.product_of(self.active))
        hidden = ops.activation(active, self.activation, "activation")
        if self.gated:
            hidden = ops.multiply(hidden, ops.linear(x, self.linears["linear1"], "linear1"), "gated")
        return ops.linear(hidden, self.linears["linear2"], "linear2")

    def rows_of(self, codes_ops: Any, x: Float32s, _: Sequences | None = None) -> Float32s:
        """float32 (tokens, E) -> (tokens, Eo); codes_ops(layer, part): what computes its codes."""
        codes = self.forward_codes(codes_ops(self, ""), codes_of_rows(x, self.tensors["input"], self.more_inputs))
        y = self.tensors["linear2"].dequantize(codes[:, :self.outputs])
        scale = self.tensors["linear2"].scale
        for k, (channel, none) in enumerate(self.more_outputs):
            y[:, channel] += (codes[:, self.outputs + k].astype(np.float32) - np.float32(none)) * scale
        y[np.isnan(x).any(axis=1)] = np.nan
        if self.large is not None:
            y = y + self.large.rows_of(lambda layer, part: codes_ops(layer, "large." + part), x)
        return y

    def run_int8(self, x: ArrayLike) -> Codes:
        """Codes of the result from codes of the input, equal to the named kernel set.

        Parameters
        ----------
        x : int8 (..., E + n)

        Returns
        -------
        int8 (..., Eo + m)

        Raises
        ------
        ValueError
            For other codes, and of a layer with ``large``.
        """
        if self.large is not None:
            raise ValueError("run_int8 must be asked of a layer without a network of large features, whose result is "
                             "added in float32")
        x = as_array("x", x)
        columns = self.inputs + len(self.more_inputs)
        if x.dtype != np.int8 or x.ndim < 1 or x.shape[-1] != columns:
            raise ValueError(f"x must be int8 (..., {columns}); got {x.dtype} of shape {x.shape}")
        out = np.empty((*x.shape[:-1], self.outputs + len(self.more_outputs)), np.int8)
        rows = np.ascontiguousarray(x).reshape(-1, columns)
        self._alone.of_codes(rows, out.reshape(len(rows), out.shape[-1]))
        return out

    def kernel(self, norm: Any = None, *, norm_first: bool = False) -> encoder_int8.FeedForward:
        """The compiled feed-forward without `large`; norm: (kind, weight, bias, eps) or None."""
        def linear(name: str) -> tuple[Any, ...]:
            return self.linears[name].weight, self._multiplier(name), self.linears[name].bias

        t, product = self.tensors, 0.0
        if self.gated:
            product = float(rules.mul_multiplier(self.kernel_set.precision, t["activation"].scale,
                                                 t[self.product_of("linear1")].scale, t["gated"].scale)[0])
        zero_points = {name: t[self.product_of(name)].zero_point for name in self.linears}
        zero_points |= {name: t[name].zero_point for name in ("input", "activation")}
        return encoder_int8.FeedForward(
            linear("linear1"), linear("linear2"), gate=linear("gate") if self.gated else None, table=self.table,
            product=product, zero_points=zero_points | {"hidden": self.input_of("linear2").zero_point},
            scale=t["input"].scale, out_scale=t["linear2"].scale, project_rule=self.kernel_set.fully_connected,
            multiply_rule=rules.elementwise_rule(self.kernel_set.mul, product), more_inputs=self.more_inputs,
            more_outputs=self.more_outputs, norm=norm, norm_first=norm_first)

    @functools.cached_property
    def _alone(self) -> encoder_int8.FeedForward:
        return self.kernel()

    def stage(self, first: Any, last: Any, *, residual: bool = True) -> Stage:
        """(rows, sequences) -> rows: norm(x + the network of x), or with `first` of norm(x); norms as `kernel` has."""
        norm = first or last
        kernel = self._alone if norm is None else self.kernel(norm, norm_first=first is not None)
        large = None if self.large is None else self.large.stage(first, None, residual=residual)
        return StaticFeedForwardStage(kernel, self.outputs, large, residual)

    # -- files ---------------------------------------------------------------------------------------------------------

    def to_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(config, tensors): all that ``from_state`` needs to build an equal layer."""
        arrays: dict[str, Any] = linears_state(self.linears)
        config: dict[str, Any] = {"activation": self.activation, "arithmetic": self.arithmetic,
                  "tensors": {name: t.to_json() for name, t in self.tensors.items()},
                  "more_inputs": list(self.more_inputs), "more_outputs": [list(pair) for pair in self.more_outputs]}
        if self.large is not None:
            config["large"], others = self.large.to_state()
            arrays |= {f"large.{name}": array for name, array in others.items()}
        return config, arrays

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Self:
        """The layer of which ``to_state`` gave these."""
        if not isinstance(config["tensors"], dict):
            raise ValueError("tensors must be an object")
        own = {name: array for name, array in tensors.items() if not name.startswith("large.")}
        others = {name.removeprefix("large."): array for name, array in tensors.items() if name not in own}
        large = cls.from_state(config["large"], others) if "large" in config else None
        return cls(linears_of(own), {name: TensorQuantization(*pair) for name, pair in config["tensors"].items()},
                   activation=config["activation"], arithmetic=config["arithmetic"],
                   more_inputs=config["more_inputs"], more_outputs=config["more_outputs"], large=large)


class StaticFeedForwardStage:
    """A feed-forward by its kernel, after those of large features if there are any: (rows, sequences) -> rows."""

    def __init__(self, kernel: encoder_int8.FeedForward, outputs: int, large: Callable[..., Float32s] | None,
                 residual: bool):
        self.kernel, self.outputs, self.large, self.residual = kernel, outputs, large, residual

    def __call__(self, x: Float32s, sequences: object) -> Float32s:  # noqa: D102
        before = (x if self.residual else None) if self.large is None else self.large(x, sequences)
        out: Float32s = self.kernel(x, before, np.empty((len(x), self.outputs), np.float32))
        return out

    can_step, step = True, __call__  # rows, whatever else is known of them

    def on(self, x: Float32s, *_: object) -> list[Callable[[], object]] | None:
        """As `AttentionStage.on`."""
        return None if self.large is not None else [self.kernel.on(x, x if self.residual else None, x)]


def _pair(t: TensorQuantization) -> tuple[np.float32, int]:
    return t.scale, t.zero_point


def _require(what: str, given: Mapping[str, object], names: list[str]) -> None:
    if set(given) != set(names):
        raise ValueError(f"{what} must be of {', '.join(names)}; got {', '.join(map(str, given))}")
