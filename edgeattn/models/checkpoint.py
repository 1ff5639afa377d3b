"""A folder with config.json and .safetensors files: its options, its tensors, and one error about all that is wrong."""

from __future__ import annotations

import errno
import json
import math
import os
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import to_float32
from edgeattn.files.paths import listed, reading
from edgeattn.files.safetensors_file import read_safetensors
from edgeattn.layers.linear import Linear
from edgeattn.layers.norm import LayerNorm

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from typing import Any

    from edgeattn.files.stored import StoredTensor
    from edgeattn.types import Float32s

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_SIZE = 2**24
_LARGEST_NUMBER = 1e30
_MOST_WRONG = 20
_LARGEST_DUMMY = 2**20
# What transformers called these before.
_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def read_json(path: Path, kind: type = dict) -> Any:
    """What a file of JSON holds.

    Raises
    ------
    OSError
        When it cannot be read.
    ValueError
        Naming the file, where it is damaged or does not hold a `kind`.
    """
    with open(path, "rb") as file, reading(path, "file of JSON"):
        value = json.loads(file.read())
        if not isinstance(value, kind):
            raise ValueError(f"it must hold a {kind.__name__}, got a {type(value).__name__}")
        return value


class Checkpoint:
    """The options and tensors of a folder.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "config.json"
        if not self.file.exists():
            said = os.strerror(errno.ENOENT)
            raise FileNotFoundError(errno.ENOENT, f"{said}; a model's folder holds one, as transformers and "
                                    "sentence-transformers save it", str(self.file))
        self.config: dict[str, Any] = read_json(self.file)
        self.source, self._tensors = _read_weights(folder)
        self._taken: set[str] = set()
        self._wrong: dict[str, list[str]] = {"missing": [], "mis-shaped": []}
        self._prefix = ""

    def strip(self, prefixes: Iterable[str], ignored: Iterable[str]) -> None:
        """Take only the tensors under the first of `prefixes` that there are any of; heads, which end or begin as
        `ignored`, are left.
        """
        self._prefix = next((prefix for prefix in prefixes if prefix and any(
            name.startswith(prefix) for name in self._tensors)), "")
        for name in self._tensors:
            short = name.removeprefix(self._prefix)
            if any(short.startswith(part) or short.endswith(part) for part in ignored):
                self._taken.add(name)

    def option(self, *names: str, default: Any = None) -> Any:
        """The first of these options that is there and not null; an error where there is none and no default."""
        for name in names:
            if self.config.get(name) is not None:
                return self.config[name]
        if default is None:
            raise ValueError(f"{self.file} must say {' or '.join(names)}, and does not")
        return default

    def size(self, *names: str, default: int | None = None) -> int:
        """An option that is a positive integer."""
        value = self.option(*names, default=default)
        if type(value) is not int or not 1 <= value <= _LARGEST_SIZE:
            given = next((name for name in names if self.config.get(name) is not None), names[0])
            raise ValueError(f"{self.file}: {given} must be an integer from 1 to {_LARGEST_SIZE}, got "
                             f"{str(value)[:100]}")
        return value

    def sizes(self, name: str) -> tuple[int, int]:
        """An option that is one positive integer or two."""
        value = self.option(name)
        pair = value if isinstance(value, list) else [value, value]
        if len(pair) != 2 or not all(type(size) is int and 1 <= size <= _LARGEST_SIZE for size in pair):
            raise ValueError(f"{self.file}: {name} must be one or two positive integers, got {str(value)[:100]}")
        return pair[0], pair[1]

    def number(self, *names: str, default: float | None = None) -> float:
        """An option that is a number greater than 0."""
        value = self.option(*names, default=default)
        return self.positive(names[0], value)

    def positive(self, name: str, value: object) -> float:
        """The value of an option `name`, if it is a number greater than 0."""
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= _LARGEST_NUMBER:
            raise ValueError(f"{self.file}: {name} must be a number greater than 0, and at most {_LARGEST_NUMBER}, got "
                             f"{str(value)[:100]}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """An option that is true or false."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{self.file}: {name} must be true or false, got {str(value)[:100]}")
        return default if value is None else value

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def take(self, name: str, *shape: int | None) -> Float32s:
        """A tensor; None in `shape` is any length. What is missing or mis-shaped is told by `finish`, or soon."""
        name = self._prefix + name
        self._taken.add(name)
        tensor, wanted = self._tensors.get(name), [1 if axis is None else axis for axis in shape]
        if tensor is not None and len(tensor.shape) == len(shape) and all(
                axis in (None, length) for axis, length in zip(shape, tensor.shape, strict=True)):
            array = tensor.read()
            if array.dtype.kind != "f":
                raise ValueError(f"{self.source}: {name} must be a float16, float32 or float64 array, or bfloat16, got "
                                 f"dtype {array.dtype}; use the weights of the float model")
            array = to_float32(array)
            if not np.isfinite(array).all():
                raise ValueError(f"{self.source}: {name} holds NaN or infinity as float32: the file is damaged, or its "
                                 "training failed")
            return array
        if tensor is None:
            self._wrong["missing"].append(name)
        else:
            shown = ", ".join("any" if axis is None else str(axis) for axis in shape)
            self._wrong["mis-shaped"].append(f"{name} must be ({shown}) by config.json, got {tensor.shape}")
        if math.prod(wanted) > _LARGEST_DUMMY or sum(map(len, self._wrong.values())) >= _MOST_WRONG:
            self._raise([])
        return np.zeros(wanted, np.float32)

    def linear(self, name: str, outputs: int, inputs: int, *, bias: bool = True, transposed: bool = False) -> Linear:
        """A Linear; `transposed` is how transformers' Conv1D stores it."""
        weight = self.take(f"{name}.weight", *((inputs, outputs) if transposed else (outputs, inputs)))
        return Linear(weight.T if transposed else weight, self.take(f"{name}.bias", outputs) if bias else None)

    def norm(self, name: str, features: int, eps: float, *, bias: bool = True) -> LayerNorm:
        """A LayerNorm."""
        return LayerNorm(self.take(f"{name}.weight", features), self.take(f"{name}.bias", features) if bias else None,
                         eps)

    def finish(self, *, whole: bool = True) -> None:
        """Raise one error about all tensors that were missing, mis-shaped, or of a `whole` model not asked for."""
        unexpected = [name for name in self._tensors if whole and name not in self._taken]
        if unexpected or any(self._wrong.values()):
            self._raise(unexpected)

    def _raise(self, unexpected: Sequence[str]) -> None:
        wrong = "; ".join(f"{title}: {listed(names)}" for title, names in
                          {**self._wrong, "unexpected": unexpected}.items() if names)
        raise ValueError(f"{self.source} does not hold the {self.config.get('model_type')} model that {self.file} "
                         f"describes; {wrong}; use the config.json that was saved with these weights")


