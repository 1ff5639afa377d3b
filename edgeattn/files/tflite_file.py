"""Bytes of a .tflite file read into a Graph, every offset checked.

The ``flatbuffers`` package trusts its input: an offset that points before the file's start silently reads
from its end. This reader needs only ``struct`` and NumPy, and answers every damaged file with a ValueError.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy as np

from edgeattn.tflite_schema import BUILTIN_OPERATORS, DTYPES, IDENTIFIER, INT4, TABLES, Graph, Operator, Tensor

# Others are named in errors alone.
_OTHER_NAMES = {
    1: "AVERAGE_POOL_2D", 4: "DEPTHWISE_CONV_2D", 7: "EMBEDDING_LOOKUP", 8: "FLOOR", 11: "L2_NORMALIZATION",
    17: "MAX_POOL_2D", 21: "RELU6", 28: "TANH", 34: "PAD", 47: "EXP", 48: "TOPK_V2", 50: "LOG_SOFTMAX",
    54: "PRELU", 55: "MAXIMUM", 57: "MINIMUM", 58: "LESS", 59: "NEG", 61: "GREATER", 62: "GREATER_EQUAL",
    63: "LESS_EQUAL", 64: "SELECT", 66: "SIN", 69: "TILE", 70: "EXPAND_DIMS", 71: "EQUAL", 73: "LOG", 75: "SQRT",
    78: "POW", 84: "LOGICAL_OR", 86: "LOGICAL_AND", 87: "LOGICAL_NOT", 90: "FLOOR_DIV", 91: "REDUCE_ANY",
    92: "SQUARE", 93: "ZEROS_LIKE", 94: "FILL", 95: "FLOOR_MOD", 96: "RANGE", 98: "LEAKY_RELU",
    99: "SQUARED_DIFFERENCE", 101: "ABS", 102: "SPLIT_V", 107: "GATHER_ND", 108: "COS", 109: "WHERE", 117: "HARD_SWISH",
    128: "CUMSUM", 140: "REDUCE_ALL", 158: "SIGN", 206: "STABLEHLO_COMPOSITE",
}
_OPERATOR_NAMES = _OTHER_NAMES | {builtin.code: name for name, builtin in BUILTIN_OPERATORS.items()}
_SCALARS = {
    "bool": "<B",
    "int8": "<b",
    "uint8": "<B",
    "int32": "<i",
    "uint32": "<I",
    "uint64": "<Q",
    "float32": "<f",
}
_VECTORS = {"[int32]": "<i4", "[int64]": "<i8", "[float32]": "<f4", "[uint8]": "<u1"}
# Offsets may be shared and tables may overlap, so a small file can name much very often: bound what each may cost, how
# many there are, and how often what is there is read. A graph of one attention block has some forty of each.
_LONGEST_STRING = 1000
_HIGHEST_RANK = 8
_MOST_TABLES = 10_000  # of a kind
_TOLD = 8  # signatures in an error
_TIMES_READ = 2  # operands, and constants of 4 bits, compared with the size of the file


def read_bytes(path_or_bytes) -> tuple[bytes, str]:
    """The bytes of a file, and what to call it in messages.

    Parameters
    ----------
    path_or_bytes : str, os.PathLike, bytes, bytearray or memoryview

    Raises
    ------
    TypeError
        When it is something else.
    """
    if isinstance(path_or_bytes, (bytes, bytearray, memoryview)):
        return bytes(path_or_bytes), "the .tflite bytes"
    if not isinstance(path_or_bytes, (str, os.PathLike)):
        raise TypeError(
            f"path_or_bytes must be a path or the bytes of a .tflite file; got {type(path_or_bytes).__name__}"
        )
    return Path(path_or_bytes).read_bytes(), str(path_or_bytes)


def parse(data: bytes, name: str) -> Graph:
    """The one subgraph of a .tflite file.

    Parameters
    ----------
    data : bytes
    name : str
        What messages call the file.

    Returns
    -------
    Graph
        Constants are read-only views of ``data``. An operator that BUILTIN_OPERATORS does not list is called
        by its name where that is known, else "operator <code>", or by its custom name, and has no options.

    Raises
    ------
    ValueError
        When the file is truncated, damaged, or not a .tflite file with one subgraph.
    """
    return _Parser(data, name).graph()


class _Parser:
    def __init__(self, data: bytes, name: str):
        self.data = data
        self.name = name
        self.operands_left = _TIMES_READ * len(data)

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.name}: {message}")

    # -- FlatBuffer primitives

    def span(self, position: int, size: int, what: str) -> int:
        """``position``, checked to have ``size`` bytes of the file behind it."""
        if not 0 <= position <= len(self.data) - size:
            raise self.error(f"is truncated or damaged: {what} needs {size} bytes at offset {position}; "
                             f"the file has {len(self.data)}")
        return position

    def scalar(self, layout: str, position: int, what: str):
        return struct.unpack_from(layout, self.data, self.span(position, struct.calcsize(layout), what))[0]

    def target(self, position: int, what: str) -> int:
        """Where the offset stored at ``position`` points."""
        return position + self.scalar("<I", position, what)

    def field_position(self, table: int, slot: int, size: int, what: str) -> int | None:
        """Where a table keeps a field of ``size`` bytes, or None where it leaves it out."""
        vtable = table - self.scalar("<i", table, what)
        vtable_size = self.scalar("<H", vtable, f"field list of {what}")
        table_size = self.scalar("<H", vtable + 2, f"field list of {what}")
        self.span(vtable, vtable_size, f"field list of {what}")
        self.span(table, table_size, what)
        entry = 4 + 2 * slot
        if entry + 2 > vtable_size:
            return None
        offset = self.scalar("<H", vtable + entry, f"field list of {what}")
        if offset == 0:
            return None
        if offset + size > table_size:
            raise self.error(
                f"is damaged: {what} has {table_size} bytes but a field of {size} at byte {offset}"
            )
        return table + offset

    def vector(self, position: int, item_size: int, what: str) -> tuple[int, int]:
        """Where the items of the vector that ``position`` refers to begin, and their number."""
        start = self.target(position, what)
        count = self.scalar("<I", start, what)
        return self.span(start + 4, count * item_size, what), count

    def get(self, table: int, kind: str, field: str):
        """A field of a table of ``kind``: a number, a text, an array, a table's position, or a list of those.

        An absent number is the schema's default, an absent vector is empty, anything else absent is None. Numbers in a
        vector are a view of the file.
        """
        declared = TABLES[kind][field]
        what = f"{kind}.{field}"
        layout = _SCALARS.get(declared.kind)
        position = self.field_position(
            table, declared.slot, 4 if layout is None else struct.calcsize(layout), what
        )
        if layout is not None:
            return declared.default if position is None else self.scalar(layout, position, what)
        if declared.kind in _VECTORS:
            dtype = np.dtype(_VECTORS[declared.kind])
            if position is None:
                return np.empty(0, dtype)
            start, count = self.vector(position, dtype.itemsize, what)
            return np.frombuffer(self.data, dtype, count, start)
        if declared.kind == "string":
            if position is None:
                return None
            start, count = self.vector(position, 1, what)
            return self.data[start:start + min(count, _LONGEST_STRING)].decode("utf-8", "replace")
        if declared.kind.startswith("["):
            if position is None:
                return np.empty(0, np.int64)
            start, count = self.vector(position, 4, what)
            return np.frombuffer(self.data, "<u4", count, start) + np.arange(start, start + 4 * count, 4)
        return None if position is None else self.target(position, what)

    # -- tables

    def tables(self, table: int, kind: str, field: str, read) -> list:
        """What ``read`` makes of each table in a vector of tables, given its position and number."""
        positions = self.get(table, kind, field)
        if positions.size > _MOST_TABLES:
            raise self.error(f"has {positions.size} {kind}.{field}; expected at most {_MOST_TABLES}")
        return [read(position, number) for number, position in enumerate(positions.tolist())]

    def graph(self) -> Graph:
        if len(self.data) < 8 or self.data[4:8] != IDENTIFIER:
            found = self.data[4:8].decode("latin-1")
            raise self.error(f"this is not a .tflite file: expected the identifier {IDENTIFIER.decode()!r} at byte 4, "
                             f"found {found!r}")
        model = self.target(0, "Model")
        self.get(model, "Model", "description")  # for a file cut short only there
        subgraphs = self.get(model, "Model", "subgraphs")
        if len(subgraphs) != 1:
            named = [self.get(int(position), "SignatureDef", "signature_key") or ""
                     for position in self.get(model, "Model", "signature_defs")[:_TOLD]]
            raise self.error(f"expected one subgraph; found {len(subgraphs)}" + (
                f", signatures {', '.join(map(repr, named))}: convert one of them alone" if len(named) > 1 else
                ", of composites or control flow: convert the attention alone"))
        subgraph = int(subgraphs[0])
        self.buffers = self.get(model, "Model", "buffers")
        codes = self.tables(model, "Model", "operator_codes", lambda position, _: self.operator_code(position))
        graph = Graph()
        graph.tensors = self.tables(subgraph, "SubGraph", "tensors", self.tensor)
        graph.operators = self.tables(
            subgraph, "SubGraph", "operators",
            lambda position, _: self.operator(position, codes, len(graph.tensors)))
        for role in ("inputs", "outputs"):
            numbers = self.get(subgraph, "SubGraph", role)
            if numbers.size > _MOST_TABLES:
                raise self.error(f"has {numbers.size} {role}; expected at most {_MOST_TABLES}")
            setattr(
                graph, role, self.tensor_numbers(numbers, len(graph.tensors), f"the graph's {role}", lowest=0)
            )
        return graph

    def tensor_numbers(self, numbers: np.ndarray, count: int, what: str, lowest: int) -> list[int]:
        self.operands_left -= numbers.nbytes
        if self.operands_left < 0:
            raise self.error(f"is damaged: its operators share so many operands that they take more than {_TIMES_READ} "
                             "times the file")
        wrong = numbers[(numbers < lowest) | (numbers >= count)]
        if wrong.size:
            raise self.error(f"{what} name tensor {wrong[0]}; the file has tensors 0 to {count - 1}")
        return numbers.tolist()

    def operator_code(self, table: int) -> tuple[str, int]:
        # Files from before the int32 field have the code in the int8 one; both are never smaller than the
        # true code.
        code = max(self.get(table, "OperatorCode", "deprecated_builtin_code"),
                   self.get(table, "OperatorCode", "builtin_code"))
        name = self.get(table, "OperatorCode", "custom_code") or _OPERATOR_NAMES.get(code, f"operator {code}")
        return name, self.get(table, "OperatorCode", "version")

    def operator(self, table: int, codes: list[tuple[str, int]], tensor_count: int) -> Operator:
        index = self.get(table, "Operator", "opcode_index")
        if index >= len(codes):
            raise self.error(f"an operator has code number {index}; the file lists {len(codes)} codes")
        name, version = codes[index]
        inputs, outputs = (
            self.tensor_numbers(self.get(table, "Operator", role), tensor_count, f"{role} of {name}", lowest)
            for role, lowest in (("inputs", -1), ("outputs", 0))
        )
        return Operator(name, tuple(inputs), tuple(outputs), self.options(table, name), version)

    def options(self, table: int, name: str) -> dict[str, object]:
        builtin = BUILTIN_OPERATORS.get(name)
        if builtin is None or not builtin.options_table:
            return {}
        code = self.get(table, "Operator", "builtin_options_type")
        position = self.get(table, "Operator", "builtin_options")
        fields = TABLES[builtin.options_table]
        if code == 0 or position is None:
            return {
                field: declared.default for field, declared in fields.items() if declared.kind in _SCALARS
            }
        if code != builtin.options_code:
            raise self.error(
                f"{name} has options of type {code}; expected {builtin.options_code}"
                f" ({builtin.options_table})"
            )
        return {field: self.get(position, builtin.options_table, field) for field in fields}

    def tensor(self, table: int, number: int) -> Tensor:
        name = self.get(table, "Tensor", "name") or f"tensor {number}"
        shape = self.get(table, "Tensor", "shape")
        if shape.size > _HIGHEST_RANK or (shape < 0).any():
            raise self.error(
                f"tensor {name!r} has shape {shape[:_HIGHEST_RANK + 1].tolist()}; expected at most "
                f"{_HIGHEST_RANK} axes, none negative"
            )
        shape = tuple(shape.tolist())
        code = self.get(table, "Tensor", "type")
        dtype = np.dtype(np.int8) if code == INT4 else DTYPES.get(code)
        scale, zero_point, axis = self.quantization(table, name)
        is_open = bool((self.get(table, "Tensor", "shape_signature") < 0).any())
        data = self.constant(table, name, shape, dtype, packed=code == INT4)
        return Tensor(name, shape, dtype, data, scale, zero_point, axis, is_open, code == INT4)

    def quantization(self, table: int, name: str) -> tuple[np.ndarray | None, np.ndarray | None, int]:
        position = self.get(table, "Tensor", "quantization")
        if position is None:
            return None, None, 0
        scale = self.get(position, "QuantizationParameters", "scale")
        zero_point = self.get(position, "QuantizationParameters", "zero_point")
        if self.get(position, "QuantizationParameters", "details_type") != 0:
            raise self.error(f"tensor {name!r} has quantization of a kind other than scale and zero point (in blocks, "
                             "or of several axes): quantize by channels")
        if scale.size == 0:  # float tensors carry min and max only
            return None, None, 0
        if zero_point.size == 0:
            zero_point = np.broadcast_to(np.int64(0), scale.shape)
        if zero_point.size != scale.size:
            raise self.error(
                f"tensor {name!r} has {scale.size} scales and {zero_point.size} zero points; expected as many"
            )
        return (scale.astype(np.float32, copy=False), zero_point.astype(np.int64, copy=False),
                self.get(position, "QuantizationParameters", "quantized_dimension"))

    def constant(
        self, table: int, name: str, shape: tuple[int, ...], dtype: np.dtype | None, *, packed: bool
    ) -> np.ndarray | None:
        """The values of a constant tensor; None when it is computed at run time or of no type of DTYPES.

        packed : whether a byte has two codes
        """
        number = self.get(table, "Tensor", "buffer")
        if number >= len(self.buffers):
            raise self.error(
                f"tensor {name!r} has buffer number {number}; the file has {len(self.buffers)} buffers"
            )
        buffer = int(self.buffers[number])
        if self.get(table, "Tensor", "external_buffer"):
            raise self.error(f"tensor {name!r} has its values in another file; expected them in this one")
        # Offsets of 0 and 1 are placeholders; greater ones point behind the FlatBuffer, where ai-edge-quantizer puts
        # large constants.
        offset = self.get(buffer, "Buffer", "offset")
        if offset > 1:
            size = self.get(buffer, "Buffer", "size")
            self.span(offset, size, f"the values of tensor {name!r}")
            raw = np.frombuffer(self.data, np.uint8, size, offset)
        else:
            raw = self.get(buffer, "Buffer", "data")
        if raw.size == 0 or dtype is None:
            return None
        if self.get(table, "Tensor", "sparsity") is not None:
            raise self.error(f"tensor {name!r} is stored sparse; expected a dense one")
        size = math.prod(shape)
        expected = (size + 1) // 2 if packed else size * dtype.itemsize
        if raw.size != expected:
            raise self.error(
                f"tensor {name!r} has a buffer of {raw.size} bytes; its shape {shape} of {dtype} takes"
                f" {expected}"
            )
        if packed:
            self.operands_left -= size  # what is unpacked is no view: buffers may be shared
            if self.operands_left < 0:
                raise self.error("is damaged: its tensors share constants of 4 bits")
            halves = np.stack([raw << 4, raw & 0xF0], axis=-1).ravel()[:size]
            return (halves.view(np.int8) >> 4).reshape(shape)
        return np.frombuffer(raw, dtype.newbyteorder("<")).reshape(shape)
