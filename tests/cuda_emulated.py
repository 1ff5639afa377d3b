"""A driver for edgeattn.cuda whose GPU is the emulator: device memory is host memory, launches run in NumPy."""
import functools

import cuda_emulator
import numpy as np
import pytest

from edgeattn.cuda import driver as driver_module


class EmulatedDriver:
    """What edgeattn.cuda.driver.Driver does, without a GPU."""

    def __init__(self, processors=4):
        self.memory, self.launched, self.streams = {}, [], []
        self._processors = processors
        self.replaced = {}  # kernel name -> the function that stands in for it

    def name(self):
        return "an emulator"

    def capability(self):
        return (8, 7)

    def processors(self):
        return self._processors

    def allocate(self, size):
        whole = np.full(size + 256, 0xAB, np.uint8)
        start = -whole.ctypes.data % 256
        part = whole[start:start + size]
        self.memory[part.ctypes.data] = part
        return part.ctypes.data

    def free(self, pointer):
        self.memory.pop(pointer, None)

    def copy_to_host(self, host, pointer):
        host.reshape(-1).view(np.uint8)[:] = self.memory[pointer][:host.nbytes]

    def copy_to_device(self, pointer, host):
        self.memory[pointer][:host.nbytes] = host.reshape(-1).view(np.uint8)

    def device(self):
        return 0

    def starter(self, kernel, device):
        return functools.partial(self.launch, kernel)

    empty = driver_module.Driver.empty
    array = driver_module.Driver.array

    def launch(self, kernel, grid, addresses, numbers, stream):
        assert min(grid) > 0, "a GPU refuses an empty grid"
        memory = cuda_emulator.Memory()
        for array in self.memory.values():
            memory.lend(array, writable=True)
        self.launched.append(kernel.name)
        self.streams.append(stream)
        self.last = cuda_emulator.run(kernel, grid, addresses, numbers, memory)


emulated_only = pytest.mark.skipif("config.getoption('--cuda')", reason="looks into the emulator; leave out --cuda")
long_form = pytest.mark.skipif(
    "not (config.getoption('--long') or config.getoption('--cuda'))",
    reason="a shape or a comparison of the long form: make test-cuda-offline, or --long")
