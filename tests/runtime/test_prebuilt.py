"""Kernels that come compiled: which library is used and why, and that it gives what compiling here gives."""

import _ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import elf
import numpy as np
import pytest
from places import ROOT, TESTS

import edgeattn
from edgeattn.runtime import prebuilt, processor, sources
from edgeattn.runtime.targets import TARGETS, runnable
from quant.export import kernel_objects
from quant.export.kernels import build, chosen
from quant.export.linker import DEVICE_LIBRARIES, find_linker
from quant.export.targets import host_target

A53, A72, A76 = "0xd03", "0xd08", "0xd0b"
ARM_8_2 = set(TARGETS["cortex-a76"].requires)
ARM_8 = set(TARGETS["cortex-a53"].requires)


@pytest.mark.parametrize(("flags", "parts", "best"), [
    ({"fp", "asimd"}, set(), "aarch64"), (ARM_8, {A53}, "cortex-a53"), (ARM_8, {A72}, "cortex-a72"),
    (ARM_8, {A53, A72}, "aarch64"), (ARM_8, set(), "aarch64"), (ARM_8_2, {A76}, "cortex-a76"),
    (ARM_8_2, set(), "cortex-a76"), (ARM_8_2 - {"asimddp"}, {A76}, "aarch64")])
def test_a_pi_gets_no_instruction_it_lacks(flags, parts, best):
    assert runnable("aarch64", flags, parts)[-1] == best


def test_every_x86_target_needs_more_than_one_before_it():
    for name, row in TARGETS.items():
        if row.machine == "x86_64":
            assert runnable("x86_64", set(row.requires), set())[-1] == name
    assert not runnable("x86_64", {"sse"}, set()) and not runnable("armv7l", ARM_8_2, {A72})


@pytest.mark.parametrize(("text", "flags", "parts"), [
    ("flags\t: avx fma\nmodel name: x\nflags\t: fma sse\n", {"fma"}, set()), ("", set(), set()),
    ("CPU part\t: 0xd03\nCPU part\t: 0xd08\n", set(), {A53, A72})])
def test_cores_that_differ_can_do_what_all_can(monkeypatch, text, flags, parts):
    monkeypatch.setattr(processor, "_cpuinfo", lambda: text)
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    assert processor.flags() == flags and processor.parts() == parts


def test_targets_are_named_or_those_of_a_machine():
    assert chosen(["aarch64"]) == ["aarch64", "cortex-a53", "cortex-a72", "cortex-a76"]
    assert chosen(["cortex-a72", "x86-64-v2"]) == ["cortex-a72", "x86-64-v2"] and len(chosen(["x86_64"])) == 7
    with pytest.raises(ValueError, match="no target or machine is called armv7l; there are aarch64, cortex-a53"):
        chosen(["armv7l"])


KERNELS = ["norm", "linear float32"]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The library of this machine's best target, of two kernels."""
    try:
        find_linker(TARGETS[host_target()].machine)
    except RuntimeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("libraries")
    build([host_target()], folder, kernels=KERNELS)
    return folder


def test_a_library_asks_for_the_c_library_alone_of_any_version(libraries):
    found = elf.read((libraries / f"{host_target()}{prebuilt.SUFFIX}").read_bytes())
    assert found.machine == TARGETS[host_target()].machine
    assert set(found.needed) <= set(DEVICE_LIBRARIES) and not found.versioned
    assert min(found.alignments) >= 2**16  # pages of a Raspberry Pi 5 have 16 KiB, of other kernels 64
    assert not found.executable_stack


def test_the_same_sources_are_the_same_bytes(request, libraries, tmp_path, monkeypatch):
    if not request.config.getoption("--long"):
        pytest.skip("compiles once more: --long")
    monkeypatch.setattr(kernel_objects, "_kept", lambda *_: None)
    build([host_target()], tmp_path, kernels=KERNELS)
    for path in libraries.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def find(folder, isa=None, machine=None, flags=None):
    here = processor.platform.machine()
    return prebuilt.find(folder, machine or here, processor.flags() if flags is None else flags, processor.parts(), isa)


def changed(made, folder, **about):
    shutil.copytree(made, folder)
    path = folder / prebuilt.ABOUT
    path.write_text(json.dumps(json.loads(path.read_text()) | about))
    return folder


def test_a_library_of_these_sources_is_used(libraries):
    library, reason = find(libraries)
    assert library.target == host_target() and "best of those" in reason
    assert find(libraries, isa=TARGETS[host_target()].isa)[0] is not None
    with pytest.raises(RuntimeError, match="lacks edgeattn_fused_layer_float32; set EDGEATTN_JIT=1"):
        library.function("edgeattn_fused_layer_float32")


