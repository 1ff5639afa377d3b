"""The feed-forward network of an encoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeattn.checks import is_one_of
from edgeattn.layers.linear import check_linear
from edgeattn.layers.module import TokenWise

if TYPE_CHECKING:
    from edgeattn.layers.linear import Linear
    from edgeattn.ops import Activation, Ops, T

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

    def __repr__(self) -> str:
        return f"FeedForward({self.linear1}, {self.linear2}, activation={self.activation!r}, gate={self.gate})"
