"""Attention layers and whole encoders written as .tflite files, with the ``flatbuffers`` package alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from edgeattn.layers import MultiHeadAttention, TransformerEncoder
from edgeattn.quantized import QuantizedMultiHeadAttention
from edgeattn.tflite_schema import (
    BUFFER_ALIGNMENT,
    BUILTIN_OPERATORS,
    DEPRECATED_CODE_MAX,
    IDENTIFIER,
    SCHEMA_VERSION,
    TABLES,
    TYPE_CODES,
    Graph,
    Operator,
    Tensor,
)
from quant.export.attention_graph import attention_graph
from quant.export.encoder_graph import encoder_graph
from quant.tables import missing

# The name TensorFlow gives; some tools refuse a file without a signature.
SIGNATURE = "serving_default"
DESCRIPTION = "edgeattn"


def write_tflite(
    layer, *, batch: int = 1, sequence_length: int | Sequence[int], key_length: int | None = None, mask=None,
    padding: bool = False
) -> bytes:
    """The bytes of a .tflite file that computes ``layer`` at fixed lengths.

    Parameters
    ----------
    layer : StaticMultiHeadAttention, DynamicMultiHeadAttention, MultiHeadAttention or TransformerEncoder
        The file is int8 in and out of a static layer, else float32 in and out. Of a dynamic layer or encoder it is
        hybrid: the runtime quantizes rows as it meets int8 weights, by rules of its own.
    batch : int
        B.
    sequence_length : int, or several
        L, the number of queries. Of several each has a subgraph and a signature, ``length_L``, over the same weights.
    key_length : int, optional
        S, the number of keys. Default: L. A static layer must have an input of its own for the keys; a
        float layer gets one when this is given, and another for the values where kdim and vdim differ.
    mask : bool array, broadcastable to (B, H, L, S), or "causal", optional
        True = attend; baked into the file. For a float layer also a float32 array that is added to the
        scores. A query with no permitted key gets the mean of all values: that is what TFLite's softmax makes
        of equal scores, where edgeattn's own kernels give zeros.
    padding : bool
        Of an encoder: whether the file has an input more, ``attention_mask``, int32 (B, L): 1 = token, 0 = padding.

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
    encoder = isinstance(layer, TransformerEncoder)
    if not encoder and not isinstance(layer, (MultiHeadAttention, QuantizedMultiHeadAttention)):
        raise TypeError("layer must be a MultiHeadAttention, what quant.quantize returns, or a TransformerEncoder; "
                        f"got {type(layer).__name__}, which has no TFLite form")
    if encoder and key_length is not None:
        raise ValueError(f"key_length must be left out for an encoder, which attends to itself; got {key_length}")

    def graph(length: int) -> Graph:
        keep = np.tri(length, dtype=np.bool_) if isinstance(mask, str) and mask == "causal" else mask
        if isinstance(layer, TransformerEncoder):
            return encoder_graph(layer, batch=batch, sequence_length=length, mask=keep, padding=padding)
        return attention_graph(layer, batch=batch, sequence_length=length, key_length=key_length, mask=keep)

    if isinstance(sequence_length, Sequence):
        return serialize({f"length_{length}": graph(length) for length in sequence_length})
    return serialize({SIGNATURE: graph(sequence_length)})


def serialize(graphs: Graph | Mapping[str, Graph]) -> bytes:
    """The .tflite file that holds ``graphs``, by the keys of their signatures: a subgraph each, constants once.

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
    if isinstance(graphs, Graph):
        graphs = {SIGNATURE: graphs}
    builder.Finish(_write_table(builder, "Model", _model(graphs)), IDENTIFIER)
    return bytes(builder.Output())


def _model(graphs: Mapping[str, Graph]) -> dict:
    """``graphs`` as nested dicts in the terms of TABLES."""
    buffers: list[dict] = [
        {}
    ]  # buffer 0 is by convention the empty one of all tensors that are not constants
    known: dict[bytes, int] = {}  # of constants by their bytes
    codes: dict[tuple[str, int], int] = {}
    subgraphs, signatures = [], []
    for key, graph in graphs.items():
        signature: dict = {"signature_key": key, "subgraph_index": len(subgraphs)}
        for role, numbers in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            signature[role] = [{"name": graph.tensors[number].name, "tensor_index": number} for number in numbers]
        signatures.append(signature)
        subgraphs.append({
            "name": "main" if len(graphs) == 1 else key,
            "tensors": [_tensor(tensor, _buffer(tensor.data, buffers, known)) for tensor in graph.tensors],
            "inputs": graph.inputs,
            "outputs": graph.outputs,
            "operators": [_operator(operator, codes) for operator in graph.operators],
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
    return {"version": SCHEMA_VERSION, "description": DESCRIPTION, "operator_codes": operator_codes,
            "subgraphs": subgraphs, "buffers": buffers, "signature_defs": signatures}


def _buffer(data: np.ndarray | None, buffers: list[dict], known: dict[bytes, int]) -> int:
    """The number of the buffer that holds ``data``; those of equal bytes are one."""
    if data is None:
        return 0
    digest = hashlib.blake2b(np.ascontiguousarray(data)).digest()
    if digest not in known:
        known[digest] = len(buffers)
        buffers.append({"data": data})
    return known[digest]


def _operator(operator: Operator, codes: dict[tuple[str, int], int]) -> dict:
    builtin = BUILTIN_OPERATORS[operator.name]
    entry = {"opcode_index": codes.setdefault((operator.name, operator.version), len(codes)),
             "inputs": operator.inputs, "outputs": operator.outputs}
    if builtin.options_table:
        entry |= {"builtin_options_type": builtin.options_code,
                  "builtin_options": (builtin.options_table, operator.options)}
    return entry


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
