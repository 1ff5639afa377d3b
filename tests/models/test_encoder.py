"""TransformerEncoder against its formula, alone, in ragged batches and through caches."""

import copy
import gc
import json
import pickle
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import reference_encoder as oracle
from safetensors.numpy import save_file

import edgeattn
import quant
from edgeattn import TransformerEncoder, TransformerEncoderLayer
from edgeattn.cache_slots import CacheSlots
from edgeattn.executors import chain
from edgeattn.executors.chain import Chain
from edgeattn.executors.fused import go_together
from edgeattn.executors.numpy import NumpyOps
from edgeattn.kernels.cpu import encoder_float32

E, F, H, LAYERS = 24, 40, 3, 2
CLOSE = dict(rtol=0, atol=1e-5)


def random():
    return np.random.default_rng(3)


def weights(bias=True):
    made = random()
    return [oracle.random_layer(made, E, F, bias=bias) for _ in range(LAYERS)]


NORM = (np.linspace(0.5, 1.5, E, dtype=np.float32), np.linspace(-1, 1, E, dtype=np.float32))


def encoder(norm_first=False, activation="gelu", norm=NORM, **options):
    return TransformerEncoder.from_torch(oracle.torch_state_dict(weights(**options), norm), H, activation=activation,
                                         norm_first=norm_first)


def expected(x, norm_first=False, kind="gelu", norm=NORM, bias=True, **attending):
    for w in weights(bias):
        x = oracle.encoder_layer(x, w, H, kind=kind, norm_first=norm_first, **attending)
    return x if norm is None else oracle.layer_norm(x, *norm)


def chains(encoder):
    return [seen.chain for seen in encoder._seen.values() if seen.chain is not None]


def tokens(*shape):
    return random().normal(size=(*shape, E)).astype(np.float32)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_it_is_its_formula(norm_first, activation):
    x = tokens(2, 7)
    result = encoder(norm_first, activation)(x)
    np.testing.assert_allclose(result, expected(x, norm_first, activation), **CLOSE)


def test_layers_without_biases_and_without_a_last_norm():
    x = tokens(2, 5)
    made = encoder(bias=False, norm=None)
    assert made.norm is None and made.layers[0].attention.q_bias is None
    np.testing.assert_allclose(made(x), expected(x, bias=False, norm=None), **CLOSE)


def test_a_single_layers_state_dict():
    state = {name.removeprefix("layers.0."): value
             for name, value in oracle.torch_state_dict(weights()[:1]).items()}
    x = tokens(1, 6)
    made = TransformerEncoder.from_torch({f"a.{name}": value for name, value in state.items()}, H, activation="relu",
                                         norm_first=True, prefix="a.", layer_norm_eps=1e-3)
    np.testing.assert_allclose(made(x), oracle.encoder_layer(x, weights()[0], H, kind="relu", norm_first=True, eps=1e-3),
                               **CLOSE)


@pytest.mark.parametrize("masks, permitted", [
    ({"is_causal": True}, {"causal": True}),
    ({"window_size": (2, 1)}, {"window": (2, 1)}),
    ({"is_causal": True, "window_size": (3, -1)}, {"causal": True, "window": (3, -1)}),
    ({"key_padding_mask": np.arange(7) < np.array([[7], [4]])}, {"padding": np.arange(7) < np.array([[7], [4]])}),
    ({"attn_mask": np.tri(7, dtype=bool)}, {"keep": np.tri(7, dtype=bool)}),
])
def test_masks(masks, permitted):
    x = tokens(2, 7)
    np.testing.assert_allclose(encoder()(x, **masks), expected(x, permitted=reference.visible(2, H, 7, 7, **permitted)),
                               **CLOSE)


def test_torch_masks_are_the_inverse():
    x, blocked = tokens(2, 7), ~np.tri(7, dtype=bool)
    padding = np.arange(7) >= np.array([[7], [4]])
    made = encoder()
    np.testing.assert_array_equal(made.call_with_torch_masks(x, attn_mask=blocked, key_padding_mask=padding),
                                  made(x, attn_mask=~blocked, key_padding_mask=~padding))
    # as torch.nn.TransformerEncoder calls them
    np.testing.assert_array_equal(made.call_with_torch_masks(x, mask=blocked, src_key_padding_mask=padding),
                                  made(x, attn_mask=~blocked, key_padding_mask=~padding))
    with pytest.raises(ValueError, match="^mask must be left out with attn_mask, which is the same; got both"):
        made.call_with_torch_masks(x, attn_mask=blocked, mask=blocked)
    with pytest.raises(ValueError, match="^src_key_padding_mask must be left out with key_padding_mask"):
        made.call_with_torch_masks(x, key_padding_mask=padding, src_key_padding_mask=padding)


