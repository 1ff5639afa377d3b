"""Packing and calling of what an encoder block has beside attention, in float32: linear layers, feed-forwards, norms."""
from types import SimpleNamespace

import numpy as np

from edgeattn import threads
from edgeattn.runtime.jit import compiled_for

from . import feed_forward_float32 as ff
from .activation import ACTIVATIONS
from .matmul import pack_panels, round_up
from .norm import ADDRESSES, AT_WEIGHT, LAYER_NORM, NO_NORM, NORM, RMS_NORM, add_norm
from .records import blank, packed, slot
from .row_vectors import VIRTUAL_LANES
from .simd import WIDTH

NORMS = {"layer": LAYER_NORM, "rms": RMS_NORM}
_ROWS = slot(NORM, "rows"), slot(ff.LINEAR, "rows"), slot(ff.FEED_FORWARD, "rows")
_MOST_PLANS = 64
_entries = {}


def padded(array, *shape):
    """float32 of this shape, zeros beyond what is given; all zeros for None."""
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


def join(parts):
    """({name: position}, one aligned array) of arrays of 32-bit elements, each from a cache line on."""
    at, size = {}, 0
    for name, array in parts.items():
        at[name] = size
        size += round_up(array.size, 16)
    joined = threads.aligned(size, np.float32)
    joined[:] = 0
    for name, array in parts.items():
        joined[at[name]:at[name] + array.size] = array.ravel().view(np.float32)
    return at, joined


def address(array):
    """Where an array begins; 0 for None."""
    return 0 if array is None else array.__array_interface__["data"][0]


class Stage:
    """What the kernels have in common: parameters by the number of rows, addresses by the call."""

    kernel = None  # (parameters, addresses, scratch, task_queue, count)

    def __init__(self, weights):
        self._weights, self._plans = weights, {}

    def plan(self, rows):
        """(parameters, elements of scratch for all threads, for each, operations) for so many rows."""
        raise NotImplementedError

    def __call__(self, x, residual, out):
        """out (..., width) from x and residual, or None: float32, C order; out may be either; returns out."""
        rows = x.size // max(x.shape[-1], 1)
        if not out.size:
            return out
        plan = self._plans.get(rows)
        if plan is None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            plan = self._plans[rows] = self.plan(rows)
        parameters, shared, private, work = plan
        addresses = np.array((address(x), address(residual), address(out), address(self._weights)), np.int64)
        run = _entries.get(self.kernel)
        if run is None:
            run = _entries[self.kernel] = compiled_for(
                self.kernel, (parameters, addresses, np.zeros(1, np.float32), np.zeros(1, np.int64), 1))
        threads.run(run, (parameters, addresses), np.float32, shared, private, work)
        return out


class Norm(Stage):
    """out = norm(x + residual)

    Parameters
    ----------
    norm : tuple
        ("layer" or "rms", float32 weight, float32 bias or None, eps).
    """

    kernel = add_norm

    def __init__(self, norm):
        self._width, self._kind = len(norm[1]), norm_kind(norm)
        super().__init__(join({"norm": pack_norm(norm, self._width)})[1])

    def plan(self, rows):
        """See Stage."""
        row = round_up(self._width, VIRTUAL_LANES)
        p = blank(NORM, rows=rows, width=self._width, norm=self._kind, row=row, private_size=row)
        return packed(p, NORM), 0, row, 16 * rows * row


class Linear(Stage):
    """out = norm(activation(x weight^T + bias) + residual)

    Parameters
    ----------
    weight : (outputs, inputs) float32 array
    bias : (outputs,) float32 array or None
    activation : None, "relu", "gelu", "gelu_tanh" or "silu"
    norm : tuple or None
        ("layer" or "rms", float32 weight, float32 bias or None, eps).
    """

    kernel = ff.linear_float32

    def __init__(self, weight, bias, *, activation=None, norm=None):
        outputs, inputs = weight.shape
        up = round_up(outputs, VIRTUAL_LANES)
        at, weights = join({"w": pack_panels(padded(weight, up, inputs)), "b": padded(bias, up),
                            "at_norm": pack_norm(norm, outputs)})
        super().__init__(weights)
        self._parameters = blank(ff.LINEAR, width=inputs, out_width=outputs, out_up=up,
                                 activation=ACTIVATIONS[activation], norm=norm_kind(norm), **at)

    def plan(self, rows):
        """See Stage."""
        p = SimpleNamespace(**vars(self._parameters))
        p.rows = rows
        size = p.private_size = min(rows, ff.BLOCK) * p.out_up
        return packed(p, ff.LINEAR), 0, size, 2 * rows * p.out_up * (p.width + 8)


class FeedForward(Stage):
    """out = norm(w2 h + b2 + residual), h = activation(w1 x + b1); with norm_first out = w2 h + b2 + residual, h of norm(x)

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

    kernel = ff.feed_forward_float32

    def __init__(self, w1, b1, w2, b2, *, activation="gelu", gate=None, norm=None, norm_first=False):
        hidden, inputs = w1.shape
        outputs = len(w2)
        up, out_up = (round_up(n, VIRTUAL_LANES) for n in (hidden, outputs))
        gate_w, gate_b = (None, None) if gate is None else gate
        none = np.zeros(0, np.float32)
        first, last = (norm, None) if norm_first else (None, norm)
        at, weights = join({
            "w1": pack_panels(padded(w1, up, inputs)), "b1": padded(b1, up),
            "gate_w": none if gate is None else pack_panels(padded(gate_w, up, inputs)),
            "gate_b": none if gate is None else padded(gate_b, up),
            "w2": pack_panels(padded(w2, out_up, hidden)), "b2": padded(b2, out_up),
            "at_first": pack_norm(first, inputs), "at_last": pack_norm(last, outputs)})
        super().__init__(weights)
        self._parameters = blank(
            ff.FEED_FORWARD, width=inputs, hidden=hidden, out_width=outputs, width_up=round_up(inputs, VIRTUAL_LANES),
            hidden_up=up, out_up=out_up, activation=ACTIVATIONS[activation], gated=gate is not None,
            norm_first=norm_kind(first), norm_last=norm_kind(last), **at)

    def plan(self, rows):
        """See Stage."""
        p = SimpleNamespace(**vars(self._parameters))
        p.rows = rows
        few, some = rows if rows <= ff.FEW_ROWS else 0, min(rows, ff.BLOCK)
        normed, gated = p.norm_first != NO_NORM, p.gated
        p.at_rows = 0
        p.at_hidden = p.at_rows + few * p.width_up * normed
        p.at_sums = p.at_hidden + few * p.hidden_up
        p.shared_size = p.at_sums + few * p.out_up
        p.own_rows = 0
        p.own_hidden = p.own_rows + some * p.width_up * normed
        p.own_sums = p.own_hidden + some * ff.HIDDEN
        p.own_gate = p.own_sums + some * p.out_up
        p.private_size = p.own_gate + some * ff.HIDDEN * gated
        work = 2 * rows * p.hidden_up * ((2 if gated else 1) * p.width + p.out_up)
        return packed(p, ff.FEED_FORWARD), p.shared_size, p.private_size, work
