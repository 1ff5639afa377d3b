"""Models of transformers, from their folders: golden/, which tools/goldens/models.py writes, and folders that lie."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from arrays import cosine
from safetensors.numpy import load_file, save_file

import edgeattn
import quant
from edgeattn.models.families import FAMILIES

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.name not in ("sentence-transformer", "whisper"))
TEXT = [name for name in NAMES if "ids" in np.load(GOLDEN / name / "expected.npz")]
CLOSE = dict(rtol=0, atol=1e-5)


def expected(name):
    return dict(np.load(GOLDEN / name / "expected.npz"))


def copy_of(name, folder, *, config=(), tensors=lambda found: found):
    """A folder like the golden one, with other options, and tensors made of its own."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    options = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**options, **dict(config)}))
    found = tensors(load_file(folder / "model.safetensors"))
    save_file(found, folder / "model.safetensors")
    return folder


def test_every_family_has_a_golden_model():
    kinds = {json.loads((GOLDEN / name / "config.json").read_text())["model_type"] for name in [*NAMES, "whisper"]}
    assert kinds == set(FAMILIES)
    assert max(path.stat().st_size for path in GOLDEN.rglob("*.*")) < 200_000


@pytest.mark.parametrize("name", TEXT)
def test_text_models_are_those_of_transformers(name):
    known, model = expected(name), edgeattn.from_pretrained(GOLDEN / name)
    result = model(known["ids"], known["attention_mask"])
    assert isinstance(model, edgeattn.TextEncoder) and result.dtype == np.float32
    np.testing.assert_allclose(result, known["hidden"], **CLOSE)
    assert not result[known["attention_mask"] == 0].any()


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(TEXT)))
def test_image_models_are_those_of_transformers(name):
    known, model = expected(name), edgeattn.from_pretrained(GOLDEN / name)
    assert isinstance(model, edgeattn.ImageEncoder)
    for at in ("", "_wide"):
        if f"pixels{at}" in known:
            np.testing.assert_allclose(model(known[f"pixels{at}"]), known[f"hidden{at}"], **CLOSE)
            assert model(known[f"pixels{at}"].astype(np.float64)).dtype == np.float64


@pytest.mark.parametrize("name", ["whisper", "bert", "clip-vision"])
def test_layers_alone(name, tmp_path):
    """Of what is not read whole: they take what stands before them in transformers."""
    made = edgeattn.from_pretrained(GOLDEN / name, part="encoder")
    assert isinstance(made, edgeattn.TransformerEncoder)
    if name != "whisper":
        assert made == edgeattn.from_pretrained(GOLDEN / name).encoder
        return
    known = expected(name)
    np.testing.assert_allclose(made(known["rows"]), known["hidden"], **CLOSE)
    # as WhisperForConditionalGeneration names its tensors
    headed = copy_of(name, tmp_path, tensors=lambda found: {f"model.{each}": array for each, array in found.items()})
    assert edgeattn.from_pretrained(headed, part="encoder") == made
    for part in (None, "text", "vision"):
        with pytest.raises(ValueError, match="part='encoder'|part must be left out, or 'encoder', for a whisper model"):
            edgeattn.from_pretrained(headed, part=part)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_halves_of_one_folder(kind, tmp_path):
    """CLIPModel and SiglipModel: the options of each half, of which published ones leave some out, and its tensors."""
    halves = {"text": copy_of(f"{kind}-text", tmp_path / "text"), "vision": copy_of(f"{kind}-vision", tmp_path / "vision")}
    tensors = {f"{part}_model.{name}": array for part, folder in halves.items()
               for name, array in load_file(folder / "model.safetensors").items()}
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file(tensors | {"logit_scale": np.ones((), np.float32), "text_projection.weight": np.ones((4, 16), np.float32)},
              whole / "model.safetensors")
    config = {f"{part}_config": json.loads((folder / "config.json").read_text()) for part, folder in halves.items()}
    config["text_config"].pop("layer_norm_eps")
    config["vision_config"].pop("hidden_act")
    (whole / "config.json").write_text(json.dumps({"model_type": kind, **config}))
    for part, folder in halves.items():
        assert edgeattn.from_pretrained(whole, part=part) == edgeattn.from_pretrained(folder)
        assert edgeattn.from_pretrained(folder, part=part) == edgeattn.from_pretrained(folder)
    for part in (None, "encoder"):
        with pytest.raises(ValueError, match=rf"config\.json: a {kind} model is one of texts and one of images: .*part='text'"):
            edgeattn.from_pretrained(whole, part=part)
    with pytest.raises(ValueError, match=f"part must be left out, or 'encoder', for a {kind}_text_model model, got 'vision'"):
        edgeattn.from_pretrained(halves["text"], part="vision")
    with pytest.raises(ValueError, match="part must be one of 'text', 'vision', 'encoder', or left out, got 'images'"):
        edgeattn.from_pretrained(whole, part="images")
    assert edgeattn.from_pretrained(whole, part="text").pooling == "last"


