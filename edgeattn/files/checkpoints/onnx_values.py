"""What an ONNX model stores: attributes of the kinds they should have, and tensors that are as large as they say.

onnx's own readers read all of a model's files at once, follow where tensors say their data lie, and have an exception
for every kind of damage. Here a tensor is read when it is wanted, from the model or from a file in its folder.
"""

import math
import os

import numpy as np

from edgeattn.files.paths import reason
from edgeattn.files.stored import Budget, file_size, widened

# Attributes that are asked for, by kind; those of other kinds are read only where a node has no other meaning.
_KINDS = {
    "INT": "num_heads q_num_heads kv_num_heads kv_num_heads do_rotary is_causal unidirectional left_window_size "
           "right_window_size local_window_size transA transB axis allowzero keepdims start end to upper "
           "num_outputs rotary_interleaved group p batch_dims ceil_mode noop_with_empty_axes smooth_softmax "
           "exclusive reverse k antialias exclude_outside",
    "FLOAT": "scale softcap alpha beta epsilon cubic_coeff_a",
    "INTS": "qkv_hidden_sizes perm split axes starts ends pads strides dilations kernel_shape",
    "STRING": "equation approximate auto_pad mode coordinate_transformation_mode nearest_mode",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_CONSTANTS = {"value_float": "f4", "value_floats": "f4", "value_int": "i8", "value_ints": "i8"}
# Kind of tensor -> (dtype of its bytes, the field that may hold its numbers instead)
_DTYPES = {
    "FLOAT": ("<f4", "float_data"), "DOUBLE": ("<f8", "double_data"), "FLOAT16": ("<f2", "int32_data"),
    "BFLOAT16": ("<u2", "int32_data"), "INT64": ("<i8", "int64_data"), "INT32": ("<i4", "int32_data"),
    "INT16": ("<i2", "int32_data"), "INT8": ("i1", "int32_data"), "UINT8": ("u1", "int32_data"),
    "UINT16": ("<u2", "int32_data"), "BOOL": ("u1", "int32_data"), "UINT32": ("<u4", "uint64_data"),
    "UINT64": ("<u8", "uint64_data"),
}


class NotRead(ValueError):
    """What is wrong with a graph, not yet with the name of the file."""


class UnknownShape(NotRead):
    """A shape that is not known, or not possible, for the lengths that a graph is read for."""


class Values:
    """Reads attributes and tensors of one model.

    Parameters
    ----------
    onnx : module
    folder : str or None
        Where the data beside the model may lie; None for a model that is no file.
    """

    def __init__(self, onnx, folder):
        self._onnx, self._folder = onnx, folder

    def attributes(self, node):
        """The attributes of a node that are asked for, by name."""
        found = {}
        for entry in node.attribute:
            kind = _KIND_OF.get(entry.name)
            if kind is not None:
                found[entry.name] = self._attribute(entry, kind, node)
        return found

    def _attribute(self, entry, kind, node):
        kinds = self._onnx.AttributeProto.AttributeType
        if entry.type != kinds.Value(kind):
            raise NotRead(f"{node.op_type} node {node.name[:100]!r} must have {entry.name} as {kind}, got "
                          f"{_enum_name(kinds, entry.type)}")
        if kind == "INTS":
            return list(entry.ints)
        if kind == "STRING":
            return entry.s.decode()
        value = entry.i if kind == "INT" else entry.f
        if not math.isfinite(value):
            raise NotRead(f"{node.op_type} node {node.name[:100]!r} must have a finite {entry.name}, got {value}")
        return value

    def of_constant(self, node):
        """The array of a Constant node."""
        for entry in node.attribute:
            if entry.name == "value" and entry.HasField("t"):
                return self.array(entry.t, node.output[0])
            if entry.name in _CONSTANTS:
                field = {"value_float": "f", "value_int": "i"}.get(entry.name, entry.name.removeprefix("value_"))
                return np.array(getattr(entry, field), _CONSTANTS[entry.name])
        raise NotRead(f"Constant node {node.name[:100]!r} must have a value of numbers, got "
                      f"{reason([entry.name for entry in node.attribute])}")

    def filled(self, node):
        """The value of a ConstantOfShape node, one element."""
        tensors = [entry.t for entry in node.attribute if entry.name == "value"]
        return self.array(tensors[0], "value").reshape(-1)[:1] if tensors else np.zeros(1, np.float32)

    def dtype(self, number):
        """The NumPy dtype of a kind of tensors, float32 for one that NumPy lacks."""
        kind = _enum_name(self._onnx.TensorProto.DataType, number)
        return np.dtype(bool) if kind == "BOOL" else np.dtype(
            np.float32 if kind.endswith("FLOAT16") else _DTYPES.get(kind, ("f4",))[0])

    def is_half(self, tensor):
        """Whether a stored tensor is of 16-bit floats."""
        return tensor.data_type in (self._onnx.TensorProto.FLOAT16, self._onnx.TensorProto.BFLOAT16)

    def array(self, tensor, name):
        """A stored tensor as an array; bfloat16, which NumPy lacks, as float32."""
        kind = _enum_name(self._onnx.TensorProto.DataType, tensor.data_type)
        what = f"tensor {name[:100]!r}"
        if kind not in _DTYPES:
            raise NotRead(f"{what} must be one of {', '.join(_DTYPES)}, got {kind}")
        dtype, field = _DTYPES[kind]
        dtype, shape = np.dtype(dtype), tuple(tensor.dims)
        try:
            if tensor.data_location == self._onnx.TensorProto.EXTERNAL:
                array = self._beside(tensor, shape, dtype, what)
            elif tensor.HasField("raw_data"):
                array = np.frombuffer(_exactly(tensor.raw_data, shape, dtype, what), dtype)
            else:
                numbers = np.array(getattr(tensor, field))
                _exactly(range(numbers.size * dtype.itemsize), shape, dtype, what)
                # 16 bits of any kind lie in the lower half of an integer
                array = numbers.astype("u2").view(dtype) if kind.endswith("FLOAT16") else numbers.astype(dtype)
        except ValueError as error:
            raise NotRead(reason(error)) from error
        array = array.reshape(shape)
        return widened(array) if kind == "BFLOAT16" else array != 0 if kind == "BOOL" else array

    def _beside(self, tensor, shape, dtype, what):
        """A tensor in a file of its own, which must lie in the model's folder."""
        told = {entry.key: entry.value for entry in tensor.external_data}
        location = told.get("location", "")
        if self._folder is None:
            raise NotRead(f"{what} lies in a file {location[:200]!r}, and the model in none; give the model's path")
        folder = os.path.realpath(self._folder)
        path = os.path.realpath(os.path.join(folder, location.replace("\0", "")))
        if not location or os.path.isabs(location) or os.path.commonpath([folder, path]) != folder:
            raise NotRead(f"{what} must lie in a file in the model's folder, got {location[:200]!r}")
        if not os.path.isfile(path):
            raise NotRead(f"{what} lies in {location[:200]!r}, which is no file in the model's folder")
        if not all(told.get(key, "0").isdecimal() for key in ("offset", "length")):
            raise NotRead(f"{what} must have a whole offset and length, got {reason(told)}")
        offset, length = (int(told[key]) if key in told else None for key in ("offset", "length"))
        with open(path, "rb") as file:
            nbytes = Budget(file_size(file)).nbytes(shape, dtype.itemsize, what)
            at = offset or 0
            if length not in (None, nbytes) or not 0 <= at <= file_size(file) - nbytes:
                raise NotRead(f"{what} takes {nbytes} bytes from byte {at} of {location[:200]!r} on; it says {length}, "
                              f"and the file has {file_size(file)}")
            file.seek(at)
            return np.fromfile(file, dtype, nbytes // dtype.itemsize)


def _exactly(content, shape, dtype, what):
    """`content`, which must be as long as its shape says."""
    nbytes = Budget(len(content)).nbytes(shape, dtype.itemsize, what)
    if len(content) != nbytes:
        raise NotRead(f"{what} of shape {shape} takes {nbytes} bytes, got {len(content)}")
    return content


def _enum_name(enum, number):
    return enum.Name(number) if number in enum.values() else f"unknown kind {number}"
