"""What is wrong with a model's folder, file or call: an error that names the file, the part and the way out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import whole_models
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import edgeattn
import quant

GOLDEN = Path(__file__).parent / "golden"
SENTENCES = GOLDEN / "sentence-transformer"
WORD = "embeddings.word_embeddings.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden model by its name."""
    def copied(name):
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    return copied


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_weights_that_are_no_floats(dtype, folder):
    where = folder("bert")
    tensors = load_file(where / "model.safetensors")
    save_file({**tensors, WORD: np.ones((40, 16), dtype)}, where / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^{where}/model.safetensors: {WORD} must be a float16, float32 or float64 "
                                         r"array, or bfloat16, got dtype \w+; use the weights of the float model$"):
        edgeattn.from_pretrained(where)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_that_are_cut_off(name, folder):
    where = folder("vit")
    content = (where / name).read_bytes()
    for size in (0, 7, 8, len(content) // 2, len(content) - 2):
        (where / name).write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"^{where}/{name} is not a whole "):
            edgeattn.from_pretrained(where)


def test_a_part_of_the_weights_that_is_cut_off_or_missing(folder):
    where = folder("bert")
    tensors = load_file(where / "model.safetensors")
    (where / "model.safetensors").unlink()
    save_file(tensors, where / "part.safetensors")
    (where / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(tensors, "part.safetensors")}))
    edgeattn.from_pretrained(where)
    (where / "part.safetensors").write_bytes((where / "part.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"^{where}/part.safetensors is not a whole .safetensors file"):
        edgeattn.from_pretrained(where)
    (where / "part.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names part.safetensors, which is not in .*; copy all parts"):
        edgeattn.from_pretrained(where)


@pytest.mark.parametrize("name, option, value, message", [
    ("bert", "layer_norm_eps", 1.5, "layer_norm_eps must be less than 1, got 1.5"),
    ("nomic_bert", "rotary_scaling_factor", 2.0, "rotary_scaling_factor must be null, got 2.0"),
    ("bert", "num_attention_heads", "2", "num_attention_heads must be an integer from 1"),
    ("bert", "num_hidden_layers", 3, "missing: encoder.layer.2.attention.self.query.weight"),
    ("vit", "patch_size", [4], r"patch_size must be one or two positive integers, got \[4\]"),
    ("vit", "image_size", 16, "mis-shaped: embeddings.position_embeddings must be "),
    ("gpt2", "vocab_size", 41, r"mis-shaped: wte.weight must be \(41, 16\) by config.json, got \(40, 16\)"),
])
def test_options_that_lie(name, option, value, message, folder):
    where = folder(name)
    options = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**options, option: value}))
    with pytest.raises(ValueError, match=message) as caught:
        edgeattn.from_pretrained(where)
    assert str(where) in str(caught.value)


@pytest.mark.parametrize("change, message", [
    (lambda t: t["post_processor"]["special_tokens"].pop("[CLS]"), "the tokenizer is not a whole tokenizer.json: "),
    (lambda t: t["model"].update(vocab={"a": 1}), "the tokenizer is not a whole tokenizer.json: .*UNK.*; use the one that"),
    (lambda t: t["model"]["vocab"].update(cat=77),
     r"sentences\[1\] gives token 77, and the model's vocabulary has 40; use the tokenizer.json that was saved"),
])
def test_tokenizers_of_another_model(change, message, folder):
    where = folder("sentence-transformer")
    content = json.loads((where / "tokenizer.json").read_text())
    change(content)
    (where / "tokenizer.json").write_text(json.dumps(content))
    model = edgeattn.from_pretrained(where)
    with pytest.raises(ValueError, match=message):
        model.encode(["the dog ran on the mat", "the cat"])


