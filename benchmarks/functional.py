"""Attention on given queries, keys and values, and what masks and long rows cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import edgeattn
from benchmarks.contenders import Contender, plain_numpy
from benchmarks.peers import torch_with
from benchmarks.problem import Formula

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


class AttentionProblem(Formula):
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


def _edgeattn(problem, _threads):
    q, k, v, out = problem.q, problem.k, problem.v, np.empty_like(problem.q)
    return lambda: edgeattn.scaled_dot_product_attention(q, k, v, out=out), lambda: out


def _edgeattn_dynamic(problem, _threads):
    q, k, v, out = problem.q, problem.k, problem.v, np.empty_like(problem.q)
    return lambda: edgeattn.scaled_dot_product_attention(q, k, v, out=out, precision="int8"), lambda: out


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
    Contender("numpy", plain_numpy, "float", None, "float32"),
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
