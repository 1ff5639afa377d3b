"""Wheels that bring compiled kernels: their tags, their RECORD, the same bytes twice; what pip says where there is none."""

import csv
import importlib.util
import os
import runpy
import struct
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
from places import ROOT

PURE = {"edgeattn/__init__.py": b"__version__ = '1'\n", "quant/__init__.py": b"", "edgeattn-1.dist-info/RECORD": b"old",
        "edgeattn-1.dist-info/WHEEL": b"Root-Is-Purelib: true\nTag: py3-none-any\n",
        "edgeattn-1.dist-info/METADATA": b"Metadata-Version: 2.1\nName: edgeattn\nVersion: 1\n"}


@pytest.fixture(scope="module")
def wheel():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        spec = importlib.util.spec_from_file_location("wheel_builder", ROOT / "tools" / "wheel.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return module


def made(wheel, folder, name="made"):
    libraries = folder / f"{name} libraries"
    libraries.mkdir()
    for file in ("x86-64-v3.so", "libraries.json", "x86-64-v2.so")[::-1 if name == "again" else 1]:
        (libraries / file).write_bytes(file.encode())
    title, files = wheel.with_libraries(PURE, "x86_64", libraries)
    (folder / name).mkdir()
    wheel.write(folder / name / title, files)
    return folder / name / title


def test_a_wheel_says_what_machine_it_is_for_and_pip_takes_it(wheel, tmp_path):
    path = made(wheel, tmp_path)
    assert path.name == "edgeattn-1-py3-none-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path) as archive:
        about = archive.read("edgeattn-1.dist-info/WHEEL").decode().splitlines()
        record = archive.read("edgeattn-1.dist-info/RECORD").decode().splitlines()
        assert archive.testzip() is None and {row[0] for row in csv.reader(record)} == set(archive.namelist())
    assert "Root-Is-Purelib: false" in about and "Tag: py3-none-manylinux_2_28_x86_64" in about
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", tmp_path / "site",
                           "--platform", "manylinux_2_28_x86_64", "--only-binary=:all:", path],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "edgeattn" / "libraries" / "x86-64-v3.so").read_bytes() == b"x86-64-v3.so"


def test_the_same_files_are_the_same_bytes(wheel, tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    first = made(wheel, tmp_path).read_bytes()
    assert made(wheel, tmp_path, "again").read_bytes() == first
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    dated = made(wheel, tmp_path, "dated")
    with zipfile.ZipFile(dated) as archive:
        assert {entry.date_time[:3] for entry in archive.infolist()} == {(2023, 11, 14)}


def test_a_wheel_is_compared_with_one_built_from_a_copy(wheel, tmp_path, monkeypatch):
    """`make wheels ARGS=--twice`: nothing compiled is at hand there, and the sources are another folder's."""
    here, again = made(wheel, tmp_path), [b"other"]

    def build(command, env, cwd, **_):
        assert command[1] == cwd / "tools" / "wheel.py" and command[1].exists() and cwd != ROOT
        assert command[2:4] == ["x86-64-v2", "--out"] and not list(cwd.rglob("__pycache__"))
        assert not os.path.exists(env["XDG_CACHE_HOME"]) and "NUMBA_CACHE_DIR" not in env
        command[4].mkdir()
        (command[4] / here.name).write_bytes(again[0])
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(wheel.subprocess, "run", build)
    assert wheel.differing([here], ["x86-64-v2"]) == [here.name]
    again[0] = here.read_bytes()
    assert wheel.differing([here], ["x86-64-v2"]) == []


@pytest.mark.parametrize("bits", [32, 64])
def test_pip_ends_with_our_words_where_programs_have_32_bits(monkeypatch, bits):
    calls = []
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=lambda: calls.append(1)))
    monkeypatch.setattr(struct, "calcsize", lambda _: bits // 8)
    if bits == 32:
        with pytest.raises(SystemExit, match="needs a 64-bit Python.*armv7l.*attention.tflite"):
            runpy.run_path(str(ROOT / "setup.py"))
    else:
        runpy.run_path(str(ROOT / "setup.py"))
    assert len(calls) == (bits == 64)


def test_all_that_a_wheel_is_made_of_is_there(wheel):
    assert [name for name in wheel.SOURCES if not (ROOT / name).exists()] == []
