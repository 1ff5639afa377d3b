"""Log-sum-exp, ALiBi, windows by count, masks of torch, added keys: what beside the formula users bring along."""


import numpy as np
import pytest
import reference
from arrays import numbers

import edgeattn
import quant
from edgeattn import MultiHeadAttention, SelfAttention, sliding_window
from edgeattn import scaled_dot_product_attention as attend
from edgeattn.masks import torch_masks

B, H, L, S, D = 2, 4, 5, 9, 8


def qkv(H=H, L=L, S=S):
    return numbers(B, H, L, D), numbers(B, H, S, D, seed=1), numbers(B, H, S, D, seed=2)


def layer(E=12, kv_heads=2, Dv=3, **changes):
    given = {
        "q_weight": numbers(H * D, E, seed=1), "k_weight": numbers(kv_heads * D, E, seed=2),
        "v_weight": numbers(kv_heads * Dv, E, seed=3), "out_weight": numbers(7, H * Dv, seed=4),
        "k_bias": numbers(kv_heads * D, seed=5), "out_bias": numbers(7, seed=6)}
    return MultiHeadAttention(H, **{**given, **changes}, num_kv_heads=kv_heads)


# log-sum-exp


def test_lse_is_the_log_of_the_sum_over_permitted_keys():
    q, k, v = qkv()
    keep = np.random.default_rng(3).random((B, 1, L, S)) < 0.6
    keep[1, 0, 2] = False
    result, weights, lse = attend(q, k, v, keep, softcap=2.0, return_weights=True, return_lse=True)
    scores = 2 * np.tanh(q.astype(np.float64) @ k.swapaxes(2, 3) / np.sqrt(D) / 2)
    with np.errstate(divide="ignore"):
        expected = np.log(np.where(keep, np.exp(scores), 0).sum(-1))
    assert lse.dtype == np.float32
    np.testing.assert_allclose(lse, expected, rtol=1e-6, atol=1e-6)
    assert (lse[1, :, 2] == -np.inf).all()
    alone, lse_alone = attend(q, k, v, keep, softcap=2.0, return_lse=True)
    np.testing.assert_array_equal(alone, result)
    np.testing.assert_array_equal(lse_alone, lse)
    np.testing.assert_allclose(weights.sum(-1), lse != -np.inf, atol=1e-6)


def test_lse_joins_parts_of_the_keys():
    q, k, v = qkv()
    parts = [attend(q, k[:, :, part], v[:, :, part], return_lse=True) for part in (slice(0, 4), slice(4, S))]
    lse = np.logaddexp(parts[0][1], parts[1][1])
    joined = sum(result * np.exp(part - lse)[..., None] for result, part in parts)
    np.testing.assert_allclose(joined, attend(q, k, v), atol=1e-6)


@pytest.mark.parametrize("shape", [(L, D), (3, L, D), (2, 2, 3, L, D)])
def test_lse_has_the_shape_of_the_queries(shape):
    x = numbers(*shape).astype(np.float16)
    assert attend(x, x, x, return_lse=True)[1].shape == shape[:-1]
    nothing = x[..., :0, :]
    assert (attend(x, nothing, nothing, return_lse=True)[1] == -np.inf).all()


def test_nan_reaches_lse():
    q, k, v = qkv()
    k[0, 0, 3] = np.nan
    lse = attend(q, k, v, return_lse=True)[1]
    assert np.isnan(lse[0, 0]).all()
    assert np.isfinite(lse[1]).all()
    with pytest.raises(TypeError, match="return_lse must be True or False, got 1"):
        attend(q, k, v, return_lse=1)


# ALiBi


@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize("per_batch", [False, True])
def test_alibi_lowers_scores_by_distance(alignment, per_batch):
    q, k, v = qkv()
    slopes = np.random.default_rng(4).random((B, H) if per_batch else H)
    offset = S - L if alignment == "lower_right" else 0
    distance = np.abs(np.arange(L)[:, None] + offset - np.arange(S))
    bias = -slopes[..., None, None] * distance
    for mask in (None, numbers(L, S, seed=7)):
        whole = bias if mask is None else bias + mask
        np.testing.assert_allclose(
            attend(q, k, v, mask, alibi_slopes=slopes, causal_alignment=alignment), attend(q, k, v, whole), atol=1e-6)


def test_alibi_positions_follow_kv_lengths_and_causality():
    q, k, v = qkv()
    slopes, lengths = np.array([1.0, 0.5, 0.25, 0.0]), np.array([6, 9])
    arguments = dict(is_causal=True, causal_alignment="lower_right", alibi_slopes=slopes)
    result = attend(q, k, v, kv_lengths=lengths, **arguments)
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(result[b], attend(q[b], k[b, :, :n], v[b, :, :n], **arguments), atol=1e-6)


