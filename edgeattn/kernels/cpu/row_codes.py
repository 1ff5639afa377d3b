"""Rows of float32 to int8 codes, and codes to rows: the two ends of what a block computes in static int8.

    input   x = clamp(rint(y / scale) + zero point), y a row or its norm; what the range leaves of a feature stands in a
            further column
    out     norm(reals of codes + residual); what further channels hold is added to those that they go on from

Where `codes` is set, both ends have codes already, and copy them.
"""
import numpy as np

from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import inline, jit, task
from edgeattn.runtime.worker_pool import parallel_for

from .int8_operands import BYTE_FLIP, FLIP
from .int8_views import Part, scratch_at
from .matmul import round_up
from .norm import AT_ONCE, NO_NORM, finish_row, normalize_rows, read_row
from .quantize import dequantize_row, quantize_vectors
from .records import located, named, real, record
from .row_parts import BLOCK, parts_of_rows
from .simd import LANES, VIRTUAL_LANES, address_of, load, pointer_to, splat, store, wide_splat
from .token_codes import pack_tokens

# Of weights: positions in elements of 32 bits; `more_inputs`: what each further column is left of, a feature or another
# such column; `more_outputs`: of each further channel the one it is added to, and the code that adds nothing.
ROWS_AND_CODES = ("rows width columns out_width channels depth4 out_up codes norm_first norm_last z2 scale inverse "
                  "zero out_scale more_inputs more_outputs at_first at_last at_x at_nan at_row row_step private_size")
ENDS = record(ROWS_AND_CODES)
ENDS_ADDRESSES = record("x residual codes nan weights")  # rows of float32, int8 codes, float32 of each row
_ZERO, _NAN = np.float32(0), np.float32(np.nan)
_FLIP = np.int32(BYTE_FLIP)  # of a byte in 32 bits


@inline
def codes_of_row(s, p, at, to, at_nan):
    """A row of 4 * depth4 to bytes, an unsigned operand; and whether it holds NaN, which no code stands for."""
    nan = quantize_vectors(s.float32, at, 4 * p.depth4, real(p.inverse), real(p.zero), _FLIP, s.int8, to)
    s.float32[at_nan] = _NAN if nan else _ZERO


@inline
def widen_row(s, w, p, at):
    """Zeros behind a row, and in its further columns what the range leaves of others."""
    for i in range(round_up(p.width, VIRTUAL_LANES), 4 * p.depth4, VIRTUAL_LANES):
        store(s.float32, at + i, wide_splat(_ZERO))
    scale, inverse, zero = real(p.scale), real(p.inverse), real(p.zero)
    low, high = np.float32(-128) - zero, np.float32(127) - zero
    for k in range(p.columns - p.width):
        value = s.float32[at + np.int64(w.int32[p.more_inputs + k])]
        s.float32[at + p.width + k] = value - min(max(np.rint(value * inverse), low), high) * scale


@task
def read_codes(s, w, p, x, row, rows, to, at_nan, own):
    """Rows of x, an address, from `row` on, at most AT_ONCE, as unsigned operands from `to` on; own: room for rows.

    Each step is done to all rows: while one waits for what it has computed others go on.
    """
    if p.codes != 0:
        for r in range(rows):
            pack_tokens(Part(pointer_to(x, np.int8), (row + r) * p.columns), p.columns, 1, 1,
                        Part(s.int32, to + r * p.depth4), p.depth4)
        return
    at, step = own + p.at_row, p.row_step
    for r in range(rows):
        read_row(pointer_to(x, np.float32), (row + r) * p.width, p.width, s.float32, at + r * step)
    if p.norm_first != NO_NORM:
        separately(normalize_rows, (s.float32, at, step, rows, p.width, p.norm_first, w.float32, p.at_first,
                                    at + AT_ONCE * step))
    for r in range(rows):
        widen_row(s, w, p, at + r * step)
    for r in range(rows):
        codes_of_row(s, p, at + r * step, 4 * (to + r * p.depth4), at_nan + r)


