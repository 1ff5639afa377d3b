"""Feed-forwards and linear layers of encoder blocks for tests, and what they give: EDGEATTN_ISA=NAME python tests/encoder_cases.py FILE.npz

A program too because the instruction set is chosen at import.
"""
import sys
from typing import NamedTuple

import numpy as np
from reference_encoder_int8 import Weight

from edgeattn.kernels.cpu import encoder_dynamic, encoder_float32

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
ROWS = 37  # more than threads share features for, and no multiple of a tile


class Case(NamedTuple):
    """A linear layer (w2 is None) or a feed-forward, and a call of it; a gate is (weight, bias)."""

    x: np.ndarray
    residual: np.ndarray
    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    activation: str
    gate: tuple
    norm: tuple
    norm_first: bool
    columns: tuple = ((), ())  # of x and of the hidden features: what dynamic int8 keeps apart
    split: float = None

    def kernel(self, kind=encoder_float32):
        """The compiled layer; of dynamic int8 with `kind` encoder_dynamic."""
        options = {"activation": self.activation, "norm": self.norm}
        w1, w2, gate = self.w1, self.w2, self.gate
        if kind is encoder_dynamic:
            w1, w2, gate = self.quantized()
        if self.w2 is None:
            return kind.Linear(w1, self.b1, **options)
        return kind.FeedForward(w1, self.b1, w2, self.b2, gate=gate, norm_first=self.norm_first, **options)

    def quantized(self):
        """w1, w2 and gate as encoder_dynamic takes them."""
        quantize = encoder_dynamic.quantize_linear
        if self.w2 is None:
            return quantize(self.w1, columns=self.columns[0], split=self.split), None, None
        gate = None if self.gate is None else (quantize(self.gate[0], columns=self.columns[0]), self.gate[1])
        return (quantize(self.w1, columns=self.columns[0]),
                quantize(self.w2, columns=self.columns[1], split=self.split), gate)

    def weights(self):
        """w1, w2 and gate as the oracle takes them."""
        w1, w2, gate = self.quantized()
        return (Weight(*w1), None if w2 is None else Weight(*w2),
                None if gate is None else (Weight(*gate[0]), gate[1]))


def numbers(rng, *shape, factor=1.0):
    return (rng.standard_normal(shape) * factor).astype(np.float32)


def make(seed, inputs, hidden, outputs, activation, *, gated=False, norm="layer", norm_first=False, residual=True,
         bias=True, rows=ROWS, **others):
    """A Case of random numbers; hidden 0 for a linear layer; some channels of x and of weights are large."""
    rng = np.random.default_rng(seed)
    x, added = numbers(rng, rows, inputs), numbers(rng, rows, outputs) if residual else None
    x[:, inputs // 3] *= 20

    def linear(n, depth):
        weight = numbers(rng, n, depth, factor=depth**-0.5)
        weight[n // 2] *= 12
        return weight, numbers(rng, n) if bias else None

    w1, b1 = linear(hidden or outputs, inputs)
    w2, b2 = linear(outputs, hidden) if hidden else (None, None)
    gate = linear(hidden, inputs) if gated else None
    width = inputs if norm_first else outputs
    normed = None
    if norm:
        normed = (norm, numbers(rng, width), numbers(rng, width) if bias and norm == "layer" else None, 1e-5)
    return Case(x, added, w1, b1, w2, b2, activation, gate, normed, norm_first, **others)


CASES = {
    f"linear {activation}": make(1, 70, 0, 45, activation, columns=((23, 60), ()), split=4)
    for activation in ACTIVATIONS
}
CASES |= {f"feed-forward {activation}": make(2, 70, 300, 70, activation) for activation in ACTIVATIONS[1:]}
CASES |= {f"gated {activation}": make(3, 64, 272, 64, activation, gated=True, norm="rms", norm_first=True)
          for activation in ACTIVATIONS[1:]}
CASES |= {
    "linear alone": make(4, 33, 0, 1, None, norm=None, residual=False, bias=False),
    "linear, one input": make(5, 1, 0, 7, "relu", norm="rms"),
    "feed-forward alone": make(6, 40, 5, 33, "gelu", norm=None, residual=False, bias=False),
    "feed-forward, apart": make(7, 70, 600, 70, "gelu", columns=((23,), (5, 299, 300, 599)), split=4),
    "gated, apart": make(8, 96, 520, 96, "silu", gated=True, norm_first=True, columns=((32, 33), (255, 256)), split=2),
    "feed-forward of a block": make(9, 128, 512, 128, "gelu", columns=((42,), (0, 511)), split=4),
}


def run(kernel, case, rows=slice(None)):
    """What a kernel gives, between numbers that stay."""
    x, residual = case.x[rows], None if case.residual is None else case.residual[rows]
    outputs = len(case.w1 if case.w2 is None else case.w2)
    guarded = np.full((len(x) + 2, outputs), 7, np.float32)
    kernel(x, residual, guarded[1:-1])
    assert (guarded[[0, -1]] == 7).all()
    return guarded[1:-1]


def main(path):
    from edgeattn.runtime.isa import ISA
    answers = {name: run(case.kernel(encoder_dynamic), case) for name, case in CASES.items()}
    np.savez(path, instruction_set=ISA.name, **answers)


if __name__ == "__main__":
    main(sys.argv[1])
