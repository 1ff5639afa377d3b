"""Files made by hand, each to be refused, or read, within 2 seconds and 512 MiB: by suffix or reader, title -> maker.

A maker takes the folder that the file will lie in, for files that other files belong to.
"""

import bz2
import io
import json
import lzma
import os
import struct
import zipfile
import zlib

import numpy as np
import readers
from readers import E, H

MADE = {}


def made(*keys):
    def keep(maker):
        for title, make in maker().items():
            for key in keys:
                MADE.setdefault(key, {})[f"{maker.__name__}: {title}"] = make
        return maker
    return keep


# -- zip and .npy ----------------------------------------------------------------------------------------------------------------


def zip_of(*members, directory=None):
    """A zip of (name, method, packed bytes, size that it says); all checksums 0. `directory`: members only listed."""
    content, listed = b"", b""
    for name, method, packed, size in members:
        name = name.encode()
        head = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 0, 0, len(packed), min(size, 2**32 - 1), len(name), 0)
        listed += b"PK\1\2" + struct.pack("<H", 20) + head + struct.pack("<HHHII", 0, 0, 0, 0, len(content)) + name
        content += b"PK\3\4" + head + name + packed
    entries = len(members)
    for name, at, size in directory or ():
        head = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, size, size, len(name), 0)
        listed += b"PK\1\2" + struct.pack("<H", 20) + head + struct.pack("<HHHII", 0, 0, 0, 0, at) + name.encode()
        entries += 1
    return content + listed + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, min(entries, 65535), min(entries, 65535), len(listed), len(content), 0)


def npy_header(shape, descr="'<f4'", order="False"):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1) + text + b"\n"


