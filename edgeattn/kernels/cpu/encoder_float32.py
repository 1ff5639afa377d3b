"""Packing and calling of what a block has beside attention, in float32: linear layers, feed-forwards, norms."""
import numpy as np

from edgeattn.runtime.plan_cache import shared_plans
from edgeattn.threads import work_of_reading

from . import feed_forward_float32 as ff
from .activation import ACTIVATIONS
from .call import PreparedCall
from .linear_float32 import LINEAR, linear_float32
from .matmul import pack_panels, round_up
from .norm import (
    ADDRESSES,
    AT_ONCE,
    AT_WEIGHT,
    LAYER_NORM,
    MEANS,
    NO_NORM,
    NORM,
    RMS_NORM,
    SUMS,
    add_norm,
)
from .packing import Packer
from .records import blank, copy_of, packed
from .row_parts import BLOCK, FEW_ROWS
from .row_products import TALL
from .simd import VIRTUAL_LANES

__all__ = ["FeedForward", "Linear", "Norm", "RowKernel", "norm_kind", "pack", "pack_norm", "padded"]

NORMS = {"layer": LAYER_NORM, "rms": RMS_NORM}


def padded(array, *shape):
    """float32 of this shape, zeros beyond what is given, perhaps the array itself; all zeros for None."""
    if array is not None and array.shape == shape and array.dtype == np.float32:
        return array
    out = np.zeros(shape, np.float32)
    if array is not None:
        out[tuple(slice(n) for n in array.shape)] = array
    return out


def norm_kind(norm):
    """Which norm (kind, weight, bias, eps) is; NO_NORM for None."""
    return NO_NORM if norm is None else NORMS[norm[0]]


def pack_norm(norm, width):
    """(kind, weight, bias or None, eps) as kernels read it; nothing for None."""
    if norm is None:
        return np.zeros(0, np.float32)
    _, weight, bias, eps = norm
    up = round_up(width, VIRTUAL_LANES)
    return np.concatenate((padded(np.float32([eps]), AT_WEIGHT), padded(weight, up), padded(bias, up)))


def pack(**arrays):
    """({name: position}, one aligned array) of arrays of float32, or of int32 by their bits."""
    weights = Packer(np.float32)
    for name, array in arrays.items():
        weights.put(name, np.ascontiguousarray(array).view(np.float32))
    return weights.at, weights.packed()


