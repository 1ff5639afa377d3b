"""Who made an array on the device, and makes results and scratch memory of the same kind on the same stream.

A kind has describe(array), its address and, as something to be compared, all else that decides how it is read, without
a View; address(array); empty(shape, dtype, like); device(array), None where it says nothing; stream(array), on which it
is used, None where nothing is queued; and by_dlpack(array), whether DLPack has to tell of that. `together`: all arrays
of the kind are used on one stream at a time. `kept`: nobody else sees to it that its memory stays while a launch is
under way.
"""
import sys

import numpy as np

from edgeattn.kernels.cuda import dlpack
from edgeattn.kernels.cuda.driver import DeviceArray, driver


class _Torch:
    """Arrays of PyTorch: its allocator, its current stream."""

    together, kept = True, False

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
    def by_dlpack(array):
        return False

    @staticmethod
    def device(array):
        return array.get_device()

    @staticmethod
    def stream(array):
        return sys.modules["torch"].cuda.current_stream(array.device).cuda_stream


class _Foreign:
    """Arrays of anybody else: memory of ours, the stream the array names or the default one."""

    together, kept = False, True

    @staticmethod
    def describe(array):
        interface = array.__cuda_array_interface__
        if _Foreign.by_dlpack(array):
            raise TypeError("each call must tell its library the stream")
        pointer, read_only = interface["data"]
        return pointer, (read_only, interface["shape"], interface.get("strides"), interface["typestr"], pointer % 16,
                         driver().device_of(pointer))

    @staticmethod
    def address(array):
        return array.__cuda_array_interface__["data"][0]

    @staticmethod
    def empty(shape, dtype, like):
        return driver().empty(shape, dtype, _Foreign.stream(like) or 0)

    @staticmethod
    def by_dlpack(array):
        # version 2 has no word for a stream: what is queued on one, JAX's say, is waited for as DLPack has it
        return getattr(array, "__cuda_array_interface__", {}).get("version", 0) < 3 and hasattr(array, "__dlpack__")

    @staticmethod
    def device(array):
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            return dlpack.device(array)
        pointer = interface["data"][0]
        return driver().device_of(pointer) if pointer else None

    @staticmethod
    def stream(array):
        # version 3: 1 is the legacy default stream, which is 0 to the driver; None where nothing is to be waited for
        named = getattr(array, "__cuda_array_interface__", {}).get("stream")
        return 0 if named == 1 else named


class _CuPy(_Foreign):
    """Arrays of CuPy: its memory pool, its current stream."""

    together, kept, by_dlpack = True, False, _Torch.by_dlpack

    @staticmethod
    def describe(array):
        pointer = array.data.ptr
        return pointer, (array.dtype, array.shape, array.strides, array.device.id, pointer % 16)

    @staticmethod
    def address(array):
        return array.data.ptr

    @staticmethod
    def empty(shape, dtype, like):
        return sys.modules["cupy"].empty(shape, dtype)

    @staticmethod
    def device(array):
        return array.device.id

    @staticmethod
    def stream(array):
        return sys.modules["cupy"].cuda.get_current_stream().ptr


class _Ours(_Foreign):
    """Memory of this package, on the stream of the call it was made for."""

    kept, by_dlpack = False, _Torch.by_dlpack  # to give memory back waits for the GPU

    @staticmethod
    def describe(array):
        return array.pointer, array.layout

    @staticmethod
    def address(array):
        return array.pointer

    @staticmethod
    def empty(shape, dtype, like):
        return driver().empty(shape, dtype, like.stream)

    @staticmethod
    def device(array):
        return array.device

    @staticmethod
    def stream(array):
        return array.stream


_OF_TYPE = {DeviceArray: _Ours}
_OF_MODULE = {"torch": _Torch, "cupy": _CuPy}


def kind(array):
    """The kind of an array."""
    found = _OF_TYPE.get(type(array))
    if found is None:
        modules = (base.__module__.partition(".")[0] for base in type(array).__mro__)  # also of what is derived
        found = _OF_TYPE[type(array)] = next((_OF_MODULE[name] for name in modules if name in _OF_MODULE), _Foreign)
    return found
