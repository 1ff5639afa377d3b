"""Encoders exported as C: one list for the host tests and the microcontrollers. Their numbers are random."""

from dataclasses import dataclass

import numpy as np
from static_cases import make
from tflite_graphs import random_layer

from edgeattn.layers import LayerNorm, RMSNorm, TransformerEncoder, TransformerEncoderLayer
from edgeattn.quantized import AddMask, StaticFeedForward, StaticSelfAttention, TensorQuantization


@dataclass(frozen=True)
class ExportedEncoder:
    """An encoder, its longest sequence, and the mask given to the export."""

    name: str
    encoder: TransformerEncoder
    L: int
    mask: object = None

    @property
    def arguments(self) -> dict:
        return {"sequence_length": self.L, "mask": self.mask}


def norm(kind, E, rng):
    weight, bias = (rng.uniform(0.5, 1.5, E).astype(np.float32), rng.standard_normal(E).astype(np.float32))
    return {"layer": LayerNorm(weight, bias), "layer without bias": LayerNorm(weight), "rms": RMSNorm(weight),
            None: None}[kind]


def attention(seed, E, more_inputs=(), **sizes):
    rng = np.random.default_rng(seed)
    of = random_layer(rng, E=E + len(more_inputs), Eo=E, **sizes).with_arithmetic("tflm")
    return StaticSelfAttention(of, more_inputs=more_inputs)


def feed_forward(seed, E, hidden, activation="gelu", *, large=None, **options):
    of = make(seed, E, hidden, E, activation, arithmetic="tflm", norm=None, **options).layer
    if large is None:
        return of
    given = {"more_inputs": of.more_inputs, "more_outputs": of.more_outputs}
    return StaticFeedForward(of.linears, of.tensors, activation=activation, arithmetic="tflm", large=large, **given)


def case(name, seed=0, *, E=20, F=24, L=9, mask=None, layers=2, norms="layer", norm_first=False, last=None,
         window_size=(-1, -1), more=(), attend=None, feed=None):
    rng, made = np.random.default_rng(seed), []
    for i in range(layers):
        made.append(TransformerEncoderLayer(
            attention(seed + i, E, more, **(attend or {})),
            feed_forward(seed + i + 10, E, F, more_inputs=more, **(feed or {})),
            norm(norms, E, rng), norm(norms, E, rng), norm_first=norm_first, window_size=window_size))
    return ExportedEncoder(name, TransformerEncoder(made, norm=norm(last, E, rng)), L, mask)


def with_bias(L=7):
    """Scores that get a position bias, as `quant.quantize` writes it."""
    rng = np.random.default_rng(3)
    op = AddMask(rng.integers(-128, 128, (1, 2, L, L)).astype(np.int8), TensorQuantization(0.02, 3),
                 TensorQuantization(0.05, -1))
    return case("a position bias", L=L, attend={"score_ops": (op,)})


def twice():
    """A layer that stands there twice, between others."""
    of = case("", 5, layers=1).encoder.layers[0]
    other = case("", 7, layers=1, attend={"H": 5, "D": 3, "Dv": 4}).encoder.layers[0]
    return ExportedEncoder("a layer that stands there twice", TransformerEncoder([of, other, of]), 6, "causal")


def _keep(*shape):
    return np.random.default_rng(1).random(shape) < 0.6


CASES = [
    case("norm last"),
    case("norm first, and one at the end", norm_first=True, last="layer", E=64, F=40),
    case("causal", mask="causal", norm_first=True, last="rms", E=33, F=7),
    case("window", window_size=(2, 1), L=12, last="layer without bias", E=5, F=9),
    case("any mask", mask=_keep(2, 11, 11), L=11, norms="rms"),
    case("the first keys alone", mask=np.arange(10) < 6, L=10, layers=1, norms="layer without bias", E=32),
    case("one token", L=1, layers=1, E=1, F=1, last="layer", attend={"H": 1, "D": 1, "Dv": 1}),
    case("without norms", norms=None, layers=1),
    case("wide rows", E=150, F=6, L=3, layers=1, last="layer", norm_first=True),
    case("wider rows", E=273, F=5, L=2, layers=1, last="rms", attend={"D": 2}),
    case("gates", feed={"gated": True}, norms="rms", norm_first=True),
    case("gates, relu", feed={"gated": True, "activation": "relu"}, layers=1),
    case("relu", feed={"activation": "relu"}, layers=1, L=17),
    case("silu and gates", feed={"activation": "silu", "gated": True}, layers=1),
    case("gelu_tanh", feed={"activation": "gelu_tanh"}, layers=1),
    case("further columns and outputs", more=(3, 20, 7, 21), norm_first=True, L=5,
         feed={"more_outputs": ((5, -128), (0, 127), (5, 127))}),
    case("a network of large features", L=6, feed={"large": feed_forward(4, 20, 6, "gelu_tanh", more_inputs=(2,)),
                                                   "more_outputs": ((3, -128),)}, more=(1,)),
    case("no output projection", layers=1, attend={"projected": False, "H": 2, "D": 3, "Dv": 10}),
    with_bias(),
    twice(),
]
assert len({each.name for each in CASES}) == len(CASES)
