"""Parameters of kernels, by name.

A kernel is given an array of int64, and a record says what each of its numbers is called.  The kernel reads and writes
them where they lie: `p = named(parameters, LAYER)`, then `p.heads`.  Python fills in a `blank` of the same names and
packs it.  The array is not one of records itself, because NumPy copies those field by field, and every call copies.
"""
from types import SimpleNamespace

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, register_jitable

from edgeattn.shapes import strides

from .matmul import round_up

# What records share. Of masks: whether there is a band and its edges, strides of flat masks along the axes of the
# scores, and of ALiBi the step to the next batch entry.
BAND = "band low high"
KEEP = "keep_b keep_h keep_l keep_s"
MASKS = f"{BAND} {KEEP} bias_b bias_h bias_l bias_s alibi_b"
# Where they are, or 0 of none: bytes of which 0 is "not kept", float32 to be added, (B or 1, H, 2) float64 slopes and
# positions of query 0.
MASK_ADDRESSES = "keep bias alibi"


def record(*names):
    """The dtype of a record of int64; `names`: of its fields, any number in a string."""
    return np.dtype([(name, np.int64) for group in names for name in group.split()], align=True)


@intrinsic
def named(typing, parameters, layout):
    """The record that an array of int64 holds: its fields by name, where they are.

    It does not keep the array alive.  layout: what `record` made.
    """
    if not isinstance(parameters, types.Array) or parameters.dtype != types.int64:
        return None
    found = layout.dtype

    def generate(context, builder, sig, args):
        array = context.make_array(sig.args[0])(context, builder, args[0])
        return builder.bitcast(array.data, context.get_value_type(found))
    return found(parameters, layout), generate


@intrinsic
def real(typing, bits):
    """The float32 whose bits a field holds."""
    def generate(context, builder, sig, args):
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), ir.FloatType())
    return types.float32(types.int64), generate


def bits_of_real(number):
    """The bits of a number as float32, for a field that `real` reads."""
    return int(np.float32(number).view(np.int32))


def blank(layout, **values):
    """The fields of a record as attributes, zero where no value is given."""
    return SimpleNamespace(**(dict.fromkeys(layout.names, 0) | values))


def packed(p, layout):
    """An array of int64 of the fields of a `blank`; ValueError where it has more of them than the record."""
    array = np.empty(len(layout), np.int64)
    array[:] = tuple(vars(p).values())
    return array


def named_fields(array, layout):
    """The fields of what was packed, as attributes."""
    return SimpleNamespace(**dict(zip(layout.names, array.tolist(), strict=True)))


def slot(layout, name):
    """The position of a field in what was packed, for the few that are written anew for every call."""
    return layout.names.index(name)


@register_jitable
def place(start, size):
    """(start, where the next may begin) of `size` elements of scratch, the next on a cache line."""
    return start, start + round_up(size, 16)


def mask_fields(keep, other, band, alibi=None, other_name="bias"):
    """{field: value} of a band and of masks of such shapes, or None: what MASKS begins with.

    keep, other, alibi: shapes; `other` is what adds to scores, or of another name.
    """
    fields = {}
    if band is not None:
        fields["band"], fields["low"], fields["high"] = 1, *band
    for name, shape in (("keep", keep), (other_name, other)):
        if shape is not None:
            fields.update(zip((f"{name}_b", f"{name}_h", f"{name}_l", f"{name}_s"), strides(shape), strict=True))
    if alibi is not None and alibi[0] > 1:
        fields["alibi_b"] = 2 * alibi[1]
    return fields