def test_a_layer_that_was_called_leaves_memory_with_its_last_name():
    layer = encoder().layers[0]
    layer(tokens(2, 7))
    left = weakref.ref(layer)
    gc.collect()
    gc.disable()
    try:
        del layer
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("width, heads", [(E, H), (384, 12)])
def test_a_sequence_gives_the_same_bits_alone_and_in_every_batch(width, heads):
    made = random()
    state = oracle.torch_state_dict([oracle.random_layer(made, width, 2 * width)])
    encode = TransformerEncoder.from_torch(state, heads, activation="gelu", norm_first=False)
    lengths = [5, 1, 33, 33, 0, 17, 8, 33, 64]
    x = made.normal(size=(len(lengths), 64, width)).astype(np.float32)
    whole = encode(x, lengths=lengths)
    listed = encode([row[:length] for row, length in zip(x, lengths, strict=True)])
    for row, result, alone, length in zip(x, whole, listed, lengths, strict=True):
        np.testing.assert_array_equal(result[:length], encode(row[None, :length])[0])
        np.testing.assert_array_equal(result[:length], alone)
        assert not result[length:].any()
    dense = encode(np.repeat(x[2:4, :33], 3, axis=0))
    np.testing.assert_array_equal(dense[::3], whole[2:4, :33])


@pytest.mark.parametrize("masks", [
    {"is_causal": True}, {"window_size": (2, 0)}, {"attn_mask": np.tri(9, dtype=bool)},
    {"attn_mask": np.random.default_rng(1).normal(size=(3, H, 9, 9)).astype(np.float32)}])
def test_ragged_batches_have_masks_too(masks):
    x, lengths, made = tokens(3, 9), [4, 9, 6], encoder()
    result = made(x, lengths=lengths, **masks)
    for i, length in enumerate(lengths):
        mask = masks.get("attn_mask")
        cut = {**masks} if mask is None else {"attn_mask": mask[..., :length, :length][
            i : i + 1 if mask.ndim == 4 else None] if mask.ndim == 4 else mask[:length, :length]}
        np.testing.assert_allclose(result[i, :length], made(x[i : i + 1, :length], **cut)[0], **CLOSE)


def test_padding_is_never_touched():
    x, lengths = tokens(2, 6), np.array([6, 3])
    clean = encoder()(x, lengths=lengths)
    x[1, 3:] = np.nan
    np.testing.assert_array_equal(encoder()(x, lengths=lengths), clean)


@pytest.mark.parametrize("scheme", ["float32", "dynamic", "static"])
@pytest.mark.parametrize("norm_first, norm", [(False, None), (True, NORM)])
def test_a_call_that_comes_again_gives_the_same(scheme, norm_first, norm, many_threads):
    uncalled = encoder(norm_first, norm=norm)
    if scheme == "dynamic":
        uncalled = quant.quantize(uncalled, scheme="dynamic")
    elif scheme == "static":
        uncalled = quant.quantize(uncalled, quant.calibrate(uncalled, [tokens(2, 7)]), room_for_masks=True)

    def fresh():
        return copy.deepcopy(uncalled)

    made, x, keep = fresh(), tokens(2, 7), random().random((2, 7)) > 0.3
    keep[:, 0] = True
    first = [fresh()(x), fresh()(x, key_padding_mask=keep), fresh()(x, is_causal=True), fresh()(-x)]
    for count in (1, 2, 1, 2, 1):
        many_threads(count)
        results = [made(x), made(x, key_padding_mask=keep), made(x, is_causal=True), made(-x)]
        for found, right in zip(results, first, strict=True):
            np.testing.assert_array_equal(found, right)
    assert len(chains(made)) == 3 and all(type(each) is Chain for each in chains(made))
    before, out = x.copy(), np.empty_like(x)
    made(x)[:] = 7  # neither the caller's input nor what it was given is the encoder's
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(made(x), first[0])
    assert made(x, out=out) is out and np.array_equal(out, first[0])
    keep[:, -1] ^= True
    np.testing.assert_array_equal(made(x, key_padding_mask=keep), fresh()(x, key_padding_mask=keep))
    np.testing.assert_array_equal(made(x[:, :5]), fresh()(x[:, :5]))


