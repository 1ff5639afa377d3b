"""The table of kernels: none that Python calls is missing, all are called alike, each as the table says."""
import importlib
import inspect
import pkgutil

import compile_first
import numpy as np
import pytest

import edgeattn
from edgeattn.kernels import cpu
from edgeattn.kernels.cpu import call
from edgeattn.kernels.cpu.entries import ENTRIES, Entry
from edgeattn.layers.dynamic_linear import DynamicLinear
from edgeattn.runtime.jit import KERNELS

HOME = "edgeattn.kernels.cpu."
CALLED_WITH = ["parameters", "addresses", "scratch", "task_queue", "count"]


def test_every_kernel_that_python_calls_stands_in_the_table():
    for module in pkgutil.walk_packages(cpu.__path__, HOME):
        importlib.import_module(module.name)
    found = {kernel for kernel in KERNELS if kernel.py_func.__module__.startswith(HOME)}
    assert found == {entry.kernel for entry in ENTRIES.values()}


@pytest.mark.parametrize("name", ENTRIES)
def test_every_kernel_is_called_alike(name):
    entry = ENTRIES[name]
    names = list(inspect.signature(entry.kernel.py_func).parameters)
    assert names[-len(CALLED_WITH):] == CALLED_WITH
    assert len(names) == len(entry.rules) + len(CALLED_WITH)


def test_no_entry_stands_in_the_table_twice():
    assert len(set(ENTRIES.values())) == len(ENTRIES)


def test_calls_compile_what_the_table_says(monkeypatch):
    """What layers, functions and caches of each kind ask to be compiled; static ones of one arithmetic."""
    asked = set()

    def entry(kernel, dtype, rules=()):
        asked.add(Entry(kernel, dtype, rules))
        return lambda *_: None

    monkeypatch.setattr(call, "entry", entry)
    for name in ("float32 layer", "probabilities", "dynamic layer", "caches", "float32 function", "int8 function",
                 "encoders"):
        compile_first.CALLS[name]()
    compile_first.static_layer("litert")
    linear = edgeattn.Linear(np.ones((8, 8)))
    DynamicLinear.quantized_from(linear).packed(np.ones((1, 8), np.float32))
    assert asked <= set(ENTRIES.values())
    assert {entry.kernel for entry in ENTRIES.values()} == {entry.kernel for entry in asked}
