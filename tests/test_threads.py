"""Threads, scratch memory, the kernel cache and what importing costs."""
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from places import ROOT

from edgeattn import threads
from edgeattn.kernels.cpu import fused_int8
from edgeattn.kernels.cpu.layer_float32 import FloatLayer
from edgeattn.kernels.cpu.records import KernelMask
from edgeattn.quantized import QuantizedLinear, StaticMultiHeadAttention, TensorQuantization

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


def make(E=64, H=4):
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((E, E)).astype(np.float32) / 8 for _ in range(4)]
    return FloatLayer(H, H, weights, [None] * 4, 0.25), rng


def test_two_threads_give_the_same_bits():
    layer, rng = make()
    x = rng.standard_normal((2, 301, 64)).astype(np.float32)
    alone = layer(x, x, x, np.zeros_like(x), KernelMask(band=(-100, 3)))
    threads.set_num_threads(2)
    np.testing.assert_array_equal(layer(x, x, x, np.zeros_like(x), KernelMask(band=(-100, 3))), alone)


def test_concurrent_callers():
    layer, rng = make()
    inputs = [rng.standard_normal((1, 200 + i, 64)).astype(np.float32) for i in range(6)]
    want = [layer(x, x, x, np.zeros_like(x)) for x in inputs]
    threads.set_num_threads(2)
    wrong = []

    def caller(i):
        for _ in range(20):
            if not np.array_equal(layer(inputs[i], inputs[i], inputs[i], np.zeros_like(inputs[i])), want[i]):
                wrong.append(i)
    workers = [threading.Thread(target=caller, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for i in range(1, 20):
        threads.set_num_threads(1 + i % 3)
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_forked_child_computes():
    layer, rng = make()
    x = rng.standard_normal((1, 301, 64)).astype(np.float32)
    threads.set_num_threads(2)
    want = layer(x, x, x, np.zeros_like(x))
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(layer(x, x, x, np.zeros_like(x)), want) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_fork_waits_until_no_thread_compiles():
    """Else Numba's lock stays held in the child, which then waits for ever at its first kernel."""
    program = """
import os, threading
from numba.core.compiler_lock import global_compiler_lock
import edgeattn.runtime.jit
compiling = threading.Event()

def compile():
    with global_compiler_lock:
        compiling.set()
        threading.Event().wait(0.2)

threading.Thread(target=compile).start()
compiling.wait()
child = os.fork()
if child == 0:
    os._exit(0 if global_compiler_lock._lock.acquire(timeout=5) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("n, error, message", [(0, ValueError, "n must be at least 1, got 0"),
                                               (1.5, TypeError, "n must be an int, got float"),
                                               (True, TypeError, "n must be an int, got bool")])
def test_thread_count_is_checked(n, error, message):
    with pytest.raises(error, match=message):
        threads.set_num_threads(n)


PROGRAM = """
import numpy as np
import edgeattn
from edgeattn.kernels.cpu import (
    cache_int8, cached_int8, decode_float32, decode_int8, functional_dynamic, functional_float32, fused, fused_dynamic,
    fused_int8, quantize)
from edgeattn.quantized import (
    DynamicMultiHeadAttention, QuantizedLinear, StaticMultiHeadAttention, TensorQuantization)
kernels = (fused.layer_float32, fused_int8.layer_int8, fused_dynamic.layer_dynamic,
           functional_float32.attention_float32, decode_float32.decode_float32, decode_int8.decode_int8,
           functional_dynamic.attention_dynamic, cache_int8.store_rows, cached_int8.cached_int8, quantize.quantize,
           quantize.dequantize)
assert not any(kernel.signatures for kernel in kernels), "importing compiled a kernel"
w = np.eye(16, dtype=np.float32)
edgeattn.MultiHeadAttention(2, w, w, w, w)(np.ones((1, 3, 16), np.float32))
linears = dict.fromkeys(("query", "key", "value", "output"), QuantizedLinear(np.eye(16, dtype=np.int8),
                                                                            np.full(16, 0.02, np.float32)))
tensors = dict.fromkeys("query_input query key value scores context output".split(), TensorQuantization(0.02, 0))
static = StaticMultiHeadAttention(2, linears, tensors)
for cache in (None, edgeattn.KVCache.for_layer(static, 1, 3)):
    static(np.ones((1, 3, 16), np.float32), kv_cache=cache)
DynamicMultiHeadAttention(2, linears, {})(np.ones((1, 3, 16), np.float32))
heads = np.ones((1, 2, 3, 8), np.float32)
for precision in ("float32", "int8"):
    edgeattn.scaled_dot_product_attention(heads, heads, heads, precision=precision)
for dtype in ("float32", "int8"):
    cache = edgeattn.KVCache(1, 2, 4, 8, dtype=dtype)
    cache.append(heads, heads)
    cache.attend(heads[:, :, :1])
print(*(f"{sum(k.stats.cache_hits.values())}/{sum(k.stats.cache_misses.values())}" for k in kernels))
"""


def run_program(folder=ROOT):
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], cwd=folder, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_later_processes_compile_nothing_and_add_no_files(tmp_path):
    run_program()  # beside the sources, where other tests need the same kernels: once is enough
    shutil.copytree(ROOT / "edgeattn", tmp_path / "edgeattn", ignore=shutil.ignore_patterns("*.tmp"))
    files = sorted(tmp_path.rglob("*"))
    for _ in range(3):
        assert run_program(tmp_path) == ["1/0"] * 11
    assert sorted(tmp_path.rglob("*")) == files


def test_another_layer_reads_no_kernel_again():
    def layer():
        linears = dict.fromkeys(("query", "key", "value", "output"),
                                QuantizedLinear(np.eye(16, dtype=np.int8), np.full(16, 0.02, np.float32)))
        tensors = dict.fromkeys("query_input query key value scores context output".split(), TensorQuantization(0.02, 0))
        return StaticMultiHeadAttention(2, linears, tensors)

    def reads():
        stats = fused_int8.layer_int8.stats
        return sum(stats.cache_hits.values()) + sum(stats.cache_misses.values())

    codes = np.ones((1, 3, 16), np.int8)
    layer().run_int8(codes)
    before = reads()
    layer().run_int8(codes)
    assert reads() == before