def zeros(count):
    """`count` MiB of zeros, deflated, to be continued by nothing."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    once = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return once * count + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def deflated(start):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)


def bomb(name, shape, descr="'<f4'"):
    """An array of zeros of a shape, well formed, at a thousandth of its size."""
    head, size = npy_header(shape, descr), int(np.prod([float(axis) for axis in shape])) * 4
    return name, 8, deflated(head) + zeros(size >> 20), len(head) + size


def one(header, method=8, data=b"", name="in_proj_weight.npy", size=None):
    content = header + data
    packed = {0: content, 8: deflated(content) + b"\3\0", 12: bz2.compress(content), 14: b"\x09\x04\x05\0" + lzma.compress(
        content, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA1}])}.get(method, content)
    return lambda _: zip_of((name, method, packed, len(content) if size is None else size))


HEADERS = {
    "not closed": b"{'descr': '<f4', 'fortran_order': False, 'shape': (8",
    "9000 minus": b"-" * 9000 + b"1",
    "9000 brackets": b"(" * 9000,
    "an expression": b"{'descr': '<f4', 'fortran_order': False, 'shape': (9**9**9,)}",
    "nothing": b"",
    "a name twice": b"{'descr': '<f4', 'descr': '<f4', 'shape': (3,)}",
    "records": b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}",
    "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
    "huge texts": b"{'descr': '<U999999999', 'fortran_order': False, 'shape': (999,)}",
    "void": b"{'descr': '|V8', 'fortran_order': False, 'shape': (3,)}",
    "dates": b"{'descr': '<M8', 'fortran_order': False, 'shape': (3,)}",
    "a shape of text": b"{'descr': '<f4', 'fortran_order': False, 'shape': '<f4'}",
    "negative": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}",
    "10^12 elements": b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}",
    "2^80 elements": b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999999999, 9999999999999999999)}",
    "none of many": b"{'descr': '<f4', 'fortran_order': True, 'shape': (0, 4611686018427387904)}",
    "40 axes": b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * 40 + b")}",
}


def with_length(text):
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


@made(".npz")
def npy_in_zip():
    return {title: one(with_length(text)) for title, text in HEADERS.items()} | {
        "length beyond": one(b"\x93NUMPY\1\0\xff\xff"), "version 9": one(b"\x93NUMPY\x09\0" + bytes(200)),
        "version 2 of 4 GB": one(b"\x93NUMPY\2\0\xff\xff\xff\xff" + b" " * 300)}


@made(".npy")
def npy():
    return {title: lambda _, text=text: with_length(text) for title, text in HEADERS.items()} | {
        "4 GB of numbers": lambda _: npy_header((2**30,)), "version 2 of 4 GB": lambda _: b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(300)}


@made(".npz", ".keras")
def zips():
    head = npy_header((2, 2))
    nested = io.BytesIO()
    with zipfile.ZipFile(nested, "w") as archive:
        archive.writestr("a.zip", readers.npz(readers.torch_state()))
    return {
        "bzip2": one(head, 12, bytes(16)), "LZMA": one(head, 14, bytes(16)), "LZMA of 4 GB": lambda _: zip_of(
            ("in_proj_weight.npy", 14, b"\x09\x04\x05\0\x5d\xff\xff\xff\xff" + bytes(64), 2**20)),
        "method 99": one(head, 99, bytes(16)), "bzip2 that expands to 1 GB": lambda _: zip_of(
            ("in_proj_weight.npy", 12, bz2.compress(bytes(2**23)) * 128, 2**30)),
        "damaged deflate": lambda _: zip_of(("in_proj_weight.npy", 8, b"\xff" * 99, 144)),
        "wrong checksum": one(head, 8, bytes(16)), "no end": lambda _: readers.npz(readers.torch_state())[:-22],
        "a zip within": lambda _: nested.getvalue(), "no member": lambda _: zip_of(),
        "name with a path": one(head, 0, bytes(16), "../../in_proj_weight.npy"), "an empty name": one(head, 0, bytes(16), ".npy"),
        "a member twice": lambda _: zip_of(*[("in_proj_weight.npy", 0, head + bytes(16), len(head) + 16)] * 2),
        "no array": one(b"text", 0, b"", "in_proj_weight.txt"), "says 4 GB": one(head, 0, bytes(16), size=2**32 - 2),
        "12,000 members at one place": lambda _: zip_of(("a.npy", 0, head + bytes(16), len(head) + 16), directory=[
            (f"{i:05}.npy", 0, len(head) + 16) for i in range(12_000)]),
        "encrypted": lambda _: one(head, 8, bytes(16))(_).replace(struct.pack("<HHH", 20, 0, 8), struct.pack("<HHH", 20, 1, 8)),
        "directory beyond": lambda _: b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 2**31, 2**31, 0),
    }


@made(".npz")
def bombs():
    return {
        "1 GiB of zeros": lambda _: zip_of(bomb("in_proj_weight.npy", (2**14, 2**14))),
        "a layer of 1 GiB": lambda _: zip_of(bomb("in_proj_weight.npy", (3 * 2**13, 2**13)), bomb("out_proj.weight.npy", (2**13, 2**13))),
        "40 MiB, which is read": lambda _: readers.npz({"in_proj_weight": np.zeros((3 * 1664, 1664), "f"),
                                                        "out_proj.weight": np.zeros((1664, 1664), "f")}),
        "20 members of 60 MiB": lambda _: zip_of(*(bomb(f"{i}.npy", (15, 2**20)) for i in range(20))),
    }


# -- .safetensors ----------------------------------------------------------------------------------------------------------------


@made(".safetensors")
def headers():
    def tensor(dtype="F32", shape=(2, 2), offsets=(0, 16)):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}

    def file(data=bytes(16), **tensors):
        return lambda _: readers.with_header(tensors, data)

    return {
        "nested": lambda _: readers.with_header(b'{"a":' + b"[" * 100_000), "nested and closed": lambda _: readers.with_header(
            b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
        "nested metadata": lambda _: readers.with_header({"__metadata__": {"edgeattn": "[" * 50_000, "quant.calibration": "[" * 50_000}}),
        "objects in metadata": file(b"", __metadata__={"edgeattn": {"a": 1}}), "metadata a list": file(b"", __metadata__=[1]),
        "header of 2^63": lambda _: struct.pack("<Q", 2**63) + b"{}", "header of 1 GB": lambda _: struct.pack("<Q", 2**30) + b"{}",
        "overlap": file(a=tensor(), b=tensor()), "gap": file(bytes(48), a=tensor(), b=tensor(offsets=(32, 48))),
        "negative": file(a=tensor(offsets=(-16, 0))), "backwards": file(a=tensor(offsets=(16, 0))),
        "2^63 bytes": file(a=tensor(shape=(2**61,), offsets=(0, 2**63))), "floats": file(a=tensor(offsets=(0.0, 16.0))),
        "true": file(a=tensor(shape=(True, 4))), "empty and long": file(b"", q_weight=tensor("I8", (2**40, 0), (0, 0))),
        "1e999": lambda _: readers.with_header(b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}', bytes(16)),
        "many digits": lambda _: readers.with_header(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 9000 + b'], "data_offsets": [0, 16]}}'),
        "200,000 axes": file(a=tensor(shape=[9**99] * 200)), "twice": lambda _: readers.with_header(
            b'{"a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]}, "a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', bytes(16)),
        "dtype a list": file(a=tensor(dtype=["F32"])), "dtype unknown": file(a=tensor(dtype="F99")), "behind": file(bytes(20), a=tensor()),
        "no object": lambda _: readers.with_header(b"[1]"), "UTF-16": lambda _: readers.with_header('{"a": 1}'.encode("utf-16")),
        "10,000 of bfloat16": lambda _: readers.with_header(
            {f"{i:05}": tensor("BF16", (1,), (2 * i, 2 * i + 2)) for i in range(10_000)}, bytes(20_000)),
        "30,000 nothings": lambda _: readers.with_header({str(i): {} for i in range(30_000)}),
    }


def layer_file(change, **tensors):
    """The static layer's file with another config, and further or other tensors."""
    def make(_):
        import safetensors.numpy

        whole = readers._of("load a static layer")[0]
        size = int.from_bytes(whole[:8], "little")
        header = json.loads(json.loads(whole[8:8 + size])["__metadata__"]["edgeattn"])
        before = header["config"]["score_ops"]
        change(header["config"])
        kept = {name: tensor for name, tensor in safetensors.numpy.load(whole).items()
                if header["config"]["score_ops"] is before or not name.startswith("score_ops.")}
        return safetensors.numpy.save({**kept, **tensors}, metadata={"edgeattn": json.dumps(header)})
    return make


