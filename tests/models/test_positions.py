"""Attention with rotary embedding, norms of heads and biases of positions."""

import copy

import numpy as np
import pytest
import reference
import reference_encoder as oracle
from arrays import cosine

import edgeattn
import quant
from edgeattn import KVCache, LayerNorm, MultiHeadAttention, RelativePositionBias, RMSNorm, RotaryEmbedding

E, H, D, L = 20, 2, 10, 9
CLOSE = dict(rtol=0, atol=3e-6)
RANDOM = np.random.default_rng(8)
W = {name: pair for name, pair in oracle.random_layer(RANDOM, E, 8).items() if name in ("q", "k", "v", "out")}
X = RANDOM.normal(size=(2, L, E)).astype(np.float32)
GAIN, SHIFT = RANDOM.normal(1, 0.3, D).astype(np.float32), RANDOM.normal(0, 0.3, D).astype(np.float32)
BIAS = RANDOM.normal(size=(H, 12, 12)).astype(np.float32)
TABLE = RANDOM.normal(size=(8, H)).astype(np.float32)
T5 = np.array([[[TABLE[oracle.t5_bucket(j - i, 8, 16, True)][h] for j in range(L)] for i in range(L)]
               for h in range(H)])

# name: (arguments of the layer, of the oracle)
KINDS = {
    "rotary": ({"rotary": RotaryEmbedding(D)}, {"place": lambda x: oracle.rotary(x, D, 10000.0)}),
    "partial": ({"rotary": RotaryEmbedding(4, base=100.0)}, {"place": lambda x: oracle.rotary(x, 4, 100.0)}),
    "interleaved": ({"rotary": RotaryEmbedding(D, interleaved=True)},
                    {"place": lambda x: oracle.rotary(x, D, 10000.0, interleaved=True)}),
    "offset": ({"rotary": RotaryEmbedding(D, offset=7)}, {"place": lambda x: oracle.rotary(x, D, 10000.0, first=7)}),
    "layer norms": ({"q_norm": LayerNorm(GAIN, SHIFT), "k_norm": LayerNorm(GAIN, SHIFT)},
                    {"place": lambda x: oracle.layer_norm(x, GAIN, SHIFT)}),
    "norms, then rotary": ({"q_norm": RMSNorm(GAIN), "k_norm": RMSNorm(GAIN), "rotary": RotaryEmbedding(D)},
                           {"place": lambda x: oracle.rotary(oracle.rms_norm(x, GAIN), D, 10000.0)}),
    "bias": ({"position_bias": BIAS}, {"bias": BIAS[:, :L, :L]}),
    "T5": ({"position_bias": RelativePositionBias(TABLE, max_distance=16)}, {"bias": T5}),
}


