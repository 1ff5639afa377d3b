"""from_torch, from_bert and from_gpt2: where every row goes, and what is refused."""

import json
import sys
import types

import numpy as np
import pytest
import safetensors.numpy

from edgeattn import MultiHeadAttention
from edgeattn.files.tensor_files import read_tensors

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


def test_torch_added_keys():
    """add_bias_kv=True stores bias_k and bias_v; add_zero_attn=True stores nothing."""
    state = changed(torch_state(), bias_k=random(1, 1, E), bias_v=random(1, 1, E) + 1)
    layer = MultiHeadAttention.from_torch(state, 2, add_zero_attn=True)
    same(layer, bias_k=state["bias_k"].reshape(-1), bias_v=state["bias_v"].reshape(-1))
    assert layer.extra_keys == 2
    assert MultiHeadAttention.from_torch(state, 2).extra_keys == 1


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


class Module:
    """As torch.nn.Module is, for one who has no torch."""

    def state_dict(self):
        return torch_state()


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
        changed(torch_state(), bias_k=random(1, 1, 5)),
        ValueError,
        r"missing: bias_v; mis-shaped: bias_k must be \(1, 1, 6\), got \(1, 1, 5\)",
    ),
    "integers": (
        changed(torch_state(), in_proj_weight=np.ones((3 * E, E), int)),
        TypeError,
        "in_proj_weight must be a float16, float32 or float64 array, got dtype int64",
    ),
    "unreadable": (
        changed(torch_state(), in_proj_bias=Unreadable()),
        TypeError,
        "'in_proj_bias' cannot be read as a NumPy array: requires grad",
    ),
    "empty": ({}, ValueError, "prefix '' fits no tensor in state_dict"),
    "no path": (3, TypeError, "state_dict_or_path must be a mapping of names to arrays, or the path of a file with them, got int$"),
    "nothing": (None, TypeError, "state_dict_or_path must be a mapping .*, or the path of a file with them, got None$"),
    "a module": (Module(), TypeError, r"state_dict_or_path must be a mapping .*, got Module; pass its \.state_dict\(\)$"),
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


@pytest.mark.parametrize(("prefix", "longer"), [("", "0 1 12"), ("layers", "0 1 12"), ("layers.1", "1 12")])
def test_a_prefix_too_short_names_the_longer_ones(prefix, longer):
    state = {f"layers.{i}.{name}": tensor for i in (0, 1, 12) for name, tensor in torch_state().items()}
    names = ", ".join(rf"'layers\.{i}\.'" for i in longer.split())
    with pytest.raises(ValueError, match=(
            rf"prefix '{prefix}' fits no attention layer in state_dict; prefixes with in_proj_weight or q_proj_weight: "
            rf"\[{names}\]")):
        MultiHeadAttention.from_torch(state, 2, prefix=prefix)
    del state["layers.0.in_proj_weight"]  # of a part of a layer all that is missing is told
    with pytest.raises(ValueError, match="missing: layers.0.in_proj_weight"):
        MultiHeadAttention.from_torch(state, 2, prefix="layers.0.")


def test_a_checkpoint_of_another_library_is_told_by_its_names():
    bert = bert_state()
    assert len(bert) > 4
    with pytest.raises(ValueError, match=r"no attention layer under prefix '', which has in_proj_weight; its names are "
                                         r"\[[\w., ]+, \.\.\.\]; MultiHeadAttention.from_checkpoint knows"):
        MultiHeadAttention.from_torch(bert, 2)
    with pytest.raises(ValueError, match=r"no tensor in state_dict; its names are those that from_torch reads, under"):
        MultiHeadAttention.from_gpt2(torch_state(), "h.0.", 2)


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


@pytest.mark.parametrize("suffix", [".msgpack", ""])
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


