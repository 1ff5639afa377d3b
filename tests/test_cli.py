"""The command lines: the whole job through files, one line for every error, and nothing that a device lacks."""
import contextlib
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from compiling import looks_at_compiling
from places import ROOT
from workbench import random_input, random_layer

import edgeattn
import edgeattn.cli
import quant
import quant.cli
from edgeattn.runtime.isa import ISA
from quant.calibration import Calibration


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
    assert out == ("wrote c.safetensors: calibrated on x.npy, one.npy, masked.npz, causal.npz\n"
                   "saw 670 tokens in 6 calls of the layer\n"
                   "masks: seen; an int8 layer can carry one: masked scores lie 12 below the lowest\n"
                   "  row or further\n")
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
    assert report == f"arithmetic: tflm\n{quant.compare(layer, expected, batches)}\n"
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
    for option in ("--bert-prefix", "--prefix"):
        quant_command("export", "bert.safetensors", f"{option[2:]}.tflite", option, "b.", "--num-heads", 2,
                      "--sequence-length", 9)
    assert Path("bert-prefix.tflite").read_bytes() == Path("prefix.tflite").read_bytes()
    error = quant_command("export", "torch.npz", "z.tflite", "--torch-prefix", "att.", "--sequence-length", 9, status=2)
    assert error == "quant export: --num-heads is required for a checkpoint, which does not name it\n"
    error = quant_command("export", "torch.npz", "z.tflite", "--torch-prefix", "", "--bert-prefix", "", status=2)
    assert "--torch-prefix and --bert-prefix exclude each other" in error
    error = quant_command("export", "layer.safetensors", "z.tflite", "--num-heads", 2, status=2)
    assert "--num-heads needs --prefix or --torch-prefix" in error
    error = quant_command("export", "torch.npz", "z.tflite", "--torch-prefix", "attn.", "--num-heads", 4, status=2)
    assert "prefix 'attn.' fits no tensor in torch.npz; prefixes with" in error


def test_dynamic(quant_command):
    out = quant_command("quantize", "layer.safetensors", "-o", "d.safetensors", "--scheme", "dynamic")
    assert out == "wrote d.safetensors: dynamic int8, float in and out\n"
    text = quant_command("inspect", "d.safetensors")
    assert "DynamicMultiHeadAttention: float in and out" in text
    assert [row.split()[0] for row in text.splitlines() if "(32, 32)" in row] == ["query", "key", "value", "output"]
    report = quant_command("compare", "layer.safetensors", "d.safetensors", "x.npy")
    expected = quant.compare(random_layer(1), edgeattn.load("d.safetensors"), [np.load("x.npy")])
    assert report == f"arithmetic: dynamic int8\n{expected}\n"


def test_notes_of_a_comparison_speak_of_options(quant_command):
    zeros = edgeattn.MultiHeadAttention(2, *[np.zeros((32, 32), np.float32)] * 2, *[np.eye(32, dtype=np.float32)] * 2)
    edgeattn.save(zeros, "flat.safetensors")  # all probabilities of a row are equal, and too small for int8
    np.save("long.npy", random_input(4, 1, 700, 32))
    quant_command("calibrate", "flat.safetensors", "long.npy", "-o", "c.safetensors")
    quant_command("quantize", "flat.safetensors", "c.safetensors", "-o", "q.safetensors")
    report = " ".join(quant_command("compare", "flat.safetensors", "q.safetensors", "long.npy").split())
    assert "attend to fewer keys, or quantize with --scheme dynamic, whose probabilities" in report


