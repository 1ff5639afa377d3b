"""from_keras: every form in which Keras keeps attention weights, against attention in Keras's own layout."""

import io
import json
import sys
import zipfile

import numpy as np
import pytest
from readers_made import with_circle

from edgeattn import MultiHeadAttention, SelfAttention

E, KDIM, VDIM, H, D = 6, 5, 4, 4, 3
PARTS = ("query", "key", "value", "attention_output")
# class, settings of the layer -> H, Hkv, Dv, output_shape
LAYERS = {
    "plain": (H, H, D, (E,)),
    "value_dim": (H, H, 2, (E,)),
    "output_shape": (H, H, D, (7,)),
    "two output axes": (H, H, D, (2, 3)),
    "grouped": (H, 2, D, (E,)),
    "one key head": (H, 1, D, (E,)),
}


def variables(name="plain", bias=True, gate=False):
    """The variables of a layer as {"query/kernel": ..., ...}, in the order of layer.get_weights()."""
    heads, kv_heads, value_dim, output = LAYERS[name]
    random = np.random.default_rng(3).standard_normal
    shapes = {
        "query": (E, heads, D),
        "key": (KDIM, kv_heads, D),
        **({"gate": (E, heads, value_dim)} if gate else {}),
        "value": (VDIM, kv_heads, value_dim),
        "attention_output": (heads, value_dim, *output),
    }
    found = {}
    for part, shape in shapes.items():
        found[f"{part}/kernel"] = random(shape).astype(np.float32)
        if bias:
            found[f"{part}/bias"] = random(output if part == "attention_output" else shape[1:]).astype(np.float32)
    return found


def keras_attention(found, query, key, value):
    """The einsums of the Keras layers, in float64."""

    def dense(equation, x, part):
        result = np.einsum(equation, x, found[f"{part}/kernel"].astype(np.float64))
        return result + found.get(f"{part}/bias", 0)

    inputs = {"query": query, "key": key, "value": value}
    q, k, v = (dense("btm,mhd->bthd", x, part) for part, x in inputs.items())
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.exp(np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1]))
    context = np.einsum("bhts,bshd->bthd", scores / scores.sum(-1, keepdims=True), v)
    if "gate/kernel" in found:
        context = context / (1 + np.exp(-dense("btm,mhd->bthd", query, "gate")))
    equation = "bthd,hdxy->btxy" if found["attention_output/kernel"].ndim == 4 else "bthd,hdx->btx"
    return dense(equation, context, "attention_output")


def check(layer, found):
    random = np.random.default_rng(5).standard_normal
    query, key, value = random((2, 5, E)), random((2, 7, KDIM)), random((2, 7, VDIM))
    wanted = keras_attention(found, query, key, value)
    result = layer(query, key, value)
    np.testing.assert_allclose(result.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)


# -- files as Keras lays them out --------------------------------------------------------------------


def require_h5py():
    return pytest.importorskip("h5py", reason="the extra edgeattn[checkpoints] brings h5py")


def write_weights(file, layers, private=False, named=True):
    """model.weights.h5 of Keras 3: {path in the file: (name of the layer, its variables)}."""
    with require_h5py().File(file, "w") as content:
        for path, (name, found) in layers.items():
            content.create_group(f"{path}/vars")
            if named:
                content[f"{path}/vars"].attrs["name"] = name
            for variable, array in found.items():
                part, kind = variable.split("/")
                part = "output" if part == "attention_output" else part
                place = f"{path}/{'_' if private else ''}{part}_dense/vars/{('kernel', 'bias').index(kind)}"
                content[place] = array
            content[f"{path}/_dropout_layer/seed_generator/vars/0"] = np.zeros(2, np.uint32)
            content.create_group(f"{path}/_softmax/vars").attrs["name"] = "softmax"
        content["layers/dense/vars/0"] = np.ones((2, 2), np.float32)


def write_keras(path, layers, **settings):
    weights = io.BytesIO()
    write_weights(weights, layers)
    config = {
        "class_name": "Functional",
        "config": {
            "layers": [
                {"class_name": "MultiHeadAttention", "config": {"name": name, "attention_axes": [1], **settings}}
                for name, _ in layers.values()
            ]
        },
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights.getvalue())
    return path