def test_alibi_in_layers():
    made, x = layer(), numbers(B, L, 12)
    slopes = np.array([1.0, 0.5, 0.25, 0.0])
    distance = np.abs(np.arange(L)[:, None] - np.arange(L))
    np.testing.assert_allclose(
        made(x, alibi_slopes=slopes), made(x, attn_mask=-slopes[:, None, None] * distance), atol=1e-5)


@pytest.mark.parametrize("lead", [(), (0,), (2,)])
@pytest.mark.parametrize("per_batch", [False, True])
def test_alibi_without_heads_or_batch_entries(lead, per_batch):
    heads = 4 if lead == (0,) else 0
    x = numbers(*lead, heads, L, D)
    slopes = np.ones((*lead, heads) if per_batch else heads, np.float32)
    assert attend(x, x, x, alibi_slopes=slopes).shape == x.shape


@pytest.mark.parametrize(("slopes", "error", "message"), [
    (np.ones(3), ValueError, r"alibi_slopes must have shape \(H,\) = \(4,\) or \(..., H\) = \(2, 4\), got \(3,\)"),
    (np.ones(4, int), TypeError, "alibi_slopes must be a float16, float32 or float64 array, got dtype int64"),
    (np.full(4, np.inf), ValueError, "alibi_slopes must be finite, got inf or NaN among them"),
])
def test_bad_slopes_are_refused(slopes, error, message):
    with pytest.raises(error, match=message):
        attend(*qkv(), alibi_slopes=slopes, causal_alignment="upper_left")
    with pytest.raises(ValueError, match="causal_alignment is needed because L = 5 queries and S = 9 keys differ"):
        attend(*qkv(), alibi_slopes=np.ones(4))


# windows


def test_sliding_window_counts_all_keys():
    assert sliding_window(4) == (3, 0)
    q, k, v = qkv(S=L)
    weights = attend(q, k, v, window_size=sliding_window(3), return_weights=True)[1]
    assert ((weights > 0).sum(-1) == np.minimum(np.arange(L) + 1, 3)).all()
    with pytest.raises(ValueError, match="keys must be at least 1, got 0"):
        sliding_window(0)
    with pytest.raises(TypeError, match="keys must be an integer, got 2.5"):
        sliding_window(2.5)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_windows_and_softcap_in_layers(softcap):
    made, x = layer(), numbers(B, 20, 12)
    tensors = {name: getattr(made, name) for name in
               ("q_weight", "k_weight", "v_weight", "out_weight", "k_bias", "out_bias")}
    visible = reference.visible(B, H, 20, 20, window=(4, 2))

    def expected(dtype):
        def heads(x, name, count):
            bias = tensors.get(f"{name}_bias", np.zeros(1)).astype(dtype)
            y = x.astype(dtype) @ tensors[f"{name}_weight"].T.astype(dtype) + bias
            return y.reshape(B, 20, count, -1).swapaxes(1, 2)
        context, weights = reference.attention(
            heads(x, "q", H), heads(x, "k", 2), heads(x, "v", 2), visible, softcap=softcap, dtype=dtype)
        context = context.swapaxes(1, 2).reshape(B, 20, -1)
        return context @ tensors["out_weight"].T.astype(dtype) + tensors["out_bias"], weights

    (oracle, oracle_weights), (plain, _) = expected(np.float64), expected(np.float32)
    reference.assert_as_accurate(made(x, window_size=(4, 2), softcap=softcap), oracle, plain)
    result, weights = made(x, window_size=(4, 2), softcap=softcap, need_weights=True)
    reference.assert_as_accurate(result, oracle, plain)
    np.testing.assert_allclose(weights, oracle_weights, atol=1e-5)
    with pytest.raises(ValueError, match="window_size must be .* bounds >= 0, or -1"):
        made(x, window_size=(-2, 0))
    with pytest.raises(ValueError, match=r"softcap must be 0 \(off\), or positive"):
        made(x, softcap=-1.0)


# added keys


def oracle(made, x, y, keep, dtype):
    """A layer with added keys by torch's definition: rows behind the projected keys that no mask reaches."""
    tensors = {name: getattr(made, name) for name in ("q_weight", "k_weight", "v_weight", "k_bias", "out_weight", "out_bias")}

    def heads(x, name, extra):
        y = x.astype(dtype) @ tensors[f"{name}_weight"].T.astype(dtype) + tensors.get(f"{name}_bias", np.zeros(1)).astype(dtype)
        rows = [y] + [np.broadcast_to(row.astype(dtype), (B, 1, y.shape[2])) for row in extra]
        y = np.concatenate(rows, axis=1)
        count = H if name == "q" else 2
        return y.reshape(B, y.shape[1], count, -1).swapaxes(1, 2)

    def extra(bias, width):
        zeros = [np.zeros(width)] if made.add_zero_attn else []
        return ([] if bias is None else [bias]) + zeros

    k = heads(y, "k", extra(made.bias_k, 2 * D))
    v = heads(y, "v", extra(made.bias_v, 6))
    wide = np.pad(np.broadcast_to(keep, (B, H, x.shape[1], y.shape[1])), ((0, 0),) * 3 + ((0, made.extra_keys),), constant_values=True)
    context, weights = reference.attention(heads(x, "q", []), k, v, wide, dtype=dtype)
    context = context.swapaxes(1, 2).reshape(B, x.shape[1], -1)
    return context @ made.out_weight.T.astype(dtype) + made.out_bias.astype(dtype), weights


