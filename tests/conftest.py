"""Options of the test suite."""

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--layers", type=int, default=200, metavar="N",
        help="how many random layers tests/test_parity.py compares in each runtime (default: %(default)s); "
             "three in ten more in the form of other converters")
    parser.addoption("--cuda", action="store_true", help="run tests/test_cuda_*.py on the GPU, not in the emulator")
    parser.addoption(
        "--long", action="store_true",
        help="the long form of tests/test_cuda_*.py: every shape, and the CPU's kernels beside")


@pytest.fixture
def device(request, monkeypatch):
    """The driver that the CUDA tests run on: the emulator, or with `--cuda` the GPU."""
    from cuda_emulated import EmulatedDriver

    from edgeattn.cuda import driver as driver_module

    found = driver_module.Driver() if request.config.getoption("--cuda") else EmulatedDriver()
    monkeypatch.setattr(driver_module, "_current", found)
    return found