@pytest.mark.parametrize("lengths", [[7, 7, 7], [4, 4, 4], [5, 0, 0], [0, 3, 3], [7, 2, 2], [0, 0, 0]])
@pytest.mark.parametrize("scheme", ["float32", "dynamic", "static"])
def test_lengths_that_come_again_give_the_same(lengths, scheme):
    x = tokens(3, 7)
    made, uncalled = by_scheme(scheme, x), by_scheme(scheme, x)
    wanted = np.zeros_like(x)
    for row, given, length in zip(wanted, x, lengths, strict=True):
        if length:
            row[:length] = uncalled(given[None, :length])[0]
    single = len({length for length in lengths if length}) == 1
    for given in (lengths, np.array(lengths), np.array(lengths, np.int32)):
        for _ in range(4):
            for row, length in zip(x, lengths, strict=True):
                row[length:] = np.nan  # no padding is read
            np.testing.assert_array_equal(made(x, lengths=given), wanted)
            out = np.full_like(x, 3)
            assert made(x, lengths=given, out=out) is out
            np.testing.assert_array_equal(out, wanted)
    assert len(chains(made)) == 3 * single
    for _ in range(4):
        listed = made([row[:length] for row, length in zip(x, lengths, strict=True)])
        for found, row, length in zip(listed, wanted, lengths, strict=True):
            np.testing.assert_array_equal(found, row[:length])
    for wrong in ([7.0] * 3, [True] * 3, [8] * 3, [-1] * 3, [7] * 2):
        with pytest.raises((TypeError, ValueError), match="lengths must"):
            made(x, lengths=wrong)
    for out in (np.empty((3, 6, E), np.float32), np.empty(x.shape)):
        with pytest.raises((TypeError, ValueError), match="out must have"):
            made(x, lengths=lengths, out=out)


def test_what_another_call_has_not_prepared_yet_becomes_a_chain():
    made, x = encoder(), tokens(2, 7)
    with made.prepared(x.shape[:-1]):  # as by a thread that is still at work
        pass
    results = [made(x) for _ in range(3)]
    np.testing.assert_array_equal(results[1:], results[:2])
    assert [type(each) for each in chains(made)] == [Chain]


def test_sequences_of_forty_lengths_have_their_chains():
    made = encoder()
    for _ in range(3):
        for length in range(1, 61):
            made(tokens(1, length))
    assert [type(each) for each in chains(made)] == [Chain] * 40  # and no more: they would fill memory


def test_chains_of_many_layers_are_fewer():
    made = TransformerEncoder(encoder().layers * 15)
    for length in (1, 2, 3, 4, 5) * 3:
        made(tokens(1, length))
    assert len(chains(made)) == 2


def test_what_is_raised_in_a_chain_loses_no_memory():
    made, x = encoder(), tokens(2, 7)
    for _ in range(4):
        expected = made(x)
    frame, = (memory.frames[chains(made)[0]] for memory in chain._free if chains(made)[0] in memory.frames)
    held = [id(memory) for memory in chain._free]

    def interrupted():
        raise TimeoutError

    frame.steps.insert(1, interrupted)
    with pytest.raises(TimeoutError):
        made(x)
    frame.steps.remove(interrupted)
    assert [id(memory) for memory in chain._free] == held
    np.testing.assert_array_equal(made(x), expected)


def test_what_is_raised_while_a_chain_is_bound_loses_no_memory(monkeypatch):
    made, x = encoder(), tokens(2, 7)
    for _ in range(4):
        expected = made(x)
    held = [id(memory) for memory in chain._free]
    for memory in chain._free:
        memory.frames.clear()

    def interrupted(_):
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(chain, "in_turn", interrupted)
        with pytest.raises(TimeoutError):
            made(x)
    assert [id(memory) for memory in chain._free] == held
    np.testing.assert_array_equal(made(x), expected)


