"""Rotary embeddings, norms of heads and position biases in .tflite and .onnx files, beside what the layers give."""

import numpy as np
import pytest
from arrays import cosine
from arrays import numbers as random
from runtimes import HERE
from test_export_encoders import PADDED, L, static
from test_export_onnx import evaluated, in_onnxruntime
from whole_models import E, H, encoder

import edgeattn
import quant
from edgeattn.layers import TransformerEncoder
from quant.runtimes import RUNTIMES

pytest.importorskip("onnx", reason="the extra edgeattn[checkpoints] brings onnx")

D = E // H
each_run = pytest.mark.parametrize("run", [evaluated, in_onnxruntime], ids=["onnx", "onnxruntime"])


def rms(seed):
    return edgeattn.RMSNorm(1 + random(D, seed=seed) / 8)


def layer_norm(seed):
    return edgeattn.LayerNorm(1 + random(D, seed=seed) / 8, random(D, seed=seed + 1) / 8)


def relative(**options):
    return edgeattn.RelativePositionBias(random(8, H), max_distance=6, **options)


POSITIONS = {
    "halves": lambda: {"rotary": edgeattn.RotaryEmbedding(D)},
    "neighbours of a part": lambda: {"rotary": edgeattn.RotaryEmbedding(D // 2, base=500.0, offset=3, interleaved=True)},
    "norms": lambda: {"q_norm": layer_norm(1), "k_norm": layer_norm(3), "rotary": edgeattn.RotaryEmbedding(D, interleaved=True)},
    "one norm": lambda: {"q_norm": rms(1), "rotary": edgeattn.RotaryEmbedding(D // 2)},
    "relative": lambda: {"position_bias": relative()},
    "of the past": lambda: {"position_bias": relative(bidirectional=False), "k_norm": rms(2)},
    "constant": lambda: {"position_bias": random(H, L, L)},
}
SLOPES = np.float32(0.5) ** np.arange(1, H + 1, dtype=np.float32)
ALIBI = -SLOPES[:, None, None] * np.abs(np.arange(L) - np.arange(L)[:, None]).astype(np.float32)
X = random(2, L, E)
SEEN = PADDED > 0


def near(found, want, where=...):
    np.testing.assert_allclose(found[where], want[where], atol=1e-5 * np.abs(want).max())


@each_run
@pytest.mark.parametrize("positions", POSITIONS)
def test_onnx(tmp_path, run, positions):
    """One file for any length, or of one with masks; a layer alone."""
    made, path = encoder(**POSITIONS[positions]()), tmp_path / "a.onnx"
    for opset in (17, 23):
        if positions != "constant":
            quant.export(made, path, opset=opset)
            for x in (X, random(1, 40, E)):
                near(run(path, x), made(x))
            quant.export(made, path, opset=opset, padding=True)
            near(run(path, X, PADDED), made(X, key_padding_mask=SEEN), SEEN)
        sizes = {"batch": 2, "sequence_length": L, "opset": opset}
        near(run(quant.export(made, path, mask="causal", **sizes), X), made(X, is_causal=True))
        near(run(quant.export(made, path, padding=True, **sizes), X, PADDED), made(X, key_padding_mask=SEEN), SEEN)
        layer = made.layers[0].attention
        near(run(quant.export(layer, path, mask=ALIBI, **sizes), X), layer(X, alibi_slopes=SLOPES))
        near(run(quant.export(layer, path, key_length=6, **sizes), X, X[:, :6]), layer(X, X[:, :6]))


@pytest.mark.parametrize("positions", POSITIONS)
def test_tflite(tmp_path, positions):
    made, path = encoder(**POSITIONS[positions]()), tmp_path / "a.tflite"
    layer, sizes = made.layers[0].attention, {"batch": 2, "sequence_length": L}
    for of, options, x, want, where in (
            (made, {}, [X], made(X), ...), (layer, {"mask": ALIBI}, [X], layer(X, alibi_slopes=SLOPES), ...),
            (made, {"padding": True, "mask": "causal"}, [X, PADDED.astype(np.int32)],
             made(X, key_padding_mask=SEEN, is_causal=True), SEEN)):
        quant.export(of, path, **sizes, **options)
        for name in set(HERE) - {"tflm"}:
            near(RUNTIMES[name].session(path).run(*x)[0], want, where)
    dynamic = quant.quantize(made, scheme="dynamic")
    session = RUNTIMES["litert"].session(quant.export(dynamic, path, **sizes))
    assert cosine(session.run(X)[0], dynamic(X)) > 0.999


def test_shared_and_single_heads(tmp_path):
    weights = [random(n, E, seed=n) / 6 for n in (E, E // 2, E // 2)]
    for heads, kv_heads, size in ((4, 2, 8), (1, 1, E)):
        kept = [each[: size * (heads, kv_heads, kv_heads)[i]] for i, each in enumerate(weights if heads > 1 else weights[:1] * 3)]
        layer = edgeattn.MultiHeadAttention(
            heads, *kept, num_kv_heads=kv_heads, q_norm=edgeattn.RMSNorm(1 + random(size) / 8),
            rotary=edgeattn.RotaryEmbedding(size, interleaved=True), position_bias=random(heads, L, L))
        options = {"batch": 2, "sequence_length": L}
        for opset in (17, 23):
            near(evaluated(quant.export(layer, tmp_path / "a.onnx", opset=opset, **options), X), layer(X))
        near(RUNTIMES["litert"].session(quant.export(layer, tmp_path / "a.tflite", **options)).run(X)[0], layer(X))


@pytest.mark.parametrize("positions", ["halves", "relative", "constant", "norms", "one norm"])
def test_our_own_reader_opens_them(tmp_path, positions):
    made = encoder(**POSITIONS[positions]())
    sizes = {"batch": 2, "sequence_length": L} if positions == "constant" else {}
    for opset in (17, 23):
        read = TransformerEncoder.from_onnx(quant.export(made, tmp_path / "a.onnx", opset=opset, **sizes))
        for x in (X, X[:, :5]) if sizes else (X, random(1, 200, E)):
            near(read(x), made(x))


REFUSED = {
    "any length": (lambda: encoder(position_bias=random(H, L, L)), "a.onnx", {}, ValueError,
                   r"layers\.0: layer must have no position_bias of fixed lengths.*give sequence_length"),
    "lengths beyond": (lambda: encoder(position_bias=random(H, L, L)), "a.onnx", {"sequence_length": L + 1}, ValueError,
                       "position_bias is for 9 queries"),
    "numbers for codes": (lambda: static(encoder(), room_for_masks=True), "a.tflite", {"sequence_length": L, "mask": ALIBI}, ValueError,
                          "mask must be bool"),
    "numbers for a static layer": (
        lambda: quant.quantize(encoder().layers[0].attention, quant.calibrate(encoder().layers[0].attention, [X])), "a.onnx",
        {"sequence_length": L, "mask": ALIBI}, TypeError, "mask must be 'causal' or a bool array"),
    "no number": (encoder, "a.onnx", {"sequence_length": L, "mask": np.full((L, L), np.nan)}, ValueError, "mask must hold no NaN"),
    "C": (lambda: encoder(**POSITIONS["halves"]()).layers[0].attention, "a.c", {"sequence_length": L}, ValueError, "no rotary"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_file_holds_is_refused(tmp_path, case):
    made, name, options, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        quant.export(made(), tmp_path / name, **options)
    assert not list(tmp_path.iterdir())