@made("load a static layer")
def configs():
    q = [0.05, 0]
    return {
        "10,000 score_ops": layer_file(lambda c: c.update(score_ops=[{"op": "MulConstant", "code": 1, "constant": q, "output": q}] * 10_000)),
        "masks that broadcast to 2^38": layer_file(
            lambda c: c.update(score_ops=[{"op": "SelectMask", "fill": -128}] * 2),
            **{"score_ops.0.keep": np.ones((1, 1, 2**18, 1), bool), "score_ops.1.keep": np.ones((1, 1, 1, 2**18), bool)}),
        "masks that broadcast to 2^23": layer_file(
            lambda c: c.update(score_ops=[{"op": "SelectMask", "fill": -128}] * 2),
            **{"score_ops.0.keep": np.ones((1, 1, 2**18, 1), bool), "score_ops.1.keep": np.ones((1, 1, 1, 2**5), bool)}),
        "masks that broadcast to 2^34": layer_file(
            lambda c: c.update(score_ops=[{"op": "SelectMask", "fill": -128}] * 2),
            **{"score_ops.0.keep": np.ones((1, 1, 2**17, 1), bool), "score_ops.1.keep": np.ones((1, 1, 1, 2**17), bool)}),
        "a mask of numbers": layer_file(lambda c: c["score_ops"][1].update(mask=3)), "code 0.5": layer_file(
            lambda c: c["score_ops"][0].update(code=0.5)), "no pairs": layer_file(lambda c: c["tensors"].update(query=3)),
        "2^31 - 1 heads": layer_file(lambda c: c.update(num_heads=2**31 - 1)), "sources": layer_file(lambda c: c.update(sources=[{}, 0, 0])),
    }


