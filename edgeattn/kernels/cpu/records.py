"""Parameters of kernels, by name.

A kernel is given an array of int64, and a record says what each of its numbers is called.  The kernel reads and writes
them where they lie: `p = named(parameters, LAYER)`, then `p.heads`.  Python fills in a `blank` of the same names and
packs it.  The array is not one of records itself, because NumPy copies those field by field, and every call copies.
"""
import hashlib
import struct
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from edgeattn.runtime.compiler import inline, intrinsic, ir, models, register_jitable, register_model, types
from edgeattn.shapes import strides

from .simd import pointer_to

_FLOAT32, _INT32 = struct.Struct("f"), struct.Struct("i")
# What records share. Of masks: whether there is a band and its edges, strides of flat masks along the axes of the
# scores, and of ALiBi the step to the next batch entry.
BAND = "band low high"
KEEP = "keep_b keep_h keep_l keep_s padding_b"
MASKS = f"{BAND} {KEEP} bias_b bias_h bias_l bias_s alibi_b"
# Where they are, or 0 of none: bytes of which 0 is "not kept"; more of them, (B or 1, S), which are there beside others
# alone; float32 to be added; (B or 1, H, 2) float64 slopes and positions of query 0.
MASK_ADDRESSES = "keep padding bias alibi"

_BLANK = {}  # by the identity of a record: it, and its fields, all zero


def record(*names):
    """The dtype of a record of int64; `names`: of its fields, any number in a string."""
    made = np.dtype([(name, np.int64) for group in names for name in group.split()], align=True)
    _BLANK[id(made)] = made, dict.fromkeys(made.names, 0)
    return made


class Record(types.Record):
    """A record whose name in machine code is told by its fields.

    Numba's has a number drawn anew in every process: parts of two kernels, compiled in processes of their own, may get
    one name, and in a process that reads both from the cache one of them is then taken for the other.
    """

    @property
    def mangling_args(self):
        """(name, parameters) of which Numba makes that of a function."""
        return "Record" + hashlib.sha256(self.name.encode()).hexdigest()[:16], ()


def told_by_fields(found):
    """The `Record` that is Numba's type of a record."""
    fields = [(name, {"type": field.type, "offset": field.offset}) for name, field in found.fields.items()]
    return Record(fields, found.size, found.aligned)


@register_model(Record)
class _RecordModel(models.RecordModel):
    pass


@intrinsic
def named(typing, parameters, layout):
    """The record that an array of int64 holds: its fields by name, where they are.

    It does not keep the array alive.  layout: what `record` made.
    """
    if not isinstance(parameters, types.Array) or parameters.dtype != types.int64:
        return None
    found = told_by_fields(layout.dtype)

    def generate(context, builder, sig, args):
        array = context.make_array(sig.args[0])(context, builder, args[0])
        return builder.bitcast(array.data, context.get_value_type(found))
    return found(parameters, layout), generate


@intrinsic
def count_of(typing, layout):
    """The number of a record's fields."""
    count = len(layout.dtype.fields)

    def generate(context, builder, sig, args):
        return ir.Constant(ir.IntType(64), count)
    return types.int64(layout), generate


@inline
def located(addresses, layout):
    """The record of a call's addresses, see `named`; those of arrays that Python gave as objects are found first.

    Behind the record there are then: where an array has the address of its elements, None, where a list has its
    elements, and how many of these are the arrays with whose addresses the record begins.  To ask for them here costs
    nothing; in Python each costs a tenth of a microsecond.
    """
    fields = count_of(layout)
    if addresses.size > fields:
        elements, none, given = addresses[fields], addresses[fields + 1], pointer_to(addresses[fields + 2], np.int64)
        for i in range(addresses[fields + 3]):
            addresses[i] = 0 if given[i] == none else pointer_to(given[i] + elements, np.int64)[0]
    return named(addresses, layout)


