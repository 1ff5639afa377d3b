"""Calls that come again give what the first gave, and refuse what it would refuse."""
import ctypes
import gc
import sys

import numpy as np
import pytest

import edgeattn
import edgeattn.functional
import quant
from edgeattn import threads
from edgeattn.kernels.cpu import call as calling
from edgeattn.kernels.cpu import encoder_float32
from edgeattn.kernels.cpu.records import record
from edgeattn.runtime import prebuilt
from edgeattn.runtime.addresses import address

B, L, E, H = 2, 5, 8, 2
KINDS = ("function", "float32", "dynamic", "static")


def numbers(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def make(kind):
    """A call (x, **options) -> result, with nothing prepared."""
    if kind == "function":
        edgeattn.functional._prepared.clear()

        def call(x, **options):
            heads = x.reshape(*x.shape[:-1], H, -1).swapaxes(-2, -3).copy()
            if "out" in options and options["out"] is not None:
                options["out"] = options["out"].reshape(heads.shape)
            result = edgeattn.scaled_dot_product_attention(heads, heads, heads, **options)
            return result.reshape(x.shape)
        return call
    rng = np.random.default_rng(0)
    layer = edgeattn.MultiHeadAttention(H, *(numbers(rng, E, E) for _ in range(4)))
    if kind == "static":
        return quant.quantize(layer, quant.calibrate(layer, [numbers(rng, B, L, E)]))
    return layer if kind == "float32" else quant.quantize(layer, scheme="dynamic")


def masks(kind, rng, length):
    """What the kind takes, as options of a call."""
    for options in _masks(rng, length):
        mask = options.get("attn_mask")
        if kind != "static" or "alibi_slopes" not in options and (mask is None or mask.dtype == bool):
            yield options
    yield from lengths(rng, length) if kind == "function" else padding(kind, rng, length)


def _masks(rng, length):
    yield {}
    yield {"attn_mask": np.asarray(rng.random() > 0.3)}
    yield {"attn_mask": np.bool_(rng.random() > 0.3)}
    yield {"attn_mask": rng.random((length, 1)) > 0.3}
    for mask in (rng.random((length, length)) > 0.3, rng.random((B, H, length, length)) > 0.3,
                 numbers(rng, length, length), numbers(rng, B, 1, length, length), numbers(rng, length, 1)):
        yield {"attn_mask": mask}
    yield {"attn_mask": np.asfortranarray(rng.random((length, length)) > 0.3)}
    yield {"attn_mask": numbers(rng, length, length).astype(np.float64)}
    yield {"is_causal": True}
    yield {"window_size": (1, 2)}
    yield {"window_size": (1, 2), "is_causal": True, "attn_mask": rng.random((length, length)) > 0.3}
    yield {"alibi_slopes": rng.random(H).astype(np.float32)}
    yield {"alibi_slopes": rng.random((B, H)).astype(np.float32), "causal_alignment": "lower_right"}


def padding(kind, rng, length):
    keep = rng.random((B, length)) > 0.3
    yield {"key_padding_mask": keep}
    yield {"key_padding_mask": keep, "attn_mask": rng.random((length, length)) > 0.3}
    yield {"key_padding_mask": keep, "attn_mask": rng.random((length, 1)) > 0.3}
    yield {"key_padding_mask": keep, "attn_mask": rng.random((B, H, length, length)) > 0.3}
    if kind != "static":
        yield {"key_padding_mask": keep, "attn_mask": numbers(rng, H, length, length), "is_causal": True}


def lengths(rng, length):
    bias = np.where(rng.random((length, length)) > 0.3, numbers(rng, length, length), -np.inf).astype(np.float32)
    for options in ({}, {"is_causal": True}, {"window_size": (1, 0)}, {"alibi_slopes": rng.random(H).astype(np.float32)},
                    {"attn_mask": rng.random((length, length)) > 0.3}, {"attn_mask": bias},
                    {"attn_mask": rng.random((length, length)) > 0.3, "is_causal": True}):
        if options and "attn_mask" not in options:
            options["causal_alignment"] = "lower_right"
        elif "is_causal" in options:
            options["causal_alignment"] = "upper_left"
        yield {"kv_lengths": rng.integers(0, length + 1, B), **options}


def is_read(mask):
    """Whether a kernel reads a mask where it lies."""
    return mask is None or isinstance(mask, np.ndarray) and mask.dtype != np.float64 and mask.flags.c_contiguous


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_comes_again_gives_what_a_first_one_gives(kind):
    """With other numbers in its arrays, and whatever came between."""
    call, seen = make(kind), []
    for round_ in range(3):
        for length in (1, L):
            rng = np.random.default_rng(round_)
            for given in masks(kind, rng, length):
                x = numbers(rng, B, length, E)
                first = make(kind)(x, **given) if kind != "function" else None
                got = call(x, **given)
                if first is None:
                    edgeattn.functional._prepared.clear()
                    first = call(x, **given)
                np.testing.assert_array_equal(got, first, str(given))
                seen.append(got)
    assert len({result.tobytes() for result in seen}) > 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_comes_again_is_not_checked_again(kind, monkeypatch):
    rng, call = np.random.default_rng(2), make(kind)
    calls = [(numbers(rng, B, L, E), options) for options in masks(kind, rng, L)
             if is_read(options.get("attn_mask")) and not options.keys() >= {"kv_lengths", "attn_mask", "is_causal"}]
    wanted = [call(x, **options) for x, options in calls]

    def resolve_again(*_, **__):
        pytest.fail("resolve_mask was asked again")

    for module in (edgeattn.functional, edgeattn.layers.call):
        monkeypatch.setattr(module, "resolve_mask", resolve_again)
    for (x, options), result in zip(calls, wanted, strict=True):
        np.testing.assert_array_equal(call(x, **options), result)
    assert len(calls) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_out_is_taken_wherever_it_lies(kind):
    call, x = make(kind), numbers(np.random.default_rng(1), B, L, E)
    wanted = call(x)
    for _ in range(2):
        for out in (np.empty_like(x), np.empty((B, L, 2 * E), np.float32)[..., ::2], None):
            if kind == "function" and out is not None and not out.flags.c_contiguous:
                continue
            np.testing.assert_array_equal(call(x, out=out), wanted)
        if kind != "function":
            over = x.copy()
            assert call(over, out=over) is over
            np.testing.assert_array_equal(over, wanted)
            together = np.zeros(x.size + 8, np.float32)
            query, shifted = together[:x.size].reshape(x.shape), together[8:].reshape(x.shape)
            query[:] = x
            np.testing.assert_array_equal(call(query, out=shifted), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_first_call_refuses_is_refused_again(kind):
    call, x = make(kind), numbers(np.random.default_rng(1), B, L, E)
    call(x)
    call(x, is_causal=True)
    call(x, window_size=(1, 2))
    if kind != "static":
        call(x, alibi_slopes=np.ones(H, np.float32))
    call(x, attn_mask=np.ones((L, L), bool))
    for wrong in ({"is_causal": 1}, {"window_size": (1.0, 2)}, {"softcap": False},
                  {"alibi_slopes": np.float32([np.nan, 1])}, {"attn_mask": np.ones((L, L), np.int8)},
                  {"attn_mask": np.ones((L, L + 1), bool)}, {"causal_alignment": "middle"},
                  {"out": np.empty((B, L, E), np.float64)}):
        with pytest.raises((TypeError, ValueError)):
            call(x, **wrong)
    if kind != "function":
        with pytest.raises(ValueError, match="value must be left out" if kind == "static" else "value needs key"):
            call(x, None, x.copy())
        with pytest.raises(ValueError, match="out must have shape"):
            call(x, out=np.empty((B, L, E + 1), np.float32))
    else:
        q = x[:, None]
        edgeattn.scaled_dot_product_attention(q, q, q)
        with pytest.raises(TypeError):
            edgeattn.scaled_dot_product_attention(q, None, None)
        with pytest.raises(TypeError):
            edgeattn.scaled_dot_product_attention(q, q, q, enable_gqa=0)


def test_ever_new_lengths_do_not_fill_memory():
    layer = make("float32")
    for length in range(1, 200):
        layer(np.ones((1, length, E), np.float32))
    assert 0 < len(layer.prepared_calls) <= 64
    assert 0 < len(layer.fused_kernel._plans) <= 64


def test_calls_in_turn_that_a_signal_ended_before_they_ran_begin_anew(many_threads, monkeypatch):
    rng = np.random.default_rng(4)
    x, y = numbers(rng, 2, 2000, 32)
    wide = [encoder_float32.Linear(numbers(rng, 32, 32) / 8, None) for _ in range(3)]
    made, = calling.in_turn([wide[0].on(x, None, y), wide[1].on(y, None, y), wide[2].on(y, None, y)])[:1]
    if not isinstance(made, calling.CallsInTurn):
        pytest.skip("kernels compiled here are called one by one; in turn those of a library: make libraries")
    made()
    expected, serve, told = y.copy(), prebuilt.BoundKernel.serve, []

    def interrupted(self, *arguments):
        serve(self, *arguments)
        told.append(arguments[1])
        if len(told) == 2:
            raise TimeoutError

    many_threads(4)
    with monkeypatch.context() as patch:
        patch.setattr(prebuilt.BoundKernel, "serve", interrupted)
        with pytest.raises(TimeoutError):
            made()
        many_threads(1)  # the number, and the queue, of the call before
        y[:] = 0
        made()
    assert told == [4, 4, 1, 1, 1]
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("kind", ["float32", "dynamic"])
def test_layers_that_differ_in_their_weights_alone_plan_a_length_once(kind):
    rng = np.random.default_rng(11)
    layers = []
    for _ in range(3):
        float_layer = edgeattn.MultiHeadAttention(H, *(numbers(rng, E, E) for _ in range(4)))
        layers.append(float_layer if kind == "float32" else quant.quantize(float_layer, scheme="dynamic"))
    mask, made = rng.random((B, 5)) > 0.3, []
    x = numbers(rng, B, 5, E)
    for layer in layers:
        made.append(python_calls(lambda layer=layer: layer(x, key_padding_mask=mask)))
    assert [sum(name.endswith("_plan") for name in each) for each in made] == [1, 0, 0]
    results = [layer(x, key_padding_mask=mask) for layer in layers]
    for layer, result in zip(layers, results, strict=True):
        layer.prepared_calls.clear()
        layer.fused_kernel._plans.clear()
        layer.fused_kernel._alike.clear()
        np.testing.assert_array_equal(layer(x, key_padding_mask=mask), result)
    del layers[0]  # whose plan the others share
    for layer, result in zip(layers, results[1:], strict=True):
        np.testing.assert_array_equal(layer(x, key_padding_mask=mask), result)
    for layer in layers:
        layer.fused_kernel._plans.clear()
    calls = [layer.fused_kernel.prepare(x, x, x, (mask[:, None, None].shape, None, None, None, None)) for layer in layers]
    assert calls[0].parameters is calls[1].parameters and calls[0]._addresses != calls[1]._addresses


def tokens(rng, count):
    """Of a sequence, one by one."""
    return [numbers(rng, B, 1, E) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("window", [None, 3])
def test_a_step_that_comes_again_gives_what_a_first_one_gives(kind, window):
    layer, given = make(kind), tokens(np.random.default_rng(3), 6)
    known, fresh = (edgeattn.KVCache.for_layer(layer, B, 6, window=window) for _ in "ab")
    for i, x in enumerate(given):
        result, out = layer(x, kv_cache=known, is_causal=i % 2 == 0), np.empty_like(x)
        layer.prepared_calls.clear()
        assert layer(x, kv_cache=fresh, out=out) is out
        np.testing.assert_array_equal(result, out)
        layer(x, kv_cache=edgeattn.KVCache.for_layer(layer, B, 1))
    assert known.length == fresh.length == 6
    step = layer.prepared_calls
    layer(given[0][0], kv_cache=edgeattn.KVCache.for_layer(layer, 1, 1))
    assert 0 < len(step) <= 3


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_step_is_refused_as_the_first_one_is(kind):
    layer, (x, *_) = make(kind), tokens(np.random.default_rng(3), 1)
    cache = edgeattn.KVCache.for_layer(layer, B, 3)
    for _ in range(3):
        layer(x, kv_cache=cache)
    with pytest.raises(ValueError, match="the cache is full"):
        layer(x, kv_cache=cache)
    assert cache.length == 3
    for other in (edgeattn.KVCache(B, H, 3, E // H + 1), edgeattn.KVCache(B, H + 1, 3, E // H),
                  edgeattn.KVCache(B + 1, H, 3, E // H),
                  *([edgeattn.KVCache(B, H, 3, E // H, dtype="int8", scales=(1, 1))] if kind == "static" else ())):
        with pytest.raises(ValueError, match="cache"):
            layer(x, kv_cache=other)
        assert other.length == 0
    for wrong in ({"need_weights": 0}, {"is_causal": 1}, {"kv_cache": object()}):
        with pytest.raises(TypeError):
            layer(x, **{"kv_cache": cache, **wrong})


def test_a_query_to_a_cache_that_comes_again_gives_what_a_first_one_gives():
    rng = np.random.default_rng(4)
    for dtype in ("float32", "int8"):
        cache = edgeattn.KVCache(B, H, 4, 3, dtype=dtype)
        cache.append(numbers(rng, B, H, 2, 3), numbers(rng, B, H, 2, 3))
        query = numbers(rng, B, 2 * H, 1, 3)
        for scale in (None, 0.5, 1e30):  # the last one no kernel takes
            first, out = cache.attend(query, scale=scale), np.empty_like(query)
            np.testing.assert_array_equal(cache.attend(query, scale=scale), first)
            assert cache.attend(query, scale=scale, is_causal=True, out=out) is out
            np.testing.assert_array_equal(cache.attend(query, scale=scale, is_causal=True, out=out), first)
            over = query.copy()
            np.testing.assert_array_equal(cache.attend(over, scale=scale, out=over), first)
        cache.truncate(0)
        assert not cache.attend(query, position=0).any()
        with pytest.raises(ValueError, match="position"):
            cache.attend(query)


def test_inputs_that_a_static_layer_has_of_its_own_are_asked_for_again():
    rng = np.random.default_rng(5)
    layer = edgeattn.MultiHeadAttention(H, *(numbers(rng, E, E) for _ in range(4)))
    x, other = numbers(rng, B, L, E), numbers(rng, B, L, E)
    crossed = quant.quantize(layer, quant.calibrate(layer, [{"query": x, "key": other, "value": x}]))
    codes = [crossed.quantize_input(x, name) for name in ("query", "key", "value")]
    crossed.run_int8(codes[0], codes[0], codes[0])
    with pytest.raises(ValueError, match="key is required"):
        crossed.run_int8(codes[0])
    with pytest.raises(ValueError, match="value is required"):
        crossed.run_int8(codes[0], codes[0])
    np.testing.assert_array_equal(crossed.run_int8(*codes), crossed.run_int8(*(c.copy() for c in codes)))


def test_layers_of_an_encoder_share_what_kernels_read_of_a_mask():
    rng = np.random.default_rng(6)
    attention = edgeattn.MultiHeadAttention(H, *(numbers(rng, E, E) for _ in range(4)))
    linear = edgeattn.Linear(numbers(rng, E, E))
    layer = edgeattn.TransformerEncoderLayer(attention, edgeattn.FeedForward(linear, linear, activation="relu"))
    keep = rng.random((B, L)) > 0.3
    with edgeattn.TransformerEncoder([layer, layer]).prepared((B, L), key_padding_mask=keep) as (first, second):
        read = first.for_kernels()
        assert second.for_kernels() is read
        np.testing.assert_array_equal(read[0][0].reshape(B, L), keep)


def python_calls(run):
    """How many calls of Python functions `run` makes."""
    seen = []

    def note(frame, event, _):
        if event == "call":
            seen.append(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name)

    gc.disable()  # what others have called for when memory is swept
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return seen[1:]  # without `run`


def direct(kind):
    """A call (x, **options) that is the library's alone, and its x of a length."""
    rng = np.random.default_rng(7)
    if kind == "function":
        def run(heads, **options):
            return edgeattn.scaled_dot_product_attention(heads, heads, heads, **options)
        edgeattn.functional._prepared.clear()
        return run, lambda length: numbers(rng, B, H, length, E // H)
    call = make(kind)
    if kind == "static":
        return call.run_int8, lambda length: call.quantize_input(numbers(rng, B, length, E))
    return call, lambda length: numbers(rng, B, length, E)


# Frames of Python are what a short call costs beside its kernel: these are as many as there are.
@pytest.mark.parametrize(("kind", "plain"), [("function", 6), ("float32", 7), ("dynamic", 7), ("static", 6)])
def test_a_call_that_comes_again_makes_few_calls_of_python(kind, plain):
    call, inputs = direct(kind)
    x, rng = inputs(L), np.random.default_rng(8)
    for options in masks(kind, rng, L):
        if not is_read(options.get("attn_mask")) or options.keys() >= {"kv_lengths", "attn_mask", "is_causal"}:
            continue
        call(x, **options)
        call(x, **options)
        inside = 2 * bool(options.keys() & {"alibi_slopes", "kv_lengths"})  # whose content is compared
        made = python_calls(lambda options=options: call(x, **options))
        most = plain + inside if options or kind == "function" else 3  # the layer, its prepared call and threads.run
        assert len(made) <= most, (sorted(options), made)


@pytest.mark.parametrize(("kind", "most"), [("function", 59), ("float32", 72), ("dynamic", 73), ("static", 68)])
def test_a_call_of_a_new_length_plans_once(kind, most):
    call, inputs = direct(kind)
    for options in (lambda n: {}, lambda n: {"is_causal": True}, lambda n: {"attn_mask": np.ones((n, n), bool)}):
        call(inputs(L), **options(L))
        x, given = inputs(L + 1), options(L + 1)
        made = python_calls(lambda given=given, x=x: call(x, **given))
        assert len(made) <= most, (len(made), made)
        assert sum(name.endswith("_plan") for name in made) == 1


@pytest.mark.parametrize("kind", KINDS[1:])
def test_both_ways_refuse_a_first_call_alike(kind):
    """What kernels read as it is, is checked in a short way: it says what the long one does, of a query as float64."""
    x = numbers(np.random.default_rng(1), B, L, E)
    for wrong in ({"attn_mask": np.ones((L, L + 1), bool)}, {"attn_mask": np.ones((B, L, L), bool)},
                  {"key_padding_mask": np.ones((B, L + 1), bool)}, {"out": np.empty((B, L, E + 1), np.float32)},
                  {"causal_alignment": "middle"}, {"window_size": (-2, 0)}):
        said = []
        for query in (x, x.astype(np.float64)):
            given = dict(wrong)
            if "out" in given:
                given["out"] = given["out"].astype(query.dtype)
            with pytest.raises(ValueError) as refused:
                make(kind)(query, **given)
            said.append(str(refused.value))
        assert said[0] == said[1]
    for bad in (x[..., :-1].copy(), x[None].copy()):
        for query in (bad, bad.astype(np.float64)):
            with pytest.raises(ValueError):
                make(kind)(query)


def as_located(addresses, size):
    """What `records.located` makes of the addresses of a call whose record has this size."""
    found, (pointer, none, items, count) = addresses[:size].tolist(), addresses[size:size + 4].tolist()
    found[:count] = [0 if given == none else ctypes.c_int64.from_address(given + pointer).value
                     for given in (ctypes.c_int64 * count).from_address(items)]
    return found


def test_what_a_call_leaves_out_is_what_the_plan_holds(monkeypatch):
    """Not what the call before it wrote; and each call at a time has records of its own."""
    seen, again = [], []

    def bind(_function, parameters, addresses, _objects):
        def run(*_):
            if again:
                again.pop()()
            seen.append((parameters.tolist(), as_located(addresses, len(layout))))
        return run

    monkeypatch.setattr(calling, "entry", lambda *_: None)
    monkeypatch.setattr(calling, "bind", bind)
    a, b, c, d = (np.zeros(1) for _ in "abcd")
    at = [address(array) for array in (a, b, c, d)]
    layout = record("first second third fourth fifth sixth seventh weights")
    plan = calling.PreparedCall(None, np.arange(5), layout, np.float32, 0, 0, 0, fixed=(99,), own=2)
    plan.run(a, a, b, c, d, own=(7, 8))
    plan.run(a, b, b, own=(5, 6))
    plan.run(a, b, c, d, None, None, a, own=(5, 6))
    again.append(lambda: plan.run(d, d, d, own=(1, 1)))
    plan.run(a, a, a, own=(2, 2))
    holding = plan.holding({4: d})
    holding.run(a, a, a, own=(3, 3))
    holding.run(a, a, a, b, c, own=(3, 3))
    holding.run(a, a, a, own=(3, 3))
    A, B_, C, D = at
    assert seen == [
        ([0, 1, 7, 8, 4], [A, A, B_, C, D, 0, 0, 99]), ([0, 1, 5, 6, 4], [A, B_, B_, 0, 0, 0, 0, 99]),
        ([0, 1, 5, 6, 4], [A, B_, C, D, 0, 0, A, 99]), ([0, 1, 1, 1, 4], [D, D, D, 0, 0, 0, 0, 99]),
        ([0, 1, 2, 2, 4], [A, A, A, 0, 0, 0, 0, 99]), ([0, 1, 3, 3, 4], [A, A, A, 0, D, 0, 0, 99]),
        ([0, 1, 3, 3, 4], [A, A, A, B_, C, 0, 0, 99]), ([0, 1, 3, 3, 4], [A, A, A, 0, D, 0, 0, 99])]


def test_calls_in_turn_keep_their_order(many_threads):
    rng = np.random.default_rng(4)
    x, y, z = numbers(rng, 3, 70, 32)
    norm = encoder_float32.Norm(("layer", numbers(rng, 32), numbers(rng, 32), 1e-5))
    wide = encoder_float32.Linear(numbers(rng, 32, 32) / 8, None, activation="relu")
    many = numbers(rng, 2000, 32)
    first = many.copy()

    def between():
        np.add(z, 1, out=z)

    steps = [norm.on(x, None, y), norm.on(y, x, z), between, norm.on(z, None, y), wide.on(many, None, many),
             norm.on(y, z, y)]
    for count in (1, 2, 1):
        results = []
        for made in (steps, calling.in_turn(steps)):
            many_threads(count)
            for _ in range(2):
                y[:], z[:], many[:] = 0, 0, first
                for step in made:
                    step()
                results.append([y.copy(), z.copy(), many.copy()])
        for found in results[1:]:
            for a, b in zip(found, results[0], strict=True):
                np.testing.assert_array_equal(a, b)
    native = steps[0].frame.argument is not None  # of a library's kernels
    assert len(calling.in_turn(steps)) == (3 if native else len(steps))
    assert calling.in_turn([between]) == [between]
    long = steps[0]
    long.work = threads.LONG_WORK - 1
    assert len(calling.in_turn([long, *steps[1:2]])) == 2  # too long together for signals to wait


@pytest.mark.parametrize("kind", ["float32", "dynamic"])
@pytest.mark.parametrize("size", [3, 16])
def test_projections_that_are_joined_give_the_bits_of_each(kind, size):
    rng = np.random.default_rng(9)
    layer = edgeattn.MultiHeadAttention(4, *(numbers(rng, rows, 20) for rows in (4 * size, 2 * size, 2 * size)),
                                        k_bias=numbers(rng, 2 * size), num_kv_heads=2)
    layer = layer if kind == "float32" else quant.quantize(layer, scheme="dynamic")
    x = numbers(rng, 3, 20)
    apart = [layer.projections[name].packed(x) for name in ("query", "key", "value")]
    np.testing.assert_array_equal(layer.joined_projections(x), np.concatenate(apart, axis=1))
    shared = [layer.projections[name].packed for name in ("query", "key", "value")]
    for one, of in zip(apart, shared, strict=True):
        np.testing.assert_array_equal(of(x), one)
    if kind == "float32" and size == 16:  # whole vectors
        whole = layer.joined_projections.__self__
        assert all(of.__self__.weights is whole.weights for of in shared)
