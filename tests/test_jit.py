"""The kernel decorator: when it compiles, where it caches, and that no cache gives stale results."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "edgeattn"

# Calls a kernel that calls a helper of another module; says whether its machine code came from the cache.
CALL = """
from edgeattn.kernel import double
print(double(4), sum(double.stats.cache_hits.values()), sum(double.stats.cache_misses.values()))
"""


@pytest.fixture
def package(tmp_path):
    """A package named edgeattn that has the decorator and two modules of kernels, and no cache yet."""
    folder = tmp_path / "site" / "edgeattn"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    shutil.copy(PACKAGE / "jit.py", folder)
    shutil.copy(PACKAGE / "isa.py", folder)
    (folder / "helper.py").write_text(
        "from edgeattn.jit import inlined\n\n@inlined\ndef factor():\n    return 2\n"
    )
    (folder / "kernel.py").write_text(
        "from edgeattn.helper import factor\nfrom edgeattn.jit import jit\n\n"
        "@jit\ndef double(x):\n    return factor() * x\n"
    )
    return folder


def run(package, code=CALL, **environment):
    """Run `code` in a new process that sees `package`, with its own home; variables of None are unset."""
    home = package.parents[1] / "home"
    home.mkdir(exist_ok=True)
    settings = {
        **os.environ,
        "PYTHONPATH": str(package.parent),
        "HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": None,
        "NUMBA_CACHE_DIR": None,
        "NUMBA_DISABLE_JIT": None,
        **environment,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=settings,
        capture_output=True,
        text=True,
        cwd=package.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cached(folder):
    return sorted(path for path in folder.rglob("*.nb[ic]") if "kernel" in path.name)


def refuse_folder(path):
    """Make a folder impossible at `path`, also for the superuser, whom permissions do not stop."""
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("")


def test_second_process_reads_the_cache(package):
    assert run(package) == "8 0 1"
    assert run(package) == "8 1 0"
    assert len(cached(package / "__pycache__")) == 2


def test_edit_in_another_module_recompiles(package):
    run(package)
    helper = package / "helper.py"
    times = helper.stat().st_mtime_ns
    helper.write_text(helper.read_text().replace("return 2", "return 3"))
    os.utime(helper, ns=(times, times))  # same size, same time: only the text tells
    assert run(package) == "12 0 1"
    assert run(package) == "12 1 0"
    assert len(cached(package / "__pycache__")) == 2


def test_code_older_than_its_source_is_not_cached(package):
    edited_meanwhile = CALL.replace(
        "print(",
        "import edgeattn.helper, pathlib\n"
        "path = pathlib.Path(edgeattn.helper.__file__)\n"
        "path.write_text(path.read_text() + '# edited while this process runs')\nprint(",
    )
    assert run(package, edited_meanwhile) == "8 0 1"
    assert run(package) == "8 0 1"


def test_read_only_package_uses_the_users_cache(package):
    refuse_folder(package / "__pycache__")
    assert run(package) == "8 0 1"
    assert run(package) == "8 1 0"
    assert len(cached(package.parents[1] / "home" / ".cache" / "edgeattn")) == 2


def test_xdg_cache_home_is_heeded(package, tmp_path):
    refuse_folder(package / "__pycache__")
    assert run(package, XDG_CACHE_HOME=str(tmp_path / "xdg")) == "8 0 1"
    assert len(cached(tmp_path / "xdg" / "edgeattn")) == 2


def test_numba_cache_dir_comes_first(package, tmp_path):
    assert run(package, NUMBA_CACHE_DIR=str(tmp_path / "chosen")) == "8 0 1"
    assert run(package, NUMBA_CACHE_DIR=str(tmp_path / "chosen")) == "8 1 0"
    assert len(cached(tmp_path / "chosen")) == 2
    assert not cached(package)


@pytest.mark.parametrize("home", ["/dev/null", "relative"])
def test_without_any_writable_folder_it_computes_uncached(package, home):
    refuse_folder(package / "__pycache__")
    assert run(package, HOME=home) == "8 0 1"
    assert run(package, HOME=home) == "8 0 1"
    assert not cached(package.parents[1])


def test_cache_in_a_read_only_package_is_read(package):
    run(package)
    code = CALL.replace(
        "from edgeattn.kernel",
        "import tempfile\n"
        "def refuse(*args, **kwargs): raise PermissionError\n"
        "tempfile.TemporaryFile = refuse\nfrom edgeattn.kernel",
    )
    assert run(package, code) == "8 1 0"


@pytest.mark.parametrize("damage", [b"", b"not a pickle", None])
def test_damaged_cache_is_replaced(package, damage):
    run(package)
    for path in cached(package):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage is None else damage)
    assert run(package) == "8 0 1"
    assert run(package) == "8 1 0"


def test_code_of_other_types_is_not_run(package):
    # what two processes leave that number their files at the same time
    both = CALL + "double(0.5)"
    run(package, both)
    integers, floats = (path for path in cached(package) if path.suffix == ".nbc")
    integers.write_bytes(floats.read_bytes())
    assert run(package) == "8 0 1"
    assert run(package) == "8 1 0"


def test_package_without_sources_is_not_cached(package):
    code = CALL.replace(
        "from edgeattn.kernel", "import edgeattn.jit\nedgeattn.jit._LOADED = []\nfrom edgeattn.kernel"
    )
    assert run(package, code) == "8 0 1"
    assert not cached(package)


def test_disabled_jit_gives_the_plain_function(package):
    assert (
        run(
            package,
            "from edgeattn.kernel import double\nprint(type(double).__name__, double(4))",
            NUMBA_DISABLE_JIT="1",
        )
        == "function 8"
    )


def test_kernels_release_the_gil_and_divide_as_numpy_does(package):
    (package / "kernel.py").write_text(
        "from edgeattn.jit import jit\n\n@jit\ndef divide(a, b):\n    return a / b\n"
    )
    assert (
        run(
            package,
            "from edgeattn.kernel import divide\nprint(divide(1.0, 0.0), divide.targetoptions['nogil'])",
        )
        == "inf True"
    )


def test_import_neither_compiles_nor_writes_nor_brings_more_than_it_needs(tmp_path):
    code = """
import gc, sys
import numba
numba.njit(lambda: None)  # numba itself brings what it finds, such as scipy
before = set(sys.modules)
from edgeattn import *
from numba.core.dispatcher import Dispatcher
kernels = [found for found in gc.get_objects() if isinstance(found, Dispatcher)
           and found.py_func.__module__.startswith("edgeattn")]
outside = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(len(kernels) > 0, any(kernel.signatures for kernel in kernels), sorted(outside))
"""
    copy = tmp_path / "site" / "edgeattn"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(copy.rglob("*"))
    assert run(copy, code) == "True False ['edgeattn']"
    assert sorted(copy.rglob("*")) == before