ADDED = [dict(bias_k=numbers(16, seed=8), bias_v=numbers(6, seed=9)), dict(add_zero_attn=True),
         dict(bias_k=numbers(1, 1, 16, seed=8), bias_v=numbers(1, 1, 6, seed=9), add_zero_attn=True)]


@pytest.mark.parametrize("added", range(3))
@pytest.mark.parametrize("masked", [False, True])
def test_added_keys_stand_behind_the_others_and_no_mask_reaches_them(added, masked):
    made = layer(**ADDED[added])
    x, y = numbers(B, L, 12), numbers(B, S, 12, seed=1)
    keep = np.ones((B, H, L, S), bool)
    if masked:
        keep = np.random.default_rng(2).random((B, H, L, S)) < 0.5
        keep[0, :, 1] = False
    assert made.extra_keys == (1, 1, 2)[added]
    exact, plain = (oracle(made, x, y, keep, dtype) for dtype in (np.float64, np.float32))
    mask = keep if masked else None
    reference.assert_as_accurate(made(x, y, attn_mask=mask), exact[0], plain[0])
    result, weights = made(x, y, attn_mask=mask, need_weights=True)
    reference.assert_as_accurate(result, exact[0], plain[0])
    reference.assert_as_accurate(weights, exact[1], plain[1])
    causal = reference.visible(B, H, L, L, causal=True)
    reference.assert_as_accurate(
        made(x, is_causal=True), *(oracle(made, x, x, causal, dtype)[0] for dtype in (np.float64, np.float32)))
    bias = np.where(keep, 0, -np.inf)
    reference.assert_as_accurate(made(x, y, attn_mask=bias), exact[0], plain[0])


