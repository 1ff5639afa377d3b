"""The kernel decorator: when it compiles, where it caches, and that no cache gives stale results."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from places import ROOT

from edgeattn.runtime import sources

PACKAGE = ROOT / "edgeattn"

# Calls a kernel that calls a helper of another module; says whether its machine code came from the cache.
CALL = """
from edgeattn.kernels.kernel import double
print(double(4), sum(double.stats.cache_hits.values()), sum(double.stats.cache_misses.values()))
"""


@pytest.fixture
def package(tmp_path):
    """A package named edgeattn that has the decorator and two modules of kernels, and no cache yet."""
    folder = tmp_path / "site" / "edgeattn"
    folder.mkdir(parents=True)
    (folder / "kernels").mkdir()
    for each in (folder, folder / "kernels"):
        (each / "__init__.py").write_text("")
    shutil.copytree(PACKAGE / "runtime", folder / "runtime", ignore=shutil.ignore_patterns("worker_pool.py", "__pycache__"))
    shutil.copy(PACKAGE / "messages.py", folder)
    (folder / "kernels" / "helper.py").write_text(
        "from edgeattn.runtime.jit import inline\n\n@inline\ndef factor():\n    return 2\n"
    )
    (folder / "kernels" / "kernel.py").write_text(
        "from edgeattn.kernels.helper import factor\nfrom edgeattn.runtime.jit import jit\n\n"
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
    return sorted(folder.rglob("*.kernel"))


def refuse_folder(path):
    """Make a folder impossible at `path`, also for the superuser, whom permissions do not stop."""
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("")


def test_second_process_reads_the_cache(package):
    assert run(package) == "8 0 1"
    assert run(package) == "8 1 0"
    assert len(cached(package / "kernels" / "__pycache__")) == 1


def test_edit_in_another_module_recompiles(package):
    run(package)
    helper = package / "kernels" / "helper.py"
    times = helper.stat().st_mtime_ns
    helper.write_text(helper.read_text().replace("return 2", "return 3"))
    os.utime(helper, ns=(times, times))  # same size, same time: only the text tells
    assert run(package) == "12 0 1"
    assert run(package) == "12 1 0"
    assert len(cached(package / "kernels" / "__pycache__")) == 1


def test_code_older_than_its_source_is_not_cached(package):
    edited_meanwhile = CALL.replace(
        "print(",
        "import edgeattn.kernels.helper, pathlib\n"
        "path = pathlib.Path(edgeattn.kernels.helper.__file__)\n"
        "path.write_text(path.read_text() + '# edited while this process runs')\nprint(",
    )
    assert run(package, edited_meanwhile) == "8 0 1"
    assert run(package) == "8 0 1"


def test_read_only_package_uses_the_users_cache(package):
    refuse_folder(package / "kernels" / "__pycache__")
    assert run(package) == "8 0 1"
    assert run(package) == "8 1 0"
    assert len(cached(package.parents[1] / "home" / ".cache" / "edgeattn")) == 1


def test_xdg_cache_home_is_heeded(package, tmp_path):
    refuse_folder(package / "kernels" / "__pycache__")
    assert run(package, XDG_CACHE_HOME=str(tmp_path / "xdg")) == "8 0 1"
    assert len(cached(tmp_path / "xdg" / "edgeattn")) == 1


def test_numba_cache_dir_comes_first(package, tmp_path):
    assert run(package, NUMBA_CACHE_DIR=str(tmp_path / "chosen")) == "8 0 1"
    assert run(package, NUMBA_CACHE_DIR=str(tmp_path / "chosen")) == "8 1 0"
    assert len(cached(tmp_path / "chosen")) == 1
    assert not cached(package)


@pytest.mark.parametrize("home", ["/dev/null", "relative"])
def test_without_any_writable_folder_it_computes_uncached(package, home):
    refuse_folder(package / "kernels" / "__pycache__")
    assert run(package, HOME=home) == "8 0 1"
    assert run(package, HOME=home) == "8 0 1"
    assert not cached(package.parents[1])


def test_cache_in_a_read_only_package_is_read(package):
    run(package)
    code = CALL.replace(
        "from edgeattn.kernels.kernel",
        "import tempfile\n"
        "def refuse(*args, **kwargs): raise PermissionError\n"
        "tempfile.TemporaryFile = refuse\nfrom edgeattn.kernels.kernel",
    )
    assert run(package, code) == "8 1 0"


@pytest.mark.parametrize("damage", [
    lambda whole: b"",
    lambda whole: b"not a kernel",
    lambda whole: whole[: len(whole) // 2],
    lambda whole: whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 4]) + whole[len(whole) // 2 + 1 :],
    lambda whole: whole + b"x",
], ids=["empty", "other", "half", "one bit", "longer"])
def test_damaged_cache_is_replaced(package, damage):
    run(package)
    (path,) = cached(package)
    path.write_bytes(damage(path.read_bytes()))
    assert run(package) == "8 0 1"
    assert run(package) == "8 1 0"


def test_a_flipped_bit_anywhere_is_seen_before_anything_is_unpickled(package):
    run(package)
    (path,) = cached(package)
    whole = path.read_bytes()
    code = f"""
