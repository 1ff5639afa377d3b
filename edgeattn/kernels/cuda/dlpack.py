"""Arrays on the device by DLPack, from libraries that have no `__cuda_array_interface__`.

https://dmlc.github.io/dlpack/latest/c_api.html, DLTensor; the capsule is read, never consumed, and kept by the View.
"""
import ctypes

import numpy as np

_CUDA, _MANAGED = 2, 13  # kDLCUDA, kDLCUDAManaged
_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}
_DEFAULT_STREAM = 1  # its name: 0 is not allowed


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def on_gpu(array):
    """Whether an array says by DLPack that it lies in a GPU's memory."""
    device = getattr(array, "__dlpack_device__", None)
    return device is not None and hasattr(array, "__dlpack__") and device()[0] in (_CUDA, _MANAGED)


def device(array):
    """The number of the GPU that an array lies on; None for memory that all of them reach."""
    found, number = array.__dlpack_device__()
    return number if found == _CUDA else None


def described(name, array, stream):
    """(capsule, address, shape, strides in bytes, dtype) of an array for which `on_gpu` holds.

    Its library lets what is queued on `stream` from now on wait for what it has queued itself.

    Raises
    ------
    TypeError
        For a dtype that NumPy has not.
    """
    capsule = array.__dlpack__(stream=stream or _DEFAULT_STREAM)
    tensor = _Tensor.from_address(_pointer(capsule, b"dltensor"))
    if tensor.code not in _KINDS or tensor.lanes != 1:
        raise TypeError(f"{name} must have a dtype that NumPy has, got DLPack's code {tensor.code} with {tensor.bits} "
                        f"bits and {tensor.lanes} lanes; convert it")
    dtype = np.dtype(f"{_KINDS[tensor.code]}{tensor.bits // 8}")
    shape = tuple(tensor.shape[:tensor.ndim])
    strides = tuple(n * dtype.itemsize for n in tensor.strides[:tensor.ndim]) if tensor.strides else None
    return capsule, (tensor.data or 0) + tensor.byte_offset, shape, strides, dtype
