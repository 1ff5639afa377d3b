"""Files: what is written, what is refused, and that nothing half-written is left."""
import importlib
import os
import re

import numpy as np
import pytest
from click.testing import CliRunner
from places import ROOT
from workbench import random_input, random_layer

import edgeattn
import quant
from quant import cli
from quant.export import FORMATS
from quant.export.tflite import write_tflite


@pytest.fixture(scope="module")
def layer():
    return random_layer(1)


@pytest.fixture(scope="module")
def static(layer):
    return quant.quantize(layer, quant.calibrate(layer, [{"query": x, "is_causal": True}
                                                         for x in random_input(0, 4, 2, 9, 32)]))


@pytest.fixture(scope="module")
def without_room(layer):
    return quant.quantize(layer, quant.calibrate(layer, random_input(0, 4, 2, 9, 32)))


def codes(*shape):
    return np.random.default_rng(5).integers(-128, 128, shape).astype(np.int8)


def test_a_layer_comes_back_from_either_format(tmp_path, static):
    x = codes(2, 9, 32)
    for name, shapes in (("a.tflite", {"batch": 2, "sequence_length": 9}), ("a.safetensors", {})):
        quant.export(static, tmp_path / name, **shapes)
        np.testing.assert_array_equal(edgeattn.load(tmp_path / name).run_int8(x), static.run_int8(x))
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "a.tflite"]


@pytest.mark.parametrize("mask", ["causal", np.tri(9, dtype=bool), np.arange(9) < 4, np.ones((2, 1, 1, 9), bool)])
def test_masks_are_written_into_either_format(tmp_path, static, mask):
    x = codes(2, 9, 32)
    carried = static.with_mask(np.tri(9, dtype=bool) if isinstance(mask, str) else mask)
    for name, shapes in (("a.tflite", {"batch": 2}), ("a.safetensors", {})):
        quant.export(static, str(tmp_path / name), **shapes, sequence_length=9, mask=mask)
        np.testing.assert_array_equal(edgeattn.load(tmp_path / name).run_int8(x), carried.run_int8(x))


def test_float_layers_are_written(tmp_path, layer):
    quant.export(layer, tmp_path / "a.tflite", sequence_length=9, mask="causal")
    assert (tmp_path / "a.tflite").read_bytes() == write_tflite(layer, sequence_length=9, mask=np.tri(9, dtype=bool))
    quant.export(layer, tmp_path / "a.safetensors")
    x = random_input(3, 2, 9, 32)
    np.testing.assert_array_equal(edgeattn.load(tmp_path / "a.safetensors")(x), layer(x))


BAD = [
    ({"path": "a.safetensors", "batch": 2, "sequence_length": None}, ValueError,
     "batch must be left out for a .safetensors, which takes any; got 2"),
    ({"path": "a.safetensors"}, ValueError, "sequence_length must be left out for a .safetensors, which takes any; got"),
    ({"path": 3}, TypeError, "path must be a string or a path, got int"),
    ({"path": "a.pt"}, ValueError, "path must end in one of .tflite, .onnx, .safetensors, .c, .so; got 'a.pt'"),
    ({"path": "tflite"}, ValueError, "path must end in one of"),
    ({"sequence_length": None}, ValueError, "sequence_length is required for a .tflite"),
    ({"sequence_length": 0}, ValueError, "sequence_length must be at least 1, got 0"),
    ({"sequence_length": True}, TypeError, "sequence_length must be an integer, got True"),
    ({"sequence_length": 9.0}, TypeError, "sequence_length must be an integer, got 9.0"),
    ({"batch": -1}, ValueError, "batch must be at least 1, got -1"),
    ({"key_length": 0}, ValueError, "key_length must be at least 1, got 0"),
    ({"mask": "diagonal"}, ValueError, "mask must be 'causal' or a bool array; got 'diagonal'"),
    ({"mask": "causal", "sequence_length": None}, ValueError, "mask='causal' needs sequence_length"),
    ({"mask": "causal", "key_length": 5}, ValueError, "mask='causal' needs sequence_length, and as many keys as"),
    ({"mask": np.zeros((9, 9), np.int8)}, TypeError, "mask must be 'causal' or a bool array .* got int8"),
    ({"mask": np.ones((1, 1, 1, 9, 9), bool)}, TypeError, "mask must be 'causal' or a bool array"),
    ({"mask": np.ones((8, 8), bool)}, ValueError, r"must broadcast to \(B, H, L, S\) = \(1, 4, 9, 9\)"),
]


