"""The command lines with whole encoders and models."""
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import whole_models
from places import ROOT

import edgeattn
import edgeattn.cli
import edgeattn.cli_encode
import quant
import quant.cli

GOLDEN = ROOT / "tests/models/golden"
SENTENCES, VIT, GPT2 = (GOLDEN / name for name in ("sentence-transformer", "vit", "gpt2"))
TEXTS = ["the cat sat on the mat", "a dog ran", "", "the dog"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of models and data."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    edgeattn.save(whole_models.encoder(), folder / "e.safetensors")
    edgeattn.save(whole_models.text_encoder(), folder / "t.safetensors")
    edgeattn.save(whole_models.image_encoder(), folder / "i.safetensors")
    edgeattn.save(whole_models.encoder().layers[0].attention, folder / "layer.safetensors")
    np.save(folder / "x.npy", rng.standard_normal((40, 9, whole_models.E), np.float32))
    np.savez(folder / "ragged.npz", x=rng.standard_normal((2, 9, whole_models.E), np.float32), lengths=[9, 4])
    np.save(folder / "ids.npy", rng.integers(0, 50, (40, 9)))
    np.save(folder / "pixels.npy", rng.standard_normal((33, 2, 8, 8), np.float32))
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    (folder / "windows.txt").write_bytes("\r\n".join(TEXTS).encode("utf-8-sig"))
    (folder / "latin.txt").write_bytes("a dog\ncaf\u00e9".encode("latin-1"))
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of it, and the current one."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(folder, capsys):
    """Run a command of either kind: what it prints, or its one line of error."""
    def run(line, status=0):
        kind, *arguments = line.split(" ") if isinstance(line, str) else map(str, line)
        got = {"edgeattn": edgeattn.cli.main, "quant": quant.cli.main}[kind](arguments)
        out, err = capsys.readouterr()
        assert got == status, err
        if status:
            assert (out, err.count("\n")) == ("", 1)
            assert err.startswith(kind)
            return err
        return out
    return run


def test_info_says_what_files_hold(command):
    edgeattn.save(quant.quantize(edgeattn.load("t.safetensors"), scheme="dynamic", attention="float32"), "q.safetensors")
    rng = np.random.default_rng(0)
    layer = edgeattn.load("layer.safetensors")
    static = quant.quantize(layer, quant.calibrate(layer, [rng.standard_normal((2, 9, 32), np.float32)]))
    edgeattn.save(static, "s.safetensors")
    text = command(f"edgeattn info e.safetensors q.safetensors {SENTENCES} {VIT} {GPT2} layer.safetensors s.safetensors")
    assert max(map(len, text.splitlines())) <= max(80, len(str(SENTENCES)) + 30)
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    assert parts[0].startswith(f"e.safetensors: {Path('e.safetensors').stat().st_size:,} bytes on disk class "
                               "TransformerEncoder, float32 layers 2, width 32, 4 heads, hidden 64, gelu, post-norm")
    _, tensors = edgeattn.load("e.safetensors").to_state()
    assert f"in all {sum(t.nbytes for t in tensors.values()):,} bytes in {len(tensors)} tensors" in parts[0]
    assert "TextEncoder, feed-forward dynamic int8, attention float32" in parts[1] and "feed-forward float32" in parts[1]
    assert re.search(r"feed-forward float32 [\d,]+ bytes, int64 [\d,]+ bytes, int8 [\d,]+ bytes", parts[1])
    assert "40 tokens, 24 positions, cut after 12, pooling mean, length 1, with a tokenizer" in parts[2]
    assert "pixels (B, 3, 12, 12), patches of 4 x 4" in parts[3] and "pre-norm" in parts[3]
    assert "causal" in parts[4]
    assert "class MultiHeadAttention, float32 heads 4 of 8, 4 of keys and values width query 32, key 32," in parts[5]
    assert "class StaticMultiHeadAttention, static int8, as litert computes" in parts[6]


def test_what_was_read_is_told_before_what_cannot_be(folder, capsys):
    for line, first in (("info e.safetensors none.safetensors", "e.safetensors: "),
                        ("warmup e.safetensors none.safetensors --length 2", "e.safetensors, 2 tokens: "),
                        ("bench e.safetensors none.safetensors --length 2", "")):
        assert edgeattn.cli.main(line.split()) == 2
        out, err = capsys.readouterr()
        assert first in out.splitlines()[0] and err == "edgeattn: none.safetensors: No such file or directory\n"
        assert edgeattn.cli.main([*line.split(), "--json"]) == 2
        assert capsys.readouterr().out == ""


def test_inspect_lists_the_attention_of_an_exported_encoder(command):
    encoder = edgeattn.load("e.safetensors")
    static = quant.quantize(encoder, quant.calibrate(encoder, [np.load("x.npy")]))
    for made, kind in ((encoder, "MultiHeadAttention, float32"), (static, "StaticMultiHeadAttention, int8")):
        quant.export(made, "e.tflite", sequence_length=9)
        text = command("quant inspect e.tflite")
        assert text.count(kind) == 2 and "block 1, 'layers.1.attention.probabilities': edgeattn.load(path, block=1)" in text


def test_inspect_says_the_same(command):
    assert command(f"quant inspect {VIT}").startswith("class: ImageEncoder, float32\npixels: (B, 3, 12, 12)")
    assert command("quant inspect e.safetensors").startswith("class: TransformerEncoder, float32\nlayers: 2, ")
    command("quant calibrate e.safetensors x.npy -o c.safetensors")
    text = command("quant inspect c.safetensors")
    assert text.startswith("Calibration of a model on 360 tokens\n")
    seen = quant.ModelCalibration.load("c.safetensors").largest["layers.1.feed_forward.linear2"]
    assert ["layers.1.feed_forward.linear2", "64", f"{seen.max():.4g}"] in [row.split()[:3] for row in text.splitlines()]


def test_parts_of_encoders_are_known_too(command):
    layer = edgeattn.load("e.safetensors").layers[0]
    edgeattn.save(layer, "block.safetensors")
    edgeattn.save(quant.quantize(edgeattn.load("e.safetensors"), scheme="dynamic").layers[0].feed_forward, "f.safetensors")
    edgeattn.save(layer.norm1, "n.safetensors")
    text = command("edgeattn info block.safetensors f.safetensors n.safetensors")
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    assert "class TransformerEncoderLayer, float32 layers 1, width 32, 4 heads, hidden 64, gelu, post-norm" in parts[0]
    assert "attention float32" in parts[0] and "norms float32 256 bytes" in parts[0]
    assert "class FeedForward, dynamic int8 features 32 to 32 weights float32" in parts[1]
    assert "class LayerNorm, float32 features 32 to 32 weights float32 128 bytes" in parts[2]
    assert command("quant inspect n.safetensors").startswith("class: LayerNorm, float32\nfeatures: 32 to 32\n")
    lines = command("edgeattn bench block.safetensors f.safetensors n.safetensors --length 3").splitlines()
    assert len(lines) == 4 and command("edgeattn warmup block.safetensors f.safetensors --length 2")


def test_bench_and_warmup_take_models(command):
    lines = command(f"edgeattn bench e.safetensors {GPT2} {VIT} --length 3").splitlines()
    assert [line.rpartition(":")[0] for line in lines[1:]] == [
        "e.safetensors, 3 tokens", f"{GPT2}, 3 tokens", f"{VIT}, images of (12, 12)"]
    text = command(f"edgeattn warmup t.safetensors {GPT2} i.safetensors --length 1 4")
    assert re.findall(r"(?m)^(.*): [\d.]+ s, ", text) == [
        "t.safetensors, 1 token", "t.safetensors, 4 tokens", f"{GPT2}, 1 token", f"{GPT2}, 4 tokens",
        "i.safetensors, images of (8, 8)"]
    assert edgeattn.cli._lengths(edgeattn.load("t.safetensors"), None, [16, 64, 256]) == [16]


def test_warmup_of_a_causal_model_uses_its_caches(monkeypatch):
    calls = []
    monkeypatch.setattr(edgeattn.TextEncoder, "__call__",
                        lambda self, ids, kv_cache=None: calls.append((ids.shape, kv_cache is not None)))
    assert edgeattn.cli.main(["warmup", str(GPT2), "--length", "4"]) == 0
    assert {((1, 3), True), ((1, 1), True), ((1, 4), False)} <= set(calls)


def test_encode(command, folder, monkeypatch):
    expected = edgeattn.from_pretrained(SENTENCES).encode(TEXTS)
    out = command(f"edgeattn encode {SENTENCES} --from texts.txt -o v.npy")
    assert out == "wrote v.npy: 4 vectors of 16, float32\n"
    np.testing.assert_array_equal(np.load("v.npy"), expected)
    edgeattn.save(edgeattn.from_pretrained(SENTENCES), "s.safetensors")
    command("edgeattn encode s.safetensors --from windows.txt -o v.npy --batch-size 1")
    np.testing.assert_array_equal(np.load("v.npy"), expected)
    for given in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\n".join(TEXTS).encode())))
        command(["edgeattn", "encode", SENTENCES, *given, "-o", "v.npy"])
        np.testing.assert_array_equal(np.load("v.npy"), expected)
    command(["edgeattn", "encode", SENTENCES, TEXTS[1], "the dog", "-o", "v.npy"])
    np.testing.assert_array_equal(np.load("v.npy"), expected[[1, 3]])
    command(["edgeattn", "encode", SENTENCES, "-o", "v.npy", TEXTS[1], "the dog"])
    np.testing.assert_array_equal(np.load("v.npy"), expected[[1, 3]])
    command(["edgeattn", "encode", SENTENCES, TEXTS[0], "-o", "cut.npy", "--max-length", "4"])
    assert not np.array_equal(np.load("cut.npy")[0], expected[0])
    Path("none.txt").touch()
    assert command(f"edgeattn encode {SENTENCES} --from none.txt -o v.npy") == "wrote v.npy: 0 vectors of 16, float32\n"
    assert np.load("v.npy").shape == (0, 16)


def test_encode_says_how_far_it_is_once_that_takes_long(command, folder, monkeypatch, capsys):
    monkeypatch.setattr(edgeattn.cli_encode, "TEXTS_AT_ONCE", 3)
    for patience, said in ((60.0, ""), (0.0, "\redgeattn: 3 of 4 texts\redgeattn: 4 of 4 texts\n")):
        monkeypatch.setattr(edgeattn.cli_encode, "PATIENCE", patience)
        assert edgeattn.cli.main(["encode", str(SENTENCES), "--from", "texts.txt", "-o", "v.npy"]) == 0
        assert capsys.readouterr().err == said
        np.testing.assert_array_equal(np.load("v.npy"), edgeattn.from_pretrained(SENTENCES).encode(TEXTS))


@pytest.mark.parametrize("line, message", [
    ("encode t.safetensors a -o v.npy", "t.safetensors has no tokenizer: pass token ids to the model itself, or put a"),
    (f"encode {VIT} a -o v.npy", "vit must hold a TextEncoder to encode texts, got ImageEncoder"),
    ("encode layer.safetensors a -o v.npy", "layer.safetensors must hold a TextEncoder to encode texts, got MultiHead"),
    ("encode none a -o v.npy", "edgeattn: none: No such file or directory\n"),
    (f"encode {SENTENCES} texts.txt -o v.npy", "TEXT 'texts.txt' is the name of a file: --from texts.txt encodes what"),
    (f"encode {SENTENCES} --from latin.txt -o v.npy", "line 2 of latin.txt must be UTF-8, and is not: unexpected end of"),
    (f"encode {SENTENCES} --from none.txt -o v.npy", "none.txt: No such file or directory"),
    (f"encode {SENTENCES} a -o v.txt", "--output must end in .npy, got 'v.txt'"),
    (f"encode {SENTENCES} a -o no/v.npy", "cannot write no/v.npy: there is no folder no"),
    (f"encode {SENTENCES} --from x.npy -o x.npy", "cannot write x.npy: it is an input of this command"),
    (f"encode {SENTENCES} a -o v.npy --batch-size 0", "--batch-size must be at least 1, got 0"),
    (f"encode {SENTENCES} a -o v.npy --max-length 0", "--max-length must be at least 1, got 0"),
    (f"encode {SENTENCES} a --from long.txt -o v.npy --max-length 99",
     "line 2 of long.txt must have at most the model's 24 positions, got 42 tokens; cut the text, or give --max-length"),
    ("info none.safetensors", "none.safetensors: No such file or directory"),
    ("bench t.safetensors --length 21", "t.safetensors: ids must have at most the model's 20 positions, got"),
])
def test_edgeattn_errors_are_one_line(command, line, message):
    Path("long.txt").write_text("a\n" + "dog " * 40)
    before = sorted(Path().iterdir())
    assert message in command(f"edgeattn {line}", status=2)
    assert sorted(Path().iterdir()) == before


def test_edgeattn_without_its_extra_says_what_to_install(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'edgeattn[text]'" in command(f"edgeattn encode {SENTENCES} a -o v.npy", status=2)


@pytest.mark.parametrize("model, data, batches, tokens", [
    ("e.safetensors", ["x.npy", "ragged.npz"], 3, 378),  # 40 of 9 in two pieces, and 18, all of which a mapping counts
    ("t.safetensors", ["ids.npy"], 2, 360), ("i.safetensors", ["pixels.npy"], 2, 132), (SENTENCES, ["texts.txt"], 1, 17)])
def test_the_whole_job(command, model, data, batches, tokens):
    out = command(["quant", "calibrate", model, *data, "-o", "c.safetensors"])
    assert out.splitlines()[0] == f"wrote c.safetensors: calibrated on {', '.join(data)}"
    seen = re.search(r"saw (\d+) tokens in (\d+) calls? of the model", out)
    assert int(seen[2]) == batches and int(seen[1]) <= tokens
    out = command(["quant", "quantize", model, "c.safetensors", "-o", "q.safetensors", "--scheme", "dynamic"])
    assert out == "wrote q.safetensors: dynamic int8, attention int8, float in and out\n"
    float_model = edgeattn.load(model) if isinstance(model, str) else edgeattn.from_pretrained(model)
    int8 = quant.quantize(float_model, quant.ModelCalibration.load("c.safetensors"), scheme="dynamic")
    _, expected = int8.to_state()
    _, got = edgeattn.load("q.safetensors").to_state()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array)
    found = json.loads(command(["quant", "compare", model, "q.safetensors", *data, "--json"]))
    assert found["cosine"]["minimum"] > 0.99
    assert {part["name"] for part in found["parts"]} == {
        f"layers.{i}.{part}" for i in range(2) for part in ("attention", "feed_forward")}
    text = command(["quant", "compare", model, "q.safetensors", *data])
    assert "layers.1.feed_forward" in text and "cosine of" in text


def test_quantize_without_data(command):
    for attention in ("int8", "float32"):
        out = command(f"quant quantize {GPT2} -o q.safetensors --attention {attention}")
        assert out == f"wrote q.safetensors: dynamic int8, attention {attention}, float in and out\n"
        expected = quant.quantize(edgeattn.from_pretrained(GPT2), scheme="dynamic", attention=attention)
        np.testing.assert_array_equal(edgeattn.load("q.safetensors")([[1, 2, 3]]), expected([[1, 2, 3]]))


def test_quantize_to_static(command):
    command("quant calibrate e.safetensors x.npy -o c.safetensors")
    # with CALIBRATION it is static, of a model as of a layer, and as quant.quantize(encoder, calibration) is
    out = command("quant quantize e.safetensors c.safetensors -o q.safetensors --arithmetic tflm")
    assert out == "wrote q.safetensors: static int8, attention int8, float in and out\n"
    assert edgeattn.load("q.safetensors") == quant.quantize(
        edgeattn.load("e.safetensors"), quant.ModelCalibration.load("c.safetensors"), arithmetic="tflm")


def test_a_part_of_a_folder(command):
    whisper, vit = GOLDEN / "whisper", GOLDEN / "vit"
    assert "TransformerEncoder, float32" in command(f"edgeattn info {whisper} --part encoder")
    assert "give --part encoder" not in command(f"quant inspect {vit} --part vision")
    assert command(f"quant export {whisper} w.onnx --part encoder").startswith("wrote w.onnx: ")
    assert "--part encoder reads its layers" in command(f"edgeattn bench {whisper}", status=2)
    assert "--part must be left out but for a model's folder" in command("edgeattn info e.safetensors --part text", status=2)


def test_export_of_an_encoder(command):
    command("quant calibrate e.safetensors x.npy -o c.safetensors")
    command("quant quantize e.safetensors c.safetensors -o q.safetensors --scheme static --room-for-masks")
    for name, lengths in (("e", "--sequence-length 4 --sequence-length 9"), ("q", "--sequence-length 9 --mask causal")):
        assert command(f"quant export {name}.safetensors {name}.tflite {lengths}").startswith(f"wrote {name}.tflite: ")
    assert command("quant export q.safetensors q.onnx --opset 20").startswith("wrote q.onnx: ")
    # and back: the same int8 encoder
    command("quant export q.onnx again.safetensors --scheme static")
    x = np.load("x.npy")[:2]
    np.testing.assert_array_equal(edgeattn.load("again.safetensors")(x), edgeattn.load("q.safetensors")(x))
    for line, said in (("edgeattn info q.onnx --scheme static", "static int8, as litert computes"),
                       ("edgeattn info q.onnx", "quantizers the file has some; float32 is what its weights stand for, "
                        "--scheme static reads its int8 layers"),
                       ("quant inspect q.onnx", "class: TransformerEncoder, float32"),
                       ("quant inspect q.onnx", "quantizers: the file has some; float32 is what"),
                       ("quant inspect q.onnx --scheme static --arithmetic tflm", "static int8, as tflm computes"),
                       ("quant compare e.safetensors q.onnx x.npy", "arithmetic: static int8, as litert computes")):
        assert said in " ".join(command(line).split())
    command("quant export e.safetensors f.onnx")
    for line in ("edgeattn info q.onnx --scheme static", "edgeattn info f.onnx", "quant inspect f.onnx"):
        assert "quantizers" not in command(line)


def test_a_comparison_says_what_computes_also_of_a_bundle(command, monkeypatch):
    command("quant calibrate e.safetensors x.npy -o c.safetensors")
    command("quant quantize e.safetensors c.safetensors -o q.safetensors --scheme static --override *.attention=float32")
    told = command("quant compare e.safetensors q.safetensors x.npy")
    assert " ".join(told.split()).startswith("arithmetic: feed-forward static int8, as litert computes, attention float32 ")
    Path("q.so").touch()
    monkeypatch.setattr("edgeattn.bundle.load", lambda path: edgeattn.load("q.safetensors"))
    assert command("quant compare e.safetensors q.so x.npy") == told


def test_a_layer_has_room_for_masks_where_that_is_asked_for(command):
    command("quant calibrate layer.safetensors x.npy -o c.safetensors")
    command("quant quantize layer.safetensors c.safetensors -o q.safetensors --room-for-masks")
    assert edgeattn.load("q.safetensors").mask_margin > 0


def test_a_layers_comparison_as_json(command):
    command("quant quantize layer.safetensors -o q.safetensors --scheme dynamic")
    found = json.loads(command("quant compare layer.safetensors q.safetensors x.npy --json"))
    assert found == json.loads(quant.compare(edgeattn.load("layer.safetensors"), edgeattn.load("q.safetensors"),
                                             [np.load("x.npy")[:32], np.load("x.npy")[32:]]).to_json())


@pytest.mark.parametrize("line, message", [
    ("quantize e.safetensors -o q.safetensors --arithmetic tflm", "--arithmetic needs a static model: give CALIBRATION"),
    ("quantize e.safetensors -o q.safetensors --scheme static", "CALIBRATION is missing: run `quant calibrate` first"),
    ("quantize layer.safetensors -o q.safetensors --attention float32", "--attention must be left out for a layer"),
    ("quantize layer.safetensors -o q.safetensors", "CALIBRATION is missing: run `quant calibrate` first, or choose"),
    ("quantize e.safetensors x.npy -o q.safetensors", "x.npy is not a whole calibration of a model"),
    ("calibrate e.safetensors x.npy -o c.safetensors --observer mse", "--observer must be left out for a whole encoder"),
    ("calibrate e.safetensors texts.txt -o c.safetensors", "DATA must be .npy or .npz files; got texts.txt"),
    ("calibrate t.safetensors e.safetensors -o c.safetensors", "DATA must be .npy, .npz or .txt files; got e.safet"),
    ("calibrate t.safetensors x.npy -o c.safetensors", "x.npy: ids must be an integer array, got float32"),
    ("calibrate t.safetensors texts.txt -o c.safetensors", "texts.txt: this TextEncoder has no tokenizer"),
    (f"calibrate {SENTENCES} latin.txt -o c.safetensors", "latin.txt is not a whole .txt file of UTF-8"),
    ("calibrate e.safetensors other.npz -o c.safetensors", "quant: other.npz must hold 'x' and any of 'lengths', 'key_pa"),
    ("calibrate none x.npy -o c.safetensors", "quant: none: No such file or directory\n"),
    ("compare e.safetensors t.safetensors x.npy", "quant: QUANTIZED must be a TransformerEncoder, as LAYER is; got TextEncoder"),
    ("export e.safetensors e.c --sequence-length 9", "make it of the float encoder with `quant calibrate` and `quant quantize --arith"),
    ("export t.safetensors t.tflite --sequence-length 9", "export its encoder, whose inputs are what the embedding gives: of a folder with --part encoder, of a "),
    ("export e.safetensors e.onnx --opset 12", "--opset must be one of 17 to 23; got 12"),
    ("quantize e.safetensors -o q.safetensors --override layers.0.feed_forward=static", "CALIBRATION is missing, which"),
    ("export e.safetensors e.c --sequence-length 9 --padding", "--padding must be left out but for an encoder in a .tflite"),
    ("compare e.safetensors e.onnx x.npy", "quant: e.onnx: No such file or directory\n"),
    ("export e.safetensors a.onnx --scheme static", "--scheme must be left out but for an .onnx file, got e.safetensors"),
    ("export e.pt a.onnx --prefix p --num-heads 2 --arithmetic tflm", "--arithmetic must be left out for what is read as"),
    ("compare e.safetensors e.so x.npy --arithmetic tflm", "--arithmetic must be left out for a bundle"),
    ("quantize e.safetensors -o q.safetensors --room-for-masks", "--room-for-masks must be left out for --scheme dynamic"),
])
def test_quant_errors_are_one_line(command, line, message):
    np.savez("other.npz", foo=np.zeros(3))
    before = sorted(Path().iterdir())
    assert message in command(f"quant {line}", status=2)
    assert sorted(Path().iterdir()) == before
