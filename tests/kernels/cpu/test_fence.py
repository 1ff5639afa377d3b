"""No kernel touches what is not its own, or takes over what lies in its scratch: see fence.py.

The instruction set that this process uses is tried whole; the plainest by the kernel that compiles fastest. With
`--long` every one that this machine can execute is tried whole, and with twenty times as many cases.
"""
import os
import subprocess
import sys

import pytest
from places import ROOT, TESTS

from edgeattn.runtime import isa

OTHERS = [table.name for table in isa.runnable(isa._host_features()) if table != isa.ISA]
# What a process runs: kernels that share what is compiled.
GROUPS = ("float32-few-keys float32-function", "float32-layer float32-layer-with-positions", "dynamic-function",
          "dynamic-layer dynamic-layer-with-positions", "static-layer", "int8-cache-left-windows int8-cache float32-cache",
          "projections", "float32-layer-with-cache dynamic-layer-with-cache", "encoder-float32 encoder-dynamic", "encoder-static")
SHORT = ("int8-cache-left-windows",)


def run(name, kernels, *options):
    """Run fence.py; what it printed last is the case that failed."""
    done = subprocess.run([sys.executable, TESTS / "fence.py", *kernels.split(), *options], text=True, capture_output=True, cwd=ROOT,
                          env={**os.environ, "EDGEATTN_ISA": name,
                               "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"})
    last = [line for line in done.stdout.splitlines() if line.startswith("case ")][-1:]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
    assert done.returncode == 0, f"{how} at {last} under {name}\n{done.stderr[-4000:]}"
    assert done.stdout.rstrip().endswith(f"under {name}")


def _options(request):
    return ["--long"] if request.config.getoption("long") else []


@pytest.mark.parametrize("kernels", GROUPS)
def test_nothing_beyond_its_arrays_is_touched_and_nothing_in_scratch_matters(kernels, request):
    run(isa.ISA.name, kernels, *_options(request))


@pytest.mark.parametrize("name", OTHERS)
def test_nor_under_another_instruction_set(name, request):
    long = _options(request)
    if not long and name != OTHERS[-1]:
        pytest.skip("make test-fence runs it")
    for kernels in GROUPS if long else SHORT:
        run(name, kernels, *_options(request))


def test_the_fence_tells_a_touch_and_a_stale_number(tmp_path):
    """A program that touches the page behind an array, the page before one, or an input, dies; poison shows."""
    program = """
import sys, fence, numpy as np
from edgeattn.kernels.cpu.simd import pointer_to, address_of
from numba import njit
@njit
def touch(array, at, write):
    p = pointer_to(address_of(array), np.float32)
    if write:
        p[at] = 1
    return p[at]
how = sys.argv[1]
a = np.ones(5, np.float32)
touch(a, 0, False)
place = fence.Fenced(how != "before", fence.NAN)
if how == "scratch":
    def stale(place):
        return [place.make(3, np.float32)]
    fence.check("stale scratch", stale, [])
copy = place.input(a)
print("case", copy.sum(), touch(copy, 4, False), flush=True)
touch(copy, {"behind": 5, "before": -1, "input": 2}[how], how == "input")
"""
    for how in ("behind", "before", "input", "scratch"):
        done = subprocess.run([sys.executable, "-c", program, how], text=True, capture_output=True, cwd=ROOT,
                              env={**os.environ, "EDGEATTN_JIT": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"})
        if how == "scratch":
            assert done.returncode == 1 and "stale scratch, scratch full of NaN" in done.stderr, done.stderr
        else:
            assert done.returncode < 0 and done.stdout == "case 5.0 1.0\n", (how, done)
