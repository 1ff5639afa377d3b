"""Every reader of files, a whole file for each, and what a stranger may make of it: one list for tests and fuzzing.

    python tests/readers.py READER CASE     # what one case of tests/files/test_readers.py does, by itself
"""

import copy
import functools
import io
import json
import os
import pathlib
import platform
import random
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy

import edgeattn
import quant
from edgeattn import bundle
from edgeattn.quantized import AddMask, MulConstant, SelectMask, TensorQuantization
from edgeattn.runtime import sources
from quant.cli_source import read_batches, read_npy
from quant.describe import describe_file
from quant.export.targets import host_target
from quant.export.tflite import write_tflite

E, H = 8, 2
# What stands for a value where another was: nothing, too much, of another kind.
ODD = (None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64, -(2**63), 0.5, 1e308, float("nan"), "", "x", "x" * 5000, [], {}, [[]], [0, 0],
       {"x": 1}, [2**62, 0])
WORDS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0", b"\0\0\1\0", b"\0\1", b"\xff\xff", b"\x7f", b"\x80")


@dataclass
class Reader:
    """How files of a kind are read, a whole one, and its parts: what lies within a checksum, a length or a compression."""

    suffix: str
    read: Any  # (path) -> anything
    whole: Any  # () -> bytes
    parts: Any = None  # (whole) -> list of (part, function that makes a file of a changed part); a part is bytes, JSON or a message
    share: float = 1.0  # of random changes: those of which each starts a process get fewer


# -- whole files -----------------------------------------------------------------------------------------------------------------


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def float_layer():
    weights = {f"{n}_weight": numbers(E, E, seed=i) for i, n in enumerate(("q", "k", "v", "out"))}
    return edgeattn.MultiHeadAttention(H, **weights, q_bias=numbers(E), out_bias=numbers(E))


def static_layer():
    layer = float_layer()
    x = numbers(1, 4, E)
    made = quant.quantize(layer, quant.calibrate(layer, [{"query": x, "attn_mask": np.tri(4, dtype=bool)}]))
    q = TensorQuantization(np.float32(0.05), 0)
    ops = (MulConstant(127, q, q), AddMask(np.zeros((1, 1, 4, 4), np.int8), q, q), SelectMask(np.tri(4, dtype=bool)))
    return made._replace(score_ops=ops)


def saved(make):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.safetensors"
        make = make()
        make.save(path) if isinstance(make, quant.Calibration) else edgeattn.save(make, path)
        return path.read_bytes()


def exported_tflite(layer):
    with tempfile.TemporaryDirectory() as folder:
        return quant.export(layer, pathlib.Path(folder) / "a.tflite", sequence_length=4).read_bytes()


def torch_state():
    return {"in_proj_weight": numbers(3 * E, E), "in_proj_bias": numbers(3 * E), "out_proj.weight": numbers(E, E),
            "out_proj.bias": numbers(E)}


def npz(state, compressed=True):
    raw = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(raw, **state)
    return raw.getvalue()


