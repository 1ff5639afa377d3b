"""Packing and calling of what an encoder block has beside attention, in dynamic int8: linear layers, feed-forwards."""
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeattn.threads import work_of_reading

from . import feed_forward_dynamic as ff
from .activation import ACTIVATIONS
from .byte_products import pack_byte_panels
from .call import PreparedCall
from .dynamic import COLUMNS_APART
from .dynamic_rows import BLOCK, DEPTH, WORDS
from .encoder_float32 import RowKernel, norm_kind, pack, pack_norm, padded
from .layer_dynamic import SMALLEST_WEIGHT, quantize_weight
from .linear_dynamic import LINEAR, linear_dynamic
from .matmul import round_up
from .norm import ADDRESSES
from .projection_dynamic import join_depth
from .records import blank, packed, place
from .row_parts import FEW_ROWS
from .simd import ADDS_FIRST, ROWS, VIRTUAL_LANES, WIDTH, own_products
from .word_products import panel_of_words

MOST_OUTLIERS = COLUMNS_APART


class QuantizedWeight(NamedTuple):
    """A weight (outputs, inputs) as bytes: weight = codes * scale, where not said otherwise."""

    codes: NDArray[np.int8]  # (outputs + second channels, inputs)
    scale: NDArray[np.float32]  # (outputs + second channels,)
    residual_outputs: NDArray[np.int64]  # which output each of the second channels is added to
    outlier_columns: NDArray[np.int64]  # inputs whose products are float32: their codes are 0
    outlier_weight: NDArray[np.float32]  # (outputs, outlier columns)


def quantize_linear(weight, *, columns=(), split=None):
    """Round a float32 weight (outputs, inputs) to bytes, symmetric, a scale per output.

    Parameters
    ----------
    weight : ndarray
    columns : sequence of int
        Inputs whose weights stay float32, at most 4: those that are much larger than the others.
    split : float or None
        Outputs whose largest weight is more than `split` times the median of all are given two bytes a weight.
    """
    columns = np.sort(np.asarray(columns, np.int64))
    if len(columns) > COLUMNS_APART:
        raise ValueError(f"columns must be at most {COLUMNS_APART} inputs, got {len(columns)}")
    rest = weight.astype(np.float32)
    apart = rest[:, columns]
    rest[:, columns] = 0
    codes, scale = quantize_weight(rest)
    low = np.zeros(0, np.int64)
    if split is not None:
        largest = np.abs(rest).max(1, initial=0)
        low = np.flatnonzero(largest > max(split * np.median(largest), SMALLEST_WEIGHT))
        fine = (largest[low] / np.float32(127 * 127)).astype(np.float32)
        steps = np.rint(rest[low] / fine[:, None]).astype(np.int64)
        codes[low] = np.rint(steps / 127).astype(np.int8)
        scale[low] = fine * np.float32(127)
        codes = np.concatenate((codes, (steps - 127 * codes[low].astype(np.int64)).astype(np.int8)))
        scale = np.concatenate((scale, fine))
    return QuantizedWeight(codes, scale, low, columns, apart)


def _quantized(weight):
    """A QuantizedWeight from one, from float32 weights, or from (codes, scale)."""
    if isinstance(weight, QuantizedWeight):
        return weight
    codes, scale = weight if isinstance(weight, tuple) else quantize_weight(weight)
    none = np.zeros(0, np.int64)
    return QuantizedWeight(codes, scale, none, none, np.zeros((len(codes), 0), np.float32))


class _Channels(NamedTuple):
    """Sizes of a linear layer's outputs: those there are, where second ones begin, and all."""

    outputs: int
    up: int
    columns: int

    def spread(self, array):
        """An array by outputs and second channels, its first axis as kernels have them; perhaps the array itself."""
        if len(array) == self.outputs == self.columns:
            return array
        out = np.zeros((self.columns, *array.shape[1:]), array.dtype)
        out[:self.outputs] = array[:self.outputs]
        out[self.up:self.up + len(array) - self.outputs] = array[self.outputs:]
        return out


def _channels(weight, multiple=VIRTUAL_LANES):
    outputs = len(weight.codes) - len(weight.residual_outputs)
    up = round_up(outputs, multiple)
    return _Channels(outputs, up, up + round_up(len(weight.residual_outputs), WIDTH))


def _sums_of(codes):
    """Each channel's sum, and where kernels need them minus its own products."""
    sums = codes.sum(1, dtype=np.int32)
    return np.concatenate((sums, -own_products(join_depth(codes)))) if ADDS_FIRST else sums


def _pack(weight, bias, channels, group, w, c, s, b, v):
    """{name: array} of a weight's parts as kernels read them, its inputs in groups of `group`."""
    codes = channels.spread(weight.codes)
    if codes.shape[1] % DEPTH:
        codes = np.pad(codes, ((0, 0), (0, round_up(codes.shape[1], DEPTH) - codes.shape[1])))
    groups = [codes[:, i:i + group] for i in range(0, codes.shape[1], group)]
    apart = np.zeros((len(weight.outlier_columns), channels.columns), np.float32)
    apart[:, :channels.outputs] = weight.outlier_weight.T
    return {w: np.concatenate([pack_byte_panels(join_depth(some)) for some in groups]),
            c: np.concatenate([_sums_of(some) for some in groups]),
            s: channels.spread(weight.scale), b: padded(bias, channels.columns), v: apart}


def _rows_of(p, rows, groups4, columns):
    """Lay out what belongs to so many rows together; the elements it takes."""
    p.at_bytes, size = place(0, round_up(rows, ROWS) * groups4 * WORDS)
    p.at_scale, size = place(size, rows)
    p.at_minus, size = place(size, rows)
    p.at_own, size = place(size, rows)
    p.at_apart, size = place(size, rows * COLUMNS_APART)
    p.at_sums, size = place(size, rows * columns)
    return size


