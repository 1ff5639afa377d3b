"""What is promised about packaging: metadata, extras, what an import brings in, who imports whom, make."""

import ast
import configparser
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import conftest
import pytest
from packaging.requirements import Requirement
from places import ROOT, TESTS

PACKAGES = ("edgeattn", "quant")
# Not to be loaded by `import edgeattn`: each costs a small machine time and memory, or is not there. SciPy
# is not listed because Numba imports it wherever it is installed.
NOT_ON_DEVICE = (
    "ai_edge_litert",
    "click",
    "flatbuffers",
    "h5py",
    "numba.cuda",
    "onnx",
    "rich",
    "tflite_runtime",
    "torch",
)


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def python(code, *arguments):
    """Run code in a fresh interpreter, warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def requirements(text):
    """Return the requirements of a setup.cfg option, comments left out."""
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def extra(setup_cfg, name, python, machine):
    """Return name -> specifier of an extra as pip would take it on that Python and processor."""
    environment = {"python_version": python, "platform_machine": machine, "platform_system": "Linux"}
    found = {}
    for requirement in requirements(setup_cfg["options.extras_require"][name]):
        if requirement.name == "edgeattn":
            for inner in requirement.extras:
                found.update(extra(setup_cfg, inner, python, machine))
        elif requirement.marker is None or requirement.marker.evaluate(environment):
            found[requirement.name] = str(requirement.specifier)
    return found


# -- metadata --------------------------------------------------------------------------------------


def test_pyproject_holds_only_the_build_system():
    tables = re.findall(r"^\s*(\[.*\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert tables == ["[build-system]"]


def test_a_device_needs_three_packages(setup_cfg):
    needed = requirements(setup_cfg["options"]["install_requires"])
    assert sorted(requirement.name for requirement in needed) == ["numba", "numpy", "safetensors"]
    assert all(requirement.marker is None and "<" not in str(requirement.specifier) for requirement in needed)


def test_extras_are_the_promised_ones(setup_cfg):
    promised = {"bundle", "checkpoints", "text", "tflite", "cuda", "cuda-offline", "dask", "quant", "examples", "run", "test", "test-numpy2", "peers", "models-peers", "fuzz", "torch", "typecheck", "dev"}
    assert set(setup_cfg["options.extras_require"]) == promised
    assert "flatbuffers" in extra(setup_cfg, "quant", "3.11", "x86_64")
    assert "ai-edge-litert" in extra(setup_cfg, "tflite", "3.11", "x86_64")


@pytest.mark.parametrize(
    ("python", "machine", "runtimes", "numpy"),
    [
        ("3.10", "x86_64", {"ai-edge-litert", "tflite-runtime", "tflite-micro"}, "==1.26.4"),
        ("3.11", "x86_64", {"ai-edge-litert", "tflite-runtime", "tflite-micro"}, "==1.26.4"),
        ("3.11", "aarch64", {"ai-edge-litert", "tflite-runtime"}, "==1.26.4"),
        ("3.12", "x86_64", {"ai-edge-litert", "tflite-micro"}, None),
        ("3.13", "x86_64", {"ai-edge-litert", "tflite-micro"}, None),
        ("3.13", "aarch64", {"ai-edge-litert"}, None),
        ("3.14", "x86_64", {"ai-edge-litert", "tflite-micro"}, None),
    ],
)
def test_test_extra_takes_the_interpreters_that_have_a_wheel(setup_cfg, python, machine, runtimes, numpy):
    taken = extra(setup_cfg, "test", python, machine)
    main_job = extra(setup_cfg, "run", python, machine)
    assert main_job.items() < taken.items() and "pytest" not in main_job
    assert {name for name in taken if "lite" in name} == runtimes
    assert taken.get("numpy") == numpy


def test_numpy2_extra_never_meets_tflite_runtime(setup_cfg):
    taken = extra(setup_cfg, "test-numpy2", "3.11", "x86_64")
    assert taken["numpy"] == ">=2"
    assert "tflite-runtime" not in taken


def test_installed_metadata_agrees_with_setup_cfg(setup_cfg):
    try:
        installed = importlib.metadata.distribution("edgeattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("edgeattn is not installed here: `make test` or `pip install -e .` installs it")
    always = [Requirement(text) for text in installed.requires if "extra ==" not in text]
    assert sorted(always, key=str) == sorted(requirements(setup_cfg["options"]["install_requires"]), key=str)
    assert installed.metadata["Requires-Python"] == setup_cfg["options"]["python_requires"]
    assert set(installed.metadata.get_all("Provides-Extra")) == set(setup_cfg["options.extras_require"])
    scripts = {e.name: e.value for e in installed.entry_points if e.group == "console_scripts"}
    assert scripts == {"edgeattn": "edgeattn.cli:main", "quant": "quant.__main__:main"}


@pytest.mark.parametrize("package", PACKAGES)
def test_command_exists_and_explains_itself(package):
    shown = python(f"import sys; from {package}.__main__ import main; sys.exit(main())", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "usage" in shown.stdout.lower()


# -- imports ---------------------------------------------------------------------------------------


def test_importing_edgeattn_loads_nothing_a_device_lacks():
    loaded = python(f"import sys; from edgeattn import *; print([n for n in {NOT_ON_DEVICE!r} if n in sys.modules])")
    assert (loaded.stdout.strip(), loaded.stderr) == ("[]", "")


def test_names_of_edgeattn_are_imported_when_they_are_asked_for():
    asked = python("import sys, edgeattn; print('numba' in sys.modules, set(edgeattn.__all__) <= set(dir(edgeattn)));"
                   "edgeattn.load; print('edgeattn.layers' in sys.modules, 'edgeattn.files.storage' in sys.modules)")
    assert (asked.stdout.split(), asked.stderr) == (["False", "True", "False", "True"], "")
    missing = python("import edgeattn; edgeattn.attention")
    assert missing.stderr.strip().endswith("AttributeError: module 'edgeattn' has no attribute 'attention'")


@pytest.mark.parametrize("package", ["edgeattn", "edgeattn.files.checkpoints", "edgeattn.layers", "edgeattn.models", "edgeattn.quantized"])
def test_type_checkers_find_a_name_where_it_is_imported_from(package):
    """Who asks for a name gets it by `_HOMES`, and a type checker by the imports that are never run."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    seen = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    homes = importlib.import_module(package)._HOMES
    assert seen == {name: (f"{package}.{home}", name) for name, home in homes.items()}


