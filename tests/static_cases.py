"""Feed-forwards of static int8 for tests of their kernel: python tests/static_cases.py PATH writes what it computes."""
import sys
from typing import NamedTuple

import numpy as np
import reference_int8_feed_forward as reference

from edgeattn.quantized import QuantizedLinear, StaticFeedForward, TensorQuantization

ROWS = 37  # more than threads share features for, and no multiple of a tile
FEW = 3  # fewer than a tile has
ARITHMETIC = ("litert", "litert-arm", "litert-builtin", "litert-reference", "tflite-runtime", "tflm")
RULES = {
    "litert": reference.Rules("float_rne", "float_rne", np.float32),
    "litert-arm": reference.Rules("float_rne", "float_rne", np.float32),
    "litert-builtin": reference.Rules("ruy", "double", np.float32),
    "litert-reference": reference.Rules("float64", "double", np.float32),
    "tflite-runtime": reference.Rules("ruy", "double", np.float32),
    "tflm": reference.Rules("double", "double", np.float64),
}


class Case(NamedTuple):
    """A layer, its input, and what stands around it."""

    layer: StaticFeedForward
    x: np.ndarray
    residual: np.ndarray
    norm: tuple
    norm_first: bool

    def kernel(self):
        """The compiled layer with what stands around it."""
        return self.layer.kernel(self.norm, norm_first=self.norm_first)

    def oracle(self):
        """What it should compute."""
        of = self.layer
        linears = {name: reference.Linear(of.linears[name].weight, of.linears[name].scale, of.linears[name].bias)
                   for name in of.linears}
        q = {name: (t.scale, t.zero_point) for name, t in of.tensors.items()}
        return reference.feed_forward(
            RULES[of.arithmetic], of.activation, self.x, self.residual, linears["linear1"], linears.get("gate"),
            linears["linear2"], q, of.more_inputs, of.more_outputs, self.norm, self.norm_first)


def make(seed, inputs, hidden, outputs, activation, *, gated=False, arithmetic="litert", norm="layer", norm_first=False,
         residual=True, bias=True, rows=ROWS, more_inputs=(), more_outputs=()):
    """A Case of random numbers, its ranges such that most codes are no ends of them."""
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def linear(n, depth, in_scale):
        codes = rng.integers(-127, 128, (n, depth)).astype(np.int8)
        scale = (rng.uniform(0.5, 1.5, n) / 70 / max(depth, 1) ** 0.5).astype(np.float32)
        biases = rng.normal(0, 0.4 / in_scale / scale).astype(np.int32) if bias else None
        return QuantizedLinear(codes, scale, biases)

    def tensor(low, high):
        return TensorQuantization.over(low * rng.uniform(0.8, 1.2), high * rng.uniform(0.8, 1.2))

    tensors = {"input": tensor(-2.5, 3), "linear1": tensor(-3, 3), "activation": tensor(-0.2, 3),
               "linear2": tensor(-2, 2.5)}
    if activation == "relu":
        tensors["activation"] = TensorQuantization.over(-0.1 if seed % 2 else 0, 2.5)  # codes below zero's are there
        if not gated:
            del tensors["linear1"]
    columns, scale = inputs + len(more_inputs), float(tensors["input"].scale)
    linears = {"linear1": linear(hidden, columns, scale), "linear2": linear(
        outputs + len(more_outputs), hidden, float(tensors["activation"].scale))}
    if gated:
        linears["gate"], tensors["gated"] = linear(hidden, columns, scale), tensor(-4, 4)
        if activation != "relu":
            tensors["gate"] = tensor(-3, 3)
    x = numbers(rows, inputs)
    for source in more_inputs:
        x[:, source % inputs] *= 4
    width = inputs if norm_first else outputs
    normed = None
    if norm:
        normed = (norm, numbers(width), numbers(width) if bias and norm == "layer" else None, 1e-5)
    made = StaticFeedForward(linears, tensors, activation=activation, arithmetic=arithmetic, more_inputs=more_inputs,
                             more_outputs=more_outputs)
    return Case(made, x, numbers(rows, outputs) if residual else None, normed, norm_first)


CASES = {f"{arithmetic} {activation}": make(1, 70, 45, 70, activation, arithmetic=arithmetic)
         for arithmetic in ARITHMETIC for activation in ("gelu",)}
CASES |= {f"gated, {arithmetic}": make(2, 33, 40, 33, "silu", gated=True, arithmetic=arithmetic, norm="rms",
                                       norm_first=True) for arithmetic in ("litert", "litert-builtin", "tflm")}
CASES |= {activation: make(3, 20, 30, 17, activation, norm=None) for activation in ("gelu_tanh", "silu", "relu")}
CASES |= {
    "gated relu": make(4, 32, 64, 32, "relu", gated=True),
    "alone": make(5, 1, 1, 1, "gelu", norm=None, residual=False, bias=False),
    "further columns": make(6, 30, 70, 31, "gelu", more_inputs=(3, 30, 31, 7), norm_first=True),
    "further outputs": make(7, 31, 33, 40, "gelu", more_outputs=((39, -128), (0, 127), (39, 127))),
    "both": make(8, 64, 128, 64, "gelu", more_inputs=(0, 63, 64), more_outputs=((5, -128),)),
}


def run(kernel, case, rows=slice(None)):
    """What a kernel gives, between numbers that stay."""
    x, residual = case.x[rows], None if case.residual is None else case.residual[rows]
    guarded = np.full((len(x) + 2, case.layer.outputs), 7, np.float32)
    kernel(x, residual, guarded[1:-1])
    assert (guarded[[0, -1]] == 7).all()
    return guarded[1:-1]


def main(path):
    from edgeattn.runtime.isa import ISA
    answers = {name: run(case.kernel(), case) for name, case in CASES.items()}
    few = {f"{name}, few": run(case.kernel(), case, slice(FEW)) for name, case in CASES.items()}
    np.savez(path, instruction_set=ISA.name, **answers, **few)


if __name__ == "__main__":
    main(sys.argv[1])
