"""What the CUDA tests share: a layer of the int8 oracle as the device takes it, and arrays on the (emulated) device."""
import types

import numpy as np
import oracle_kernels as oracle

from edgeattn.executors.cuda.ops import Group, SequencesOnDevice
from edgeattn.executors.cuda.static_ops import StaticOps
from edgeattn.kernels.cuda.arrays import view
from edgeattn.kernels.cuda.driver import driver
from edgeattn.kernels.cuda.static_layer import StaticLayer
from edgeattn.layers import attention


def on_device(array):
    """A DeviceArray of a NumPy array, or None."""
    return None if array is None else driver().array(array)


def seen(array):
    """The View of what `on_device` makes, which it keeps alive."""
    return None if array is None else view("array", on_device(array))


def static_layer(num_heads, linears, tensors, project_rule, score_rule, context_rule, table, softmax):
    """StaticLayer from what oracle_kernels.static_layer takes."""
    real = {}
    for name, (weight, scale, bias) in linears.items():
        source = "context" if name == "output" else f"{name}_input"
        real[name] = (weight, np.asarray(oracle.multipliers_fc(project_rule, tensors[source][0], scale,
                                                               tensors[name][0]), np.float64), bias)

    def matmul(rule, *names):
        return float(oracle.multiplier_bmm(rule, *(tensors[name][0] for name in names)))

    return StaticLayer(num_heads, real, matmul(score_rule, "query", "key", "scores"),
                       matmul(context_rule, "probabilities", "value", "context"),
                       {name: zero for name, (_, zero) in tensors.items()}, project_rule, score_rule, context_rule,
                       table, softmax)


def run_static(kernels, x, out, *, keep=None, band=None, lut_index=None, score_luts=None):
    """What StaticLayer gives for three inputs (B, T, E), Views, in `out`, a DeviceArray; `band` as the kernel's."""
    names = kernels.linears
    layer = types.SimpleNamespace(projections={name: name for name in names}, num_heads=kernels.heads,
                                  value_dim=names["value"].size)
    low, high = (-10**6, 10**6) if band is None else band
    masks = dict(left=0, right=high - low, offset=low, keep=keep)
    (B, L, _), S = x[0].shape, x[1].shape[1]
    ops = StaticOps(kernels, 0, out, score_luts=score_luts, lut_index=lut_index)
    ops.write(attention.forward(ops, layer, *x, SequencesOnDevice([Group(B, L, S, masks)])), view("out", out))


def layer_oracle(layer, x, **masks):
    """The integer oracle's answer for a StaticMultiHeadAttention that attends from the codes x to themselves."""
    made = layer.kernel_parameters()
    tensors = {name: (tensor.scale, tensor.zero_point) for name, tensor in layer.tensors.items()}
    tensors |= {f"{name}_input": tensors["query_input"] for name in ("key", "value")}
    linears = {name: (linear.weight, linear.scale, linear.bias) for name, linear in layer.linears.items()}
    rules = made["project_rule"], made["score_rule"], made["context_rule"]
    return oracle.static_layer(x, x, x, layer.num_heads, linears, tensors, rules, layer.kernel_set.softmax,
                               made["softmax_table"], score_luts=layer.score_luts, lut_index=layer.lut_index, **masks)
