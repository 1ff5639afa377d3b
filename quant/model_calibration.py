"""Run a whole encoder over sample data and remember how large the inputs of its linear layers become."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.executors.compiled import CompiledOps
from quant.calibration_file import Kind
from quant.model_calls import encoder_of, on, read_model_calls

if TYPE_CHECKING:
    from typing import Any

    from edgeattn.layers import Linear, TransformerEncoder
    from edgeattn.ops import Sequences
    from edgeattn.types import Float32s, Path
    from quant.model_calls import Model
    from quant.types import ModelBatch

_FILE = Kind("quant.model_calibration", 1, "calibration of a model")


@dataclass(eq=False)
class ModelCalibration:
    """What ``calibrate`` saw of a whole encoder or model; give it to ``quantize``.

    Mergeable: ``a.merge(b)`` is calibration on both data sets, bit for bit, however they were cut.

    Attributes
    ----------
    encoder : str
        Checksum of the encoder's layers.
    tokens : int
        How many were seen.
    largest : dict of float32 (inputs,)
        By the name of a linear layer of a feed-forward, "layers.0.feed_forward.linear1": the largest magnitude of each
        of its inputs. A layer that stands in several places has the name of the first.
    """

    encoder: str
    tokens: int = 0
    largest: dict[str, Float32s] = field(default_factory=dict)

    def merge(self, other: ModelCalibration) -> ModelCalibration:
        """Calibration on the data of both.

        Raises
        ------
        TypeError
            When ``other`` is no ModelCalibration.
        ValueError
            When the two saw different encoders.
        """
        if not isinstance(other, ModelCalibration):
            raise TypeError(f"other must be a quant.ModelCalibration; got {type(other).__name__}")
        if self.encoder != other.encoder:
            raise ValueError("cannot merge calibrations of different encoders")
        return ModelCalibration(self.encoder, self.tokens + other.tokens, {
            name: np.maximum(largest, other.largest[name]) for name, largest in self.largest.items()})

    def save(self, path: Path) -> None:
        """Write to a .safetensors file, whole or not at all.

        Parameters
        ----------
        path : str or path-like
            Ends in ".safetensors". An existing file is replaced.
        """
        _FILE.write(path, {"encoder": self.encoder, "tokens": self.tokens}, self.largest)

    @classmethod
    def load(cls, path: Path) -> ModelCalibration:
        """Read what ``save`` wrote.

        Raises
        ------
        OSError
            When the file cannot be read.
        ValueError
            Naming the file, when it is truncated, of another kind, or does not hold what it says.
        """
        with _FILE.read(path, "quant.calibrate gives and ModelCalibration.save writes it") as (header, tensors):
            if type(header["tokens"]) is not int or header["tokens"] < 1:
                raise ValueError("tokens must be a positive integer")
            largest = {name: tensor.read() for name, tensor in tensors.items()}
            for name, array in largest.items():
                if array.dtype != np.float32 or array.ndim != 1 or not (np.isfinite(array) & (array >= 0)).all():
                    raise ValueError(f"{name} must be magnitudes, one axis of float32")
            return cls(str(header["encoder"]), header["tokens"], largest)


def is_model_calibration(path: Path) -> bool:
    """Whether a file calls itself a calibration of a model; False for a damaged file, too."""
    return _FILE.is_in(path)


def calibrate_model(model: Model, batches: Iterable[ModelBatch]) -> ModelCalibration:
    """See ``quant.calibrate``."""
    encoder = encoder_of(model)
    found = ModelCalibration(encoder_fingerprint(encoder))
    for call in read_model_calls(model, batches, "calibrating"):
        ops = LargestInputs(call.counted)
        with np.errstate(over="ignore", invalid="ignore"):
            call.run(on(ops, model))
        if not ops.tokens:
            continue
        seen = ModelCalibration(found.encoder, ops.tokens, {
            name: ops.largest[id(linear)] for name, linear in feed_forward_linears(encoder).items()})
        for name, largest in seen.largest.items():
            if not np.isfinite(largest).all():
                raise ValueError(f"{call.where}: what {name} reads leaves the range of float32")
        found = found.merge(seen) if found.tokens else seen
    if not found.tokens:
        raise ValueError("batches must hold at least one token; got none")
    return found


def feed_forward_linears(encoder: TransformerEncoder) -> dict[str, Linear]:
    """The linear layers of feed-forwards by name, each once."""
    found: dict[int, tuple[str, Linear]] = {}
    for i, layer in enumerate(encoder.layers):
        for part in ("linear1", "gate", "linear2"):
            linear = getattr(layer.feed_forward, part)
            if linear is not None:
                found.setdefault(id(linear), (f"layers.{i}.feed_forward.{part}", linear))
    return dict(found.values())


def encoder_fingerprint(encoder: TransformerEncoder) -> str:
    """Checksum of an encoder's settings and weights: what was seen in one means nothing in another."""
    config, tensors = encoder.to_state()
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()[:16]


class LargestInputs(CompiledOps):
    """Keeps the largest magnitude of each input of every linear layer.

    Parameters
    ----------
    counted : function
        From rows of tokens to those that count.
    """

    def __init__(self, counted: Any = lambda rows: rows) -> None:
        super().__init__({}, ())  # a record, of no tensor, has layers without stages computed operation by operation
        self.counted, self.tokens = counted, 0
        self.largest: dict[int, Float32s] = {}

    def block(self, layer: Any, x: Float32s, sequences: Sequences, name: str) -> Float32s:
        """An encoder layer: its attention as a call computes it, its feed-forward operation by operation."""
        if name.endswith("layers.0."):
            self.tokens += len(self.counted(x))
        if layer.stages is None:
            return super().block(layer, x, sequences, name)
        attention, _ = layer.stages
        result: Float32s = layer.feed(self, attention(np.ascontiguousarray(x), sequences), name)
        return result

    def linear(self, x: Float32s, linear: Any, name: str) -> Float32s:
        """x weight^T + bias."""
        found = np.abs(self.counted(x)).max(axis=0, initial=0)
        self.largest[id(linear)] = np.maximum(found, self.largest.get(id(linear), found))
        return super().linear(x, linear, name)
