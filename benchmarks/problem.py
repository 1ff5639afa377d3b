"""What is computed: one self-attention layer per shape, its input, and the answers to hold contenders to."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

import edgeattn
import quant
from edgeattn.quantized import DynamicMultiHeadAttention, MulConstant, StaticMultiHeadAttention, TensorQuantization
from quant.trace import read_calls, static_trace

WIDTHS, HEADS, LENGTHS = (64, 128, 256, 384), (4, 8, 12), (32, 64, 128, 256, 512)


@dataclass(frozen=True, order=True)
class Point:
    """One shape of the grid: B = 1, E = kdim = vdim = Eo, H heads of size E / H, L = S."""

    E: int
    H: int
    L: int

    def __str__(self):
        return f"{self.E}/{self.H}/{self.L}"

    @classmethod
    def parse(cls, text: str) -> Point:
        """The point written as ``E/H/L``.

        Raises
        ------
        ValueError
            When it is not three positive integers, or E no multiple of H.
        """
        try:
            E, H, L = (int(part) for part in text.split("/"))
        except ValueError:
            raise ValueError(f"a point must be E/H/L, such as 64/4/128; got {text!r}") from None
        if min(E, H, L) < 1 or E % H:
            raise ValueError(f"a point needs positive E, H and L, and E a multiple of H; got {text!r}")
        return cls(E, H, L)

    @property
    def operations(self) -> int:
        """Multiplications and additions of a layer: four projections and two products."""
        return 8 * self.L * self.E**2 + 4 * self.L**2 * self.E

    @property
    def causal_operations(self) -> int:
        """Those that are left where no query sees a later key: the projections do not shrink."""
        return 8 * self.L * self.E**2 + 2 * self.L * (self.L + 1) * self.E


GRID = tuple(Point(E, H, L) for E in WIDTHS for H in HEADS if E % H == 0 for L in LENGTHS)
QUICK = (Point(64, 4, 32), Point(128, 4, 64), Point(256, 4, 128))


class Formula:
    """What has a `formula(dtype)` of its answer, every step in that dtype."""

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """The answer in float64."""
        return self.formula(np.float64)

    @functools.cached_property
    def plain_error(self) -> float:
        """Largest error of the plain float32 formula."""
        return float(np.abs(self.formula(np.float32) - self.exact).max())


class Problem(Formula):
    """A random layer of a point's shape; everything derived from it is made when first asked for.

    Attributes
    ----------
    point : Point
    layer : edgeattn.MultiHeadAttention
    x : float32 (1, L, E)
    """

    def __init__(self, point: Point):
        self.point = point
        rng = np.random.default_rng((point.E, point.H, point.L))
        E = point.E

        def weight():
            return (rng.standard_normal((E, E)) / np.sqrt(E)).astype(np.float32)

        def vector():
            return rng.normal(0, 0.1, E).astype(np.float32)

        self.layer = edgeattn.MultiHeadAttention(point.H, weight(), weight(), weight(), weight(), q_bias=vector(),
                                                 k_bias=vector(), v_bias=vector(), out_bias=vector())
        self.x = rng.standard_normal((1, point.L, E)).astype(np.float32)

    def formula(self, dtype) -> np.ndarray:
        """The layer as its formula says in NumPy, every step in ``dtype``: (1, L, E)."""
        layer, H = self.layer, self.point.H

        def linear(x, name):
            weight, bias = (getattr(layer, f"{name}_{part}").astype(dtype, copy=False) for part in ("weight", "bias"))
            return x @ weight.T + bias

        x = self.x[0].astype(dtype, copy=False)
        q, k, v = (linear(x, name).reshape(len(x), H, -1).swapaxes(0, 1) for name in "qkv")
        scores = q @ k.swapaxes(1, 2) * dtype(layer.scale)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        context = scores @ v / scores.sum(-1, keepdims=True)
        return linear(context.swapaxes(0, 1).reshape(x.shape), "out")[None]

    @functools.cached_property
    def _calibration(self):
        return quant.calibrate(self.layer, [self.x])

    @functools.cached_property
    def static(self) -> StaticMultiHeadAttention:
        """The int8 layer as ``quant.quantize`` makes it: symmetric keys and values, 1/sqrt(D) in the query."""
        return quant.quantize(self.layer, self._calibration, arithmetic="litert")

    @functools.cached_property
    def dynamic(self) -> DynamicMultiHeadAttention:
        """The int8 layer that quantizes every token as it comes."""
        return quant.quantize(self.layer, scheme="dynamic")

    @functools.cached_property
    def usual(self) -> StaticMultiHeadAttention:
        """The int8 layer as other converters write it: keys and values with a zero point, MUL by 1/sqrt(D)."""
        root = np.sqrt(self.point.E / self.point.H)
        seen = {name: self._calibration.range(name) for name in ("key", "value", "scores")}
        tensors = dict(self.static.tensors)
        for name in ("key", "value"):
            tensors[name] = _over(*seen[name])
        folded = tensors["query"]
        tensors["query"] = TensorQuantization(folded.scale * np.float32(root), folded.zero_point)
        scaled = _over(*seen["scores"])
        tensors["scores"] = _over(*(edge * root for edge in seen["scores"]))
        query = self.static.linears["query"]
        linears = {**self.static.linears, "query": type(query)(query.weight, query.scale * np.float32(root),
                                                               query.bias)}
        op = MulConstant(127, TensorQuantization(np.float32(1 / 127 / root), 0), scaled)
        return StaticMultiHeadAttention(self.point.H, linears, tensors, score_ops=(op,), arithmetic="litert")

    @functools.cached_property
    def codes(self) -> np.ndarray:
        """The input of the int8 layers: int8 (1, L, E)."""
        return self.static.quantize_input(self.x)

    @functools.cached_property
    def static_bytes(self) -> np.ndarray:
        """What the int8 layer must give, by the rules of the kernel set in plain NumPy: int8 (1, L, E)."""
        call, = read_calls(self.layer, [self.x], "reference")
        return static_trace(self.static, call)["output"]


def _over(low: float, high: float) -> TensorQuantization:
    """256 codes over [low, high], low <= 0 <= high."""
    scale = (high - low) / 255
    return TensorQuantization(scale, int(np.clip(np.rint(-128 - low / scale), -128, 127)))