def write_legacy(path, layers, suffix=""):
    with require_h5py().File(path, "w") as content:
        for name, found in layers.items():
            for variable, array in found.items():
                content[f"model_weights/{name}/{name}/{variable}{suffix}"] = array
    return path


# -- what is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, bias):
    found = variables(name, bias)
    heads, kv_heads, value_dim, output = LAYERS[name]
    layer = MultiHeadAttention.from_keras(found)
    check(layer, found)
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.value_dim) == (heads, kv_heads, D, value_dim)
    assert layer.output_dim == np.prod(output)
    assert (layer.q_bias is not None) == bias


@pytest.mark.parametrize("bias", [True, False])
def test_a_list_as_get_weights_returns_it(tmp_path, bias):
    found = variables("grouped", bias)
    check(MultiHeadAttention.from_keras(list(found.values())), found)
    np.savez(tmp_path / "list.npz", *found.values())
    check(MultiHeadAttention.from_keras(tmp_path / "list.npz"), found)


def test_unnamed_arrays_stay_in_order(tmp_path):
    """arr_10 comes before arr_2 in the alphabet: only the number tells the order."""
    arrays = [np.full(1, i, np.float32) for i in range(12)]
    np.savez(tmp_path / "list.npz", *arrays)
    with pytest.raises(ValueError, match="list.npz must hold the 4 kernels .* got 12 arrays"):
        MultiHeadAttention.from_keras(tmp_path / "list.npz")


@pytest.mark.parametrize("layer", ["first", "model/first", "model/first/"])
def test_names_with_a_path(tmp_path, layer):
    found, other = variables(), variables("grouped")
    state = {f"model/first/{name}": array for name, array in found.items()}
    state |= {f"model/second/{name}": array for name, array in other.items()}
    state["model/dense/kernel"] = np.ones((2, 2), np.float32)
    check(MultiHeadAttention.from_keras(state, layer), found)
    np.savez(tmp_path / "model.npz", **state)
    check(MultiHeadAttention.from_keras(str(tmp_path / "model.npz"), layer), found)


FIRST, SECOND = "layers/multi_head_attention", "layers/multi_head_attention_1"


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("layer", ["mine", SECOND])
def test_weights_files(tmp_path, private, layer):
    """The name given in Python finds the layer, whatever number Keras gave it in the file."""
    found = variables("value_dim")
    path = tmp_path / "model.weights.h5"
    write_weights(path, {FIRST: ("multi_head_attention_1", variables()), SECOND: ("mine", found)}, private)
    check(MultiHeadAttention.from_keras(path, layer), found)


def test_weights_files_of_before_keras_named_layers(tmp_path):
    found = variables()
    path = tmp_path / "model.weights.h5"
    write_weights(path, {FIRST: ("", found)}, named=False)
    check(MultiHeadAttention.from_keras(path, "multi_head_attention"), found)


def test_keras_files(tmp_path):
    require_h5py()
    found = variables("grouped")
    path = write_keras(tmp_path / "model.keras", {"layers/block/more/grouped_query_attention": ("att", found)})
    check(MultiHeadAttention.from_keras(path), found)
    check(MultiHeadAttention.from_keras(str(path), "att"), found)


@pytest.mark.parametrize("suffix", ["", ":0"])
def test_legacy_files(tmp_path, suffix):
    require_h5py()
    found = variables()
    path = write_legacy(tmp_path / "model.h5", {"first": found, "second": variables("grouped")}, suffix)
    check(MultiHeadAttention.from_keras(path, "first"), found)


