"""The one list of attention cases: correctness tests run all of them, benchmarks choose by name."""

import dataclasses
import zlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention. Hkv and Dv follow H and D unless given."""

    name: str
    B: int = 1
    H: int = 2
    L: int = 5
    S: int = 5
    D: int = 8
    Hkv: int | None = None
    Dv: int | None = None
    is_causal: bool = False
    causal_alignment: str | None = None
    window_size: tuple = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    bool_mask: tuple | None = None  # shape, broadcastable to (B, H, L, S)
    float_mask: tuple | None = None
    padding: bool = False
    kv_lengths: bool = False

    @property
    def kv_heads(self):
        return self.H if self.Hkv is None else self.Hkv

    @property
    def value_dim(self):
        return self.D if self.Dv is None else self.Dv

    def random(self):
        """The case's own random numbers, the same in every run."""
        return np.random.default_rng(zlib.crc32(self.name.encode()))

    def qkv(self):
        """query (B, H, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv), float32."""
        random = self.random()
        return tuple(
            random.standard_normal(shape, np.float32)
            for shape in (
                (self.B, self.H, self.L, self.D),
                (self.B, self.kv_heads, self.S, self.D),
                (self.B, self.kv_heads, self.S, self.value_dim),
            )
        )

    def masks(self):
        """dict with keep, bias, padding, lengths: arrays, or None where the case has none."""
        random = np.random.default_rng(zlib.crc32(self.name.encode()) + 1)
        keep = bias = padding = lengths = None
        if self.bool_mask is not None:
            keep = random.random(self.bool_mask) < 0.6
        if self.float_mask is not None:
            bias = random.standard_normal(self.float_mask, np.float32) * 3
            bias[random.random(self.float_mask) < 0.3] = -np.inf
        if self.padding:
            padding = np.arange(self.S) < random.integers(0, self.S + 1, self.B)[:, None]
        if self.kv_lengths:
            lengths = random.integers(0, self.S + 1, self.B)
        return {"keep": keep, "bias": bias, "padding": padding, "lengths": lengths}


# One below, at and one above the widths that kernels work in, and odd lengths.
_LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 100)