@pytest.mark.parametrize("name", TEXT)
def test_a_text_gives_the_same_bits_in_every_batch(name):
    model, ids, lengths = edgeattn.from_pretrained(GOLDEN / name), expected(name)["ids"], [20, 13, 1]
    mask = np.arange(20) < np.array(lengths)[:, None]
    padded, listed = model(ids, mask), model([row[:length].tolist() for row, length in zip(ids, lengths, strict=True)])
    np.testing.assert_array_equal(padded, listed)
    for row, result, length in zip(ids, padded, lengths, strict=True):
        np.testing.assert_array_equal(model(row[None, :length])[0], result[:length])


@pytest.mark.parametrize("name", NAMES)
def test_files_hold_models(name, tmp_path):
    model, known = edgeattn.from_pretrained(GOLDEN / name), expected(name)
    edgeattn.save(model, tmp_path / "model.safetensors")
    loaded = edgeattn.load(tmp_path / "model.safetensors")
    x = known["ids" if name in TEXT else "pixels"]
    np.testing.assert_array_equal(loaded(x), model(x))
    assert type(loaded) is type(model) and repr(loaded) == repr(model)


@pytest.mark.parametrize("name", ["modernbert", "mpnet", "nomic_bert"])
def test_positions_inside_attention_become_int8_with_it(name, tmp_path):
    known, model = expected(name), edgeattn.from_pretrained(GOLDEN / name)
    made = quant.quantize(model, scheme="dynamic")
    assert {layer.attention.scheme for layer in made.encoder.layers} == {"dynamic"}
    ids, real = known["ids"], known["attention_mask"]
    result = made(ids, real)
    assert cosine(result, known["hidden"]) > 0.999
    edgeattn.save(made, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(edgeattn.load(tmp_path / "model.safetensors")(ids, real), result)
    for i in range(len(ids)):
        np.testing.assert_array_equal(made(ids[i : i + 1], real[i : i + 1]), result[i : i + 1])


def test_holes_in_a_mask():
    model, ids = edgeattn.from_pretrained(GOLDEN / "bert"), expected("bert")["ids"]
    mask = np.ones(ids.shape, int)
    mask[:, 3:5] = 0
    result, other = model(ids, mask), ids.copy()
    other[:, 3:5] = 7
    np.testing.assert_array_equal(result, model(other, mask))
    assert not result[:, 3:5].any()


def test_gpt2_decodes_through_caches():
    model, ids = edgeattn.from_pretrained(GOLDEN / "gpt2"), expected("gpt2")["ids"]
    caches = model.encoder.make_caches(3, 24)
    parts = [model(ids[:, first:last], kv_cache=caches) for first, last in ((0, 6), (6, 7), (7, 8), (8, 20))]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), model(ids), **CLOSE)
    with pytest.raises(ValueError, match="ids must have at most the model's 24 positions, got 40 tokens"):
        model(ids, kv_cache=caches)
    caches = model.encoder.make_caches(3, 24)
    listed = [model(ids[:, first:last].tolist(), kv_cache=caches) for first, last in ((0, 6), (6, 7), (7, 8), (8, 20))]
    np.testing.assert_array_equal(np.concatenate(listed, axis=1), np.concatenate(parts, axis=1))


