"""One decode step: a single query against a cache of S keys, whose last row is the new token."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from benchmarks.contenders import Contender, plain_numpy
from benchmarks.peers import onnx_session, torch_with
from benchmarks.problem import Formula
from edgeattn.kernels.cpu.decode import decode

HEADS, HEAD_SIZE = 8, 64
KV_HEADS = (8, 2)
LENGTHS = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Step:
    """H query heads over Hkv key heads of S keys, size D; B = 1."""

    S: int
    Hkv: int
    H: int = HEADS
    D: int = HEAD_SIZE

    def __str__(self):
        return f"{self.H}/{self.Hkv}/{self.D}/{self.S}"

    @property
    def operations(self) -> int:
        """Multiplications and additions of the two products."""
        return 4 * self.H * self.S * self.D


STEPS = tuple(Step(S, Hkv) for Hkv in KV_HEADS for S in LENGTHS)


class DecodeProblem(Formula):
    """A random query and cache.

    Attributes
    ----------
    q : float32 (1, H, D)
    k, v : float32 (1, Hkv, S, D)
    """

    def __init__(self, point: Step):
        self.point = point
        rng = np.random.default_rng((point.S, point.Hkv))
        self.q = rng.standard_normal((1, point.H, point.D)).astype(np.float32)
        self.k, self.v = (rng.standard_normal((1, point.Hkv, point.S, point.D)).astype(np.float32) for _ in "kv")

    def formula(self, dtype) -> np.ndarray:
        """(1, H, D), every step in ``dtype``."""
        groups = self.point.H // self.point.Hkv
        k, v = (a[0].astype(dtype, copy=False) for a in (self.k, self.v))
        q = self.q.reshape(self.point.Hkv, groups, -1).astype(dtype, copy=False)
        scores = q @ k.swapaxes(1, 2) / dtype(np.sqrt(self.point.D))
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        return (scores @ v / scores.sum(-1, keepdims=True)).reshape(self.q.shape)

    @functools.cached_property
    def int8(self) -> tuple:
        """Keys, values, and the scales of both, as an int8 cache holds them."""
        codes, scales = [], []
        for numbers in (self.k, self.v):
            factor = np.abs(numbers).max(-1) / np.float32(127)
            codes.append(np.rint(numbers / factor[..., None]).astype(np.int8))
            scales.append(factor)
        return (*codes, *scales)

    def caches(self) -> dict[str, tuple]:
        """What a step reads, for `benchmarks.limits.read_limits`."""
        return {"float32 read": (self.k, self.v), "int8 read": self.int8}


def _edgeattn_float32(problem, _threads):
    out, scale = np.empty_like(problem.q), problem.point.D**-0.5
    q, k, v = problem.q, problem.k, problem.v
    new_k, new_v = k[:, :, -1].copy(), v[:, :, -1].copy()

    def call():
        k[:, :, -1], v[:, :, -1] = new_k, new_v
        decode(q, k, v, out, scale)

    return call, lambda: out


def _edgeattn_int8(problem, _threads):
    out, scale = np.empty_like(problem.q), problem.point.D**-0.5
    q, (k, v, k_scale, v_scale) = problem.q, problem.int8
    new = [a[:, :, -1].copy() for a in (k, v, k_scale, v_scale)]

    def call():
        k[:, :, -1], v[:, :, -1], k_scale[:, :, -1], v_scale[:, :, -1] = new
        decode(q, k, v, out, scale, k_scale=k_scale, v_scale=v_scale)

    return call, lambda: out


def _torch_sdpa(problem, threads):
    """Queries that share a key head as queries of one head: faster than enable_gqa, which repeats the keys."""
    torch = torch_with(threads)
    attend = torch.nn.functional.scaled_dot_product_attention
    point = problem.point
    q = torch.from_numpy(problem.q).reshape(1, point.Hkv, point.H // point.Hkv, point.D)
    k, v, answer = torch.from_numpy(problem.k), torch.from_numpy(problem.v), []

    def call():
        answer[:] = [attend(q, k, v)]

    return call, lambda: answer[0].numpy().reshape(problem.q.shape)


def _onnxruntime_gqa(problem, threads):
    """com.microsoft.GroupQueryAttention; past and present are one buffer, as in its own decoding loop."""
    import onnxruntime
    from onnx import TensorProto, helper
    point = problem.point
    cache = list(problem.k.shape)
    names = ["q", "new_k", "new_v", "past_k", "past_v", "lengths", "total"]
    node = helper.make_node("GroupQueryAttention", names, ["y", "present_k", "present_v"], domain="com.microsoft",
                            num_heads=point.H, kv_num_heads=point.Hkv)
    real, row, heads = TensorProto.FLOAT, [1, 1, point.Hkv * point.D], [1, 1, point.H * point.D]
    inputs = dict(zip(names, ((real, heads), (real, row), (real, row), (real, cache), (real, cache),
                              (TensorProto.INT32, [1]), (TensorProto.INT32, [1])), strict=True))
    outputs = {"y": (real, heads), "present_k": (real, cache), "present_v": (real, cache)}
    session = onnx_session([node], inputs, outputs, {}, threads)
    wrap = onnxruntime.OrtValue.ortvalue_from_numpy
    values = {"q": problem.q.reshape(heads), "new_k": problem.k[:, :, -1].reshape(row),
              "new_v": problem.v[:, :, -1].reshape(row), "past_k": problem.k, "past_v": problem.v,
              "lengths": np.array([point.S - 1], np.int32), "total": np.array([point.S], np.int32)}
    values = {name: wrap(np.ascontiguousarray(value)) for name, value in values.items()}
    answer = wrap(np.zeros(heads, np.float32))
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in (("y", answer), ("present_k", values["past_k"]), ("present_v", values["past_v"])):
        binding.bind_ortvalue_output(name, value)
    return lambda: session.run_with_iobinding(binding), lambda: answer.numpy().reshape(problem.q.shape)


OURS = (
    Contender("edgeattn float32", _edgeattn_float32, "float", None, "ours"),
    Contender("edgeattn int8", _edgeattn_int8, "cosine", None, "ours"),
    Contender("numpy", plain_numpy, "float-peer", None, "float32"),
)
PEERS = (
    Contender("onnxruntime GQA", _onnxruntime_gqa, "float-peer", "onnxruntime", "float32"),
    Contender("torch sdpa", _torch_sdpa, "float-peer", "torch", "float32"),
)