def test_no_other_is(libraries, tmp_path):
    name = f"{host_target()}{prebuilt.SUFFIX}"
    half = changed(libraries, tmp_path / "half")
    (half / name).write_bytes((libraries / name).read_bytes()[:-100])
    gone = changed(libraries, tmp_path / "gone")
    (gone / name).unlink()
    broken = changed(libraries, tmp_path / "broken")
    (broken / prebuilt.ABOUT).write_text("{")
    for folder, words in ((tmp_path / "nothing", "there are none in"), (half, "is damaged"),
                          (gone, "cannot be loaded"), (broken, "cannot be read"),
                          (changed(libraries, tmp_path / "old", stamp="0"), "made of other sources"),
                          (changed(libraries, tmp_path / "list", libraries=[]), "cannot be read")):
        library, reason = find(folder)
        assert library is None and words in reason, reason
    for options in ({"isa": "neon"}, {"machine": "riscv64"}, {"flags": set()}):
        library, reason = find(libraries, **options)
        assert library is None and "there is none for" in reason


def foreign(content):
    """A library for another machine, made of one for this."""
    content = bytearray(content)
    content[18:20] = (62 if content[18] == 183 else 183).to_bytes(2, "little")
    return bytes(content)


@pytest.mark.parametrize(("listed", "content", "words"), [
    (b"[" * 100_000, None, "cannot be read"), (b"[]", None, "cannot be read"), (b"\xff\xfe", None, "cannot be read"),
    (b"{\"stamp\": 1}", None, "cannot be read"), (None, b"", "cannot be loaded"), (None, b"text", "cannot be loaded"),
    (None, "foreign", "cannot be loaded"), (None, "short", "cannot be loaded"), (None, "folder", "cannot be loaded")])
def test_what_is_no_library_is_refused(tmp_path, listed, content, words):
    whole = Path(_ctypes.__file__).read_bytes()
    content = {"foreign": foreign(whole), "short": whole[:100]}.get(content, content)
    path = tmp_path / f"{host_target()}{prebuilt.SUFFIX}"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    checksums = {host_target(): prebuilt.checksum(content) if isinstance(content, bytes) else ""}
    about = json.dumps({"stamp": sources.stamp(), "libraries": checksums}).encode()
    (tmp_path / prebuilt.ABOUT).write_bytes(listed or about)
    library, reason = find(tmp_path)
    assert library is None and words in reason, reason


def test_where_one_is_refused_kernels_are_compiled_here(tmp_path):
    package, name = tmp_path / "edgeattn", f"{host_target()}{prebuilt.SUFFIX}"
    shutil.copytree(ROOT / "edgeattn", package, ignore=shutil.ignore_patterns("__pycache__", "libraries"))
    (package / "libraries").mkdir()
    content = Path(_ctypes.__file__).read_bytes()
    (package / "libraries" / name).write_bytes(content[:-1])
    (package / "libraries" / prebuilt.ABOUT).write_text(json.dumps(
        {"stamp": sources.stamp(), "libraries": {host_target(): prebuilt.checksum(content)}}))
    script = ("import edgeattn.cli; from edgeattn.runtime import compiler; edgeattn.cli.main(['info'])\n"
              "print(compiler.jit.__module__)")
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "EDGEATTN_JIT": "0", "EDGEATTN_ISA": "", "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "compiled here, by Numba: of libraries" in said and "is damaged" in said
    assert said.endswith("edgeattn.runtime.jit")


def test_sources_that_cannot_be_read_are_a_reason(tmp_path, monkeypatch):
    (tmp_path / prebuilt.ABOUT).write_text(json.dumps({"stamp": "", "libraries": {host_target(): ""}}))
    monkeypatch.setattr(sources, "stamp", lambda: Path("nowhere").read_bytes())
    library, reason = find(tmp_path)
    assert library is None and "cannot be read" in reason and "nowhere" in reason