import pickle, pathlib, random
from edgeattn.runtime import kernel_cache
unpickled = []
pickle.loads = unpickled.append
path = pathlib.Path({str(path)!r})
whole = path.read_bytes()
from edgeattn.kernels.kernel import double
for at in random.Random(0).sample(range(len(whole)), 200):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
    assert kernel_cache.read(path) is None, at
path.write_bytes(whole)
assert kernel_cache.read(path) is not None
print(len(unpickled))
"""
    assert run(package, code) == "0"
    assert path.read_bytes() == whole


SAID = "compiled kernels are neither read nor kept there: "


def said(package, code=CALL, **environment):
    """What such a process prints, and what of it at stderr."""
    code = "import sys, logging; logging.basicConfig(format='%(message)s', stream=sys.stdout)\n" + code
    *messages, result = run(package, code, **environment).splitlines()
    return result, messages


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o757])
def test_a_folder_others_may_write_to_is_neither_read_nor_filled(package, tmp_path, mode):
    chosen = tmp_path / "shared"
    assert run(package, NUMBA_CACHE_DIR=str(chosen)) == "8 0 1"
    (kept,) = cached(chosen)
    kept.parent.chmod(mode)
    refuse_folder(package / "kernels" / "__pycache__")
    both = CALL + "double(0.5)"  # another kernel: said once all the same
    result, messages = said(package, both, NUMBA_CACHE_DIR=str(chosen), HOME="/dev/null")
    assert result == "8 0 1"
    assert messages == [f"{SAID}everybody may write to {kept.parent}. What is read is run, so only you and root may write: "
                        "set NUMBA_CACHE_DIR to a folder of your own, or mend owner and mode"]
    assert cached(chosen) == [kept]
    kept.parent.chmod(0o755)
    assert said(package, NUMBA_CACHE_DIR=str(chosen)) == ("8 1 0", [])


def test_another_folder_serves_where_one_is_refused(package, tmp_path):
    chosen = tmp_path / "shared"
    chosen.mkdir()
    chosen.chmod(0o777)
    result, messages = said(package, NUMBA_CACHE_DIR=str(chosen))
    assert result == "8 0 1" and len(messages) == 1
    assert len(cached(package / "kernels" / "__pycache__")) == 1 and not cached(chosen)


def test_a_file_others_may_write_to_is_replaced(package):
    run(package)
    (kept,) = cached(package)
    kept.chmod(0o666)
    result, messages = said(package)
    assert result == "8 0 1" and messages[0].startswith(f"{SAID}everybody may write to {kept}")
    assert kept.stat().st_mode & 0o777 == 0o644
    assert said(package) == ("8 1 0", [])


def test_files_are_private_whatever_the_umask(package):
    assert run(package, "import os; os.umask(0)\n" + CALL, NUMBA_CACHE_DIR=str(package.parents[1] / "a" / "b")) == "8 0 1"
    (kept,) = cached(package.parents[1] / "a")
    assert [path.stat().st_mode & 0o022 for path in (kept, kept.parent, kept.parents[1], kept.parents[2])] == [0] * 4


def test_environments_side_by_side_share_a_folder(package):
    other = "import numba; numba.__version__ = '0.68.99'\n" + CALL
    assert [run(package), run(package, other), run(package), run(package, other)] == ["8 0 1", "8 0 1", "8 1 0", "8 1 0"]
    assert len(cached(package)) == 2


def errors(package, code, **environment):
    """What a process says at stderr."""
    return run(package, "import sys; sys.stderr = sys.stdout\n" + code, **environment).splitlines()


WHILE_COMPILING = """
from edgeattn import messages
from edgeattn.runtime import jit
jit.PATIENCE = {patience}
{show}
import threading, time
from numba.core.compiler import Compiler
compile_extra = Compiler.compile_extra
def slowly(self, func):
    if func.__name__ == "double":
        time.sleep(0.5)
        print("still compiling", flush=True)
    return compile_extra(self, func)
