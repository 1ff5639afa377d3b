"""The only file that speaks to the GPU's driver: memory, order, loading, launching. All above it runs without one.

A stream is the driver's handle, an int; 0 is the legacy default stream. A device is the driver's number of a GPU.
"""
import contextlib
import ctypes
import functools
import importlib.util
import math
import struct
import threading

import numpy as np

from edgeattn.kernels.cuda import cache
from edgeattn.kernels.cuda.arrays import c_strides
from edgeattn.kernels.cuda.ptx import for_driver

LOWEST = (8, 0)  # compute capability with the tensor cores' int8 and cp.async
_INSTALL = "pip install 'edgeattn[cuda]'"
_LEGACY = 1  # the default stream's name in __cuda_array_interface__ and DLPack, where 0 is none
_NO_TIMING, _CAPTURING, _NOT_READY = 2, 1, 600  # CU_EVENT_DISABLE_TIMING, ..._CAPTURE_STATUS_ACTIVE, CUDA_ERROR_...


class DeviceArray:
    """Memory of ours on the current device.

    Parameters
    ----------
    owner : Driver
    shape : tuple of int
    dtype : numpy dtype
    stream : int
        On which it is written: what reads it elsewhere has to wait for that.

    Attributes
    ----------
    device : int
    layout : tuple
        All that decides how it is read, but the address.
    """

    def __init__(self, owner, shape, dtype, stream=0):
        self._owner, self.shape, self.dtype, self.stream = owner, tuple(shape), np.dtype(dtype), stream
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self.device, self._context = owner.device(), owner.context()
        self.pointer = owner.allocate(max(self.nbytes, 1))
        self.layout = self.shape, self.dtype, self.device, self.pointer % 16

    def __del__(self):
        if getattr(self, "pointer", 0):
            self._owner.free(self.pointer, self._context)

    @property
    def __cuda_array_interface__(self):
        return {"data": (self.pointer, False), "shape": self.shape, "strides": None, "typestr": self.dtype.str,
                "version": 3, "stream": self.stream or _LEGACY}

    @property
    def strides(self):
        """In bytes."""
        return c_strides(self.shape, self.dtype)

    def numpy(self):
        """A copy in host memory, after everything before it on the array's stream."""
        host = np.empty(self.shape, self.dtype)
        if host.nbytes:
            with self._owner.on(self.device):
                self._owner.copy_to_host(host, self.pointer, self.stream)
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

        self.api = api
        try:
            self.check(api.cuInit(0))
            count = self.check(api.cuDeviceGetCount())
        except Exception as error:  # noqa: BLE001 - the loader's own errors differ by version
            raise RuntimeError("CUDA needs an NVIDIA driver, and none answers: "
                               f"{str(error).splitlines()[0].rstrip('.')}") from None
        if not count:
            raise RuntimeError("CUDA needs an NVIDIA GPU; the driver sees none")
        self._begin(api)
        self.device()
        if self.capability() < LOWEST:
            raise RuntimeError(f"CUDA needs a GPU of compute capability {LOWEST[0]}.{LOWEST[1]} or above (Jetson Orin, "
                               f"A100 and later); {self.name()} has {'.'.join(map(str, self.capability()))}")

    def _begin(self, api):
        self.api, self._functions = api, {}
        self._kept, self._kept_lock = [], threading.Lock()

    def check(self, answer):
        """The value of a driver call, without its status."""
        status, *values = answer
        if int(status):
            _, text = self.api.cuGetErrorString(status)
            raise RuntimeError(f"the CUDA driver says {(text or b'?').decode()} ({status})")
        return values[0] if len(values) == 1 else values

    def device(self):
        """The device of the current context; without one, the first device's primary context becomes current."""
        status, device = self.api.cuCtxGetDevice()
        if status:  # there is no context
            self.check(self.api.cuCtxSetCurrent(self._primary(0)))
            device = self.check(self.api.cuCtxGetDevice())
        return int(device)

    def context(self):
        """The current context."""
        return self.check(self.api.cuCtxGetCurrent())

    @functools.lru_cache  # noqa: B019 - there is one Driver, as long as the process
    def _primary(self, device):
        return self.check(self.api.cuDevicePrimaryCtxRetain(self.check(self.api.cuDeviceGet(device))))

    @contextlib.contextmanager
    def on(self, device):
        """Within a `with` block, make a device the current one."""
        if self.device() == device:
            yield
            return
        with self._within(self._primary(device)):
            yield

    @contextlib.contextmanager
    def _within(self, context):
        self.check(self.api.cuCtxPushCurrent(context))
        try:
            yield
        finally:
            self.check(self.api.cuCtxPopCurrent())

    def device_of(self, pointer):
        """The device that an address lies on, None where the driver does not know."""
        status, device = self.api.cuPointerGetAttribute(
            self.api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, pointer)
        return None if status else int(device)

    def version(self):
        """The CUDA release that the driver is of: 1000 major + 10 minor."""
        return int(self.check(self.api.cuDriverGetVersion()))

    def name(self):
        """The GPU's name."""
        return self.check(self.api.cuDeviceGetName(128, self.device())).split(b"\0")[0].decode()

    @functools.lru_cache  # noqa: B019
    def _capability(self, device):
        attribute = self.api.CUdevice_attribute
        return tuple(self.check(self.api.cuDeviceGetAttribute(getattr(
            attribute, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}"), device)) for part in ("MAJOR", "MINOR"))

    def capability(self):
        """(major, minor) of the current device."""
        return self._capability(self.device())

    @functools.lru_cache  # noqa: B019
    def _processors(self, device):
        return self.check(self.api.cuDeviceGetAttribute(
            self.api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device))

    def processors(self):
        """Number of multiprocessors of the current device."""
        return self._processors(self.device())

    # -- memory ------------------------------------------------------------------------------------------------------

    def allocate(self, size):
        """The address of so many bytes on the current device."""
        return int(self.check(self.api.cuMemAlloc(size)))

    def free(self, pointer, context):
        """Give memory back, from whatever thread; at the interpreter's end the driver may be gone already."""
        if int(self.api.cuCtxGetCurrent()[1] or 0) == int(context):
            self.api.cuMemFree(pointer)
            return
        with contextlib.suppress(RuntimeError), self._within(context):
            self.api.cuMemFree(pointer)

    def copy_to_host(self, host, pointer, stream=0):
        """Fill a C-contiguous NumPy array, after everything before it on a stream."""
        self.check(self.api.cuMemcpyDtoHAsync(host.ctypes.data, pointer, host.nbytes, stream))
        self.check(self.api.cuStreamSynchronize(stream))

    def copy_to_device(self, pointer, host):
        """Fill memory from a C-contiguous NumPy array; when this returns it is there for every stream.

        The driver's copy returns while the last of pageable memory is under way, and streams that do not wait for the
        default one would read what is not there yet.
        """
        self.check(self.api.cuMemcpyHtoD(pointer, host.ctypes.data, host.nbytes))
        self.check(self.api.cuStreamSynchronize(0))

    def empty(self, shape, dtype, stream=0):
        """A DeviceArray on the current device, not filled."""
        return DeviceArray(self, shape, dtype, stream)

    def array(self, host):
        """A DeviceArray with the elements of a NumPy array."""
        host = np.ascontiguousarray(host)
        made = self.empty(host.shape, host.dtype)
        if host.nbytes:
            self.copy_to_device(made.pointer, host)
        return made

    # -- order -------------------------------------------------------------------------------------------------------

    def _capturing(self, stream):
        status, found = self.api.cuStreamIsCapturing(stream)
        return not status and int(found) == _CAPTURING

    def order(self, before, after):
        """Let what is queued on the stream `after` from now on wait for what is queued on `before` by now.

        Not where a graph is captured from one alone: it cannot hold what is outside. Whoever captures waits first.
        """
        if self._capturing(after) != self._capturing(before):
            return
        event = self.check(self.api.cuEventCreate(_NO_TIMING))
        try:
            self.check(self.api.cuEventRecord(event, before))
            self.check(self.api.cuStreamWaitEvent(after, event, 0))
        finally:
            self.api.cuEventDestroy(event)  # once it has passed, the driver says

    def keep(self, owners, stream):
        """Hold objects until what is queued on a stream by now has passed; a later call of this finds that it has.

        Whoever captures a graph keeps what it reads.
        """
        if self._capturing(stream):
            return
        event = self.check(self.api.cuEventCreate(_NO_TIMING))
        self.check(self.api.cuEventRecord(event, stream))
        gone = []  # dropped without the lock: what an owner does then is not known
        with self._kept_lock:
            held = [(event, owners)]
            for one in self._kept:
                waiting = int(self.api.cuEventQuery(one[0])[0]) == _NOT_READY
                (held if waiting else gone).append(one)
            self._kept = held  # last: a signal's exception before this drops nothing
        for passed, _ in gone:
            self.api.cuEventDestroy(passed)

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
        text, name = cache.ptx(kernel, self._capability(device))
        text = for_driver(text, self.version())
        library = self.check(self.api.cuLibraryLoadData(text.encode() + b"\0", [], [], 0, [], [], 0))
        handle = self.check(self.api.cuLibraryGetKernel(library, name.encode()))
        attribute = self.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.check(self.api.cuKernelSetAttribute(attribute, kernel.shared, handle, device))
        return _Loaded(self, kernel, self.api.CUfunction(int(handle)), library)


class _Loaded:
    """A kernel on one device, and the block of memory its arguments are packed into."""

    def __init__(self, driver, kernel, function, library):
        self._driver, self._function, self._library = driver, function, library  # kept as long as this
        self._start, self._block = driver.api.cuLaunchKernel, (kernel.threads, 1, 1, kernel.shared)
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
            self._driver.check((status,))


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
