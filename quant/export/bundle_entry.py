"""What a bundle makes known to C, as functions that Numba compiles: how much scratch a call needs, and the call.

A call is an array of int64, the struct of the bundle's header. Everything of the layer that does not change from call
to call is constant data of the library; the kernel is another object of it.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from edgeattn.kernels.cpu import fused, fused_dynamic, fused_int8, layer_dynamic, layer_float32, layer_int8, records
from edgeattn.kernels.cpu.records import named, packed
from edgeattn.kernels.cpu.simd import address_of
from edgeattn.quantized import DynamicMultiHeadAttention, StaticMultiHeadAttention
from edgeattn.runtime.arrays import array_at, array_of
from edgeattn.runtime.prebuilt import symbol_of

ALIGNMENT = 64  # bytes, of scratch
C_ABI = 1
# One call: FIELDS numbers of 64 bits, as the struct of the header says.
(ABI, BATCH, QUERIES, KEYS, QUERY, KEY, VALUE, OUTPUT, KEEP, KEEP_STRIDES) = range(10)
(BIAS, BIAS_STRIDES, BANDED, LOW, HIGH, SCRATCH, SCRATCH_BYTES, FIELDS) = 13, 14, 18, 19, 20, 21, 22, 23
# What a call returns; nothing has been written unless it is OK.
OK, BAD_ABI, BAD_SHAPE, BAD_POINTER, BAD_SCRATCH = range(5)
LARGEST = 1 << 24  # B, L and S

_I8, _I64 = ir.IntType(8), ir.IntType(64)


def entry_of(layer):
    """(scratch_bytes, run) of a layer."""
    if isinstance(layer, StaticMultiHeadAttention):
        return _static_entry(layer.fused_kernel, layer.score_luts, layer.lut_index)
    return _float_entry(layer.fused_kernel, isinstance(layer, DynamicMultiHeadAttention))


def _compiled_elsewhere(kernel):
    """A kernel as a library has it, called on one thread with the address of its arguments (`prebuilt.words`)."""
    function = types.ExternalFunction(symbol_of(kernel.py_func), types.int64(types.int64))
    words = local_copy("words", np.zeros(9, np.int64))

    @register_jitable
    def call(parameters, addresses, scratch, size):
        w = words()
        w[0], w[1], w[2], w[3] = address_of(parameters), parameters.size, address_of(addresses), addresses.size
        w[4], w[5], w[8] = scratch, size, 1
        function(address_of(w))
    return call


def constant(name, values):
    """A function that gives an array's elements as constant data of the library, called `name` there.

    Parameters
    ----------
    name : str
    values : one-dimensional array
    """
    array_type = types.Array(from_dtype(values.dtype), 1, "C")

    @intrinsic
    def elements(typing):
        def generate(context, builder, sig, args):
            data = ir.Constant(ir.ArrayType(_I8, max(values.nbytes, 1)), bytearray(values.tobytes() or b"\0"))
            variable = cgutils.global_constant(builder.module, name, data)
            variable.align = ALIGNMENT
            return array_of(context, builder, array_type, builder.bitcast(variable, _I8.as_pointer()),
                            ir.Constant(_I64, values.size))
        return array_type(), generate
    return elements


def local_copy(name, values):
    """A function that gives a copy of an array in the frame of its caller."""
    array_type = types.Array(from_dtype(values.dtype), 1, "C")

    @intrinsic
    def copy(typing):
        def generate(context, builder, sig, args):
            data = ir.Constant(ir.ArrayType(_I8, values.nbytes), bytearray(values.tobytes()))
            frame = cgutils.alloca_once(builder, data.type)
            frame.align = ALIGNMENT
            builder.store(builder.load(cgutils.global_constant(builder.module, name, data)), frame)
            return array_of(context, builder, array_type, builder.bitcast(frame, _I8.as_pointer()),
                            ir.Constant(_I64, values.size))
        return array_type(), generate
    return copy


@register_jitable
def _fits(B, L, S):
    return 0 < B <= LARGEST and 0 < L <= LARGEST and 0 < S <= LARGEST


@register_jitable
def _check(call):
    """OK, or what is wrong with a call beside its scratch."""
    if call[ABI] != C_ABI:
        return BAD_ABI
    if not _fits(call[BATCH], call[QUERIES], call[KEYS]):
        return BAD_SHAPE
    if call[QUERY] == 0 or call[KEY] == 0 or call[VALUE] == 0 or call[OUTPUT] == 0:
        return BAD_POINTER
    return OK


@register_jitable
def _strides(call, field):
    return call[field], call[field + 1], call[field + 2], call[field + 3]


def _float_entry(kernel, dynamic):
    """(scratch_bytes, run) of a FloatLayer, or of a DynamicLayer."""
    if dynamic:
        f, plan, layer = fused_dynamic, layer_dynamic.plan, _compiled_elsewhere(fused_dynamic.layer_dynamic)
        factors = constant("factors", kernel.factors)
    else:
        f, plan, layer = fused, layer_float32.plan, _compiled_elsewhere(fused.layer_float32)
    weights = constant("weights", kernel.weights)
    parameters = local_copy("parameters", packed(kernel.parameters, f.LAYER))
    addresses = local_copy("addresses", np.zeros(len(f.LAYER_ADDRESSES), np.int64))

    def scratch_bytes(B, L, S, masked):
        if not _fits(B, L, S):
            return np.int64(-1)
        shared, private = plan(named(parameters(), f.LAYER), B, L, S, masked != 0)
        return np.int64(4 * (shared + private))

    def run(address):
        call = array_at(address, FIELDS, np.int64)
        status = _check(call)
        if status != OK:
            return status
        B, L, S = call[BATCH], call[QUERIES], call[KEYS]
        given = parameters()
        p = named(given, f.LAYER)
        shared, private = plan(p, B, L, S, call[KEEP] != 0 or call[BIAS] != 0)
        if call[SCRATCH] == 0 or call[SCRATCH] % ALIGNMENT != 0 or call[SCRATCH_BYTES] < 4 * (shared + private):
            return BAD_SCRATCH
        p.band, p.low, p.high = call[BANDED], call[LOW], call[HIGH]
        p.keep_b, p.keep_h, p.keep_l, p.keep_s = _strides(call, KEEP_STRIDES)
        p.bias_b, p.bias_h, p.bias_l, p.bias_s = _strides(call, BIAS_STRIDES)
        where = addresses()
        a = named(where, f.LAYER_ADDRESSES)
        a.queries, a.keys, a.values, a.out = call[QUERY], call[KEY], call[VALUE], call[OUTPUT]
        a.keep, a.padding, a.bias, a.alibi, a.weights = call[KEEP], 0, call[BIAS], 0, address_of(weights())
        if dynamic:
            p.same_qk, p.same_kv = call[QUERY] == call[KEY], call[KEY] == call[VALUE]
            a.factors = address_of(factors())
        layer(given, where, call[SCRATCH], shared + private)
        return OK
    return scratch_bytes, run


def _static_entry(kernel, score_luts, lut_index):
    """(scratch_bytes, run) of a StaticLayer with the score_luts and lut_index of its score operators, or None."""
    f, plan, layer = fused_int8, layer_int8.plan, _compiled_elsewhere(fused_int8.layer_int8)
    softmax, weights = constant("softmax", kernel.table), constant("weights", kernel.weights)
    parameters = local_copy("parameters", packed(kernel.parameters, f.LAYER))
    addresses = local_copy("addresses", np.zeros(len(f.ADDRESSES), np.int64))
    has_luts, has_index, empty = score_luts is not None, lut_index is not None, np.zeros(0, np.uint8)
    score_luts = constant("score_luts", score_luts.reshape(-1) if has_luts else empty.view(np.int8))
    shape = (1, 1, 1, 1) if lut_index is None else (1,) * (4 - lut_index.ndim) + lut_index.shape
    steps = tuple(records.strides(shape))
    lut_index = constant("lut_index", lut_index.reshape(-1) if has_index else empty)

    def scratch_bytes(B, L, S, masked):
        if not _fits(B, L, S):
            return np.int64(-1)
        shared, private = plan(named(parameters(), f.LAYER), B, L, S)
        return np.int64(4 * (shared + private))

    def run(address):
        call = array_at(address, FIELDS, np.int64)
        status = _check(call)
        if status != OK:
            return status
        B, L, S = call[BATCH], call[QUERIES], call[KEYS]
        given = parameters()
        p = named(given, f.LAYER)
        if not (shape[0] in (1, B) and shape[1] in (1, p.heads) and shape[2] in (1, L) and shape[3] in (1, S)):
            return BAD_SHAPE
        if call[BIAS] != 0:
            return BAD_POINTER
        shared, private = plan(p, B, L, S)
        if call[SCRATCH] == 0 or call[SCRATCH] % ALIGNMENT != 0 or call[SCRATCH_BYTES] < 4 * (shared + private):
            return BAD_SCRATCH
        p.band, p.low, p.high = call[BANDED], call[LOW], call[HIGH]
        p.keep_b, p.keep_h, p.keep_l, p.keep_s = _strides(call, KEEP_STRIDES)
        p.index_b, p.index_h, p.index_l, p.index_s = steps
        p.same_kv = call[KEY] == call[VALUE]
        where = addresses()
        a = named(where, f.ADDRESSES)
        a.queries, a.keys, a.values, a.out = call[QUERY], call[KEY], call[VALUE], call[OUTPUT]
        a.weights, a.softmax, a.keep, a.padding = address_of(weights()), address_of(softmax()), call[KEEP], 0
        a.lut_index = address_of(lut_index()) if has_index else 0
        a.score_luts = address_of(score_luts()) if has_luts else 0
        layer(given, where, call[SCRATCH], shared + private)
        return OK
    return scratch_bytes, run
