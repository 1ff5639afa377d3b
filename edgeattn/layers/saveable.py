"""What has a state, settings and tensors: its size, its equals, its copies and its file."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.hints import hinted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from typing_extensions import Self

    from edgeattn.types import Path


class Saveable:
    """A layer or model that is what its state says: equal to each that has the same, and built again from it."""

    if TYPE_CHECKING:
        def to_state(self) -> tuple[dict[str, Any], dict[str, Any]]: ...  # noqa: D102

        @classmethod
        def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Self: ...  # noqa: D102

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = hinted(cls.__init__)  # type: ignore[method-assign]

    def save(self, path: Path) -> None:
        """Write it to a .safetensors file, as `edgeattn.save` does.

        Parameters
        ----------
        path : str or path
            Ends in ".safetensors". An existing file is replaced, by a whole one.

        Raises
        ------
        TypeError, ValueError
            For another suffix, and for weights that hold NaN or infinity.
        """
        # By name: files are above layers.
        importlib.import_module("edgeattn.files.storage").save(self, path)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, as a file holds them; what kernels pack of them is about as much again."""
        return sum(np.asarray(tensor).nbytes for tensor in self.to_state()[1].values())

    def __eq__(self, other: object) -> bool:
        """Whether `other` is of this class, with the same settings and the same numbers in the same dtypes."""
        if self is other:
            return True
        if type(other) is not type(self):
            return NotImplemented
        (config, tensors), (other_config, other_tensors) = self.to_state(), other.to_state()
        return (_text(config) == _text(other_config) and tensors.keys() == other_tensors.keys()
                and all(_equal(np.asarray(tensor), np.asarray(other_tensors[name]))
                        for name, tensor in tensors.items()))

    def __hash__(self) -> int:
        return hash((type(self).__name__, _text(self.to_state()[0])))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold what a file holds: kernels belong to the process."""
        return type(self).from_state, self.to_state()


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def _equal(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