def gpt2_halves():
    """A file of bfloat16."""
    header, data = {}, b""
    for name, shape in (("c_attn.weight", (E, 3 * E)), ("c_attn.bias", (3 * E,)), ("c_proj.weight", (E, E)), ("c_proj.bias", (E,))):
        part = (numbers(*shape).view("<u4") >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    return with_header(header, data)


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def keras_variables():
    D = E // H
    shapes = {"query/kernel": (E, H, D), "query/bias": (H, D), "key/kernel": (E, H, D), "key/bias": (H, D),
              "value/kernel": (E, H, D), "value/bias": (H, D), "attention_output/kernel": (H, D, E), "attention_output/bias": (E,)}
    return {name: numbers(*shape) for name, shape in shapes.items()}


def keras_h5(named=True, legacy=False):
    import h5py

    raw = io.BytesIO()
    with h5py.File(raw, "w") as content:
        for name, array in keras_variables().items():
            part, kind = name.split("/")
            part = "output" if part == "attention_output" else part
            content[f"a/{name}" if legacy else f"layers/a/{part}_dense/vars/{int(kind == 'bias')}"] = array
        if named:
            content.require_group("layers/a/vars").attrs["name"] = "att"
            content.attrs["model_config"] = json.dumps(keras_config())
    return raw.getvalue()


def keras_config():
    return {"class_name": "MultiHeadAttention", "config": {"name": "att", "attention_axes": [1], "sliding_window": 3}}


def keras(**parts):
    parts = {"metadata.json": b"{}", "config.json": json.dumps(keras_config()).encode(), "model.weights.h5": keras_h5(), **parts}
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return raw.getvalue()


def onnx_model(kind="heads"):
    from onnx import TensorProto, helper, numpy_helper

    constants = {"shape": np.array([0, 0, H, -1]), "joined": np.array([0, 0, E]), "half": np.float32(0.5)}
    nodes = []
    for i, n in enumerate("qkv"):
        constants |= {f"w{n}": numbers(E, E, seed=i), f"b{n}": numbers(E, seed=i)}
        nodes += [helper.make_node("MatMul", ["x", f"w{n}"], [f"{n}1"]), helper.make_node("Add", [f"{n}1", f"b{n}"], [f"{n}2"]),
                  helper.make_node("Mul", [f"{n}2", "half"], [f"{n}3"])]
        if kind == "heads":
            nodes += [helper.make_node("Reshape", [f"{n}3", "shape"], [f"{n}4"]),
                      helper.make_node("Transpose", [f"{n}4"], [f"{n}"], perm=[0, 2, 1, 3])]
    if kind == "heads":
        nodes += [helper.make_node("Attention", ["q", "k", "v"], ["c"], scale=0.3, is_causal=1),
                  helper.make_node("Transpose", ["c"], ["c1"], perm=[0, 2, 1, 3]), helper.make_node("Reshape", ["c1", "joined"], ["c2"])]
    else:
        constants |= {"packed": numbers(E, 3 * E), "bias": numbers(3 * E)}
        nodes = [helper.make_node("Attention", ["x", "packed", "bias"], ["c2"], num_heads=H, domain="com.microsoft")]
    constants |= {"wo": numbers(E, E, seed=9), "bo": numbers(E)}
    nodes += [helper.make_node("Gemm", ["c2", "wo", "bo"], ["y"], transB=1, alpha=2.0)]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], [numpy_helper.from_array(a, n) for n, a in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)])


def onnx_text():
    return (pathlib.Path(__file__).parent / "models" / "golden" / "bert" / "dynamo18.onnx").read_bytes()


def onnx_static():
    """Codes, further columns and all."""
    with tempfile.TemporaryDirectory() as folder:
        x = numbers(2, 4, 12) * np.float32([40] + [1] * 11)
        weights = [numbers(n, m, seed=i) / 4 for i, (n, m) in enumerate([(12, 12)] * 4 + [(16, 12), (12, 16)])]
        encoder = edgeattn.TransformerEncoder([edgeattn.TransformerEncoderLayer(
            MHA(H, *weights[:4]), edgeattn.FeedForward(*map(edgeattn.Linear, weights[4:])),
            edgeattn.LayerNorm(np.ones(12)), edgeattn.LayerNorm(np.ones(12)))])
        made = quant.quantize(encoder, quant.calibrate(encoder, [x]))
        return quant.export(made, pathlib.Path(folder) / "a.onnx").read_bytes()


def description():
    return {"abi": 2, "target": host_target(), "machine": platform.machine(), "requires": [], "edgeattn": "1",
            "stamp": sources.stamp(), "kernels": ["no_kernel"], "layer": [0, 1]}


def with_footer(about, library=b"\x7fELF no library" + bytes(100)):
    """A bundle with the right checksum; its library is none, so that nothing of it can be run."""
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    body = library + text
    return body + bundle.FOOTER.pack(bundle.MAGIC, len(text), zlib.crc32(body))


# -- parts, and how files are made of them again ---------------------------------------------------------------------------------


