"""The C that an export writes: compiled with warnings as errors and sanitizers, its codes equal to ours and TFLite Micro's."""

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path

import executors
import laws
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
ACLE = Path(__file__).parent / "acle"
RANDOM_CASES = [random_case(seed) for seed in range(30)]
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


class ExportedC(executors.StaticLayer):
    """A library for each mask and shape; between reals and codes stands the layer.

    A mask that a file carries leaves a masked key a trace of weight (StaticMultiHeadAttention.with_mask), which may be a code.
    """

    bad = bad_for_others = (1e38, -1e38)  # the lowest and the highest code: there is none for NaN
    sliced = 0.1
    takes = ("lengths",)

    @functools.cached_property
    def libraries(self):
        return {}

    def __call__(self, query, key, value, *, keep=None, causal=False, lengths=None, window_size=None):
        (B, L, _), S = query.shape, key.shape[1]
        mask = np.ones((B, 1, L, S), bool) if keep is None else np.broadcast_to(keep, (B, 1, L, S)).copy()
        if causal or window_size is not None:
            mask &= np.tri(L, S, dtype=bool)
        if lengths is not None:
            mask &= (np.arange(S) < np.asarray(lengths)[:, None])[:, None, None]
        made = mask.shape, mask.tobytes()
        if made not in self.libraries:
            source = self.folder / str(len(self.libraries)) / "attention.c"
            source.parent.mkdir()
            quant.export(self.made, source, batch=B, sequence_length=L, key_length=S, mask=mask)
            self.libraries[made] = compile_library(source, "-O1"), macro(source, "ATTENTION_SCRATCH_BYTES")
        library, scratch_bytes = self.libraries[made]
        codes = [np.ascontiguousarray(self.made.quantize_input(x, name))
                 for x, name in zip((query, key, value), ("query", "key", "value"), strict=True)]
        result = call_library(library, codes, B * L * executors.WIDTH, scratch_bytes)
        return self.made.dequantize_output(result.reshape(B, L, -1))


# Not those of NaN, empty axes and threads, which C lacks, nor of rows without keys: there a carried mask weighs all alike.
@pytest.mark.parametrize("law", [
    laws.nothing_leaks_from_behind_a_mask, laws.a_masked_key_is_not_there, laws.entries_do_not_see_each_other],
    ids=lambda law: law.__name__)
def test_law(tmp_path, law):
    law(ExportedC("exported C", layer=lambda: executors.static_layer("tflm"), folder=tmp_path, tokens=13))


# -- compilers, sanitizers, other processors, CMSIS-NN -------------------------------------------------------------------

SOME = CASES[::7] + RANDOM_CASES[:2]


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_sanitizers_find_nothing_and_the_written_test_passes(tmp_path, case):
    source = export(case, tmp_path, test_vectors=7)
    program = tmp_path / "program"
    run(compiler("gcc"), *WARNINGS, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", source,
        tmp_path / "attention_test.c", "-o", program)
    assert run(program) == "attention: 7 of 7 test vectors equal; too small scratch refused\n"


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_clang_agrees(tmp_path, case):
    source = export(case, tmp_path, test_vectors=5)
    run(compiler("clang"), *WARNINGS, "-O2", source, tmp_path / "attention_test.c", "-o", tmp_path / "program")
    run(tmp_path / "program")