def test_the_table_of_formats_is_what_the_docs_and_the_command_say():
    rows = re.findall(r"^\| `(\.\w+)` \| ([^|]+) \|$", (ROOT / "docs/formats.md").read_text("utf-8").split("## ")[0], re.MULTILINE)
    assert rows == [(suffix, form.about) for suffix, form in FORMATS.items()]
    shown = CliRunner().invoke(cli.commands, ["export", "--help"], terminal_width=200).output
    assert all(f" {suffix} {about} " in " ".join(shown.split()) for suffix, about in rows)


@pytest.mark.parametrize("changes,error,match", BAD)
@pytest.mark.parametrize("kind", ["float", "static"])
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, layer, static, kind, changes, error, match):
    arguments = {"path": "a.tflite", "sequence_length": 9, **changes}
    path = arguments.pop("path")
    if isinstance(path, str):
        path = tmp_path / path
        match = match.replace("'a.pt'", ".*a.pt'")
    with pytest.raises(error, match=match):
        quant.export({"float": layer, "static": static}[kind], path, **arguments)
    assert os.listdir(tmp_path) == []


def test_self_attention_has_one_length(tmp_path, static):
    with pytest.raises(ValueError, match="key_length must be left out or equal sequence_length"):
        quant.export(static, tmp_path / "a.tflite", sequence_length=9, key_length=5)


def test_bad_layers_are_refused(tmp_path, layer, without_room):
    with pytest.raises(TypeError, match="layer must be a MultiHeadAttention, an encoder, .* makes of it; got dict$"):
        quant.export({}, tmp_path / "a.tflite", sequence_length=9)
    for name in ("a.tflite", "a.safetensors"):
        with pytest.raises(ValueError, match="mask needs a layer that was calibrated with masks"):
            quant.export(without_room, tmp_path / name, sequence_length=9, mask="causal")
    with pytest.raises(ValueError, match="mask must be left out for a float layer in a .safetensors file"):
        quant.export(layer, tmp_path / "a.safetensors", sequence_length=9, mask="causal")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.tflite", "a.safetensors"])
def test_a_failed_export_leaves_everything_as_it_was(tmp_path, static, monkeypatch, name):
    shapes = {"sequence_length": 9} if name == "a.tflite" else {}
    with pytest.raises(OSError, match=f"No such file or directory: '.*nowhere/{name}'"):
        quant.export(static, tmp_path / "nowhere" / name, **shapes)
    path = tmp_path / name
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="must broadcast|sequence_length must be"):
        quant.export(static, path, sequence_length=0, mask=np.ones((3, 3), bool))

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            quant.export(static, path, **shapes)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == [name]
    quant.export(static, path, **shapes)
    assert path.read_bytes() != b"before"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere: run as another user")
@pytest.mark.parametrize("name", ["a.tflite", "a.safetensors"])
def test_an_unwritable_folder_is_an_error(tmp_path, static, name):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="Permission denied"):
            quant.export(static, tmp_path / name, **({"sequence_length": 9} if name == "a.tflite" else {}))
    finally:
        tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target", ["native", "pi4"])
@pytest.mark.parametrize("name, file", [("here.so", "here.so"), ("", "attention-cortex-a72.so")])
def test_native_is_this_machines_target_and_a_board_its_processors(monkeypatch, tmp_path, name, file, target):
    export = importlib.import_module("quant.export")  # of which quant has the function of that name
    asked = []
    monkeypatch.setattr(importlib.import_module("quant.export.targets"), "host_target", lambda: "cortex-a72")
    monkeypatch.setattr(export, "write_bundle", lambda layer, name, target: asked.append((name, target)) or {name: b""})
    layer = quant.quantize(random_layer(0), scheme="dynamic")
    assert quant.export(layer, tmp_path / name, target=target) == tmp_path / file
    assert asked == [(file, "cortex-a72")]
