"""The part of the .tflite schema that our layers need, as data, and a graph in its terms.

A .tflite file is a FlatBuffer (identifier "TFL3"): tables whose fields sit in numbered slots. The writer and
the reader are both driven by TABLES, so a field exists once. Slots and codes are those of
tensorflow/lite/schema/schema.fbs, version 3; slots are only ever appended there, so files of any age agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
BUFFER_ALIGNMENT = 16  # Buffer.data is force_align 16: runtimes use weights where the file is mapped

# TensorType code -> dtype, for the types attention graphs use
DTYPES: Mapping[int, np.dtype] = MappingProxyType({
    0: np.dtype(np.float32), 1: np.dtype(np.float16), 2: np.dtype(np.int32), 3: np.dtype(np.uint8),
    4: np.dtype(np.int64), 6: np.dtype(np.bool_), 7: np.dtype(np.int16), 9: np.dtype(np.int8),
})
INT4 = 17  # two codes a byte, the lower half first; read as int8
TYPE_CODES: Mapping[np.dtype, int] = MappingProxyType({dtype: code for code, dtype in DTYPES.items()})


@dataclass(frozen=True)
class Field:
    """A field of a table: its slot, what it holds and the value an absent scalar stands for.

    ``kind`` is a scalar ("bool", "int8", "uint8", "int32", "uint32", "uint64", "float32"), "string", "union",
    the name of a table, or one of these in brackets for a vector.
    """

    slot: int
    kind: str
    default: float = 0


TABLES: Mapping[str, Mapping[str, Field]] = MappingProxyType({
    "Model": {
        "version": Field(0, "uint32"), "operator_codes": Field(1, "[OperatorCode]"),
        "subgraphs": Field(2, "[SubGraph]"), "description": Field(3, "string"),
        "buffers": Field(4, "[Buffer]"), "signature_defs": Field(7, "[SignatureDef]"),
    },
    "OperatorCode": {
        "deprecated_builtin_code": Field(0, "int8"), "custom_code": Field(1, "string"),
        "version": Field(2, "int32", 1), "builtin_code": Field(3, "int32"),
    },
    "SubGraph": {
        "tensors": Field(0, "[Tensor]"), "inputs": Field(1, "[int32]"), "outputs": Field(2, "[int32]"),
        "operators": Field(3, "[Operator]"), "name": Field(4, "string"),
    },
    "Tensor": {
        "shape": Field(0, "[int32]"), "type": Field(1, "int8"), "buffer": Field(2, "uint32"),
        "name": Field(3, "string"), "quantization": Field(4, "QuantizationParameters"),
        "sparsity": Field(6, "SparsityParameters"), "shape_signature": Field(7, "[int32]"),
        "has_rank": Field(8, "bool"),
        "external_buffer": Field(10, "uint32"),
    },
    "QuantizationParameters": {
        "scale": Field(2, "[float32]"), "zero_point": Field(3, "[int64]"), "details_type": Field(4, "uint8"),
        "quantized_dimension": Field(6, "int32"),
    },
    "SparsityParameters": {},
    "Operator": {
        "opcode_index": Field(0, "uint32"), "inputs": Field(1, "[int32]"), "outputs": Field(2, "[int32]"),
        "builtin_options_type": Field(3, "uint8"), "builtin_options": Field(4, "union"),
    },
    "Buffer": {"data": Field(0, "[uint8]"), "offset": Field(1, "uint64"), "size": Field(2, "uint64")},
    "SignatureDef": {
        "inputs": Field(0, "[TensorMap]"), "outputs": Field(1, "[TensorMap]"),
        "signature_key": Field(2, "string"), "subgraph_index": Field(4, "uint32"),
    },
    "TensorMap": {"name": Field(0, "string"), "tensor_index": Field(1, "uint32")},
    "FullyConnectedOptions": {
        "fused_activation_function": Field(0, "int8"), "weights_format": Field(1, "int8"),
        "keep_num_dims": Field(2, "bool"), "asymmetric_quantize_inputs": Field(3, "bool"),
    },
    "BatchMatMulOptions": {"adj_x": Field(0, "bool"), "adj_y": Field(1, "bool")},
    "SoftmaxOptions": {"beta": Field(0, "float32")},
    "AddOptions": {"fused_activation_function": Field(0, "int8")},
    "MulOptions": {"fused_activation_function": Field(0, "int8")},
    "ReshapeOptions": {"new_shape": Field(0, "[int32]")},
    "GeluOptions": {"approximate": Field(0, "bool")},
    "ReducerOptions": {"keep_dims": Field(0, "bool")},
    "SubOptions": {"fused_activation_function": Field(0, "int8")},
    "GatherOptions": {"axis": Field(0, "int32"), "batch_dims": Field(1, "int32")},
    "ConcatenationOptions": {"axis": Field(0, "int32"), "fused_activation_function": Field(1, "int8")},
    "SliceOptions": {},
    "SplitOptions": {"num_splits": Field(0, "int32")},
    "Conv2DOptions": {
        "padding": Field(0, "int8"), "stride_w": Field(1, "int32"), "stride_h": Field(2, "int32"),
        "fused_activation_function": Field(3, "int8"), "dilation_w_factor": Field(4, "int32", 1),
        "dilation_h_factor": Field(5, "int32", 1),
    },
    "DivOptions": {"fused_activation_function": Field(0, "int8")},
    "SqueezeOptions": {"squeeze_dims": Field(0, "[int32]")},
    "StridedSliceOptions": {
        "begin_mask": Field(0, "int32"), "end_mask": Field(1, "int32"), "ellipsis_mask": Field(2, "int32"),
        "new_axis_mask": Field(3, "int32"), "shrink_axis_mask": Field(4, "int32"), "offset": Field(5, "bool"),
    },
    "PackOptions": {"values_count": Field(0, "int32"), "axis": Field(1, "int32")},
    "UnpackOptions": {"num": Field(0, "int32"), "axis": Field(1, "int32")},
    "NotEqualOptions": {},
    "TransposeOptions": {},
    "SelectV2Options": {},
    "QuantizeOptions": {},
    "DequantizeOptions": {},
})


@dataclass(frozen=True)
class BuiltinOperator:
    """An operator: its code, the code of its options in the union, and the options' table; 0 and "" of none."""

    code: int
    options_code: int
    options_table: str


