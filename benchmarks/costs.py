"""What stands around a kernel: the call from Python, the start of a process, the memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import edgeattn
from benchmarks import fresh
from benchmarks.functional import AttentionProblem, Shape
from benchmarks.problem import Problem
from edgeattn import functional
from edgeattn.kernels.cpu import call

PEER_MODULES = ("torch", "onnxruntime", "ai_edge_litert.interpreter", "tflite_runtime.interpreter")
_BLOCKS, _CALLS = 30, 200


def call_overhead(problem: Problem) -> dict[str, float]:
    """Seconds that a call takes beside the work of its kernel: checks, dispatch, allocation, arguments.

    Of the layers of ``problem``, and of attention and a decode step of the same heads. Nothing stands in the way of the
    call, but the batch that the kernel is told of is empty: it finds nothing to do.
    """
    E, H, L = problem.point.E, problem.point.H, problem.point.L
    given = AttentionProblem(Shape(H, L, E // H))
    q, k, v, keep = given.q, given.k, given.v, np.tri(L, dtype=bool)
    attend = edgeattn.scaled_dot_product_attention
    calls = {"float32": lambda: problem.layer(problem.x), "int8": lambda: problem.static.run_int8(problem.codes),
             "dynamic": lambda: problem.dynamic(problem.x),
             "attention": lambda: attend(q, k, v), "attention, causal": lambda: attend(q, k, v, is_causal=True),
             "attention, masked": lambda: attend(q, k, v, keep),
             "attention, int8 products": lambda: attend(q, k, v, precision="int8")}
    last = np.ascontiguousarray(q[:, :, -1:])
    for dtype in ("float32", "int8"):
        cache = edgeattn.KVCache(1, H, L, E // H, dtype=dtype)
        cache.append(k, v)
        calls[f"decode, {dtype} cache"] = lambda cache=cache: cache.attend(last)
    bind, layers = call.bind, (problem.layer, problem.static, problem.dynamic)
    _forget(layers)
    call.bind = lambda function, parameters, *others: bind(function, _emptied(parameters), *others)
    try:
        return {name: float(np.median([_seconds(run) for _ in range(_BLOCKS)])) for name, run in calls.items()}
    finally:
        call.bind = bind
        _forget(layers)


def _forget(layers):
    """What calls of layers and of attention have prepared."""
    functional._prepared.clear()
    for layer in layers:
        layer.prepared_calls.clear()
        layer.fused_kernel._plans.clear()


def _emptied(parameters):
    """The parameters of a kernel for an empty batch, which every record begins with."""
    return np.concatenate((np.zeros(1, np.int64), parameters[1:]))


def cached_steps(problem: Problem) -> dict[str, float]:
    """Seconds that one token takes through each layer of ``problem``, whose cache holds the L tokens before it."""
    x, found = problem.x[:1], {}
    layers = {"float32": problem.layer, "dynamic": problem.dynamic, "static": problem.static,
              "static, codes": problem.static}
    for name, layer in layers.items():
        tokens, run = (problem.codes[:1], layer.run_int8) if name == "static, codes" else (x, layer)
        cache, last = edgeattn.KVCache.for_layer(layer, 1, x.shape[1] + 1), np.ascontiguousarray(tokens[:, -1:])
        run(tokens, kv_cache=cache, is_causal=True)

        def step(run=run, cache=cache, last=last, held=x.shape[1]):
            run(last, kv_cache=cache)
            cache.truncate(held)

        step()
        found[name] = float(np.median([_seconds(step) for _ in range(_BLOCKS)]))
    return found


def steps_text(overhead: dict) -> str:
    """What ``cached_steps`` found, in words."""
    E, H, L = overhead["case"].split("/")
    times = ", ".join(f"{name} {value * 1e6:.1f} us" for name, value in overhead["steps"].items())
    return f"one token through a layer of E = {E}, H = {H}, with a cache that holds {L}: {times}"


def _seconds(call):
    begin = time.process_time()
    for _ in range(_CALLS):
        call()
    return (time.process_time() - begin) / _CALLS


def processes(peers: bool, counts) -> dict[str, dict]:
    """Import, first result and memory in processes of their own: nothing cached at first, then everything.

    Returns
    -------
    dict
        "cold" and "warm": as ``fresh.start`` gives them; "compiled_at_import": bool; "memory": by number of threads, as
        ``fresh.memory`` gives it; "peers": seconds of processor time to import each.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = installed_in(Path(folder))
        found = {"cold": run("start")}
        warm = [run("start") for _ in range(3)]
        found["warm"] = {key: float(np.median([w[key] for w in warm])) for key in warm[0]}
        found["compiled_at_import"] = run("compiled")["compiled"]
        found["memory"] = {str(count): run("memory", str(count)) for count in counts}
    found["peers"] = {}
    for module in PEER_MODULES if peers else ():
        script = f"import time; b = time.process_time(); import {module}; print(time.process_time() - b)"
        answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            found["peers"][module] = float(answer.stdout)
    return found


def installed_in(folder: Path):
    """A function that runs fresh.py on a copy of edgeattn in ``folder``, which starts without any cache."""
    source = Path(edgeattn.__file__).parent
    shutil.copytree(source, folder / "edgeattn", ignore=shutil.ignore_patterns("__pycache__", "libraries"))
    shutil.copy(fresh.__file__, folder / "fresh.py")
    environment = {**os.environ, "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"),
                   "NUMBA_CACHE_DIR": str(folder / "numba"), "PYTHONPATH": str(folder)}
    # compiling sources takes memory, and an installed package comes with its bytecode: the first process writes it
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(*arguments):
        answer = subprocess.run([sys.executable, str(folder / "fresh.py"), *arguments], cwd=folder, env=environment,
                                capture_output=True, text=True, check=False)
        if answer.returncode:
            raise RuntimeError(f"fresh.py {' '.join(arguments)} failed:\n{answer.stderr}")
        return json.loads(answer.stdout)

    return run