def test_an_encrypted_npz_is_refused_as_such(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, in_proj_weight=np.ones(3))
    content = bytearray(path.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # of the member, and of the directory
        content[content.index(header) + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.npz is not .*: it is encrypted; save it again without a password"):
        MultiHeadAttention.from_torch(path, 2)


def test_bfloat16_files_are_read_exactly(tmp_path):
    """Upper halves of float32, at odd offsets behind another tensor."""
    halves = {name: (tensor.view(np.uint32) >> 16).astype("<u2") for name, tensor in torch_state().items()}
    header, content = {"other": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}, b"abc"
    for name, half in halves.items():
        end = len(content) + half.nbytes
        header[name] = {"dtype": "BF16", "shape": half.shape, "data_offsets": [len(content), end]}
        content += half.tobytes()
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    state = {name: np.asarray(tensor) for name, tensor in read_tensors(path)[0].items() if name != "other"}
    for name, half in halves.items():
        np.testing.assert_array_equal(state[name].view(np.uint32), half.astype(np.uint32) << 16)
    same(MultiHeadAttention.from_torch(state, 2), out_weight=state["out_proj.weight"])


def gpt2_state(prefix="", width=8, inner=8):
    return {
        f"{prefix}c_attn.weight": random(width, 3 * inner),
        f"{prefix}c_attn.bias": random(3 * inner),
        f"{prefix}c_proj.weight": random(inner, width),
        f"{prefix}c_proj.bias": random(width),
        f"{prefix}bias": np.tril(np.ones((1, 1, 4, 4), bool)),
        f"{prefix}masked_bias": np.array(-1e4, np.float32),
    }


def conv1d_attention(x, source, q, kv, proj, heads):
    """Attention of GPT-2 written out for Conv1D weights, (inputs, outputs), in float64, not masked."""
    queries = x @ q[0] + q[1]
    keys, values = np.split(source @ kv[0] + kv[1], 2, axis=-1)
    context = []
    for q_head, k_head, v_head in zip(*(np.split(y, heads, axis=-1) for y in (queries, keys, values)), strict=True):
        scores = np.exp(q_head @ k_head.swapaxes(-1, -2) / np.sqrt(q_head.shape[-1]))
        context.append(scores / scores.sum(-1, keepdims=True) @ v_head)
    return np.concatenate(context, -1) @ proj[0] + proj[1]


@pytest.mark.parametrize("inner", [8, 6])
def test_gpt2(tmp_path, inner):
    state = gpt2_state("h.0.attn.", inner=inner)
    path = save(state, tmp_path / "gpt2.safetensors")
    layer = MultiHeadAttention.from_gpt2(path, "h.0.attn.", 2)
    weight, bias, projection, offset = (x.astype(np.float64) for x in list(state.values())[:4])
    x = random(2, 5, 8)
    q, kv = (weight[:, :inner], bias[:inner]), (weight[:, inner:], bias[inner:])
    np.testing.assert_allclose(
        layer(x), conv1d_attention(x, x, q, kv, (projection, offset), 2), rtol=1e-4, atol=1e-4
    )


def test_gpt2_cross_attention():
    state = gpt2_state()
    state.update({"c_attn.weight": random(8, 16), "c_attn.bias": random(16)})
    state.update({"q_attn.weight": random(8, 8), "q_attn.bias": random(8)})
    layer = MultiHeadAttention.from_gpt2(state, "", 4)
    x, source = random(2, 5, 8), random(2, 3, 8)
    pairs = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in ("q_attn", "c_attn", "c_proj")]
    np.testing.assert_allclose(layer(x, source), conv1d_attention(x, source, *pairs, 4), rtol=1e-4, atol=1e-4)


def test_bad_gpt2_checkpoints_are_refused():
    state = changed(
        gpt2_state(), drop=["c_proj.bias"], c_attn__bias=random(23), lora__weight=random(2, 2)
    )
    with pytest.raises(
        ValueError, match=r"missing: c_proj.bias; unexpected: lora.weight; mis-shaped: c_attn.bias must be \(24\), got"
    ):
        MultiHeadAttention.from_gpt2(state, "", 2)
    with pytest.raises(ValueError, match=r"prefixes with c_attn.weight: \['h.0.attn.'\]"):
        MultiHeadAttention.from_gpt2(gpt2_state("h.0.attn."), "h.1.attn.", 2)
    with pytest.raises(ValueError, match="num_heads must divide the width 8 of the projections, got 3"):
        MultiHeadAttention.from_gpt2(gpt2_state(), "", 3)


class Bfloat16Parameter:
    """What torch gives of a parameter, as far as a reader needs it."""

    def __init__(self, array):
        self.array, self.dtype = array, "torch.bfloat16"

    def detach(self):
        return self

    cpu = detach

    def float(self):
        return self.array


def test_torch_parameters_are_read_without_their_gradient():
    state = {name: Bfloat16Parameter(tensor) for name, tensor in torch_state().items()}
    same(MultiHeadAttention.from_torch(state, 2), out_weight=torch_state()["out_proj.weight"])


def torch_that_loads(monkeypatch, content, version="2.6.0+cpu"):
    """Put a stand-in for torch in place that loads `content`, and return the list of its calls."""
    calls = []

    def load(path, **options):
        calls.append(options)
        if isinstance(content, Exception):
            raise content
        return content

    module = types.ModuleType("torch")
    module.__version__, module.load = version, load
    monkeypatch.setitem(sys.modules, "torch", module)
    return calls


@pytest.fixture
def pickled(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"what is in it is the stand-in's business")
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_torch_files_are_read_by_the_safe_loader_only(monkeypatch, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"")
    calls = torch_that_loads(monkeypatch, torch_state())
    same(MultiHeadAttention.from_torch(path, 2), out_weight=torch_state()["out_proj.weight"])
    assert calls == [{"map_location": "cpu", "weights_only": True}]


def test_torch_files_without_torch(monkeypatch, pickled):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"model.pt is a pickle of torch, .*convert .*safetensors.torch.save_file"):
        MultiHeadAttention.from_torch(pickled, 2)


def test_torch_files_are_not_given_to_an_unsafe_torch(monkeypatch, pickled):
    calls = torch_that_loads(monkeypatch, torch_state(), version="2.5.1")
    with pytest.raises(ImportError, match="torch before 2.6 can be made to run code by one, got torch 2.5.1"):
        MultiHeadAttention.from_torch(pickled, 2)
    assert calls == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "model.pt must hold a state dict, got list"),
        ({"state_dict": torch_state(), "epoch": 3}, r"got mappings under \['state_dict'\]; .*\['state_dict'\]"),
        (RuntimeError("load failed. Disable safety to go on"), "model.pt is not a whole file .*: load failed$"),
    ],
)
def test_other_torch_files_are_refused(monkeypatch, pickled, content, message):
    torch_that_loads(monkeypatch, content)
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention.from_torch(pickled, 2)


def test_missing_torch_files_are_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        MultiHeadAttention.from_torch(tmp_path / "model.pt", 2)
