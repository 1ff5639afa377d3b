"""The only file that speaks to the GPU's driver: memory, loading, launching. Everything above it runs without one."""
import ctypes
import functools
import importlib.util
import math
import struct
import threading

import numpy as np

from edgeattn.cuda import cache
from edgeattn.cuda.arrays import c_strides

LOWEST = (8, 0)  # compute capability with the tensor cores' int8 and cp.async
_INSTALL = "pip install 'edgeattn[cuda]'"


class DeviceArray:
    """Memory of ours on the device.

    Parameters
    ----------
    owner : Driver
    shape : tuple of int
    dtype : numpy dtype
    """

    def __init__(self, owner, shape, dtype):
        self._owner, self.shape, self.dtype = owner, tuple(shape), np.dtype(dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self.pointer = owner.allocate(max(self.nbytes, 1))

    def __del__(self):
        if getattr(self, "pointer", 0):
            self._owner.free(self.pointer)

    @property
    def __cuda_array_interface__(self):
        return {"data": (self.pointer, False), "shape": self.shape, "strides": None, "typestr": self.dtype.str,
                "version": 3, "stream": None}

    @property
    def strides(self):
        """In bytes."""
        return c_strides(self.shape, self.dtype)

    def numpy(self):
        """A copy in host memory, after everything before it on the default stream."""
        host = np.empty(self.shape, self.dtype)
        if host.nbytes:
            self._owner.copy_to_host(host, self.pointer)
        return host


def why_not():
    """None where CUDA can be used, else the reason in words."""
    try:
        driver()
    except RuntimeError as error:
        return str(error)
    return None


class Driver:
    """The GPU of the current context, or the first one.

    Raises
    ------
    RuntimeError
        Saying what is missing: the extra, the driver, or a GPU that is new enough.
    """

    def __init__(self):
        for module in ("numba_cuda", "cuda.bindings"):
            if not _installed(module):
                raise RuntimeError(f"CUDA needs the extra 'cuda' ({_INSTALL}): {module} is not installed")
        from cuda.bindings import driver as api

        self._api = api
        try:
            self._check(api.cuInit(0))
            count = self._check(api.cuDeviceGetCount())
        except Exception as error:  # noqa: BLE001 - the loader's own errors differ by version
            raise RuntimeError("CUDA needs an NVIDIA driver, and none answers: "
                               f"{str(error).splitlines()[0].rstrip('.')}") from None
        if not count:
            raise RuntimeError("CUDA needs an NVIDIA GPU; the driver sees none")
        self._functions = {}
        self.device()
        if self.capability() < LOWEST:
            raise RuntimeError(f"CUDA needs a GPU of compute capability {LOWEST[0]}.{LOWEST[1]} or above (Jetson Orin, "
                               f"A100 and later); {self.name()} has {'.'.join(map(str, self.capability()))}")

    def _check(self, answer):
        """The value of a driver call, without its status."""
        status, *values = answer
        if int(status):
            _, text = self._api.cuGetErrorString(status)
            raise RuntimeError(f"the CUDA driver says {(text or b'?').decode()} ({status})")
        return values[0] if len(values) == 1 else values

    def device(self):
        """The device of the current context; without one, the first device's primary context becomes current."""
        status, device = self._api.cuCtxGetDevice()
        if status:  # there is no context
            device = self._check(self._api.cuDeviceGet(0))
            self._check(self._api.cuCtxSetCurrent(self._check(self._api.cuDevicePrimaryCtxRetain(device))))
            device = self._check(self._api.cuCtxGetDevice())
        return int(device)

    def name(self):
        """The GPU's name."""
        return self._check(self._api.cuDeviceGetName(128, self.device())).split(b"\0")[0].decode()

    @functools.lru_cache  # noqa: B019 - there is one Driver, as long as the process
    def _capability(self, device):
        attribute = self._api.CUdevice_attribute
        return tuple(self._check(self._api.cuDeviceGetAttribute(getattr(
            attribute, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}"), device)) for part in ("MAJOR", "MINOR"))

    def capability(self):
        """(major, minor) of the current device."""
        return self._capability(self.device())

    @functools.lru_cache  # noqa: B019
    def _processors(self, device):
        return self._check(self._api.cuDeviceGetAttribute(
            self._api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device))

    def processors(self):
        """Number of multiprocessors of the current device."""
        return self._processors(self.device())

    # -- memory ------------------------------------------------------------------------------------------------------

    def allocate(self, size):
        """The address of so many bytes."""
        self.device()
        return int(self._check(self._api.cuMemAlloc(size)))

    def free(self, pointer):
        """Give memory back; at the interpreter's end the driver may be gone already."""
        self._api.cuMemFree(pointer)

    def copy_to_host(self, host, pointer):
        """Fill a C-contiguous NumPy array, after everything before it on the default stream."""
        self.device()
        self._check(self._api.cuMemcpyDtoH(host.ctypes.data, pointer, host.nbytes))

    def copy_to_device(self, pointer, host):
        """Fill memory from a C-contiguous NumPy array."""
        self.device()
        self._check(self._api.cuMemcpyHtoD(pointer, host.ctypes.data, host.nbytes))

    def empty(self, shape, dtype):
        """A DeviceArray, not filled."""
        return DeviceArray(self, shape, dtype)

    def array(self, host):
        """A DeviceArray with the elements of a NumPy array."""
        host = np.ascontiguousarray(host)
        made = self.empty(host.shape, host.dtype)
        if host.nbytes:
            self.copy_to_device(made.pointer, host)
        return made

    # -- kernels -----------------------------------------------------------------------------------------------------

    def launch(self, kernel, grid, addresses, numbers, stream):
        """Start a Kernel on a stream; returns at once, allocates nothing once the kernel is loaded."""
        self.starter(kernel, self.device())(grid, addresses, numbers, stream)

    def starter(self, kernel, device):
        """What `launch` does for a Kernel on a device that is the current one, as a function of the rest."""
        found = self._functions.get((kernel, device))
        if found is None:
            found = self._functions[kernel, device] = self._load(kernel, device)
        return found.launch

    def _load(self, kernel, device):
        ptx, name = cache.ptx(kernel, self._capability(device))
        library = self._check(self._api.cuLibraryLoadData(ptx.encode() + b"\0", [], [], 0, [], [], 0))
        handle = self._check(self._api.cuLibraryGetKernel(library, name.encode()))
        attribute = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._check(self._api.cuKernelSetAttribute(attribute, kernel.shared, handle, device))
        return _Loaded(self, kernel, self._api.CUfunction(int(handle)), library)


class _Loaded:
    """A kernel on one device, and the block of memory its arguments are packed into."""

    def __init__(self, driver, kernel, function, library):
        self._driver, self._function, self._library = driver, function, library  # kept as long as this
        self._start, self._block = driver._api.cuLaunchKernel, (kernel.threads, 1, 1, kernel.shared)
        self._layout = struct.Struct(f"={kernel.addresses}q{kernel.numbers}i")
        self._buffer = ctypes.create_string_buffer(self._layout.size)
        start = ctypes.addressof(self._buffer)
        offsets = [8 * i for i in range(kernel.addresses)]
        offsets += [8 * kernel.addresses + 4 * i for i in range(kernel.numbers)]
        self._pointers = (ctypes.c_void_p * len(offsets))(*(start + offset for offset in offsets))
        self._arguments = ctypes.addressof(self._pointers)
        self._lock = threading.Lock()  # the driver copies the arguments before it returns

    def launch(self, grid, addresses, numbers, stream):
        """Pack and go."""
        with self._lock:
            self._layout.pack_into(self._buffer, 0, *addresses, *numbers)
            status, = self._start(self._function, *grid, *self._block, stream, self._arguments, 0)
        if status:
            self._driver._check((status,))


def _installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


_current = None


def driver():
    """The one Driver; see its errors."""
    global _current
    if _current is None:
        _current = Driver()
    return _current