Compiler.compile_extra = slowly
from edgeattn.kernels.kernel import double
double(4), double(4)
assert threading.active_count() == 1 or not time.sleep(0.2) and threading.active_count() == 1
"""


def test_a_kernel_that_compiles_for_long_says_so_once_while_it_does(package):
    code = WHILE_COMPILING.format(patience=0.1, show="messages.show()")
    folder = package / "kernels" / "__pycache__"
    assert errors(package, code) == [
        f"edgeattn: compiling edgeattn.kernels.kernel.double for this processor, once: it is kept in {folder}",
        "still compiling"]
    assert errors(package, code) == []  # from the cache


def test_a_kernel_compiled_for_other_arguments_says_that(package):
    code = WHILE_COMPILING.format(patience=0.1, show="messages.show()").replace("double(4), double(4)", "double(4), double(4.5)")
    said = [line for line in errors(package, code) if line != "still compiling"]
    assert [" and other types of arguments, once: " in line for line in said] == [False, True]


def test_a_kernel_that_is_kept_nowhere_says_so(package):
    refuse_folder(package / "kernels" / "__pycache__")
    code = WHILE_COMPILING.format(patience=0.1, show="messages.show()")
    first, _ = errors(package, code, HOME="/dev/null")
    assert "as every process will: no cache folder can be used (set NUMBA_CACHE_DIR" in first


@pytest.mark.parametrize("patience, show", [(30.0, "messages.show()"), (0.1, "")])
def test_nothing_is_said_of_a_short_compilation_nor_to_a_library_user_unasked(package, patience, show):
    assert errors(package, WHILE_COMPILING.format(patience=patience, show=show)) == ["still compiling"]


PARTS = """
import numba
from numba.core import codegen
from edgeattn.runtime import jit
{before}
final = []
optimize = codegen.CPUCodeLibrary._optimize_final_module
def counted(library):
    final.append(library.name)
    optimize(library)
codegen.CPUCodeLibrary._optimize_final_module = counted
from edgeattn.kernels.helper import factor
from edgeattn.kernels.kernel import double
print(double(4), sorted(name for name in final if name != "nrt"))
"""


def test_a_helper_is_no_more_than_a_part_of_its_kernel(package):
    assert run(package, PARTS.format(before="")) == "8 ['double']"


@pytest.mark.parametrize("first", ["task", "part"])
def test_a_helper_is_compiled_alike_whoever_calls_it_first(first):
    """So a kernel's code does not depend on what was compiled before: libraries have the same bytes twice."""
    import numba

    from edgeattn.runtime.jit import inline, task

    helper = numba.njit(lambda x: x + 7)  # as those that Numba brings

    @task
    def job(x):
        return helper(x)

    @inline
    def part(x):
        return job(x) * helper(x)

    integer = (numba.types.int64,)
    {"task": job, "part": part}[first].compile(integer)
    part.compile(integer)
    inlined = [each.overloads[integer].fndesc.inline for each in (job, helper, part)]
    assert inlined == [False, True, True]


def test_with_another_numba_helpers_are_compiled_as_numba_does(package):
    before = "import importlib; numba.__version__ = '0.99.0'; importlib.reload(jit); assert not jit.USES_PARTS"
    assert run(package, PARTS.format(before=before)) == "8 ['double', 'factor']"


def test_python_is_refused_where_it_calls_a_part(package):
    code = "from edgeattn.kernels.kernel import double\nfrom edgeattn.kernels.helper import factor\nprint(double(4))\n"
    code += "try:\n    factor()\nexcept TypeError:\n    print('refused')"
    assert run(package, code).splitlines() == ["8", "refused"]


def test_no_environment_of_a_part_is_used_in_a_kernel(package):
    (package / "kernels" / "kernel.py").write_text(
        "from edgeattn.kernels.helper import factor\nfrom edgeattn.runtime.jit import inline, jit\n\n"
        "@inline\ndef check(x):\n    if x < 0:\n        raise ValueError('negative')\n    return x\n\n"
        "@jit\ndef double(x):\n    return factor() * check(x)\n")
    code = """
from edgeattn.kernels.kernel import double
double(4)
(compiled,) = double.overloads.values()
text = str(compiled.library._final_module)
parts = [found.env_name for found in compiled._find_referenced_environments() if found is not compiled.environment]
print([name for name in parts if text.count(name) > 1])  # more than where it is defined
try:
    double(-1)
except ValueError as error:
    print(error)
"""
    for _ in range(2):  # compiled, then read
        assert run(package, code).splitlines() == ["[]", "negative"]


