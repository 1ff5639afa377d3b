"""Layers with their kernels in a file: the bytes of the compiled form without Numba, from Python and C, and what is refused."""
import json
import os
import pickle
import platform
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import executors
import numpy as np
import pytest
from bundle_ways import targets_here, ways
from compiling import looks_at_compiling
from laws import LAWS
from places import ROOT
from tflite_graphs import random_scaling
from workbench import needs_compiler, random_input, random_layer

import edgeattn
import quant
from edgeattn import bundle
from edgeattn.kernels.cpu import call as kernel_call
from edgeattn.kernels.cpu.entries import ENTRIES
from edgeattn.kinds import KINDS
from edgeattn.runtime import isa, prebuilt, processor, sources
from edgeattn.runtime.targets import TARGETS
from quant.export import linker
from quant.export.bundle import kernels_of

X86 = platform.machine() == "x86_64"
# A folder that export_all filled on another machine, named by its target: what `make test-arm64` does.
GIVEN = os.environ.get("TEST_BUNDLES")
HERE = targets_here()
HOST = Path(GIVEN).name if GIVEN else HERE.get(isa.ISA.name)
FLOATS = ("float32", "dynamic", "encoder")
MASKED = "static-tflm"  # the one that carries a mask, and scales queries and keys by tables


def static_layer(arithmetic, **options):
    layer = random_layer(3, **options)
    calls = [{"query": x, "is_causal": True} for x in random_input(0, 4, 2, 9, 32)]
    return quant.quantize(layer, quant.calibrate(layer, calls), arithmetic=arithmetic)


def scaled(layer):
    """With a MUL of queries and of keys, as other converters write it."""
    rng = np.random.default_rng(6)
    return layer._replace(**{f"{name}_ops": (random_scaling(rng, layer.tensors[name]),) for name in ("query", "key")})


def cross_layer():
    """Three inputs of their own, grouped heads, widths that fill no vector."""
    return random_layer(5, H=6, Hkv=2, D=7, Dv=5, E=30, kdim=19, vdim=23)


def encoder():
    """A whole one in int8."""
    rng = np.random.default_rng(8)
    linear = [edgeattn.Linear(rng.standard_normal(shape).astype(np.float32)) for shape in ((64, 32), (32, 64))]
    norms = [edgeattn.LayerNorm(np.linspace(1, 2, 32)) for _ in range(2)]
    layer = edgeattn.TransformerEncoderLayer(random_layer(3), edgeattn.FeedForward(*linear), *norms)
    return quant.quantize(edgeattn.TransformerEncoder([layer, layer]), scheme="dynamic")


# What is exported, and how it is made.
LAYERS = {
    "static-litert": lambda: static_layer("litert"),
    MASKED: lambda: scaled(static_layer("tflm")).with_mask(np.tri(9, dtype=bool)),
    "float32": cross_layer,
    "dynamic": lambda: quant.quantize(cross_layer(), scheme="dynamic"),
    "encoder": encoder,
}


def calls_of(name):
    """Keyword arguments of calls whose results are compared."""
    rng = np.random.default_rng(7)
    if name == "encoder":
        return [{"x": rng.standard_normal((2, 5, 32)).astype(np.float32)}]
    masks = [{}, {"is_causal": True}, {"attn_mask": rng.random((2, 1, 9, 9)) < 0.6},
             {"attn_mask": rng.random((1, 9)) < 0.6, "key_padding_mask": rng.random((2, 9)) < 0.6}]
    if name.startswith("static"):
        codes = rng.integers(-128, 128, (2, 9, 32)).astype(np.int8)
        calls = [{"query": codes, **mask} for mask in masks]
        if name != MASKED:
            longer = rng.integers(-128, 128, (1, 70, 32)).astype(np.int8)
            calls += [{"query": longer}, {"query": longer[0], "is_causal": True}, {"query": codes[:, :1]}]
        return calls
    heads = rng.standard_normal((6, 9, 9)).astype(np.float32)
    masks += [{"window_size": (2, 1)}, {"attn_mask": heads}, {"alibi_slopes": np.float32(2) ** -np.arange(6.0, dtype="f")},
              {"attn_mask": np.zeros((9, 9), bool)}]

    def inputs(B, L, S):
        return {n: rng.standard_normal((B, s, e)).astype(np.float32)
                for n, s, e in (("query", L, 30), ("key", S, 19), ("value", S, 23))}

    calls = [{**inputs(2, 9, 9), **mask} for mask in masks]
    calls += [inputs(1, 3, 300), {**inputs(1, 70, 33), "is_causal": True, "causal_alignment": "lower_right"}, inputs(2, 1, 1)]
    return calls + [{n: x[0] for n, x in inputs(1, 5, 4).items()}, inputs(2, 4, 0)]


