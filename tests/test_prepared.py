"""Calls that come again give what the first gave, and refuse what it would refuse."""
import numpy as np
import pytest

import edgeattn
import quant

B, L, E, H = 2, 5, 8, 2
KINDS = ("function", "float32", "dynamic")


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
    return layer if kind == "float32" else quant.quantize(layer, scheme="dynamic")


def masks(rng, length):
    yield {}
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


def padding(rng, length):
    keep = rng.random((B, length)) > 0.3
    yield {"key_padding_mask": keep}
    yield {"key_padding_mask": keep, "attn_mask": rng.random((length, length)) > 0.3}
    yield {"key_padding_mask": keep, "attn_mask": rng.random((B, H, length, length)) > 0.3}
    yield {"key_padding_mask": keep, "attn_mask": numbers(rng, H, length, length), "is_causal": True}


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_comes_again_gives_what_a_first_one_gives(kind):
    """With other numbers in its arrays, and whatever came between."""
    call, seen = make(kind), []
    for round_ in range(3):
        for length in (1, L):
            rng = np.random.default_rng(round_)
            options = [*masks(rng, length), *([] if kind == "function" else padding(rng, length))]
            for given in options:
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
    call(x, alibi_slopes=np.ones(H, np.float32))
    call(x, attn_mask=np.ones((L, L), bool))
    for wrong in ({"is_causal": 1}, {"window_size": (1.0, 2)}, {"softcap": False},
                  {"alibi_slopes": np.float32([np.nan, 1])}, {"attn_mask": np.ones((L, L), np.int8)},
                  {"attn_mask": np.ones((L, L + 1), bool)}, {"causal_alignment": "middle"},
                  {"out": np.empty((B, L, E), np.float64)}):
        with pytest.raises((TypeError, ValueError)):
            call(x, **wrong)
    if kind != "function":
        with pytest.raises(ValueError, match="value needs key"):
            call(x, None, x)
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
