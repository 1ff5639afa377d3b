"""Normalization of each token's features."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import number
from edgeattn.layers.linear import parameter
from edgeattn.layers.module import TokenWise

if TYPE_CHECKING:
    from typing import Any, Literal

    from numpy.typing import ArrayLike

    from edgeattn.ops import Ops, T
    from edgeattn.types import Float32s, Real


class Norm(TokenWise):
    """What norms have in common."""

    weight: Float32s
    bias: Float32s | None
    eps: float
    kind: Literal["layer", "rms"]

    if TYPE_CHECKING:
        def rows(self, x: Float32s) -> Float32s: ...  # noqa: D102

    @functools.cached_property
    def kernel(self) -> Any:
        """The kernel that gives the bits of `rows`."""
        from edgeattn.kernels.cpu import encoder_float32

        return encoder_float32.Norm((self.kind, self.weight, self.bias, self.eps), as_numpy=True)

    def packed(self, x: Float32s) -> Float32s:
        """`rows` of x in C order, by the kernel."""
        result: Float32s = self.kernel(x, None, np.empty_like(x))
        return result


class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the features of each token.

    Parameters
    ----------
    weight : (E,) float array
    bias : (E,) float array, optional
    eps : float
        Greater than 0.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    kind = "layer"

    def __init__(self, weight: ArrayLike, bias: ArrayLike | None = None, eps: Real = 1e-5):
        self.weight = parameter("weight", weight, "(features,)")
        self.bias = None if bias is None else parameter("bias", bias, "(features,)")
        if self.bias is not None and self.bias.shape != self.weight.shape:
            raise ValueError(f"bias must have the shape of weight {self.weight.shape}, got {self.bias.shape}")
        self.inputs = self.outputs = len(self.weight)
        self.eps = _positive(eps)

    def forward(self, ops: Ops[T], x: T, name: str = "") -> T:
        """(tokens, E) -> (tokens, E)."""
        return ops.layer_norm(x, self, name)

    def rows(self, x: Float32s) -> Float32s:
        """The norm of x (..., E) float32, with NumPy."""
        x = x - _mean(x)
        x *= self.weight / np.sqrt(_mean(x * x) + np.float32(self.eps))
        if self.bias is not None:
            x += self.bias
        return x

    def __repr__(self) -> str:
        return f"LayerNorm({len(self.weight)}, bias={self.bias is not None}, eps={self.eps})"


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * weight, over the features of each token.

    Parameters
    ----------
    weight : (E,) float array
    eps : float
        Greater than 0.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    bias = None
    kind = "rms"

    def __init__(self, weight: ArrayLike, eps: Real = 1e-6):
        self.weight = parameter("weight", weight, "(features,)")
        self.inputs = self.outputs = len(self.weight)
        self.eps = _positive(eps)

    def forward(self, ops: Ops[T], x: T, name: str = "") -> T:
        """(tokens, E) -> (tokens, E)."""
        return ops.rms_norm(x, self, name)

    def rows(self, x: Float32s) -> Float32s:
        """The norm of x (..., E) float32, with NumPy."""
        result: Float32s = x * (self.weight / np.sqrt(_mean(x * x) + np.float32(self.eps)))
        return result

    def __repr__(self) -> str:
        return f"RMSNorm({len(self.weight)}, eps={self.eps})"


def norm_of(found: tuple[Any, ...]) -> LayerNorm | RMSNorm | None:
    """The norm of (kind, weight, bias, eps), as readers of files give it; None of ()."""
    if not found:
        return None
    kind, weight, bias, eps = found
    return LayerNorm(weight, bias, eps) if kind == "LayerNorm" else RMSNorm(weight, eps)


def _mean(x: Float32s) -> Float32s:
    """x.mean(axis=-1, keepdims=True), without the checks, which for one token cost more than the sum."""
    result: Float32s = np.add.reduce(x, axis=-1, keepdims=True) / np.float32(x.shape[-1])
    return result


def _positive(eps: Real) -> float:
    eps = number("eps", eps)
    if eps <= 0:
        raise ValueError(f"eps must be greater than 0, got {eps}")
    return eps