def test_a_part_that_does_not_compile_leaves_nothing_behind(package):
    (package / "kernels" / "kernel.py").write_text(
        "from edgeattn.kernels.helper import factor\nfrom edgeattn.runtime.jit import inline, jit\n\n"
        "@inline\ndef wrong(x):\n    return x.nothing\n\n"
        "@jit\ndef broken(x):\n    return factor() * wrong(x)\n\n"
        "@jit\ndef double(x):\n    return factor() * x\n")
    code = """
from numba.core.errors import TypingError
import numba
from edgeattn.kernels.kernel import broken, double
for _ in range(2):
    try:
        broken(4)
    except TypingError:
        print("refused")
print(double(4), numba.njit(lambda x: x + 1)(2))
"""
    assert run(package, code).splitlines() == ["refused", "refused", "8 3"]


def test_threads_compile_at_the_same_time(package):
    (package / "kernels" / "kernel.py").write_text(
        "from edgeattn.kernels.helper import factor\nfrom edgeattn.runtime.jit import jit\n\n"
        + "".join(f"@jit\ndef times{i}(x):\n    return factor() * x + {i}\n\n" for i in range(4)))
    code = """
import concurrent.futures, numba
from edgeattn.kernels import kernel
mine = numba.njit(lambda x: x * 10)
work = [getattr(kernel, f"times{i}") for i in range(4)] + [mine]
with concurrent.futures.ThreadPoolExecutor(10) as pool:
    print(*[done.result() for done in [pool.submit(f, 3) for f in work + work]])
"""
    assert run(package, code) == "6 7 8 9 30 6 7 8 9 30"


def test_code_of_other_types_is_not_run(package):
    both = CALL + "double(0.5)"
    run(package, both)
    one, other = cached(package)
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    assert run(package) == "8 0 1"
    assert run(package) == "8 1 0"


def test_edit_that_no_kernel_can_see_recompiles_nothing(package):
    (package / "layer.py").write_text("WIDTH = 64\n")
    assert run(package) == "8 0 1"
    (package / "layer.py").write_text("WIDTH = 128\n")
    assert run(package) == "8 1 0"


def test_kernels_import_nothing_outside_what_the_cache_compares():
    known = {path.relative_to(sources.PACKAGE).as_posix() for path in sources.files()}
    assert len(known) > 80
    of_libraries = {name for name in known if not name.startswith(sources.CUDA)}
    assert len(known) > len(of_libraries) > 60
    for name in known:
        for imported in imports(PACKAGE / name):
            file = imported.replace(".", "/") + ".py"
            seen = of_libraries if name in of_libraries else known
            assert file in seen or f"{imported.replace('.', '/')}/__init__.py" in seen, f"{name} imports {imported}"


def imports(path):
    """The modules of this package that a source file imports, but for annotations."""
    found = []
    for node in ast.parse(path.read_text()).body:
        for each in ast.walk(node) if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)) else ():
            if isinstance(each, ast.ImportFrom) and each.module and each.module.startswith("edgeattn"):
                below = [f"{each.module}.{alias.name}" for alias in each.names]
                found += [module if (PACKAGE.parent / (module.replace(".", "/") + ".py")).exists() else each.module
                          for module in below]
    return {module.removeprefix("edgeattn").lstrip(".") for module in found} - {""}


def test_package_without_sources_is_not_cached(package):
    code = CALL.replace(
        "from edgeattn.kernels.kernel", "import edgeattn.runtime.kernel_cache\nedgeattn.runtime.kernel_cache._LOADED = []\nfrom edgeattn.kernels.kernel"
    )
    assert run(package, code) == "8 0 1"
    assert not cached(package)


def test_disabled_jit_gives_the_plain_function(package):
    assert (
        run(
            package,
            "from edgeattn.kernels.kernel import double\nprint(type(double).__name__, double(4))",
            NUMBA_DISABLE_JIT="1",
        )
        == "function 8"
    )


def test_kernels_release_the_gil_and_divide_as_numpy_does(package):
    (package / "kernels" / "kernel.py").write_text(
        "from edgeattn.runtime.jit import jit\n\n@jit\ndef divide(a, b):\n    return a / b\n"
    )
    assert (
        run(
            package,
            "from edgeattn.kernels.kernel import divide\nprint(divide(1.0, 0.0), divide.targetoptions['nogil'])",
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
