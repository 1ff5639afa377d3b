"""TextEncoder.encode beside sentence-transformers: golden/sentence-transformer, which tools/goldens/models.py writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import edgeattn

FOLDER = Path(__file__).parent / "golden" / "sentence-transformer"
KNOWN = np.load(FOLDER / "expected.npz")
SENTENCES = KNOWN["sentences"].tolist()


def model(**changes):
    made = edgeattn.from_pretrained(FOLDER)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_embeddings_are_those_of_sentence_transformers(batch_size):
    result = model().encode(SENTENCES, batch_size)
    np.testing.assert_allclose(result, KNOWN["embeddings"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(result, model().encode(SENTENCES, 3))


def test_a_sentence_gives_the_same_bits_alone():
    whole = model().encode(SENTENCES)
    for sentence, row in zip(SENTENCES, whole, strict=True):
        np.testing.assert_array_equal(model().encode([sentence])[0], row)


def test_pooling_and_length():
    made = model()
    assert made.max_length == 12 and made.normalize and made.pooling == "mean"
    np.testing.assert_allclose(np.linalg.norm(made.encode(SENTENCES), axis=1), 1, rtol=1e-6)
    raw = made.encode(SENTENCES[:1], normalize=False)[0]
    hidden = made([made._tokenizer.encode(SENTENCES[0]).ids])[0]
    np.testing.assert_array_equal(raw, hidden.mean(axis=0))
    for pooling, row in {"cls": hidden[0], "last": hidden[-1], "max": hidden.max(axis=0)}.items():
        np.testing.assert_array_equal(model(pooling=pooling).encode(SENTENCES[:1], normalize=False)[0], row)


def test_long_texts_are_cut_where_the_folder_says_or_refused(tmp_path):
    long = "dog " * 40
    np.testing.assert_array_equal(model().encode([long]), model().encode([long + "cat"]))
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    for name in ("modules.json", "sentence_bert_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 20}')
    plain = edgeattn.from_pretrained(tmp_path)
    assert plain.max_length == 20 and not plain.normalize and plain.encode([long]).shape == (1, 16)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"sentences\[1\] must have at most the model's 24 positions, got 42 tokens; cut"):
        edgeattn.from_pretrained(tmp_path).encode(["a", long])


def test_lower_case_and_progress(capsys):
    tokenizer = model().tokenizer.replace('"lowercase":true', '"lowercase":false').replace(
        '"lowercase": true', '"lowercase": false')
    a, b = (model(tokenizer=tokenizer, lower_case=lower).encode(["THE CAT"]) for lower in (True, False))
    np.testing.assert_array_equal(a, model().encode(["the cat"]))
    assert not np.array_equal(a, b)
    model().encode(SENTENCES, 2, show_progress=True)
    assert capsys.readouterr().err.endswith("5 of 5 sentences\n")


def test_files_hold_the_tokenizer_too(tmp_path):
    edgeattn.save(model(), tmp_path / "model.safetensors")
    np.testing.assert_array_equal(edgeattn.load(tmp_path / "model.safetensors").encode(SENTENCES),
                                  model().encode(SENTENCES))


@pytest.mark.parametrize("call, error, message", [
    (lambda m: m.encode("a text"), TypeError, r"sentences must be a list of strings, got a string; pass \[text\]"),
    (lambda m: m.encode(["a", 3]), TypeError, "sentences must be a list of strings"),
    *[(lambda m, bad=bad: m.encode(bad), TypeError, f"sentences must be a list of strings, got {type(bad).__name__}")
      for bad in ({"a"}, {"a": 1}, None, b"a", 5)],
    (lambda m: m.encode(["a", "\ud800 cat"]), ValueError, r"sentences\[1\] must be text .* got a lone surrogate in '\\ud800"),
    (lambda m: m.encode(["a"], 0), ValueError, "batch_size must be at least 1"),
])
def test_bad_sentences_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(model())


def test_sentences_may_come_once():
    made = model()
    np.testing.assert_array_equal(made.encode(sentence for sentence in SENTENCES), made.encode(SENTENCES))


def test_no_sentences_and_no_tokens():
    assert model().encode([]).shape == (0, 16)
    bare = json.loads(model().tokenizer)
    bare["post_processor"] = None
    with pytest.raises(ValueError, match=r"sentences\[1\] gives no token: ''; leave it out"):
        model(tokenizer=json.dumps(bare)).encode(["a", ""])
    with pytest.raises(ValueError, match="this TextEncoder has no tokenizer: pass token ids"):
        model(tokenizer=None).encode(["a"])
    with pytest.raises(ValueError, match="the tokenizer is not a whole tokenizer.json: "):
        model(tokenizer="{").encode(["a"])


@pytest.mark.parametrize("file, change, message", [
    ("modules.json", lambda m: m + [{"path": "3_Dense", "type": "x.Dense"}], "modules.json must name one Transformer"),
    ("modules.json", lambda m: [{**m[0], "path": "../other"}], "in folders inside this one, got 'Transformer' in '../o"),
    ("modules.json", lambda m: "no list", "modules.json is not a whole file of JSON: it must hold a list"),
    ("modules.json", lambda m: [], "modules.json must name one Transformer, got no module"),
    ("modules.json", lambda m: m[-1:], "modules.json must name one Transformer, got Normalize"),
    ("tokenizer.json", lambda t: [], "tokenizer.json: it must hold an object whose model is"),
    ("tokenizer.json", lambda t: {}, "tokenizer.json: it must hold an object whose model is"),
    ("tokenizer.json", lambda t: {**t, "model": {}}, "tokenizer.json: it must hold an object whose model is"),
    ("tokenizer.json", lambda t: {**t, "truncation": 5}, "tokenizer.json: truncation must be null or an object, got 5"),
    ("1_Pooling/config.json", lambda p: {**p, "pooling_mode": "weightedmean"}, "pooling must be one of mean, cls, max"),
    ("1_Pooling/config.json", lambda p: {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
     r"pooling must be one of mean, cls, max, last, got \['cls', 'mean'\]"),
    ("1_Pooling/config.json", lambda p: {**p, "embedding_dimension": 99}, "the dimension must be the model's 16, got 99"),
    ("config_sentence_transformers.json", lambda c: {**c, "default_prompt_name": "query"}, "default_prompt_name must be"),
    ("sentence_bert_config.json", lambda c: {**c, "max_seq_length": "12"},
     "sentence_bert_config.json: max_seq_length must be a positive integer, got 12"),
])
def test_folders_that_ask_for_more_are_refused(file, change, message, tmp_path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(json.dumps(change(json.loads((tmp_path / file).read_text()))))
    with pytest.raises(ValueError, match=message):
        edgeattn.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{}", b"{"])
def test_tokenizers_that_are_none(content, tmp_path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json is not a whole tokenizer.json: "):
        edgeattn.from_pretrained(tmp_path)


def test_lengths_that_are_none(tmp_path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "sentence_bert_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512.0}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json: model_max_length must be a positive integer, got 512\.0"):
        edgeattn.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": {"max_length": "a"}}))
    with pytest.raises(ValueError, match=r"tokenizer.json: truncation\.max_length must be a positive integer, got a"):
        edgeattn.from_pretrained(tmp_path)


@pytest.mark.parametrize("config, pooling", [
    ({"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}, "last"),
    ({"word_embedding_dimension": 16, "pooling_mode_max_tokens": True}, "max")])
def test_older_pooling_files(config, pooling, tmp_path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert edgeattn.from_pretrained(tmp_path).pooling == pooling
