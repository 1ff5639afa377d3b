"""The three int8 softmax rules on transposed scores: queries in lanes, four keys to a lane, sums in key order.

Each rule looks up one value per score in a table of 256 entries, indexed by (row maximum - code), adds them up in key
order, and turns each value into a probability 0..255 (the int8 code plus 128) with what follows from the sum:

  lut_f32   float32 exponentials, float32 sum; round_half_away(e * 1 / (sum / 256))
  lut_u16   exponentials times 65535 as integers; `double` by the multiplier 1 / (sum / 256)
  fixed     gemmlowp exp in Q0.31, sum in Q12.19, Newton reciprocal

`softmax` takes (table, rule, codes, groups, masks, masked, values, rows): codes (groups, W) of scores become, in place,
bytes of probabilities as the product with V wants them.

  rule    a number of NUMBERS
  table   address of 256 entries as `simd.byte_planes` arranges them: float32 for lut_f32, int32 for the others
  codes, masks, values, rows: Parts, of int32
  masks   (groups, W) bytes 0 or 255; a key whose byte is 0 is not there
  values  scratch (4 min(groups, KEPT_GROUPS), W) of 32 bits; rows: scratch (2, W)
"""
import numpy as np

from edgeattn.runtime.compiler import inline

from .int8_operands import FLIP, SIGN_BITS
from .int8_views import Part
from .requantize import divide_by_power, doubling_high
from .simd import (
    LANES,
    WIDTH,
    address_of,
    bits_of,
    float_of_bits,
    larger_bytes,
    load,
    look_up_bytes,
    maximum,
    narrow,
    pack_bytes,
    pointer_to,
    select,
    shift_right_logical,
    smaller,
    splat,
    store,
    subtract_bytes,
    to_float,
    truncate,
)

LOWEST_CODES = SIGN_BITS  # four codes -128
_ONE = np.float32(1)
_LARGEST_SUM = np.int32(1 << 30)  # 2048 in Q12.19: sums from 512 on are all one, and must not overflow
_TO_PROBABILITY = np.float32(1 / 256)
# The float32 below one half: adding it and truncating rounds halves up and never lifts 0.49999997 to 1.
_HALF_ROUNDED_DOWN = np.float32(0.49999997)
KEPT_GROUPS = 128  # groups of keys whose values are kept for the second pass; those of longer rows are looked up again


@inline
def maximum_codes(codes, groups):
    """Row maxima over codes (groups, W) of four keys per lane: the two vectors of maxima, repeated in all bytes."""
    m0 = splat(LOWEST_CODES)
    m1 = splat(LOWEST_CODES)
    for g in range(groups):
        m0 = larger_bytes(m0, load(codes.data, codes.at + g * WIDTH))
        m1 = larger_bytes(m1, load(codes.data, codes.at + g * WIDTH + LANES))
    return spread_maximum(m0), spread_maximum(m1)


@inline
def spread_maximum(m):
    """The largest of a lane's four signed bytes, in all four."""
    m = larger_bytes(m, shift_right_logical(m, splat(np.int32(16))) | (m << splat(np.int32(16))))
    return larger_bytes(m, shift_right_logical(m, splat(np.int32(8))) | (m << splat(np.int32(24))))


@inline
def _kept(value, mask, shift):
    """value where byte `shift / 8` of mask is set, else 0 (the bits of a float32 zero too)."""
    return value & ((mask << splat(np.int32(24 - shift))) >> splat(np.int32(24)))


@inline
def _float_values(table, m, codes, masks, i, masked):
    """The exponentials of four keys to a lane, one vector for each of the four."""
    e0, e1, e2, e3 = look_up_bytes(table, subtract_bytes(m, load(codes.data, codes.at + i)))
    if masked:
        mask = load(masks.data, masks.at + i)
        e0 = float_of_bits(_kept(bits_of(e0), mask, 0))
        e1 = float_of_bits(_kept(bits_of(e1), mask, 8))
        e2 = float_of_bits(_kept(bits_of(e2), mask, 16))
        e3 = float_of_bits(_kept(bits_of(e3), mask, 24))
    return e0, e1, e2, e3


