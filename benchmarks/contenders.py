"""Who is timed on a whole layer: one row per contender. Those of other packages are built in benchmarks.peers.

A contender is built for a problem and a number of threads, and gives a call to be timed and a way to read the answer
of the last call. What is not the library's work stays outside the call, in the library's favour: inputs lie where it
wants them, outputs are read where it left them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks import peers
from benchmarks.problem import Problem

FLOAT_PLAIN_ERRORS = 2  # our own float32: at most so many times the error of plain NumPy, as the tests demand
FLOAT_PEER_ERROR = 1e-3  # float32 of others, of the largest number: far from a mistake, near to any approximation
SMALLEST_COSINE = 0.99  # int8 of any kind to float64: what the worst scheme here reaches, with room


class Ready(NamedTuple):
    """A contender that is built: ``call()`` is timed, ``read()`` gives the answer of the last call."""

    call: Callable[[], object]
    read: Callable[[], np.ndarray]


class WrongAnswerError(Exception):
    """A contender computes something else: it is not timed."""


class CannotSayError(Exception):
    """A library has no words for a problem: it is left out of it."""


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Parameters
    ----------
    name : str
        How it is called in tables and in JSON.
    build : callable
        ``build(problem, threads) -> (call, read)``; raises CannotSayError.
    check : str
        A name in CHECKS: what its answer is held to.
    package : str or None
        The module it needs besides our own; None for ours and for plain NumPy.
    kind : {"ours", "float32", "int8"}
        Ours, or a peer at one of two precisions: which targets count it.
    """

    name: str
    build: Callable
    check: str
    package: str | None
    kind: str

    def why_not(self) -> str | None:
        """None when it can run here, else why not."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed"

    def ready(self, problem: Problem, threads: int) -> Ready:
        """Build it, run it once, and hold its answer to ``check``.

        Raises
        ------
        WrongAnswerError
            When the answer is not what the layer computes.
        CannotSayError
            When the library has no words for the problem.
        """
        ready = Ready(*self.build(problem, threads))
        ready.call()
        complaint = CHECKS[self.check](problem, np.asarray(ready.read()))
        if complaint is not None:
            raise WrongAnswerError(f"{self.name} at {problem.point}: {complaint}; it is not timed")
        return ready


# -- what an answer is held to: None, or a complaint

def _error(problem, answer):
    if answer.shape != problem.exact.shape:
        return np.inf
    error = np.abs(answer - problem.exact).max()
    return float(error) if np.isfinite(error) else np.inf


def check_float(problem: Problem, answer: np.ndarray) -> str | None:
    """At most twice the error of plain NumPy float32, both against float64."""
    largest = np.float32(np.abs(problem.exact).max())
    allowed = FLOAT_PLAIN_ERRORS * problem.plain_error + 2 * float(np.spacing(largest))
    error = _error(problem, answer)
    return None if error <= allowed else f"its error is {error:.3g}, at most {allowed:.3g} is accepted"


def check_float_peer(problem: Problem, answer: np.ndarray) -> str | None:
    """Close to float64: others choose their own approximations."""
    allowed = FLOAT_PEER_ERROR * float(np.abs(problem.exact).max())
    error = _error(problem, answer)
    return None if error <= allowed else f"its error is {error:.3g}, at most {allowed:.3g} is accepted"


def check_bytes(problem: Problem, answer: np.ndarray) -> str | None:
    """Every byte as the rules of the kernel set say, which are LiteRT's."""
    if answer.shape != problem.static_bytes.shape or answer.dtype != np.int8:
        return f"it gives {answer.dtype} of shape {answer.shape}"
    wrong = np.count_nonzero(answer != problem.static_bytes)
    return f"{wrong} of {answer.size} bytes differ" if wrong else None


def _as_layer(layer, problem, answer):
    """Every byte as an int8 layer of ours gives it, whose rules test_parity.py holds to the runtime's."""
    expected = layer.run_int8(problem.codes)
    if answer.shape != expected.shape or answer.dtype != np.int8:
        return f"it gives {answer.dtype} of shape {answer.shape}"
    wrong = np.count_nonzero(answer != expected)
    return f"{wrong} of {answer.size} bytes differ" if wrong else None


def check_usual(problem: Problem, answer: np.ndarray) -> str | None:
    """The bytes of the layer in the usual form."""
    return _as_layer(problem.usual, problem, answer)


def check_tflite_runtime(problem: Problem, answer: np.ndarray) -> str | None:
    """The bytes of the layer under tflite-runtime's rounding."""
    return _as_layer(problem.static.with_arithmetic("tflite-runtime"), problem, answer)


def check_cosine(problem: Problem, answer: np.ndarray) -> str | None:
    """Reals from int8 arithmetic: cosine to float64."""
    if answer.shape != problem.exact.shape:
        return f"it has shape {answer.shape}"
    a, b = answer.astype(np.float64), problem.exact
    cosine = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum() + 1e-300))
    return None if cosine >= SMALLEST_COSINE else f"its cosine to float64 is {cosine:.5f}"


CHECKS = {"float": check_float, "float-peer": check_float_peer, "bytes": check_bytes, "usual": check_usual,
          "tflite-runtime": check_tflite_runtime, "cosine": check_cosine}


# -- ours

def _edgeattn_float32(problem, _threads):
    layer, x = problem.layer, problem.x
    return lambda: layer(x), lambda: layer(x)


def _edgeattn_static(problem, _threads):
    layer, codes = problem.static, problem.codes
    return lambda: layer.run_int8(codes), lambda: layer.run_int8(codes)


def _edgeattn_dynamic(problem, _threads):
    layer, x = problem.dynamic, problem.x
    return lambda: layer(x), lambda: layer(x)


def plain_numpy(problem, _threads):
    """The formula of a `benchmarks.problem.Formula` in float32."""
    return lambda: problem.formula(np.float32), lambda: problem.formula(np.float32)


OURS = (
    Contender("edgeattn float32", _edgeattn_float32, "float", None, "ours"),
    Contender("edgeattn int8", _edgeattn_static, "bytes", None, "ours"),
    Contender("edgeattn dynamic", _edgeattn_dynamic, "cosine", None, "ours"),
    Contender("numpy", plain_numpy, "float", None, "float32"),
)
PEERS = (
    Contender("litert float32", peers.litert_float32, "float-peer", "ai_edge_litert", "float32"),
    Contender("litert int8", peers.litert_int8, "bytes", "ai_edge_litert", "int8"),
    Contender("litert int8 usual", peers.litert_int8_usual, "usual", "ai_edge_litert", "int8"),
    Contender("litert dynamic", peers.litert_dynamic, "cosine", "ai_edge_litert", "int8"),
    Contender("tflite-runtime float32", peers.tflite_runtime_float32, "float-peer", "tflite_runtime", "float32"),
    Contender("tflite-runtime int8", peers.tflite_runtime_int8, "tflite-runtime", "tflite_runtime", "int8"),
    Contender("onnxruntime float32", peers.onnxruntime_attention, "float-peer", "onnxruntime", "float32"),
    Contender("onnxruntime mha", peers.onnxruntime_mha, "float-peer", "onnxruntime", "float32"),
    Contender("onnxruntime int8", peers.onnxruntime_qattention, "cosine", "onnxruntime", "int8"),
    Contender("torch module", peers.torch_module, "float-peer", "torch", "float32"),
    Contender("torch sdpa", peers.torch_sdpa, "float-peer", "torch", "float32"),
)
