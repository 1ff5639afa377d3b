"""PTX on disk: compiled once, read while it is whole and nobody else could have written it. Needs no GPU."""
import sys
import types

from edgeattn.kernels.cuda import cache
from edgeattn.runtime import kernel_cache, trusted


def test_ptx_is_kept_and_compiled_again_where_it_cannot_be_trusted(tmp_path, monkeypatch):
    made, compiler, folder = [], types.ModuleType("compile"), tmp_path / "kept"
    compiler.to_ptx = lambda kernel, capability: (f"text {made.append(capability) or len(made)}\n", kernel.name + "_entry")
    monkeypatch.setitem(sys.modules, "edgeattn.kernels.cuda.compile", compiler)
    monkeypatch.setattr(sys.modules["edgeattn.kernels.cuda"], "compile", compiler, raising=False)
    monkeypatch.setattr(kernel_cache, "folders", lambda function: [str(folder)])
    monkeypatch.setattr(kernel_cache, "source_stamp", lambda filename: "5" * 64)
    kernel = types.SimpleNamespace(name="kernel")
    for _ in range(2):
        assert cache.ptx(kernel, (8, 7)) == ("text 1\n", "kernel_entry")
    assert cache.ptx(kernel, (9, 0)) == ("text 2\n", "kernel_entry")
    path, = folder.glob("*sm_87*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"9" + whole[-2:])
    assert cache.ptx(kernel, (8, 7)) == cache.ptx(kernel, (8, 7)) == ("text 3\n", "kernel_entry")
    folder.chmod(0o777)
    trusted._reason.cache_clear()
    assert [cache.ptx(kernel, (8, 7))[0] for _ in range(2)] == ["text 4\n", "text 5\n"]
    trusted._reason.cache_clear()