def test_bfloat16_is_read_exactly(tmp_path):
    h5py = require_h5py()
    found = variables()
    path = tmp_path / "model.weights.h5"
    write_weights(path, {FIRST: ("a", found)})
    halves = {name: array.view(np.uint32) & 0xFFFF0000 for name, array in found.items()}
    with h5py.File(path, "a") as content:
        for part in PARTS:
            stored = f"{FIRST}/{part.replace('attention_', '')}_dense/vars/0"
            del content[stored]
            raw = (halves[f"{part}/kernel"] >> 16).astype(np.uint16).view("V2")
            content.create_dataset(stored, data=raw).attrs["dtype"] = "bfloat16"
    layer = MultiHeadAttention.from_keras(path)
    wanted = halves["query/kernel"].view(np.float32).reshape(E, H * D).T
    np.testing.assert_array_equal(layer.q_weight, wanted)


def test_one_head():
    kernel = np.ones((E, 1, D), np.float32)
    found = {f"{part}/kernel": kernel for part in PARTS[:3]} | {"attention_output/kernel": np.ones((1, D, E), np.float32)}
    assert type(SelfAttention.from_keras(found)) is SelfAttention
    with pytest.raises(ValueError, match="num_heads must be 1 for SelfAttention, got 4"):
        SelfAttention.from_keras(variables())


# -- what is refused -----------------------------------------------------------------------------------


def test_everything_wrong_at_once():
    found = variables("grouped")
    del found["key/bias"]
    found["value/kernel"] = found["value/kernel"][:, :1]
    found["attention_output/kernel"] = found["attention_output/kernel"][0]
    found["query/lora_a"] = np.ones(3, np.float32)
    with pytest.raises(ValueError) as error:
        MultiHeadAttention.from_keras({f"a/{name}": array for name, array in found.items()})
    assert str(error.value) == (
        "weights does not hold the attention layer expected under prefix 'a/': missing: a/key/bias; "
        "unexpected: a/query/lora_a; mis-shaped: a/value/kernel must be (4, 2, 3), got (4, 1, 3), "
        "a/attention_output/kernel must be (4, 3, any), got (3, 6)"
    )


@pytest.mark.parametrize("form", ["list", "names", "weights.h5", "keras"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["plain", "value_dim", "grouped"])
def test_gates_are_read(form, bias, name, tmp_path):
    found = variables(name, bias, gate=True)
    if form == "weights.h5":
        write_weights(tmp_path / "model.weights.h5", {FIRST: ("att", found)})
    given = {
        "list": lambda: list(found.values()), "names": lambda: found,
        "weights.h5": lambda: tmp_path / "model.weights.h5",
        "keras": lambda: write_keras(tmp_path / "model.keras", {FIRST: ("att", found)})}[form]()
    layer = MultiHeadAttention.from_keras(given)
    assert layer.gated
    check(layer, found)


def test_gates_of_another_size_are_refused():
    found = variables("value_dim", gate=True)
    found["gate/kernel"] = found["query/kernel"]
    with pytest.raises(ValueError, match=r"mis-shaped: gate/kernel must be \(6, 4, 2\), got \(6, 4, 3\)"):
        MultiHeadAttention.from_keras(found)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (None, ValueError, r"layer must be given; attention layers of weights: 'a' \(named 'a'\), 'm/b' \(named 'b'\)"),
        ("c", ValueError, r"layer must name one attention layer, got 'c'; attention layers of weights: 'a'"),
        (2, TypeError, "layer must be a string, got 2"),
    ],
)
def test_unclear_layers_are_refused(layer, error, message):
    state = {f"{path}/{name}": array for path in ("a", "m/b") for name, array in variables().items()}
    with pytest.raises(error, match=message):
        MultiHeadAttention.from_keras(state, layer)


def test_a_checkpoint_without_attention():
    with pytest.raises(ValueError, match="layer must be given; attention layers of weights: none"):
        MultiHeadAttention.from_keras({"dense/kernel": np.ones((2, 2), np.float32)})


def test_a_name_used_twice_needs_a_path(tmp_path):
    path = tmp_path / "model.weights.h5"
    write_weights(path, {FIRST: ("att", variables()), SECOND: ("att", variables("grouped"))})
    with pytest.raises(ValueError, match="layer must name one attention layer, got 'att'"):
        MultiHeadAttention.from_keras(path, "att")
    assert MultiHeadAttention.from_keras(path, SECOND).num_kv_heads == 2


