"""Layers exported as C: one list for the host tests, the emulated Linux targets and the microcontrollers."""

from dataclasses import dataclass

import numpy as np
from tflite_graphs import converted_score_ops, random_layer, random_scaling

from edgeattn.quantized import Requantize, SelectMask, StaticMultiHeadAttention, TensorQuantization


@dataclass(frozen=True)
class Exported:
    """A layer, its lengths, and the mask given to the export."""

    name: str
    layer: StaticMultiHeadAttention
    B: int
    L: int
    S: int | None
    mask: object = None

    @property
    def arguments(self) -> dict:
        return {"batch": self.B, "sequence_length": self.L, "key_length": self.S, "mask": self.mask}

    def input_shapes(self) -> list[tuple[int, int, int]]:
        widths = (self.layer.embed_dim, self.layer.kdim, self.layer.vdim)
        keys = self.L if self.S is None else self.S
        return [(self.B, self.L if source == 0 else keys, widths[source]) for source in sorted(set(self.layer.sources))]

    def inputs(self, seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.integers(-128, 128, shape).astype(np.int8) for shape in self.input_shapes()]

    def masked_layer(self) -> StaticMultiHeadAttention:
        """The layer that carries the export's mask."""
        if self.mask is None:
            return self.layer
        mask = np.tri(self.L, dtype=bool) if isinstance(self.mask, str) else self.mask
        return self.layer.with_mask(mask)


def _case(name, seed=0, *, B=1, L=9, S=None, mask=None, ops=None, scaled=(), **sizes) -> Exported:
    rng = np.random.default_rng(seed)
    if ops == "converted":
        sizes["score_ops"] = converted_score_ops(rng, L, L if S is None else S, sizes.get("D", 4))
    elif ops is not None:
        sizes["score_ops"] = ops
    layer = random_layer(rng, **sizes).with_arithmetic("tflm")
    return Exported(name, layer._replace(**{f"{part}_ops": (random_scaling(rng, layer.tensors[part]),) for part in scaled}),
                    B, L, S, mask)


def _keep(*shape, seed=1, p=0.6):
    return np.random.default_rng(seed).random(shape) < p


def _prefix(S, *lengths):
    return np.arange(S) < np.array(lengths)[:, None, None, None]


CASES = [
    *(_case(f"length {L}", L, L=L) for L in (1, 2, 3, 4, 5, 8, 16, 17, 33, 40)),
    *(_case(f"causal {L}", L, L=L, mask="causal") for L in (1, 2, 7, 16, 33)),
    *(_case(f"head width {D}, value width {Dv}", D, D=D, Dv=Dv) for D, Dv in ((1, 1), (3, 5), (5, 3), (16, 7), (33, 8))),
    *(_case(f"model width {E}", E, E=E, B=2) for E in (1, 2, 5, 31, 64)),
    _case("one head", H=1, D=8, Dv=8),
    _case("five heads", H=5, D=3, E=15),
    _case("batch", B=3, mask="causal"),
    _case("keys and values without zero points", zero_points=False, B=2),
    _case("no output projection", projected=False, B=2, Dv=3),
    _case("no bias", bias=False),
    _case("neither bias nor output projection", bias=False, projected=False, H=1),
    _case("value is key", sources=(0, 1, 1), S=5),
    _case("three inputs", sources=(0, 1, 2), S=13, B=2),
    _case("three inputs, one query", sources=(0, 1, 2), L=1, S=40),
    _case("length mask", L=12, mask=np.arange(12) < 7),
    _case("length mask per batch", L=8, B=3, mask=_prefix(8, 3, 8, 1)),
    _case("no permitted key", L=8, mask=np.zeros((8, 8), bool)),
    _case("some queries without a key", L=9, mask=np.tri(9, k=-2, dtype=bool)),
    _case("mask that permits everything", mask=np.ones((1, 9), bool)),
    _case("causal, more queries than keys", sources=(0, 1, 1), L=9, S=4, mask=np.tri(9, 4, dtype=bool)),
    _case("causal, aligned to the last key", sources=(0, 1, 1), L=4, S=9, mask=np.tri(4, 9, k=5, dtype=bool)),
    _case("any mask", B=2, L=11, mask=_keep(2, 2, 11, 11)),
    _case("any mask per head", L=17, mask=_keep(2, 1, 17)),
    _case("any mask per query", L=9, mask=_keep(9, 9)),
    _case("whole queries masked", L=9, mask=_keep(9, 1)),
    _case("two masks", L=9, mask="causal", ops=(SelectMask(_keep(9)),)),
    _case("two masks of different fills", L=9, mask="causal", ops=(SelectMask(_keep(9), -100),)),
    _case("fill that is not the lowest code", L=9, ops=(SelectMask(np.tri(9, dtype=bool), -90),)),
    _case("scores made to fit a mask", L=9, ops=(Requantize(TensorQuantization(0.11, 7)), SelectMask(np.tri(9, dtype=bool)))),
    _case("converted by TensorFlow: MUL and ADD", L=6, ops="converted"),
    _case("converted by TensorFlow, and a mask", L=7, B=2, mask=_prefix(7, 5, 2), ops="converted"),
    _case("MUL of queries", L=7, B=2, scaled=("query",)),
    _case("MUL of keys", L=6, scaled=("key",), D=5),
    _case("MUL of queries, keys and scores", L=9, S=13, sources=(0, 1, 2), scaled=("query", "key"), ops="converted"),
    _case("converted by TensorFlow: MUL alone", L=7, ops=converted_score_ops(np.random.default_rng(0), 7, 7)[:1]),
]
assert len({case.name for case in CASES}) == len(CASES)


def random_case(seed: int) -> Exported:
    """A layer of random sizes, lengths and mask."""
    rng = np.random.default_rng(seed)
    sources = [(0, 0, 0), (0, 0, 0), (0, 1, 1), (0, 1, 2)][rng.integers(4)]
    L = int(rng.integers(1, 41))
    S = None if sources == (0, 0, 0) else int(rng.integers(1, 41))
    B, keys = int(rng.integers(1, 4)), L if S is None else S
    H = int(rng.integers(1, 5))
    sizes = {"H": H, "D": int(rng.integers(1, 20)), "Dv": int(rng.integers(1, 20)), "E": int(rng.integers(1, 50)),
             "sources": sources, "projected": bool(rng.integers(2)), "bias": bool(rng.integers(2)),
             "zero_points": bool(rng.integers(2))}
    masks = [None, np.tri(L, keys, dtype=bool), np.arange(keys) < rng.integers(0, keys + 1), rng.random((L, keys)) < 0.5,
             rng.random((B, H, L, keys)) < 0.5]
    ops = "converted" if rng.integers(5) == 0 else None
    return _case(f"random {seed}", seed, B=B, L=L, S=S, mask=masks[rng.integers(5)], ops=ops, **sizes)