class Linear(RowKernel):
    """encoder_float32.Linear with a weight of bytes: float32, (int8 codes, float32 scale) or a QuantizedWeight."""

    def __init__(self, weight, bias, *, activation=None, norm=None):
        weight = _quantized(weight)
        channels, inputs = _channels(weight), weight.codes.shape[1]
        deep = round_up(inputs, DEPTH)
        at, weights = pack(
            **_pack(weight, bias, channels, max(deep, 1), "w", "c", "s", "b", "v"),
            j=weight.outlier_columns.astype(np.int32), low=weight.residual_outputs.astype(np.int32),
            at_norm=pack_norm(norm, channels.outputs))
        super().__init__(blank(
            LINEAR, width=inputs, out_width=channels.outputs, out_up=channels.up, columns=channels.columns,
            groups4=deep // 4, activation=ACTIVATIONS[activation], norm=norm_kind(norm),
            apart=len(weight.outlier_columns), lows=len(weight.residual_outputs), **at), weights)

    def prepare(self, rows):
        """See RowKernel."""
        p = self._for(rows=rows)
        size = _rows_of(p, min(rows, BLOCK), p.groups4, p.columns)
        p.shared_size = size if rows <= FEW_ROWS else 0
        p.at_wide, size = place(size, panel_of_words(p.groups4))
        p.at_row, p.private_size = place(size, 4 * p.groups4 + VIRTUAL_LANES)
        work = 2 * rows * p.columns * (4 * p.groups4 + 8)
        return PreparedCall(linear_dynamic, packed(p, LINEAR), ADDRESSES, np.float32, p.shared_size,
                            p.private_size, work)


class FeedForward(RowKernel):
    """encoder_float32.FeedForward with weights of bytes: float32, (int8 codes, float32 scale) or a QuantizedWeight.

    Only `w2` may have second channels; the columns that are apart are the same in `w1` and in the gate.
    """

    def __init__(self, w1, b1, w2, b2, *, activation="gelu", gate=None, norm=None, norm_first=False):
        w1, w2 = _quantized(w1), _quantized(w2)
        gate_w, gate_b = (w1, None) if gate is None else (_quantized(gate[0]), gate[1])
        if len(w1.residual_outputs) or len(gate_w.residual_outputs):
            raise ValueError("w1 and gate must have one byte a weight, got second channels: quantize with split=None")
        if w1.outlier_columns.tolist() != gate_w.outlier_columns.tolist():  # np.array_equal hides what a signal raises
            raise ValueError("w1 and gate must have the same columns apart, got "
                             f"{w1.outlier_columns}, {gate_w.outlier_columns}")
        hidden, inputs = w1.codes.shape
        raised, lowered = _channels(w1, DEPTH), _channels(w2)
        deep = round_up(inputs, DEPTH)
        first, last = (norm, None) if norm_first else (None, norm)
        parts = _pack(w1, b1, raised, max(deep, 1), "w1", "c1", "s1", "b1", "v1")
        if gate is not None:
            parts |= _pack(gate_w, gate_b, raised, max(deep, 1), "gate_w", "gate_c", "gate_s", "gate_b", "gate_v")
        parts |= _pack(w2, b2, lowered, ff.GROUP, "w2", "c2", "s2", "b2", "v2")
        at, weights = pack(
            **parts, j1=w1.outlier_columns.astype(np.int32), j2=w2.outlier_columns.astype(np.int32),
            low=w2.residual_outputs.astype(np.int32),
            at_first=pack_norm(first, inputs), at_last=pack_norm(last, lowered.outputs))
        super().__init__(blank(
            ff.FEED_FORWARD, width=inputs, hidden=hidden, out_width=lowered.outputs, hidden_up=raised.up,
            out_up=lowered.up, columns=lowered.columns, groups4=deep // 4, activation=ACTIVATIONS[activation],
            gated=gate is not None, norm_first=norm_kind(first), norm_last=norm_kind(last),
            apart1=len(w1.outlier_columns), apart2=len(w2.outlier_columns),
            lows=len(w2.residual_outputs), **at), weights)

    def prepare(self, rows):
        """See RowKernel."""
        p = self._for(rows=rows)
        some = min(rows, BLOCK)
        groups = max(-(-p.hidden // ff.GROUP), 1) if rows <= FEW_ROWS else 1
        codes = round_up(some, ROWS) * ff.GROUP // 4 * WORDS
        p.codes_step, p.scales_step = (codes, some) if groups > 1 else (0, 0)
        size = _rows_of(p, some, p.groups4, p.columns)
        p.at_codes, size = place(size, groups * codes)
        p.at_code_scale, size = place(size, groups * some)
        p.at_code_minus, size = place(size, groups * some)
        p.at_code_own, size = place(size, groups * some)
        p.at_hidden_apart, size = place(size, some * COLUMNS_APART)
        p.shared_size = size if rows <= FEW_ROWS else 0
        p.at_wide, size = place(size, panel_of_words(max(p.groups4, ff.GROUP // 4)))
        p.at_row, size = place(size, 4 * p.groups4 + VIRTUAL_LANES)
        p.at_hidden, size = place(size, some * ff.ROW)
        p.at_gate, p.private_size = place(size, some * ff.ROW * p.gated)
        work = max(2 * rows * p.hidden_up * ((2 if p.gated else 1) * 4 * p.groups4 + p.columns),
                   work_of_reading(self.weights))
        return PreparedCall(ff.feed_forward_dynamic, packed(p, ff.FEED_FORWARD), ADDRESSES, np.float32, p.shared_size,
                            p.private_size, work)
