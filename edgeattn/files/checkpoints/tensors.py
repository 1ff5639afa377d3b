"""The named tensors of a checkpoint: how they are read, and one error about all that is wrong with them."""

import collections.abc
import os
import pathlib

import numpy as np

from edgeattn.checks import count, float_array
from edgeattn.files.paths import listed, reason
from edgeattn.files.stored import StoredTensor
from edgeattn.files.tensor_files import read_tensors

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Before 2.6 a made-up file could run code in spite of weights_only=True (CVE-2025-32434).
_SAFE_TORCH = (2, 6)
_SHOWN = 4  # names of tensors that are not what was looked for


class Tensors:
    """The tensors under a prefix, what is expected of them, and what is wrong with them.

    Parameters
    ----------
    source : str
        What holds them, for errors.
    prefix : str
        What stood before their names.
    found : dict of str to array or StoredTensor
        Under their names without the prefix.
    """

    def __init__(self, source, prefix, found):
        self.source, self.prefix = source, prefix
        # what lies in a file stays there until its shape is found right
        self.found = {name: tensor if isinstance(tensor, StoredTensor) else as_array(prefix + name, tensor)
                      for name, tensor in found.items()}
        self.expected = {}

    def __contains__(self, name):
        return name in self.found

    def axis(self, name, axis, axes=2):
        """Length of an axis, None if the tensor is missing or has another number of axes."""
        tensor = self.found.get(name)
        return tensor.shape[axis] if tensor is not None and tensor.ndim == axes else None

    def expect(self, name, shape):
        """Ask for a tensor; an axis of None could not be known and fits everything."""
        self.expected[name] = shape

    def checked(self, ignored=(), what="attention layer"):
        """All expected tensors, or one error about all that is wrong."""
        missing = [self.prefix + name for name in self.expected if name not in self.found]
        unexpected = [
            self.prefix + name for name in self.found if name not in self.expected and name not in ignored
        ]
        if len(missing) == len(self.expected) and unexpected:
            raise ValueError(f"{self.source} holds no {what} under prefix {self.prefix!r}, which has {missing[0]}; "
                             f"{other_names([self.prefix + name for name in self.found])}")
        misshaped = []
        for name, shape in self.expected.items():
            if name in self.found and not _fits(self.found[name].shape, shape):
                wanted = ", ".join("any" if axis is None else str(axis) for axis in shape)
                misshaped.append(f"{self.prefix}{name} must be ({wanted}), got {self.found[name].shape}")
        wrong = [
            f"{title}: {listed(entries)}"
            for title, entries in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("mis-shaped", misshaped),
            )
            if entries
        ]
        if wrong:
            raise ValueError(
                f"{self.source} does not hold the {what} expected under prefix "
                f"{self.prefix!r}: " + "; ".join(wrong)
            )
        return {name: float_array(self.prefix + name, as_array(self.prefix + name, self.found[name]))
                for name in self.expected}


def open_state_dict(state_dict_or_path, prefix, *landmarks):
    """Tensors under a prefix of a state dict or of a file that holds one.

    Parameters
    ----------
    state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
    prefix : str
    *landmarks : str
        Names that tell, where the prefix fits nothing or too much, which prefixes would do.

    Returns
    -------
    Tensors
    """
    check_source("state_dict_or_path", state_dict_or_path)
    source, found, names = read_named(state_dict_or_path, prefix)
    prefixes = prefixes_of(names, *landmarks)
    longer = [each for each in prefixes if each.startswith(prefix)]
    if not found or (longer and prefix not in longer):
        fits = "no attention layer" if found else "no tensor"
        way_out = (f"prefixes with {' or '.join(landmarks)}: [{listed(map(repr, longer or prefixes))}]" if prefixes else
                   other_names(names))
        raise ValueError(f"prefix {prefix!r} fits {fits} in {source}; {way_out}")
    return Tensors(source, prefix, {name[len(prefix) :]: tensor for name, tensor in found.items()})


def prefixes_of(names, *landmarks):
    """What stands before names that end so, sorted."""
    return sorted({name[: -len(end)] for name in names for end in landmarks if name.endswith(end)})