def _read_weights(folder: Path) -> tuple[Path, dict[str, StoredTensor]]:
    """(what to call them in errors, tensors by name) of the folder's .safetensors files."""
    index, whole = folder / INDEX, folder / WEIGHTS
    if whole.is_file() or not index.is_file():
        if not whole.is_file():
            others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".safetensors", ".h5"))
            raise FileNotFoundError(
                f"{folder} must hold {WEIGHTS} or {INDEX}, got [{listed(others)}]; model.save_pretrained(folder) of "
                "transformers writes it")
        return whole, _renamed(whole, read_safetensors(whole)[1])
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
            isinstance(name, str) and "/" not in name and "\\" not in name and name.endswith(".safetensors")
            for name in places.values()):
        raise ValueError(f"{index} must have a weight_map of tensors to .safetensors files beside it")
    found = {}
    for name in sorted(set(places.values())):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not in {folder}; copy all parts of the checkpoint")
        found.update(read_safetensors(folder / name)[1])
    absent = sorted(set(places) - set(found))
    if absent:
        raise ValueError(f"{index} names tensors that its files do not hold: {listed(absent)}")
    return index, _renamed(index, found)


def _renamed(source: Path, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    for old, new in _RENAMED.items():
        for name in tensors:
            other = name.removesuffix(old) + new
            if name.endswith(old) and other in tensors:
                raise ValueError(f"{source} holds {name} and {other}, which are two names of one tensor; remove the "
                                 "one that is not the model's")
        tensors = {name.removesuffix(old) + new if name.endswith(old) else name: tensor
                   for name, tensor in tensors.items()}
    return tensors
