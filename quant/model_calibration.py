"""Run a whole encoder over sample data and remember the range of every feature that its layers read and make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.executors.compiled import CompiledOps
from edgeattn.layers import Linear
from edgeattn.models import TextEncoder
from edgeattn.position_bias import ConstantPositionBias
from quant.calibration import Calibration, of_call, parse
from quant.calibration_file import Kind
from quant.model_calls import encoder_of, on, read_model_calls
from quant.trace import Call

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.layers import TransformerEncoder
    from edgeattn.ops import Sequences
    from edgeattn.types import Float32s, Path
    from quant.model_calls import Model, ModelCall
    from quant.types import ModelBatch

_SEQUENCES, _TOKENS = 16, 24  # of the random input that finds the features with the largest magnitude
# Hidden features over so many times what nine of ten reach are apart, one of so many at most.
LARGE, LARGE_SHARE = 2.0, 64

# Format 1: the largest inputs of feed-forwards alone.
_FILE = Kind("quant.model_calibration", 2, "calibration of a model")


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
    ranges : dict of float32 (2, features)
        The least and the largest value of each feature of "layers.0.attention.input" and, of a feed-forward, of what
        its linear layers read ("layers.0.feed_forward.input", "layers.0.feed_forward.hidden") and make
        ("layers.0.feed_forward.linear1", "gate", "linear2"): of the second what `large` hidden features give apart,
        as "large".
    large : dict of int (n,)
        By "layers.0.feed_forward": the hidden features that random tokens show to be much larger than others.
    attention : dict of Calibration
        By "layers.0.attention", of those that static int8 has a form of.
    """

    encoder: str
    tokens: int = 0
    largest: dict[str, Float32s] = field(default_factory=dict)
    ranges: dict[str, Float32s] = field(default_factory=dict)
    large: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    attention: dict[str, Calibration] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"ModelCalibration(tokens={self.tokens}, {len(self.largest)} linear layers)"

    def merge(self, other: ModelCalibration) -> ModelCalibration:
        """Calibration on the data of both.

        Parameters
        ----------
        other : ModelCalibration
            Of the same layers.

        Returns
        -------
        ModelCalibration
            A new one.

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
        return ModelCalibration(
            self.encoder, self.tokens + other.tokens,
            {name: np.maximum(largest, other.largest[name]) for name, largest in self.largest.items()},
            {name: wider(ends, other.ranges[name]) for name, ends in self.ranges.items()}, self.large,
            {name: seen.merge(other.attention[name]) for name, seen in self.attention.items()
             if name in other.attention})

    def save(self, path: Path) -> None:
        """Write to a .safetensors file, whole or not at all.

        Parameters
        ----------
        path : str or path-like
            Ends in ".safetensors". An existing file is replaced.

        Raises
        ------
        OSError
            Where it cannot be written.
        ValueError
            For another suffix.
        """
        tensors: dict[str, NDArray[Any]] = {}
        for group in ("largest", "ranges", "large"):
            tensors |= {f"{group}/{name}": array for name, array in getattr(self, group).items()}
        headers = {}
        for name, seen in self.attention.items():
            headers[name], own = seen.to_state()
            tensors |= {f"attention/{name}/{key}": array for key, array in own.items()}
        _FILE.write(path, {"encoder": self.encoder, "tokens": self.tokens, "attention": headers}, tensors)

    @classmethod
    def load(cls, path: Path) -> ModelCalibration:
        """Read what ``save`` wrote.

        Parameters
        ----------
        path : str or path-like

        Returns
        -------
        ModelCalibration

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
            arrays = {name: tensor.read() for name, tensor in tensors.items()}
            return cls(str(header["encoder"]), header["tokens"], *_parse(header["attention"], arrays))


def is_model_calibration(path: Path) -> bool:
    """Whether a file calls itself a calibration of a model; False for a damaged file, too."""
    return _FILE.is_in(path)