BUILTIN_OPERATORS: Mapping[str, BuiltinOperator] = MappingProxyType({
    "ADD": BuiltinOperator(0, 11, "AddOptions"),
    "CONCATENATION": BuiltinOperator(2, 10, "ConcatenationOptions"),
    "CONV_2D": BuiltinOperator(3, 1, "Conv2DOptions"),
    "DEQUANTIZE": BuiltinOperator(6, 38, "DequantizeOptions"),
    "FULLY_CONNECTED": BuiltinOperator(9, 8, "FullyConnectedOptions"),
    "LOGISTIC": BuiltinOperator(14, 0, ""),
    "MUL": BuiltinOperator(18, 21, "MulOptions"),
    "RELU": BuiltinOperator(19, 0, ""),
    "RESHAPE": BuiltinOperator(22, 17, "ReshapeOptions"),
    "SOFTMAX": BuiltinOperator(25, 9, "SoftmaxOptions"),
    "GATHER": BuiltinOperator(36, 23, "GatherOptions"),
    "TRANSPOSE": BuiltinOperator(39, 26, "TransposeOptions"),
    "MEAN": BuiltinOperator(40, 27, "ReducerOptions"),
    "SUB": BuiltinOperator(41, 28, "SubOptions"),
    "DIV": BuiltinOperator(42, 29, "DivOptions"),
    "SQUEEZE": BuiltinOperator(43, 30, "SqueezeOptions"),
    "STRIDED_SLICE": BuiltinOperator(45, 32, "StridedSliceOptions"),
    "SPLIT": BuiltinOperator(49, 35, "SplitOptions"),
    "SLICE": BuiltinOperator(65, 48, "SliceOptions"),
    "NOT_EQUAL": BuiltinOperator(72, 55, "NotEqualOptions"),
    "SUM": BuiltinOperator(74, 27, "ReducerOptions"),
    "RSQRT": BuiltinOperator(76, 0, ""),
    "REDUCE_PROD": BuiltinOperator(81, 27, "ReducerOptions"),
    "REDUCE_MAX": BuiltinOperator(82, 27, "ReducerOptions"),
    "PACK": BuiltinOperator(83, 59, "PackOptions"),
    "UNPACK": BuiltinOperator(88, 64, "UnpackOptions"),
    "REDUCE_MIN": BuiltinOperator(89, 27, "ReducerOptions"),
    "CAST": BuiltinOperator(53, 0, ""),
    "SHAPE": BuiltinOperator(77, 0, ""),
    "QUANTIZE": BuiltinOperator(114, 89, "QuantizeOptions"),
    "SELECT_V2": BuiltinOperator(123, 98, "SelectV2Options"),
    "BATCH_MATMUL": BuiltinOperator(126, 101, "BatchMatMulOptions"),
    "BROADCAST_TO": BuiltinOperator(130, 0, ""),
    "GELU": BuiltinOperator(150, 116, "GeluOptions"),
})
# What the old int8 field of an operator's code says where the code is greater.
DEPRECATED_CODE_MAX = 127


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a graph.

    Parameters
    ----------
    name : str
    shape : tuple of int
    dtype : np.dtype or None
        None for a type this subset of the schema does not name.
    data : ndarray or None
        A constant's values, of ``shape`` and ``dtype``.
    scale : float32 (1,) or (channels,), or None
        None = not quantized.
    zero_point : int64, as ``scale``, or None
    channel_axis : int
        The axis that ``scale`` runs along where it has more than one element.
    is_open : bool
        Whether an axis is as long as a call makes it: ``shape`` has a 1 in its place.
    is_packed : bool
        Whether the file has two codes of ``data`` in a byte, of 4 bits each.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    data: np.ndarray | None = None
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None
    channel_axis: int = 0
    is_open: bool = False
    is_packed: bool = False


