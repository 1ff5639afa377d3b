"""The runtimes: what they say about this machine, what they refuse, and that the masks we write run in all of
them.
"""

import importlib.metadata
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import tflite_graphs as graphs
from arrays import codes
from places import ROOT
from runtimes import NOT_HERE, each_runtime

from edgeattn.arithmetic import KERNEL_SETS
from edgeattn.quantized import TensorQuantization
from quant import runtimes
from quant.export.tflite import write_tflite
from quant.runtimes import RUNTIMES, arena_size

Q = TensorQuantization(np.float32(0.1), 3)


@pytest.fixture
def runtime(name):
    return RUNTIMES[name]


@pytest.fixture
def rng():
    return np.random.default_rng(9)


def test_every_kernel_set_has_a_runtime():
    assert list(RUNTIMES) == list(KERNEL_SETS)
    assert all(name == runtime.kernel_set for name, runtime in RUNTIMES.items())


def test_runtimes_that_are_not_here_say_why():
    # the other tests leave them out
    assert all(NOT_HERE.values())
    if NOT_HERE:
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in NOT_HERE.items()))


@each_runtime
def test_select_takes_every_broadcast_of_its_condition(runtime, rng):
    for condition, shape in [
        ((2, 3, 4, 5), (2, 3, 4, 5)),
        ((1, 1, 4, 5), (2, 3, 4, 5)),
        ((2, 1, 1, 5), (2, 3, 4, 5)),
        ((1, 3, 4, 1), (2, 3, 4, 5)),
        ((4, 5), (2, 3, 4, 5)),
        ((1, 1, 1, 5), (2, 3, 4, 5)),
        ((1, 1), (2, 3, 4, 5)),
        ((1, 4, 5), (2, 4, 5)),
        ((2, 1, 5), (2, 4, 5)),
    ]:
        keep, x = rng.random(condition) < 0.6, codes(rng, *shape)
        for scores_second in (True, False):
            data = graphs.select(keep, shape, Q, -128, scores_second=scores_second)
            np.testing.assert_array_equal(runtime.run(data, [x])[0], np.where(keep, x, -128))


@each_runtime
def test_a_session_runs_many_times_and_returns_copies(runtime, rng):
    session = runtime.session(graphs.select(np.tri(4, dtype=bool), (4, 4), Q, -128))
    (name, shape, dtype), = session.inputs
    assert (name.split(":")[0], shape, dtype) == ("x", (4, 4), np.dtype(np.int8))
    a, b = codes(rng, 4, 4), codes(rng, 4, 4)
    (first,), (second,) = session.run(a), session.run(b)
    np.testing.assert_array_equal(first, np.where(np.tri(4, dtype=bool), a, -128))
    np.testing.assert_array_equal(second, np.where(np.tri(4, dtype=bool), b, -128))


@each_runtime
def test_inputs_are_neither_resized_nor_converted(runtime, rng):
    session = runtime.session(graphs.add((2, 3), Q, (2, 3), Q, Q))
    x = codes(rng, 2, 3)
    with pytest.raises(ValueError, match=r"the model has 2 inputs \(lhs, rhs\); got 1"):
        session.run(x)
    with pytest.raises(TypeError, match="input 'rhs' must be an array of int8; got float32"):
        session.run(x, x.astype(np.float32))
    with pytest.raises(TypeError, match="input 'lhs' must be an array of int8; got list"):
        session.run([1], x)
    with pytest.raises(ValueError, match=r"input 'rhs' must have shape \(2, 3\); got \(3, 2\)"):
        session.run(x, codes(rng, 3, 2))
    (strided,) = session.run(np.asfortranarray(x), x)
    np.testing.assert_array_equal(strided, session.run(x, x)[0])


@each_runtime
def test_an_input_without_axes_stays_one(runtime, rng):
    x, factor = codes(rng, 2, 3), np.array(40, np.int8)
    one = TensorQuantization(np.float32(1), 0)
    (y,) = runtime.run(graphs.mul((2, 3), one, (), one, TensorQuantization(np.float32(40), 0)), [x, factor])
    np.testing.assert_array_equal(y, x)


@each_runtime
def test_damaged_models_are_refused_by_name(runtime, tmp_path):
    data = graphs.softmax((2, 3), Q)
    path = tmp_path / "cut.tflite"
    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.tflite: is truncated or damaged"):
        runtime.session(path)
    with pytest.raises(ValueError, match="is not a .tflite file"):
        runtime.run(b"something else", [])


@each_runtime
def test_models_the_runtime_does_not_take_are_refused(runtime, rng):
    layer = graphs.random_layer(rng)
    graph = graphs.converted(layer, 1, 3, 3)
    number = next(i for i, op in enumerate(graph.operators) if op.name == "BATCH_MATMUL")
    op = graph.operators[number]
    graph.operators[number] = type(op)(
        op.name, op.inputs, op.outputs, {"adj_y": True}, 2
    )  # (3, 4) x (3, 4) transposed twice
    with pytest.raises(RuntimeError, match="refuses the .tflite bytes"):
        runtime.session(graphs.serialize(graph))


@each_runtime
def test_large_and_small_models_get_an_arena(runtime, rng):
    for L, E in ((1, 8), (150, 8), (2, 300)):
        layer = graphs.random_layer(rng, E=E)
        (y,) = runtime.run(write_tflite(layer, sequence_length=L), [codes(rng, 1, L, E)])
        assert y.shape == (1, L, E)