@pytest.mark.parametrize("call, error, message", [
    (lambda m, caches: m([[2, 3], [2]], kv_cache=caches), ValueError,
     r"ids must be of sequences of one length with kv_cache, got lengths \[2, 1\]"),
    (lambda m, caches: m(np.full((2, 2), 3), [[1, 1], [1, 0]], kv_cache=caches), ValueError,
     r"attention_mask must be of sequences of one length with kv_cache, got lengths \[2, 1\]"),
    (lambda m, caches: [m(np.full((2, 2), 3), mask, kv_cache=caches) for mask in (None, [[1, 1], [0, 1]])], ValueError,
     "attention_mask must be left out, or of 1 alone, with a kv_cache that holds tokens"),
    (lambda m, caches: m([[2], [2]], kv_cache=[None]), TypeError, r"kv_cache must be a list of .*, got \[None\]"),
    (lambda m, caches: m([[2], [2]], kv_cache=caches[0]), TypeError, "kv_cache must be a list of .*, got KVCache"),
    (lambda m, caches: m([[2], [2]], kv_cache=caches[:1]), ValueError, "kv_cache must be a list of 2 caches"),
])
def test_bad_caches_are_refused(call, error, message):
    model = edgeattn.from_pretrained(GOLDEN / "gpt2")
    with pytest.raises(error, match=message):
        call(model, model.encoder.make_caches(2, 24))


def test_token_types():
    model, ids = edgeattn.from_pretrained(GOLDEN / "bert"), expected("bert")["ids"]
    types = np.zeros_like(ids)
    types[:, 10:] = 1
    assert not np.array_equal(model(ids, token_type_ids=types), model(ids))
    np.testing.assert_array_equal(model(ids.tolist(), token_type_ids=types), model(ids, token_type_ids=types))
    with pytest.raises(ValueError, match="token_type_ids must lie between 0 and 1"):
        model(ids, token_type_ids=types * 2)


def test_albert_shares_its_layers():
    layers = edgeattn.from_pretrained(GOLDEN / "albert").encoder.layers
    assert len(layers) == 4 and layers[0] is layers[1] and layers[2] is layers[3] and layers[0] is not layers[2]


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_a_head_is_left_where_it_is(name, tmp_path):
    prefix = FAMILIES[name].prefix
    whole = copy_of(name, tmp_path / "model", tensors=lambda found: {
        **{prefix + key: array for key, array in found.items()}, "classifier.weight": np.ones((2, 16), np.float32)})
    x = expected(name)["pixels" if name == "vit" else "ids"]
    np.testing.assert_array_equal(edgeattn.from_pretrained(whole)(x), edgeattn.from_pretrained(GOLDEN / name)(x))


def test_old_names_and_half_precision(tmp_path):
    def old(found):
        return {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"):
                array.astype(np.float16) for name, array in found.items()}

    model, known = edgeattn.from_pretrained(copy_of("bert", tmp_path / "model", tensors=old)), expected("bert")
    np.testing.assert_allclose(model(known["ids"], known["attention_mask"]), known["hidden"], rtol=0, atol=2e-2)


def test_nomics_own_option_names(tmp_path):
    folder = copy_of("nomic_bert", tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "nomic_bert", "n_embd": 16, "n_head": 2, "n_layer": 2, "n_inner": 32, "vocab_size": 40,
        "activation_function": "swiglu", "layer_norm_epsilon": 1e-12, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
        "qkv_proj_bias": False, "mlp_fc1_bias": False, "prenorm": False, "type_vocab_size": 2}))
    known = expected("nomic_bert")
    np.testing.assert_allclose(edgeattn.from_pretrained(folder)(known["ids"], known["attention_mask"]), known["hidden"],
                               **CLOSE)