def test_names_in_types_are_those_of_the_tables():
    from edgeattn.arithmetic import KERNEL_SETS
    from edgeattn.types import Arithmetic
    from quant.export.targets import NATIVE, TARGETS
    from quant.observers import OBSERVERS
    from quant.types import Observer, TargetName

    assert set(get_args(Arithmetic)) == set(KERNEL_SETS)
    assert set(get_args(Observer)) == set(OBSERVERS)
    assert set(get_args(TargetName)) == {*TARGETS, NATIVE}


def test_types_are_of_checkers_alone():
    loaded = python("import sys, edgeattn, quant; [getattr(edgeattn, name) for name in edgeattn.__all__]\n"
                    "print([name for name in ('edgeattn.types', 'quant.types') if name in sys.modules])")
    assert (loaded.stdout.strip(), loaded.stderr) == ("[]", "")


def test_every_module_with_a_public_name_is_checked_strictly(setup_cfg):
    """`make lint` runs mypy over them; both packages say that they have types."""
    files = re.split(r",\s*", setup_cfg["mypy"]["files"].strip())
    assert [name for name in files if not (ROOT / name).exists()] == []
    checked = {path for name in files for path in [ROOT / name, *(ROOT / name).rglob("*.py")]}
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file() and setup_cfg["options.package_data"][package].startswith("py.typed")
    names = [getattr(importlib.import_module(package), name)
             for package in ("edgeattn", "edgeattn.layers", "edgeattn.quantized", "quant")
             for name in importlib.import_module(package).__all__]
    modules = {value.__module__ for value in names if hasattr(value, "__module__")} | {"edgeattn.bundle"}
    paths = {Path(sys.modules[module].__file__) for module in modules if module.split(".")[0] in PACKAGES}
    assert len(paths) > 12
    assert sorted(paths - checked) == []


