"""Keys and values that are projected once, for calls with ever new queries."""

import numpy as np
import pytest
from arrays import numbers as random

import edgeattn
import quant
from edgeattn import MultiHeadAttention, RMSNorm, RotaryEmbedding

H, E, S = 4, 32, 70
MEMORY, QUERY = random(3, S, 20, seed=1), random(3, 9, E, seed=2)
LENGTHS = np.array([70, 41, 3])
PADDING = np.arange(S) < LENGTHS[:, None]


def layer(int8, **more):
    weights = random(E, E, seed=3), random(16, 20, seed=4), random(16, 20, seed=5), random(E, E, seed=6)
    biases = {f"{name}_bias": random(size, seed=7) for name, size in (("q", E), ("k", 16), ("v", 16), ("out", E))}
    made = MultiHeadAttention(H, *weights, **biases, num_kv_heads=2, **more)
    return quant.quantize(made, scheme="dynamic") if int8 else made


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("more", [{}, {"rotary": RotaryEmbedding(8), "k_norm": RMSNorm(np.ones(8)),
                                       "position_bias": random(H, S, S)}])
def test_it_gives_the_bytes_of_a_call_without(int8, more, one_thread_afterwards):
    made = layer(int8, **more)
    for threads in (1, 2):
        edgeattn.set_num_threads(threads)
        for padding in (None, PADDING):
            kept = made.project_kv(MEMORY, key_padding_mask=padding)
            for queries in (QUERY, QUERY[:, :1], QUERY[:, 3:8]):
                np.testing.assert_array_equal(
                    made(queries, kept), made(queries, MEMORY, key_padding_mask=padding))
        kept, mask = made.project_kv(MEMORY[0], MEMORY[1]), random(H, 9, S, seed=8)
        np.testing.assert_array_equal(made(QUERY[0], kept), made(QUERY[0], MEMORY[0], MEMORY[1]))
        np.testing.assert_array_equal(made(QUERY[0], kept, attn_mask=mask, is_causal=True, causal_alignment="lower_right"),
                                      made(QUERY[0], MEMORY[0], MEMORY[1], attn_mask=mask, is_causal=True,
                                           causal_alignment="lower_right"))


def test_it_is_of_several_groups_of_heads():
    weights = [random(64 * 8, 16, seed=i) for i in range(3)]
    made, memory, query = MultiHeadAttention(8, *weights), random(1, 700, 16), random(1, 40, 16)
    np.testing.assert_array_equal(made(query, made.project_kv(memory)), made(query, memory))


def test_what_it_was_made_of_may_change():
    made, memory, padding = layer(False), MEMORY.copy(), PADDING.copy()
    kept = made.project_kv(memory, key_padding_mask=padding)
    memory[:], padding[:] = 0, True
    out = np.empty((3, 9, E), np.float32)
    assert made(QUERY, kept, out=out) is out and kept.length == S and kept.nbytes > 0
    np.testing.assert_array_equal(out, made(QUERY, MEMORY, key_padding_mask=PADDING))
    assert made(QUERY.astype(np.float16), kept).dtype == np.float16 and made(QUERY[:, :0], kept).shape == (3, 0, E)


@pytest.mark.parametrize("call, message", [
    (lambda made, kept: layer(False)(QUERY, kept), "key must be a ProjectedKV of this layer's project_kv"),
    (lambda made, kept: made(QUERY, kept, MEMORY), "value must be left out .*, give it to project_kv"),
    (lambda made, kept: made(QUERY, kept, key_padding_mask=PADDING), "key_padding_mask must be left out .* to project_kv"),
    (lambda made, kept: made(QUERY, kept, need_weights=True), "need_weights and softcap must be left out"),
    (lambda made, kept: made(QUERY, kept, softcap=3.0), "need_weights and softcap must be left out"),
    (lambda made, kept: made(QUERY[:2], kept), r"query must have shape \(3, 'L', 32\) for this ProjectedKV"),
    (lambda made, kept: made(QUERY[0], kept), r"query must have shape \(3, 'L', 32\) for this ProjectedKV"),
    (lambda made, kept: made.project_kv(MEMORY[..., :5]), "key must have a last axis of 20"),
    (lambda made, kept: made.project_kv(MEMORY[:, :0]), "key must have at least one token"),
    (lambda made, kept: made.project_kv(MEMORY, MEMORY[:, 1:]), "value"),
    (lambda made, kept: made.project_kv(MEMORY, key_padding_mask=PADDING[:1]), "key_padding_mask must have shape"),
    (lambda made, kept: layer(False, add_zero_attn=True).project_kv(MEMORY), "add_zero_attn, .* pass the arrays"),
])
def test_bad_arguments_are_refused(call, message):
    made = layer(False)
    with pytest.raises(ValueError, match=message):
        call(made, made.project_kv(MEMORY))
