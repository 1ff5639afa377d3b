"""The table of kernels: none that Python calls is missing, all are called alike, each as the table says."""
import importlib
import inspect
import pkgutil

import compile_first
import numba.np.numpy_support
import numpy as np
import pytest
from compiling import looks_at_compiling

import edgeattn
from edgeattn.kernels import cpu
from edgeattn.kernels.cpu.entries import ENTRIES
from edgeattn.layers.dynamic_linear import DynamicLinear
from edgeattn.runtime import jit

HOME = "edgeattn.kernels.cpu."
CALLED_WITH = ["parameters", "addresses", "scratch", "task_queue", "count"]


@looks_at_compiling
def test_every_kernel_that_python_calls_stands_in_the_table():
    for module in pkgutil.walk_packages(cpu.__path__, HOME):
        importlib.import_module(module.name)
    found = {kernel for kernel in jit.KERNELS if kernel.py_func.__module__.startswith(HOME)}
    assert found == {entry.kernel for entry in ENTRIES.values()}


@pytest.mark.parametrize("name", ENTRIES)
def test_every_kernel_is_called_alike(name):
    assert list(inspect.signature(ENTRIES[name].kernel.py_func).parameters) == CALLED_WITH


def test_no_entry_stands_in_the_table_twice():
    assert len(set(ENTRIES.values())) == len(ENTRIES)


@looks_at_compiling
def test_calls_compile_what_the_table_says():
    """What layers, functions and caches of each kind have compiled, or read from the cache."""
    for name in ("float32 layer", "probabilities", "dynamic layer", "caches", "float32 function", "int8 function",
                 "static layer", "encoders"):
        compile_first.CALLS[name]()
    DynamicLinear.quantized_from(edgeattn.Linear(np.ones((8, 8)))).packed(np.ones((1, 8), np.float32))
    table = {entry.kernel: entry.dtype for entry in ENTRIES.values()}
    found = {(kernel, numba.np.numpy_support.as_dtype(types[2].dtype).type)
             for kernel, types in jit._entries if kernel in table}
    assert found == set(table.items())
