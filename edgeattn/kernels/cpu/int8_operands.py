"""What codes become before they are multiplied, and what that changes in the sums: as each instruction set needs it.

Most instructions multiply unsigned bytes by signed ones: then one operand holds codes plus 128, OFFSET, and sums are
corrected.  Some take signs on both sides, and the matrix unit either: then nothing is added, or to one operand only.
Kernels do not ask which.  Every function here has one meaning, said as a loop over lanes l, and where the set has no
use for it the answer is that nothing is to be done.
"""
import numpy as np

from edgeattn.runtime.compiler import inline, register_jitable
from edgeattn.runtime.isa import ISA

from .simd import LANES, OFFSET, ROWS, broadcast, dot_bytes, load, splat, store, sum_lanes, tile_add_down

SIGN_BITS = np.int32(-2139062144)  # 0x80808080: four codes -128, and what turns codes into codes plus 128 and back
LANE_SHIFT = 0 if ISA.amx else OFFSET  # what the bytes are more than codes that `lane_product` and digits meet in lanes
FLIP = SIGN_BITS if OFFSET else np.int32(0)  # codes ^ FLIP: the unsigned operand of `linear`, and of probabilities
LANE_FLIP = SIGN_BITS if LANE_SHIFT else np.int32(0)  # codes ^ LANE_FLIP: those in lanes
BYTE_FLIP = np.int8(-128 if OFFSET else 0)  # FLIP of one byte
ONES = np.int32(0x01010101)


@inline
def zero_bytes(zero_point):
    """What a zero is among the unsigned operands, in all four bytes."""
    return np.int32((OFFSET + zero_point & 255) * ONES)


# --- sums of products with lanes ---------------------------------------------------------------------------------

@inline
def _add_term(sums, terms, at):
    return sums + broadcast(terms, at)


@inline
def _leave_sums(sums, terms, at):
    return sums


@inline
def _add_four(total, c0, c1, c2, c3):
    return total + ((c0 + c1) + (c2 + c3))


@inline
def _leave_total(total, c0, c1, c2, c3):
    return total


@inline
def _store_term(total, terms, at):
    store(terms, at, total * splat(np.int32(-LANE_SHIFT)))


@inline
def _store_nothing(total, terms, at):
    pass


@inline
def _flip_elements(words, at, count):
    for i in range(at, at + count, LANES):
        store(words, i, load(words, i) ^ splat(LANE_FLIP))


@inline
def _leave_elements(words, at, count):
    pass


@inline
def _add_flips(total, digits):
    return dot_bytes(total, splat(LANE_FLIP), digits)


@inline
def _add_no_flips(total, digits):
    return total


@inline
def _store_sum(total, corrections, at):
    corrections[at] = sum_lanes(total)


@inline
def _less_correction(sums, corrections, at):
    return sums - splat(corrections[at])


if LANE_SHIFT:
    add_lane_term = _add_term  # sums[l] + terms[at], what `store_lane_term` left for the row
    sum_codes = _add_four  # total[l] + (c0 + c1 + c2 + c3)[l]
    store_lane_term = _store_term  # terms[at + l] = -LANE_SHIFT * total[l]
    flip_lanes = _flip_elements  # words[at : at + count] ^= LANE_FLIP
    add_digit_sum = _add_flips  # total[l] + LANE_SHIFT * the four signed bytes of digits[l]
    store_digit_sum = _store_sum  # corrections[at] = sum of total
    less_digit_sum = _less_correction  # sums[l] - corrections[at]
else:
    add_lane_term = less_digit_sum = _leave_sums
    sum_codes = _leave_total
    store_lane_term = store_digit_sum = _store_nothing
    flip_lanes = _leave_elements
    add_digit_sum = _add_no_flips


# --- probabilities 0 .. 255 that are bytes with a sign, less 128: what their sums lack -----------------------------

@inline
def _all_there(sums, groups):
    return sums


@inline
def _add_lacking(sums, groups):
    return sums + splat(np.int32(128 * 4 * groups))


@inline
def _no_value_terms(values, group_step, groups, features, out):
    pass


@inline
def _value_terms(values, group_step, groups, features, out):
    for d in range(0, features, LANES):
        total = splat(np.int32(0))
        for g in range(groups):
            total = dot_bytes(total, splat(ONES), load(values.data, values.at + g * group_step + d))
        store(out.data, out.at + d, total * splat(np.int32(128)))


@inline
def _leave_tile(tile, terms, at):
    return tile


@inline
def _add_term_vector(sums, terms, at):
    return sums + load(terms, at)


@inline
def _nothing_lacks(values, at, groups):
    return np.int32(0)


@inline
def _lacking_of_row(values, at, groups):
    sums = splat(np.int32(0))
    whole = groups // LANES * LANES
    for g in range(0, whole, LANES):
        sums = dot_bytes(sums, splat(ONES), load(values, at + g))
    total = sum_lanes(sums)
    for g in range(whole, groups):
        for j in range(4):
            total += np.int32(np.int8(values[at + g] >> np.int32(8 * j)))
    return np.int32(128 * total)


@register_jitable
def _no_terms(features):
    return 0


@register_jitable
def _terms(features):
    return features + LANES + ROWS


if OFFSET:
    whole_sums = _all_there
    store_value_terms, add_value_terms, value_terms_size = _no_value_terms, _leave_tile, _no_terms
    lacking_sum, add_feature_terms = _nothing_lacks, _leave_sums
else:
    whole_sums = _add_lacking  # sums[l] + 128 for each byte of `groups` groups
    store_value_terms = _value_terms  # out[d] = 128 * sum over groups g of the bytes of values[g * group_step + d]
    add_value_terms = tile_add_down  # tile[i][j] + splat(terms[at + i])
    value_terms_size = _terms  # elements of what `store_value_terms` writes and `add_value_terms` reads
    add_feature_terms = _add_term_vector  # sums[l] + terms[at + l]
    lacking_sum = _lacking_of_row  # 128 * the sum of the bytes of values[at : at + groups]