def export_all(folder, target, floats=FLOATS):
    """Bundles of all layers, or of the static ones and some others, in a folder; the calls to make; the codes to come."""
    made = {name: make() for name, make in LAYERS.items() if name not in FLOATS or name in floats}
    for name, layer in made.items():
        if not (folder / f"{name}.so").exists():
            quant.export(layer, folder / f"{name}.so", target=target)
    (folder / "calls").write_bytes(pickle.dumps({name: calls_of(name) for name in made}))
    codes = {name: [*(layer.run_int8(**call) for call in calls_of(name)), *ways(name, layer)]
             for name, layer in made.items() if name not in FLOATS}
    (folder / "codes").write_bytes(pickle.dumps(codes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundles of all layers for this machine."""
    if GIVEN:
        return Path(GIVEN)
    needs_compiler()
    folder = tmp_path_factory.mktemp("bundles")
    export_all(folder, HOST)
    return folder


@pytest.fixture(scope="module", autouse=True)
def kernels_of_bundles():
    """Those that this process would run are asked for again; afterwards it compiles all of them, as other tests mean it."""
    kernel_call.entry.cache_clear()
    yield
    prebuilt._ADDED.clear()
    kernel_call.entry.cache_clear()


def python(code, *arguments, **environment):
    environment = {"EDGEATTN_JIT": "0", "EDGEATTN_ISA": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


# For a process where the packages that a device lacks cannot be imported, and no library is installed.
WITHOUT_NUMBA = """
import pickle, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numba", "llvmlite", "safetensors", "quant"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from edgeattn.runtime import prebuilt
prebuilt.LIBRARY = None
from edgeattn.bundle import load
"""
RUN_ALL = WITHOUT_NUMBA + """
folder, results_path = sys.argv[1:]
with open(f"{folder}/calls", "rb") as file:
    calls = pickle.load(file)
first = load(f"{folder}/{next(iter(calls))}.so")
import edgeattn, numpy as np
from bundle_ways import ways
edgeattn.threads.SMALLEST_SHARED_WORK = 0
results = {}
for name, some in calls.items():
    layer = load(f"{folder}/{name}.so")
    run = layer.run_int8 if name.startswith("static") else layer
    results[name] = [run(**call) for call in some for _ in range(2)][::2]  # the second call has a used scratch
    results[name] += ways(name, layer)
    edgeattn.set_num_threads(2)
    for one, other in zip(results[name], [*(run(**call) for call in some), *ways(name, layer)], strict=True):
        np.testing.assert_array_equal(one, other)
    edgeattn.set_num_threads(1)
with open(results_path, "wb") as file:
    pickle.dump(results, file)
"""
# What the kernels give that are compiled when they are called: floats depend on the instruction set, codes do not.
COMPILED_HERE = """
import pickle, sys
import test_bundle as t
name, results_path = sys.argv[1:]
layer = t.LAYERS[name]()
with open(results_path, "wb") as file:
    pickle.dump([layer(**call) for call in t.calls_of(name)] + ([] if t.GIVEN else t.ways(name, layer)), file)
"""


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """name -> what the bundle of that name gives, loaded without Numba."""
    path = tmp_path_factory.mktemp("results") / "results"
    python(RUN_ALL, folder, path)
    return pickle.loads(path.read_bytes())


def assert_same_bytes(name, ours, theirs):
    for i, (one, other) in enumerate(zip(ours[:len(theirs)], theirs, strict=True)):
        np.testing.assert_array_equal(one, other, err_msg=f"{name}, call {i}")
        assert one.dtype == other.dtype


def test_codes_are_those_of_the_kernels(folder, results):
    codes = pickle.loads((folder / "codes").read_bytes())
    assert set(results) - set(FLOATS) == set(codes) == set(LAYERS) - set(FLOATS)
    for name in codes:
        assert_same_bytes(name, results[name], codes[name])


@looks_at_compiling
@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_those_of_the_kernels_compiled_here(results, tmp_path, name):
    python(COMPILED_HERE, name, tmp_path / "floats", EDGEATTN_JIT="1", EDGEATTN_ISA=TARGETS[HOST].isa)
    assert_same_bytes(name, results[name], pickle.loads((tmp_path / "floats").read_bytes()))


@pytest.mark.skipif(not GIVEN or HOST == "cortex-a76", reason="needs bundles for a processor older than this one: make test-arm64")
def test_a_bundle_for_a_newer_processor_is_refused(folder):
    with pytest.raises(ValueError, match="is for cortex-a76; this processor lacks asimddp, .*: export the layer for another target"):
        bundle.load(rewritten(folder / "static-litert.so", folder / "newer.so", target="cortex-a76", requires=TARGETS["cortex-a76"].requires))


@pytest.mark.parametrize("instructions", [name for name in ("avx512vnni", "avx2vnni", "avx2") if HERE.get(name, HOST) != HOST])
def test_other_instruction_sets_of_this_machine_give_the_same_codes(tmp_path, instructions):
    needs_compiler()
    layer = static_layer("litert")
    path = quant.export(layer, tmp_path, target=HERE[instructions])  # a folder
    assert path == tmp_path / f"attention-{HERE[instructions]}.so" and path.with_suffix(".h").exists()
    loaded = bundle.load(path)
    for call in calls_of("static-litert"):
        np.testing.assert_array_equal(loaded.run_int8(**call), layer.run_int8(**call))


def test_a_static_bundle_takes_and_gives_reals_as_the_layer(folder):
    layer, loaded = static_layer("litert"), bundle.load(folder / "static-litert.so")
    x = random_input(1, 2, 9, 32) * 3
    x[0, 4, 1] = np.nan
    for dtype in (np.float32, np.float64, np.float16):
        for masks in ({}, {"is_causal": True}, {"key_padding_mask": np.arange(9) != np.full((2, 1), 4)}):
            found, wanted = (one(x.astype(dtype), **masks) for one in (loaded, layer))
            np.testing.assert_array_equal(found, wanted)
            assert found.dtype == wanted.dtype
    out = np.empty((2, 9, 32), np.float32)
    assert loaded(x, out=out) is out
    assert repr(loaded) == repr(layer)
    assert isinstance(loaded, bundle.StaticBundle) and not isinstance(loaded, bundle.FloatBundle)
    assert isinstance(bundle.load(folder / "dynamic.so"), bundle.FloatBundle)
    assert bundle.read_description(folder / "static-litert.so")["target"] == HOST
    with pytest.raises(AttributeError, match="has no attribute 'IntBundle'"):
        bundle.IntBundle  # noqa: B018


class Bundle(executors.Layer):
    """What export_all made of a layer."""

    def inputs(self, B, L, S):
        return [random_input(i, B, *shape) for i, shape in enumerate(((L, 30), (S, 19), (S, 23)))]

    def nothing(self):
        return cross_layer().out_bias


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", FLOATS[:2])
def test_laws(folder, name, law):
    law(Bundle(name, made=bundle.load(folder / f"{name}.so"), **executors.SHARED if name == "dynamic" else {}))


def test_threads_may_call_one_bundle_at_once(folder):
    loaded, calls = bundle.load(folder / "float32.so"), calls_of("float32")[:8]
    alone = [loaded(**call) for call in calls]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            for one, other in zip(threads.map(lambda call: loaded(**call), calls), alone, strict=True):
                np.testing.assert_array_equal(one, other)


def test_what_now_lies_at_a_path_is_loaded(folder, tmp_path):
    """The C library keeps what it loaded from a path, and gives it again for that path."""
    path, calls = tmp_path / "a.so", calls_of("static-litert")[0]
    shutil.copy(folder / "static-litert.so", path)
    first = bundle.load(path)
    shutil.copy(folder / "float32.so", tmp_path / "b.so")
    os.replace(tmp_path / "b.so", path)
    floats = calls_of("float32")[0]
    second = bundle.load(path)
    np.testing.assert_array_equal(second(**floats), bundle.load(folder / "float32.so")(**floats))
    codes = first.run_int8(**calls)
    np.testing.assert_array_equal(codes, bundle.load(folder / "static-litert.so").run_int8(**calls))
    with open(path, "r+b") as file:  # not cut off first, which would take away what the loaded library runs on
        file.write(rewritten(path, tmp_path / "b.so", edgeattn="9" * len(edgeattn.__version__)).read_bytes())
    with pytest.raises(ValueError, match="a.so was written over in place since this process loaded it; write a new file"):
        bundle.load(path)


# -- from C --------------------------------------------------------------------------------------------------------------

PROGRAM = r"""
#include "static-litert.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 9, B = 2 };

int main(void)
{
    static int8_t x[B * N * STATIC_LITERT_QUERY_WIDTH], y[B * N * STATIC_LITERT_OUTPUT_WIDTH];
    static const uint8_t keep[B * N] = {1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0};
    if (!static_litert_supported()) return 10;
    int64_t bytes = static_litert_scratch_bytes(B, N, N, 1);
    if (bytes <= 0 || bytes % 64 || static_litert_scratch_bytes(0, N, N, 0) != -1) return 11;
    unsigned char *scratch = aligned_alloc(64, (size_t)bytes + 64);
    memset(scratch, 0xff, (size_t)bytes + 64);
    if (fread(x, 1, sizeof x, stdin) != sizeof x) return 12;
    static_litert_call call = {0};
    call.abi = STATIC_LITERT_ABI;
    call.batch = B, call.queries = N, call.keys = N;
    call.query = call.key = call.value = x;
    call.output = y;
    call.keep = keep, call.keep_strides[0] = N, call.keep_strides[3] = 1;
    call.banded = 1, call.low = -N, call.high = 0;
    call.scratch = scratch, call.scratch_bytes = bytes - 1;
    if (static_litert_run(&call) != STATIC_LITERT_BAD_SCRATCH) return 13;
    call.scratch_bytes = bytes, call.scratch = scratch + 1;
    if (static_litert_run(&call) != STATIC_LITERT_BAD_SCRATCH) return 14;
    call.scratch = scratch, call.abi = STATIC_LITERT_ABI + 1;
    if (static_litert_run(&call) != STATIC_LITERT_BAD_ABI) return 15;
    call.abi = STATIC_LITERT_ABI, call.keys = 0;
    if (static_litert_run(&call) != STATIC_LITERT_BAD_SHAPE) return 16;
    call.keys = N, call.output = NULL;
    if (static_litert_run(&call) != STATIC_LITERT_BAD_POINTER) return 17;
    for (size_t i = 0; i < sizeof y; i++) if (y[i]) return 18;
    call.output = y;
    if (static_litert_run(&call) != STATIC_LITERT_OK) return 19;
    for (int i = 0; i < 64; i++) if (scratch[bytes + i] != 0xff) return 20;
    free(scratch);
    fwrite(y, 1, sizeof y, stdout);
    return 0;
}
"""


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_c_program_gets_the_same_codes(folder, tmp_path, compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}: apt-get install {compiler}")
    (tmp_path / "main.c").write_text(PROGRAM)
    built = subprocess.run([compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-Wpedantic", "-Wconversion", "-I", folder, "main.c",
                            folder / "static-litert.so", f"-Wl,-rpath,{folder}", "-o", "main"], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    codes = np.random.default_rng(3).integers(-128, 128, (2, 9, 32)).astype(np.int8)
    ran = subprocess.run([tmp_path / "main"], input=codes.tobytes(), capture_output=True)
    assert ran.returncode == 0
    keep = np.arange(9) < np.array([[4], [7]])
    expected = static_layer("litert").run_int8(codes, key_padding_mask=keep, is_causal=True)
    np.testing.assert_array_equal(np.frombuffer(ran.stdout, np.int8).reshape(2, 9, 32), expected)


# -- for other machines ------------------------------------------------------------------------------------------------


def test_a_bundle_for_another_machine_is_made_and_refused(tmp_path, monkeypatch):
    needs_compiler(machine := "aarch64" if X86 else "x86_64")
    target = "cortex-a76" if X86 else "x86-64-v3"
    monkeypatch.setattr(sys.modules["quant.export.bundle"], "kernels_of", lambda _: ["quantize"])  # others take minutes
    quant.export(encoder(), tmp_path / "attention-π5.so", target=target)
    written = (tmp_path / "attention-π5.so").read_bytes()
    assert written[:4] == b"\x7fELF"
    assert struct.unpack("<H", written[18:20])[0] == (183 if X86 else 62)  # e_machine: EM_AARCH64, EM_X86_64
    with pytest.raises(ValueError, match=rf"attention-π5.so is for {machine} \({target}\); this machine is"):
        bundle.load(tmp_path / "attention-π5.so")


def test_targets_name_instruction_sets_and_flags_that_exist():
    rows = {table.name: table for table in isa.TABLES}
    for name, target in TARGETS.items():
        assert target.isa == "generic" or rows[target.isa].x86 == (target.machine == "x86_64"), name
        if target.machine == "aarch64":
            assert set(target.requires) <= set(processor.HARDWARE_BITS), name
        else:  # LLVM's names of what the tiles need, as Linux spells them
            spelled = {"avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni", "amx-tile": "amx_tile", "amx-int8": "amx_int8"}
            assert {spelled.get(need, need) for need in rows[target.isa].needs} <= set(target.requires), name


# -- what is refused -----------------------------------------------------------------------------------------------------


def rewritten(path, to, **changes):
    """A bundle with another description and the right checksum."""
    content = path.read_bytes()
    _, size, _ = bundle.FOOTER.unpack(content[-bundle.FOOTER.size:])
    library = content[:-bundle.FOOTER.size - size]
    body = library + json.dumps({**bundle.read_description(path), **changes}).encode()
    to.write_bytes(body + bundle.FOOTER.pack(bundle.MAGIC, len(body) - len(library), bundle.zlib.crc32(body)))
    return to


def description(**changes):
    """A right one of no layer."""
    return {"abi": 2, "machine": platform.machine(), "requires": [], "target": HOST, "edgeattn": "1", "stamp": sources.stamp(),
            "kernels": ["no_kernel"], "layer": [0, 0], **changes}


@pytest.mark.parametrize("changes", [
    {"abi": "1"}, {"machine": 3}, {"target": None}, {"target": "x"}, {"target": ["x"]}, {"requires": "sse"}, {"requires": [1]},
    {"edgeattn": None}, {"stamp": 1}, {"kernels": "x"}, {"kernels": [None]}, {"layer": 3}, {"layer": [1]}, {"layer": [0, -1]},
    {"layer": [0.0, 1]}])
def test_a_wrong_description_is_refused_before_the_library_is_loaded(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(bundle, "map_file", lambda *_: pytest.fail("loaded"))
    body = b"no library" + json.dumps(description(**changes)).encode()
    (tmp_path / "a.so").write_bytes(body + bundle.FOOTER.pack(bundle.MAGIC, len(body) - 10, bundle.zlib.crc32(body)))
    with pytest.raises(ValueError, match="a.so is no bundle that quant.export wrote: .* in its description must be"):
        bundle.load(tmp_path / "a.so")


def test_a_service_that_loads_what_is_rewritten_keeps_no_files_open(folder, tmp_path):
    """Neither files nor mappings of what is no longer used, and no more than its mappings of what is."""
    print(python("""
import gc, os, resource, shutil, sys
from edgeattn.bundle import load
source, path = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
kept = []
def mapped():
    with open("/proc/self/maps") as lines:
        return sum(path in line for line in lines)
for keep in (True, False):
    before = mapped()
    for _ in range(40):
        shutil.copy(source, path + ".new")
        os.replace(path + ".new", path)
        loaded = load(path)
        assert loaded.embed_dim > 0
        if not kept:  # the kernels of the first are those of all
            kept.append(loaded)
            before = mapped()
        if keep:
            kept.append(loaded)
    del loaded
    gc.collect()
    assert mapped() == before + 39 * keep, (before, mapped())
""", folder / "float32.so", tmp_path / "a.so"))


def test_what_cannot_run_here_is_refused_before_it_is_loaded(folder, tmp_path, monkeypatch):
    path = folder / "static-litert.so"
    changed = {"abi": (1, "has ABI version 1, and this edgeattn reads 2; export it again"),
               "machine": ("riscv64", r"is for riscv64 \(.*\); this machine is"),
               "requires": (["avx9000", *bundle.read_description(path)["requires"]], "this processor lacks avx9000: export the layer")}
    monkeypatch.setattr(bundle, "map_file", lambda *_: pytest.fail("loaded"))
    for key, (value, message) in changed.items():
        with pytest.raises(ValueError, match=message):
            bundle.load(rewritten(path, tmp_path / "a.so", **{key: value}))


@pytest.mark.parametrize("damage, message", [
    (lambda b: b[:-1], "is no bundle that quant.export wrote, or its end is missing"),
    (lambda b: b[:10], "is no bundle"), (lambda b: b"", "is no bundle"), (lambda b: b[:2000] + bytes([b[2000] ^ 1]) + b[2001:], "is damaged"),
    (lambda b: b[100:], "is damaged"), (lambda b: b[:-20] + b"\xff\xff\xff\xff" + b[-16:], "is no bundle|is damaged"),
    (lambda b: b"x" + b[-24:-8] + b"\xff\xff\xff\x7f" + b[-4:], "is damaged")])
def test_damaged_files_are_refused(folder, tmp_path, damage, message):
    (tmp_path / "a.so").write_bytes(damage((folder / "float32.so").read_bytes()))
    with pytest.raises(ValueError, match=f"a.so {message}"):
        bundle.load(tmp_path / "a.so")


def test_a_library_that_does_not_load_is_refused(tmp_path):
    body = b"no library" + json.dumps(description()).encode()
    (tmp_path / "a.so").write_bytes(body + bundle.FOOTER.pack(bundle.MAGIC, len(body) - 10, bundle.zlib.crc32(body)))
    with pytest.raises(ValueError, match="a.so cannot be loaded"):
        bundle.load(tmp_path / "a.so")
    with pytest.raises(TypeError, match="path must be a string or a path, got int"):
        bundle.load(3)
    with pytest.raises(FileNotFoundError):
        bundle.load(tmp_path / "b.so")


@pytest.mark.parametrize("call, error, message", [
    ({"query": np.zeros((2, 9, 31), np.float32)}, ValueError, "query must have a last axis of 30"),
    ({"query": np.zeros((1, 2, 9, 30), np.float32)}, ValueError, r"query must be \(B, L, E\) or \(L, E\)"),
    ({"query": np.zeros((2, 9, 30), np.int32)}, TypeError, "query must be a float16, float32 or float64 array"),
    ({"key": np.zeros((1, 9, 19), np.float32)}, ValueError, "key must have query's batch axes"),
    ({"value": np.zeros((2, 8, 23), np.float32)}, ValueError, "value must have as many rows as key, S = 9"),
    ({"key": None}, ValueError, "value needs key, got key=None"),
    ({"out": np.zeros((2, 9, 29), np.float32)}, ValueError, "out must have shape"),
    ({"key_padding_mask": np.ones((2, 8), bool)}, ValueError, "key_padding_mask must have shape"),
])
def test_float_calls_that_do_not_fit_are_refused(folder, call, error, message):
    with pytest.raises(error, match=message):
        bundle.load(folder / "float32.so")(**{**calls_of("float32")[0], **call})


@pytest.mark.parametrize("call, error, message", [
    ({"query": np.zeros((2, 9, 32), np.float32)}, TypeError, "query must be int8; got float32 \\(floats go to the call itself\\)"),
    ({"key": np.zeros((2, 9, 32), np.int8)}, ValueError, "key must be left out: this layer was quantized with query as its key"),
    ({"attn_mask": np.zeros((9, 9), np.float32)}, TypeError, "attn_mask must be bool for int8"),
    ({"query": np.zeros((2, 8, 32), np.int8)}, ValueError, r"the mask this layer carries has shape \(1, 1, 9, 9\)"),
])
def test_int8_calls_that_do_not_fit_are_refused(folder, call, error, message):
    with pytest.raises(error, match=message):
        bundle.load(folder / f"{MASKED}.so").run_int8(**{**calls_of(MASKED)[0], **call})


# -- kernels that cannot be used here --------------------------------------------------------------------------------------


def other_target():
    """Of this machine, whose kernels this process's cannot stand beside."""
    return next(name for name, row in TARGETS.items() if row.machine == platform.machine() and row.isa != isa.ISA.name)


@pytest.mark.parametrize("changes, why", [
    (lambda: {"stamp": "0", "edgeattn": "9.9"}, "it was made by edgeattn 9.9, of other sources than these"),
    (lambda: {"target": other_target(), "requires": []}, "its kernels are written for .*, those of this process for"),
])
def test_other_kernels_stand_in_and_that_is_said(folder, tmp_path, caplog, changes, why):
    path = rewritten(folder / "static-litert.so", tmp_path / "a.so", **changes())
    loaded = bundle.load(path)
    assert re.search(f"kernels of .*a.so are not used, this process has others: {why}", caplog.text)
    call = calls_of("static-litert")[0]
    np.testing.assert_array_equal(loaded.run_int8(**call), static_layer("litert").run_int8(**call))


def test_without_others_it_is_refused(folder, tmp_path):
    """And so is what a layer that is no bundle calls, where only bundles brought kernels."""
    path = rewritten(folder / "static-litert.so", tmp_path / "a.so", stamp="0")
    print(python(WITHOUT_NUMBA + """
path, other = sys.argv[1:]
try:
    load(path)
except ValueError as error:
    assert "there are no others: it was made by edgeattn" in str(error) and "export it again with" in str(error), error
else:
    raise SystemExit("loaded")
load(other)
assert prebuilt.LIBRARY.path.endswith("/static-tflm.so")
import edgeattn, numpy as np
try:
    edgeattn.Linear(np.ones((3, 3)))(np.ones((2, 3), np.float32))
except RuntimeError as error:
    assert "static-tflm.so lacks edgeattn_linear_float32_linear_float32; set EDGEATTN_JIT=1" in str(error), error
else:
    raise SystemExit("computed")
""", path, folder / "static-tflm.so"))


# -- what is exported ------------------------------------------------------------------------------------------------------


def test_a_bundle_has_the_kernels_its_layer_calls():
    float32, static = random_layer(1), static_layer("litert")
    assert kernels_of(static) == ["layer int8", "layer int8 with a cache", "quantize", "dequantize"]
    assert {"layer float32", "decode int8"} < set(kernels_of(float32)) and "norm" not in kernels_of(float32)
    assert {"layer dynamic", "norm", "feed-forward dynamic"} < set(kernels_of(encoder()))
    assert not {"decode int8", "layer float32", "layer int8"} & set(kernels_of(encoder()))
    # every kernel is that of some kind of layer, but for the function's
    assert set(ENTRIES) - {name for kind in KINDS.values() for name in kind.kernels} == {"attention dynamic"}


def test_what_c_cannot_call_has_no_header(folder, tmp_path):
    w = np.ones((8, 8), np.float32)
    layer = edgeattn.MultiHeadAttention(2, w, w, w, add_zero_attn=True)
    quant.export(layer, tmp_path / "a.so", target=HOST)
    assert os.listdir(tmp_path) == ["a.so"]
    x = random_input(1, 1, 3, 8)
    np.testing.assert_array_equal(bundle.load(tmp_path / "a.so")(x), layer(x))
    assert not (folder / "encoder.h").exists() and (folder / "dynamic.h").exists()
    assert "int32_t static_tflm_run(const static_tflm_call *call);" in (folder / "static-tflm.h").read_text(encoding="utf-8")


@pytest.mark.parametrize("name, options, message", [
    ("a.so", {"target": "cortex-m4"}, "target must be one of aarch64, cortex-a53, cortex-a72, .*; got 'cortex-m4'"),
    ("", {"target": "cortex-m4"}, "target must be one of aarch64, cortex-a53, cortex-a72, .*; got 'cortex-m4'"),
    ("a.so", {"target": ["cortex-a72"]}, r"target must be one of .*; got \['cortex-a72'\]"),
    ("a.so", {}, "target must name the processor of a .so, one of aarch64, .*; it is missing for"),
    ("a.safetensors", {"target": "cortex-a72"}, "target must be left out but for a .so; got 'cortex-a72'"),
    ("7.so", {"target": "cortex-a72"}, "path must be named by a letter and what follows it, .*; got '7.so'"),
    ("Math.so", {"target": "cortex-a72"}, "path must not be named like a header, math.h, that C files include; got 'Math'"),
    ("a.so", {"target": "cortex-a72", "mask": np.ones((9, 9), bool)}, "mask must be left out for a float layer in a .so file"),
])
def test_what_cannot_be_exported_is_refused(tmp_path, name, options, message):
    layer = random_layer(1)
    with pytest.raises(ValueError, match=message):
        quant.export(layer, tmp_path / name, **options)
    assert os.listdir(tmp_path) == []


def test_without_a_linker_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(linker.shutil, "which", lambda name: None)
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="target needs a linker for aarch64, and there is none: apt-get install lld"):
        quant.export(random_layer(1), tmp_path / "a.so", target="cortex-a72")
    with pytest.raises(FileNotFoundError, match="No such file or directory: '.*nowhere/a.so'"):
        quant.export(random_layer(1), tmp_path / "nowhere" / "a.so", target="cortex-a72")
    assert os.listdir(tmp_path) == []


def test_the_header_of_another_export_is_not_replaced(tmp_path):
    static = static_layer("tflm")
    quant.export(static, tmp_path / "a.c", sequence_length=9)
    with pytest.raises(ValueError, match="path must have another name than '.*a.so': a.h would be replaced, and is of no earlier"):
        quant.export(static, tmp_path / "a.so", target="cortex-a72")
    assert sorted(os.listdir(tmp_path)) == ["a.c", "a.h"]


def test_every_linker_is_known(monkeypatch):
    there = {"ld.lld"}
    monkeypatch.setattr(linker.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(linker.platform, "machine", lambda: "x86_64")
    assert linker.find_linker("aarch64") == ["ld.lld"]
    there = {"aarch64-linux-gnu-ld", "ld"}
    assert linker.find_linker("aarch64") == ["aarch64-linux-gnu-ld"]
    assert linker.find_linker("x86_64") == ["ld"]
    there = {"ld"}
    assert linker.find_linker("aarch64") == [sys.executable, "-m", "ziglang", "ld.lld"]


def test_a_linker_that_fails_says_why(tmp_path):
    needs_compiler()
    with pytest.raises(RuntimeError, match="failed: .*libc.so.6.o"):
        linker.link(platform.machine(), tmp_path, "a.so", ["a_run"])


def test_another_numba_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("numba.__version__", "0.99.1")
    with pytest.raises(RuntimeError, match="target leans on inner names of Numba 0.68, and this is Numba 0.99.1: pip install 'numba==0.68"):
        quant.export(random_layer(1), tmp_path / "a.so", target="cortex-a72")
    assert os.listdir(tmp_path) == []


def test_instructions_are_chosen_before_kernels_are_imported():
    with pytest.raises(RuntimeError, match=r"isa.use\('neon'\) must come before the first import of a kernel"):
        isa.use("neon")


def test_a_failed_compilation_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    needs_compiler()
    monkeypatch.setattr(sys.modules["quant.export.bundle"], "_BUILD", "raise ValueError('no such luck')")
    with pytest.raises(RuntimeError, match=f"compiling for {HOST} failed: ValueError: no such luck"):
        quant.export(random_layer(1), tmp_path / "a.so", target=HOST)
    assert os.listdir(tmp_path) == []
