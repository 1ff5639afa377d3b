"""For tests that look at what Numba compiles: under EDGEATTN_JIT=0 it is nothing where there is a library."""
import pytest

from edgeattn.runtime import prebuilt


def looks_at_compiling(test):
    """Mark a test: skipped where kernels come from a library, run by `pytest --compiled`."""
    skipped = pytest.mark.skipif(
        prebuilt.LIBRARY is not None, reason="kernels come from a library, and nothing is compiled: EDGEATTN_JIT=1")
    return pytest.mark.looks_at_compiling(skipped(test))