def test_chains_keep_memory_for_few_callers_and_none_for_encoders_that_are_gone():
    made, x = encoder(), tokens(2, 7)
    for _ in range(4):
        made(x)
    together = threading.Barrier(2 * chain.KEPT)

    def call(encoder):
        together.wait()
        for _ in range(20):
            encoder(x)

    callers = [threading.Thread(target=call, args=(made,)) for _ in range(together.parties)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert len(chain._free) <= chain.KEPT
    gone = weakref.ref(chains(made)[0])
    del made, callers, each
    gc.collect()
    assert gone() is None


def test_caches_that_were_emptied_while_tokens_moved_stay_empty(monkeypatch):
    """A signal's handler between keys and values, in the second layer: the first is one token longer than it."""
    made, x = encoder(), tokens(1, 14)
    caches = made.make_caches(1, 8, window=6)
    for i in range(8):
        made(x[:, i:i + 1], kv_cache=caches, is_causal=True)
    storage = CacheSlots._storage

    def interrupted(self):
        yield storage(self)[0]
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(CacheSlots, "_storage", interrupted)
        with pytest.raises(TimeoutError):
            made(x[:, 8:9], kv_cache=caches, is_causal=True)
    assert caches[0].length == 0
    for cache in caches:
        cache.reset()
    fresh = made.make_caches(1, 8, window=6)
    for i in range(14):
        np.testing.assert_array_equal(made(x[:, i:i + 1], kv_cache=caches, is_causal=True),
                                      made(x[:, i:i + 1], kv_cache=fresh, is_causal=True))


def test_a_forward_of_another_class_is_called_every_time():
    class Twice(TransformerEncoder):
        def forward(self, *arguments):
            return 2 * super().forward(*arguments)

    made, x = encoder(), tokens(2, 7)
    twice = Twice(made.layers, norm=made.norm)
    np.testing.assert_array_equal([twice(x) for _ in range(3)], [2 * made(x)] * 3)


def test_what_a_signal_raises_is_no_answer_to_whether_weights_go_together():
    class Interrupted:
        def tolist(self):
            raise TimeoutError
        __array__ = tolist

    linear = SimpleNamespace(outputs=1, quantized=SimpleNamespace(residual_outputs=(), outlier_columns=Interrupted()))
    with pytest.raises(TimeoutError):
        go_together(linear, linear, linear)


def test_calls_of_a_text_encoder_that_come_again_are_its_encoders_chains():
    ids, mask = random().integers(0, 20, (2, 7)), random().random((2, 7)) > 0.3
    mask[:, [0, -1]], mask[0, 3] = True, False
    model = edgeattn.TextEncoder(edgeattn.layers.Embedding(random().standard_normal((20, E))), encoder())
    first = [model(ids), model(ids, mask)]
    np.testing.assert_array_equal(first[0], model.encoder(model.embedding.token_weight[ids]))
    for _ in range(3):
        np.testing.assert_array_equal([model(ids), model(ids, mask)], first)
    assert [type(each) for each in chains(model.encoder)] == [Chain] * 2
    assert not first[1][~mask].any() and first[1][mask].all()


@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32, ">i2"])
def test_an_attention_mask_is_known_by_what_stands_in_it(dtype):
    ids, mask = random().integers(0, 20, (2, 7)), np.ones((2, 7), dtype)
    model = edgeattn.TextEncoder(edgeattn.layers.Embedding(random().standard_normal((20, E))), encoder())
    for hidden in ((), (6,), (5, 6), (0,), (1, 3), ()):
        mask[:], mask[0, list(hidden)] = 1, 0
        wanted = model(ids)
        kept = mask[0] == 1
        wanted[0] = 0
        wanted[0, kept] = model.encoder(model.embedding.token_weight[ids[:1]], key_padding_mask=kept[None])[0, kept]
        for given in (mask, mask[:, ::-1].copy()[:, ::-1], np.asfortranarray(mask)):
            np.testing.assert_array_equal(model(ids, given), wanted)
    for wrong in (mask[:, :6], mask[:1], np.full((2, 7), 2), np.full((2, 7), np.nan), mask.astype(object)):
        for _ in range(2):
            with pytest.raises(ValueError, match="attention_mask must"):
                model(ids, wrong)


def test_a_layer_called_by_itself_keeps_what_its_calls_have_in_common():
    layer, x = encoder().layers[0], tokens(2, 7)
    first = layer(x)
    for _ in range(3):
        np.testing.assert_array_equal(layer(x), first)
    assert len(chains(layer._alone)) == 1
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(other(x), first)


def test_wide_rows_are_not_kept_between_stages():
    made = encoder()
    x = tokens(140, 20)  # more bytes than chain.MOST
    assert x.nbytes > chain.MOST
    first = made(x)
    for _ in range(3):
        np.testing.assert_array_equal(made(x), first)
    assert made._seen and not chains(made)


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [3, 1, 1, 4]])
@pytest.mark.parametrize("window", [None, 4])
def test_decoding_through_caches_is_the_whole_sequence(chunks, window):
    x, made = tokens(2, 9), encoder(norm_first=True)
    caches = made.make_caches(2, 12, window=window)
    ends = np.cumsum(chunks)
    parts = [made(x[:, end - n : end], is_causal=True, kv_cache=caches) for n, end in zip(chunks, ends, strict=True)]
    masks = {"window_size": edgeattn.sliding_window(4)} if window else {}
    np.testing.assert_allclose(np.concatenate(parts, axis=1), made(x, is_causal=True, **masks), **CLOSE)
    assert [cache.length for cache in caches] == [9] * LAYERS


