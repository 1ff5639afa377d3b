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
    return {f"{stem}{name}.weight": random((E, count) if row.conv1d else (count, E)).astype("f")
            for name, count in zip((*row.inputs, row.out), [*rows, E], strict=True)}


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.family)
@pytest.mark.filterwarnings("error")
def test_every_family_is_found_by_its_names(row):
    stored = state(row, "layers.0.") | state(row, "layers.1.")
    with pytest.warns(UserWarning, match="the layer read is without") if row.positions else contextlib.nullcontext():
        layer = MultiHeadAttention.from_checkpoint(stored, "layers.1.", 4)
    wanted, out = (stored[f"layers.1.{name}.weight"] for name in (row.inputs[0], row.out))
    if row.conv1d:
        wanted, out = wanted.T, out.T
    # scores of 2 features are divided by sqrt(2), those of T5 by nothing
    np.testing.assert_array_equal(layer.q_weight, wanted[:E] * np.float32(2**0.5 if row.unscaled else 1))
    np.testing.assert_array_equal(layer.out_weight, out)


def test_heads_that_share_keys_are_known_by_their_width():
    llama = next(row for row in FAMILIES if row.family == "Llama")
    with pytest.warns(UserWarning, match="rotary=RotaryEmbedding"):
        assert MultiHeadAttention.from_checkpoint(state(llama, "", 4), "", 4).num_kv_heads == 2


def test_a_prefix_that_fits_none_or_several_is_told_which_there_are():
    row = FAMILIES[0]
    stored = state(row, "layers.0.") | state(row, "layers.1.")
    with pytest.raises(ValueError, match=r"fits 2 attention layers in state_dict; .*\['layers.0.', 'layers.1.'\]"):
        MultiHeadAttention.from_checkpoint(stored, "layers.", 4)
    with pytest.raises(ValueError, match=r"fits 0 attention layers"):
        MultiHeadAttention.from_checkpoint(stored, "other.", 4)
    of_torch = {"a.in_proj_weight": np.eye(2), "b.in_proj_weight": np.eye(2), "c": np.eye(2)}
    for other, told in ((of_torch, r"those that from_torch reads, under the prefixes \['a\.', 'b\.'\]$"),
                        ({"c": np.eye(2)}, r"its names are \[c\]; .*edgeattn.from_pretrained a model's folder$")):
        with pytest.raises(ValueError, match=rf"prefix 'a\.x' fits no attention layer in state_dict; .*{told}"):
            MultiHeadAttention.from_checkpoint(other, "a.x", 4)
