"""The command lines: the whole job through files, one line for every error, and nothing that a device lacks."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from workbench import random_input, random_layer

import edgeattn
import edgeattn.cli
import quant
import quant.cli
from quant.calibrate import Calibration

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a layer and data, and the current one."""
    monkeypatch.chdir(tmp_path)
    edgeattn.save(random_layer(1), "layer.safetensors")
    np.save("x.npy", random_input(0, 70, 9, 32))
    np.save("one.npy", random_input(1, 9, 32))
    np.savez("masked.npz", query=random_input(2, 2, 9, 32), key_padding_mask=np.arange(9) < np.array([[9], [4]]))
    np.savez("causal.npz", query=random_input(3, 2, 9, 32), is_causal=True)
    return tmp_path


@pytest.fixture
def quant_command(folder, capsys):
    def run(*arguments, status=0):
        got = quant.cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert got == status, err
        if status:
            assert out == ""
            assert err.count("\n") == 1
            assert not list(folder.glob(".*"))
            return err
        assert err == ""
        return out

    return run


def test_the_whole_job(quant_command, folder):
    data = ("x.npy", "one.npy", "masked.npz", "causal.npz")
    out = quant_command("calibrate", "layer.safetensors", *data, "-o", "c.safetensors")
    assert out == "wrote c.safetensors: calibrated on x.npy, one.npy, masked.npz, causal.npz\n"
    out = quant_command("quantize", "layer.safetensors", "c.safetensors", "-o", "q.safetensors", "--arithmetic", "tflm")
    assert out == "wrote q.safetensors: static int8, equal to tflm\n"
    report = quant_command("compare", "layer.safetensors", "q.safetensors", *data)
    out = quant_command("export", "q.safetensors", "q.tflite", "--sequence-length", 9, "--batch", 2, "--mask", "causal")
    assert out == f"wrote q.tflite: {os.path.getsize('q.tflite'):,} bytes\n"
    quant_command("export", "q.safetensors", "q.c", "--sequence-length", 9, "--mask", "causal", "--test-vectors", 2)
    os.mkdir("again")
    quant.export(edgeattn.load("q.safetensors"), "again/q.c", sequence_length=9, mask="causal", test_vectors=2)
    for name in ("q.c", "q.h", "q_test.c", "q_test.h"):
        assert Path(name).read_text() == Path("again", name).read_text()

    # the same as the Python functions
    layer = random_layer(1)
    batches = [np.load("x.npy"), np.load("one.npy"), dict(np.load("masked.npz")),
               {"query": np.load("causal.npz")["query"], "is_causal": True}]
    calibration = quant.calibrate(layer, batches)
    for name, statistics in Calibration.load("c.safetensors").statistics.items():
        np.testing.assert_array_equal(statistics.histogram, calibration.statistics[name].histogram)
    expected = quant.quantize(layer, calibration, arithmetic="tflm")
    loaded = edgeattn.load("q.safetensors")
    assert (loaded.arithmetic, loaded.tensors) == ("tflm", expected.tensors)
    assert report.strip() == str(quant.compare(layer, expected, batches)).strip()
    x = np.random.default_rng(0).integers(-128, 128, (2, 9, 32)).astype(np.int8)
    np.testing.assert_array_equal(edgeattn.load("q.tflite", arithmetic="tflm").run_int8(x),
                                  expected.with_mask(np.tri(9, dtype=bool)).run_int8(x))


def test_observers_and_masks_from_files(quant_command):
    quant_command("calibrate", "layer.safetensors", "causal.npz", "-o", "c.safetensors", "--observer", "mse")
    assert Calibration.load("c.safetensors").observer == "mse"
    quant_command("quantize", "layer.safetensors", "c.safetensors", "-o", "q.safetensors")
    np.save("mask.npy", np.arange(9) < 4)
    quant_command("export", "q.safetensors", "m.safetensors", "--mask", "mask.npy")
    np.testing.assert_array_equal(edgeattn.load("m.safetensors").score_ops[0].keep.ravel(), np.arange(9) < 4)
    quant_command("export", "layer.safetensors", "float.tflite", "--sequence-length", 9)