@intrinsic
def real(typing, bits):
    """The float32 whose bits a field holds."""
    def generate(context, builder, sig, args):
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), ir.FloatType())
    return types.float32(types.int64), generate


def bits_of_real(number):
    """The bits of a number as float32, for a field that `real` reads."""
    return _INT32.unpack(_FLOAT32.pack(number))[0]


@intrinsic
def double(typing, bits):
    """The float64 whose bits a field holds."""
    def generate(context, builder, sig, args):
        return builder.bitcast(args[0], ir.DoubleType())
    return types.float64(types.int64), generate


def bits_of_double(number):
    """The bits of a number as float64, for a field that `double` reads."""
    return int(np.float64(number).view(np.int64))


def blank(layout, **values):
    """The fields of a record as attributes, zero where no value is given."""
    return SimpleNamespace(**(_BLANK[id(layout)][1] | values))


def copy_of(p, **more):
    """Another `blank`, with the same values but for those given."""
    return SimpleNamespace(**(vars(p) | more))


def packed(p, layout):
    """An array of int64 of the fields of a `blank`; ValueError where it has more of them than the record."""
    fields = vars(p)
    if len(fields) != len(layout):
        raise ValueError(f"p must have the {len(layout)} fields of its record, got {len(fields)}")
    return np.fromiter(fields.values(), np.int64, len(fields))


def named_fields(array, layout):
    """The fields of what was packed, as attributes."""
    return SimpleNamespace(**dict(zip(layout.names, array.tolist(), strict=True)))


def slot(layout, name):
    """The position of a field in what was packed, for the few that are written anew for every call."""
    return layout.names.index(name)


@register_jitable
def place(start, size):
    """(start, where the next may begin) of `size` elements of scratch, the next on a cache line."""
    return start, start + (size + 15) // 16 * 16


def shape_of(mask):
    """The shape of a mask, or None of none."""
    return None if mask is None else mask.shape


class KernelMask(NamedTuple):
    """The masks of a call, in the form that kernels read: arrays in C order, or None of none.

    keep, padding : bool or uint8 arrays that broadcast to (B, H, L, S); padding (B or 1, 1, 1, S)
        0 = may not be seen.
    bias : float32 array that broadcasts to (B, H, L, S)
        Added to the scores.
    band : (low, high)
        Query i sees key j when i + low <= j <= i + high.
    alibi : (B or 1, H, 2) float64 array
        A head's slope, and the position of query 0: -slope * |position - j| is added too.
    """

    keep: Any = None
    padding: Any = None
    bias: Any = None
    band: Any = None
    alibi: Any = None

    @property
    def shapes(self):
        """What a plan depends on: the shapes of the arrays, and the band as it is."""
        return shape_of(self.keep), shape_of(self.padding), shape_of(self.bias), self.band, shape_of(self.alibi)

    @property
    def arrays(self):
        """Those of MASK_ADDRESSES."""
        return self.keep, self.padding, self.bias, self.alibi


NO_MASK = KernelMask()
NO_MASKS = NO_MASK.shapes


def set_masks(p, masks, index=None):
    """Write a band, and strides of masks, into a record; whether score_masks.fill_mask has to write them out.

    masks: `KernelMask.shapes`; index: the shape of a static layer's indices of tables.
    """
    keep, padding, bias, band, alibi = masks
    if band is not None:
        p.band = 1
        p.low, p.high = band
    if keep is not None:
        p.keep_b, p.keep_h, p.keep_l, p.keep_s = strides(keep)
    if padding is not None and padding[0] > 1:
        p.padding_b = padding[3]
    if bias is not None:
        p.bias_b, p.bias_h, p.bias_l, p.bias_s = strides(bias)
    if index is not None:
        p.index_b, p.index_h, p.index_l, p.index_s = strides(index)
    if alibi is not None and alibi[0] > 1:
        p.alibi_b = 2 * alibi[1]
    return keep is not None or bias is not None or alibi is not None
