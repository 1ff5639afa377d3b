"""One text, one embedding: int8 gives the bytes that tests/embeddings.sha256 holds, however and wherever it is computed.

With attention="float32" sums of attention have the order of an instruction set: bytes are the same on one machine.
"""
import os
import shutil
import subprocess
import sys

import embeddings
import numpy as np
import pytest
from places import ROOT, TESTS

import edgeattn
from edgeattn.runtime import isa
from edgeattn.runtime.isa import ISA
from quant.export.kernels import build
from quant.export.targets import host_target

KNOWN = embeddings.known()
OTHERS = [table.name for table in isa.runnable(isa._host_features()) if table.name != ISA.name]


def printed(environment, folder, *names):
    """(what tests/embeddings.py finds out of saved models in a process of its own, what it says of itself)."""
    done = subprocess.run([sys.executable, TESTS / "embeddings.py", folder, *names], text=True, capture_output=True, cwd=TESTS,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return {name: digest for digest, name in (line.split("  ", 1) for line in done.stdout.splitlines())}, done.stderr


@pytest.mark.parametrize("name", embeddings.NAMES)
def test_every_way_gives_the_same_bytes(name):
    ways = embeddings.ways(name)
    whole = ways["whole"]()
    assert np.isfinite(whole).all() and len(np.unique(whole)) > whole.size // 2
    for way, call in ways.items():
        np.testing.assert_array_equal(call(), whole, err_msg=way)
    assert embeddings.digest(whole) == KNOWN.get(name, embeddings.digest(whole))


@pytest.mark.parametrize("name", embeddings.NAMES)
def test_any_number_of_threads_gives_the_same_bytes(name, one_thread_afterwards):
    whole = embeddings.ways(name)["whole"]
    edgeattn.set_num_threads(1)
    alone = whole()
    for threads in (2, 3, 4):
        edgeattn.set_num_threads(threads)
        np.testing.assert_array_equal(whole(), alone, err_msg=f"{threads} threads")


def test_what_is_written_down_is_all_that_is_int8():
    assert list(KNOWN) == [name for name in embeddings.NAMES if name.endswith("attention int8")]


@pytest.mark.parametrize("name", OTHERS)
def test_another_instruction_set_gives_the_same_bytes(name, request, tmp_path):
    embeddings.save(tmp_path)
    names = [each for each in KNOWN if request.config.getoption("long") or not each.startswith("steps")]
    found, said = printed({"EDGEATTN_ISA": name, "PYTHONPATH": str(ROOT)}, tmp_path, *names)
    assert found == {each: KNOWN[each] for each in names} and said.startswith(f"{name}, compiled here")


def test_a_library_gives_the_same_bytes(tmp_path, request):
    """Here; `make test-arm64` asks it of a wheel on each emulated processor."""
    if not request.config.getoption("long"):
        pytest.skip("compiles kernels into a library: --long")
    site = tmp_path / "site"
    for package in ("edgeattn", "quant"):
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__", "libraries"))
    embeddings.save(tmp_path)
    build([host_target()], site / "edgeattn" / "libraries", embeddings.KERNELS)
    found, said = printed({"EDGEATTN_JIT": "0", "EDGEATTN_ISA": "", "PYTHONPATH": str(site)}, tmp_path, *KNOWN)
    assert found == KNOWN and str(site) in said