@task
def write_codes(s, w, p, codes, nan, residual, out, row, own):
    """Codes, bytes as Part, to row `row` of out; residual, out: addresses; nan: 0, or NaN."""
    if p.codes != 0:
        to = pointer_to(out, np.int8)
        for i in range(p.channels):
            to[row * p.channels + i] = codes.data[codes.at + i]
        return
    y, zero, scale = own + p.at_row, np.float32(p.z2), real(p.out_scale)
    dequantize_row(codes.data, codes.at, p.out_width, scale, zero, s.float32, y)
    if nan != _ZERO:
        for i in range(p.out_width):
            s.float32[y + i] = nan
    for k in range(p.channels - p.out_width):
        channel, none = y + np.int64(w.int32[p.more_outputs + 2 * k]), w.int32[p.more_outputs + 2 * k + 1]
        more = np.float32(np.int32(codes.data[codes.at + p.out_width + k]) - none)
        s.float32[channel] = s.float32[channel] + more * scale
    for i in range(p.out_width, round_up(p.out_width, VIRTUAL_LANES)):
        s.float32[y + i] = _ZERO
    finish_row(s.float32, y, p.out_width, residual, row, p.norm_last, w.float32, p.at_last, out)


@inline
def copy_codes(s, at, count, codes, to):
    """Codes of unsigned operands from `at` on, to wherever `to` is."""
    whole, groups = count // (4 * LANES) * LANES, pointer_to(address_of(codes) + to, np.int32)
    for i in range(0, whole, LANES):
        store(groups, i, load(s.int32, at + i) ^ splat(FLIP))
    for i in range(4 * whole, count):
        codes[to + i] = s.int8[4 * at + i] ^ BYTE_FLIP


@task
def rows_to_codes_part(p, a, scratch, portion, worker, part):
    """A portion of the rows."""
    s, w, own = scratch_at(scratch), scratch_at(a.weights), worker * p.private_size
    codes, nan, at = pointer_to(a.codes, np.int8), pointer_to(a.nan, np.float32), own + p.at_x
    end = min((part + 1) * portion, p.rows)
    for row in range(part * portion, end, AT_ONCE):
        rows = min(AT_ONCE, end - row)
        separately(read_codes, (s, w, p, a.x, row, rows, at, own + p.at_nan, own))
        for r in range(rows):
            nan[row + r] = s.float32[own + p.at_nan + r]
            copy_codes(s, at + r * p.depth4, p.columns, codes, (row + r) * p.columns)


@jit
def rows_to_codes(parameters, addresses, scratch, task_queue, count):
    """Codes of rows or of their norm, the first step of `feed_forward_int8`; nan: of each row, 0 or NaN.

    parameters ENDS, addresses ENDS_ADDRESSES; scratch: `private_size` elements for each of `count` threads.
    """
    p, a = named(parameters, ENDS), located(addresses, ENDS_ADDRESSES)
    portion, parts = parts_of_rows(p.rows, BLOCK, count)
    parallel_for(task_queue, parts, rows_to_codes_part, p, a, address_of(scratch), portion)


@task
def codes_to_rows_part(p, a, scratch, portion, worker, part):
    """A portion of the rows."""
    s, w, own = scratch_at(scratch), scratch_at(a.weights), worker * p.private_size
    nan, codes = pointer_to(a.nan, np.float32), pointer_to(a.codes, np.int8)
    for row in range(part * portion, min((part + 1) * portion, p.rows)):
        some = Part(codes, row * p.channels)
        separately(write_codes, (s, w, p, some, nan[row], a.residual, a.x, row, own))


@jit
def codes_to_rows(parameters, addresses, scratch, task_queue, count):
    """Rows of codes, residual and norm, the last step of `feed_forward_int8`: to x; otherwise as `rows_to_codes`."""
    p, a = named(parameters, ENDS), located(addresses, ENDS_ADDRESSES)
    portion, parts = parts_of_rows(p.rows, BLOCK, count)
    parallel_for(task_queue, parts, codes_to_rows_part, p, a, address_of(scratch), portion)