def test_checkpoints_of_other_libraries(quant_command):
    rng = np.random.default_rng(0)

    def tensor(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    torch = {"att.in_proj_weight": tensor(96, 32), "att.out_proj.weight": tensor(32, 32)}
    np.savez("torch.npz", **torch)
    bert = {f"b.{name}.{part}": tensor(*shape) for name in ("self.query", "self.key", "self.value", "output.dense")
            for part, shape in (("weight", (32, 32)), ("bias", (32,)))}
    safetensors.numpy.save_file(bert, "bert.safetensors")
    quant_command("calibrate", "torch.npz", "x.npy", "-o", "t.safetensors", "--torch-prefix", "att.", "--num-heads", 4)
    quant_command("quantize", "torch.npz", "t.safetensors", "-o", "tq.safetensors", "--torch-prefix", "att.",
                  "--num-heads", 4)
    quant_command("export", "bert.safetensors", "b.tflite", "--bert-prefix", "b.", "--num-heads", 2,
                  "--sequence-length", 9)
    error = quant_command("export", "torch.npz", "z.tflite", "--torch-prefix", "att.", "--sequence-length", 9, status=2)
    assert error == "quant export: --num-heads is required for a checkpoint, which does not name it\n"
    error = quant_command("export", "torch.npz", "z.tflite", "--torch-prefix", "", "--bert-prefix", "", status=2)
    assert "--torch-prefix and --bert-prefix exclude each other" in error
    error = quant_command("export", "layer.safetensors", "z.tflite", "--num-heads", 2, status=2)
    assert "--num-heads needs --torch-prefix or --bert-prefix" in error
    error = quant_command("export", "torch.npz", "z.tflite", "--torch-prefix", "attn.", "--num-heads", 4, status=2)
    assert "prefix 'attn.' fits no tensor in torch.npz; prefixes with" in error


def test_inspect(quant_command):
    quant_command("calibrate", "layer.safetensors", "x.npy", "masked.npz", "-o", "c.safetensors")
    quant_command("quantize", "layer.safetensors", "c.safetensors", "-o", "q.safetensors",
                  "--arithmetic", "litert-arm")
    quant_command("export", "q.safetensors", "q.tflite", "--sequence-length", 9, "--mask", "causal")
    quant_command("export", "layer.safetensors", "f.tflite", "--sequence-length", 9)

    text = quant_command("inspect", "layer.safetensors")
    assert "MultiHeadAttention, float32" in text
    assert "heads: 4 (key and value heads: 4)" in text
    assert ["q_weight", "(32,", "32)"] in [line.split()[:3] for line in text.splitlines()]
    assert "4,224 parameters" in text

    layer, text = edgeattn.load("q.safetensors"), quant_command("inspect", "q.safetensors")
    rows = [line.split() for line in text.splitlines()]
    for name, t in layer.tensors.items():
        assert any(row[:3] == [name, f"{t.scale:.8g}", str(t.zero_point)] for row in rows), name
    assert "arithmetic: litert-arm" in text
    assert f"mask margin: {layer.mask_margin}" in text
    assert "score ops: none" in text
    assert "called with a query alone" in text

    text = quant_command("inspect", "q.tflite")
    assert "input 'input': int8 (1, 9, 32)" in text
    assert "SELECT_V2, SOFTMAX, BATCH_MATMUL" in text
    assert "score op: SelectMask of shape (1, 1, 9, 9), 55.6% permitted, fill -128" in text

    text = quant_command("inspect", "f.tflite")
    assert "input 'input': float32 (1, 9, 32)" in text
    assert "StaticMultiHeadAttention" not in text

    text = quant_command("inspect", "c.safetensors")
    assert "observer: minmax" in text
    assert "masks: seen" in text
    assert any(row[:2] == ["query_input", f"{72 * 9 * 32:,}"] for row in map(str.split, text.splitlines()))


ERRORS = [
    ("calibrate layer.safetensors", "quant calibrate: Missing argument 'DATA...'."),
    ("calibrate layer.safetensors x.npy", "quant calibrate: Missing option '-o'"),
    ("calibrate no.safetensors x.npy -o c.safetensors", "quant: no.safetensors: No such file or directory"),
    ("calibrate layer.safetensors no.npy -o c.safetensors", "quant: no.npy: No such file or directory"),
    ("calibrate layer.safetensors layer.safetensors -o c.safetensors", "DATA must be .npy or .npz files; got layer"),
    ("calibrate layer.safetensors x.npy narrow.npy -o c.safetensors",
     "quant: query of narrow.npy must have 32 features in its last axis; got shape (2, 9, 31)"),
    ("calibrate layer.safetensors x.npy nan.npz -o c.safetensors", "quant: query of nan.npz holds NaN or infinite"),
    ("calibrate layer.safetensors cut.npy -o c.safetensors", "quant: cut.npy is not a whole .npy file"),
    ("calibrate layer.safetensors objects.npy -o c.safetensors", "quant: objects.npy is not a whole .npy file"),
    ("calibrate layer.safetensors cut.npz -o c.safetensors", "quant: cut.npz is not a whole .npz file"),
    ("calibrate layer.safetensors names.npz -o c.safetensors", "names.npz must be an array or a mapping with 'query'"),
    ("calibrate layer.safetensors x.npy -o c.json", "quant: path must end in .safetensors; got 'c.json'"),
    ("calibrate layer.safetensors x.npy -o no/c.safetensors", "cannot write no/c.safetensors: there is no folder no"),
    ("calibrate layer.safetensors x.npy -o c.safetensors --observer max", "Invalid value for '--observer'"),
    ("quantize layer.safetensors layer.safetensors -o q.safetensors", "layer.safetensors is not a whole calibration"),
    ("quantize layer.safetensors other.safetensors -o q.safetensors", "calibration was made with another layer"),
    ("quantize layer.safetensors other.safetensors -o q.safetensors --arithmetic x", "Invalid value for '--arithmetic'"),
    ("compare layer.safetensors layer.safetensors x.npy", "quantized must be a static layer from quant.quantize"),
    ("export layer.safetensors a.tflite", "sequence_length is required for a .tflite"),
    ("export layer.safetensors a.onnx --sequence-length 9", "path must end in one of .tflite, .safetensors, .c"),
    ("export layer.safetensors a.tflite --sequence-length nine", "Invalid value for '--sequence-length'"),
    ("export layer.safetensors a.tflite --sequence-length 9 --mask diagonal", "quant: diagonal: No such file"),
    ("inspect x.npy", "path must end in .safetensors or .tflite, got 'x.npy'"),
    ("inspect cut.tflite", "cut.tflite"),
    ("inspect cut.safetensors", "cut.safetensors is not a whole .safetensors file"),
    ("inspect", "quant inspect: Missing argument 'FILE'."),
    ("polish layer.safetensors", "quant: No such command 'polish'."),
]


@pytest.mark.parametrize("line,expected", ERRORS)
def test_errors_are_one_line_and_write_nothing(quant_command, folder, line, expected):
    np.save("narrow.npy", random_input(0, 2, 9, 31))
    np.savez("nan.npz", query=np.full((2, 9, 32), np.nan, np.float32))
    np.savez("names.npz", x=np.zeros(3, np.float32))
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    Path("cut.npy").write_bytes(Path("x.npy").read_bytes()[:500])
    Path("cut.npz").write_bytes(Path("masked.npz").read_bytes()[:500])
    Path("cut.safetensors").write_bytes(Path("layer.safetensors").read_bytes()[:500])
    Path("cut.tflite").write_bytes(b"\0\0\0\0TFL3")
    quant.calibrate(random_layer(2), random_input(0, 2, 9, 32)).save("other.safetensors")
    before = sorted(os.listdir())
    assert expected in quant_command(*line.split(), status=2)
    assert sorted(os.listdir()) == before


def run(*arguments, **environment):
    return subprocess.run([sys.executable, "-W", "error", "-m", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment})


def test_quant_as_a_process(tmp_path):
    shown = run("quant.cli", "inspect", str(tmp_path / "no.tflite"))
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.endswith("no.tflite: No such file or directory\n")
    shown = run("quant.cli", "--help")
    assert shown.returncode == 0
    assert all(f"\n  {verb} " in shown.stdout for verb in ("calibrate", "quantize", "compare", "export", "inspect"))


def test_edgeattn_info_says_what_is_here(capsys):
    assert edgeattn.cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"numpy {np.__version__}" in text
    for name in ("processor", "features", "threads", "cache", "ai-edge-litert", "flatbuffers"):
        assert name in text
    assert "writable" in text


def test_edgeattn_info_without_a_writable_cache(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    shown = run("edgeattn.cli", "info", NUMBA_CACHE_DIR=str(blocked / "x"), XDG_CACHE_HOME=str(blocked / "y"))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("(not writable)") == 2
    shown = run("edgeattn.cli", "info", NUMBA_DISABLE_JIT="1")
    assert "NUMBA_DISABLE_JIT is set" in shown.stdout


def test_edgeattn_needs_no_workbench():
    code = ("import sys; sys.modules.update(click=None, rich=None, flatbuffers=None, quant=None); "
            "from edgeattn.cli import main; sys.exit(main(['info']))")
    shown = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_edgeattn_refuses_what_it_does_not_know(capsys):
    for arguments in ([], ["polish"], ["info", "--more"]):
        with pytest.raises(SystemExit) as caught:
            edgeattn.cli.main(arguments)
        assert caught.value.code == 2
        assert "usage: edgeattn" in capsys.readouterr().err