def test_a_signal_is_no_error_of_the_tokenizer(monkeypatch):
    model = edgeattn.from_pretrained(SENTENCES)

    class Interrupted:
        def encode_batch(self, texts):
            raise KeyboardInterrupt

    monkeypatch.setitem(vars(model), "_tokenizer", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        model.encode(["a"])


@pytest.mark.parametrize("ids, error, message", [
    ([[-1]], ValueError, "ids must lie between 0 and 49, the model's vocabulary, got -1 in sequence 0 at token 0"),
    ([[1, 2], [3, 50, 1]], ValueError, "vocabulary, got 50 in sequence 1 at token 1; is the tokenizer this model's"),
    ([[2**70]], TypeError, "ids must be a list of lists of integers"),
    ([[1.0]], TypeError, "ids must be a list of lists of integers"),
    (["a text"], TypeError, r"ids must be a list .*, got texts, which encode takes$"),
    ("a text", TypeError, r"ids must be a list .*, got texts, which encode takes$"),
    ([["a"]], TypeError, "ids must be a list of lists of integers"),
    ([1, 2], TypeError, "ids must be a list of lists of integers"),
    (np.ones((1, 2), bool), TypeError, "ids must be an integer array, got dtype bool"),
    (np.ones(2, int), ValueError, r"ids must be \(B, L\), got shape \(2,\)"),
    ([[1] * 21], ValueError, "ids must have at most the model's 20 positions, got 21 tokens; cut the text, or give"),
])
def test_ids_that_are_none(ids, error, message):
    with pytest.raises(error, match=message):
        whole_models.text_encoder()(ids)


def test_token_types_that_there_are_not():
    with pytest.raises(ValueError, match="token_type_ids must lie between 0 and 0, the model's token types, got 1 in"):
        whole_models.text_encoder()([[1, 2]], token_type_ids=[[0, 1]])


def test_nothing_gives_nothing():
    model = whole_models.text_encoder()
    for ids, shape in (([], (0, 0)), ([[]], (1, 0)), ([[], []], (2, 0)), (np.zeros((0, 3), int), (0, 3))):
        assert model(ids).shape == (*shape, whole_models.E)
    result = model([[], [1, 2]])
    assert not result[0].any()
    np.testing.assert_array_equal(result[1], model([[1, 2]])[0])
    assert whole_models.image_encoder()(np.zeros((0, 2, 8, 8), np.float32)).shape == (0, 4, whole_models.E)


def test_sequences_of_several_dtypes_are_of_the_widest():
    x = np.random.default_rng(0).standard_normal((5, whole_models.E))
    model = whole_models.encoder()
    results = model([x.astype(np.float16), x, x.astype(np.float32)])
    assert {result.dtype for result in results} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(results[1], model(x))
    with pytest.raises(TypeError, match=r"x\[1\] must be a float16, float32 or float64 array, got dtype int64"):
        model([x, x.astype(np.int64)])


@pytest.mark.parametrize("pixels, error, message", [
    (np.zeros((1, 2, 8, 8), np.uint8), TypeError,
     "pixels must be a float16, float32 or float64 array, scaled and normalized as the model's preprocessor_config.json "
     "says, got dtype uint8"),
    (np.zeros((1, 2, 8, 8), complex), TypeError, "pixels must be a float16, float32 or float64 array, got dtype complex"),
    (np.zeros((1, 2, 7, 8)), ValueError, r"height and width multiples of \(4, 4\), got shape \(1, 2, 7, 8\); resize or"),
    (np.zeros((1, 2, 0, 8)), ValueError, r"height and width multiples of \(4, 4\), got shape \(1, 2, 0, 8\)"),
    (np.zeros((1, 8, 8, 2)), ValueError, "with 2 channels, "),
    (np.zeros((2, 8, 8)), ValueError, r"pixels must be \(B, C, height, width\), got shape \(2, 8, 8\)"),
])
def test_pixels_that_do_not_fit(pixels, error, message):
    with pytest.raises(error, match=message):
        whole_models.image_encoder()(pixels)


def stored(model, path):
    """(header, tensors) of the file of a model."""
    edgeattn.save(model, path)
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["edgeattn"]), load_file(path)


def changed(header, keys, value):
    """The header with another value at a place, or without one."""
    at = header
    for key in keys[:-1]:
        at = at[key]
    if value is None:
        del at[keys[-1]]
    else:
        at[keys[-1]] = value
    return header


TEXT, IMAGE = whole_models.text_encoder, whole_models.image_encoder