def _parse(headers: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """What a file holds, by kinds."""
    groups: dict[str, dict[str, Any]] = {"largest": {}, "ranges": {}, "large": {}, "attention": {}}
    for path, array in arrays.items():
        group, _, name = path.partition("/")
        groups[group][name] = array
    for group, axes, dtype in (("largest", 1, np.float32), ("ranges", 2, np.float32), ("large", 1, np.int64)):
        for name, array in groups[group].items():
            if array.dtype != dtype or array.ndim != axes or not np.isfinite(array).all() or (
                    group != "ranges" and (array < 0).any()) or (group == "ranges" and len(array) != 2):
                raise ValueError(f"{name} must be {group} with {axes} axes of {np.dtype(dtype)}")
    found = {}
    for name, header in dict(headers).items():
        prefix = f"{name}/"
        found[name] = parse(header, {key.removeprefix(prefix): array for key, array in groups["attention"].items()
                                     if key.startswith(prefix)})
    return [groups["largest"], groups["ranges"], groups["large"], found]


def calibrate_model(model: Model, batches: Iterable[ModelBatch], description: str = "", *,
                    large: Mapping[str, Sequence[int]]) -> ModelCalibration | None:
    """See ``quant.calibrate``: what some batches show, None where they hold no token.

    large: as `large_by_name` gives it.
    """
    encoder = encoder_of(model)
    names = {id(linear): name for name, linear in feed_forward_linears(encoder).items()}
    found = ModelCalibration(encoder_fingerprint(encoder))
    apart = {name: np.array(features, np.int64) for name, features in large.items()}
    by_id = {id(layer.feed_forward): apart[_first_place(encoder, id(layer.feed_forward))] for layer in encoder.layers}
    for call in read_model_calls(model, batches, description):
        ops = SeenRanges(call, by_id)
        with np.errstate(over="ignore", invalid="ignore"):
            call.run(on(ops, model))
        if not ops.tokens:
            continue
        seen = ModelCalibration(
            found.encoder, ops.tokens, {name: ops.largest[key] for key, name in names.items()}, ops.ranges,
            apart, ops.calibrations)
        for name, largest in seen.largest.items():
            if not np.isfinite(largest).all():
                raise ValueError(f"{call.where}: what {name} reads leaves the range of float32")
        found = found.merge(seen) if found.tokens else seen
    return found if found.tokens else None


def large_by_name(model: Model) -> dict[str, NDArray[np.int64]]:
    """`large_features` by the name of a feed-forward."""
    encoder = encoder_of(model)
    return {_first_place(encoder, key): features for key, features in large_features(model, encoder).items()}


def _first_place(encoder: TransformerEncoder, key: int) -> str:
    return next(f"layers.{i}.feed_forward" for i, layer in enumerate(encoder.layers) if id(layer.feed_forward) == key)


def wider(ends: Float32s, other: Float32s) -> Float32s:
    """Least and largest values (2, features) of both."""
    result: Float32s = np.stack([np.minimum(ends[0], other[0]), np.maximum(ends[1], other[1])])
    return result + np.float32(0)  # -0 is 0: which of them came first makes no difference


def large_features(model: Model, encoder: TransformerEncoder) -> dict[int, NDArray[np.int64]]:
    """Of each feed-forward, by its id, the hidden features that are much larger than the others upon random tokens.

    It depends on the model alone, so that calibrations on different data agree.
    """
    largest, found = random_largest(model, encoder), {}
    for layer in encoder.layers:
        sizes = largest[id(layer.feed_forward.linear2)]
        most = max(len(sizes) // LARGE_SHARE, 1)
        order = np.argsort(-sizes, kind="stable")[:most] if len(sizes) > LARGE_SHARE else np.zeros(0, np.int64)
        limit = LARGE * np.quantile(sizes, 0.9) if len(sizes) else 0
        found[id(layer.feed_forward)] = np.sort(order[sizes[order] > limit]).astype(np.int64)
    return found


def random_largest(model: Model, encoder: TransformerEncoder) -> dict[int, Float32s]:
    """The largest magnitude of each input of each linear and attention layer upon random tokens, by the layer's id."""
    rng, ops, length = np.random.default_rng(0), LargestInputs(), _TOKENS
    for layer in encoder.layers:
        bias = getattr(layer.attention, "position_bias", None)
        if isinstance(bias, ConstantPositionBias):
            length = min(length, *bias.array.shape[1:])
    with np.errstate(over="ignore", invalid="ignore"):  # of huge weights
        if isinstance(model, TextEncoder):
            length = min(length, model.embedding.longest or length)
            ids = rng.integers(0, len(model.embedding.token_weight), (_SEQUENCES, length))
            positions = model.embedding.positions(ids, 0)
            with encoder.prepared(ids.shape, is_causal=model.is_causal) as sequences:
                model.forward(ops, ids.ravel(), positions.ravel(), np.zeros(ids.size, np.int64), sequences)
        else:
            x = rng.standard_normal((_SEQUENCES * length, encoder.embed_dim), np.float32)
            with encoder.prepared((_SEQUENCES, length)) as sequences:
                encoder.forward(ops, x, sequences)
    return ops.largest


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


def read_by_attention(layer: Any, x: Float32s) -> Float32s:
    """What the attention of an encoder layer reads of the rows that the layer is given."""
    read: Float32s = x if not layer.norm_first or layer.norm1 is None else layer.norm1.forward(CompiledOps(), x)
    return read


class LargestInputs(CompiledOps):
    """Keeps the largest magnitude of each input of every linear layer, and of what attention layers read.

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
        self._keep_largest(layer.attention, read_by_attention(layer, x))
        if layer.stages is None:
            return super().block(layer, x, sequences, name)
        attention, _ = layer.stages
        result: Float32s = layer.feed(self, attention(np.ascontiguousarray(x), sequences), name)
        return result

    def linear(self, x: Float32s, linear: Any, name: str) -> Float32s:
        """x weight^T + bias."""
        self._keep_largest(linear, x)
        return super().linear(x, linear, name)

    def _keep_largest(self, reader: Any, x: Float32s) -> None:
        found = np.abs(self.counted(x)).max(axis=0, initial=0)
        self.largest[id(reader)] = np.maximum(found, self.largest.get(id(reader), found))


class SeenRanges(LargestInputs):
    """Keeps least and largest values of what feed-forwards read and make, and calibrates attention layers.

    Parameters
    ----------
    call : ModelCall
    large : dict
        By the id of a feed-forward its hidden features that are apart.
    """

    def __init__(self, call: ModelCall, large: dict[int, NDArray[np.int64]]):
        super().__init__(call.counted)
        self.call, self.large = call, large
        self.ranges: dict[str, Float32s] = {}
        self.calibrations: dict[str, Calibration] = {}
        self._places: dict[int, str] = {}
        self._beyond: set[str] = set()

    def block(self, layer: Any, x: Float32s, sequences: Sequences, name: str) -> Float32s:
        """An encoder layer; what stands in several places has the name of the first."""
        here = name[name.rindex("layers."):]
        self._layer, self._sequences = layer, sequences
        self._place = {part: self._places.setdefault(id(getattr(layer, part)), here + part)
                       for part in ("attention", "feed_forward")}
        read = read_by_attention(layer, x)
        self._see("attention", "input", read)
        self._observe_attention(read)
        return super().block(layer, x, sequences, name)

    def linear(self, x: Float32s, linear: Any, name: str) -> Float32s:
        """x weight^T + bias."""
        y = super().linear(x, linear, name)
        half, _, part = name.rpartition("layers.")[2].partition(".")[2].partition(".")  # "feed_forward", "linear1"
        if half == "feed_forward" and part in ("linear1", "gate"):
            self._see(half, "input", x)
            self._see(half, part, y)
        elif (half, part) == ("feed_forward", "linear2"):
            self._see(half, "hidden", x)
            some = self.large[id(self._layer.feed_forward)]
            apart = Linear(linear.weight[:, some]).packed(np.ascontiguousarray(x[:, some]))
            self._see(half, "large", apart)
            self._see(half, part, y - apart)
        return y

    def _see(self, half: str, tensor: str, values: Float32s) -> None:
        values = self.counted(values)
        if len(values):
            name = f"{self._place[half]}.{tensor}"
            ends = np.stack([values.min(axis=0, initial=0), values.max(axis=0, initial=0)])
            self.ranges[name] = wider(ends, self.ranges.get(name, ends))

    def _observe_attention(self, x: Float32s) -> None:
        layer, name, row = self._layer.attention, self._place["attention"], 0
        if of_call(layer, None) is None:
            return
        for mask in self._sequences.masks:
            batch, _, length, _ = mask.shape
            tokens, row = x[row:row + batch * length].reshape(batch, length, -1), row + batch * length
            permitted = mask.permitted()
            if self.call.real is not None and len(self.call.real) == len(x):
                real = self.call.real.reshape(batch, 1, length, 1)
                permitted = (True if permitted is None else permitted) & real & real.swapaxes(2, 3)
            if permitted is not None:
                permitted = np.broadcast_to(permitted, mask.shape)
            for i in range(batch):  # one by one: NumPy's products of a sequence may be others beside others
                one, some = tokens[i:i + 1], None if permitted is None else permitted[i:i + 1]
                self._observe_one(layer, name, Call(self.call.where, one, one, one, (0, 0, 0), some))

    def _observe_one(self, layer: Any, name: str, call: Call) -> None:
        try:
            seen = of_call(layer, call)
        except ValueError:  # beyond float32: dynamic int8 may take the layer still
            seen = None
        if seen is None or name in self._beyond:
            self._beyond.add(name)
            self.calibrations.pop(name, None)
        else:
            seen.masked = False  # masks of a call leave keys out: no score need be below all others
            self.calibrations[name] = self.calibrations[name].merge(seen) if name in self.calibrations else seen
