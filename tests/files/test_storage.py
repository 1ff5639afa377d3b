"""save and load: what comes back, what stands in the file, and which files are refused."""

import copy
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
import safetensors.numpy

import quant
from edgeattn import MultiHeadAttention, SelfAttention, load, save
from edgeattn.files import paths
from edgeattn.files.paths import write_atomic
from edgeattn.files.stored import Budget
from edgeattn.kinds import KINDS, class_of
from edgeattn.quantized import (
    AddMask,
    MulConstant,
    QuantizedLinear,
    SelectMask,
    StaticMultiHeadAttention,
    TensorQuantization,
)


def layers():
    random = np.random.default_rng(0)

    def weight(*shape):
        return random.standard_normal(shape, np.float32)

    return {
        "whole": MultiHeadAttention(
            2,
            weight(6, 5),
            weight(6, 4),
            weight(8, 3),
            weight(7, 8),
            q_bias=weight(6),
            k_bias=weight(6),
            v_bias=weight(8),
            out_bias=weight(7),
        ),
        "bare": MultiHeadAttention(2, weight(6, 5), weight(6, 5), weight(6, 5)),
        "grouped": MultiHeadAttention(4, weight(8, 5), weight(4, 5), weight(6, 5), weight(5, 12), num_kv_heads=2),
        "single": SelfAttention(weight(6, 5), weight(6, 5), weight(4, 5), weight(5, 4), v_bias=weight(4)),
    }


def state(layer):
    config, tensors = layer.to_state()
    return config, {name: tensor.tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("as_text", [True, False])
def test_what_was_saved_is_loaded(tmp_path, name, as_text):
    layer = layers()[name]
    path = tmp_path / "layer.safetensors"
    save(layer, str(path) if as_text else path)
    loaded = load(str(path) if as_text else path)
    assert type(loaded) is type(layer)
    assert repr(loaded) == repr(layer)
    assert state(loaded) == state(layer)


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_layers_are_copied_and_pickled_before_and_after_a_call(name, copied):
    layer = layers()[name]
    inputs = [np.ones((1, 3, width), np.float32) for width in (layer.embed_dim, layer.kdim, layer.vdim)]
    inputs = inputs[:1] if isinstance(layer, SelfAttention) else inputs
    for again in (copied(layer), copied(layer) if layer(*inputs).size else None):
        assert state(again) == state(layer)
        np.testing.assert_array_equal(again(*inputs), layer(*inputs))
    dynamic = quant.quantize(layer, scheme="dynamic")
    wanted = dynamic(*inputs)
    np.testing.assert_array_equal(copied(dynamic)(*inputs), wanted)


def test_static_layers_are_copied_and_pickled(quantized):
    for again in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert state(again) == state(quantized)


def test_file_is_written_the_same_every_time_and_says_what_it_is(tmp_path):
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(layers()["grouped"], path)
    save(layers()["grouped"], again)
    assert path.read_bytes() == again.read_bytes()
    with safetensors.safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["edgeattn"]) == {
            "format": 1,
            "kind": "MultiHeadAttention",
            "config": {"num_heads": 4, "num_kv_heads": 2},
        }
        assert sorted(file.keys()) == ["k_weight", "out_weight", "q_weight", "v_weight"]


@pytest.fixture
def quantized():
    """A static layer with every kind of parameter: no bias in one projection, and each kind of score operator."""
    generator = np.random.default_rng(3)

    def linear(outputs, inputs, bias=True):
        return QuantizedLinear(
            generator.integers(-127, 128, (outputs, inputs)).astype(np.int8),
            generator.uniform(1e-3, 1e-2, outputs).astype(np.float32),
            generator.integers(-999, 999, outputs).astype(np.int32) if bias else None,
        )

    tensor = TensorQuantization(0.1, 3)
    names = ("query_input", "key_input", "query", "key", "value", "scores", "context", "output")
    return StaticMultiHeadAttention(
        2,
        {"query": linear(8, 6), "key": linear(8, 5), "value": linear(10, 5, bias=False), "output": linear(6, 10)},
        dict.fromkeys(names, tensor),
        sources=(0, 1, 1),
        score_ops=(
            MulConstant(90, tensor, tensor),
            AddMask(generator.choice(np.array([-128, 0], np.int8), (4, 7)), tensor, tensor),
            SelectMask(np.tri(4, 7, dtype=bool)),
        ),
        arithmetic="tflm",
    )