# -- .tflite ---------------------------------------------------------------------------------------------------------------------


class Tables:
    """A FlatBuffer put together table by table; tables and vectors are named, and may be named often."""

    def __init__(self):
        self.data, self.places, self.waiting = bytearray(b"\0\0\0\0TFL3"), {}, []

    def table(self, name, kind, **fields):
        """`fields`: the name of another table or vector, or bytes."""
        from edgeattn.tflite_schema import TABLES

        slots = {TABLES[kind][field].slot: value for field, value in fields.items()}
        at, offsets = 4, [0] * (max(slots, default=-1) + 1)
        for slot, value in slots.items():
            offsets[slot], at = at, at + (4 if isinstance(value, str) else len(value))
        self._align()
        vtable = len(self.data)
        self.data += struct.pack(f"<HH{len(offsets)}H", 4 + 2 * len(offsets), at, *offsets)
        self._align()
        self.places[name] = len(self.data)
        self.data += struct.pack("<i", len(self.data) - vtable)
        for value in slots.values():
            self._refer(value) if isinstance(value, str) else self.data.extend(value)

    def vector(self, name, items):
        """Of names of tables, or an array."""
        self._align()
        self.places[name] = len(self.data)
        self.data += struct.pack("<I", len(items))
        if isinstance(items, np.ndarray):
            self.data += items.tobytes()
        else:
            for item in items:
                self._refer(item)

    def _refer(self, name):
        self.waiting.append((len(self.data), name))
        self.data += b"\0\0\0\0"

    def _align(self):
        self.data += bytes(-len(self.data) % 4)

    def file(self):
        for at, name in [(0, "model"), *self.waiting]:
            struct.pack_into("<I", self.data, at, (self.places[name] - at) % 2**32)
        return bytes(self.data)


def graph(operators=1, operands=1, tensors=1, outputs=1, scales=0, buffers=1, constants=0, **tensor):
    """A file of one table a kind, each named so often."""
    t = Tables()
    t.table("model", "Model", operator_codes="codes", subgraphs="graphs", buffers="buffers")
    t.vector("codes", ["code"])
    t.vector("graphs", ["graph"])
    t.table("code", "OperatorCode")
    t.table("graph", "SubGraph", tensors="tensors", operators="operators", outputs="outputs")
    t.vector("outputs", np.zeros(outputs, "<i4"))
    t.vector("buffers", ["buffer"] * buffers)
    t.table("buffer", "Buffer", data="bytes")
    t.vector("bytes", np.zeros(4 * constants, "u1"))
    if scales:
        tensor["quantization"] = "quantization"
    t.vector("tensors", ["tensor"] * tensors if not scales else [f"tensor{i}" for i in range(tensors)])
    for i in range(tensors if scales else 1):
        t.table(f"tensor{i}" if scales else "tensor", "Tensor", **tensor)
    if scales:  # behind who names them: offsets lead forwards
        t.table("quantization", "QuantizationParameters", scale="scales")
        t.vector("scales", np.ones(scales, "<f4"))
    t.vector("operators", ["operator"] * operators)
    t.table("operator", "Operator", inputs="operands")
    t.vector("operands", np.zeros(operands, "<i4"))
    return t.file()


def chain(kind, count, shape=(1, 4, 8)):
    """A static layer's graph with a chain of operators where one was."""
    def make(_):
        import dataclasses

        from edgeattn.files.tflite_file import parse
        from edgeattn.tflite_schema import Operator
        from quant.export.tflite import serialize

        graph = parse(readers._of("load a tflite")[0], "a.tflite")
        at = next(i for i, operator in enumerate(graph.operators) if operator.name == kind)
        operator = graph.operators[at]
        last, where = operator.outputs[0], next(i for i, n in enumerate(operator.inputs) if graph.tensors[n].data is None)
        chain = []
        for i in range(count):
            graph.tensors.append(dataclasses.replace(graph.tensors[last], name=f"chain {i}"))
            inputs = list(operator.inputs)
            if i:
                inputs[where] = len(graph.tensors) - 2
            chain.append(Operator(operator.name, tuple(inputs), (len(graph.tensors) - 1,), operator.options, operator.version))
        inputs = list(operator.inputs)
        inputs[where] = len(graph.tensors) - 1
        graph.operators[at] = dataclasses.replace(operator, inputs=tuple(inputs))
        graph.operators[at:at] = chain
        return serialize(graph)
    return make