def test_an_error_leaves_all_caches_as_they_were(monkeypatch):
    made = encoder()
    caches = made.make_caches(1, 8)
    made(tokens(1, 2), kv_cache=caches)

    def broken(self, x, residual, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(encoder_float32.FeedForward, "__call__", broken)
    with pytest.raises(KeyboardInterrupt):
        made(tokens(1, 2), kv_cache=caches)
    assert [cache.length for cache in caches] == [2] * LAYERS


def by_scheme(scheme, x, **options):
    """An encoder in float32 or int8."""
    made = encoder(**options)
    return made if scheme == "float32" else quant.quantize(
        made, quant.calibrate(made, [x]) if scheme == "static" else None, scheme=scheme)


@pytest.mark.parametrize("scheme, dtype", [("float32", "float32"), ("float32", "int8"), ("dynamic", "float32"),
                                           ("dynamic", "int8"), ("static", None)])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "norm": None}])
@pytest.mark.parametrize("window", [None, 3])
def test_a_step_that_comes_again_gives_what_a_first_one_gives(scheme, dtype, options, window):
    x = tokens(2, 7)
    made = by_scheme(scheme, x, **options)
    known, fresh = (made.make_caches(2, 7, dtype=dtype, window=window) for _ in "ab")
    made(x[:, :1], kv_cache=made.make_caches(2, 1, dtype=dtype))
    for i in range(7):
        step, out = x[:, i:i + 1], np.empty((2, 1, E), np.float32)
        assert len(made._steps) == 1
        assert made(step, kv_cache=known, is_causal=i % 2 == 0, out=out) is out
        made._steps.clear()
        np.testing.assert_array_equal(made(step, kv_cache=fresh, is_causal=True), out)
    for one, other in zip(known, fresh, strict=True):
        assert one.length == other.length == 7
        for held, wanted in zip(one.held(), other.held(), strict=True):
            np.testing.assert_array_equal(held, wanted)


