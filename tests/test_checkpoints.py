"""from_torch and from_bert: where every row goes, and what is refused."""

import numpy as np
import pytest
import safetensors.numpy

from edgeattn import MultiHeadAttention

E = 6


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def torch_state(kdim=E, vdim=E, bias=True):
    """What torch.nn.MultiheadAttention(E, heads, bias=bias, kdim=kdim, vdim=vdim).state_dict() holds."""
    if kdim == vdim == E:
        state = {"in_proj_weight": random(3 * E, E)}
    else:
        state = {
            "q_proj_weight": random(E, E),
            "k_proj_weight": random(E, kdim),
            "v_proj_weight": random(E, vdim),
        }
    state["out_proj.weight"] = random(E, E) * 2
    if bias:
        state.update({"in_proj_bias": random(3 * E), "out_proj.bias": random(E)})
    return state


def bert_state(prefix="", width=8, inner=8):
    """The names of one layer of transformers.BertModel."""
    shapes = {
        "self.query.weight": (inner, width),
        "self.key.weight": (inner, width),
        "self.value.weight": (inner, width),
        "output.dense.weight": (width, inner),
    }
    state = {}
    for index, (name, shape) in enumerate(shapes.items()):
        state[prefix + name] = random(*shape) + index
        state[prefix + name.replace("weight", "bias")] = random(shape[0]) + index
    return state


def same(layer, **tensors):
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(getattr(layer, name), tensor, err_msg=name)


def test_torch_packed():
    state = torch_state()
    layer = MultiHeadAttention.from_torch(state, 2)
    weight, bias = state["in_proj_weight"], state["in_proj_bias"]
    same(
        layer,
        q_weight=weight[:E],
        k_weight=weight[E : 2 * E],
        v_weight=weight[2 * E :],
        q_bias=bias[:E],
        k_bias=bias[E : 2 * E],
        v_bias=bias[2 * E :],
        out_weight=state["out_proj.weight"],
        out_bias=state["out_proj.bias"],
    )
    assert (layer.num_heads, layer.head_dim) == (2, 3)


def test_torch_separate():
    state = torch_state(kdim=5, vdim=4)
    layer = MultiHeadAttention.from_torch(state, 3)
    bias = state["in_proj_bias"]
    same(
        layer,
        q_weight=state["q_proj_weight"],
        k_weight=state["k_proj_weight"],
        v_weight=state["v_proj_weight"],
        q_bias=bias[:E],
        k_bias=bias[E : 2 * E],
        v_bias=bias[2 * E :],
    )
    assert (layer.kdim, layer.vdim) == (5, 4)


@pytest.mark.parametrize("kdim", [E, 5])
def test_torch_without_bias(kdim):
    layer = MultiHeadAttention.from_torch(torch_state(kdim=kdim, bias=False), 2)
    assert (layer.q_bias, layer.k_bias, layer.v_bias, layer.out_bias) == (None,) * 4


def test_torch_numbers_by_hand():
    """One head, two tokens, weights that select: worked out without any attention code."""
    state = {
        "in_proj_weight": np.concatenate([np.eye(2), np.eye(2), 2 * np.eye(2)]),
        "out_proj.weight": np.eye(2)[::-1],
    }
    x = np.array([[1.0, 0.0], [0.0, 0.0]])
    first = np.exp(1 / np.sqrt(2)) / (np.exp(1 / np.sqrt(2)) + 1)
    np.testing.assert_allclose(
        MultiHeadAttention.from_torch(state, 1)(x), [[0, 2 * first], [0, 1]], rtol=1e-6
    )


