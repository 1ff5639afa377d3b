"""The attention cases of tests/cases.py, small, odd and masked in every way, beside NumPy, and torch where it can."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np

import edgeattn
from benchmarks.contenders import CannotSayError, Contender
from benchmarks.peers import torch_with
from benchmarks.problem import Formula

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import cases as listed
import reference


class CasePoint:
    """A case as a benchmark names and counts it.

    Attributes
    ----------
    case : cases.Case
    operations : int
        Multiplications and additions of the two products, masks left out.
    """

    def __init__(self, case):
        self.case = case
        self.operations = 2 * case.B * case.H * case.L * case.S * (case.D + case.value_dim)

    def __str__(self):
        return self.case.name


CASES = tuple(CasePoint(case) for case in listed.CASES  # empty arrays take no time
              if min(case.B, case.H, case.L, case.S, case.D, case.value_dim) > 0)


class CaseProblem(Formula):
    """A case's arrays, what its masks permit, and its answer by tests/reference.py.

    Attributes
    ----------
    q, k, v : float32 (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv)
    arguments : dict
        Of `scaled_dot_product_attention`, besides the three.
    visible : bool (B, H, L, S)
        All masks written out.
    bias : float32, broadcastable to (B, H, L, S), or None
    """

    def __init__(self, point: CasePoint):
        self.point = point
        case = point.case
        masks, (self.q, self.k, self.v) = case.masks(), case.qkv()
        keep, self.bias = masks["keep"], masks["bias"]
        if masks["padding"] is not None:
            padding = masks["padding"][:, None, None]
            keep = padding if keep is None else keep & padding
        self.visible = reference.visible(
            case.B, case.H, case.L, case.S, keep=keep, causal=case.is_causal, alignment=case.causal_alignment,
            window=case.window_size, lengths=masks["lengths"])
        mask = keep if self.bias is None else self.bias
        if self.bias is not None and keep is not None:
            mask = np.where(keep, self.bias, np.float32(-np.inf))
        self.arguments = {"attn_mask": mask, "is_causal": case.is_causal, "causal_alignment": case.causal_alignment,
                          "window_size": case.window_size, "kv_lengths": masks["lengths"], "scale": case.scale,
                          "softcap": case.softcap, "enable_gqa": True}
        if case.window_size == (-1, -1):
            del self.arguments["window_size"]

    @functools.cached_property
    def added(self) -> np.ndarray:
        """float32 (B, H, L, S): what masks and bias add to the scores."""
        return np.where(self.visible, 0 if self.bias is None else self.bias, -np.inf).astype(np.float32)

    @functools.cached_property
    def scale(self) -> float:
        """Of the scores."""
        given = self.point.case.scale
        return self.point.case.D ** -0.5 if given is None else given

    def formula(self, dtype) -> np.ndarray:
        """The formula row by row, every step in ``dtype``."""
        case = self.point.case
        return reference.attention(self.q, self.k, self.v, self.visible, self.bias, scale=case.scale,
                                   softcap=case.softcap, dtype=dtype)[0]


def _edgeattn(problem, _threads):
    q, k, v, arguments = problem.q, problem.k, problem.v, problem.arguments
    attend, out = edgeattn.scaled_dot_product_attention, np.empty_like(problem.exact, np.float32)
    return lambda: attend(q, k, v, **arguments, out=out), lambda: out


def _numpy(problem, _threads):
    """Whole arrays at a time; masks are one array, written out beforehand, and missing where nothing is masked."""
    case, q, k, v = problem.point.case, problem.q, problem.k, problem.v
    groups, scale, cap = case.H // case.kv_heads, np.float32(problem.scale), np.float32(case.softcap)
    added = problem.added if np.any(problem.added) else None
    grouped = (case.B, case.kv_heads, groups)
    q = q.reshape(*grouped, case.L, case.D)
    k, v = k[:, :, None].swapaxes(-1, -2), v[:, :, None]
    added = None if added is None else added.reshape(*grouped, case.L, case.S)
    lowest = np.finfo(np.float32).min

    def call():
        scores = q @ k * scale
        if cap:
            scores = cap * np.tanh(scores / cap)
        if added is not None:
            scores += added
        weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), lowest))
        total = weights.sum(-1, keepdims=True)
        if added is not None:
            total = np.maximum(total, np.finfo(np.float32).tiny)
        return (weights @ v / total).reshape(case.B, case.H, case.L, -1)

    return call, call


def _torch_sdpa(problem, threads):
    """A mask written out is given as one; torch knows no softcap."""
    torch = torch_with(threads)
    case, attend = problem.point.case, torch.nn.functional.scaled_dot_product_attention
    if case.softcap:
        raise CannotSayError("torch's attention has no softcap")
    q, k, v = (torch.from_numpy(a) for a in (problem.q, problem.k, problem.v))
    options = {"scale": case.scale, "enable_gqa": case.kv_heads != case.H}
    added = problem.added
    if np.any(added):
        causal = case.is_causal and case.L == case.S and (problem.visible == np.tri(case.L, dtype=bool)).all()
        options |= {"is_causal": True} if causal and problem.bias is None else {"attn_mask": torch.from_numpy(added)}
    answer = []

    def call():
        answer[:] = [attend(q, k, v, **options)]

    return call, lambda: answer[0].numpy()


OURS = (
    Contender("edgeattn float32", _edgeattn, "float", None, "ours"),
    Contender("numpy", _numpy, "float-peer", None, "float32"),
)
PEERS = (Contender("torch sdpa", _torch_sdpa, "float-peer", "torch", "float32"),)
