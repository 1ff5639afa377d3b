"""The driver's calls without a GPU: memory is host memory, and what is queued on streams is only put in order.

Streams do not wait for the default one here, as those of PyTorch and CuPy do not. `before` tells what a launch comes
after. Whatever needs a context and has none is refused, as the driver refuses it.
"""
import collections
import ctypes
import itertools
import threading
import types

import numpy as np

NO_CONTEXT, BAD_VALUE, NOT_READY, NO_DEVICE, ISOLATED = 201, 1, 600, 101, 905
Launch = collections.namedtuple("Launch", "stream device before")


class Api:
    """What edgeattn.kernels.cuda.driver calls, for so many GPUs."""

    CUpointer_attribute = types.SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9)

    def __init__(self, devices=1):
        self.devices, self.memory, self.owners, self.calls = devices, {}, {}, []
        self.launches, self.capturing, self.passed, self.events = [], set(), set(), {}
        self._queued, self._numbers = collections.defaultdict(collections.Counter), itertools.count(1)
        self._contexts = threading.local()

    # -- contexts -----------------------------------------------------------------------------------------------------

    @property
    def stack(self):
        """This thread's contexts; a context is 1000 + its device."""
        if not hasattr(self._contexts, "stack"):
            self._contexts.stack = []
        return self._contexts.stack

    def cuGetErrorString(self, status):
        return 0, f"error {status}".encode()

    def cuCtxGetDevice(self):
        return (0, self.stack[-1] - 1000) if self.stack else (NO_CONTEXT, None)

    def cuCtxGetCurrent(self):
        return 0, self.stack[-1] if self.stack else 0

    def cuCtxSetCurrent(self, context):
        self.stack[-1:] = [context]
        return 0,

    def cuCtxPushCurrent(self, context):
        self.stack.append(context)
        return 0,

    def cuCtxPopCurrent(self):
        return 0, self.stack.pop()

    def cuDeviceGet(self, number):
        return (0, number) if number < self.devices else (NO_DEVICE, None)

    def cuDevicePrimaryCtxRetain(self, device):
        return 0, 1000 + device

    # -- memory -------------------------------------------------------------------------------------------------------

    def cuMemAlloc(self, size):
        if not self.stack:
            return NO_CONTEXT, None
        whole = np.full(size + 256, 0xAB, np.uint8)
        start = -whole.ctypes.data % 256
        part = whole[start:start + size]
        self.memory[part.ctypes.data], self.owners[part.ctypes.data] = part, self.stack[-1] - 1000
        return 0, part.ctypes.data

    def cuMemFree(self, pointer):
        if not self.stack:
            return NO_CONTEXT,
        self.memory.pop(pointer)
        return 0,

    def cuPointerGetAttribute(self, attribute, pointer):
        for begin, part in list(self.memory.items()):
            if begin <= pointer < begin + part.nbytes:
                return 0, self.owners[begin]
        return BAD_VALUE, None

    def cuMemcpyHtoD(self, pointer, host, size):
        self.calls.append("cuMemcpyHtoD")
        ctypes.memmove(pointer, host, size)
        return 0,

    def cuMemcpyDtoHAsync(self, host, pointer, size, stream):
        self.calls.append(("cuMemcpyDtoHAsync", stream))
        ctypes.memmove(host, pointer, size)
        return 0,

    # -- order --------------------------------------------------------------------------------------------------------

    def work(self, stream):
        """Queue something of somebody else's."""
        self._queued[stream][stream] += 1

    def before(self, stream):
        """How much of what was queued on each stream is done before what is queued on this one next."""
        return collections.Counter(self._queued[stream])

    def cuStreamSynchronize(self, stream):
        self.calls.append(("cuStreamSynchronize", stream))
        return 0,

    def cuStreamIsCapturing(self, stream):
        return 0, int(stream in self.capturing)

    def cuEventCreate(self, flags):
        event = next(self._numbers)
        self.events[event] = None
        return 0, event

    def cuEventRecord(self, event, stream):
        self.events[event] = stream, self.before(stream)
        return 0,

    def cuStreamWaitEvent(self, stream, event, flags):
        source, done = self.events[event]
        if (source in self.capturing) != (stream in self.capturing):
            return ISOLATED,
        self._queued[stream] |= done
        return 0,

    def cuEventQuery(self, event):
        return 0 if event in self.passed else NOT_READY,

    def cuEventDestroy(self, event):
        del self.events[event]
        return 0,

    def launched(self, stream):
        """A kernel is started on a stream of the current device."""
        self.launches.append(Launch(stream, self.stack[-1] - 1000, self.before(stream)))
        self.work(stream)