def test_what_a_tflite_does_not_say(quant_command):
    quant_command("calibrate", "layer.safetensors", "x.npy", "-o", "c.safetensors")
    quant_command("quantize", "layer.safetensors", "c.safetensors", "-o", "q.safetensors")
    quant_command("export", "q.safetensors", "q.tflite", "--sequence-length", 9)
    unsaid = "arithmetic: not stored in a .tflite; read as litert (--arithmetic chooses)\n"
    assert unsaid in quant_command("inspect", "q.tflite")
    assert quant_command("compare", "layer.safetensors", "q.tflite", "x.npy").startswith(unsaid)
    asked = "arithmetic: not stored in a .tflite; read as tflm, as asked\n"
    assert asked in quant_command("inspect", "q.tflite", "--arithmetic", "tflm")
    report = quant_command("compare", "layer.safetensors", "q.tflite", "x.npy", "--arithmetic", "tflm")
    assert report.startswith(asked)
    assert report.removeprefix(asked) == str(quant.compare(
        random_layer(1), edgeattn.load("q.tflite", arithmetic="tflm"), [np.load("x.npy")])) + "\n"
    assert "arithmetic: tflm\n" in quant_command("inspect", "q.safetensors", "--arithmetic", "tflm")


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
    names = [row[0] for row in rows[[row[:1] for row in rows].index(["projection"]):] if row]
    assert [name for name in names if name in ("query", "key", "value", "output")] == ["query", "key", "value", "output"]
    assert f"mask margin: {layer.mask_margin}" in text
    assert "score ops: none" in text
    assert "called with a query alone" in text

    text = quant_command("inspect", "q.tflite")
    assert "input 'input': int8 (1, 9, 32)" in text
    assert "SELECT_V2, SOFTMAX, BATCH_MATMUL" in " ".join(text.split())
    assert "score op: SelectMask of shape (1, 1, 9, 9), 55.6% permitted, fill -128" in text

    text = quant_command("inspect", "f.tflite")
    assert "input 'input': float32 (1, 9, 32)" in text
    assert "StaticMultiHeadAttention" not in text
    assert "\nMultiHeadAttention, float32\n" in text
    error = quant_command("inspect", "f.tflite", "--arithmetic", "tflm", status=2)
    assert "--arithmetic tflm applies to int8 layers, but f.tflite holds a float graph" in error

    text = quant_command("inspect", "c.safetensors")
    assert "observer: minmax" in text
    assert "masks: seen" in text
    for file in ("layer.safetensors", "q.safetensors", "q.tflite", "c.safetensors"):
        lines = quant_command("inspect", file).split("\n")
        assert max(map(len, lines)) <= 80, file
        assert all(line == line.rstrip() for line in lines), file
    assert any(row[:2] == ["query_input", f"{(70 * 9 + 9 + 4) * 32:,}"] for row in map(str.split, text.splitlines()))


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
    ("calibrate layer.safetensors names.npz -o c.safetensors", "names.npz must hold 'query' and any of 'key'"),
    ("calibrate layer.safetensors x.npy -o c.json", "quant: --output must end in .safetensors; got 'c.json'"),
    ("calibrate layer.safetensors x.npy -o no/c.safetensors", "cannot write no/c.safetensors: there is no folder no"),
    ("calibrate layer.safetensors x.npy -o c.safetensors --observer max", "Invalid value for '--observer'"),
    ("quantize layer.safetensors layer.safetensors -o q.safetensors", "layer.safetensors is not a whole calibration"),
    ("quantize layer.safetensors other.safetensors -o q.safetensors", "calibration was made with another layer"),
    ("quantize layer.safetensors other.safetensors -o q.safetensors --arithmetic x", "Invalid value for '--arithmetic'"),
    ("quantize layer.safetensors -o q.safetensors", "CALIBRATION is missing: run `quant calibrate` first, or choose"),
    ("quantize layer.safetensors other.safetensors -o q.safetensors --scheme dynamic", "takes neither CALIBRATION nor"),
    ("quantize layer.safetensors -o q.safetensors --scheme dynamic --room-for-masks", "--room-for-masks must be left out"),
    ("quantize layer.npz other.safetensors -o q.safetensors", "--prefix or --torch-prefix, and --num-heads"),
    ("quantize plain.safetensors other.safetensors -o q.safetensors",
     "of other libraries with --prefix or --torch-prefix, an encoder with --torch-encoder, and --num-heads; a whole model "
     "by its folder\n"),
    ("quantize plain.safetensors other.safetensors -o q.safetensors --num-heads 5 --torch-prefix a.",
     "--num-heads must divide the width 32"),
    ("export layer.safetensors a.tflite --sequence-length 9 --mask x.npy", "--mask must broadcast to (B, H, L, S)"),
    ("export layer.safetensors a.tflite --mask causal", "--mask causal needs --sequence-length"),
    ("export unmasked.safetensors a.tflite --sequence-length 9 --mask causal",
     "run `quant calibrate` on DATA in .npz files that hold attn_mask, key_padding_mask or is_causal"),
    ("inspect other.safetensors --arithmetic tflm", "applies to int8 layers, but other.safetensors holds a calib"),
    ("inspect layer.safetensors --arithmetic tflm", "applies to int8 layers, but layer.safetensors holds a Multi"),
    ("compare layer.safetensors layer.safetensors x.npy", "quant: QUANTIZED must be an int8 layer, as `quant quantize` writes it"),
    ("export layer.safetensors a.tflite", "quant: --sequence-length is required for a .tflite"),
    ("quantize unmasked.safetensors other.safetensors -o q.safetensors", "unmasked.safetensors is int8 already"),
    ("export layer.safetensors a.pb --sequence-length 9", "OUT must end in one of .tflite, .onnx, .safetensors, .c"),
    ("export layer.safetensors a.so", "or the board, one of pi3, zero2w, pi4, pi400, pi5, pi500, or be 'native'; it is"),
    ("export unmasked.safetensors a.tflite --sequence-length 9 --key-length 4", "or equal --sequence-length where keys and"),
    ("export plain.safetensors a.tflite --sequence-length 9 --num-heads 4 --prefix b.",
     "prefix 'b.' fits 0 attention layers in plain.safetensors; prefixes that fit one: ['a.']"),
    ("export layer.safetensors a.so", "quant: --target must name the processor of a .so, one of aarch64, cortex-a53"),
    ("export layer.safetensors a.tflite --sequence-length 9 --target cortex-a72", "--target must be left out but for a .so"),
    ("export layer.safetensors a.safetensors --test-vectors 2", "quant: --test-vectors must be left out but for a .c"),
    ("export layer.safetensors a.safetensors --batch 2", "quant: --batch must be left out for a .safetensors"),
    ("export layer.safetensors a.c --sequence-length 9", "with `quant calibrate` and `quant quantize --arithmetic tflm`\n"),
    ("export unmasked.safetensors a.c --sequence-length 9", "got 'litert': make it with `quant quantize --arithmetic tflm`\n"),
    ("calibrate layer.safetensors added.npz -o c.safetensors", "a layer of --scheme dynamic adds float masks"),
    ("quantize zero.safetensors other.safetensors -o q.safetensors", "got 1 added keys; --scheme dynamic takes them\n"),
    ("quantize layer.safetensors -o q.safetensors --scheme dynamic --override scores=mse",
     "quant: --override must be left out for --scheme dynamic of a layer"),
    ("export layer.safetensors a.tflite --sequence-length 9 --padding", "quant: --padding must be left out but for an"),
    ("export layer.safetensors a.so --target cortex-m4", "Invalid value for '--target': 'cortex-m4' is not one of"),
    ("export layer.safetensors a.tflite --sequence-length nine", "Invalid value for '--sequence-length'"),
    ("export layer.safetensors a.tflite --sequence-length 9 --mask diagonal", "quant: diagonal: No such file"),
    ("inspect x.npy", "x.npy is no .safetensors, .tflite, .onnx or .so file, and no folder"),
    ("inspect cut.tflite", "cut.tflite"),
    ("inspect cut.safetensors", "cut.safetensors is not a whole .safetensors file"),
    ("inspect", "quant inspect: Missing argument 'FILE'."),
    ("polish layer.safetensors", "quant: No such command 'polish'.\n"),
]


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """A folder of files that are not what a command wants, made once."""
    folder = tmp_path_factory.mktemp("awkward")
    layer = random_layer(1)
    calibration = quant.calibrate(layer, [random_input(0, 2, 9, 32)])
    edgeattn.save(layer, folder / "layer.safetensors")
    edgeattn.save(quant.quantize(layer, calibration), folder / "unmasked.safetensors")
    quant.calibrate(random_layer(2), [random_input(0, 2, 9, 32)]).save(folder / "other.safetensors")
    safetensors.numpy.save_file({"a.in_proj_weight": np.zeros((96, 32), np.float32),
                                 "a.out_proj.weight": np.zeros((32, 32), np.float32)}, folder / "plain.safetensors")
    np.save(folder / "x.npy", random_input(0, 3, 9, 32))
    np.save(folder / "narrow.npy", random_input(0, 2, 9, 31))
    np.savez(folder / "nan.npz", query=np.full((2, 9, 32), np.nan, np.float32))
    np.savez(folder / "added.npz", query=random_input(0, 2, 9, 32), attn_mask=np.zeros((9, 9), np.float32))
    edgeattn.save(edgeattn.MultiHeadAttention(2, *[np.ones((8, 8), np.float32)] * 3, add_zero_attn=True),
                  folder / "zero.safetensors")
    np.savez(folder / "names.npz", x=np.zeros(3, np.float32))
    np.save(folder / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez(folder / "whole.npz", query=random_input(2, 2, 9, 32))
    for whole, cut in (("x.npy", "cut.npy"), ("whole.npz", "cut.npz"), ("layer.safetensors", "cut.safetensors")):
        (folder / cut).write_bytes((folder / whole).read_bytes()[:500])
    (folder / "cut.tflite").write_bytes(b"\0\0\0\0TFL3")
    return folder


@pytest.mark.parametrize("line,expected", ERRORS)
def test_errors_are_one_line_and_write_nothing(awkward, monkeypatch, capsys, line, expected):
    monkeypatch.chdir(awkward)
    before = {path: path.read_bytes() for path in awkward.iterdir()}
    assert quant.cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert expected in err
    assert {path: path.read_bytes() for path in awkward.iterdir()} == before


@pytest.mark.parametrize("line", [
    "calibrate layer.safetensors x.npy -o layer.safetensors", "calibrate layer.safetensors x.npy one.npy -o one.npy",
    "calibrate layer.safetensors x.npy -o ./layer.safetensors", "calibrate layer.safetensors x.npy -o there/x.npy",
    "calibrate layer.safetensors x.npy -o hard.safetensors", "calibrate soft.safetensors x.npy -o layer.safetensors",
    "calibrate layer.safetensors x.npy -o soft.safetensors",
    "quantize layer.safetensors c.safetensors -o layer.safetensors",
    "quantize layer.safetensors c.safetensors -o there/c.safetensors",
    "quantize layer.safetensors -o hard.safetensors --scheme dynamic",
    "export layer.safetensors layer.safetensors", "export layer.safetensors there/there/hard.safetensors",
    "export layer.safetensors soft.safetensors", "export layer.safetensors mask.tflite --mask mask.tflite",
])
def test_no_output_is_an_input(quant_command, folder, monkeypatch, line):
    os.link("layer.safetensors", "hard.safetensors")
    os.symlink("layer.safetensors", "soft.safetensors")
    os.symlink(".", "there")
    shutil.copy("x.npy", "mask.tflite")
    quant.calibrate(random_layer(1), [np.load("x.npy")]).save("c.safetensors")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    monkeypatch.setattr(quant.cli_source.Source, "read", lambda _: pytest.fail("read before it was refused"))
    error = quant_command(*line.split(), status=2)
    assert re.match(r"quant: cannot write .*: it is an input of this command.*; choose another name\n", error)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("line", ["calibrate layer.safetensors x.npy -o made", "export layer.safetensors made.tflite",
                                  "quantize layer.safetensors -o made --scheme dynamic"])
def test_no_output_is_a_folder(quant_command, folder, monkeypatch, line):
    for name in ("made", "made.tflite"):
        os.makedirs(f"{name}/inner")
    monkeypatch.setattr(quant.cli_source.Source, "read", lambda _: pytest.fail("read before it was refused"))
    assert re.match("quant: cannot write made.*: it is a folder\n", quant_command(*line.split(), status=2))
    assert os.listdir("made") == os.listdir("made.tflite") == ["inner"]


def test_a_folder_of_bundles_is_no_output(quant_command, folder, monkeypatch):
    shutil.copy("layer.safetensors", "attention-cortex-a72.so")
    error = quant_command("export", "attention-cortex-a72.so", ".", "--target", "cortex-a72", status=2)
    assert error.startswith("quant: cannot write attention-cortex-a72.so: it is an input of this command; choose")


def run(*arguments, **environment):
    return subprocess.run([sys.executable, "-W", "error", "-m", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment})


def test_quant_as_a_process(tmp_path):
    shown = run("quant", "inspect", str(tmp_path / "no.tflite"))
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.endswith("no.tflite: No such file or directory\n")
    shown = run("quant", "--help")
    assert shown.returncode == 0
    assert all(f"\n  {verb} " in shown.stdout for verb in ("calibrate", "quantize", "compare", "export", "inspect"))


def without_the_extra(code):
    code = f"import sys; sys.modules.update(click=None, rich=None, flatbuffers=None)\n{code}"
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_quant_without_its_extra_says_what_to_install():
    shown = without_the_extra("from quant.__main__ import main; sys.exit(main(['--help']))")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == ("quant: the command needs the package click: pip install '.[quant]' in edgeattn's folder\n")


def test_what_a_wheel_beside_numpy_alone_cannot_do_says_what_to_install():
    missing = "import sys; sys.modules.update(dict.fromkeys(('numba', 'llvmlite', 'safetensors'), None))\n"
    code = "import edgeattn.files.storage as s\ntry: s.content_of(None)\nexcept ImportError as error: print(error)"
    shown = subprocess.run([sys.executable, "-c", missing + code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout == "writing a .safetensors file needs safetensors: pip install safetensors\n", shown.stderr
    shown = subprocess.run([sys.executable, "-c", f"{missing}import quant"], cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"^ImportError: the workbench needs the package (safetensors|numba|llvmlite): pip install '\.\[quant\]' in "
                     r"edgeattn's folder$", shown.stderr, re.M)
    code = ("import edgeattn.device as d\nd.executor = lambda *_: __import__('llvmlite')\n"
            "try: d.place(None, 'cuda')\nexcept RuntimeError as error: print(error)")
    shown = subprocess.run([sys.executable, "-c", missing + code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout == "CUDA needs the extra 'cuda' (pip install 'edgeattn[cuda]'): llvmlite is not installed\n", shown.stderr


def test_import_quant_needs_no_extra():
    shown = without_the_extra("""
import quant, numpy as np
sys.path.insert(0, "tests")
from workbench import random_layer, random_input
layer, x = random_layer(1), random_input(0, 2, 9, 32)
calibration = quant.calibrate(layer, [x])
report = quant.compare(layer, quant.quantize(layer, calibration), [x])
assert report.tensors["output"].cosine > 0.99
for use in (lambda: str(report), lambda: quant.export(layer, "never.tflite", sequence_length=9)):
    try:
        use()
    except ImportError as error:
        print(error)
""")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == ("a table needs the package rich: pip install '.[quant]' in edgeattn's folder\n"
                            "writing .tflite needs the package flatbuffers: pip install '.[quant]' in edgeattn's "
                            "folder\n")


@pytest.mark.parametrize("main,name", [(edgeattn.cli.main, "edgeattn"), (quant.cli.main, "quant")])
def test_version(main, name, capsys):
    with contextlib.suppress(SystemExit):
        assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{name} {edgeattn.__version__}\n"


@looks_at_compiling
def test_edgeattn_info_says_what_is_here(capsys):
    assert edgeattn.cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"numpy {np.__version__}" in text
    for name in ("processor", "features", "threads", "cache", "ai-edge-litert", "flatbuffers"):
        assert name in text
    assert f"{ISA.name}: {ISA.lanes} floats" in text
    assert text.count("(used)") == 1
    assert all(len(line) <= 80 for line in text.splitlines() if len(line.split()) > 1 and "(used)" not in line)


@looks_at_compiling
def test_edgeattn_info_without_a_writable_cache(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    shown = run("edgeattn", "info", NUMBA_CACHE_DIR=str(blocked / "x"), XDG_CACHE_HOME=str(blocked / "y"))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("not there and cannot be made") == 2
    assert shown.stdout.count("(used)") == 1
    shown = run("edgeattn", "info", NUMBA_DISABLE_JIT="1")
    assert "NUMBA_DISABLE_JIT is set" in shown.stdout


def test_edgeattn_needs_no_workbench():
    code = ("import sys; sys.modules.update(click=None, rich=None, flatbuffers=None, quant=None); "
            "from edgeattn.cli import main; sys.exit(main(['info']))")
    shown = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_edgeattn_refuses_what_it_does_not_know(capsys):
    for arguments in (["polish"], ["info", "--more"]):
        with pytest.raises(SystemExit) as caught:
            edgeattn.cli.main(arguments)
        assert caught.value.code == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and err.startswith("edgeattn")


def test_edgeattn_alone_prints_its_help(capsys):
    assert edgeattn.cli.main([]) == 2
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: edgeattn")
    assert "\n    info " in shown


@looks_at_compiling
def test_edgeattn_warmup_compiles_once_and_says_so(folder):
    # a copy, with the kernels that other tests keep beside the sources but for two small ones
    shutil.copytree(ROOT / "edgeattn", folder / "site" / "edgeattn",
                    ignore=shutil.ignore_patterns("*.tmp", "*.pyc", "quantize.*.kernel"))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "kernels"), "XDG_CACHE_HOME": str(folder / "home"),
                   "PYTHONPATH": str(folder / "site")}
    layer = random_layer(2)
    edgeattn.save(quant.quantize(layer, quant.calibrate(layer, [random_input(1, 2, 9, 32)])), "int8.safetensors")
    command = [sys.executable, "-m", "edgeattn", "warmup", "int8.safetensors", "--length", "5"]
    first, second = (subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
                     for _ in range(2))
    assert re.match(r"int8.safetensors, 5 tokens: [0-9.]+ s, [1-9]\d* kernels? compiled\n.*kernels", first)
    assert re.match("int8.safetensors, 5 tokens: [0-9.]+ s, nothing to compile\n", second)


def test_edgeattn_warmup_without_a_layer_compiles_every_kernel(monkeypatch, capsys):
    compiled = []
    made = {name: SimpleNamespace(compile=functools.partial(compiled.append, name)) for name in "ab"}
    monkeypatch.setattr(edgeattn.cli.entries, "ENTRIES", made)
    assert edgeattn.cli.main(["warmup"]) == 0
    assert compiled == ["a", "b"]
    assert re.match("every kernel: [0-9.]+ s, nothing to compile\n", capsys.readouterr().out)


KERNELS_USED = """
import os, re, sys
import numpy as np
import edgeattn, edgeattn.cli
from edgeattn.runtime import jit

def used():  # a function passed to a kernel has an address that differs from process to process
    return {re.sub("0x[0-9a-f]+", "", f"{k.py_func.__module__}.{k.py_func.__name__} {signature}")
            for k in jit.KERNELS for signature in k.signatures}

def warmup(path):
    assert edgeattn.cli.main(["warmup", path, "--length", "5"]) == 0

def calls(path):
    x = np.random.default_rng(0).standard_normal((2, 7, 32)).astype(np.float32)
    layer = edgeattn.load(path)
    layer(x), layer(x, is_causal=True)
    layer(x, x, x, attn_mask=np.tri(7, dtype=bool), window_size=(3, -1), causal_alignment="upper_left")
    for dtype in ["int8"] if path == "int8.safetensors" else ["float32", "int8"]:
        cache = edgeattn.KVCache.for_layer(layer, 2, 9, dtype=dtype)
        layer(x, kv_cache=cache, is_causal=True), layer(x[:, :1], kv_cache=cache)

for path in sys.argv[1:]:
    for what in (warmup, calls):
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
            continue
        assert not used()
        what(path)
        with open(f"{path}.{what.__name__}", "w") as file:
            print(*sorted(used()), sep="\\n", file=file)
        os._exit(0)
"""


@looks_at_compiling
def test_warmup_leaves_nothing_to_compile_for_any_call(folder):
    layer = random_layer(2)
    edgeattn.save(quant.quantize(layer, quant.calibrate(layer, [random_input(1, 2, 9, 32)])), "int8.safetensors")
    edgeattn.save(quant.quantize(layer, scheme="dynamic"), "dynamic.safetensors")
    paths = ("layer.safetensors", "int8.safetensors", "dynamic.safetensors")
    subprocess.run([sys.executable, "-W", "error", "-c", KERNELS_USED, *paths], check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})
    for path in paths:
        warm, calls = (set(Path(f"{path}.{what}").read_text().splitlines()) for what in ("warmup", "calls"))
        assert calls and calls <= warm, path


def test_edgeattn_bench_times_every_layer_and_length(folder, capsys):
    assert edgeattn.cli.main(["bench", "layer.safetensors", "--length", "4", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["layer.safetensors, 4 tokens", "layer.safetensors, 8 tokens"]
    assert all(float(line.split()[-2]) > 0 for line in lines[1:])


@pytest.mark.parametrize("arguments,message", [
    (["bench", "nothing.safetensors"], "nothing.safetensors"),
    (["warmup", "x.npy"], "x.npy is no .safetensors, .tflite, .onnx or .so file"),
    (["bench", "layer.safetensors", "--length", "0"], "--length must be at least 1, got 0"),
])
def test_edgeattn_errors_are_one_line(folder, capsys, arguments, message):
    assert edgeattn.cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("edgeattn: ") and error.count("\n") == 1


def test_a_missing_linker_is_one_line(awkward, monkeypatch, capsys):
    monkeypatch.chdir(awkward)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert quant.cli.main(["export", "layer.safetensors", "a.so", "--target", "cortex-a53"]) == 2
    assert capsys.readouterr().err.startswith("quant: --target needs a linker for aarch64, and there is none: apt-get install lld")
