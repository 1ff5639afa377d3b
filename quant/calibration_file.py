"""Calibrations as .safetensors files: a header among the metadata, and tensors."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, NamedTuple

import safetensors.numpy

from edgeattn.files.paths import reading, write_atomic
from edgeattn.files.safetensors_file import read_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.files.stored import StoredTensor
    from edgeattn.types import Path


class Kind(NamedTuple):
    """A kind of calibration: where its header lies, its format's number, and what it is called."""

    key: str
    format: int
    name: str

    def write(self, path: Path, header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> None:
        """Write a file, whole or not at all.

        Raises
        ------
        ValueError
            Where `path` does not end in ".safetensors".
        """
        path = os.fspath(path)
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"path must end in .safetensors; got {str(path)!r}")
        metadata = {self.key: json.dumps({"format": self.format, **header}, sort_keys=True)}
        write_atomic(path, safetensors.numpy.save(dict(tensors), metadata=metadata))

    def is_in(self, path: Path) -> bool:
        """Whether a file calls itself one; False for a damaged file, too."""
        try:
            return self.key in read_safetensors(path)[0]
        except ValueError:
            return False

    @contextlib.contextmanager
    def read(self, path: Path, written_by: str) -> Iterator[tuple[dict[str, Any], dict[str, StoredTensor]]]:
        """The header and the tensors of a file; a ValueError of the ``with`` statement's body names the file.

        Raises
        ------
        OSError
            When the file cannot be read.
        ValueError
            When it is truncated or of another kind.
        """
        with open(path, "rb"):
            pass  # a missing or forbidden file is the operating system's error, not a damaged file
        with reading(path, f"{self.name}, as {written_by}"):
            metadata, tensors = read_safetensors(path)
            if self.key not in metadata:
                raise ValueError(f"its metadata name no {self.name}")
            header = json.loads(metadata[self.key])
            if not isinstance(header, dict) or header.get("format") != self.format:
                raise ValueError(f"its format must be {self.format}: calibrate again, for what is counted has changed")
            yield header, tensors
