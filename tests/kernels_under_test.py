"""Small kernels that apply one operation of edgeattn.cpu to whole arrays, for the tests."""
from numba import njit

from edgeattn.cpu.simd import LANES, load, store


@njit(error_model="numpy")
def apply_rule(rule, accumulators, parameters, out):
    """out = rule(accumulators), LANES at a time; parameters (2, LANES) flat."""
    for i in range(0, accumulators.size, LANES):
        store(out, i, rule(load(accumulators, i), parameters, 0, LANES))