def test_a_window_is_told(tmp_path):
    require_h5py()
    path = write_keras(tmp_path / "model.keras", {FIRST: ("att", variables())}, sliding_window=3)
    with pytest.warns(UserWarning, match="layer 'att' has sliding_window=3; pass each call window_size=.2, 2.") as told:
        check(MultiHeadAttention.from_keras(path), variables())
    assert told[0].filename == __file__


def test_other_attention_axes_are_refused(tmp_path):
    require_h5py()
    path = write_keras(tmp_path / "model.keras", {FIRST: ("att", variables())}, attention_axes=[2])
    with pytest.raises(ValueError, match=r"layer 'att' attends over axes \[2\]"):
        MultiHeadAttention.from_keras(path)


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.98])
def test_truncated_files_are_refused_by_name(tmp_path, name, kept):
    require_h5py()
    path = tmp_path / name
    layers = {FIRST: ("att", variables())}
    write_keras(path, layers) if name.endswith(".keras") else write_weights(path, layers)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=rf"{name} is not a whole {path.suffix} file of Keras"):
        MultiHeadAttention.from_keras(path)


def test_a_zip_of_something_else(tmp_path):
    require_h5py()
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", "{")
    with pytest.raises(ValueError, match="model.keras is not a whole .keras file"):
        MultiHeadAttention.from_keras(tmp_path / "model.keras")


def test_data_outside_of_the_file_is_not_read(tmp_path):
    h5py = require_h5py()
    path = tmp_path / "model.weights.h5"
    write_weights(path, {FIRST: ("att", variables())})
    (tmp_path / "secret").write_bytes(bytes(1000))
    with h5py.File(path, "a") as content:
        del content[f"{FIRST}/query_dense/vars/0"]
        content.create_dataset(
            f"{FIRST}/query_dense/vars/0",
            (E, H, D),
            np.float32,
            external=[(str(tmp_path / "secret"), 0, E * H * D * 4)],
        )
    with pytest.raises(ValueError, match="query_dense/vars/0 lies in another file"):
        MultiHeadAttention.from_keras(path)


def test_attributes_that_would_be_read_for_ever_are_read_where_they_are_wanted_and_then_refused(tmp_path):
    require_h5py()
    path = tmp_path / "model.weights.h5"
    write_weights(path, {FIRST: ("att", variables())})
    path.write_bytes(with_circle(path.read_bytes()))
    wanted = variables()["query/kernel"].reshape(E, H * D).T
    for layer in (None, FIRST):
        np.testing.assert_array_equal(MultiHeadAttention.from_keras(path, layer).q_weight, wanted)
    with pytest.raises(ValueError, match="model.weights.h5 is not a whole .h5 file of Keras: its attributes cannot be read"):
        MultiHeadAttention.from_keras(path, "att")


def test_compressed_data_sets_are_refused_with_the_way_out(tmp_path):
    h5py = require_h5py()
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as content:
        content.create_dataset(f"{FIRST}/query_dense/vars/0", data=np.zeros((E, H, D), "f"), compression="gzip")
    with pytest.raises(ValueError, match="query_dense/vars/0 is stored compressed; rewrite the file with h5repack -f NONE"):
        MultiHeadAttention.from_keras(path)


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.npz"])
def test_missing_files_are_the_systems_error(tmp_path, name):
    if not name.endswith("npz"):
        require_h5py()
    with pytest.raises(FileNotFoundError):
        MultiHeadAttention.from_keras(tmp_path / name)


def test_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"reading .*model.keras needs h5py: pip install 'edgeattn\[checkpoints\]'"):
        MultiHeadAttention.from_keras(tmp_path / "model.keras")


def test_a_keras_layer_is_told_what_to_pass():
    class Layer:
        def get_weights(self):
            return []

    with pytest.raises(TypeError, match=r"weights_or_path must be a mapping .*, got Layer; pass its \.get_weights\(\)$"):
        MultiHeadAttention.from_keras(Layer())
    with pytest.raises(TypeError, match="weights_or_path must be a mapping .*, got None$"):
        MultiHeadAttention.from_keras(None)