def long(length):
    """The static layer's graph, without its mask, for so many tokens."""
    return lambda _: readers.write_tflite(readers.static_layer()._replace(score_ops=()), sequence_length=length)


@made(".tflite")
def tables():
    return {
        "8000 operators of 8000 operands": lambda _: graph(8000, 8000), "8000 operators of 8000 constants": lambda _: graph(8000, 8000, constants=1), "100,000 operators": lambda _: graph(100_000, 9),
        "200,000 tensors": lambda _: graph(tensors=200_000), "9000 tensors of 100,000 scales": lambda _: graph(tensors=9000, scales=100_000),
        "200,000 outputs": lambda _: graph(outputs=200_000), "200,000 buffers": lambda _: graph(buffers=200_000),
        "a model that is its own graph": lambda _: b"\x08\0\0\0TFL3" + bytes(400), "200,000 operands": lambda _: graph(1, 200_000),
        "9999 operators that share 100,000 operands": lambda _: graph(9999, 100_000),
        **{f"{count} times {kind}": chain(kind, count) for kind in ("RESHAPE", "TRANSPOSE", "MUL", "ADD", "SELECT_V2") for count in (9, 900)},
        "activations of 2^22, which are read": long(2**19), "activations of 2^23": long(2**20),
    }


# -- .onnx -----------------------------------------------------------------------------------------------------------------------


def model(nodes, constants=(), **more):
    from onnx import TensorProto, helper, numpy_helper

    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    stored = [numpy_helper.from_array(np.eye(E, dtype=np.float32), n) if isinstance(n, str) else n for n in constants]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]).SerializeToString()


@made("onnx static")
def damaged_encoders():
    """What fuzzing has found: nodes of an encoder in int8 that lack what they need."""
    import onnx

    def model_with(change):
        def make(_):
            model = onnx.ModelProto.FromString(readers.READERS["onnx static"].whole())
            change({node.name: node for node in model.graph.node})
            return model.SerializeToString()
        return make

    def axis(nodes):
        nodes["layers.0.attention.query/weight/reals"].attribute[0].i = 7

    def cast(nodes):
        node = nodes["layers.0.attention.key/split"]
        node.op_type, node.input[0] = "Cast", ""

    def nothing(nodes):
        nodes["layers.0.sum2"].output[0] = ""

    return {"an axis that is none": model_with(axis), "a Cast of nothing": model_with(cast), "a sum that nobody reads": model_with(nothing)}


