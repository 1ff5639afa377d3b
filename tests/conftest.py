"""Options of the test suite, its order, and how many processes it runs in."""

import functools
import os
import subprocess
import sys
import time

import pytest
from places import ROOT, TESTS

# These take longest, in this order; they come first, so that no process is left with one when the others have ended.
FIRST = """
    test_compile_cost test_readers test_readme test_interrupts test_planted_bugs test_fence test_export_c test_cuda_float32 test_bundle
    test_cuda_layers test_cuda_mutations test_parity test_benchmarks test_instruction_sets test_prebuilt test_cli test_examples
    test_cuda_encoders test_tflite_reader test_cuda_probabilities test_arithmetic test_jit test_generated_code test_feed_forward_int8
    test_encoder_dynamic test_cuda_laws test_parity_operators test_cuda_order test_quantized test_properties test_cuda_int8_functional
    test_docs test_over_executor test_threads test_cuda_precision test_cuda_int8 test_simd test_packaging
""".split()
# What these hold does not depend on NumPy: instructions, compiled loops, caches, emulated processors, C. `--numpy` leaves
# them out, for a leg that repeats the suite on another NumPy.
WITHOUT_NUMPY = """
    test_arm64 test_bundle test_docs test_compile_cost test_worker_pool test_cuda_cache test_cuda_compile test_cuda_encoders
    test_cuda_float32 test_cuda_instructions test_feed_forward_int8 test_neighbour test_onnx_encoders test_onnx_operators
    test_parity_feed_forward test_prebuilt test_same_bytes test_wheel
    test_cuda_int8 test_cuda_int8_functional test_cuda_laws test_packaging test_cuda_layers test_cuda_mutations test_cuda_on_device
    test_cuda_order test_cuda_precision test_cuda_probabilities test_cuda_torch test_cuda_versions test_decode
    test_dynamic_kernels test_encoder_dynamic test_encoder_float32 test_export_c test_fence test_generated_code
    test_export_c_encoder test_instruction_sets test_int8_operands test_interrupts test_isa test_jit
    test_kernels_float32 test_kernels_int8 test_planted_bugs test_long_rows test_readers test_readme test_simd
    test_threads test_trusted
""".split()

# These call parts of kernels, or look at what is compiled here: they need Numba's kernels. `--prebuilt` leaves them out,
# and runs the others on this machine's library; `--compiled` runs them, and what is marked so in the files behind.
COMPILED = """
    test_arm64 test_benchmarks test_compile_cost test_dynamic_kernels test_generated_code test_instruction_sets test_int8_operands
    test_interrupts test_isa test_jit test_kernels_float32 test_kernels_int8 test_planted_bugs test_prebuilt test_records test_simd
    test_threads test_worker_pool
""".split()
PARTLY_COMPILED = "test_bundle", "test_cli", "test_entries", "test_functional"  # compiling.looks_at_compiling

# Each process compiles kernels and loads interpreters: more of them than fit into memory would end each other.
WORKER_BYTES = 2**30


def pytest_addoption(parser):
    parser.addoption(
        "--layers", type=int, default=200, metavar="N",
        help="how many random layers tests/quantized/test_parity.py compares in each runtime (default: %(default)s); "
             "three in ten more in the form of other converters, one with a position bias")
    parser.addoption(
        "--reader-cases", type=int, default=120, metavar="N",
        help="how many files changed at random tests/files/test_readers.py gives to each reader (default: %(default)s)")
    parser.addoption("--cuda", action="store_true", help="run tests/kernels/cuda/test_cuda_*.py on the GPU, not in the emulator")
    parser.addoption(
        "--long", action="store_true",
        help="the long form of tests/kernels/cuda/test_cuda_*.py (every shape, and the CPU's kernels beside), of test_fence.py (every "
             "kernel under every instruction set, twenty times as many cases) and of test_planted_bugs.py (all of them)")
    parser.addoption("--numpy", action="store_true",
                     help="leave out the files whose results do not depend on NumPy, and of a test's cases those that have no value of a "
                          "parameter that another does not have")
    parser.addoption("--prebuilt", action="store_true",
                     help="on this machine's library, compiled first where it is not there, what does not look at compiling")
    parser.addoption("--compiled", action="store_true", help="what --prebuilt leaves out, alone")


def pytest_configure(config):
    """Have kernels from the library, or compiled here: tests look into kernels, which libraries hide."""
    if config.getoption("prebuilt"):
        os.environ["EDGEATTN_JIT"] = "0"
    else:
        os.environ.setdefault("EDGEATTN_JIT", "1")


