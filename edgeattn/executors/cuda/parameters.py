"""The parameters of layers on a GPU, found by running a layer's forward once, upon nothing."""

from __future__ import annotations

import numpy as np

from edgeattn.executors.numpy import added_keys
from edgeattn.layers.positions import refuse_positions
from edgeattn.ops import Ops


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
        self._placed = {id(thing): found.place[id(thing)]() for thing in found.things}

    def of(self, thing):
        """Of a linear map, a norm or a table of vectors; None of what the forward did not name."""
        return self._placed.get(id(thing))

    def added(self, layer):
        """Keys and values (1, Hkv, n, size) that every query sees, or None."""
        return self._placed[id(layer)]


class _Found(Ops["object"]):
    """Keeps what the operations are made with, and how it is placed; a linear map is its own result."""

    def __init__(self):
        self.things, self.place = [], {}

    def _note(self, thing, place, *arguments):
        if id(thing) not in self.place:
            self.things.append(thing)
        self.place[id(thing)] = lambda: place(thing, *arguments)
        return thing

    def linear(self, x, linear, name):
        return self._note(linear, _linear)

    def attention(self, q, k, v, layer, sequences, name):
        refuse_positions(layer, "keep it on the CPU")
        self._note(q, _linear, layer.num_heads)
        self._note(k, _linear, layer.num_kv_heads)
        self._note(v, _linear, layer.num_kv_heads)
        self._note(layer, _added)

    def layer_norm(self, x, norm, name):
        self._note(norm, _norm, "layer_norm")

    def rms_norm(self, x, norm, name):
        self._note(norm, _norm, "rms_norm")

    def embed(self, table, ids, name):
        self._note(table, _table)

    def activation(self, x, kind, name):
        return None

    def multiply(self, a, b, name):
        return None

    def add(self, a, b, name):
        return None


def _linear(linear, heads=1):
    from edgeattn.kernels.cuda.encoder import DynamicRows
    from edgeattn.kernels.cuda.layers import FloatLinear, Int8Linear

    if getattr(linear, "quantized", None) is not None:
        return DynamicRows(linear.quantized, linear.bias)
    if isinstance(linear.weight, np.ndarray):
        return FloatLinear(linear.weight, linear.bias)
    codes, scale = linear.weight.weight, linear.weight.scale
    return Int8Linear(codes, heads, np.zeros(len(codes), np.float32) if linear.bias is None else linear.bias, scale)


def _added(layer):
    from edgeattn.kernels.cuda.layers import owned

    return tuple(map(owned, added_keys(layer, 1))) if layer.extra_keys else None


def _norm(norm, kind):
    from edgeattn.kernels.cuda.encoder import Norm

    return Norm(kind, norm.weight, norm.bias, norm.eps)


def _table(table):
    from edgeattn.kernels.cuda.layers import owned

    return owned(table)
