"""Attention on given queries, keys and values, and what masks and long rows cost."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

import edgeattn
from benchmarks.contenders import Contender
from benchmarks.peers import torch_with

LENGTHS = (64, 128, 256, 512, 1024)
LONG_LENGTHS = (1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Shape:
    """H heads, L queries and as many keys of size D; B = 1."""

    H: int
    L: int
    D: int = 64

    def __str__(self):
        return f"{self.H}/{self.L}/{self.D}"

    @property
    def operations(self) -> int:
        """Multiplications and additions of the two products."""
        return 4 * self.H * self.L**2 * self.D

    @property
    def causal_operations(self) -> int:
        """Those that are left where no query sees a later key."""
        return 2 * self.H * self.L * (self.L + 1) * self.D


SHAPES = tuple(Shape(4, L) for L in LENGTHS)
CAUSAL = (Shape(12, 512, 32), Shape(12, 512))
LONG = tuple(Shape(1, L) for L in LONG_LENGTHS)


class AttentionProblem:
    """Random queries, keys and values.

    Attributes
    ----------
    q, k, v : float32 (1, H, L, D)
    """

    def __init__(self, point: Shape):
        self.point = point
        rng = np.random.default_rng((point.H, point.L, point.D))
        shape = (1, point.H, point.L, point.D)
        self.q, self.k, self.v = (rng.standard_normal(shape).astype(np.float32) for _ in "qkv")

    def formula(self, dtype) -> np.ndarray:
        """(1, H, L, D), every step in ``dtype``."""
        q, k, v = (a.astype(dtype, copy=False) for a in (self.q, self.k, self.v))
        scores = q @ k.swapaxes(-1, -2) / dtype(np.sqrt(self.point.D))
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        return scores @ v / scores.sum(-1, keepdims=True)

    @functools.cached_property
    def exact(self):
        """The answer in float64."""
        return self.formula(np.float64)

    @functools.cached_property
    def plain_error(self):
        """Largest error of the plain float32 formula."""
        return float(np.abs(self.formula(np.float32) - self.exact).max())


def _edgeattn(problem, _threads):
    q, k, v, out = problem.q, problem.k, problem.v, np.empty_like(problem.q)
    return lambda: edgeattn.scaled_dot_product_attention(q, k, v, out=out), lambda: out


def _edgeattn_dynamic(problem, _threads):
    q, k, v, out = problem.q, problem.k, problem.v, np.empty_like(problem.q)
    return lambda: edgeattn.scaled_dot_product_attention(q, k, v, out=out, precision="int8"), lambda: out


def _numpy(problem, _threads):
    return lambda: problem.formula(np.float32), lambda: problem.formula(np.float32)


def _torch_sdpa(problem, threads):
    torch = torch_with(threads)
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (torch.from_numpy(a) for a in (problem.q, problem.k, problem.v))
    answer = []

    def call():
        answer[:] = [attend(q, k, v)]

    return call, lambda: answer[0].numpy()


OURS = (
    Contender("edgeattn float32", _edgeattn, "float", None, "ours"),
    Contender("edgeattn dynamic", _edgeattn_dynamic, "cosine", None, "ours"),
    Contender("numpy", _numpy, "float", None, "float32"),
)
PEERS = (Contender("torch sdpa", _torch_sdpa, "float-peer", "torch", "float32"),)


def causal_calls(problem: AttentionProblem) -> dict:
    """Attention alone without and with a causal mask."""
    q, k, v, out = problem.q, problem.k, problem.v, np.empty_like(problem.q)
    attend = edgeattn.scaled_dot_product_attention
    return {"edgeattn float32": lambda: attend(q, k, v, out=out),
            "edgeattn float32 causal": lambda: attend(q, k, v, is_causal=True, out=out)}


def causal_layer_calls(problem) -> dict:
    """Every layer of a `benchmarks.problem.Problem` without and with a causal mask."""
    x, codes = problem.x, problem.codes
    layer, static, dynamic = problem.layer, problem.static, problem.dynamic
    return {
        "edgeattn float32": lambda: layer(x),
        "edgeattn float32 causal": lambda: layer(x, is_causal=True),
        "edgeattn int8": lambda: static.run_int8(codes),
        "edgeattn int8 causal": lambda: static.run_int8(codes, is_causal=True),
        "edgeattn dynamic": lambda: dynamic(x),
        "edgeattn dynamic causal": lambda: dynamic(x, is_causal=True),
    }
