"""The C that an export writes: compiled with warnings as errors and sanitizers, its codes equal to ours and TFLite Micro's."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from c_cases import CASES, random_case
from tflite_graphs import random_layer
from workbench import random_input
from workbench import random_layer as random_float_layer

import quant
from edgeattn.arithmetic import KERNEL_SETS
from edgeattn.quantized import QuantizedLinear, TensorQuantization
from quant.export.c import write_c
from quant.export.c_files import write_together
from quant.export.tflite import write_tflite
from quant.runtimes import RUNTIMES

WARNINGS = ("-std=c99 -Wall -Wextra -Werror -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wstrict-prototypes "
            "-Wmissing-prototypes -Wundef").split()
CMSIS_NN = Path(__file__).parent / "cmsis_nn"
RANDOM_CASES = [random_case(seed) for seed in range(40)]
NO_COMPILER = "needs {0}: apt-get install {0}"


def compiler(name):
    if shutil.which(name) is None:
        pytest.skip(NO_COMPILER.format(name))
    return name


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def export(case, folder, **more):
    quant.export(case.layer, folder / "attention.c", **case.arguments, **more)
    return folder / "attention.c"


def compile_library(source, *flags, cc="gcc"):
    library = source.with_suffix(".so")
    run(compiler(cc), *WARNINGS, "-O2", "-shared", "-fPIC", *flags, source, "-o", library)
    return library


def macro(source, name):
    """The value of a macro of the header, by the preprocessor."""
    text = run("gcc", "-E", "-P", "-", input=f'#include "{source.with_suffix(".h")}"\n{name}\n')
    return int(eval(text.strip().splitlines()[-1], {}))


def call_library(library, inputs, output_size, scratch_bytes):
    """The function's codes; guards around output and scratch are checked."""
    function = ctypes.CDLL(str(library)).attention_s8
    pointer = ctypes.POINTER(ctypes.c_int8)
    function.restype, function.argtypes = ctypes.c_int, [pointer] * (len(inputs) + 2) + [ctypes.c_size_t]
    guarded = [np.full(size + 64, 90, np.int8) for size in (output_size, scratch_bytes)]
    output, scratch = (array[32:-32] for array in guarded)
    scratch[:] = -7
    arrays = [*inputs, output, scratch]
    assert function(*(array.ctypes.data_as(pointer) for array in arrays), scratch_bytes) == 0
    for array in guarded:
        assert (array[:32] == 90).all() and (array[-32:] == 90).all()
    return output.copy()


def layer_codes(case, inputs):
    names = ("query", "key", "value")
    sources = sorted(set(case.layer.sources))
    return case.masked_layer().run_int8(**{names[s]: x for s, x in zip(sources, inputs, strict=True)})


@pytest.mark.parametrize("case", CASES + RANDOM_CASES, ids=lambda case: case.name)
def test_codes_equal_our_own_and_tflite_micro(tmp_path, case):
    source = export(case, tmp_path)
    library = compile_library(source)
    scratch_bytes = macro(source, "ATTENTION_SCRATCH_BYTES")
    data = write_tflite(case.masked_layer(), batch=case.B, sequence_length=case.L, key_length=case.S)
    reason = RUNTIMES["tflm"].available()
    session = None if reason else RUNTIMES["tflm"].session(data)
    for seed in range(3):
        inputs = case.inputs(seed)
        expected = layer_codes(case, inputs)
        codes = call_library(library, inputs, expected.size, scratch_bytes)
        np.testing.assert_array_equal(codes, expected.ravel())
        if session is not None:
            np.testing.assert_array_equal(codes, session.run(*inputs)[0].ravel())
    if reason:
        pytest.skip(f"equal to our own codes; not compared with TFLite Micro: {reason}")
