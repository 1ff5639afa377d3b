"""What holds for attention whatever the shapes, masks and numbers: hypothesis looks for a case where it does not."""

import numpy as np
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import quant
from edgeattn import KVCache, MultiHeadAttention, sliding_window
from edgeattn import scaled_dot_product_attention as attend

# The same examples in every run; compiling a kernel takes longer than any deadline.
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)

# Beside the widths of vectors and tiles, sizes around them.
LENGTHS = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 130, 257]))
SIZES = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 32, 64]))
UNIT = 2.0**-24  # half a unit in the last place of float32


def bound(q, k, v, *, attn_mask=None, alibi_slopes=None, scale=None, **_):
    """How far float32 attention may lie from the exact result, by the usual analysis of rounding errors.

    A score of D products is off by at most (D + 8) units of sum |q||k|, a sum with the mask by units of itself; a
    change of all scores by d changes the result by at most 2 d max|v|; S weighted values add S units.
    """
    D, S = q.shape[3], k.shape[2]
    scale = 1 / np.sqrt(D) if scale is None else abs(scale)
    products = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() * scale
    added = 0.0
    if attn_mask is not None and attn_mask.dtype != bool:
        added = np.abs(attn_mask[np.isfinite(attn_mask)]).max(initial=0)
    if alibi_slopes is not None:
        added += alibi_slopes.max() * (q.shape[2] + S)
    scores = UNIT * ((D + 8) * products + 4 * (products + added) + 8)
    return np.abs(v).max() * (2 * scores + UNIT * (S + 16))


def assert_close(ours, theirs, problem):
    """Both within the bound of the exact result of (random, q, k, v, arguments)."""
    _, q, k, v, arguments = problem
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2 * bound(q, k, v, **arguments))


@st.composite
def problems(draw, square=False):
    """(random, q, k, v, arguments): a call of `attend` without masks."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    B, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    L, D, Dv = draw(LENGTHS), draw(SIZES), draw(SIZES)
    S = L if square else draw(LENGTHS)
    spread = draw(st.sampled_from([0.1, 1.0, 3.0]))
    q, k, v = (
        (random.standard_normal(shape) * spread).astype(np.float32)
        for shape in ((B, kv_heads * group, L, D), (B, kv_heads, S, D), (B, kv_heads, S, Dv)))
    arguments = dict(enable_gqa=True, softcap=draw(st.sampled_from([0.0, 0.0, 1.5, 30.0])))
    if draw(st.booleans()):
        arguments["scale"] = draw(st.sampled_from([0.0, 0.3, -0.2, 1.0]))
    return random, q, k, v, arguments


@st.composite
def masked_problems(draw, square=False):
    """The same with every way of masking at will."""
    random, q, k, v, arguments = draw(problems(square))
    (B, H, L, _), S = q.shape, k.shape[2]
    kind = draw(st.sampled_from(["none", "bool", "float", "both infinite and finite"]))
    shape = tuple(n if draw(st.booleans()) else 1 for n in (B, H, L)) + (S,)
    if kind == "bool":
        arguments["attn_mask"] = random.random(shape) < draw(st.sampled_from([0.1, 0.6, 0.95]))
    elif kind != "none":
        bias = random.standard_normal(shape).astype(np.float32)
        if kind != "float":
            bias[random.random(shape) < 0.4] = -np.inf
        arguments["attn_mask"] = bias
    arguments["is_causal"] = draw(st.booleans())
    arguments["window_size"] = draw(st.tuples(st.integers(-1, 9), st.integers(-1, 9)))
    arguments["causal_alignment"] = draw(st.sampled_from(["upper_left", "lower_right"]))
    if draw(st.booleans()):
        arguments["kv_lengths"] = random.integers(0, S + 1, B)
    if draw(st.booleans()):
        arguments["alibi_slopes"] = random.random(H).astype(np.float32)
    return random, q, k, v, arguments


def permitted(q, k, attn_mask=None, is_causal=False, window_size=(-1, -1), causal_alignment="upper_left",
              kv_lengths=None, alibi_slopes=None, **others):
    """(B, H, L, S) bool by the oracle's rules, and the float part of the mask."""
    (B, H, L, _), S = q.shape, k.shape[2]
    keep = bias = None
    if attn_mask is not None:
        keep, bias = (attn_mask, None) if attn_mask.dtype == bool else (attn_mask != -np.inf, attn_mask)
    if alibi_slopes is not None:
        lengths = np.full(B, S) if kv_lengths is None else kv_lengths
        offset = lengths - L if causal_alignment == "lower_right" else np.zeros(B, int)
        position = offset[:, None, None, None] + np.arange(L)[:, None]
        alibi = -alibi_slopes[:, None, None] * np.abs(position - np.arange(S))
        bias = alibi if bias is None else bias + alibi
    visible = reference.visible(
        B, H, L, S, keep=keep, causal=is_causal, alignment=causal_alignment, window=window_size, lengths=kv_lengths)
    return visible, bias


