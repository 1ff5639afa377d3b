"""Weights of keras.layers.MultiHeadAttention and GroupQueryAttention, from files, names or a plain list.

Keras 3 stores a layer's variables under their place in the model's structure and leaves the layer's own name as
an attribute beside them:

    layers/multi_head_attention_1/query_dense/vars/0      query/kernel (E, H, D)
    layers/multi_head_attention_1/vars                    attribute name = "the name given in Python"

Other files (.npz, legacy .h5) and dictionaries have names such as "encoder/attention/query/kernel".
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import json
import pathlib
import re
import warnings
from typing import TYPE_CHECKING

from edgeattn.files.checkpoints import hdf5
from edgeattn.files.checkpoints.tensors import Tensors, check_source, read_named
from edgeattn.files.paths import listed, reading, reason
from edgeattn.files.stored import Budget, file_size
from edgeattn.files.zip_members import members, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from numpy.typing import ArrayLike, NDArray

    from edgeattn.types import Path

_CLASSES = ("MultiHeadAttention", "GroupQueryAttention", "GroupedQueryAttention")
# As in layer.get_weights(): of each a kernel and, with use_bias=True, a bias.
_PARTS = {"query": "q", "key": "k", "value": "v", "attention_output": "out"}
_GATED_PARTS = {"query": "q", "key": "k", "gate": "gate", "value": "v", "attention_output": "out"}
_PLACES = {f"{part}_dense": part for part in ("query", "key", "value", "gate")} | {"output_dense": "attention_output"}
_STORED = re.compile(rf"(^|/)_?({'|'.join(_PLACES)})/vars/([01])$")
_VARIABLE = re.compile(r"^(?:(.*)/)?(query|key|value|gate|attention_output)/(kernel|bias)$")
# What a layer stores that plays no part in inference.
_STATE = re.compile(r"_?(dropout_layer|softmax|seed_generator)/")
_UNNAMED = re.compile(r"arr_(\d+)$")  # how numpy.savez(path, *arrays) names them


def keras_weights(weights_or_path: Path | Mapping[str, ArrayLike] | Sequence[ArrayLike], layer: str | None = None
                  ) -> tuple[int, int, dict[str, NDArray[Any]]]:
    """Weights of one attention layer of Keras.

    The kernels of query, key and value are (inputs, heads, size), that of attention_output is
    (heads, size, outputs): all become (outputs, inputs). An output_shape of several axes becomes one axis of
    their product. Keras masks mean True = attend, as here; its use_causal_mask aligns the first query with the
    first key: is_causal=True, causal_alignment="upper_left". Keras layers are called (query, value, key), ours
    (query, key, value).

    Parameters
    ----------
    weights_or_path : path, mapping of str to array, or sequence of arrays
        A .keras, .weights.h5 or legacy .h5 file (these need h5py), an .npz or .safetensors file, variables under
        their paths as in {v.path: v.numpy() for v in model.variables}, or layer.get_weights().
    layer : str, optional
        The layer's name in Python, or all that stands before "query/kernel" or "query_dense". Not needed where
        there is one attention layer.

    Returns
    -------
    num_heads, num_kv_heads : int
    weights : dict of str to array
        q_weight, k_weight, v_weight, out_weight, with use_gate=True gate_weight, and the biases where there are any.

    Raises
    ------
    ValueError
        For attention_axes that cannot be expressed; naming the layers that there are; or listing all missing,
        unexpected and mis-shaped tensors.

    Warns
    -----
    UserWarning
        When the file says that the layer has a sliding_window, which here is a window_size of each call.
    """
    if isinstance(weights_or_path, (list, tuple)):
        return _convert(_from_list("weights", weights_or_path))
    check_source("weights_or_path", weights_or_path)
    with _opened(weights_or_path) as (source, stored, settings):
        if stored and all(_UNNAMED.match(name) for name in stored):
            arrays = sorted(stored.items(), key=lambda entry: int(_UNNAMED.match(entry[0])[1]))
            return _convert(_from_list(source, [array for _, array in arrays]))
        tensors, path = _choose(source, stored, settings, layer)
        _check_config(tensors, path, settings)
        return _convert(tensors)


def _convert(tensors):
    """(num_heads, num_kv_heads, weights) once everything is there."""
    parts = _GATED_PARTS if any(name.startswith("gate/") for name in tensors.found) else _PARTS
    heads, size = (tensors.axis("query/kernel", axis, 3) for axis in (1, 2))
    kv_heads = tensors.axis("key/kernel", 1, 3)
    value_size = tensors.axis("value/kernel", 2, 3)
    output = tensors.found.get("attention_output/kernel")
    output = output.shape[2:] if output is not None and output.ndim > 2 else (None,)
    shapes = {
        "query": ((tensors.axis("query/kernel", 0, 3), heads, size), (heads, size)),
        "key": ((tensors.axis("key/kernel", 0, 3), kv_heads, size), (kv_heads, size)),
        "value": ((tensors.axis("value/kernel", 0, 3), kv_heads, value_size), (kv_heads, value_size)),
        "attention_output": ((heads, value_size, *output), output),
        "gate": ((tensors.axis("query/kernel", 0, 3), heads, value_size), (heads, value_size)),
    }
    biased = any(f"{part}/bias" in tensors for part in parts)
    for part in parts:
        kernel, bias = shapes[part]
        tensors.expect(f"{part}/kernel", kernel)
        if biased:
            tensors.expect(f"{part}/bias", bias)
    found = tensors.checked()
    weights = {}
    for part, ours in parts.items():
        kernel = found[f"{part}/kernel"]
        inputs = heads * value_size if part == "attention_output" else kernel.shape[0]
        weights[f"{ours}_weight"] = kernel.reshape(inputs, -1).T
        if biased:
            weights[f"{ours}_bias"] = found[f"{part}/bias"].reshape(-1)
    return heads, kv_heads, weights


def _from_list(source, arrays):
    """Tensors of the arrays of layer.get_weights(), which have no names."""
    forms = {len(parts) * len(variables): [f"{part}/{variable}" for part in parts for variable in variables]
             for parts in (_PARTS, _GATED_PARTS) for variables in (("kernel",), ("kernel", "bias"))}
    names = forms.get(len(arrays))
    if names is None:
        raise ValueError(
            f"{source} must hold the 4 kernels of query, key, value and attention_output, with use_gate=True one of "
            "gate before that of value, or these each followed by its bias, as layer.get_weights() returns them, got "
            f"{len(arrays)} arrays"
        )
    return Tensors(source, "", dict(zip(names, arrays, strict=True)))


@contextlib.contextmanager
def _opened(weights_or_path):
    """(source, stored tensors by name, `_Settings` of the layers) while the file is open."""
    path = None if isinstance(weights_or_path, collections.abc.Mapping) else weights_or_path
    suffix = pathlib.Path(path).suffix if isinstance(path, (str, pathlib.PurePath)) else ""
    if suffix not in (".keras", ".h5"):
        source, stored, _ = read_named(weights_or_path)
        yield "weights" if path is None else source, stored, _Settings()
        return
    h5py, guarded = _import_h5py(path), functools.partial(reading, path, f"{suffix} file of Keras")
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(open(path, "rb"))
        with guarded():
            budget = Budget(file_size(file))
            if suffix == ".keras":
                parts = members(file)
                config = _configs(json.loads(_part(file, parts, "config.json", budget)))
                within = _part(file, parts, "model.weights.h5", budget)
                content = opened.enter_context(hdf5.open_bytes(within))
            else:
                within = path
                content = opened.enter_context(h5py.File(file, "r"))
                config = None if h5py.h5a.exists(content.id, b"model_config") else []
            stored = hdf5.data_sets(content, budget, guarded)
        yield str(path), stored, _Settings(guarded, within, config)


def _part(file, parts, name, budget):
    """A member of a .keras file."""
    if name not in parts:
        raise ValueError(f"it has no member {name!r}")
    budget.take(parts[name].file_size, name)
    return unpack(file, parts[name])


class _Settings:
    """What a file says of its layers beside their weights; of an HDF5 file's attributes no more than is asked for.

    Parameters
    ----------
    guarded : callable, optional
        () -> the context in which the file is read.
    within : path or bytes, optional
        The HDF5 file.
    configs : list of dict, optional
        Settings of all attention layers; None where an attribute of the HDF5 file may hold them.
    """

    def __init__(self, guarded=contextlib.nullcontext, within=None, configs=()):
        self._guarded, self._within, self._given = guarded, within, configs

    @functools.cached_property
    def _attributes(self):
        with self._guarded():
            return ({}, None) if self._within is None else hdf5.attributes(self._within)

    def name(self, path):
        """The name in Python of the layer at a path."""
        return self._attributes[0].get(path, path.rpartition("/")[2])

    @functools.cached_property
    def configs(self):
        """Settings of attention layers."""
        if self._given is not None:
            return self._given
        with self._guarded():
            return [] if self._attributes[1] is None else _configs(json.loads(self._attributes[1]))


def _import_h5py(path):
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading {path} needs h5py: pip install 'edgeattn[checkpoints]'") from error
    return h5py


def _choose(source, stored, settings, wanted):
    """(tensors of the wanted attention layer, its path)."""
    if wanted is not None and not isinstance(wanted, str):
        raise TypeError(f"layer must be a string, got {wanted!r}")
    variables = {_variable(name): name for name in stored}
    parts = {name: _VARIABLE.match(name) for name in variables}
    paths = sorted(
        {found[1] or "" for found in parts.values() if found and found[2] in ("query", "attention_output")}
    )
    if wanted is None:
        chosen = paths
    else:
        chosen = [path for path in paths if path == wanted.strip("/")]
        chosen = chosen or [path for path in paths if settings.name(path) == wanted]
    if len(chosen) != 1:
        known = listed(f"{path!r} (named {settings.name(path)!r})" for path in paths) or "none"
        asked = "layer must be given" if wanted is None else f"layer must name one attention layer, got {wanted!r}"
        raise ValueError(f"{asked}; attention layers of {source}: {known}")
    prefix = f"{chosen[0]}/" if chosen[0] else ""
    found = {
        name[len(prefix) :]: stored[original]
        for name, original in variables.items()
        if name.startswith(prefix) and not _STATE.match(name[len(prefix) :])
    }
    return Tensors(source, prefix, found), chosen[0]


def _variable(name):
    """The path of a variable in Python, whatever the file calls it."""
    name = name.removesuffix(":0")
    return _STORED.sub(lambda m: f"{m[1]}{_PLACES[m[2]]}/{('kernel', 'bias')[int(m[3])]}", name)


def _configs(node):
    """Settings of all attention layers anywhere in a model's configuration."""
    if isinstance(node, list):
        return [config for entry in node for config in _configs(entry)]
    if not isinstance(node, dict):
        return []
    found = [config for entry in node.values() for config in _configs(entry)]
    if node.get("class_name") in _CLASSES and isinstance(node.get("config"), dict):
        found.append(node["config"])
    return found


def _check_config(tensors, path, settings):
    """What the settings of a layer say that its weights do not."""
    telling = [config for config in settings.configs
               if config.get("attention_axes") not in (None, [1]) or config.get("sliding_window") is not None]
    if not telling:
        return
    name = settings.name(path)
    telling = [config for config in telling if config.get("name") == name]
    axes = [config["attention_axes"] for config in telling if config.get("attention_axes") not in (None, [1])]
    if axes:
        raise ValueError(
            f"{tensors.source}: layer {name!r} attends over axes {reason(axes[0])}, "
            "edgeattn layers over the one axis of (B, L, E)"
        )
    windows = [config["sliding_window"] for config in telling]
    if windows and type(windows[0]) is not int:
        raise ValueError(f"{tensors.source}: layer {name!r} must have an integer as its sliding_window, got "
                         f"{reason(windows[0])}")
    if windows:
        warnings.warn(
            f"{tensors.source}: layer {name!r} has sliding_window={windows[0]}; pass each call "
            f"window_size=({windows[0] - 1}, {windows[0] - 1})",
            stacklevel=4,
        )