@made(".onnx")
def graphs():
    from onnx import TensorProto, helper

    def node(kind, inputs, outputs, **attributes):
        return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)

    weights = [f"w{n}" for n in "qkv"]
    maps = [node("MatMul", f"x w{n}", n) for n in "qkv"]
    attention = node("Attention", "q k v", "o", q_num_heads=H, kv_num_heads=H)

    def file(*nodes, constants=weights):
        return lambda _: model(list(nodes), constants)

    def chain(kind, start, end, count, **attributes):
        return [node(kind, start if not i else f"{end}{i}", f"{end}{i + 1}" if i < count - 1 else end, **attributes) for i in range(count)]

    def up(kind, count, inputs="", **attributes):
        nodes = [node("MatMul", "x wq", "start"), *maps[1:]]
        nodes += [node(kind, f"{'start' if not i else f'c{i}'} {inputs}", f"c{i + 1}" if i < count - 1 else "q", **attributes) for i in range(count)]
        return file(*nodes, attention)

    def outside(location, prepare=None, **more):
        def make(folder):
            tensor = TensorProto(name="wq", data_type=TensorProto.FLOAT, dims=[E, E], data_location=TensorProto.EXTERNAL)
            for key, value in {"location": location, **more}.items():
                tensor.external_data.add(key=key, value=str(value))
            if prepare is not None:
                prepare(folder)
            return model([*maps, attention], [tensor, *weights[1:]])
        return make

    def link(folder):
        (folder.parent / f"{folder.name}.secret").write_bytes(bytes(4 * E * E))
        if not (folder / "link").is_symlink():
            os.symlink(folder.parent / f"{folder.name}.secret", folder / "link")

    def beside(folder):
        (folder / "beside").write_bytes(bytes(4 * E * E))

    def sized(dims, **fields):
        return file(*maps, attention, constants=[TensorProto(name="wq", dims=dims, **{"data_type": TensorProto.FLOAT, **fields}), *weights[1:]])

    return {
        "a cycle upwards": file(node("Identity", "a", "a"), node("Attention", "a a a", "y", q_num_heads=H, kv_num_heads=H)),
        "a cycle of two": file(node("Identity", "a", "b"), node("Identity", "b", "a"), node("Attention", "a a a", "y")),
        "a cycle downwards": file(*maps, attention, node("Identity", "o", "p"), node("Identity", "p", "r"), node("Identity", "r", "p")),
        "a cycle of its own output": file(*maps, attention, node("Identity", "o", "o")),
        "a constant of itself": file(node("Identity", "wq", "wq"), *maps, attention, constants=weights[1:]),
        "transposed constants in a cycle": file(node("Transpose", "wq", "t"), node("Transpose", "t", "wq"), *maps, attention, constants=weights[1:]),
        "9 on the way": up("Identity", 9), "5000 on the way": up("Identity", 5000), "5000 sums": up("Add", 5000, "wv"),
        "5000 products": up("Mul", 5000, "wv"), "5000 Reshape": up("Reshape", 5000, "x"),
        "a constant through 20,000": file(*chain("Identity", "w0", "wq", 20_000), *maps, attention, constants=["w0", *weights[1:]]),
        "a constant turned 20,000 times": file(*chain("Transpose", "w0", "wq", 20_000), *maps, attention, constants=["w0", *weights[1:]]),
        "20,000 behind": file(*maps, attention, *chain("Cast", "o", "p", 20_000)),
        "no attributes": file(*maps, node("Attention", "q k v", "o")), "no inputs": file(*maps, node("Attention", "", "o")),
        "no outputs": file(*maps, node("Attention", "q k v", "", q_num_heads=H)), "one input": file(*maps, node("Attention", "q", "o")),
        "no heads": file(*maps, node("Attention", "q k v", "o", q_num_heads=0, kv_num_heads=0)),
        "negative heads": file(*maps, node("Attention", "q k v", "o", q_num_heads=-2, kv_num_heads=H)),
        "heads of text": file(*maps, node("Attention", "q k v", "o", q_num_heads="2", kv_num_heads=[1.0])),
        "2^40 heads": file(*maps, node("Attention", "q k v", "o", q_num_heads=2**40, kv_num_heads=2**40)),
        "packed without heads": file(helper.make_node("Attention", ["x", "wq"], ["y"], domain="com.microsoft")),
        "packed without weights": file(helper.make_node("Attention", ["x"], ["y"], domain="com.microsoft", num_heads=H)),
        "packed in negative sizes": file(helper.make_node("Attention", ["x", "wq"], ["y"], domain="com.microsoft", num_heads=H, qkv_hidden_sizes=[-8, 8, 8])),
        "several heads without": file(*maps, helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft")),
        "MatMul of nothing": file(node("MatMul", "", "q"), *maps[1:], attention), "Gemm without": file(node("Gemm", "x", "q"), *maps[1:], attention),
        "a graph of nothing": file(), "Div by 0": file(node("Constant", "", "zero", value_float=0.0), node("MatMul", "x wq", "start"), node("Div", "start zero", "q"), *maps[1:], attention),
        "Split to no size": file(node("MatMul", "x wq", "start"), node("Split", "start", "q r s", axis=-1, split=[-8, 8, 8]), *maps[1:], attention),
        "a constant of text": file(node("Constant", "", "wq", value_string="x"), *maps, attention, constants=weights[1:]),
        "a constant of nothing": file(node("Constant", "", "wq"), *maps, attention, constants=weights[1:]),
        "a permutation of text": file(node("Transpose", "w0", "wq", perm="10"), *maps, attention, constants=["w0", *weights[1:]]),
        "a permutation of others": file(node("Transpose", "w0", "wq", perm=[0, 7]), *maps, attention, constants=["w0", *weights[1:]]),
        "500,000 nodes": lambda _: b"\x3a" + _varint(1_000_000) + b"\x0a\0" * 500_000,
        "90,000 nodes": lambda _: b"\x3a" + _varint(180_000) + b"\x0a\0" * 90_000,
        "a node of 250,000 inputs": file(node("Attention", "a " * 250_000, "o")), "nested graphs": lambda _: _nested(200),
        "2^62 elements": sized([2**31, 2**31], raw_data=b"\0" * 16), "negative axes": sized([-8, -8], raw_data=bytes(256)),
        "no elements of 2^62": sized([2**62, 0], raw_data=b""), "of text": sized([1], data_type=8, string_data=[b"x"]),
        "of 4 bits": sized([8, 8], data_type=22, raw_data=bytes(32)), "of an unknown kind": sized([8, 8], data_type=99, raw_data=bytes(256)),
        "too few numbers": sized([8, 8], float_data=[1.0]), "no kind": sized([8, 8], data_type=0),
        "data in a folder above": outside("../secret"), "data at a path": outside("/etc/hostname"), "data behind a link": outside("link", link),
        "data that is not there": outside("none"), "data that is a folder": outside("."), "data with a zero": outside("a\0b"),
        "data nowhere": outside(""), "data beyond the end": outside("beside", beside, offset=2**40), "data before": outside("beside", beside, offset=-8),
        "data too long": outside("beside", beside, length=2**40), "data at text": outside("beside", beside, offset="x"),
        "data beside, which is read": outside("beside", beside, offset=0, length=4 * E * E),
    }


def _varint(number):
    made = b""
    while number > 127:
        made += bytes([number & 127 | 128])
        number >>= 7
    return made + bytes([number])


def _nested(depth):
    """A node with an attribute with a graph with a node with ..."""
    content = b""
    for _ in range(depth):
        node = b"\x2a" + _varint(len(content)) + content
        graph = b"\x0a" + _varint(len(node)) + node
        content = b"\x32" + _varint(len(graph)) + graph
    return b"\x3a" + _varint(len(content)) + content


# -- HDF5 and .keras -------------------------------------------------------------------------------------------------------------


@made(".keras")
def archives():
    def parts(**changes):
        return lambda _: readers.keras(**changes)

    return {
        "config nested": parts(**{"config.json": b"[" * 100_000}), "config nested and closed": parts(**{"config.json": b"[" * 800 + b"]" * 800}),
        "config no object": parts(**{"config.json": b"3"}), "weights no HDF5": parts(**{"model.weights.h5": b"x" * 999}),
        "1 GiB of weights": lambda _: zip_of(("config.json", 0, b"{}", 2), ("model.weights.h5", 8, zeros(1024), 2**30)),
        "1 GiB of config": lambda _: zip_of(("config.json", 8, zeros(1024), 2**30), ("model.weights.h5", 0, b"", 0)),
        "a window of text": parts(**{"config.json": json.dumps({"class_name": "MultiHeadAttention", "config": {
            "name": "att", "sliding_window": "x" * 10_000, "attention_axes": None}}).encode()}),
        "axes of many": parts(**{"config.json": json.dumps({"class_name": "MultiHeadAttention", "config": {
            "name": "att", "attention_axes": [1] * 100_000}}).encode()}),
        "10,000 layers": parts(**{"config.json": json.dumps([readers.keras_config()] * 4000).encode()}),
    }


def with_circle(content):
    """An HDF5 file whose heap of texts the library follows for ever: the size of its first object leads back."""
    at = content.index(b"GCOL") + 24
    return content[:at] + b"\xff" + content[at + 1:]


@made(".h5")
def hdf5():
    def file(fill):
        def make(_):
            import h5py

            raw = io.BytesIO()
            with h5py.File(raw, "w") as content:
                fill(content, h5py)
            return raw.getvalue()
        return make

    def place(content, array=None, **options):
        content.create_dataset("layers/a/query_dense/vars/0", data=array, **options)

    def loop(content, _):
        group = content.create_group("layers/a/vars")
        for i in range(50):
            group[f"again{i}"] = group
            content[f"x{i}"] = content["layers"]

    def named(content, _):
        for i in range(300):
            content.create_group(f"layers/{i}/vars").attrs["name"] = "att"
            content[f"layers/{i}/query_dense/vars/0"] = np.zeros((2, 2, 2), "f")

    return {
        "2^40 elements of nothing": file(lambda c, _: place(c, shape=(2**20, 2**10, 2**10), dtype="f4", chunks=(1, 8, 8))),
        "a chunk of 4 GB": file(lambda c, _: place(c, shape=(1, 1, 1), maxshape=(None,) * 3, dtype="f4", chunks=(2**10, 2**10, 2**9))),
        "compressed": file(lambda c, _: place(c, np.zeros((2**22,), "f"), compression="gzip")),
        "texts": file(lambda c, h5py: place(c, np.array(["x"] * 9, h5py.string_dtype()))), "no space": file(lambda c, h5py: place(c, h5py.Empty("f"))),
        "records": file(lambda c, _: place(c, np.zeros(3, [("a", "f4")]))), "references": file(lambda c, h5py: place(c, shape=(3,), dtype=h5py.ref_dtype)),
        "links in circles": file(loop), "300 layers of one name": file(named), "links outside": file(
            lambda c, h5py: c.__setitem__("layers/a", h5py.ExternalLink("/etc/hostname", "/x"))),
        "a link to itself": file(lambda c, h5py: c.__setitem__("a", h5py.SoftLink("/a"))), "only a signature": lambda _: b"\x89HDF\r\n\x1a\n" + bytes(9000),
        "a heap in circles": lambda _: with_circle(readers.keras_h5()), "settings of nested lists": file(lambda c, _: c.attrs.__setitem__("model_config", "[" * 60_000)),
        "settings that are numbers": file(lambda c, _: c.attrs.__setitem__("model_config", np.zeros(9))),
    }


# -- .so -------------------------------------------------------------------------------------------------------------------------


@made(".so")
def bundles():
    return {
        "nested": lambda _: readers.with_footer(b"[" * 100_000), "no object": lambda _: readers.with_footer([1]),
        "no JSON": lambda _: readers.with_footer(b"\xff\xfe"), "longer than the file": lambda _: (
            lambda body: body + struct.pack("<16sII", b"edgeattn bundle\n", 2**31, zlib.crc32(body)))(b"x" * 99),
        "a layer of a larger file": lambda _: readers.with_footer({**readers.description(), "kernels": [], "layer": [2**40, 2**40]}),
        "a layer that is none": lambda _: readers.with_footer({**readers.description(), "kernels": [], "layer": [0, 40]}),
        "a library of the system": lambda _: readers.with_footer(readers.description(), library=_libm()),
        "no library": lambda _: readers.with_footer(readers.description(), library=b""),
    }


def _libm():
    import ctypes.util

    with open("/proc/self/maps", encoding="ascii") as maps:
        found = [line.split()[-1] for line in maps if "/libm" in line or "/libc." in line or "/libc-" in line]
    if not found:
        return ctypes.util.find_library("m").encode()
    with open(found[0], "rb") as file:
        return file.read()