@inline
def _float_sums(table, codes, groups, masks, masked, values, m0, m1):
    s0 = splat(np.float32(0))
    s1 = splat(np.float32(0))
    for g in range(groups):
        i = g * WIDTH
        a0, a1, a2, a3 = _float_values(table, m0, codes, masks, i, masked)
        b0, b1, b2, b3 = _float_values(table, m1, codes, masks, i + LANES, masked)
        s0 = s0 + a0
        s1 = s1 + b0
        s0 = s0 + a1
        s1 = s1 + b1
        s0 = s0 + a2
        s1 = s1 + b2
        s0 = s0 + a3
        s1 = s1 + b3
        if g < KEPT_GROUPS:
            _keep(values, 4 * i, a0, a1, a2, a3)
            _keep(values, 4 * i + LANES, b0, b1, b2, b3)
    return s0, s1


@inline
def _keep(values, i, v0, v1, v2, v3):
    at = values.at + i
    store(values.data, at, v0)
    store(values.data, at + WIDTH, v1)
    store(values.data, at + 2 * WIDTH, v2)
    store(values.data, at + 3 * WIDTH, v3)


@inline
def _kept_values(values, i):
    at = values.at + i
    return (load(values.data, at), load(values.data, at + WIDTH), load(values.data, at + 2 * WIDTH),
            load(values.data, at + 3 * WIDTH))


@inline
def _float_probability(e, inverse):
    return truncate(e * inverse + splat(_HALF_ROUNDED_DOWN))


@inline
def _softmax_float(address, codes, groups, masks, masked, kept):
    """The rule lut_f32."""
    table, values = pointer_to(address, np.float32), Part(pointer_to(address_of(kept.data), np.float32), kept.at)
    m0, m1 = maximum_codes(codes, groups)
    if masked:
        s0, s1 = _float_sums(table, codes, groups, masks, True, values, m0, m1)
    else:
        s0, s1 = _float_sums(table, codes, groups, masks, False, values, m0, m1)
    for c in range(2):
        m = m0 if c == 0 else m1
        inverse = splat(_ONE) / ((s0 if c == 0 else s1) * splat(_TO_PROBABILITY))
        if masked:  # an empty row has sum 0: its values are 0, and so must be the probabilities
            empty = (s0 if c == 0 else s1) == splat(np.float32(0))
            inverse = _zero_where(empty, inverse)
        for g in range(groups):
            i = g * WIDTH + c * LANES
            if g < KEPT_GROUPS:
                e0, e1, e2, e3 = _kept_values(values, 4 * g * WIDTH + c * LANES)
            else:
                e0, e1, e2, e3 = _float_values(table, m, codes, masks, i, masked)
            packed = pack_bytes(_float_probability(e0, inverse), _float_probability(e1, inverse),
                                _float_probability(e2, inverse), _float_probability(e3, inverse), np.int32(-128))
            store(codes.data, codes.at + i, packed ^ splat(FLIP))


@inline
def _zero_where(mask, v):
    return select(mask, splat(np.float32(0)), v)


@inline
def reciprocal_fixed(total):
    """gemmlowp GetReciprocal of a Q12.19 sum: (scale Q0.31, shift), scale * 2**-shift = 1 / total."""
    zeros = 0
    while zeros < 32 and (total << zeros) & (1 << 31) == 0:
        zeros += 1
    x = (total << zeros) - (1 << 31)
    half = (x + 2147483647 + 1) >> 1  # Q0.31: (x + 1) / 2 rounded
    r = 1515870810 + ((half * -1010580540 + (1 << 30)) >> 31)  # Q2.29: 48/17 - 32/17 half
    for _ in range(3):
        product = (half * r + (1 << 30)) >> 31
        correction = (r * ((1 << 29) - product) + (1 << 30)) >> 31
        r = r + correction * 4
    return min(r * 2, 2147483647), 12 - zeros + 31 - 8