def save(state, path):
    if path.suffix == ".npz":
        np.savez(path, **state)
    else:
        safetensors.numpy.save_file(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("as_text", [True, False])
def test_files_with_prefix(tmp_path, suffix, as_text):
    state = {f"encoder.self_attn.{name}": tensor for name, tensor in torch_state().items()}
    state["encoder.linear.weight"] = random(2, 2)
    path = save(state, tmp_path / f"model{suffix}")
    layer = MultiHeadAttention.from_torch(str(path) if as_text else path, 2, prefix="encoder.self_attn.")
    wanted = MultiHeadAttention.from_torch(torch_state(), 2)
    np.testing.assert_array_equal(layer(random(3, E)), wanted(random(3, E)))


def test_bert():
    state = bert_state()
    layer = MultiHeadAttention.from_bert(state, "", 4)
    same(
        layer,
        q_weight=state["self.query.weight"],
        k_weight=state["self.key.weight"],
        v_weight=state["self.value.weight"],
        out_weight=state["output.dense.weight"],
        q_bias=state["self.query.bias"],
        k_bias=state["self.key.bias"],
        v_bias=state["self.value.bias"],
        out_bias=state["output.dense.bias"],
    )
    assert (layer.num_heads, layer.head_dim, layer.embed_dim) == (4, 2, 8)


def test_bert_file_leaves_the_norm_and_other_layers(tmp_path):
    prefix = "encoder.layer.1.attention."
    state = {
        **bert_state(prefix),
        **bert_state("encoder.layer.0.attention."),
        f"{prefix}output.LayerNorm.weight": random(8),
        f"{prefix}output.LayerNorm.bias": random(8),
    }
    layer = MultiHeadAttention.from_bert(save(state, tmp_path / "bert.safetensors"), prefix, 2)
    same(layer, q_weight=state[f"{prefix}self.query.weight"])


def test_bert_pruned_heads_have_a_narrower_projection():
    layer = MultiHeadAttention.from_bert(bert_state(width=8, inner=6), "", 3)
    assert (layer.embed_dim, layer.head_dim, layer.output_dim) == (8, 2, 8)


def test_half_precision_weights_become_float32():
    state = {name: tensor.astype(np.float16) for name, tensor in torch_state().items()}
    assert MultiHeadAttention.from_torch(state, 2).q_weight.dtype == np.float32


class Unreadable:
    def __array__(self, *arguments, **options):
        raise RuntimeError("requires grad")


def changed(state, drop=(), **changes):
    state = {name: tensor for name, tensor in state.items() if name not in drop}
    state.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
    return state


BAD_TORCH = {
    "everything at once": (
        changed(torch_state(), drop=["out_proj.bias"], extra=random(1), out_proj__weight=random(E, 5)),
        ValueError,
        (
            r"state_dict does not hold .* prefix '': missing: out_proj.bias; unexpected: extra; "
            r"mis-shaped: out_proj.weight must be \(6, 6\), got \(6, 5\)"
        ),
    ),
    "no in_proj_bias": (changed(torch_state(), drop=["in_proj_bias"]), ValueError, "missing: in_proj_bias"),
    "no weight": (changed(torch_state(), drop=["in_proj_weight"]), ValueError, "missing: in_proj_weight"),
    "packed and separate": (
        changed(torch_state(), q_proj_weight=random(E, E)),
        ValueError,
        "unexpected: q_proj_weight",
    ),
    "no v_proj_weight": (
        changed(torch_state(5, 4), drop=["v_proj_weight"]),
        ValueError,
        "missing: v_proj_weight",
    ),
    "in_proj rows": (
        changed(torch_state(), in_proj_weight=random(2 * E, E)),
        ValueError,
        r"mis-shaped: in_proj_weight must be \(18, 6\), got \(12, 6\)",
    ),
    "in_proj rank": (
        changed(torch_state(), in_proj_weight=random(E)),
        ValueError,
        r"mis-shaped: in_proj_weight must be \(any, any\), got \(6,\)",
    ),
    "k rows": (
        changed(torch_state(5, 4), k_proj_weight=random(3, 5)),
        ValueError,
        r"k_proj_weight must be \(6, 5\), got \(3, 5\)",
    ),
    "bias_k": (
        changed(torch_state(), bias_k=random(1, 1, E), bias_v=random(1, 1, E)),
        ValueError,
        "state_dict has bias_k: layers made with add_bias_kv=True are not supported yet",
    ),
    "integers": (
        changed(torch_state(), in_proj_weight=np.ones((3 * E, E), int)),
        TypeError,
        "in_proj_weight must be a float16, float32 or float64 array, got dtype int64",
    ),
    "unreadable": (
        changed(torch_state(), in_proj_bias=Unreadable()),
        TypeError,
        r"state_dict\['in_proj_bias'\] cannot be read as a NumPy array: requires grad",
    ),
    "empty": ({}, ValueError, "prefix '' fits no tensor in state_dict"),
    "no path": (3, TypeError, "path must be a string or a path, got int"),
}


@pytest.mark.parametrize("name", BAD_TORCH)
def test_bad_torch_checkpoints_are_refused(name):
    state, error, message = BAD_TORCH[name]
    with pytest.raises(error, match=message):
        MultiHeadAttention.from_torch(state, 2)


def test_a_wrong_prefix_names_the_right_ones():
    state = {
        f"layers.{index}.self_attn.{name}": tensor
        for index in (0, 1)
        for name, tensor in torch_state().items()
    }
    with pytest.raises(
        ValueError,
        match=r"prefix 'layer.0.' fits no tensor in state_dict; prefixes with in_proj_weight "
        r"or q_proj_weight: \['layers.0.self_attn.', 'layers.1.self_attn.'\]",
    ):
        MultiHeadAttention.from_torch(state, 2, prefix="layer.0.")
    with pytest.raises(
        ValueError, match="missing: layers.0.self_attn_in_proj_weight|missing: layers.0.in_proj_weight"
    ):
        MultiHeadAttention.from_torch(state, 2, prefix="layers.0.")


def test_a_prefix_must_be_a_string():
    with pytest.raises(TypeError, match="prefix must be a string, got 2"):
        MultiHeadAttention.from_torch(torch_state(), 3, prefix=2)


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        (4, ValueError, "num_heads must divide the width 6 of the projections, got 4"),
        (0, ValueError, "num_heads must be at least 1, got 0"),
        ("2", TypeError, "num_heads must be an integer, got '2'"),
    ],
)
def test_bad_head_counts_are_refused(heads, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttention.from_torch(torch_state(), heads)
    with pytest.raises(error, match=message):
        MultiHeadAttention.from_bert(bert_state(width=6, inner=6), "", heads)


def test_bad_bert_checkpoints_are_refused():
    state = changed(
        bert_state(),
        drop=["self.key.bias"],
        self__distance_embedding__weight=random(3, 2),
        output__dense__weight=random(8, 3),
    )
    with pytest.raises(
        ValueError,
        match=r"missing: self.key.bias; unexpected: self.distance_embedding.weight; "
        r"mis-shaped: output.dense.weight must be \(8, 8\), got \(8, 3\)",
    ):
        MultiHeadAttention.from_bert(state, "", 2)
    with pytest.raises(ValueError, match=r"prefixes with self.query.weight: \['a.'\]"):
        MultiHeadAttention.from_bert(bert_state("a."), "b.", 2)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ""])
def test_other_files_are_refused(tmp_path, suffix):
    with pytest.raises(
        ValueError, match=r"path must end in .safetensors or .npz, got .*safetensors.torch.save_file"
    ):
        MultiHeadAttention.from_torch(tmp_path / f"model{suffix}", 2)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_missing_files_are_the_systems_error(tmp_path, suffix):
    with pytest.raises(FileNotFoundError):
        MultiHeadAttention.from_torch(tmp_path / f"model{suffix}", 2)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.99])
def test_truncated_files_are_refused_by_name(tmp_path, suffix, kept):
    path = save(torch_state(), tmp_path / f"model{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=rf"model\{suffix} is not a whole \{suffix} file"):
        MultiHeadAttention.from_torch(path, 2)


def test_npz_with_objects_is_not_unpickled(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, in_proj_weight=np.array([{}], object))
    with pytest.raises(ValueError, match="model.npz is not a whole .npz file of plain arrays"):
        MultiHeadAttention.from_torch(path, 2)