def test_arena_grows_with_the_activations(rng):
    layer = graphs.random_layer(rng)
    small, large = (arena_size(write_tflite(layer, sequence_length=L), "x") for L in (10, 400))
    assert small < 2**18
    assert large - small > 2 * 2 * (400**2 - 10**2) * 2  # scores and probabilities, 2 heads, twice


# -- what can run here

@pytest.fixture
def machine(monkeypatch):
    """A machine to pretend: set(machine, python, versions of packages)."""
    def pretend(processor="x86_64", python=(3, 11), **versions):
        def version(package):
            if package.replace("-", "_") not in versions:
                raise importlib.metadata.PackageNotFoundError(package)
            return versions[package.replace("-", "_")]

        monkeypatch.setattr(platform, "machine", lambda: processor)
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(runtimes, "_import_error", lambda module: None)
        monkeypatch.setattr(runtimes.sys, "version_info", (*python, 0, "final", 0))
    return pretend


def test_current_machine_has_all(machine, monkeypatch):
    monkeypatch.setattr(np, "__version__", "1.26.4")
    machine(ai_edge_litert="2.3.0", tflite_runtime="2.14.0", tflite_micro="0.1")
    assert {name for name, runtime in RUNTIMES.items() if runtime.available() is None} == set(RUNTIMES) - {
        "litert-arm"
    }


def test_arm_has_its_own(machine):
    machine("aarch64", ai_edge_litert="2.3.0", tflite_runtime="2.14.0")
    assert {name for name, runtime in RUNTIMES.items() if runtime.available() is None} == {
        "litert-arm",
        "litert-reference",
    }
    assert (
        RUNTIMES["litert"].available()
        == "'litert' is what its runtime computes on x86-64; this machine is aarch64"
    )
    assert "x86-64; this machine is aarch64" in RUNTIMES["tflite-runtime"].available()
    assert "tflite-micro has no wheel for Python 3.11" in RUNTIMES["tflm"].available()


@pytest.mark.parametrize(
    "name, pretended, reason",
    [
        ("litert", {}, "ai-edge-litert is not installed (pip install 'ai-edge-litert>=2.1.3')"),
        (
            "litert",
            {"ai_edge_litert": "2.1.2"},
            "ai-edge-litert 2.1.2 ignores the zero point of keys and values; 2.1.3 or newer",
        ),
        ("litert-reference", {"ai_edge_litert": "1.4.0"}, "ai-edge-litert 1.4.0 ignores"),
        (
            "tflite-runtime",
            {"python": (3, 12)},
            "tflite-runtime has no wheel for Python 3.12 (works on 3.11 and earlier on x86-64)",
        ),
        (
            "tflite-runtime",
            {},
            "tflite-runtime is not installed (pip install tflite-runtime==2.14.0 'numpy<2')",
        ),
        ("tflite-runtime", {"tflite_runtime": "2.13.0"}, "computes; 2.13.0 is installed"),
        ("tflm", {"python": (3, 13)}, "tflite-micro has no wheel for Python 3.13"),
        ("tflm", {}, "tflite-micro is not installed (pip install tflite-micro)"),
    ],
)
def test_reasons_can_be_read(machine, name, pretended, reason):
    machine(**pretended)
    assert reason in RUNTIMES[name].available()
    with pytest.raises(RuntimeError, match=f"cannot run '{name}' here: "):
        RUNTIMES[name].run(b"", [])


def test_numpy_2_rules_tflite_runtime_out(machine, monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.4.0")
    machine(tflite_runtime="2.14.0")
    assert (
        "tflite-runtime 2.14 is built for numpy 1; numpy 2.4.0 is installed" in RUNTIMES[
            "tflite-runtime"
        ].available()
    )


def test_package_that_cannot_be_imported_is_said(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.3.0")
    monkeypatch.setitem(runtimes.sys.modules, "ai_edge_litert.interpreter", None)
    assert "ai_edge_litert.interpreter cannot be imported" in RUNTIMES["litert"].available()


GREETED = """
import sys
from quant.runtimes import RUNTIMES
print("before", file=sys.stderr)
RUNTIMES["litert"].session(sys.argv[1])
print("after", file=sys.stderr)
"""


@pytest.mark.skipif("litert" in NOT_HERE, reason=str(NOT_HERE.get("litert")))
def test_litert_does_not_write_to_stderr(tmp_path):
    path = tmp_path / "x.tflite"
    path.write_bytes(graphs.softmax((2, 3), Q))
    done = subprocess.run([sys.executable, "-c", GREETED, path], capture_output=True, text=True,
                          cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "before\nafter\n")


class Interpreter:
    """One that writes past Python and then fails, as one in C++ may."""

    def allocate_tensors(self):
        os.write(2, b"first\n" + runtimes._GREETING + b"ERROR: the reason\n")
        raise RuntimeError("refused")


def test_other_lines_on_stderr_arrive(capfd):
    with pytest.raises(RuntimeError, match="refused"):
        runtimes._allocate_without_greeting(Interpreter())
    assert capfd.readouterr().err == "first\nERROR: the reason\n"
    print("still there", file=sys.stderr)
    assert capfd.readouterr().err == "still there\n"