@inline
def _integer_values(table, m, codes, masks, i, masked):
    """The exponentials of four keys to a lane, one vector for each of the four."""
    e0, e1, e2, e3 = look_up_bytes(table, subtract_bytes(m, load(codes.data, codes.at + i)))
    if masked:
        mask = load(masks.data, masks.at + i)
        e0, e1, e2, e3 = _kept(e0, mask, 0), _kept(e1, mask, 8), _kept(e2, mask, 16), _kept(e3, mask, 24)
    return e0, e1, e2, e3


@inline
def _rounded(e, fixed):
    """What a value adds to the sum: of Q0.31 the rounded Q12.19."""
    return divide_by_power(e, splat(np.int32(12))) if fixed else e


@inline
def _integer_probability(e, q, right):
    return divide_by_power(narrow(doubling_high(e, q)), right)


@inline
def _softmax_integer(address, fixed, codes, groups, masks, masked, values, rows):
    """The rules lut_u16 and, where it is so, fixed."""
    table = pointer_to(address, np.int32)
    m0, m1 = maximum_codes(codes, groups)
    for c in range(2):
        total = splat(np.int32(0))
        m = m0 if c == 0 else m1
        # 1. values and their sum
        for g in range(groups):
            i = g * WIDTH + c * LANES
            e0, e1, e2, e3 = _integer_values(table, m, codes, masks, i, masked)
            total = total + _rounded(e0, fixed) + _rounded(e1, fixed) + _rounded(e2, fixed) + _rounded(e3, fixed)
            if fixed:
                total = smaller(total, splat(_LARGEST_SUM))
            if g < KEPT_GROUPS:
                _keep(values, 4 * g * WIDTH + c * LANES, e0, e1, e2, e3)
        # 2. multiplier and right shift of each row
        if fixed:
            at = rows.at
            store(rows.data, at, total)
            for l in range(LANES):
                scale, shift = reciprocal_fixed(np.int64(rows.data[at + l]))
                # from a sum of 512 on the shift leaves 31 bits, and no probability reaches half a code
                rows.data[at + l] = scale if shift <= 31 else 0
                rows.data[at + WIDTH + l] = min(shift, 31)
            q, right = load(rows.data, at), load(rows.data, at + WIDTH)
        else:
            bits = bits_of(splat(_ONE) / (to_float(total) * splat(_TO_PROBABILITY)))
            q = ((bits & splat(np.int32(0x7FFFFF))) | splat(np.int32(0x800000))) << splat(np.int32(7))
            right = splat(np.int32(126)) - (bits >> splat(np.int32(23)))
            right = _clamp_shift(right)
        # 3. probabilities
        for g in range(groups):
            i = g * WIDTH + c * LANES
            if g < KEPT_GROUPS:
                e0, e1, e2, e3 = _kept_values(values, 4 * g * WIDTH + c * LANES)
            else:
                e0, e1, e2, e3 = _integer_values(table, m, codes, masks, i, masked)
            packed = pack_bytes(_integer_probability(e0, q, right), _integer_probability(e1, q, right),
                                _integer_probability(e2, q, right), _integer_probability(e3, q, right), np.int32(-128))
            store(codes.data, codes.at + i, packed ^ splat(FLIP))


@inline
def _clamp_shift(shift):
    """Shifts into 0..31: only the row of an empty sum, whose values are all 0, lies outside."""
    return smaller(maximum(shift, splat(np.int32(0))), splat(np.int32(31)))


RULES = "lut_f32", "lut_u16", "fixed"
NUMBERS = {name: number for number, name in enumerate(RULES)}  # what a kernel knows a rule by
_LUT_F32, _FIXED = NUMBERS["lut_f32"], NUMBERS["fixed"]


@inline
def softmax(address, rule, codes, groups, masks, masked, values, rows):
    """By the rule of that number."""
    if rule == _LUT_F32:
        _softmax_float(address, codes, groups, masks, masked, values)
    else:
        _softmax_integer(address, rule == _FIXED, codes, groups, masks, masked, values, rows)
