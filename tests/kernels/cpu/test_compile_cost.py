"""What the first call of a layer costs where nothing is cached: a change that compiles everything twice is seen here.

Of the kind that compiles least; of all with ``--long``.
"""
import pytest

from benchmarks import start

# kind: (lines of LLVM's language that machine code is made of, MiB resident), each half as much again as measured with
# Numba 0.68 on avx512vbmi; `python -m benchmarks.start` prints the present ones.
BOUNDS = {"float32": (36_000, 420), "dynamic": (30_000, 390), "int8": (31_000, 350)}


@pytest.mark.parametrize("kind", BOUNDS)
def test_a_kernel_stays_as_cheap_to_compile_as_it_is(kind, request):
    if kind != "int8" and not request.config.getoption("long"):
        pytest.skip("takes a minute: make test-long ARGS=tests/kernels/cpu/test_compile_cost.py")
    compiled, cached = start.first_calls([kind])[kind]
    lines, mib = BOUNDS[kind]
    assert lines / 4 < compiled["lines"] <= lines  # far fewer: then something else is measured
    assert compiled["mib"] <= mib
    assert cached["lines"] < 500 < compiled["lines"]  # Numba's own runtime
    assert cached["processor"] < compiled["processor"]
    assert cached["mib"] < compiled["mib"]