@pytest.mark.parametrize("scheme", ["float32", "dynamic", "static"])
def test_a_step_that_comes_again_is_refused_as_a_first_one_is(scheme, monkeypatch):
    x = tokens(1, 1)
    made = by_scheme(scheme, x)
    caches, step = made.make_caches(1, 3), x.copy()
    made(tokens(1, 2)[:, 1:], kv_cache=caches)
    other = made.make_caches(1, 3)
    made(tokens(1, 2), kv_cache=other)
    for wrong in ([caches[0]] * 2, caches[:1], [caches[0], other[1]], made.make_caches(2, 3), iter(caches)):
        with pytest.raises(ValueError, match="cache"):
            made(step, kv_cache=wrong)
    for options in ({"lengths": [1]}, {"attn_mask": np.ones((1, 5), bool)}, {"out": np.empty((1, 1, E + 1), "f")}):
        with pytest.raises(ValueError):
            made(step, kv_cache=caches, **options)
    for options in ({"is_causal": 1}, {"out": np.empty((1, 1, E))}):
        with pytest.raises(TypeError):
            made(step, kv_cache=caches, **options)
    masked = made(step, kv_cache=caches, key_padding_mask=np.array([[False, True]]))  # no step like the one before
    for cache in caches:
        cache.truncate(1)
    assert (masked != made(step, kv_cache=caches)).any()
    if scheme == "static":
        with pytest.raises(ValueError, match="x must hold no NaN with kv_cache"):
            made(np.full_like(step, np.nan), kv_cache=caches)

    def broken(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(made.layers[-1].stages[-1], "step", broken, raising=False)
        with pytest.raises(KeyboardInterrupt):
            made(step, kv_cache=caches)
    assert [cache.length for cache in caches] == [2] * LAYERS
    made(step, kv_cache=caches)
    with pytest.raises(ValueError, match="the cache is full"):
        made(step, kv_cache=caches)
    assert [cache.length for cache in caches] == [3] * LAYERS


def test_a_window_or_a_bias_of_a_layers_own_holds_for_every_step():
    one, x = encoder(norm=None), tokens(1, 6)
    attention = one.layers[0].attention
    bias = np.random.default_rng(0).standard_normal((H, 6, 6)).astype(np.float32)
    biased = edgeattn.MultiHeadAttention(
        H, *(getattr(attention, f"{name}_weight") for name in ("q", "k", "v", "out")), position_bias=bias)
    for options, of in (({"window_size": (2, 0)}, attention), ({}, biased)):
        made = TransformerEncoder([edgeattn.TransformerEncoderLayer(of, each.feed_forward, each.norm1, each.norm2, **options)
                                   for each in one.layers])
        caches, wanted = made.make_caches(1, 6), made(x, is_causal=True)
        for i in range(6):
            got = made(np.ascontiguousarray(x[:, i:i + 1]), kv_cache=caches, is_causal=True)
            np.testing.assert_allclose(got, wanted[:, i:i + 1], **CLOSE)


def test_a_layers_own_window_narrows_the_calls():
    one = encoder(norm=None)
    narrow = TransformerEncoder([edgeattn.TransformerEncoderLayer(
        layer.attention, layer.feed_forward, layer.norm1, layer.norm2, window_size=window)
        for layer, window in zip(one.layers, [(1, 1), (-1, -1)], strict=True)])
    x, wide = tokens(1, 8), reference.visible(1, H, 8, 8, window=(-1, 2))
    first = oracle.encoder_layer(x, weights()[0], H, permitted=reference.visible(1, H, 8, 8, window=(1, 1)))
    np.testing.assert_allclose(narrow(x, window_size=(-1, 2)),
                               oracle.encoder_layer(first, weights()[1], H, permitted=wide), **CLOSE)


@pytest.mark.parametrize("scheme", ["float32", "dynamic"])
def test_a_layer_is_called_by_itself(scheme):
    made, x, lengths = encoder(norm=None), tokens(2, 7), [7, 3]
    if scheme == "dynamic":
        made = quant.quantize(made, scheme="dynamic")
    first, second = made.layers
    for options in ({}, {"is_causal": True}, {"window_size": (2, 1)}, {"lengths": lengths},
                    {"attn_mask": np.tri(7, dtype=bool)}, {"key_padding_mask": np.arange(7) < np.array([[7], [4]])}):
        np.testing.assert_array_equal(second(first(x, **options), **options), made(x, **options))
    seen = reference.visible(2, H, 7, 7, causal=True)
    close = CLOSE if scheme == "float32" else dict(rtol=0, atol=0.1)
    np.testing.assert_allclose(first(x, is_causal=True), oracle.encoder_layer(x, weights()[0], H, permitted=seen), **close)
    for row, alone, length in zip(x, first(list(x)), lengths, strict=True):
        np.testing.assert_array_equal(alone, first(row))
        np.testing.assert_array_equal(first(x, lengths=lengths)[lengths.index(length), :length], first(row[:length]))
    out = np.empty_like(x)
    assert first(x, out=out) is out and first(x.astype(np.float64)).dtype == np.float64
    cache = edgeattn.KVCache.for_layer(first.attention, 2, 7)
    steps = [first(x[:, i:i + 1], is_causal=True, kv_cache=cache) for i in range(7)]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), first(x, is_causal=True), **close)
    with pytest.raises(ValueError, match=r"x must be \(B, L, E\) or \(L, E\) with E = 24, got shape"):
        first(x[..., 1:])
    with pytest.raises(TypeError, match="kv_cache must be an edgeattn.KVCache, got list"):
        first(x, kv_cache=[cache])


def test_shapes_dtypes_and_out():
    made, x = encoder(), tokens(2, 4)
    whole = made(x)
    np.testing.assert_array_equal(made(x[0]), whole[0])
    assert made(x.astype(np.float16)).dtype == np.float16 and made(x.astype(np.float64)).dtype == np.float64
    out = np.empty_like(x)
    assert made(x, out=out) is out
    np.testing.assert_array_equal(out, whole)
    assert made(x, out=x) is x
    np.testing.assert_array_equal(x, whole)
    for shape in ((0, 4, E), (2, 0, E), (0, E)):
        assert made(np.zeros(shape, np.float32)).shape == shape
    assert made(x, lengths=[0, 0]).shape == x.shape


def test_every_executor_gives_the_same():
    x, made, record = tokens(2, 5), encoder(), {}
    with made.prepared((2, 5)) as sequences:
        result = made.forward(NumpyOps(record), x.reshape(10, E), sequences)
    np.testing.assert_allclose(result.reshape(x.shape), made(x), **CLOSE)
    np.testing.assert_array_equal(record["norm"], result)
    assert record["layers.1.attention.probabilities"].shape == (2, H, 5, 5)
    for name in ("layers.0.attention.output", "layers.0.sum1", "layers.0.norm1", "layers.1.feed_forward.linear1",
                 "layers.1.feed_forward.activation", "layers.1.norm2"):
        assert record[name].shape[0] == 10, name