def layer(num_kv_heads=None, **positions):
    return MultiHeadAttention(H, *(W[name][0] for name in ("q", "k", "v", "out")), q_bias=W["q"][1], k_bias=W["k"][1],
                              v_bias=W["v"][1], out_bias=W["out"][1], **positions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_its_formula(kind, causal):
    ours, theirs = KINDS[kind]
    permitted = reference.visible(2, H, L, L, causal=causal)
    np.testing.assert_allclose(layer(**ours)(X, is_causal=causal), oracle.attention(X, W, H, permitted, **theirs), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_through_a_cache_it_is_the_whole_sequence(kind, dtype):
    made = layer(**KINDS[kind][0])
    cache = KVCache.for_layer(made, 2, 12, dtype=dtype)
    parts = [made(X[:, first:last], kv_cache=cache, is_causal=True) for first, last in ((0, 3), (3, 4), (4, 5), (5, L))]
    close = CLOSE if dtype == "float32" else {"rtol": 0, "atol": 0.1}
    np.testing.assert_allclose(np.concatenate(parts, axis=1), made(X, is_causal=True), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_with_other_masks_and_weights(kind):
    ours, theirs = KINDS[kind]
    mask = np.random.default_rng(2).normal(size=(2, H, L, L)).astype(np.float32)
    mask[0, :, :, 4] = -np.inf
    result, weights = layer(**ours)(X, attn_mask=mask, need_weights=True)
    bias = mask if "bias" not in theirs else mask + theirs["bias"]
    np.testing.assert_allclose(result, oracle.attention(X, W, H, **{**theirs, "bias": bias}), **CLOSE)
    assert weights.shape == (2, H, L, L) and not weights[0, :, :, 4].any()


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, most", [(32, 128), (8, 20), (4, 3)])
def test_buckets_are_those_of_t5(bidirectional, buckets, most):
    bias = RelativePositionBias(np.arange(buckets, dtype=np.float32)[:, None], bidirectional=bidirectional,
                                max_distance=most).rows(3, 200, 150)
    wanted = [[oracle.t5_bucket(j - i, buckets, most, bidirectional) for j in range(150)] for i in range(3, 203)]
    np.testing.assert_array_equal(bias[0], wanted)


def test_swin_tables():
    height, width = 2, 3
    table = np.random.default_rng(1).normal(size=(3 * 5, H)).astype(np.float32)
    bias = edgeattn.swin_position_bias(table, (height, width))
    for a in range(6):
        for b in range(6):
            down, right = a // width - b // width, a % width - b % width
            np.testing.assert_array_equal(bias[:, a, b], table[(down + height - 1) * (2 * width - 1) + right + width - 1])
    assert layer(position_bias=bias)(X[:, :6]).shape == (2, 6, E)


@pytest.mark.parametrize("first, masks", [
    (0, {}), (0, {"is_causal": True, "causal_alignment": "upper_left"}),
    (2, {"is_causal": True, "causal_alignment": "lower_right"})])
@pytest.mark.parametrize("int8", [False, True])
def test_cross_attention_counts_queries_from_the_key_they_are_aligned_to(first, masks, int8):
    made, keys = layer(rotary=RotaryEmbedding(D)), X[:, :5]
    result = (quant.quantize(made, scheme="dynamic") if int8 else made)(X[:, :3], keys, **masks)
    q, k, v = (oracle.heads(oracle.linear(x, *W[name]), H) for name, x in (("q", X[:, :3]), ("k", keys), ("v", keys)))
    seen = np.arange(5) <= first + np.arange(3)[:, None] if masks else np.ones((3, 5), bool)
    context, _ = reference.attention(oracle.rotary(q, D, 1e4, first=first), oracle.rotary(k, D, 1e4), v, seen)
    exact = oracle.linear(context.swapaxes(1, 2).reshape(2, 3, -1), *W["out"])
    assert cosine(result, exact) > 0.9995
    if not int8:
        np.testing.assert_allclose(result, exact, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("int8", [False, True])
def test_files_hold_it(kind, int8, tmp_path):
    made = layer(**KINDS[kind][0])
    made = quant.quantize(made, scheme="dynamic") if int8 else made
    edgeattn.save(made, tmp_path / "layer.safetensors")
    for other in (edgeattn.load(tmp_path / "layer.safetensors"), copy.deepcopy(made)):
        np.testing.assert_array_equal(other(X), made(X))


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_near_its_formula(kind):
    ours, theirs = KINDS[kind]
    made = quant.quantize(layer(**ours), scheme="dynamic")
    for causal in (False, True):
        exact = oracle.attention(X, W, H, reference.visible(2, H, L, L, causal=causal), **theirs)
        assert cosine(made(X, is_causal=causal), exact) > 0.9997
    assert cosine(made(X, softcap=1e6), oracle.attention(X, W, H, **theirs)) > 0.9997  # not the fused kernel


@pytest.mark.parametrize("kind", KINDS)
def test_int8_through_an_int8_cache_gives_the_same_bytes_however_it_is_cut(kind):
    made = quant.quantize(layer(**KINDS[kind][0]), scheme="dynamic")

    def steps(*ends):
        cache = KVCache.for_layer(made, 2, 12, dtype="int8")
        return np.concatenate([made(X[:, a:b], kv_cache=cache, is_causal=True) for a, b in zip((0, *ends), (*ends, L), strict=True)],
                              axis=1)

    whole = steps()
    np.testing.assert_array_equal(steps(*range(1, L)), whole)
    np.testing.assert_array_equal(steps(3, 4), whole)
    assert cosine(whole, made(X, is_causal=True)) > 0.999


# heads narrower and wider than a vector, of a size that fills none; groups of them; lengths that end amid a block
@pytest.mark.parametrize("head_dim, heads, kv_heads, length", [(4, 6, 2, 70), (18, 4, 4, 33), (64, 2, 1, 45)])
@pytest.mark.parametrize("int8", [False, True])
def test_sizes_batches_threads_and_masks(head_dim, heads, kv_heads, length, int8, one_thread_afterwards):
    rng, width = np.random.default_rng(5), 24

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32)

    sizes = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    w = {name: (random(size, width) / 5, random(size)) for name, size in sizes.items()}
    w["out"] = random(width, heads * head_dim) / 5, random(width)
    gain, shift, bias = random(head_dim), random(head_dim), random(heads, length, length)
    made = MultiHeadAttention(
        heads, *(w[name][0] for name in ("q", "k", "v", "out")), q_bias=w["q"][1], k_bias=w["k"][1], v_bias=w["v"][1],
        out_bias=w["out"][1], num_kv_heads=kv_heads, q_norm=LayerNorm(gain, shift), k_norm=RMSNorm(gain),
        rotary=RotaryEmbedding(head_dim, offset=3), position_bias=bias)
    grouped = {name: pair if name in ("q", "out") else tuple(
        each.reshape(kv_heads, head_dim, -1).repeat(heads // kv_heads, axis=0).reshape(heads * head_dim, *each.shape[1:])
        for each in pair) for name, pair in w.items()}
    x, mask = random(2, length, width), random(2, 1, length, length)
    mask[:, :, :, 5] = -np.inf

    def place(norm):
        return lambda rows: oracle.rotary(norm(rows), head_dim, 1e4, first=3)

    exact = oracle.attention(x, grouped, heads, bias=mask + bias,
                             place=place(lambda q: oracle.layer_norm(q, gain, shift)),
                             place_keys=place(lambda k: oracle.rms_norm(k, gain)))
    made = quant.quantize(made, scheme="dynamic") if int8 else made
    result = made(x, attn_mask=mask)
    if int8:
        shared = exact.mean(axis=1, keepdims=True)  # biases, above all
        assert cosine(result - shared, exact - shared) > 0.999
    else:
        np.testing.assert_allclose(result, exact, rtol=0, atol=3e-5)
    for threads in (1, 2, 3):
        edgeattn.set_num_threads(threads)
        for _again in range(2):  # as it is checked, and as it was found before
            np.testing.assert_array_equal(made(x, attn_mask=mask), result)
            np.testing.assert_array_equal(made(x[1], attn_mask=mask[1]), result[1])
    np.testing.assert_array_equal(made(x), made(x, attn_mask=np.zeros((length, length), np.float32)))


def test_a_bias_and_a_mask_hide_no_key_together_that_neither_hides():
    lowest = np.full((1, L), np.finfo(np.float32).min)
    lowest[:, 1:] = -np.inf
    made = layer(position_bias=np.full((H, L, L), -1e38))
    for _ in range(2):
        np.testing.assert_allclose(made(X, attn_mask=lowest), made(X, attn_mask=lowest == lowest[0, 0]), **CLOSE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lowest", [None, -100])  # a Swin Transformer's windows hide others so
def test_static_int8_adds_a_constant_bias(masked, lowest, tmp_path):
    bias = BIAS[:, :L, :L].copy()
    if lowest:
        bias[:, :4, 4:] = lowest
    made = layer(position_bias=bias)
    calls = [{"query": X, "is_causal": True} if masked else X]
    quant.calibrate(made, calls).save(tmp_path / "calibration.safetensors")
    static = quant.quantize(made, quant.Calibration.load(tmp_path / "calibration.safetensors"))
    exact = oracle.attention(X, W, H, reference.visible(2, H, L, L, causal=masked), bias=bias)
    assert cosine(static(X, is_causal=masked), exact) > 0.998
    assert quant.compare(made, static, calls).tensors["output"].cosine > 0.998
    edgeattn.save(static, tmp_path / "static.safetensors")
    np.testing.assert_array_equal(edgeattn.load(tmp_path / "static.safetensors")(X), static(X))
    with pytest.raises(ValueError, match="the mask this layer carries has shape"):
        static(X[:, :5])
    with pytest.raises(ValueError, match="mask needs a layer whose scores get no bias"):
        static.with_mask(np.ones((L, L), bool))
    with pytest.raises(ValueError, match="calibration was made with another layer"):
        quant.quantize(layer(position_bias=bias + 1), quant.calibrate(made, calls))


@pytest.mark.parametrize("bias", [RelativePositionBias(TABLE, max_distance=16), np.full((H, L, L), -np.inf)])
def test_static_int8_refuses_other_biases(bias):
    with pytest.raises(ValueError, match=r"position_bias must be a finite array \(H, L, S\) .*scheme='dynamic' takes"):
        quant.calibrate(layer(position_bias=bias), [X])


def test_what_computes_none_of_it_refuses():
    made = layer(rotary=RotaryEmbedding(D), q_norm=RMSNorm(GAIN))
    int8 = quant.quantize(made, scheme="dynamic")
    for call, way_out in (
            (lambda: quant.calibrate(made, [X]), "scheme='dynamic'"),
            (lambda: made.to("cuda"), "on the CPU"), (lambda: int8.to("cuda"), "on the CPU")):
        with pytest.raises(ValueError, match=f"layer must have no rotary, q_norm here, .*{way_out}"):
            call()


@pytest.mark.parametrize("positions, error, message", [
    ({"rotary": RotaryEmbedding(12)}, ValueError, "rotary must turn at most D = 10 features"),
    ({"rotary": 10000}, TypeError, "rotary must be an edgeattn.RotaryEmbedding, got int"),
    ({"q_norm": RMSNorm(np.ones(E))}, ValueError, "q_norm must be over the features of a head, D = 10"),
    ({"k_norm": GAIN}, TypeError, "k_norm must be an edgeattn.LayerNorm or RMSNorm, got ndarray"),
    ({"position_bias": BIAS[0]}, ValueError, r"position_bias must be \(H, L, S\), or a RelativePositionBias"),
    ({"position_bias": BIAS[:1]}, ValueError, "position_bias must have H = 2 heads, got 1"),
])
def test_bad_positions_are_refused(positions, error, message):
    with pytest.raises(error, match=message):
        layer(**positions)


@pytest.mark.parametrize("call, message", [
    (lambda: RotaryEmbedding(5), "rotary_embedding_dim must be even, got 5"),
    (lambda: RotaryEmbedding(4, offset=-1), "offset must be at least"),
    (lambda: RelativePositionBias(np.ones((2, H))), r"table must be \(buckets, H\)"),
    (lambda: RelativePositionBias(TABLE, max_distance=2), r"table must be \(buckets, H\)"),
    (lambda: edgeattn.swin_position_bias(TABLE, (2, 2)), r"table must be \(\(2 \* height - 1\)"),
    (lambda: layer(position_bias=BIAS[:, :4, :4])(X), "position_bias is for 4 queries and 4 keys, got queries up to"),
])
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