class RowKernel:
    """What the kernels have in common: one that is planned by the number of rows, called with addresses.

    Each has prepare(rows), its `PreparedCall` for so many rows, whose addresses are those of `norm.ADDRESSES`. It is
    given the weights with every call, so that all layers that differ in these alone have one.

    Parameters
    ----------
    parameters : SimpleNamespace
        Of the kernel, all but what depends on the number of rows.
    weights : (n,) float32 array
    """

    def __init__(self, parameters, weights):
        self._parameters, self.weights = parameters, weights
        self._plans = shared_plans((type(self), weights.size, *vars(parameters).values()))

    def __call__(self, x, residual, out):
        """out (..., outputs) from x (..., inputs) and residual (..., outputs) or None: float32, C order; returns out.

        out may be x or residual.
        """
        if not out.size:
            return out
        self._call_for(out.size // out.shape[-1]).run_four(x, residual, out, self.weights)
        return out

    def on(self, x, residual, out):
        """A function that does the same to these arrays, see `PreparedCall.on`."""
        return self._call_for(out.size // out.shape[-1]).on(x, residual, out, self.weights)

    def _for(self, **more):
        """The parameters, and more of them."""
        return copy_of(self._parameters, **more)

    def _call_for(self, rows):
        return self._plans.get(rows) or self._plans.keep(rows, self.prepare(rows))


class Norm(RowKernel):
    """out = norm(x + residual)

    Parameters
    ----------
    norm : tuple
        ("layer" or "rms", float32 weight, float32 bias or None, eps).
    as_numpy : bool
        Without a residual: the bits that NumPy gives.
    """

    def __init__(self, norm, *, as_numpy=False):
        kind, weight, bias, eps = norm
        width = len(weight)
        if as_numpy and bias is None:
            bias = np.full(width, -0.0, np.float32)  # which changes nothing, while 0 makes 0 of -0
        row = round_up(width, VIRTUAL_LANES)
        super().__init__(blank(NORM, width=width, norm=norm_kind(norm), as_numpy=as_numpy,
                               private_size=AT_ONCE * row + MEANS + (SUMS + row) * as_numpy),
                         pack_norm((kind, weight, bias, eps), width))

    def prepare(self, rows):
        """See RowKernel."""
        p = self._for(rows=rows)
        return PreparedCall(add_norm, packed(p, NORM), ADDRESSES, np.float32, 0, p.private_size,
                            96 * rows * p.width)


class Linear(RowKernel):
    """out = norm(activation(x weight^T + bias) + residual)

    Parameters
    ----------
    weight : (outputs, inputs) float32 array
    bias : (outputs,) float32 array or None
    activation : None, "relu", "gelu", "gelu_tanh" or "silu"
    norm : tuple or None
        ("layer" or "rms", float32 weight, float32 bias or None, eps).
    """

    def __init__(self, weight, bias, *, activation=None, norm=None):
        outputs, inputs = weight.shape
        self.outputs = outputs
        up = round_up(outputs, VIRTUAL_LANES)
        at, weights = pack(w=pack_panels(padded(weight, up, inputs)), b=padded(bias, up),
                           at_norm=pack_norm(norm, outputs))
        super().__init__(blank(LINEAR, width=inputs, out_width=outputs, out_up=up,
                               activation=ACTIVATIONS[activation], norm=norm_kind(norm), **at), weights)

    def part(self, first, outputs):
        """The map to so many outputs from `first` on, a multiple of VIRTUAL_LANES, with the same weights in memory."""
        p, part = self._for(), object.__new__(Linear)
        p.w, p.b, p.out_width, p.out_up = p.w + first * p.width, p.b + first, outputs, round_up(outputs, VIRTUAL_LANES)
        RowKernel.__init__(part, p, self.weights)
        part.outputs = outputs
        return part

    def of(self, x):
        """What the rows of x (rows, inputs) become, (rows, outputs)."""
        rows = len(x)
        out = np.empty((rows, self.outputs), np.float32)
        call = self._plans.get(rows)
        if call is None:
            return self(x, None, out)
        call.run_four(x, None, out, self.weights)
        return out

    def prepare(self, rows):
        """See RowKernel."""
        p = self._for(rows=rows)
        size = p.private_size = min(rows, BLOCK) * p.out_up
        work = 2 * rows * p.out_up * (p.width + 8)
        return PreparedCall(linear_float32, packed(p, LINEAR), ADDRESSES, np.float32, 0, size, work)


class FeedForward(RowKernel):
    """out = norm(w2 h + b2 + residual), h = activation(w1 x + b1)

    With norm_first out = w2 h + b2 + residual, and h is made of norm(x).

    Parameters
    ----------
    w1, w2 : (hidden, inputs) and (outputs, hidden) float32 arrays
    b1, b2 : (hidden,) and (outputs,) float32 arrays or None
    activation : None, "relu", "gelu", "gelu_tanh" or "silu"
    gate : tuple or None
        (weight, bias or None) as w1 and b1: h = activation(gate(x)) * (w1 x + b1).
    norm : tuple or None
        ("layer" or "rms", float32 weight, float32 bias or None, eps).
    norm_first : bool
    """

    def __init__(self, w1, b1, w2, b2, *, activation="gelu", gate=None, norm=None, norm_first=False):
        hidden, inputs = w1.shape
        outputs = len(w2)
        up, out_up = (round_up(n, VIRTUAL_LANES) for n in (hidden, outputs))
        gate_w, gate_b = (None, None) if gate is None else gate
        none = np.zeros(0, np.float32)
        first, last = (norm, None) if norm_first else (None, norm)
        at, weights = pack(
            w1=pack_panels(padded(w1, up, inputs)), b1=padded(b1, up),
            gate_w=none if gate is None else pack_panels(padded(gate_w, up, inputs)),
            gate_b=none if gate is None else padded(gate_b, up),
            w2=pack_panels(padded(w2, out_up, hidden)), b2=padded(b2, out_up),
            at_first=pack_norm(first, inputs), at_last=pack_norm(last, outputs))
        super().__init__(blank(
            ff.FEED_FORWARD, width=inputs, hidden=hidden, out_width=outputs, width_up=round_up(inputs, VIRTUAL_LANES),
            hidden_up=up, out_up=out_up, activation=ACTIVATIONS[activation], gated=gate is not None,
            norm_first=norm_kind(first), norm_last=norm_kind(last), **at), weights)

    def prepare(self, rows):
        """See RowKernel."""
        p = self._for(rows=rows)
        few, some = rows if rows <= FEW_ROWS else 0, min(rows, BLOCK)
        normed, gated = p.norm_first != NO_NORM, p.gated
        p.at_once = p.hidden_up if rows <= TALL else ff.HIDDEN
        p.at_rows = 0
        p.at_hidden = p.at_rows + few * p.width_up * normed
        p.at_sums = p.at_hidden + few * p.hidden_up
        p.shared_size = p.at_sums + few * p.out_up
        p.own_rows = 0
        p.own_hidden = p.own_rows + some * p.width_up * normed
        p.own_sums = p.own_hidden + some * (p.at_once + ff.APART)
        p.own_gate = p.own_sums + some * p.out_up
        p.private_size = p.own_gate + some * (p.at_once + ff.APART) * gated
        work = max(2 * rows * p.hidden_up * ((2 if gated else 1) * p.width + p.out_up), work_of_reading(self.weights))
        return PreparedCall(ff.feed_forward_float32, packed(p, ff.FEED_FORWARD), ADDRESSES, np.float32, p.shared_size,
                            p.private_size, work)