def pytest_ignore_collect(collection_path, config):
    """Leave out what `--numpy`, `--prebuilt` and `--compiled` leave out."""
    stem = collection_path.stem
    if not stem.startswith("test_"):
        return None
    left_out = (config.getoption("numpy") and stem in WITHOUT_NUMPY
                or config.getoption("prebuilt") and stem in COMPILED
                or config.getoption("compiled") and stem not in (*COMPILED, *PARTLY_COMPILED))
    return True if left_out and collection_path.suffix == ".py" else None


def pytest_collection_modifyitems(config, items):
    """FIRST first, the others in the order of their names."""
    if config.getoption("compiled"):
        items[:] = [item for item in items
                    if item.path.stem in COMPILED or item.get_closest_marker("looks_at_compiling")]
    if config.getoption("numpy"):
        left_out = without_news(items)
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


def without_news(items):
    """Cases of a test all whose parameters have values that others, which stay, have too: of a product its diagonals stay."""
    tests, left_out = {}, set()
    for item in items:
        if hasattr(item, "callspec"):
            tests.setdefault(item.nodeid.partition("[")[0], {})[item] = values_of(item)
    for cases in tests.values():
        missing = set().union(*cases.values())
        while missing:
            missing -= cases.pop(max(cases, key=lambda case: len(cases[case] & missing)))
        left_out |= cases.keys()
    return left_out


def values_of(item):
    """What each `parametrize` of a test gives this case: rows of a table are one value."""
    given = dict(item.callspec.params)
    found = set()
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if not isinstance(mark.args[0], str) else [name.strip() for name in mark.args[0].split(",")]
        found.add((*names, *(id(given.pop(name)) for name in names if name in given)))
    return found | {(*given, *map(id, given.values()))}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """What `-n auto` means: one process a core, as far as there is memory for them; 0 is this process alone."""
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    workers = min(len(os.sched_getaffinity(0)), available // WORKER_BYTES)
    return workers if workers > 1 else 0


def pytest_sessionfinish(session, exitstatus):
    """That one of both parts of the suite has nothing of what was asked for is no failure."""
    option = session.config.option
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and (option.prebuilt or option.compiled):
        session.exitstatus = pytest.ExitCode.OK


def pytest_sessionstart(session):
    """Before the processes of a whole suite start, compile what all of them would."""
    if begins_a_whole_suite(session.config):
        began = time.monotonic()
        print("compiling the kernels that many tests call: some minutes the first time", flush=True)
        parts = ["--host"] * session.config.option.numpy + ["--prebuilt"] * session.config.option.prebuilt
        subprocess.run([sys.executable, TESTS / "compile_first.py", *parts], check=True,
                       env={**os.environ, "PYTHONPATH": str(ROOT)})
        print(f"kernels that many tests call: {time.monotonic() - began:.0f} s")


def begins_a_whole_suite(config):
    """Whether this process starts others that run all files."""
    option = config.option
    return (getattr(option, "dist", "no") != "no" and not hasattr(config, "workerinput") and not option.collectonly
            and not option.keyword and config.args_source == pytest.Config.ArgsSource.TESTPATHS)


@pytest.fixture
def one_thread_afterwards():
    """For tests that change how many threads there are."""
    from edgeattn import threads

    yield
    threads.set_num_threads(1)


@pytest.fixture
def many_threads(monkeypatch, one_thread_afterwards):
    """`set_num_threads`, for calls of any size are shared among the threads there are."""
    from edgeattn import threads

    monkeypatch.setattr(threads, "SMALLEST_SHARED_WORK", 0)
    return threads.set_num_threads


@functools.cache
def _gpu():
    """One driver for all tests: kernels are loaded once."""
    from edgeattn.kernels.cuda.driver import Driver

    return Driver()


@pytest.fixture
def device(request, monkeypatch):
    """The driver that the CUDA tests run on: the emulator, or with `--cuda` the GPU."""
    from cuda_emulated import EmulatedDriver

    from edgeattn.executors.cuda import functional as on_cuda
    from edgeattn.executors.cuda.call_cache import CallCache
    from edgeattn.kernels.cuda import driver as driver_module

    found = _gpu() if request.config.getoption("--cuda") else EmulatedDriver()
    monkeypatch.setattr(driver_module, "_current", found)
    monkeypatch.setattr(on_cuda, "_CALLS", CallCache())  # launches that another driver knew
    return found