@pytest.mark.parametrize("cc, emulator, packages", [
    ("aarch64-linux-gnu-gcc", "qemu-aarch64-static", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static"),
    ("arm-linux-gnueabihf-gcc", "qemu-arm-static", "gcc-arm-linux-gnueabihf libc6-dev-armhf-cross qemu-user-static"),
])
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_arm_agrees(tmp_path, case, cc, emulator, packages):
    if not (shutil.which(cc) and shutil.which(emulator)):
        pytest.skip(NO_COMPILER.format(packages))
    source = export(case, tmp_path, test_vectors=5)
    run(cc, *WARNINGS, "-O2", "-static", source, tmp_path / "attention_test.c", "-o", tmp_path / "program")
    run(emulator, tmp_path / "program")


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_calls_into_cmsis_nn_mean_the_same(tmp_path, case):
    source = export(case, tmp_path, test_vectors=7)
    flags = ["-DATTENTION_USE_CMSIS_NN", f"-I{CMSIS_NN}", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run(compiler("gcc"), *WARNINGS, "-O1", *flags, source, tmp_path / "attention_test.c", CMSIS_NN / "stand_in.c", "-o",
        tmp_path / "program")
    run(tmp_path / "program")


@pytest.mark.parametrize("case", CASES[1::7] + RANDOM_CASES[2:4], ids=lambda case: case.name)
def test_the_dsp_extension_means_the_same(tmp_path, case):
    """Its loops here, with intrinsics in C; `make test-cortex-m` runs them, and those of Helium, as instructions."""
    source = export(case, tmp_path, test_vectors=7)
    flags = ["-D__ARM_FEATURE_SIMD32=1", f"-I{ACLE}", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run(compiler("gcc"), *WARNINGS, "-O1", *flags, source, tmp_path / "attention_test.c", "-o", tmp_path / "program")
    run(tmp_path / "program")


def test_c_alone_can_be_asked_for(tmp_path):
    source = export(CASES[0], tmp_path)
    assert compile_library(source, "-D__ARM_FEATURE_SIMD32=1", "-DATTENTION_PORTABLE")


def test_a_failure_of_cmsis_nn_is_reported(tmp_path):
    source = export(CASES[3], tmp_path)
    failing = (CMSIS_NN / "stand_in.c").read_text().replace("return ARM_CMSIS_NN_SUCCESS", "return ARM_CMSIS_NN_ARG_ERROR", 1)
    (tmp_path / "failing.c").write_text(failing)
    library = compile_library(source, "-DATTENTION_USE_CMSIS_NN", f"-I{CMSIS_NN}", tmp_path / "failing.c")
    x, output, scratch = (np.zeros(4096, np.int8) for _ in range(3))
    aligned = scratch[-scratch.ctypes.data % 4:]
    arguments = [ctypes.c_void_p(array.ctypes.data) for array in (x, output, aligned)]
    assert ctypes.CDLL(str(library)).attention_s8(*arguments, ctypes.c_size_t(4000)) == 2
    off = ctypes.c_void_p(aligned.ctypes.data + 1)
    assert ctypes.CDLL(str(library)).attention_s8(*arguments[:2], off, ctypes.c_size_t(4000)) == 1


def test_the_written_test_sees_a_wrong_code(tmp_path):
    source = export(CASES[5], tmp_path, test_vectors=6)
    text = source.read_text()
    start = text.index("value_weight_s8[")
    brace = text.index("{", start)
    weight = text[brace:].split(",")[0].strip("{\n ")
    changed = text[:brace] + text[brace:].replace(weight, str((int(weight) + 60) % 100), 1)
    source.write_text(changed)
    run("gcc", source, tmp_path / "attention_test.c", "-o", tmp_path / "program")
    done = subprocess.run([tmp_path / "program"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "codes differ; it catches: anything" in done.stdout


def test_header_serves_cpp_and_another_name(tmp_path):
    quant.export(CASES[1].layer, tmp_path / "Wake_word2.c", sequence_length=2, test_vectors=1)
    assert sorted(os.listdir(tmp_path)) == ["Wake_word2.c", "Wake_word2.h", "Wake_word2_test.c", "Wake_word2_test.h"]
    main = '#include "Wake_word2.h"\nint main() { return Wake_word2_s8(0, 0, 0, 0) - WAKE_WORD2_BAD_SCRATCH; }\n'
    (tmp_path / "main.cpp").write_text(main)
    run("gcc", "-c", tmp_path / "Wake_word2.c", "-o", tmp_path / "w.o")
    run("g++", "-Wall", "-Werror", tmp_path / "main.cpp", tmp_path / "w.o", "-o", tmp_path / "program")
    run(tmp_path / "program")


def test_nothing_but_memory_functions_is_taken_from_libc_and_one_name_is_given(tmp_path):
    for case in SOME:
        source = export(case, tmp_path)
        run("gcc", "-std=c99", "-O2", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-c", source, "-o", tmp_path / "a.o")
        lines = [line.split() for line in run("nm", tmp_path / "a.o").splitlines()]
        assert {words[-1] for words in lines if words[-2] == "U"} <= {"memset", "memcpy", "memmove"}
        assert [words[-1] for words in lines if words[-2].isupper() and words[-2] != "U"] == ["attention_s8"]
        assert not {words[-2] for words in lines} & set("bBdDC"), "variables"


# -- what is calibrated, what is extreme -----------------------------------------------------------------------------------


def test_a_quantized_model_computes_the_same_in_c(tmp_path):
    layer = random_float_layer(3, H=4, D=8, E=32)
    calls = [{"query": random_input(seed, 4, 20, 32), "is_causal": True} for seed in range(3)]
    static = quant.quantize(layer, quant.calibrate(layer, calls), arithmetic="tflm")
    quant.export(static, tmp_path / "attention.c", sequence_length=20, mask="causal")
    x = static.quantize_input(random_input(9, 1, 20, 32))
    library = compile_library(tmp_path / "attention.c")
    codes = call_library(library, [x], 640, macro(tmp_path / "attention.c", "ATTENTION_SCRATCH_BYTES"))
    np.testing.assert_array_equal(codes, static.with_mask(np.tri(20, dtype=bool)).run_int8(x).ravel())
    assert codes.std() > 20  # not a layer that saturates or says nothing


def extreme_layer(rng, scale, weights, bias):
    """Multipliers far above and below one, biases at the ends of int32, inputs' zero points at the ends of int8."""
    def linear(o, i):
        return QuantizedLinear(rng.choice(np.array(weights, np.int8), (o, i)), np.full(o, scale, np.float32),
                               rng.choice(np.array([-bias, bias], np.int32), o))

    def tensor(zero_point):
        return TensorQuantization(np.float32(0.05), zero_point)

    tensors = {"query_input": tensor(-128), "query": tensor(127), "key": tensor(-128), "value": tensor(127),
               "scores": tensor(-3), "context": tensor(-128), "output": tensor(127)}
    return type(random_layer(rng))(2, {name: linear(8, 8) for name in ("query", "key", "value", "output")}, tensors,
                                   arithmetic="tflm")


@pytest.mark.parametrize("scale, weights, bias", [
    (1e-9, [-127, 127], 2**31 - 2**18), (1e3, [-127, 127], 2**31 - 2**18), (1e6, [-1, 0, 1], 5), (1.0, [0], 0),
    (0.01, [-127, 127], 2**20), (2.0**-31, [-127], 2**31 - 2**18)])
def test_extreme_multipliers_and_biases(tmp_path, scale, weights, bias):
    layer = extreme_layer(np.random.default_rng(0), scale, weights, bias)
    quant.export(layer, tmp_path / "attention.c", sequence_length=6, test_vectors=8)
    run(compiler("gcc"), *WARNINGS, "-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
        tmp_path / "attention.c", tmp_path / "attention_test.c", "-o", tmp_path / "program")
    run(tmp_path / "program")


def test_long_rows(tmp_path):
    """From a sum of 512 on, the last shift of the softmax would be wider than 31 bits; there TFLite Micro aborts."""
    layer = random_layer(np.random.default_rng(0), H=1, D=1, Dv=1, E=1, sources=(0, 1, 1)).with_arithmetic("tflm")
    quant.export(layer, tmp_path / "attention.c", sequence_length=1, key_length=4095, test_vectors=6)
    run(compiler("gcc"), *WARNINGS, "-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
        tmp_path / "attention.c", tmp_path / "attention_test.c", "-o", tmp_path / "program")
    run(tmp_path / "program")
    with pytest.raises(ValueError, match="at most 4095 keys in C: TFLite Micro sums .*; got 4096"):
        quant.export(layer, tmp_path / "attention.c", sequence_length=1, key_length=4096)


# -- the text --------------------------------------------------------------------------------------------------------------


def test_the_same_layer_gives_the_same_text_and_it_is_plain():
    for case in CASES:
        texts = write_c(case.layer, "attention", batch=case.B, sequence_length=case.L, key_length=case.S,
                        mask=None if isinstance(case.mask, str) else case.mask, test_vectors=2)
        for name, text in texts.items():
            assert text.isascii() and text.endswith("\n") and "\t" not in text and "$" not in text, name
            assert [line for line in text.splitlines() if len(line) > 120] == [], name
        again = write_c(case.layer, "attention", batch=case.B, sequence_length=case.L, key_length=case.S,
                        mask=None if isinstance(case.mask, str) else case.mask, test_vectors=2)
        assert texts == again


def test_the_file_explains_itself():
    text = write_c(CASES[2].layer, "attention", sequence_length=3, mask=np.tri(3, dtype=bool))
    layer = CASES[2].layer
    for name, tensor in layer.tensors.items():
        label = "input" if name == "query_input" else name
        assert f" *   {label} " in text["attention.c"]
        assert f"{np.float32(tensor.scale):.9g}" in text["attention.c"]
    assert "causal: query i sees the keys 0 to i" in text["attention.h"]
    for number in range(1, 7):
        assert f"/* {number}. " in text["attention.c"]


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def layer():
    return random_layer(np.random.default_rng(0)).with_arithmetic("tflm")


@pytest.mark.parametrize("arithmetic", sorted(set(KERNEL_SETS) - {"tflm"}))
def test_other_arithmetics_are_refused(tmp_path, layer, arithmetic):
    with pytest.raises(ValueError, match=rf"arithmetic 'tflm' for C, .*got '{arithmetic}': export layer.with_arithmetic"):
        quant.export(layer.with_arithmetic(arithmetic), tmp_path / "a.c", sequence_length=3)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["int.c", "2nd.c", "my-layer.c", "_a.c", "a b.c", "stdint.c", "String.c", "\N{GREEK SMALL LETTER ALPHA}.c",
                                  "arm_nnfunctions.c", "a.b.c", ".c.c", "softmax.c", "linear.c", "query_weight.c", "arm_softmax.c"])
def test_names_that_c_does_not_take_are_refused(tmp_path, layer, name):
    with pytest.raises(ValueError, match="path must (not )?be named"):
        quant.export(layer, tmp_path / name, sequence_length=3)
    assert os.listdir(tmp_path) == []


BAD = [
    ({"sequence_length": None}, ValueError, "sequence_length is required for a .c: its shapes are fixed"),
    ({"sequence_length": 0}, ValueError, "sequence_length must be at least 1, got 0"),
    ({"batch": 2.0}, TypeError, "batch must be an integer, got 2.0"),
    ({"key_length": 4}, ValueError, "key_length must be left out or equal sequence_length"),
    ({"mask": np.ones((4, 4), bool)}, ValueError, r"must broadcast to \(B, H, L, S\) = \(1, 2, 3, 3\)"),
    ({"mask": np.ones((3, 3))}, TypeError, "mask must be 'causal' or a bool array"),
    ({"test_vectors": 0}, ValueError, "test_vectors must be at least 1, got 0"),
    ({"test_vectors": True}, TypeError, "test_vectors must be an integer, got True"),
    ({"sequence_length": 4000, "batch": 10**6}, ValueError, "batch and lengths are too large: .* bytes of output"),
]


@pytest.mark.parametrize("changes, error, match", BAD)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, layer, changes, error, match):
    with pytest.raises(error, match=match):
        quant.export(layer, tmp_path / "a.c", **{"sequence_length": 3, **changes})
    assert os.listdir(tmp_path) == []


def test_bad_layers_are_refused(tmp_path, layer):
    with pytest.raises(ValueError, match="static int8 layer for C, .* got a float MultiHeadAttention: quantize it first"):
        quant.export(random_float_layer(0), tmp_path / "a.c", sequence_length=3)
    with pytest.raises(ValueError, match="test_vectors must be left out but for a .c; got 3 for .*a.tflite"):
        quant.export(layer, tmp_path / "a.tflite", sequence_length=3, test_vectors=3)
    with pytest.raises(ValueError, match=r"scales too far apart for C: the .* projection multiplies by .*; below 2\*\*30"):
        quant.export(extreme_layer(np.random.default_rng(0), 1e12, [1], 0), tmp_path / "a.c", sequence_length=3)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.h", "a_test.c", "a_test.h"])
def test_what_lies_beside_is_replaced_only_if_it_was_exported(tmp_path, layer, name):
    for _ in range(2):
        quant.export(layer, tmp_path / "a.c", sequence_length=3, test_vectors=1)
    (tmp_path / name).write_text("/* quant.export wrote a.so */")
    before = (tmp_path / "a.c").read_text()
    with pytest.raises(ValueError, match=f"path must have another name than '.*a.c': {name} would be replaced, and is of no"):
        quant.export(layer, tmp_path / "a.c", sequence_length=4, test_vectors=1)
    assert (tmp_path / "a.c").read_text() == before
    assert (tmp_path / name).read_text() == "/* quant.export wrote a.so */"


def test_all_files_or_none(tmp_path, layer, monkeypatch):
    (tmp_path / "a.c").write_text("before")
    (tmp_path / "a.h").mkdir()
    with pytest.raises(IsADirectoryError, match="a.h: it is a folder"):
        quant.export(layer, tmp_path / "a.c", sequence_length=3)
    assert (tmp_path / "a.c").read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["a.c", "a.h"]
    (tmp_path / "a.h").rmdir()
    with pytest.raises(FileNotFoundError, match="No such file or directory: '.*nowhere/a.c'"):
        quant.export(layer, tmp_path / "nowhere" / "a.c", sequence_length=3)
    with pytest.raises(FileNotFoundError, match="No such file or directory: '.*nowhere/a.c'"):
        write_together({tmp_path / "nowhere" / "a.c": b""})
    with monkeypatch.context() as patch:
        replace = os.replace

        def fail_at_the_header(source, target):
            if str(target).endswith("a.h"):
                raise OSError("disk full")
            replace(source, target)

        patch.setattr("os.replace", fail_at_the_header)
        with pytest.raises(OSError, match="disk full"):
            quant.export(layer, tmp_path / "a.c", sequence_length=3)
    assert (tmp_path / "a.c").read_text() == "before"
    assert os.listdir(tmp_path) == ["a.c"]
    write_together({tmp_path / "a.c": b"after", tmp_path / "a.h": b"new"})
    assert [(tmp_path / name).read_text() for name in ("a.c", "a.h")] == ["after", "new"]
    assert sorted(os.listdir(tmp_path)) == ["a.c", "a.h"]
