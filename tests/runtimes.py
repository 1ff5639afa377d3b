"""The runtimes that can run on this machine: what the tests of equality are run for.

One test, in test_runtimes.py, is skipped for all that cannot, and says why.
"""
import pytest

from quant.runtimes import RUNTIMES

HERE = [name for name, runtime in RUNTIMES.items() if runtime.available() is None]
NOT_HERE = {name: runtime.available() for name, runtime in RUNTIMES.items() if name not in HERE}

# The test gets the name of a kernel set, and each line of the report says which one.
each_runtime = pytest.mark.parametrize("name", HERE)
