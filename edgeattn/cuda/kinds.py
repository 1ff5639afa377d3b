"""Who made an array on the device, and makes results and scratch memory of the same kind on the same stream.

A kind has describe(array), its address and, as something to be compared, all else that decides how it is read, without
a View; address(array); empty(shape, dtype, like); and stream(like).
"""
import sys

import numpy as np

from edgeattn.cuda.driver import DeviceArray, driver


class _Torch:
    """Arrays of PyTorch: its allocator, its current stream."""

    @staticmethod
    def describe(array):
        pointer = array.data_ptr()
        return pointer, (array.dtype, array.shape, array.stride(), array.device, array.requires_grad, pointer % 16)

    @staticmethod
    def address(array):
        return array.data_ptr()

    @staticmethod
    def empty(shape, dtype, like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), device=like.device)

    @staticmethod
    def stream(like):
        return sys.modules["torch"].cuda.current_stream(like.device).cuda_stream


class _Foreign:
    """Arrays of anybody else: memory of ours, the stream the array names or the default one."""

    @staticmethod
    def describe(array):
        interface = array.__cuda_array_interface__
        pointer, read_only = interface["data"]
        return pointer, (read_only, interface["shape"], interface.get("strides"), interface["typestr"], pointer % 16)

    @staticmethod
    def address(array):
        return array.__cuda_array_interface__["data"][0]

    @staticmethod
    def empty(shape, dtype, like):
        return driver().empty(shape, dtype)

    @staticmethod
    def stream(like):
        return getattr(like, "__cuda_array_interface__", {}).get("stream") or 0


class _CuPy(_Foreign):
    """Arrays of CuPy: its memory pool, its current stream."""

    @staticmethod
    def empty(shape, dtype, like):
        return sys.modules["cupy"].empty(shape, dtype)

    @staticmethod
    def stream(like):
        return sys.modules["cupy"].cuda.get_current_stream().ptr


class _Ours(_Foreign):
    """Memory of this package, on the default stream."""

    @staticmethod
    def describe(array):
        pointer = array.pointer
        return pointer, (array.shape, array.dtype, pointer % 16)

    @staticmethod
    def address(array):
        return array.pointer

    @staticmethod
    def stream(like):
        return 0


_OF_TYPE = {DeviceArray: _Ours}
_OF_MODULE = {"torch": _Torch, "cupy": _CuPy}


def kind(array):
    """The kind of an array."""
    found = _OF_TYPE.get(type(array))
    if found is None:
        modules = (base.__module__.partition(".")[0] for base in type(array).__mro__)  # also of what is derived
        found = _OF_TYPE[type(array)] = next((_OF_MODULE[name] for name in modules if name in _OF_MODULE), _Foreign)
    return found
