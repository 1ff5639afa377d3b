"""What a kernel's PTX is called: for drivers older than the compiler, in the cache, and with any NumPy."""
import re
import sys
import types
import warnings

import numpy as np
import pytest

from edgeattn.kernels.cuda import cache, merge, ptx
from edgeattn.kernels.cuda import driver as driver_module
from edgeattn.kernels.cuda.driver import _installed
from edgeattn.runtime import kernel_cache

TEXT = "//\n.version 9.5\n.target sm_90\n.address_size 64\n// .version 8.0 of nothing\n"


@pytest.mark.parametrize(("driver", "version"), [
    (11040, "7.4"), (11080, "7.8"), (12000, "8.0"), (12050, "8.5"), (12060, "8.5"), (12070, "8.6"), (12090, "8.8"),
    (13000, "9.0"), (13020, "9.2"), (13050, "9.5"), (13060, "9.5"), (14000, "9.5")])
def test_ptx_has_the_version_that_the_driver_takes(driver, version):
    got = ptx.for_driver(TEXT, driver)
    assert got == TEXT.replace(".version 9.5", f".version {version}")
    older = TEXT.replace(".version 9.5", ".version 7.0")
    assert ptx.for_driver(older, driver) == older


def test_versions_are_those_that_nvidia_lists():
    listed = pytest.importorskip("cuda.bindings.utils", reason="needs cuda-bindings: make test-cuda-offline has it")
    if not hasattr(listed, "get_minimal_required_cuda_ver_from_ptx_ver"):
        pytest.skip("this cuda-bindings has no table of PTX versions: 13.1 and later have")
    known = 0
    for version in [(major, minor) for major in (7, 8, 9) for minor in range(10)]:
        try:
            least = listed.get_minimal_required_cuda_ver_from_ptx_ver("{}.{}".format(*version))
        except ValueError:  # a version that is not, or that this table does not know
            continue
        known += 1
        assert ptx.version_for((least // 1000, least % 1000 // 10)) == version
    assert known > 15


def test_the_driver_is_given_what_it_takes(monkeypatch):
    given = []
    api = types.SimpleNamespace(
        cuDriverGetVersion=lambda: (0, 13000), cuLibraryLoadData=lambda text, *_: given.append(text) or (0, 1),
        cuLibraryGetKernel=lambda *_: (0, 2), cuKernelSetAttribute=lambda *_: (0,), CUfunction=int, cuLaunchKernel=None,
        CUfunction_attribute=types.SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8))
    monkeypatch.setattr(cache, "ptx", lambda kernel, capability: (TEXT, "entry"))
    found = driver_module.Driver.__new__(driver_module.Driver)
    found._begin(api)
    monkeypatch.setattr(found, "_capability", lambda device: (9, 0))
    found.starter(merge.merge("float32"), 0)
    assert given == [TEXT.replace(".version 9.5", ".version 9.0").encode() + b"\0"]


def test_another_compiler_is_another_file(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(kernel_cache, "folders", lambda function: [tmp_path])
    monkeypatch.setitem(sys.modules, "edgeattn.kernels.cuda.compile", types.SimpleNamespace(
        to_ptx=lambda kernel, capability: compiled.append(capability) or (TEXT, "entry")))
    monkeypatch.setattr("edgeattn.kernels.cuda.compile", sys.modules["edgeattn.kernels.cuda.compile"], raising=False)
    kernel = merge.merge("float32")
    versions = {"numba-cuda": "0.30.4", "nvidia-nvvm": "13.0.88"}

    def version(name):
        if name not in versions:
            raise cache.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(cache.importlib.metadata, "version", version)
    for name, newer in (("numba-cuda", "0.30.4"), ("nvidia-nvvm", "13.5.37"), ("llvmlite", "0.50.0")):
        versions[name] = newer
        before = len(compiled)
        for _ in range(2):
            cache.compiler.cache_clear()
            assert cache.ptx(kernel, (9, 0))[1] == "entry"
        assert len(compiled) == before + 1
    toolkit = tmp_path / "cuda" / "nvvm" / "lib64" / "libnvvm.so.4"
    toolkit.parent.mkdir(parents=True)
    toolkit.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    cache.compiler.cache_clear()
    cache.ptx(kernel, (9, 0))
    assert len(compiled) == before + 2
    cache.compiler.cache_clear()  # what others ask for is of the real one


@pytest.mark.skipif(not _installed("numba_cuda"), reason="numba-cuda is not installed: make test-cuda-offline has it")
def test_compiling_says_nothing_and_leaves_numpy_as_it_was():
    """numba-cuda 0.30 names np.row_stack, which NumPy 2.5 has not."""
    from edgeattn.kernels.cuda import compile

    before = "row_stack" in vars(np)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text, entry = compile.to_ptx(merge.merge("float32"), (9, 0))
    assert f".entry {entry}(" in text and re.search(r"^\.version \d+\.\d+$", text, re.MULTILINE)
    assert ("row_stack" in vars(np)) == before
