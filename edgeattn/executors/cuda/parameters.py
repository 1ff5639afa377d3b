"""The parameters of layers on a GPU, found by running a layer's forward once, upon nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn.executors.numpy import added_keys
from edgeattn.ops import Ops

if TYPE_CHECKING:
    from typing import Any


class Parameters:
    """What the operations of a layer read, each there once, known by what holds it on the CPU.

    Parameters
    ----------
    forward : function
        Runs the layer's forward upon an executor.
    """

    def __init__(self, forward):
        found = _Found()
        forward(found)
        self._kept = found.things  # an id is that of a living object
        self._placed = {id(thing): _place(thing, found.heads.get(id(thing), 1)) for thing in found.things}

    def of(self, thing):
        """Of a linear map."""
        return self._placed[id(thing)]

    def added(self, layer):
        """Keys and values (1, Hkv, n, size) that every query sees, or None."""
        return self._placed[id(layer)]


class _Found(Ops["Any"]):
    """Keeps what the operations are made with; a linear map is its own result."""

    def __init__(self):
        self.things, self.heads = [], {}

    def linear(self, x, linear, name):
        self.things.append(linear)
        return linear

    def attention(self, q, k, v, layer, sequences, name):
        self.things.append(layer)
        self.heads[id(q)] = layer.num_heads
        self.heads[id(k)] = self.heads[id(v)] = layer.num_kv_heads

    def activation(self, x, kind, name):
        return None

    def multiply(self, a, b, name):
        return None


def _place(thing, heads):
    from edgeattn.kernels.cuda.layers import FloatLinear, Int8Linear, owned

    if hasattr(thing, "extra_keys"):
        return tuple(map(owned, added_keys(thing, 1))) if thing.extra_keys else None
    if isinstance(thing.weight, np.ndarray):
        return FloatLinear(thing.weight, thing.bias)
    codes, scale = thing.weight.weight, thing.weight.scale
    return Int8Linear(codes, heads, np.zeros(len(codes), np.float32) if thing.bias is None else thing.bias, scale)