CASES = [
    *(Case(f"length-{n}", H=1, L=n, S=n) for n in _LENGTHS),
    *(Case(f"causal-{n}", L=n, S=n, is_causal=True) for n in (1, 3, 4, 5, 16, 17, 64, 65)),
    *(Case(f"size-{n}", L=6, S=7, D=n, Dv=n) for n in (1, 3, 4, 5, 7, 9, 15, 16, 17, 32, 63, 64, 65, 128)),
    *(Case(f"value-size-{n}", D=8, Dv=n) for n in (1, 3, 15, 16, 17, 33)),
    *(Case(f"one-query-{n}", B=2, L=1, S=n) for n in (1, 2, 15, 16, 17, 64, 65, 257)),
    *(Case(f"one-key-{n}", L=n, S=1) for n in (2, 17)),
    *(Case(f"cross-{L}-{S}", B=2, H=3, L=L, S=S, D=5, Dv=7) for L, S in ((3, 8), (8, 3), (17, 33), (64, 15))),
    *(Case(f"grouped-{H}-{Hkv}", B=2, H=H, Hkv=Hkv, L=5, S=9) for H, Hkv in ((4, 1), (4, 2), (6, 3))),
    Case("grouped-one-query", B=2, H=8, Hkv=2, L=1, S=33, D=16),
    Case("one-token", B=2, H=4, L=1, S=1, D=32),
    Case("batch", B=3, H=4, L=9, S=9, D=16),
    Case("empty-batch", B=0),
    Case("empty-heads", H=0),
    Case("empty-queries", L=0),
    Case("empty-keys", S=0),
    Case("empty-keys-causal", S=0, is_causal=True, causal_alignment="lower_right"),
    Case("empty-size", D=0, Dv=4),
    Case("empty-value-size", Dv=0),
    Case("causal-upper-short", L=7, S=4, is_causal=True, causal_alignment="upper_left"),
    Case("causal-upper-long", L=4, S=7, is_causal=True, causal_alignment="upper_left"),
    Case("causal-lower-short", L=7, S=4, is_causal=True, causal_alignment="lower_right"),
    Case("causal-lower-long", L=4, S=17, is_causal=True, causal_alignment="lower_right"),
    Case("causal-decode", B=2, L=1, S=65, is_causal=True, causal_alignment="lower_right"),
    Case("causal-grouped", B=2, H=4, Hkv=2, L=16, S=16, is_causal=True),
    Case("window-both", L=17, S=17, window_size=(3, 2)),
    Case("window-left", L=17, S=17, window_size=(4, -1)),
    Case("window-right", L=17, S=17, window_size=(-1, 2)),
    Case("window-self", L=9, S=9, window_size=(0, 0)),
    Case("window-causal", L=33, S=33, window_size=(7, -1), is_causal=True),
    Case("window-lower", L=5, S=17, window_size=(3, 0), causal_alignment="lower_right"),
    Case("window-upper", L=17, S=5, window_size=(3, 1), causal_alignment="upper_left"),
    Case("softcap", L=9, S=9, softcap=1.5),
    Case("softcap-mask", L=9, S=9, softcap=2.0, float_mask=(9, 9)),
    Case("scale", scale=0.7),
    Case("scale-zero", scale=0.0),
    Case("scale-negative", scale=-0.5),
    # many rows: the largest error of few is an accident of the order in which some library sums
    Case("scale-large", B=16, L=16, S=64, D=32, scale=8.0),
    Case("bool-full", B=2, H=3, L=5, S=9, bool_mask=(2, 3, 5, 9)),
    Case("bool-two-axes", B=2, H=3, L=5, S=9, bool_mask=(5, 9)),
    Case("bool-keys", B=2, L=5, S=9, bool_mask=(9,)),
    Case("bool-queries", B=2, L=9, S=5, bool_mask=(9, 1)),
    Case("bool-heads", B=2, H=3, L=4, S=5, bool_mask=(3, 1, 5)),
    Case("bool-batch", B=3, L=4, S=5, bool_mask=(3, 1, 1, 5)),
    Case("bool-scalar", B=2, bool_mask=()),
    Case("float-full", B=2, H=3, L=5, S=9, float_mask=(2, 3, 5, 9)),
    Case("float-heads", B=2, H=3, L=5, S=9, float_mask=(3, 5, 9)),
    Case("float-keys", L=17, S=33, float_mask=(1, 33)),
    Case("float-causal", L=16, S=16, float_mask=(16, 16), is_causal=True),
    Case("padding", B=4, L=9, S=9, padding=True),
    Case("padding-mask", B=3, L=4, S=7, padding=True, bool_mask=(4, 7)),
    Case("padding-float", B=3, L=4, S=7, padding=True, float_mask=(4, 7)),
    Case("padding-causal", B=3, L=9, S=9, padding=True, is_causal=True),
    Case("lengths", B=5, L=4, S=17, kv_lengths=True),
    Case("lengths-upper", B=4, L=9, S=9, kv_lengths=True, is_causal=True, causal_alignment="upper_left"),
    Case("lengths-lower", B=4, L=5, S=17, kv_lengths=True, is_causal=True, causal_alignment="lower_right"),
    Case(
        "lengths-window-lower",
        B=4,
        L=3,
        S=33,
        kv_lengths=True,
        window_size=(5, 0),
        causal_alignment="lower_right",
    ),
    Case(
        "everything",
        B=3,
        H=4,
        Hkv=2,
        L=17,
        S=33,
        D=16,
        Dv=8,
        is_causal=True,
        causal_alignment="lower_right",
        window_size=(20, -1),
        softcap=3.0,
        scale=0.4,
        bool_mask=(3, 1, 17, 33),
        kv_lengths=True,
    ),
    Case("long", H=1, L=4, S=1025, D=64),
    Case("digits", B=2, H=4, L=16, S=16, D=8),
    Case("minilm", H=12, L=24, S=24, D=32, padding=True),
]
assert len({case.name for case in CASES}) == len(CASES)