def sharded(folder):
    """The golden BERT in two files and an index."""
    folder = copy_of("bert", folder)
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(found)
    places = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: found[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder, places


def test_sharded_weights(tmp_path):
    folder, _ = sharded(tmp_path / "model")
    ids = expected("bert")["ids"]
    np.testing.assert_array_equal(edgeattn.from_pretrained(folder)(ids), edgeattn.from_pretrained(GOLDEN / "bert")(ids))


@pytest.mark.parametrize("change, error, message", [
    (lambda places: dict.fromkeys(places, "../model.safetensors"), ValueError, "must have a weight_map"),
    (lambda places: {**places, "more": "model-00001-of-00002.safetensors"}, ValueError,
     "names tensors that its files do not hold: more"),
    (lambda places: {**places, "more": "model-00003.safetensors"}, FileNotFoundError, "names model-00003.safetensors"),
])
def test_indices_that_lie(change, error, message, tmp_path):
    folder, places = sharded(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": change(places)}))
    with pytest.raises(error, match=message):
        edgeattn.from_pretrained(folder)


def without(name):
    return lambda found: {key: array for key, array in found.items() if key != name}


WORD = "embeddings.word_embeddings.weight"


@pytest.mark.parametrize("name, config, tensors, message", [
    ("bert", {}, without("encoder.layer.1.output.dense.bias"),
     r"model.safetensors does not hold the bert model .* missing: encoder\.layer\.1\.output\.dense\.bias; use the config"),
    ("bert", {}, lambda f: {**f, "adapter.weight": np.ones(3, np.float32)}, r"unexpected: adapter\.weight"),
    ("bert", {}, lambda f: {**f, WORD: np.full((40, 16), np.nan, np.float32)}, f"{WORD} holds NaN or infinity"),
    ("bert", {}, lambda f: {**f, WORD: np.full((40, 16), 1e39)}, f"{WORD} holds NaN or infinity as float32"),
    ("bert", {}, lambda f: {**f, "embeddings.LayerNorm.gamma": np.ones(16, np.float32)},
     r"holds embeddings\.LayerNorm\.gamma and embeddings\.LayerNorm\.weight, which are two names of one tensor"),
    ("bert", {}, lambda f: {**f, WORD: np.ones((40, 16), np.int32)}, f"{WORD} must be a float16, float32 or float64"),
    ("bert", {"hidden_size": 32}, without(""), r"mis-shaped: .*word_embeddings\.weight must be \(40, 32\) by config"),
    ("bert", {"vocab_size": 41}, without(""), r"must be \(41, 16\) by config.json, got \(40, 16\)"),
    ("bert", {"num_hidden_layers": 1}, without(""), r"unexpected: encoder\.layer\.1"),
    ("bert", {"num_hidden_layers": 10**7}, without(""), r"missing: encoder\.layer\.2.* and \d+ more|missing: encoder"),
    ("bert", {"hidden_size": 2**24, "num_attention_heads": 1}, without(""), "mis-shaped: .* must be"),
    ("bert", {"hidden_size": 2**40}, without(""), "config.json: hidden_size must be an integer from 1"),
    ("bert", {"hidden_size": "16"}, without(""), "hidden_size must be an integer from 1 to 16777216, got 16"),
    ("bert", {"num_attention_heads": 3}, without(""), "num_attention_heads must divide hidden_size = 16, got 3"),
    ("bert", {"hidden_act": "gelu_10"}, without(""), "the activation must be one of gelu, .* got 'gelu_10'"),
    ("bert", {"position_embedding_type": "relative_key"}, without(""), "position_embedding_type must be absolute, got"),
    ("bert", {"is_decoder": True}, without(""), "config.json: is_decoder must be False, got True: a bert model computed"),
    ("bert", {"model_type": "t5"}, without(""), "model_type must be one of bert, roberta, .*, got 't5': it is none of"),
    ("bert", {"model_type": "mobilebert"}, without(""), "got 'mobilebert': its layers have bottlenecks"),
    ("bert", {"model_type": None}, without(""), "config.json must say model_type, and does not"),
    ("bert", {"layer_norm_eps": 0}, without(""), "layer_norm_eps must be a number greater than 0, .* got 0"),
    ("bert", {"layer_norm_eps": 10**400}, without(""), "layer_norm_eps must be a number greater than 0, .* got 1000"),
    ("dinov2", {"mlp_ratio": float("inf")}, without(""), "mlp_ratio must be a number greater than 0, .* got inf"),
    ("roberta", {"pad_token_id": 50}, without(""), "pad_token_id must be one of the tokens, got 50"),
    ("mpnet", {"relative_attention_num_buckets": 16}, without(""), r"relative_attention_bias\.weight must be \(16, 2\)"),
    ("modernbert", {"layer_types": ["full_attention"]}, without(""), "layer_types must be full_attention or sliding_att"),
    ("modernbert", {"norm_bias": True}, without(""), r"missing: embeddings\.norm\.bias"),
    ("nomic_bert", {"rope_parameters": {"rope_type": "yarn"}}, without(""), "rope_parameters must be of rope_type default"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, without(""), "scale_attn_by_inverse_layer_idx must be False"),
    ("vit", {"image_size": 16}, without(""), r"position_embeddings must be \(1, 17, 16\) by config.json"),
    ("vit", {"patch_size": [4]}, without(""), "patch_size must be one or two positive integers"),
    ("vit", {"patch_size": 13}, without(""), "must have room for a patch"),
])
def test_folders_that_lie(name, config, tensors, message, tmp_path):
    folder = copy_of(name, tmp_path / "model", config=config, tensors=tensors)
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        edgeattn.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100000])
def test_configs_that_are_none(content, tmp_path):
    folder = copy_of("bert", tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json is not a whole file of JSON"):
        edgeattn.from_pretrained(folder)


def test_missing_files(tmp_path):
    with pytest.raises(NotADirectoryError, match="folder must be one with config.json and model.safetensors, got 'bert'"):
        edgeattn.from_pretrained("bert")
    with pytest.raises(FileNotFoundError, match="config.json"):
        edgeattn.from_pretrained(tmp_path)
    folder = copy_of("bert", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors or .*, got \[pytorch_model\.bin\]"):
        edgeattn.from_pretrained(folder)


BERT_IDS = [[2, 5, 6], [2]]


@pytest.mark.parametrize("call, error, message", [
    (lambda m: m([[2, 40]]), ValueError, "ids must lie between 0 and 39, the model's vocabulary, got 40 in sequence 0 at"),
    (lambda m: m(np.array([[2, -1]])), ValueError, "got -1 in sequence 0 at token 1"),
    (lambda m: m([[2] * 25]), ValueError, "ids must have at most the model's 24 positions, got 25 tokens"),
    (lambda m: m(np.array([[2.0]])), TypeError, "ids must be an integer array, got dtype float64"),
    (lambda m: m(np.array([2])), ValueError, r"ids must be \(B, L\), got shape \(1,\)"),
    (lambda m: m([2, 3]), TypeError, "ids must be a list of lists of integers"),
    (lambda m: m(BERT_IDS, [[1, 1, 1], [1, 0, 0]]), ValueError, "attention_mask must be left out where ids are a list"),
    (lambda m: m(np.ones((1, 3), int), np.ones((1, 2))), ValueError, "attention_mask must have the shape of ids"),
    (lambda m: m(np.ones((1, 3), int), [[1, 2, 0]]), ValueError, "attention_mask must be of 0 and 1"),
    (lambda m: m(BERT_IDS, token_type_ids=[[0]]), ValueError, "token_type_ids must have the shape of ids"),
    (lambda m: m(BERT_IDS, token_type_ids=np.zeros((2, 3), int)), ValueError,
     r"token_type_ids must have the shape of ids, a list of lengths \[3, 1\], got \(2, 3\)"),
    (lambda m: edgeattn.TextEncoder(m.embedding, m.encoder, tokenizer=5), TypeError,
     "tokenizer must be the text of a tokenizer.json, or None, got int"),
])
def test_bad_ids_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(edgeattn.from_pretrained(GOLDEN / "bert"))


def test_empty_batches():
    model = edgeattn.from_pretrained(GOLDEN / "bert")
    assert model([]).shape == (0, 0, 16) and model([[], []]).shape == (2, 0, 16)
    assert model(np.zeros((0, 5), int)).shape == (0, 5, 16)
    assert not model([[], [2, 3]])[0].any()


@pytest.mark.parametrize("name, shape, tokens", [
    ("vit", (0, 3, 12, 12), 10), ("vit", (0, 3, 12, 16), 13), ("audio-spectrogram-transformer", (0, 20, 12), None)])
def test_no_images(name, shape, tokens):
    model = edgeattn.from_pretrained(GOLDEN / name)
    assert model(np.zeros(shape, np.float32)).shape == (0, tokens or len(model.embedding.position_weight), 16)
    assert model.embedding.patches(np.zeros((0, model.embedding.channels, 20, 20), np.float32)).shape[0] == 0


@pytest.mark.parametrize("name, shape, message", [
    ("vit", (1, 12, 12), r"pixels must be \(B, C, height, width\), got shape \(1, 12, 12\)"),
    ("vit", (1, 1, 12, 12), r"with 3 channels, height and width multiples of \(4, 4\), got shape \(1, 1, 12, 12\); resize"),
    ("vit", (1, 3, 12, 13), "multiples of"),
    ("vit", (1, 3, 0, 12), "multiples of"),
    ("audio-spectrogram-transformer", (1, 20, 13), r"pixels must be \(B, frames, bins\) with \(20, 12\), got shape"),
])
def test_bad_pixels_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        edgeattn.from_pretrained(GOLDEN / name)(np.zeros(shape, np.float32))
