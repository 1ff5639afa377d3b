"""tools/cuda/on_device.sh and its stages, without a card."""
import ast
import importlib.util
import os
import subprocess

import pytest
from cuda_emulated import EmulatedDriver, emulated_only
from cuda_limits import LIMITS
from places import ROOT, TESTS

from edgeattn.kernels.cuda import driver as driver_module

pytestmark = emulated_only
SCRIPT = ROOT / "tools" / "cuda" / "on_device.sh"
STAGES = "environment compile smoke tests memcheck racecheck torch bench encoders".split()


def run(tmp_path, python, **variables):
    """The script with a stand-in for Python and one for compute-sanitizer, which runs what it is given."""
    for name, text in (("python", python), ("compute-sanitizer", 'shift 6; exec "$@"\n')):
        (tmp_path / name).write_text("#!/bin/sh\n" + text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "logs"),
                                "PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
    return subprocess.run(["bash", str(SCRIPT)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)


def lines(done):
    """Of the summary, which comes last."""
    return done.stdout.strip().splitlines()[-len(STAGES):]


def test_every_stage_has_a_log_and_a_line(tmp_path):
    done = run(tmp_path, 'echo "ran: $*"\n')
    assert done.returncode == 0, done.stderr
    for stage, line in zip(STAGES, lines(done), strict=True):
        assert line.startswith(f"{stage}: passed, ") and "ran: " in line
        assert (tmp_path / "logs" / f"{stage}.log").read_text().startswith("ran: ")
    told = {stage: (tmp_path / "logs" / f"{stage}.log").read_text() for stage in STAGES}
    for stage in ("smoke", "tests", "memcheck", "racecheck"):
        assert "--cuda" in told[stage] and "tests/kernels/cuda/test_cuda_layers.py" in told[stage]
        assert not {"tests/kernels/cuda/test_cuda_compile.py", "tests/kernels/cuda/test_cuda_mutations.py"} & set(told[stage].split())
    assert "tests/kernels/cuda/test_cuda_torch.py" in told["torch"] and "-m benchmarks.cuda" in told["bench"]


def test_a_stage_that_fails_stops_no_other(tmp_path):
    done = run(tmp_path, 'echo "ran: $*"; case "$*" in *compile_all*) exit 7 ;; esac\n')
    assert done.returncode == 1
    assert [line.split(", ")[0] for line in lines(done)] == [
        f"{stage}: {'FAILED (7)' if stage == 'compile' else 'passed'}" for stage in STAGES]


def test_time_that_is_up_leaves_the_others_out(tmp_path):
    done = run(tmp_path, 'echo "ran: $*"\n', SECONDS_IN_ALL="5")
    assert done.returncode == 1 and [*lines(done)] == [f"{stage}: not run, no time is left" for stage in STAGES]


def test_without_a_card_it_says_so_and_has_a_code_for_it(tmp_path):
    done = run(tmp_path, 'echo "no card: none answers"; exit 3\n')
    assert done.returncode == 3
    assert done.stderr == "test-cuda: not run, no card: none answers. What needs no GPU: make test-cuda-offline.\n"
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["environment.log"]


def load(name):
    """A stage's module."""
    spec = importlib.util.spec_from_file_location(f"on_device_{name}", SCRIPT.parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_names_files_and_tests_that_there_are():
    text = SCRIPT.read_text(encoding="utf-8")
    for word in text.replace('"', " ").split():
        if word.endswith(".py") and "*" not in word:
            assert (ROOT / word).is_file(), word
    tests = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_cuda_*.py"))
    names = {node.name for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.FunctionDef)}
    cases = (TESTS / "cases.py").read_text(encoding="utf-8") + tests
    for line in text.splitlines():
        if line.startswith("few"):
            for word in line.split('"')[1].split(" or "):
                assert any(word in name for name in names) or word in cases or word == "length-17", word


def test_what_is_compiled_is_what_is_launched(monkeypatch):
    import numpy as np
    from test_cuda_float32 import put

    import edgeattn

    kernels = load("compile_all").kernels()
    assert all(name == kernel.name for name, kernel in kernels.items())
    assert {row[0].name for row in LIMITS if not row[0].name.startswith("static")} <= set(kernels)
    gpu = EmulatedDriver()
    monkeypatch.setattr(driver_module, "_current", gpu)
    q = put(np.zeros((1, 1, 3, 32), np.float32))
    for precision in ("float32", "float16", "tf32", "int8"):
        edgeattn.scaled_dot_product_attention(q, q, q, precision=precision)
    assert set(gpu.launched) <= set(kernels)


def test_the_environment_is_told_without_a_card(capfd, monkeypatch):
    environment = load("environment")
    monkeypatch.setattr(driver_module, "_current", None)
    monkeypatch.setattr(driver_module, "_installed", lambda module: False)
    monkeypatch.setattr(environment, "compiler", lambda: "PTX 9.0")
    assert environment.main() == environment.NO_CARD
    said = capfd.readouterr().out.strip().splitlines()
    assert said[-1].startswith("no card: CUDA needs the extra 'cuda'") and any(" numpy " in line for line in said)


def test_the_environment_is_told_with_a_card(capfd, monkeypatch):
    environment = load("environment")
    gpu = EmulatedDriver()
    monkeypatch.setattr(driver_module, "_current", gpu)
    monkeypatch.setattr(gpu, "version", lambda: 13000)
    monkeypatch.setattr(environment, "compiler", lambda: "PTX 9.0")
    assert environment.main() == 0
    assert capfd.readouterr().out.strip().splitlines()[-1] == (
        "an emulator, compute capability 8.7, 4 multiprocessors, driver of CUDA 13.0")


@pytest.mark.parametrize("name", ["environment", "compile_all"])
def test_a_stage_needs_nothing_when_it_is_loaded(name):
    assert callable(load(name).main)