@EXAMPLES
@given(masked_problems())
def test_every_way_of_masking_is_within_the_bound_of_the_exact_result(problem):
    _, q, k, v, arguments = problem
    visible, bias = permitted(q, k, **arguments)
    options = {name: arguments[name] for name in ("scale", "softcap") if name in arguments}
    exact, exact_weights = reference.attention(q, k, v, visible, bias, **options)
    result, weights = attend(q, k, v, **arguments, return_weights=True)
    for ours in (result, attend(q, k, v, **arguments)):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=bound(q, k, v, **arguments))
    np.testing.assert_allclose(weights, exact_weights, rtol=0, atol=bound(q, k, np.ones_like(v), **arguments))
    assert (weights[~visible] == 0).all()


@EXAMPLES
@given(masked_problems())
def test_inputs_never_change(problem):
    _, q, k, v, arguments = problem
    arrays = [q, k, v, *(value for value in arguments.values() if isinstance(value, np.ndarray))]
    copies = [array.copy() for array in arrays]
    attend(q, k, v, **arguments)
    attend(q, k, v, **arguments, return_weights=True, return_lse=True)
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@EXAMPLES
@given(masked_problems(), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_nothing_leaks_from_behind_a_mask(problem, bad):
    _, q, k, v, arguments = problem
    visible, _ = permitted(q, k, **arguments)
    group = q.shape[1] // k.shape[1]
    seen = visible.reshape(q.shape[0], k.shape[1], group, *visible.shape[2:]).any(axis=(2, 3))
    clean = attend(q, k, v, **arguments)
    k, v = (np.where(seen[..., None], array, np.float32(bad)) for array in (k, v))
    assert_close(attend(q, k, v, **arguments), clean, problem)
    for result in attend(q, k, v, **arguments, return_weights=True, return_lse=True)[:2]:
        assert np.isfinite(result).all()


@EXAMPLES
@given(masked_problems(), st.integers(0, 2**31))
def test_a_row_with_bad_keys_leaves_other_rows_alone(problem, seed):
    """NaN in one key reaches exactly the queries that may see it."""
    _, q, k, v, arguments = problem
    if arguments.get("scale") == 0.0:
        arguments["scale"] = 0.5
    visible, _ = permitted(q, k, **arguments)
    clean = attend(q, k, v, **arguments)
    at = seed % k.shape[2]
    other_k, other_v = k.copy(), v.copy()
    other_k[:, :, at], other_v[:, :, at] = np.nan, np.nan
    result, touched = attend(q, other_k, other_v, **arguments), visible[..., at]
    assert np.isnan(result[touched]).all()
    assert_close(result[~touched], clean[~touched], problem)


@EXAMPLES
@given(problems(), st.randoms(use_true_random=False))
def test_permuting_keys_changes_nothing(problem, shuffler):
    _, q, k, v, arguments = problem
    order = list(range(k.shape[2]))
    shuffler.shuffle(order)
    assert_close(attend(q, k[:, :, order], v[:, :, order], **arguments), attend(q, k, v, **arguments), problem)


@EXAMPLES
@given(masked_problems())
def test_heads_and_batch_entries_do_not_see_each_other(problem):
    _, q, k, v, arguments = problem
    arguments = dict(arguments)
    whole, group = attend(q, k, v, **arguments), q.shape[1] // k.shape[1]
    mask = arguments.pop("attn_mask", None)
    lengths, slopes = arguments.pop("kv_lengths", None), arguments.pop("alibi_slopes", None)
    full = None if mask is None else np.broadcast_to(mask, (*q.shape[:3], k.shape[2]))
    for b, h in np.ndindex(q.shape[:2]):
        alone = attend(
            q[b : b + 1, h : h + 1], k[b : b + 1, h // group, None], v[b : b + 1, h // group, None],
            None if full is None else full[b : b + 1, h : h + 1], **arguments,
            kv_lengths=None if lengths is None else lengths[b : b + 1],
            alibi_slopes=None if slopes is None else slopes[h : h + 1])
        assert_close(alone[0, 0], whole[b, h], problem)


@EXAMPLES
@given(problems())
def test_grouped_heads_are_repeated_heads(problem):
    _, q, k, v, arguments = problem
    group = q.shape[1] // k.shape[1]
    repeated = attend(q, np.repeat(k, group, axis=1), np.repeat(v, group, axis=1), **arguments)
    assert_close(repeated, attend(q, k, v, **arguments), problem)


@EXAMPLES
@given(problems(), st.data())
def test_a_mask_is_a_slice(problem, data):
    random, q, k, v, arguments = problem
    keep = random.random(k.shape[2]) < data.draw(st.sampled_from([0.2, 0.5, 0.9]))
    expected = attend(q, k[:, :, keep], v[:, :, keep], **arguments)
    assert_close(attend(q, k, v, keep, **arguments), expected, problem)
    assert_close(attend(q, k, v, np.where(keep, 0, -np.inf), **arguments), expected, problem)
    n = int(keep.sum())
    assert_close(
        attend(q, k, v, kv_lengths=np.full(len(q), n), **arguments),
        attend(q, k[:, :, :n], v[:, :, :n], **arguments), problem)


@EXAMPLES
@given(problems(), st.sampled_from(["upper_left", "lower_right"]), st.integers(-1, 40), st.integers(-1, 40))
def test_causal_and_windows_are_explicit_masks(problem, alignment, left, right):
    _, q, k, v, arguments = problem
    L, S = q.shape[2], k.shape[2]
    position = np.arange(L)[:, None] + (S - L if alignment == "lower_right" else 0)
    for causal in (False, True):
        keep = np.ones((L, S), bool)
        if causal:
            keep &= np.arange(S) <= position
        if left >= 0:
            keep &= np.arange(S) >= position - left
        if right >= 0:
            keep &= np.arange(S) <= position + right
        assert_close(
            attend(q, k, v, is_causal=causal, window_size=(left, right), causal_alignment=alignment, **arguments),
            attend(q, k, v, keep, **arguments), problem)


@EXAMPLES
@given(problems(), st.floats(0.25, 4), st.floats(-50, 50))
def test_scale_and_shift_identities(problem, factor, shift):
    _, q, k, v, arguments = problem
    arguments.pop("scale", None)
    expected = attend(q, k, v, **arguments)
    moved = attend(q * np.float32(factor), k, v, scale=1 / np.sqrt(q.shape[3]) / float(np.float32(factor)), **arguments)
    assert_close(moved, expected, problem)  # a factor moves from the scale into the queries
    lift = np.full((1, 1), shift, np.float32)
    assert_close(  # softmax does not see what all scores share
        attend(q, k, v, lift, **arguments), expected, (None, q, k, v, {**arguments, "attn_mask": lift}))
    mean = np.repeat(v, q.shape[1] // v.shape[1], 1).mean(2, keepdims=True, dtype=np.float64)
    assert_close(  # with equal scores the result is the mean of the values
        attend(q, k, v, **{**arguments, "scale": 0.0}), np.broadcast_to(mean, expected.shape), problem)
    larger = v * np.float32(factor)
    assert_close(  # results are linear in the values
        attend(q, k, larger, **arguments) / np.float32(factor), expected, problem)


@EXAMPLES
@given(problems())
def test_softcap_identities(problem):
    _, q, k, v, arguments = problem
    arguments.pop("softcap")
    np.testing.assert_allclose(  # a cap far above all scores is none
        attend(q, k, v, **arguments, softcap=1e6), attend(q, k, v, **arguments), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(  # a cap near 0 makes all scores equal
        attend(q, k, v, **arguments, softcap=1e-6), attend(q, k, v, scale=0.0, enable_gqa=True), rtol=1e-3, atol=1e-3)


@EXAMPLES
@given(masked_problems(), st.data())
def test_parts_of_the_keys_join_by_their_log_sums(problem, data):
    _, q, k, v, arguments = problem
    visible, bias = permitted(q, k, **arguments)
    options = {name: arguments[name] for name in ("scale", "softcap", "enable_gqa") if name in arguments}
    mask = visible if bias is None else np.where(visible, bias, -np.inf)
    cut = data.draw(st.integers(0, k.shape[2]))
    (a, a_lse), (b, b_lse) = (
        attend(q, k[:, :, part], v[:, :, part], mask[..., part], **options, return_lse=True)
        for part in (slice(0, cut), slice(cut, None)))
    lse = np.logaddexp(a_lse, b_lse)
    base = np.where(np.isfinite(lse), lse, 0)
    joined = a * np.exp(a_lse - base)[..., None] + b * np.exp(b_lse - base)[..., None]
    # the log-sums carry the scores' errors, and round to units of their own size, as the scores do
    np.testing.assert_allclose(joined, attend(q, k, v, **arguments), rtol=0, atol=4 * bound(q, k, v, **arguments))


@st.composite
def streams(draw):
    """(q, k, v, chunks, window, capacity, softcap)"""
    _, q, k, v, arguments = draw(problems(square=True))
    chunks, left = [], q.shape[2]
    while left:
        chunks.append(draw(st.integers(1, left)))
        left -= chunks[-1]
    window = draw(st.one_of(st.none(), st.integers(1, 20)))
    needed = q.shape[2] if window is None else window - 1 + max(chunks)
    return q, k, v, chunks, window, needed + draw(st.integers(0, 10)), arguments["softcap"]


def streamed(dtype, q, k, v, chunks, window, capacity, softcap):
    cache = KVCache(len(k), k.shape[1], capacity, k.shape[3], value_dim=v.shape[3], dtype=dtype, window=window)
    results, at = [], 0
    for n in chunks:
        cache.append(k[:, :, at : at + n], v[:, :, at : at + n])
        at += n
        results.append(cache.attend(q[:, :, at - n : at], is_causal=True, softcap=softcap))
    return np.concatenate(results, axis=2)


@EXAMPLES
@given(streams())
def test_float_chunks_are_within_the_bound_of_the_exact_result(stream):
    q, k, v, _, window, _, softcap = stream
    (B, H, L, _) = q.shape
    visible = reference.visible(B, H, L, L, causal=True, window=(-1 if window is None else window - 1, 0))
    exact = reference.attention(q, k, v, visible, softcap=softcap)[0]
    np.testing.assert_allclose(streamed("float32", *stream), exact, rtol=0, atol=bound(q, k, v))


@EXAMPLES
@given(streams())
def test_int8_chunks_are_the_whole_bit_for_bit(stream):
    q, k, v, chunks, window, capacity, softcap = stream
    length = q.shape[2]
    whole = streamed("int8", q, k, v, [length], window, length + (window or 0), softcap)
    np.testing.assert_array_equal(streamed("int8", *stream), whole)


@EXAMPLES
@given(streams(), st.sampled_from([1, 12, 40]))
def test_layers_stream_what_they_compute_at_once(stream, width):
    q, k, v, chunks, window, _, softcap = stream
    (B, H, L, D), kv_heads, Dv = q.shape, k.shape[1], v.shape[3]
    random = np.random.default_rng(L)
    shapes = ((H * D, width), (kv_heads * D, width), (kv_heads * Dv, width), (width, H * Dv))
    layer = MultiHeadAttention(
        H, *(random.standard_normal(s) / np.sqrt(s[1]) for s in shapes), num_kv_heads=kv_heads)
    x = random.standard_normal((B, L, width)).astype(np.float32)
    whole = layer(x, is_causal=True, softcap=softcap, window_size=(-1, -1) if window is None else sliding_window(window))
    int8 = None
    for cut in (chunks, [L]):
        for dtype in ("float32", "int8"):
            cache = KVCache(B, kv_heads, window or L, D, value_dim=Dv, dtype=dtype, window=window)
            parts = [layer(part, is_causal=True, softcap=softcap, kv_cache=cache)
                     for part in np.split(x, np.cumsum(cut)[:-1], axis=1)]
            result = np.concatenate(parts, axis=1)
            if dtype == "float32":
                np.testing.assert_allclose(result, whole, rtol=1e-3, atol=1e-4)
            elif int8 is None:
                int8 = result
            else:
                np.testing.assert_array_equal(result, int8)


@st.composite
def quantized_layers(draw):
    """(random, float layer, dynamic, static): self-attention with grouped heads."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kv_heads, group, width = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 40))
    D, Dv = draw(st.integers(1, 17)), draw(st.integers(1, 17))
    shapes = ((kv_heads * group * D, width), (kv_heads * D, width), (kv_heads * Dv, width),
              (draw(st.integers(1, 40)), kv_heads * group * Dv))
    layer = MultiHeadAttention(
        kv_heads * group, *(random.standard_normal(s) / np.sqrt(s[1]) for s in shapes), num_kv_heads=kv_heads)
    samples = random.standard_normal((4, 9, width)).astype(np.float32)
    calibration = quant.calibrate(layer, [{"query": samples, "is_causal": True}])
    arithmetic = draw(st.sampled_from(["litert", "litert-arm", "litert-builtin", "tflm"]))
    return random, layer, quant.quantize(layer, scheme="dynamic"), quant.quantize(
        layer, calibration, arithmetic=arithmetic)


@EXAMPLES
@given(quantized_layers(), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.one_of(st.none(), st.integers(1, 9)))
def test_int8_layers_stream_the_whole_bit_for_bit(layers, chunks, window):
    random, layer, dynamic, static = layers
    x = random.standard_normal((2, sum(chunks), layer.embed_dim)).astype(np.float32)
    for int8, options in ((dynamic, {"dtype": "int8"}), (static, {})):
        results = []
        for cut in (chunks, [len(x[0])]):
            cache = KVCache.for_layer(int8, 2, 10 + x.shape[1], window=window, **options)
            parts = [int8(part, kv_cache=cache, is_causal=True) for part in np.split(x, np.cumsum(cut)[:-1], axis=1)]
            results.append(np.concatenate(parts, axis=1))
        np.testing.assert_array_equal(*results)
        if int8 is static:
            bounds = (-1, -1) if window is None else sliding_window(window)
            np.testing.assert_array_equal(results[0], static(x, is_causal=True, window_size=bounds))


@EXAMPLES
@given(quantized_layers(), st.integers(1, 40), st.integers(1, 40))
def test_a_mask_is_a_slice_for_int8_layers_and_nothing_leaks(layers, length, keys):
    random, layer, dynamic, static = layers
    keys = min(keys, length)
    x = random.standard_normal((1, length, layer.embed_dim)).astype(np.float32)
    keep = np.arange(length) < keys
    spoiled = x.copy()
    spoiled[:, keys:] = np.nan
    for int8 in (dynamic, static):
        alone = int8(x[:, :keys])
        np.testing.assert_allclose(int8(x, attn_mask=keep)[:, :keys], alone, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(int8(spoiled, attn_mask=keep)[:, :keys], alone, rtol=1e-5, atol=1e-5)
        assert np.isnan(int8(spoiled, attn_mask=keep)[:, keys:]).all()
        result, weights = int8(x, attn_mask=keep, need_weights=True)
        assert (weights[..., keys:] == 0).all() and np.isfinite(result).all()