def other_names(names):
    """For an error: what a checkpoint of names that are not those looked for may be, and what reads it."""
    if not names:
        return "it is empty"
    of_torch = prefixes_of(names, "in_proj_weight")
    if of_torch:
        return f"its names are those that from_torch reads, under the prefixes [{listed(map(repr, of_torch))}]"
    shown = listed([*sorted(names)[:_SHOWN], *["..."][:len(names) > _SHOWN]])
    return (f"its names are [{shown}]; MultiHeadAttention.from_checkpoint knows those of many families, "
            "edgeattn.from_pretrained a model's folder")


def check_source(name, value):
    """Raise unless `value` is a mapping or a path; for a framework's module, with how to get its tensors."""
    if isinstance(value, (collections.abc.Mapping, str, os.PathLike)):
        return
    way_out = ""
    for method in ("state_dict", "get_weights"):
        if callable(getattr(value, method, None)):
            way_out = f"; pass its .{method}()"
            break
    given = "None" if value is None else type(value).__name__
    raise TypeError(
        f"{name} must be a mapping of names to arrays, or the path of a file with them, got {given}{way_out}")


def read_named(state_dict_or_path, prefix=""):
    """(source, tensors whose names start with `prefix`, all names) of a mapping or a file."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {prefix!r}")
    if isinstance(state_dict_or_path, collections.abc.Mapping):
        source, tensors = "state_dict", state_dict_or_path
    elif _suffix(state_dict_or_path) in _TORCH_SUFFIXES:
        source, tensors = str(state_dict_or_path), _read_torch(state_dict_or_path)
    else:
        return (str(state_dict_or_path), *read_tensors(state_dict_or_path, prefix))
    names = [name for name in tensors if isinstance(name, str)]
    return source, {name: tensors[name] for name in names if name.startswith(prefix)}, names


def as_array(name, tensor):
    """A tensor of any library as a NumPy array; bfloat16, which NumPy lacks, as the same numbers in float32."""
    if isinstance(tensor, StoredTensor):
        return tensor.read()
    # A tensor library says in its own words, and its own exceptions, why an array cannot be had of it.
    try:
        if callable(getattr(tensor, "detach", None)):  # a torch parameter
            tensor = tensor.detach().cpu()
            if str(tensor.dtype) == "torch.bfloat16":
                tensor = tensor.float()
        array = np.asarray(tensor)
    except Exception as error:
        raise TypeError(f"{name!r} cannot be read as a NumPy array: {error}") from error
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def times(factor, length):
    """A multiple of an axis, None if that is not known."""
    return None if length is None else factor * length


def check_heads(num_heads, width):
    """Raise unless a width splits into so many heads."""
    if width % count("num_heads", num_heads):
        raise ValueError(f"num_heads must divide the width {width} of the projections, got {num_heads}")


def _fits(given, wanted):
    return len(given) == len(wanted) and all(axis in (None, length) for axis, length in zip(wanted, given, strict=True))


def _suffix(path):
    try:
        return pathlib.Path(path).suffix
    except TypeError:
        return None  # read_tensors says what a path must be


def _read_torch(path):
    """The state dict of a file that torch.save wrote, which is a pickle: only torch's own safe reader may touch it."""
    with open(path, "rb"):
        pass  # a missing or forbidden file is the operating system's error, not a missing package
    way_out = "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a pickle of torch, which only torch itself reads safely, and torch cannot be imported "
            f"({error}); convert the file where torch is installed: {way_out}"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _SAFE_TORCH:
        raise ImportError(
            f"{path} is a pickle, and torch before 2.6 can be made to run code by one, got torch {torch.__version__}; "
            f"update torch, or convert a file that you trust: {way_out}"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # the rest of torch's message advises to load the file unsafely
        said = reason(error).split(". ")[0].split(", ")[0]
        raise ValueError(f"{path} is not a whole file of tensors alone, as torch.save writes it: {said}") from error
    if not isinstance(state, collections.abc.Mapping):
        raise ValueError(f"{path} must hold a state dict, got {type(state).__name__}; save layer.state_dict()")
    inner = [name for name, entry in state.items() if isinstance(entry, collections.abc.Mapping)]
    if inner:
        raise ValueError(
            f"{path} must hold a state dict alone, got mappings under {inner}; pass the one that is meant: "
            f"torch.load(path, weights_only=True)[{inner[0]!r}]"
        )
    return state