@pytest.mark.parametrize("make, keys, value, message", [
    (TEXT, ("config",), {}, r"TextEncoder must be made of \[embedding, encoder, .*\], got \[\]"),
    (TEXT, ("config", "more"), 1, r"TextEncoder must be made of \[.*\], got \[.*more.*\]"),
    (TEXT, ("config", "embedding", "token_weight"), None, r"Embedding must be made of \[token_weight, .*\], got \[norm, "),
    (TEXT, ("config", "embedding", "norm", "kind"), "os", "embedding.norm must be one of MultiHeadAttention, .*, got 'os'"),
    (TEXT, ("config", "embedding", "norm", "weight", "tensor"), ["a"], r"weight names \"\['a'\]\", which is not there"),
    (TEXT, ("config", "encoder", "layers", 1), {"same": "x"}, r"encoder.layers.1 names 'x', which is not there"),
    (TEXT, ("config", "embedding", "padding_id"), 1.5, "padding_id must be one of the 50 tokens, got 1.5"),
    (TEXT, ("config", "max_length"), 0, "max_length must be at least 1"),
    (TEXT, ("config", "pooling"), "sum", "pooling must be one of"),
    (TEXT, ("kind",), None, "has unreadable edgeattn metadata: it must be an object with 'format', 'kind' and 'config'"),
    (IMAGE, ("config", "embedding", "patch_size"), [0, 4], r"patch_size must be \(height, width\), two positive integers"),
    (IMAGE, ("config", "embedding", "patch_size"), [4, 5], "projection must have inputs for whole channels of patches"),
    (IMAGE, ("config", "embedding", "image_size"), [8.5, 8], r"image_size must be .*, got \[8.5, 8\]"),
    (IMAGE, ("config", "embedding", "image_size"), [2, 8], r"image_size must have room for a patch of \(4, 4\)"),
    (IMAGE, ("config", "embedding", "stride"), "ab", "stride must be .*, got 'ab'"),
    (IMAGE, ("config", "spectrogram"), 1, "spectrogram must be True or False, got 1"),
])
def test_files_that_lie(make, keys, value, message, tmp_path):
    path = tmp_path / "model.safetensors"
    header, tensors = stored(make(), path)
    save_file(tensors, path, metadata={"edgeattn": json.dumps(changed(header, keys, value))})
    with pytest.raises(ValueError, match=message) as caught:
        edgeattn.load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_in_files_that_are_no_numbers(value, tmp_path):
    path, name = tmp_path / "model.safetensors", "encoder.layers.1.norm2.weight"
    header, tensors = stored(TEXT(), path)
    tensors[name] = tensors[name].copy()
    tensors[name][3] = value
    save_file(tensors, path, metadata={"edgeattn": json.dumps(header)})
    with pytest.raises(ValueError, match=f"^{path}: {name} holds NaN or infinity: the file is damaged"):
        edgeattn.load(path)


def test_weights_whose_sum_leaves_float32_are_numbers(tmp_path):
    path = tmp_path / "layer.safetensors"
    edgeattn.LayerNorm(np.full(8, 3e38, np.float32)).save(path)
    assert (edgeattn.load(path).weight == np.float32(3e38)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_not_saved_either(value, tmp_path):
    """In the words that a file would be refused with, and nothing is written."""
    weights = [np.eye(8, dtype=np.float32) for _ in range(4)]
    weights[1][2, 3] = value
    for made, name in ((edgeattn.MultiHeadAttention(2, *weights), "k_weight"), (edgeattn.Linear(weights[1]), "weight")):
        with pytest.raises(ValueError, match=f"{type(made).__name__} cannot be saved: {name} holds NaN or infinity"):
            made.save(tmp_path / "layer.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", [None, "dynamic", "static"])
def test_weights_of_layers_in_files_that_are_no_numbers(scheme, tmp_path):
    path, layer = tmp_path / "layer.safetensors", whole_models.encoder().layers[0].attention
    x = np.random.default_rng(0).standard_normal((1, 3, whole_models.E), np.float32)
    made = layer if scheme is None else quant.quantize(layer, quant.calibrate(layer, [x])) if scheme == "static" else (
        quant.quantize(layer, scheme="dynamic"))
    header, tensors = stored(made, path)
    name = next(name for name in tensors if tensors[name].dtype == np.float32)
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[1] = np.nan
    save_file(tensors, path, metadata={"edgeattn": json.dumps(header)})
    with pytest.raises(ValueError, match=f"^{path}: {name} holds NaN or infinity: the file is damaged"):
        edgeattn.load(path)


def test_a_position_bias_may_hide_keys(tmp_path):
    bias = np.zeros((whole_models.H, 6, 6), np.float32)
    bias[:, :, 4:] = -np.inf
    model, x = whole_models.encoder(position_bias=bias, layers=1), np.ones((1, 6, whole_models.E), np.float32)
    edgeattn.save(model, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(edgeattn.load(tmp_path / "model.safetensors")(x), model(x))


@pytest.mark.parametrize("key, value", [("state", 3), ("tensors", 3), ("tensors", ["none"]), ("tensors", None)])
def test_int8_attention_in_files_that_lie(key, value, tmp_path):
    path = tmp_path / "model.safetensors"
    header, tensors = stored(quant.quantize(whole_models.encoder(layers=1), scheme="dynamic"), path)
    changed(header, ("config", "layers", 0, "attention", key), value)
    save_file(tensors, path, metadata={"edgeattn": json.dumps(header)})
    with pytest.raises(ValueError, match="layers.0.attention must have a state and the names of its tensors, got"):
        edgeattn.load(path)


def test_what_load_does_not_read_is_said(tmp_path):
    for path in (SENTENCES, tmp_path / "none"):
        with pytest.raises(ValueError, match="path must end in .*; edgeattn.from_pretrained reads a model's folder"):
            edgeattn.load(path)
    with pytest.raises(ValueError, match="holds tensors but no edgeattn layer: .* a whole model from its folder with"):
        edgeattn.load(SENTENCES / "model.safetensors")
    with pytest.raises(NotADirectoryError, match="folder must be one with config.json and model.safetensors, got"):
        edgeattn.from_pretrained(SENTENCES / "model.safetensors")
