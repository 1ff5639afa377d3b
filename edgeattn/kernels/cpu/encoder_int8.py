"""Packing and calling of what an encoder block has in static int8: feed-forwards, and rows to codes and back."""
import numpy as np

from edgeattn.runtime.plan_cache import shared_plans

from . import feed_forward_int8 as ff
from .byte_products import DEPTH_STEP, READ_AHEAD, pack_byte_panels
from .call import PreparedCall
from .encoder_float32 import RowKernel, norm_kind, pack, pack_norm
from .int8_operands import BYTE_FLIP
from .layer_int8 import corrected_bias
from .matmul import round_up
from .norm import ADDRESSES, AT_ONCE, MEANS
from .records import bits_of_real, blank, copy_of, packed, place
from .requantize import NUMBERS, encode
from .row_codes import ENDS, ENDS_ADDRESSES, codes_to_rows, rows_to_codes
from .row_parts import BLOCK, FEW_ROWS
from .simd import ADDS_FIRST, LANES, VIRTUAL_LANES, WIDTH, own_products
from .word_products import panel_of_words, rows_of_words


def packed_depth(columns):
    """Groups of four bytes in a row that is quantized vector by vector, and multiplied two groups at a time."""
    depth4 = round_up(-(-columns // 4), max(LANES // 4, DEPTH_STEP))
    return max(depth4, LANES) if ADDS_FIRST else depth4  # what `split_row` takes at once


def _input(width, quantization, more_inputs, norm):
    """Fields and arrays of rows that become codes."""
    columns = width + len(more_inputs)
    scale, zero_point = quantization
    fields = dict(width=width, columns=columns, depth4=packed_depth(columns), norm_first=norm_kind(norm),
                  scale=bits_of_real(scale), inverse=bits_of_real(np.float32(1) / scale),
                  zero=bits_of_real(zero_point))
    return fields, {"more_inputs": np.array(more_inputs, np.int32), "at_first": pack_norm(norm, width)}


def _output(width, quantization, more_outputs, norm):
    """Fields and arrays of codes that become rows."""
    channels, (scale, zero_point) = width + len(more_outputs), quantization
    fields = dict(out_width=width, channels=channels, out_up=round_up(channels, WIDTH), z2=zero_point,
                  out_scale=bits_of_real(scale), norm_last=norm_kind(norm))
    return fields, {"more_outputs": np.array(more_outputs, np.int32).reshape(-1), "at_last": pack_norm(norm, width)}


def _place_rows(p, size):
    """Room for AT_ONCE rows, with their further columns or channels, and what a norm leaves of them.

    Returns the elements of scratch by then.
    """
    p.row_step = round_up(max(4 * p.depth4, p.out_up), VIRTUAL_LANES) + VIRTUAL_LANES
    p.at_row, size = place(size, AT_ONCE * p.row_step + MEANS)
    return size


class FeedForward(RowKernel):
    """out = norm(linear2(table[linear1(x)]) + residual), codes in between.

    With norm_first out = linear2(..) + residual, and the codes are those of norm(x).

    Parameters
    ----------
    linear1, linear2 : tuple
        (weight int8 (outputs, inputs), real multipliers float64 (outputs,), bias int32 (outputs,) or None), as
        StaticLayer takes them.
    gate : tuple or None
        As linear1: hidden = (table[gate(x)] - zero point) * (linear1(x) - zero point), requantized.
    table : (256,) int8 array
        The activation: of code c at c + 128.
    product : float
        Real multiplier of the product with the gate.
    zero_points : dict
        Of "input", "linear1", "linear2" and "hidden", what linear2 reads; with a gate of "gate" and "activation" too.
    scale, out_scale : float32
        Of the input and of the result.
    project_rule, multiply_rule : str
        Names of RULES.
    more_inputs : sequence of int
        Of each further column of the input the feature, or further column, whose rest it holds.
    more_outputs : sequence of (int, int)
        Of each further output of linear2 the one it is added to, and the code that adds nothing.
    norm, norm_first
        As in encoder_float32.
    """

    def __init__(self, linear1, linear2, *, gate=None, table, product=0.0, zero_points, scale, out_scale, project_rule,
                 multiply_rule, more_inputs=(), more_outputs=(), norm=None, norm_first=False):
        hidden, columns = linear1[0].shape
        first, last = (norm, None) if norm_first else (None, norm)
        before, arrays = _input(columns - len(more_inputs), (scale, zero_points["input"]), more_inputs, first)
        after, ends = _output(len(linear2[0]) - len(more_outputs), (out_scale, zero_points["linear2"]), more_outputs,
                              last)
        hidden_up, depth = round_up(hidden, ff.FEATURES), 4 * before["depth4"]

        def linear(names, given, outputs, inputs, source):
            weight, real, bias = given
            wide = np.zeros((outputs, inputs), np.int8)
            wide[:weight.shape[0], :weight.shape[1]] = weight
            wide_bias, wide_real = np.zeros(outputs, np.int32), np.zeros(outputs)
            wide_real[:len(real)] = real
            if bias is not None:
                wide_bias[:len(bias)] = bias
            terms = corrected_bias(wide, wide_bias, zero_points[source])
            if ADDS_FIRST:
                terms = np.concatenate((terms, -own_products(wide)))
            parts = pack_byte_panels(wide), terms, encode(project_rule, wide_real)
            return dict(zip(names, parts, strict=True))

        arrays |= ends | linear(("w1", "b1", "m1"), linear1, hidden_up, depth, "input")
        arrays |= linear(("w2", "b2", "m2"), linear2, after["out_up"], hidden_up, "hidden")
        if gate is not None:
            arrays |= linear(("gate_w", "gate_b", "gate_m"), gate, hidden_up, depth, "input")
            arrays |= {"multiplier": encode(multiply_rule, [product] * LANES)}
        at, weights = pack(**arrays, table=table if gate is not None else table ^ BYTE_FLIP)
        super().__init__(blank(
            ff.FEED_FORWARD, **before, **after, hidden_up=hidden_up, gated=gate is not None,
            project_rule=NUMBERS[project_rule], multiply_rule=NUMBERS[multiply_rule], z1=zero_points["linear1"],
            gate_z=zero_points.get("gate", 0), active_z=zero_points.get("activation", 0), zh=zero_points["hidden"],
            **at), weights)

    def of_codes(self, x, out):
        """out (rows, outputs) from x (rows, columns), int8 and C-contiguous, nothing around it; returns out."""
        if out.size:
            key = len(x), "codes"
            call = self._plans.get(key) or self._plans.keep(key, self.prepare(len(x), codes=True))
            call.run_four(x, None, out, self.weights)
        return out

    def prepare(self, rows, codes=False):
        """See RowKernel."""
        p = self._for(rows=rows, codes=codes)
        some = min(rows, BLOCK)
        up = round_up(some, READ_AHEAD)
        p.at_x, size = place(0, up * p.depth4)
        p.at_nan, size = place(size, some)
        p.at_hidden, size = place(size, up * p.hidden_up // 4)
        p.at_gate, size = place(size, up * p.hidden_up // 4 * p.gated)
        p.at_codes, size = place(size, up * p.out_up // 4)
        deepest = max(p.depth4, p.hidden_up // 4)
        p.at_words, size = place(size, rows_of_words(some, deepest))
        p.at_own, size = place(size, some)
        p.shared_size = size if rows <= FEW_ROWS else 0
        size = _place_rows(p, size)
        p.at_tiles, p.private_size = place(size, ff.WIDE + panel_of_words(deepest))
        work = 2 * rows * p.hidden_up * ((2 if p.gated else 1) * 4 * p.depth4 + p.out_up) // 3
        return PreparedCall(ff.feed_forward_int8, packed(p, ff.FEED_FORWARD), ADDRESSES, np.int32, p.shared_size,
                            p.private_size, work)


class Ends:
    """Rows to codes and codes to rows, for a layer between them that takes codes.

    Parameters
    ----------
    width, out_width : int
    quantization : (scale, zero point) of the codes of rows
    out_quantization : (scale, zero point)
    more_inputs, norm, norm_first
        As of FeedForward.
    """

    def __init__(self, width, out_width, quantization, out_quantization, *, more_inputs=(), norm=None,
                 norm_first=False):
        first, last = (norm, None) if norm_first else (None, norm)
        before, arrays = _input(width, quantization, more_inputs, first)
        after, ends = _output(out_width, out_quantization, (), last)
        at, weights = pack(**arrays, **ends)
        self._parameters = blank(ENDS, **before, **after, **at)
        self._weights, self._plans = weights, shared_plans((Ends, *vars(self._parameters).values()))

    def to_codes(self, x):
        """(int8 codes (rows, columns), float32 (rows,) of x (rows, width): 0, or NaN where it holds one)."""
        codes, nan = np.empty((len(x), self._parameters.columns), np.int8), np.empty(len(x), np.float32)
        if codes.size:
            self._call(rows_to_codes, len(x))(x, None, codes, nan, self._weights)
        return codes, nan

    def to_rows(self, codes, nan, residual):
        """float32 (rows, out_width) of codes (rows, out_width): norm(reals + residual), NaN where `nan` is."""
        out = np.empty(codes.shape, np.float32)
        if out.size:
            self._call(codes_to_rows, len(codes))(out, residual, codes, nan, self._weights)
        return out

    def on(self, x, codes, nan, residual, out):
        """(to_codes, to_rows) between these arrays: functions that do it, see `PreparedCall.on`."""
        return (self._call(rows_to_codes, len(codes)).on(x, None, codes, nan, self._weights),
                self._call(codes_to_rows, len(codes)).on(out, residual, codes, nan, self._weights))

    def _call(self, kernel, rows):
        key = kernel, rows
        return self._plans.get(key) or self._plans.keep(key, self._prepare(*key))

    def _prepare(self, kernel, rows):
        p = copy_of(self._parameters, rows=rows)
        p.at_nan, size = place(0, AT_ONCE)
        p.at_x, size = place(size, AT_ONCE * p.depth4)
        p.private_size = _place_rows(p, size)
        return PreparedCall(kernel, packed(p, ENDS), ENDS_ADDRESSES, np.int32, 0, p.private_size,
                            16 * rows * (4 * p.depth4))