class _PooledLayer(TransformerEncoderLayer):
    """With an operation that stages do not have: each token is the first, and only one, of its sequence."""

    def forward(self, ops, x, sequences, name=""):
        return ops.pool(super().forward(ops, x, sequences, name), [1] * 14, "cls", name + "pooled")


def test_a_layer_with_another_operation_is_computed_operation_by_operation():
    made, x = encoder(), tokens(2, 7)
    layers = [_PooledLayer(layer.attention, layer.feed_forward, layer.norm1, layer.norm2) for layer in made.layers]
    assert layers[0].stages is None and made.layers[0].stages is not None
    np.testing.assert_allclose(TransformerEncoder(layers, norm=made.norm)(x), expected(x), **CLOSE)


def test_copies_files_and_pickles_are_equal(tmp_path):
    made, x = encoder(norm_first=True), tokens(1, 5)
    edgeattn.save(made, tmp_path / "encoder.safetensors")
    for copied in (edgeattn.load(tmp_path / "encoder.safetensors"), pickle.loads(pickle.dumps(made)),
                   copy.deepcopy(made)):
        assert repr(copied) == repr(made)
        np.testing.assert_array_equal(copied(x), made(x))


def test_shared_layers_are_stored_once(tmp_path):
    layer = encoder().layers[0]
    made = TransformerEncoder([layer] * 5)
    edgeattn.save(made, tmp_path / "encoder.safetensors")
    loaded = edgeattn.load(tmp_path / "encoder.safetensors")
    assert len({id(each) for each in loaded.layers}) == 1 and len(loaded.layers) == 5
    np.testing.assert_array_equal(loaded(tokens(1, 4)), made(tokens(1, 4)))


@pytest.mark.parametrize("call, error, message", [
    (lambda e: e(tokens(2, 4)[..., :-1]), ValueError, r"x must be \(B, L, E\) or \(L, E\) with E = 24, got shape"),
    (lambda e: e(tokens(2, 4), lengths=[4]), ValueError, r"lengths must have shape \(2,\), one per sequence"),
    (lambda e: e(tokens(2, 4), lengths=[4, 5]), ValueError, r"lengths must lie between 0 and L = 4, got \[4, 5\]"),
    (lambda e: e(tokens(2, 4), lengths=[4.0, 2.0]), TypeError, "lengths must be an integer array, got dtype float64"),
    (lambda e: e(tokens(2, 4), lengths=[4, 2], key_padding_mask=np.ones((2, 4), bool)), ValueError,
     "lengths must be left out with key_padding_mask, got both"),
    (lambda e: e(tokens(2, 4), lengths=[4, 2], kv_cache=e.make_caches(2, 8)), ValueError,
     "lengths must be left out with kv_cache, got both"),
    (lambda e: e(list(tokens(2, 4)), lengths=[4, 2]), ValueError, "lengths must be left out where x is a list"),
    (lambda e: e([tokens(4)] * 2, key_padding_mask=np.ones((2, 4), bool)), ValueError,
     "key_padding_mask must be left out where x is a list of sequences"),
    (lambda e: e.call_with_torch_masks(np.float32(1)), ValueError, r"x must be \(B, L, E\) or .*, got shape \(\)"),
    (lambda e: e.call_with_torch_masks(tokens()), ValueError, r"x must be \(B, L, E\) or .*, got shape \(24,\)"),
    (lambda e: TransformerEncoder.from_torch({}, H, activation="relu", norm_first=False, prefix=5), TypeError,
     "prefix must be a string, got 5"),
    (lambda e: TransformerEncoder(e.layers[0]), TypeError,
     r"layers must be a sequence of .*, got TransformerEncoderLayer; pass \[layer\]"),
    (lambda e: TransformerEncoder(None), TypeError, "layers must be a sequence of .*, got NoneType"),
    (lambda e: e([tokens(4), tokens(4)[:, 1:]]), ValueError, r"x\[1\] must be \(L, E\) with E = 24, got shape \(4, 23\)"),
    (lambda e: e(tokens(2, 4), kv_cache=e.make_caches(2, 8)[:1]), ValueError, "kv_cache must be a list of 2 caches"),
    (lambda e: e(tokens(2, 4), kv_cache=e.make_caches(2, 8)[:1] * 2), ValueError, "a cache of its own for each layer"),
    (lambda e: e(tokens(2, 4), kv_cache=e.make_caches(2, 3)), ValueError, "the cache is full"),
    (lambda e: e(tokens(2, 4), out=np.empty((2, 4, E))), TypeError, "out must have dtype float32"),
    (lambda e: TransformerEncoder([]), ValueError, "layers must be at least one"),
    (lambda e: TransformerEncoder([e.layers[0].attention]), TypeError, r"layers\[0\] must be an edgeattn.Transformer"),
    (lambda e: TransformerEncoder(e.layers, norm=edgeattn.LayerNorm(np.ones(3))), ValueError,
     "norm must be a LayerNorm or RMSNorm of E = 24 features"),
    (lambda e: edgeattn.TransformerEncoderLayer(e.layers[0].attention, e.layers[0].feed_forward,
                                                edgeattn.RMSNorm(np.ones(5))), ValueError,
     "norm1 must be of E = 24 features"),
])
def test_errors_say_what_was_required(call, error, message):
    with pytest.raises(error, match=message):
        call(encoder())


