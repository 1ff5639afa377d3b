"""The feed-forward network of an encoder layer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import is_one_of
from edgeattn.layers.linear import check_linear
from edgeattn.layers.module import TokenWise

if TYPE_CHECKING:
    from edgeattn.kernels.cpu.encoder_float32 import RowKernel
    from edgeattn.layers.linear import Linear
    from edgeattn.ops import Activation, Ops, T
    from edgeattn.types import Float32s

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


class FeedForward(TokenWise):
    """linear2(activation(linear1(x))), or linear2(activation(gate(x)) * linear1(x)) with a gate.

    Parameters
    ----------
    linear1 : Linear
        E to F features.
    linear2 : Linear
        F to E features.
    activation : {"gelu", "gelu_tanh", "relu", "silu"}
    gate : Linear, optional
        E to F features; GeGLU with "gelu", SwiGLU with "silu".

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    def __init__(self, linear1: Linear, linear2: Linear, *, activation: Activation = "gelu",
                 gate: Linear | None = None):
        for name, linear in (("linear1", linear1), ("linear2", linear2), ("gate", gate)):
            check_linear(name, linear, optional=name == "gate")
        if not is_one_of(activation, ACTIVATIONS):
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if linear2.inputs != linear1.outputs:
            raise ValueError(f"linear2 must have linear1's {linear1.outputs} outputs as inputs, got {linear2}")
        if gate is not None and (gate.inputs, gate.outputs) != (linear1.inputs, linear1.outputs):
            raise ValueError(f"gate must have the sizes of linear1, {linear1}, got {gate}")
        self.linear1, self.linear2, self.activation, self.gate = linear1, linear2, activation, gate
        self.inputs, self.outputs = linear1.inputs, linear2.outputs

    def forward(self, ops: Ops[T], x: T, name: str = "") -> T:
        """(tokens, E) -> (tokens, E)."""
        hidden = ops.linear(x, self.linear1, name + "linear1")
        if self.gate is None:
            hidden = ops.activation(hidden, self.activation, name + "activation")
        else:
            gate = ops.activation(ops.linear(x, self.gate, name + "gate"), self.activation, name + "activation")
            hidden = ops.multiply(gate, hidden, name + "gated")
        return ops.linear(hidden, self.linear2, name + "linear2")

    @functools.cached_property
    def fused_kernel(self) -> RowKernel | None:
        """What an encoder layer computes it with; None where there is no kernel of these weights together."""
        from edgeattn.executors.fused import feed_forward_kernel

        return feed_forward_kernel(self)

    def computed(self, rows: Float32s) -> Float32s:
        """(tokens, E) -> (tokens, E), with the bits that it has in an encoder layer."""
        if self.fused_kernel is None:
            return super().computed(rows)
        result: Float32s = self.fused_kernel(rows, None, np.empty((len(rows), self.outputs), np.float32))
        return result

    def __repr__(self) -> str:
        return f"FeedForward({self.linear1}, {self.linear2}, activation={self.activation!r}, gate={self.gate})"
