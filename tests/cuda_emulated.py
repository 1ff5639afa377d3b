"""A driver for edgeattn.kernels.cuda whose GPU is the emulator: device memory is host memory, launches run in NumPy."""
import functools

import cuda_emulator
import pytest
from cuda_stub import Api

from edgeattn.kernels.cuda.driver import Driver


class EmulatedDriver(Driver):
    """edgeattn.kernels.cuda.driver.Driver on a stub of the driver's calls; kernels run in the emulator."""

    def __init__(self, processors=4, devices=1):
        self._begin(Api(devices))
        self.launched, self.streams = [], []
        self._processors = processors
        self.device()

    memory = property(lambda self: self.api.memory)

    def name(self):
        return "an emulator"

    def capability(self):
        return (8, 7)

    def processors(self):
        return self._processors

    def starter(self, kernel, device):
        assert device == self.device(), "a kernel is loaded for another GPU than the current one"
        return functools.partial(self._emulate, kernel)

    def _emulate(self, kernel, grid, addresses, numbers, stream):
        assert min(grid) > 0, "a GPU refuses an empty grid"
        memory = cuda_emulator.Memory()
        for address, array in self.memory.copy().items():
            if self.api.owners[address] == self.device():
                memory.lend(array, writable=True)
        self.api.launched(stream)
        self.launched.append(kernel.name)
        self.streams.append(stream)
        self.last = cuda_emulator.run(kernel, grid, addresses, numbers, memory)


emulated_only = pytest.mark.skipif("config.getoption('--cuda')", reason="looks into the emulator; leave out --cuda")
long_form = pytest.mark.skipif(
    "not (config.getoption('--long') or config.getoption('--cuda'))",
    reason="a shape or a comparison of the long form: make test-cuda-offline, or --long")