def test_a_static_layer_round_trips_to_the_same_state(tmp_path, quantized):
    path = tmp_path / "layer.safetensors"
    save(quantized, path)
    (config, tensors), (loaded_config, loaded_tensors) = quantized.to_state(), load(path).to_state()
    assert loaded_config == config
    assert sorted(loaded_tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded_tensors[name], tensor)
        assert loaded_tensors[name].dtype == tensor.dtype


def test_arithmetic_is_chosen_at_loading(tmp_path, quantized):
    path = tmp_path / "layer.safetensors"
    save(quantized, path)
    assert load(path, arithmetic="litert").arithmetic == "litert"
    with pytest.raises(
        ValueError, match="layer.safetensors does not hold a valid .*arithmetic must be one of.*'nnpack'"
    ):
        load(path, arithmetic="nnpack")
    save(layers()["bare"], path)
    with pytest.raises(
        ValueError, match="arithmetic='litert' applies to int8 layers, but .* holds a MultiHeadAttention"
    ):
        load(path, arithmetic="litert")


def test_tflite_goes_to_its_reader(tmp_path, monkeypatch):
    reader = types.ModuleType("edgeattn.files.tflite")
    reader.read_tflite = lambda path, *, arithmetic="default": (pathlib.Path(path).name, arithmetic)
    monkeypatch.setitem(sys.modules, "edgeattn.files.tflite", reader)
    assert load(tmp_path / "a.tflite") == ("a.tflite", "default")
    assert load(tmp_path / "a.tflite", arithmetic="tflm") == ("a.tflite", "tflm")


def test_failed_writing_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "layer.safetensors"
    save(layers()["bare"], path)
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(f"os.{step}", fail)
            with pytest.raises(OSError, match="disk full"):
                save(layers()["whole"], path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["layer.safetensors"]
        assert path.read_bytes() == before


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file.bin"
    for content in (b"one", b"two"):
        write_atomic(str(path), content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    # The permissions any new file would have, not those of a private temporary one.
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


DATA = np.random.default_rng(0).standard_normal((2, 3, 8), np.float32)
WRITERS = {
    "save": ("a.safetensors", lambda layer, path: save(layer, path), ["a.safetensors"]),
    "calibration": ("a.safetensors", lambda layer, path: quant.calibrate(layer, [DATA]).save(path),
                    ["a.safetensors"]),
    "tflite": ("a.tflite", lambda layer, path: quant.export(layer, path, sequence_length=3), ["a.tflite"]),
    "c": ("a.c", lambda layer, path: quant.export(static(layer), path, sequence_length=3, test_vectors=1),
          ["a.c", "a.h", "a_test.c", "a_test.h"]),
    "so": ("a.so", lambda layer, path: quant.export(layer, path, target="cortex-a72"), ["a.so", "a.h"]),
}


def static(layer):
    return quant.quantize(layer, quant.calibrate(layer, [DATA]), arithmetic="tflm")


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_removes_what_a_dead_one_left(tmp_path, monkeypatch, writer):
    monkeypatch.setattr(sys.modules["quant.export"], "write_bundle", lambda layer, name, target: {name: b"so", "a.h": b"h"})
    name, write, written = WRITERS[writer]
    layer = MultiHeadAttention(2, *[np.eye(8, dtype=np.float32)] * 4)
    for left in written:
        for mark, kind in (("0123456789ab", "tmp"), ("ba9876543210", "tmp"), ("0123456789ab", "old")):
            (tmp_path / f".{left}.{mark}.{kind}").write_bytes(b"half")
    # what only looks like it
    (tmp_path / f".{written[0]}.mine.tmp").write_bytes(b"")
    (tmp_path / f".b{written[0]}.0123456789ab.tmp").write_bytes(b"")
    (tmp_path / f".{written[0]}.aaaaaaaaaaaa.tmp").mkdir()
    os.mkfifo(tmp_path / f".{written[0]}.bbbbbbbbbbbb.tmp")
    kept = {f".{written[0]}.mine.tmp", f".b{written[0]}.0123456789ab.tmp", f".{written[0]}.aaaaaaaaaaaa.tmp",
            f".{written[0]}.bbbbbbbbbbbb.tmp"}
    if writer in ("c", "so"):  # nothing stands in the way of what was moved away: it is moved back, and then replaced
        (tmp_path / f".{written[1]}.0123456789ab.old").write_bytes(f"quant.export {name}".encode())
    write(layer, tmp_path / name)
    assert {entry.name for entry in tmp_path.iterdir()} == {*written, *kept}


WRITE_SLOWLY = """
import os, sys
from edgeattn.files import paths
from edgeattn.files.paths import write_atomic
sync = os.fsync
def wait(number):
    sync(number)
    print("written", flush=True)
    sys.stdin.readline()
os.fsync = wait
write_atomic(sys.argv[1], b"slow")
"""


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="cannot write .*a.safetensors: it is a folder"):
        save(layers()["bare"], tmp_path / "a.safetensors")


@pytest.mark.parametrize("end", ["killed", "finished"])
def test_only_what_nobody_writes_is_removed(tmp_path, end):
    path = tmp_path / "a.bin"
    with subprocess.Popen([sys.executable, "-c", WRITE_SLOWLY, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as writer:
        assert writer.stdout.readline() == "written\n"
        write_atomic(path, b"quick")
        (left,) = set(tmp_path.iterdir()) - {path}
        assert path.read_bytes() == b"quick"
        if end == "killed":
            writer.kill()
        else:
            print(file=writer.stdin, flush=True)
        writer.wait()
    if end == "killed":
        assert left.exists()
        write_atomic(path, b"next")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == {"killed": b"next", "finished": b"slow"}[end]


def test_what_a_dead_writer_moved_away_comes_back(tmp_path, monkeypatch):
    (tmp_path / ".a.bin.0123456789ab.old").write_bytes(b"old")
    (tmp_path / ".a.bin.0123456789ab.tmp").write_bytes(b"new")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "a.bin", b"next")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("a.bin", b"old")]


def test_a_file_taken_for_a_dead_writers_is_written_again(tmp_path, monkeypatch):
    # another writer may look between the making of a file and its lock
    lock, taken = paths._lock, []

    def late(file, *, wait=False):
        if wait and not taken:
            taken.append(file.name)
            paths.remove_leftovers(tmp_path / "a.bin")
        return lock(file, wait=wait)

    monkeypatch.setattr(paths, "_lock", late)
    write_atomic(tmp_path / "a.bin", b"whole")
    assert taken
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("a.bin", b"whole")]