@dataclass(frozen=True, eq=False)
class Operator:
    """An operator of a graph: a name of BUILTIN_OPERATORS (a file may hold others), and tensor numbers.

    An input of -1 is an optional tensor left out.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, object] = field(default_factory=dict)
    version: int = 1


@dataclass(eq=False)
class Graph:
    """Tensors, operators in the order they run, and which tensors go in and come out.

    >>> graph = Graph()
    >>> x = graph.activation("x", (2, 3), np.float32)
    >>> y = graph.activation("y", (2, 3), np.float32)
    >>> graph.operator("SOFTMAX", [x], y, {"beta": 1.0})
    >>> graph.inputs, graph.outputs = [x], [y]
    """

    tensors: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def activation(self, name: str, shape: Sequence[int], dtype=np.int8, quantization=None) -> int:
        """Add a tensor computed at run time and return its number.

        ``quantization`` has a scalar ``scale`` and ``zero_point``, or is None.
        """
        shape = tuple(map(int, shape))
        return self._append(Tensor(name, shape, np.dtype(dtype), None, *_parameters(quantization)))

    def constant(self, name: str, values: np.ndarray, quantization=None, *, channel_scale=None) -> int:
        """Add a constant and return its number.

        ``quantization`` is as for ``activation``; ``channel_scale``, float32 (values.shape[0],), is instead
        symmetric quantization along the first axis.
        """
        values = np.asarray(values)
        if channel_scale is None:
            scale, zero_point = _parameters(quantization)
        else:
            scale = np.array(channel_scale, np.float32)
            zero_point = np.zeros(scale.shape, np.int64)
        return self._append(Tensor(name, values.shape, values.dtype, values, scale, zero_point))

    def operator(self, name: str, inputs: Sequence[int], output: int,
                 options: Mapping[str, object] | None = None, version: int = 1) -> None:
        """Add an operator that runs after those added before it."""
        self.operators.append(Operator(name, tuple(inputs), (output,), dict(options or {}), version))

    def _append(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1


def _parameters(quantization) -> tuple[np.ndarray | None, np.ndarray | None]:
    if quantization is None:
        return None, None
    return np.array([quantization.scale], np.float32), np.array([quantization.zero_point], np.int64)
