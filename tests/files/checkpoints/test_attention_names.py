"""from_checkpoint: every family of names, and what an error says to type."""

import contextlib

import numpy as np
import pytest

from edgeattn import MultiHeadAttention
from edgeattn.files.checkpoints.attention_names import FAMILIES

E = 8


def state(row, stem, kv=E):
    random = np.random.default_rng(0).standard_normal
    rows = [3 * E] if len(row.inputs) == 1 else [E, kv, kv]
    return {f"{stem}{weight_of(name)}": random((E, count) if row.conv1d else (count, E)).astype("f")
            for name, count in zip((*row.inputs, row.out), [*rows, E], strict=True)}


def weight_of(name):
    return f"{name}weight" if name.endswith("_") else f"{name}.weight"


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.family)
@pytest.mark.filterwarnings("error")
def test_every_family_is_found_by_its_names(row):
    stored = state(row, "layers.0.") | state(row, "layers.1.")
    with pytest.warns(UserWarning, match="the layer read is without") if row.positions else contextlib.nullcontext():
        layer = MultiHeadAttention.from_checkpoint(stored, "layers.1.", 4)
    wanted, out = (stored[f"layers.1.{weight_of(name)}"] for name in (row.inputs[0], row.out))
    if row.conv1d:
        wanted, out = wanted.T, out.T
    if row.by_head:  # 4 heads of 2: queries, keys and values of each
        wanted = wanted.reshape(4, 3, 2, E)[:, 0].reshape(E, E)
    # scores of 2 features are divided by sqrt(2), those of T5 by nothing
    np.testing.assert_array_equal(layer.q_weight, wanted[:E] * np.float32(2**0.5 if row.unscaled else 1))
    np.testing.assert_array_equal(layer.out_weight, out)


def test_heads_that_share_keys_are_known_by_their_width():
    llama = next(row for row in FAMILIES if row.family == "Llama")
    with pytest.warns(UserWarning, match="rotary=RotaryEmbedding"):
        assert MultiHeadAttention.from_checkpoint(state(llama, "", 4), "", 4).num_kv_heads == 2


def test_packed_heads_that_share_keys_and_packed_rows_of_each_family():
    """Phi-3's queries, keys and values one after the other, the latter narrower; nanoGPT's (outputs, inputs)."""
    phi = next(row for row in FAMILIES if row.family == "Phi-3")
    stored = {"qkv_proj.weight": np.arange(16.0 * E, dtype="f").reshape(16, E), "o_proj.weight": np.ones((E, E), "f")}
    with pytest.warns(UserWarning, match="rotary"):
        layer = MultiHeadAttention.from_checkpoint(stored, "", 4)
    assert phi.inputs == ("qkv_proj",) and layer.num_kv_heads == 2
    np.testing.assert_array_equal(layer.v_weight, stored["qkv_proj.weight"][12:])
    stored = {"c_attn.weight": np.arange(24.0 * E, dtype="f").reshape(24, E), "c_proj.weight": np.ones((E, E), "f")}
    with pytest.warns(UserWarning, match="is_causal=True"):
        layer = MultiHeadAttention.from_checkpoint(stored, "", 4)
    np.testing.assert_array_equal(layer.k_weight, stored["c_attn.weight"][8:16])


def test_packed_rows_that_are_none_are_refused():
    """Falcon's, whose heads share one of keys and of values."""
    stored = {"query_key_value.weight": np.ones((E + 4, E), "f"), "dense.weight": np.ones((E, E), "f")}
    with pytest.raises(ValueError, match="query_key_value must have outputs of Q, 8, K and V, head by head, got 12"), pytest.warns(
            UserWarning):
        MultiHeadAttention.from_checkpoint(stored, "", 4)


def test_what_else_changes_attention_is_told():
    """Qwen 3's norms of queries and keys, BEiT's biases under names of their own."""
    llama = next(row for row in FAMILIES if row.family == "Llama")
    stored = state(llama, "attn.") | {"attn.q_norm.weight": np.ones(2, "f"), "attn.k_norm.weight": np.ones(2, "f")}
    with pytest.warns(UserWarning, match=r"rotary.* and has attn.q_norm.weight, attn.k_norm.weight; the layer read is without"):
        MultiHeadAttention.from_checkpoint(stored, "attn.", 4)
    timm = next(row for row in FAMILIES if row.family == "timm")
    with pytest.warns(UserWarning, match="a timm layer has attn.q_bias; the layer read is without"):
        MultiHeadAttention.from_checkpoint(state(timm, "attn.") | {"attn.q_bias": np.ones(E, "f")}, "attn.", 4)


def test_a_file_of_no_known_names_says_which_are_known():
    with pytest.raises(ValueError, match=r"state_dict must hold attention under names of a known family, got lstm.weight; known "
                                         r"are torch.nn.MultiheadAttention, .*; MultiHeadAttention\(q_weight, .* by hand"):
        MultiHeadAttention.from_checkpoint({"lstm.weight": np.ones((E, E), "f")}, "", 4)


def test_a_prefix_that_fits_none_or_several_is_told_which_there_are():
    row = FAMILIES[0]
    stored = state(row, "layers.0.") | state(row, "layers.1.")
    with pytest.raises(ValueError, match=r"fits 2 attention layers in state_dict; .*\['layers.0.', 'layers.1.'\]"):
        MultiHeadAttention.from_checkpoint(stored, "layers.", 4)
    with pytest.raises(ValueError, match=r"fits 0 attention layers"):
        MultiHeadAttention.from_checkpoint(stored, "other.", 4)
