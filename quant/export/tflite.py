"""Attention layers written as .tflite files, with the ``flatbuffers`` package alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeattn.layers import MultiHeadAttention
from edgeattn.quantized import StaticMultiHeadAttention
from edgeattn.tflite_schema import (
    BUFFER_ALIGNMENT,
    BUILTIN_OPERATORS,
    DEPRECATED_CODE_MAX,
    IDENTIFIER,
    SCHEMA_VERSION,
    TABLES,
    TYPE_CODES,
    Graph,
    Tensor,
)
from quant.export.attention_graph import attention_graph
from quant.tables import missing

# The name TensorFlow gives; some tools refuse a file without a signature.
SIGNATURE = "serving_default"
DESCRIPTION = "edgeattn"


def write_tflite(
    layer, *, batch: int = 1, sequence_length: int, key_length: int | None = None, mask=None
) -> bytes:
    """The bytes of a .tflite file that computes ``layer`` at fixed lengths.

    Parameters
    ----------
    layer : StaticMultiHeadAttention or MultiHeadAttention
        The file is int8 in and out, or float32 in and out.
    batch : int
        B.
    sequence_length : int
        L, the number of queries.
    key_length : int, optional
        S, the number of keys. Default: L. A quantized layer must have an input of its own for the keys; a
        float layer gets one when this is given, and another for the values where kdim and vdim differ.
    mask : bool array, broadcastable to (B, H, L, S), optional
        True = attend; baked into the file. For a float layer also a float32 array that is added to the
        scores. A query with no permitted key gets the mean of all values: that is what TFLite's softmax makes
        of equal scores, where edgeattn's own kernels give zeros.

    Returns
    -------
    bytes
        Inputs in the order query, key, value, as many as the layer tells apart; one output, (B, L, output
        width).

    Raises
    ------
    ImportError
        When ``flatbuffers`` is not installed.
    TypeError, ValueError
        When ``layer`` is of another kind, a length is not a positive integer, or a mask does not fit the
        lengths.
    """
    if not isinstance(layer, (MultiHeadAttention, StaticMultiHeadAttention)):
        raise TypeError("layer must be a static QuantizedMultiHeadAttention or a MultiHeadAttention; "
                        f"got {type(layer).__name__}, which has no TFLite form")
    return serialize(attention_graph(
        layer, batch=batch, sequence_length=sequence_length, key_length=key_length, mask=mask))


def serialize(graph: Graph) -> bytes:
    """The .tflite file that holds ``graph``: one subgraph, one signature.

    Raises
    ------
    ImportError
        When ``flatbuffers`` is not installed.
    """
    try:
        import flatbuffers
    except ImportError as error:
        raise missing("writing .tflite", "flatbuffers") from error
    builder = flatbuffers.Builder(1024)
    builder.Finish(_write_table(builder, "Model", _model(graph)), IDENTIFIER)
    return bytes(builder.Output())


def _model(graph: Graph) -> dict:
    """``graph`` as nested dicts in the terms of TABLES."""
    buffers: list[dict] = [
        {}
    ]  # buffer 0 is by convention the empty one of all tensors that are not constants
    tensors = []
    for tensor in graph.tensors:
        tensors.append(_tensor(tensor, buffer=0 if tensor.data is None else len(buffers)))
        if tensor.data is not None:
            buffers.append({"data": tensor.data})

    codes: dict[tuple[str, int], int] = {}
    operators = []
    for operator in graph.operators:
        builtin = BUILTIN_OPERATORS[operator.name]
        operators.append({
            "opcode_index": codes.setdefault((operator.name, operator.version), len(codes)),
            "inputs": operator.inputs, "outputs": operator.outputs,
            "builtin_options_type": builtin.options_code,
            "builtin_options": (builtin.options_table, operator.options),
        })
    operator_codes = []
    for name, version in codes:
        code = BUILTIN_OPERATORS[name].code
        operator_codes.append(
            {
                "deprecated_builtin_code": min(code, DEPRECATED_CODE_MAX),
                "builtin_code": code,
                "version": version,
            }
        )

    signature = {"signature_key": SIGNATURE, "subgraph_index": 0}
    for role, numbers in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        signature[role] = [{"name": graph.tensors[number].name, "tensor_index": number} for number in numbers]
    subgraph = {
        "name": "main",
        "tensors": tensors,
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "operators": operators,
    }
    return {"version": SCHEMA_VERSION, "description": DESCRIPTION, "operator_codes": operator_codes,
            "subgraphs": [subgraph], "buffers": buffers, "signature_defs": [signature]}


def _tensor(tensor: Tensor, buffer: int) -> dict:
    values = {"name": tensor.name, "shape": tensor.shape, "type": TYPE_CODES[tensor.dtype], "buffer": buffer,
              "has_rank": True}
    if tensor.scale is not None:
        values["quantization"] = {"scale": tensor.scale, "zero_point": tensor.zero_point,
                                  "quantized_dimension": tensor.channel_axis}
    return values


# Scalars a builder stores inside the table; everything else it stores elsewhere, and an offset inside the
# table.
_SCALAR_METHODS = {
    "bool": "PrependBoolSlot",
    "int8": "PrependInt8Slot",
    "uint8": "PrependUint8Slot",
    "int32": "PrependInt32Slot",
    "uint32": "PrependUint32Slot",
    "float32": "PrependFloat32Slot",
}
_VECTOR_DTYPES = {"[int32]": np.int32, "[int64]": np.int64, "[float32]": np.float32}


def _write_table(builder, table: str, values: Mapping[str, object]) -> int:
    """Append ``values`` as a table and return its offset. Children first: a FlatBuffer is written from its
    end.
    """
    fields = TABLES[table]
    offsets = {name: _write_reference(builder, fields[name].kind, value)
               for name, value in values.items() if fields[name].kind not in _SCALAR_METHODS}
    builder.StartObject(1 + max((field.slot for field in fields.values()), default=-1))
    for name, value in values.items():
        field = fields[name]
        if name in offsets:
            builder.PrependUOffsetTRelativeSlot(field.slot, offsets[name], 0)
        else:
            getattr(builder, _SCALAR_METHODS[field.kind])(field.slot, value, field.default)
    return builder.EndObject()


def _write_reference(builder, kind: str, value) -> int:
    if kind == "string":
        return builder.CreateString(value)
    if kind == "union":
        return _write_table(builder, *value)
    if kind == "[uint8]":
        return _write_aligned_bytes(builder, np.ascontiguousarray(value).tobytes())
    if kind in _VECTOR_DTYPES:
        return builder.CreateNumpyVector(np.ascontiguousarray(value, _VECTOR_DTYPES[kind]))
    if kind.startswith("["):
        offsets = [_write_table(builder, kind[1:-1], item) for item in value]
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()
    return _write_table(builder, kind, value)


def _write_aligned_bytes(builder, raw: bytes) -> int:
    """A vector of bytes that starts at a multiple of BUFFER_ALIGNMENT; the builder's own aligns to 1."""
    builder.StartVector(1, len(raw), BUFFER_ALIGNMENT)
    builder.head -= len(raw)
    builder.Bytes[builder.head:builder.head + len(raw)] = raw
    return builder.EndVector()