@functools.cache
def imports_of(path):
    """The dotted names that a module imports, ``from a import b`` as both ``a`` and ``a.b``: (all, at the top level)."""
    package = path.relative_to(ROOT).with_suffix("").parts
    package = package[:-1]  # of a module its package; of an __init__ the package itself
    found = set(), set()
    waiting = [(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)]
    while waiting:
        node, inside = waiting.pop()
        inside = inside or isinstance(node, (ast.FunctionDef, ast.Lambda))
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        found[0].update(names)
        found[1].update(() if inside else names)
        # no expression holds an import
        waiting += [(child, inside) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
    return found


def within(name, *modules):
    """Say whether a dotted name is one of the modules or lies in one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def offenders(forbidden, *, scope="edgeattn quant", allowed=(), top_level_only=False):
    """Return ``module imports name`` for every import in scope that a rule forbids."""
    found = []
    for path in sorted(p for top in scope.split() for p in (ROOT / top.replace(".", "/")).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if within(module, *allowed):
            continue
        names = imports_of(path)[top_level_only]
        found += [f"{module} imports {name}" for name in sorted(names) if within(name, *forbidden)]
    return found


def test_rules_see_an_import(tmp_path, monkeypatch):
    folder = tmp_path / "edgeattn" / "kernels" / "cpu"
    folder.mkdir(parents=True)
    (folder / "kernel.py").write_text("from ... import layers\ndef late():\n    from numba import cuda\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert offenders(["edgeattn.layers"], scope="edgeattn") == ["edgeattn.kernels.cpu.kernel imports edgeattn.layers"]
    assert offenders(["numba.cuda"], scope="edgeattn") == ["edgeattn.kernels.cpu.kernel imports numba.cuda"]
    assert offenders(["numba.cuda"], scope="edgeattn", top_level_only=True) == []
    assert offenders(["numba.cuda"], scope="edgeattn", allowed=["edgeattn.kernels.cpu"]) == []


def test_edgeattn_never_imports_quant():
    assert offenders(["quant"], scope="edgeattn") == []


def test_only_the_cuda_package_imports_numba_cuda():
    assert offenders(["numba.cuda", "numba_cuda"], allowed=["edgeattn.kernels.cuda"]) == []


def test_cuda_is_imported_only_inside_the_call_that_asks_for_it():
    assert offenders(["edgeattn.kernels.cuda"], allowed=["edgeattn.kernels.cuda"], top_level_only=True) == []
    assert offenders(["edgeattn.executors.cuda"], allowed=["edgeattn.executors.cuda"], top_level_only=True) == []


def test_what_stays_on_the_cpu_brings_nothing_of_cuda():
    script = ("import sys, edgeattn, numpy\n"
              "cache = edgeattn.KVCache(1, 1, 1, 1)\n"
              "assert cache.to('cpu') is cache\n"
              "try: cache.to('gpu')\n"
              "except ValueError: pass\n"
              "edgeattn.scaled_dot_product_attention(*[numpy.zeros((0, 4), 'f')] * 3)\n"
              "print([name for name in sys.modules if 'cuda' in name.split('.')])")
    done = python(script)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_only_the_tflite_writer_and_reader_import_flatbuffers():
    assert offenders(["flatbuffers"], allowed=["edgeattn.files.tflite", "quant.export.tflite"]) == []


@pytest.mark.parametrize(
    ("package", "readers"),
    [
        ("h5py", [f"edgeattn.files.checkpoints.{name}" for name in ("hdf5", "hdf5_attributes", "keras_files")]),
        ("onnx", ["edgeattn.files.checkpoints.onnx_graphs"]),
        ("torch", ["edgeattn.files.checkpoints.tensors"]),
    ],
)
def test_checkpoint_readers_import_their_package_only_when_they_open_a_file(package, readers):
    assert offenders([package], scope="edgeattn", allowed=readers) == []
    assert offenders([package], scope="edgeattn", top_level_only=True) == []


def test_layers_bring_no_checkpoint_reader_until_one_is_asked_for():
    script = ("import sys, edgeattn.files.checkpoints; edgeattn.MultiHeadAttention, edgeattn.QuantizedMultiHeadAttention\n"
              "print(*sorted(name for name in sys.modules if name.startswith('edgeattn.files.checkpoints.')))\n"
              "print(*(getattr(edgeattn.files.checkpoints, name).__module__ for name in edgeattn.files.checkpoints.__all__))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    nothing, found = done.stdout.split("\n")[:2]
    assert nothing == ""
    assert {name.rpartition(".")[2] for name in found.split()} == {
        "attention_names", "keras_files", "onnx_graphs", "state_dicts"}
    assert not hasattr(importlib.import_module("edgeattn.files.checkpoints"), "jax_weights")


def test_kernels_import_no_public_layer():
    public = "functional rotary layers quantized checkpoints storage tflite kv_cache masks cli"
    forbidden = [f"edgeattn.{name}" for name in public.split()]
    assert offenders(forbidden, scope="edgeattn.kernels.cpu edgeattn.kernels.cuda") == []


def test_the_order_of_imports_names_every_module(setup_cfg):
    """`make lint` holds it; a module that it does not name would import whatever it likes."""
    named = re.findall(r"\(([\w.]+)\)", setup_cfg["importlinter:contract:layers"]["layers"])
    modules = [".".join(path.relative_to(ROOT / "edgeattn").with_suffix("").parts)
               for path in (ROOT / "edgeattn").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    assert len(modules) > 100 and len(named) == len(set(named))
    assert [module for module in modules if not within(module, *named)] == []


# -- make ------------------------------------------------------------------------------------------


def makefile():
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def make(*arguments):
    """Run make in the tree and return what it printed."""
    command = ["make", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_help_names_every_target():
    phony = re.search(r"^\.PHONY:(.*)$", makefile(), re.MULTILINE).group(1)
    listed = re.findall(r"^  make (\S+)", make("help"), re.MULTILINE)
    assert sorted(listed) == sorted(phony.split())


def test_make_help_fits_a_terminal():
    assert max(map(len, make("help").splitlines())) <= 80


def test_environment_knows_what_is_installed_until_setup_cfg_changes(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools" / "environment.py")
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    assert environment.recorded(tmp_path) == {}
    environment.record(tmp_path, ["test", "examples"], [], {})
    environment.record(tmp_path, ["dev"], ["a-package"], environment.recorded(tmp_path))
    there = environment.recorded(tmp_path)
    assert (there["installed"], there["alone"]) == (["a-package", "dev", "examples", "test"], ["a-package"])
    monkeypatch.setattr(environment, "state", lambda: "another")
    assert environment.recorded(tmp_path) == {}


def test_every_script_that_make_runs_exists():
    scripts = re.findall(r"(?:examples|tools)/[\w/-]+\.(?:py|sh)", makefile())
    assert scripts
    assert [name for name in scripts if not (ROOT / name).is_file()] == []


def test_tests_that_are_emulated_are_there():
    """tools/arm64/run.py names them; one that was moved would be missed only under emulation."""
    program = "import json, run; print(json.dumps([run.SHORT, *run.FULL.values()]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "tools" / "arm64", text=True, check=True,
                          stdout=subprocess.PIPE)
    named = {name.removeprefix("--deselect=") for tests in json.loads(done.stdout) for some in tests.values() for name in some}
    assert len(named) > 40
    for name in named:
        path, _, function = name.partition("::")
        assert (ROOT / path).is_file(), name
        assert f"def {function.partition('[')[0]}" in (ROOT / path).read_text(encoding="utf-8"), name


# -- the suite itself ------------------------------------------------------------------------------


def test_files_that_the_suite_treats_apart_exist():
    tests = {path.stem for path in TESTS.rglob("test_*.py")}
    assert set(conftest.FIRST) < tests
    assert set(conftest.WITHOUT_NUMPY) < tests
    assert {*conftest.COMPILED, *conftest.PARTLY_COMPILED} < tests


def test_a_whole_suite_compiles_first_and_no_part_of_one():
    whole = SimpleNamespace(dist="loadfile", keyword="", collectonly=False)

    def begins(source=pytest.Config.ArgsSource.TESTPATHS, worker=False, **changes):
        config = SimpleNamespace(option=SimpleNamespace(**{**vars(whole), **changes}), args_source=source)
        if worker:
            config.workerinput = {}
        return conftest.begins_a_whole_suite(config)

    assert begins()
    assert not any((begins(dist="no"), begins(keyword="softmax"), begins(collectonly=True), begins(worker=True),
                    begins(pytest.Config.ArgsSource.ARGS)))


def test_processes_are_as_many_as_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr(conftest, "WORKER_BYTES", 1)
    monkeypatch.setattr(conftest.os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert conftest.pytest_xdist_auto_num_workers() == 3
    monkeypatch.setattr(conftest, "WORKER_BYTES", 2**60)
    assert conftest.pytest_xdist_auto_num_workers() == 0