def safetensors_parts(whole):
    size = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8:8 + size]), whole[8 + size:]
    parts = [(header, lambda changed: with_header(changed, data))]
    for key, text in header.get("__metadata__", {}).items():
        def inner(changed, key=key):
            return with_header({**header, "__metadata__": {key: json.dumps(changed)}}, data)
        parts += [(json.loads(text), inner)] * 2
    return parts


def zip_parts(whole):
    parts = []
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    for name, content in contents.items():
        def again(changed, name=name):
            raw = io.BytesIO()
            with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
                for member, content in {**contents, name: changed}.items():
                    archive.writestr(member, content)
            return raw.getvalue()
        if name.endswith(".json"):
            parts.append((json.loads(content), lambda changed, again=again: again(json.dumps(changed).encode())))
        parts.append((content, again))
        if name.endswith(".npy"):  # its header alone
            parts.append((content[:128], lambda changed, again=again, rest=content[128:]: again(changed + rest)))
    return parts


def onnx_parts(whole):
    import onnx

    return [(onnx.ModelProto.FromString(whole), lambda changed: changed.SerializeToString())] * 2


def bundle_parts(_):
    return [(description(), with_footer)]


# -- random changes --------------------------------------------------------------------------------------------------------------


def changed(rng, part):
    """A part with a few random changes, of its kind."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if isinstance(part, (bytes, bytearray)):
            part = changed_bytes(rng, bytearray(part))
        elif isinstance(part, (dict, list)):
            part = changed_tree(rng, copy.deepcopy(part))
        else:
            part = changed_message(rng, type(part).FromString(part.SerializeToString()))
    return bytes(part) if isinstance(part, bytearray) else part


def changed_bytes(rng, data):
    size = len(data)
    if size < 2:
        return data
    at, other, length = rng.randrange(size), rng.randrange(size), rng.choice((1, 2, 4, 4, 8, 16, 64, 512))
    kind = rng.randrange(9)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at] = rng.randrange(256)
    elif kind in (2, 3):  # a number in the middle of a structure
        word = rng.choice(WORDS)
        at -= at % len(word)
        data[at:at + len(word)] = word
    elif kind == 4:
        data[at:at + length] = data[other:other + length]
    elif kind == 5:
        data[at:at + length] = bytes(min(length, size - at))
    elif kind == 6:
        del data[at:at + length]
    elif kind == 7:
        data[at:at] = data[other:other + length] * rng.choice((1, 1, 2, 100))
    else:
        near = int.from_bytes(data[at:at + 4], "little") + rng.choice((-4, -1, 1, 4, 1 << 16))
        data[at:at + 4] = (near % 2**32).to_bytes(4, "little")[:max(min(4, size - at), 0)]
    return data


def changed_tree(rng, tree):
    places = []

    def collect(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key])

    collect(tree)
    if not places:
        return tree
    node, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1:
        other, there = rng.choice(places)
        node[key] = copy.deepcopy(other[there]) if len(json.dumps(other[there])) < 2000 else None
    elif kind == 2 and isinstance(node, dict):
        node[rng.choice(("x", "", f"{key}.x"))] = node.pop(key)
    elif kind == 3 and isinstance(node, list):
        node *= rng.choice((2, 3, 100))
    elif type(node[key]) is int and kind > 3:
        node[key] += rng.choice((-1, 1, 8, 2**20))
    else:
        node[key] = copy.deepcopy(rng.choice(ODD))
    return tree


def changed_message(rng, message):
    """A protobuf message with a field cleared, repeated, exchanged or set."""
    places = []

    def collect(node):
        for field, value in node.ListFields():
            places.append((node, field))
            if field.message_type is not None:
                for inner in [value] if hasattr(value, "ListFields") else value:
                    collect(inner)

    collect(message)
    node, field = rng.choice(places)
    value = getattr(node, field.name)
    single = hasattr(value, "ListFields") or isinstance(value, (int, float, str, bytes))
    made = {int: lambda: rng.choice((0, 1, 2, -1, 7, 2**31 - 1, -(2**31))), float: lambda: rng.choice((0.0, -1.0, float("nan"), 3e38)),
            str: lambda: rng.choice(("", "x", "q", "w", "c", "Identity", "Constant", "Split", "Cast", "y", "\0")),
            bytes: lambda: rng.choice((b"", b"x", bytes(64)))}
    if rng.random() < 0.3:
        node.ClearField(field.name)
    elif field.enum_type is not None:
        setattr(node, field.name, rng.choice(field.enum_type.values).number)
    elif single and type(value) in made:
        setattr(node, field.name, made[type(value)]())
    elif not single and len(value):
        at = rng.randrange(len(value))
        if hasattr(value[at], "ListFields"):
            other = rng.choice(value)
            rng.choice((lambda: value.append(other), lambda: value[at].CopyFrom(copy.deepcopy(other)), lambda: value.pop(at)))()
        elif rng.random() < 0.5:
            value[at] = made[type(value[at])]()
        else:
            rng.choice((lambda: value.append(value[at]), lambda: value.pop(at)))()
    return message


# -- the readers -----------------------------------------------------------------------------------------------------------------


def read_data(path):
    return list(read_batches(None, path))


def inspect(path):
    return [part for part, _ in zip(describe_file(path), range(10**6), strict=False)]


def loaded_bundle(path):
    bundle.load(path)


def bundles_whole():
    return with_footer(description())


MHA = edgeattn.MultiHeadAttention
READERS = {
    "load a float layer": Reader(".safetensors", edgeattn.load, lambda: saved(float_layer), safetensors_parts),
    "load a dynamic layer": Reader(".safetensors", edgeattn.load, lambda: saved(lambda: quant.quantize(float_layer(), scheme="dynamic")),
                                   safetensors_parts),
    "load a static layer": Reader(".safetensors", edgeattn.load, lambda: saved(static_layer), safetensors_parts),
    "load a tflite": Reader(".tflite", edgeattn.load, lambda: write_tflite(static_layer(), sequence_length=4)),
    "load a float tflite": Reader(".tflite", edgeattn.load, lambda: exported_tflite(float_layer())),
    "load a hybrid tflite": Reader(".tflite", edgeattn.load, lambda: exported_tflite(quant.quantize(float_layer(), scheme="dynamic"))),
    "inspect a tflite": Reader(".tflite", inspect, lambda: write_tflite(static_layer(), sequence_length=4)),
    "inspect a layer": Reader(".safetensors", inspect, lambda: saved(static_layer), safetensors_parts),
    "torch safetensors": Reader(".safetensors", lambda path: MHA.from_torch(path, H), lambda: safetensors.numpy.save(torch_state()),
                                safetensors_parts),
    "torch npz": Reader(".npz", lambda path: MHA.from_torch(path, H), lambda: npz(torch_state()), zip_parts),
    "bert npz": Reader(".npz", lambda path: MHA.from_bert(path, "", H), lambda: npz(
        {f"{n}.{part}": numbers(*shape) for n in ("self.query", "self.key", "self.value", "output.dense")
         for part, shape in (("weight", (E, E)), ("bias", (E,)))}, compressed=False), zip_parts),
    "gpt2 safetensors": Reader(".safetensors", lambda path: MHA.from_gpt2(path, "", H), gpt2_halves, safetensors_parts),
    "keras": Reader(".keras", MHA.from_keras, keras, zip_parts, share=0.2),
    "keras weights": Reader(".weights.h5", MHA.from_keras, lambda: keras_h5(named=False)),
    "keras weights by name": Reader(".weights.h5", lambda path: MHA.from_keras(path, "att"), keras_h5, share=0.1),
    "keras legacy": Reader(".h5", MHA.from_keras, lambda: keras_h5(legacy=True), share=0.1),
    "keras npz": Reader(".npz", MHA.from_keras, lambda: npz({f"arr_{i}": a for i, a in enumerate(keras_variables().values())}), zip_parts),
    "onnx": Reader(".onnx", MHA.from_onnx, lambda: onnx_model().SerializeToString(), onnx_parts),
    "onnx packed": Reader(".onnx", MHA.from_onnx, lambda: onnx_model("packed").SerializeToString(), onnx_parts),
    "onnx text": Reader(".onnx", edgeattn.TextEncoder.from_onnx, onnx_text, onnx_parts, share=0.1),
    "onnx static": Reader(".onnx", lambda path: edgeattn.TransformerEncoder.from_onnx(path, scheme="static"), onnx_static, onnx_parts,
                          share=0.1),
    "calibration": Reader(".safetensors", quant.Calibration.load, lambda: saved(
        lambda: quant.calibrate(float_layer(), [numbers(1, 4, E)])), safetensors_parts),
    "DATA npz": Reader(".npz", read_data, lambda: npz({"query": numbers(2, 4, E), "key_padding_mask": np.ones((2, 4), bool),
                                                       "is_causal": np.array(True), "causal_alignment": np.array("upper_left")}), zip_parts),
    "DATA npy": Reader(".npy", read_npy, lambda: npy(numbers(2, 4, E))),
    "bundle": Reader(".so", loaded_bundle, bundles_whole, bundle_parts),
}


def npy(array):
    raw = io.BytesIO()
    np.save(raw, array)
    return raw.getvalue()


def case(name, number):
    """(title, content: bytes or a function of a folder) of a case of a reader; the same for ever.

    0 is the whole file; then those made by hand, then it cut off in places, then random changes.
    """
    whole, parts, made = _of(name)
    if number == 0:
        return "whole", whole
    if number <= len(made):
        title = list(made)[number - 1]
        return title, made[title]
    number -= len(made)
    if number <= CUTS:
        kept = whole_cut(len(whole), number)
        return f"cut after {kept} bytes", whole[:kept]
    rng = random.Random(f"{name} {number}")
    if parts and rng.random() < 0.7:
        part, again = rng.choice(parts)
        return f"part changed, {number}", again(changed(rng, part))
    return f"changed, {number}", changed(rng, whole)


CUTS = 24


def whole_cut(size, number):
    """Places to cut a file: its first words, evenly, and just before its end."""
    if number <= 8:
        return min((0, 1, 4, 7, 8, 9, 12, 30)[number - 1], size)
    return size - (1, 4, 22, 24)[number - 9] if number <= 12 else size * (number - 12) // 13


@functools.cache
def _of(name):
    from readers_made import MADE  # which makes them of what is here

    reader = READERS[name]
    whole = reader.whole()
    first = next(n for n, other in READERS.items() if (other.read, other.suffix) == (reader.read, reader.suffix))
    made = {title: make for key, cases in MADE.items()  # once for those that differ in the whole file alone
            if name == first and reader.suffix.endswith(key) or key == name for title, make in cases.items()}
    return whole, reader.parts(whole) if reader.parts else None, made


def handmade(name):
    """How many cases of a reader are made by hand, or cut off."""
    return 1 + len(_of(name)[2]) + CUTS


# -- what is a right answer ------------------------------------------------------------------------------------------------------

OURS = tuple(str(pathlib.Path(module.__file__).parent) for module in (edgeattn, quant))
ACCIDENTS = (AttributeError, IndexError, NameError, ZeroDivisionError, AssertionError, OverflowError)


def fault(error, path):
    """What is wrong with how a reader refused a file; None where it did as promised."""
    if not isinstance(error, (ValueError, TypeError, OSError)):
        return f"{type(error).__name__}: {str(error)[:200]}"
    if path.name not in str(error):
        return f"does not name the file: {str(error)[:200]}"
    if len(str(error)) > 20_000:
        return f"a message of {len(str(error))} letters"
    while error is not None:
        if isinstance(error, MemoryError):
            return "takes more than 512 MiB"
        if isinstance(error, ACCIDENTS) and _raised_in(error).startswith(OURS):
            return f"an accident: {type(error).__name__}: {str(error)[:200]} in {_raised_in(error)}"
        error = error.__cause__ or error.__context__
    return None


def _raised_in(error):
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        title, content = case(sys.argv[1], int(sys.argv[2]))
        path = pathlib.Path(folder) / f"a{READERS[sys.argv[1]].suffix}"
        path.write_bytes(content(path.parent) if callable(content) else content)
        print(title, os.path.getsize(path), "bytes")
        print(READERS[sys.argv[1]].read(path))
