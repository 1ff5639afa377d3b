"""Small kernels that apply one operation of edgeattn.cpu to whole arrays, for the tests."""
import numpy as np
from numba import njit

from edgeattn.arithmetic import batch_matmul_multiplier, fully_connected_multiplier
from edgeattn.cpu.layer_int8 import StaticLayer
from edgeattn.cpu.simd import LANES, load, store


@njit(error_model="numpy")
def apply_rule(rule, accumulators, parameters, out):
    """out = rule(accumulators), LANES at a time; parameters (2, LANES) flat."""
    for i in range(0, accumulators.size, LANES):
        store(out, i, rule(load(accumulators, i), parameters, 0, LANES))


def static_kernel(heads, linears, tensors, project_rule, score_rule, context_rule, table, fixed=False):
    """StaticLayer from scales: linears name -> (weight, scale, bias), tensors name -> (scale, zero point)."""
    source = {"query": "query_input", "key": "key_input", "value": "value_input", "output": "context"}
    multiplied = {
        name: (weight, fully_connected_multiplier(project_rule, tensors[source[name]][0], scale, tensors[name][0]), bias)
        for name, (weight, scale, bias) in linears.items()}

    def product(rule, *names):
        return batch_matmul_multiplier(rule, np.float32, *(tensors[name][0] for name in names))[0]

    return StaticLayer(heads, multiplied, product(score_rule, "query", "key", "scores"),
                       product(context_rule, "probabilities", "value", "context"),
                       {name: zero_point for name, (_, zero_point) in tensors.items()},
                       project_rule, score_rule, context_rule, table, fixed)