def test_without_libraries_and_numba_an_import_says_what_is_missing(tmp_path):
    script = ("import sys; sys.modules['numba'] = sys.modules['llvmlite'] = None; import edgeattn\n"
              "try: edgeattn.MultiHeadAttention\n"
              "except ImportError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "EDGEATTN_JIT": "1"})
    assert done.stdout.startswith("edgeattn has no compiled kernels to use (EDGEATTN_JIT is set), and cannot compile them "
                                  "without Numba: pip install numba"), done.stderr


SCRIPT = """
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
sys.path[:0] = [{root!r}]

import edgeattn.cli, numpy as np
from edgeattn.runtime import prebuilt
x = np.load({x!r})
norm, linear = edgeattn.LayerNorm(np.linspace(1, 2, 48)), edgeattn.Linear(np.sin(np.arange(48 * 20).reshape(20, 48)))
np.savez({out!r}, norm(x), linear(x))
edgeattn.cli.main(["info"])
print(prebuilt.LIBRARY.target)
"""


@pytest.mark.parametrize(("asked", "absent"), [
    ("edgeattn.load, edgeattn.MultiHeadAttention", {"edgeattn.quantized", "edgeattn.kv_cache", "edgeattn.layers.encoder"}),
    ("from edgeattn.quantized import StaticMultiHeadAttention", {"edgeattn.kv_cache", "edgeattn.layers.multi_head"})])
def test_a_start_brings_in_what_it_uses(tmp_path, asked, absent):
    """Of what NumPy does not bring; any library does, for none of it is called."""
    package = tmp_path / "edgeattn"
    shutil.copytree(ROOT / "edgeattn", package, ignore=shutil.ignore_patterns("__pycache__", "libraries"))
    (package / "libraries").mkdir()
    content = Path(_ctypes.__file__).read_bytes()
    (package / "libraries" / f"{host_target()}{prebuilt.SUFFIX}").write_bytes(content)
    (package / "libraries" / prebuilt.ABOUT).write_text(json.dumps(
        {"stamp": sources.stamp(), "libraries": {host_target(): prebuilt.checksum(content)}}))
    script = ("import sys, numpy; before = set(sys.modules); sys.modules['numba'] = sys.modules['llvmlite'] = None\n"
              f"import edgeattn; {asked}; print(*set(sys.modules) - before)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "EDGEATTN_JIT": "0", "EDGEATTN_ISA": "", "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert "edgeattn.runtime.prebuilt" in found
    assert not found & (absent | {"_hashlib", "ctypes.util", "dataclasses", "pathlib", "secrets", "subprocess", "tempfile"})
    assert len(found) < 130


def test_it_gives_the_bytes_of_what_is_compiled_here_without_numba(libraries, tmp_path):
    package = tmp_path / "site" / "edgeattn"
    shutil.copytree(ROOT / "edgeattn", package, ignore=shutil.ignore_patterns("__pycache__", "libraries"))
    shutil.copytree(libraries, package / "libraries")
    x = np.random.default_rng(0).standard_normal((7, 48)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    script = SCRIPT.format(root=str(package.parent), x=str(tmp_path / "x.npy"),
                           out=str(tmp_path / "out.npz"))
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "EDGEATTN_JIT": "0", "EDGEATTN_ISA": "", "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == host_target()
    words = " ".join(done.stdout.split())
    assert "the best of those" in words and "CUDA not used: Numba is not installed" in words
    norm, linear = edgeattn.LayerNorm(np.linspace(1, 2, 48)), edgeattn.Linear(np.sin(np.arange(48 * 20).reshape(20, 48)))
    made = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(made["arr_0"], norm(x))
    np.testing.assert_array_equal(made["arr_1"], linear(x))


WITHOUT_NUMBA = ("import runpy, sys; sys.modules.update(dict.fromkeys(('numba', 'llvmlite', 'safetensors'))); "
                 "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")


def test_every_kernel_gives_the_bytes_of_those_compiled_here_without_numba(request, tmp_path):
    """Layers in every format, functions, masks, caches, encoders, threads, need_weights: tests/call_hashes.py."""
    made = prebuilt.FOLDER
    if find(made)[0] is None:
        if not request.config.getoption("--long"):
            pytest.skip("compiles every kernel once more: --long, or make libraries before")
        made = tmp_path / "made"
        build([host_target()], made)
    package = tmp_path / "site" / "edgeattn"
    shutil.copytree(ROOT / "edgeattn", package, ignore=shutil.ignore_patterns("__pycache__", "libraries"))
    shutil.copytree(made, package / "libraries")

    def said(path, jit, *start):
        done = subprocess.run([sys.executable, *start, TESTS / "call_hashes.py", tmp_path / "calls"], cwd=tmp_path,
                              capture_output=True, text=True,
                              env={**os.environ, "EDGEATTN_JIT": jit, "EDGEATTN_ISA": "", "PYTHONPATH": str(path)})
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    here, found = said(ROOT, "1"), said(package.parent, "0", "-c", WITHOUT_NUMBA)
    assert found[0] == f"# kernels: {host_target()}" and found[1:] == here[1:] and len(here) > 20


def test_the_stamp_is_of_the_sources(tmp_path):
    one, two = tmp_path / "a.py", tmp_path / "b.py"
    one.write_text("x")
    two.write_text("y")
    first = sources.checksum([one, two])
    two.write_text("z")
    assert sources.checksum([one, two]) != first and sources.checksum([two, one]) != first