def test_added_keys_alone_answer_where_there_are_no_others():
    made, x = layer(**ADDED[0]), numbers(B, L, 12)
    value = np.repeat(made.bias_v.reshape(2, 3), 2, axis=0).ravel()
    expected = value @ made.out_weight.T + made.out_bias
    np.testing.assert_allclose(made(x, x[:, :0]), np.broadcast_to(expected, (B, L, 7)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        made(x, attn_mask=np.zeros((L, L), bool)), np.broadcast_to(expected, (B, L, 7)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("added", range(3))
def test_added_keys_are_kept_in_files(added, tmp_path):
    made, x = layer(**ADDED[added]), numbers(B, L, 12)
    edgeattn.save(made, tmp_path / "layer.safetensors")
    again = edgeattn.load(tmp_path / "layer.safetensors")
    assert again.extra_keys == made.extra_keys
    np.testing.assert_array_equal(again(x), made(x))
    one = SelfAttention(numbers(4, 6), numbers(4, 6), numbers(4, 6), bias_k=numbers(4), bias_v=numbers(4), add_zero_attn=True)
    edgeattn.save(one, tmp_path / "one.safetensors")
    again = edgeattn.load(tmp_path / "one.safetensors")
    assert (type(again), again.extra_keys) == (SelfAttention, 2)


def test_added_keys_are_owned_and_read_only():
    given = numbers(1, 1, 16)
    made = layer(bias_k=given, bias_v=np.zeros(6))
    assert made.bias_k.shape == (16,)
    assert made.bias_v.dtype == np.float32
    assert not made.bias_k.flags.writeable
    given[:] = 0
    assert (made.bias_k != 0).all()


@pytest.mark.parametrize(("changes", "error", "message"), [
    (dict(bias_k=np.ones(16)), ValueError, "bias_v must be given with bias_k: the added key needs a value, got None"),
    (dict(bias_v=np.ones(6)), ValueError, "bias_k must be given with bias_v"),
    (dict(bias_k=np.ones(15), bias_v=np.ones(6)), ValueError, r"bias_k must have shape \(16,\) or \(1, 1, 16\), .* got \(15,\)"),
    (dict(bias_k=np.ones(16), bias_v=np.ones((6, 1))), ValueError, r"bias_v must have shape \(6,\) or \(1, 1, 6\), .* got \(6, 1\)"),
    (dict(add_zero_attn=1), TypeError, "add_zero_attn must be True or False, got 1"),
])
def test_bad_added_keys_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        layer(**changes)


@pytest.mark.parametrize("added", range(3))
def test_the_workbench_refuses_added_keys(added, tmp_path):
    made, x = layer(**ADDED[added]), numbers(B, L, 12)
    with pytest.raises(ValueError, match="layer must have no bias_k, bias_v and add_zero_attn"):
        quant.calibrate(made, [x])
    with pytest.raises(ValueError, match="layer must have no bias_k, bias_v and add_zero_attn"):
        quant.quantize(made)
    with pytest.raises(ValueError, match="layer must have no bias_k, bias_v and add_zero_attn"):
        quant.export(made, tmp_path / "layer.tflite", sequence_length=L)
    assert not (tmp_path / "layer.tflite").exists()


# weights


@pytest.mark.parametrize("batched", [False, True])
def test_averaged_weights(batched):
    made, x = layer(), numbers(B, L, 12)
    x = x if batched else x[0]
    result, weights = made(x, need_weights=True)
    same, average = made(x, need_weights=True, average_attn_weights=True)
    np.testing.assert_array_equal(same, result)
    np.testing.assert_allclose(average, weights.mean(axis=-3))
    assert average.shape == (B, L, L)[not batched:]
    with pytest.raises(TypeError, match="average_attn_weights must be True or False, got None"):
        made(x, average_attn_weights=None)


# torch's masks

BLOCKED = np.random.default_rng(5).random((L, S)) < 0.4
BLOCKED[:, 0] = False
PADDED = np.array([[False] * 9, [False] * 6 + [True] * 3])


@pytest.mark.parametrize("mask", ["none", "two", "three", "float"])
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("batched", [False, True])
def test_torch_masks_mean_blocked(mask, padding, batched):
    made, x, y = layer(), numbers(B, L, 12), numbers(B, S, 12, seed=1)
    three = np.random.default_rng(6).random((B * H, L, S)) < 0.4
    three[..., 0] = False
    blocked = {"none": np.zeros((L, S), bool), "two": BLOCKED, "three": three.reshape(B, H, L, S), "float": BLOCKED}[mask]
    ignored = np.zeros((B, S), bool) if padding == "none" else PADDED
    keep = ~(blocked | ignored[:, None, None])
    given = {"none": None, "two": BLOCKED, "three": three, "float": np.where(BLOCKED, -np.inf, 0)}[mask]
    padded = {"none": None, "bool": PADDED, "float": np.where(PADDED, -np.inf, 0)}[padding]
    if not batched:
        x, y, keep = x[1], y[1], keep[1]
        given = given[H:] if mask == "three" else given
        padded = None if padded is None else padded[1]
    expected, weights = made(x, y, attn_mask=keep, need_weights=True)
    result, average = made.call_with_torch_masks(x, y, attn_mask=given, key_padding_mask=padded, need_weights=True)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    np.testing.assert_allclose(average, weights.mean(-3), atol=1e-6)
    assert (weights[~keep if keep.shape == weights.shape else np.broadcast_to(~keep, weights.shape)] == 0).all()


def test_torch_calls_are_causal_from_the_first_key():
    made, x, y = layer(), numbers(B, L, 12), numbers(B, S, 12, seed=1)
    np.testing.assert_array_equal(
        made.call_with_torch_masks(x, y, is_causal=True), made(x, y, is_causal=True, causal_alignment="upper_left"))
    one = SelfAttention(numbers(4, 12), numbers(4, 12), numbers(4, 12))
    np.testing.assert_array_equal(one.call_with_torch_masks(x, is_causal=True), one(x, is_causal=True))


@pytest.mark.parametrize(("masks", "error", "message"), [
    (dict(attn_mask=np.ones((L, S), int)), TypeError, r"attn_mask must be a bool array \(True = do not attend\) or a float"),
    (dict(attn_mask=np.ones((S, L), bool)), ValueError, r"attn_mask must have torch's shape \(L, S\) = \(5, 9\) or \(B \* H, L, S\) = \(8, 5, 9\), got \(9, 5\)"),
    (dict(key_padding_mask=np.ones((B, S), np.uint8)), TypeError, r"key_padding_mask must be a bool array \(True = padding\)"),
    (dict(key_padding_mask=np.ones(S, bool)), ValueError, r"key_padding_mask must have shape \(2, 9\), got \(9,\)"),
])
def test_bad_torch_masks_are_refused(masks, error, message):
    with pytest.raises(error, match=message):
        layer().call_with_torch_masks(numbers(B, L, 12), numbers(B, S, 12), **masks)


def test_torch_masks_do_not_change_what_they_are_given():
    mask, padding = BLOCKED.copy(), PADDED.copy()
    torch_masks((B, H, L, S), mask, padding)
    np.testing.assert_array_equal(mask, BLOCKED)
    np.testing.assert_array_equal(padding, PADDED)