@pytest.mark.parametrize("where, value", [
    ("norm", 3), ("norm", {"kind": "Linear"}), ("layers", []), ("layers", [{"same": "layers.0"}]), ("layers", {}),
    ("norm", {"kind": "os"}), ("norm", {"kind": ["Linear"]}), ("norm", {"tensor": "none"}), ("more", 1)])
def test_files_that_lie(where, value, tmp_path):
    config, tensors = encoder().to_state()
    header = {"format": 1, "kind": "TransformerEncoder", "config": {**config, where: value}}
    save_file(tensors, tmp_path / "encoder.safetensors", metadata={"edgeattn": json.dumps(header)})
    with pytest.raises(ValueError, match="encoder.safetensors does not hold a (valid|whole) TransformerEncoder: "):
        edgeattn.load(tmp_path / "encoder.safetensors")


def test_a_state_dict_needs_what_it_does_not_say():
    with pytest.raises(TypeError, match=r"^TransformerEncoder.from_torch\(\) missing 2 .*; torch's own defaults are "
                                        "activation='relu', norm_first=False$"):
        TransformerEncoder.from_torch(oracle.torch_state_dict(weights()), H)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'eps'$"):
        TransformerEncoder.from_torch({}, H, activation="relu", norm_first=False, eps=1)


def test_a_wrong_prefix_names_the_right_ones():
    stored = {f"net.{name}": array for name, array in oracle.torch_state_dict(weights(), NORM).items()}
    layer = {name.replace("layers.0.", ""): array for name, array in stored.items() if "layers.0." in name}
    for state, prefix, told in (
            (stored, "", r"prefixes that fit one: \['net\.'\]$"), (stored, "net", r"prefixes that fit one: \['net\.'\]$"),
            (layer, "layers.", r"prefixes that fit one: \['net\.'\]$"), ({}, "", "it is empty$"),
            ({f"h.{i}.c_attn.weight": np.eye(2) for i in range(9)}, "",
             r"its names are \[h\.0\.c_attn\.weight, .*, \.\.\.\]; MultiHeadAttention\.from_checkpoint knows")):
        with pytest.raises(ValueError, match=rf"prefix '{prefix}' fits no torch.nn.TransformerEncoder in .*; {told}"):
            TransformerEncoder.from_torch(state, H, prefix=prefix, activation="relu", norm_first=False)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("layers.1.linear2.weight"), r"missing: layers\.1\.linear2\.weight"),
    (lambda s: s.update({"layers.0.extra": np.ones(2)}), r"unexpected: layers\.0\.extra"),
    (lambda s: s.update({"layers.0.norm1.weight": np.ones(5, np.float32)}),
     r"mis-shaped: layers\.0\.norm1\.weight must be \(24\), got \(5,\)"),
    (lambda s: s.update({"layers.1.norm2.bias": np.full(E, np.nan)}), r"state_dict: layers\.1\.norm2\.bias holds NaN"),
    (lambda s: s.update({"norm.weight": np.full(E, 1e39)}), r"norm\.weight holds NaN or infinity as float32")])
def test_state_dicts_that_do_not_fit(change, message):
    state = oracle.torch_state_dict(weights(), NORM)
    change(state)
    with pytest.raises(ValueError, match=message):
        TransformerEncoder.from_torch(state, H, activation="relu", norm_first=False)


def test_a_state_dict_with_other_heads():
    with pytest.raises(ValueError, match="num_heads must divide the width 24 of the projections, got 5"):
        TransformerEncoder.from_torch(oracle.torch_state_dict(weights()), 5, activation="relu", norm_first=False)