def test_save_refuses_by_name(tmp_path):
    with pytest.raises(TypeError, match="layer must be one of MultiHeadAttention, .*, got dict"):
        save({}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="path must end in .safetensors, got .*a.tflite.*quant.export"):
        save(layers()["bare"], tmp_path / "a.tflite")
    with pytest.raises(TypeError, match="path must be a string or a path, got int"):
        save(layers()["bare"], 3)
    with pytest.raises(FileNotFoundError):
        save(layers()["bare"], tmp_path / "missing" / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_every_kind_lives_where_its_row_says_and_can_be_a_file_where_it_says_so():
    for name, kind in KINDS.items():
        assert class_of(name).__module__ == f"edgeattn.{kind.home}"
        assert not (kind.is_file or kind.own_state) or {"to_state", "from_state"} <= set(dir(class_of(name))), name


def test_load_refuses_other_suffixes_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="path must end in .safetensors or .tflite, got .*layer.npz"):
        load(tmp_path / "layer.npz")
    with pytest.raises(ValueError, match="got .*layer.so', of which there is none; edgeattn.bundle.load runs a bundle"):
        load(tmp_path / "layer.so")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "layer.safetensors")


def written(path, header, body=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def metadata(**changes):
    header = {"format": 1, "kind": "MultiHeadAttention", "config": {"num_heads": 1, "num_kv_heads": 1}, **changes}
    return {"edgeattn": json.dumps(header)}


LYING = {
    "empty": (b"", "is not a whole .safetensors file"),
    "short": (b"\x08\x00\x00", "is not a whole .safetensors file"),
    "header beyond the end": (struct.pack("<Q", 1000) + b"{}", "is not a whole .safetensors file"),
    "huge header": (struct.pack("<Q", 2**63) + b"{}", "is not a whole .safetensors file"),
    "no JSON": (struct.pack("<Q", 4) + b"\xff\x00{}", "is not a whole .safetensors file"),
    "data beyond the end": (
        {"q_weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}},
        "is not a whole .safetensors file",
    ),
    "shape and size differ": (
        {"q_weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 0]}},
        "is not a whole .safetensors file",
    ),
    "foreign": ({}, "holds tensors but no edgeattn layer: .*from_torch or from_bert"),
    "metadata not JSON": ({"__metadata__": {"edgeattn": "{"}}, "has unreadable edgeattn metadata"),
    "metadata not an object": ({"__metadata__": {"edgeattn": "3"}}, "has unreadable edgeattn metadata"),
    "metadata without kind": (
        {"__metadata__": {"edgeattn": '{"format": 1}'}},
        "unreadable edgeattn metadata: .*'kind'",
    ),
    "newer": ({"__metadata__": metadata(format=3)}, "has format 3, this edgeattn reads formats 1 and 2; update edgeattn"),
    "kind": ({"__metadata__": metadata(kind="os")}, "must hold one of MultiHeadAttention, .* got kind 'os'"),
    "kind type": ({"__metadata__": metadata(kind=[])}, r"must hold one of MultiHeadAttention, .* got kind \[\]"),
    "config": ({"__metadata__": metadata(config=[])}, "must hold one of MultiHeadAttention, .* with its config"),
    "no tensors": ({"__metadata__": metadata()}, "valid MultiHeadAttention: missing tensors .*'q_weight'"),
    "heads": ({"__metadata__": metadata(config={"num_heads": "two", "num_kv_heads": 1})}, "missing tensors"),
}


@pytest.mark.parametrize("name", LYING)
def test_lying_files_are_refused_by_name(tmp_path, name):
    content, message = LYING[name]
    path = tmp_path / "layer.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        written(path, content)
    with pytest.raises(ValueError, match=f"layer.safetensors .*{message}"):
        load(path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_truncated_files_are_refused_by_name(tmp_path, kept):
    path = tmp_path / "layer.safetensors"
    save(layers()["whole"], path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="layer.safetensors is not a whole .safetensors file"):
        load(path)


def store(path, tensors, **changes):
    safetensors.numpy.save_file(tensors, path, metadata=metadata(**changes))


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({"extra": np.ones((2, 2), np.float32)}, {}, "unexpected tensors .'extra'"),
        ({"k_weight": np.ones((3, 2), np.float32)}, {}, r"valid MultiHeadAttention: k_weight must have"),
        ({"k_weight": np.ones((2, 2), np.int8)}, {}, "valid MultiHeadAttention: k_weight must be a float16"),
        ({}, {"config": {"num_kv_heads": 1}}, "does not hold a whole MultiHeadAttention: 'num_heads' is missing"),
        ({}, {"config": {"num_heads": "two", "num_kv_heads": 1}}, "num_heads must be an integer, got 'two'"),
        (
            {},
            {"kind": "SelfAttention", "config": {"num_heads": 2, "num_kv_heads": 2}},
            "num_heads must be 1 for SelfAtt",
        ),
    ],
)
def test_files_that_are_no_valid_layer_are_refused_by_name(tmp_path, tensors, changes, message):
    path = tmp_path / "layer.safetensors"
    square = np.ones((2, 2), np.float32)
    store(path, {"q_weight": square, "k_weight": square, "v_weight": square, **tensors}, **changes)
    with pytest.raises(ValueError, match=f"layer.safetensors .*{message}"):
        load(path)


def test_dtypes_that_numpy_lacks_are_refused(tmp_path):
    path = tmp_path / "layer.safetensors"
    tensor = {"dtype": "F8_E4M3", "shape": [1, 1], "data_offsets": [0, 1]}
    written(path, {"__metadata__": metadata(), "q_weight": tensor}, b"\0")
    with pytest.raises(ValueError, match="layer.safetensors stores q_weight as F8_E4M3, which NumPy does not have"):
        load(path)


def test_a_shape_beyond_every_number_is_refused_by_its_budget():
    with pytest.raises(ValueError, match=r"weights takes 2\^63 and more bytes, and a file of this size may unpack to"):
        Budget(10).nbytes((2**62,) * 18, 4, "weights")
