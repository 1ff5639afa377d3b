"""What sample data shows of an attention layer: the range of every tensor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import is_one_of
from edgeattn.files.paths import listed
from edgeattn.layers import MultiHeadAttention, TransformerEncoderLayer
from edgeattn.layers.positions import refuse_positions
from edgeattn.position_bias import ConstantPositionBias
from edgeattn.quantized import INPUTS, SOURCES
from quant.calibration_file import Kind
from quant.observers import BINS, OBSERVERS, SMALLEST_EXPONENT, Statistics
from quant.trace import Call, counted, describe_sources, float_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.types import Path, Sources

WEIGHTS = tuple(f"{name}_{part}" for name in ("q", "k", "v", "out") for part in ("weight", "bias"))
# What equal scores differ by, relative to their size: a product's rows are not summed alike; and what is as good as 0.
_EQUAL, _NO_SCORE = 1e-5, 1e-6
# Format 1: keys and scores with the key bias, scores of rows with one key among the others.
_FILE = Kind("quant.calibration", 2, "calibration")


@dataclass(eq=False)
class Calibration:
    """What ``calibrate`` saw; give it to ``quantize``. Mergeable: ``a.merge(b)`` is calibration on both data sets.

    Attributes
    ----------
    layer : str
        Checksum of the layer's weights.
    observer : str
        The rule that turns statistics into ranges, a name in ``quant.observers.OBSERVERS``.
    sources : tuple of int
        Which inputs the layer was called with: (0, 0, 0) self-attention, (0, 1, 1) the value is the key, (0, 1, 2) all.
    statistics : dict of Statistics
        By tensor name. Of scores, keys and values only those that a query was permitted to see, of queries, contexts
        and outputs only those of queries with a permitted key; keys and scores without the key bias. Scores are those
        of rows with two permitted keys or more. "biased_scores" are scores with the layer's position bias, where it
        has one: then `single_scores` and `lowest_row_maximum` are of these.
    single_scores : Statistics
        The scores of rows with one permitted key: any score gives it the whole weight, so they set no range; but the
        masked scores of an exported mask must stay below them.
    lowest_row_maximum : float
        The smallest maximum of a row of two permitted scores or more; infinite without such a row.
    masked : bool
        Whether any call came with a mask.
    rules : dict of function
        By tensor name what takes the observer's place; not kept in files.
    widest_row : float
        The largest difference of the permitted scores of a row; not kept in files.
    """

    layer: str
    observer: str
    sources: Sources
    statistics: dict[str, Statistics] = field(default_factory=dict)
    single_scores: Statistics = field(default_factory=Statistics)
    lowest_row_maximum: float = np.inf
    masked: bool = False
    rules: dict[str, Callable[[Statistics, bool], tuple[float, float]]] = field(default_factory=dict)
    widest_row: float = 0.0

    @property
    def is_of_one_token(self) -> bool:
        """Whether tokens were told apart in no row, as those of constant data are not."""
        scores = self.statistics.get("scores", Statistics())
        size = max(abs(scores.minimum), abs(scores.maximum)) if scores.count else 0.0
        return size > _NO_SCORE and self.widest_row <= _EQUAL * size

    def __repr__(self) -> str:
        tensors = {name: seen.count for name, seen in self.statistics.items()}
        return f"Calibration(observer={self.observer!r}, masked={self.masked}, values of tensors {tensors})"

    def merge(self, other: Calibration) -> Calibration:
        """Calibration on the data of both.

        Parameters
        ----------
        other : Calibration
            Of the same layers.

        Returns
        -------
        Calibration
            A new one.

        Raises
        ------
        TypeError
            When ``other`` is no Calibration.
        ValueError
            When the two saw different layers or kinds of calls, or have different observers.
        """
        if not isinstance(other, Calibration):
            raise TypeError(f"other must be a quant.Calibration; got {type(other).__name__}")
        if self.layer != other.layer:
            raise ValueError("cannot merge calibrations of different layers")
        if self.observer != other.observer:
            raise ValueError(f"cannot merge calibrations with different observers, {self.observer!r} and "
                             f"{other.observer!r}")
        if self.sources != other.sources:
            raise ValueError(f"cannot merge calibrations of different calls, with {describe_sources(self.sources)} and "
                             f"with {describe_sources(other.sources)}")
        return Calibration(
            self.layer, self.observer, self.sources,
            {name: s.merge(other.statistics[name]) for name, s in self.statistics.items()},
            self.single_scores.merge(other.single_scores),
            min(self.lowest_row_maximum, other.lowest_row_maximum), self.masked or other.masked,
            widest_row=max(self.widest_row, other.widest_row))

    def range(self, name: str, *, symmetric: bool = False) -> tuple[float, float]:
        """The observer's (low, high) for a tensor, low <= 0 <= high; (0, 0) for one without elements.

        That of the scores is that of ``single_scores`` where no row had more: nothing better is known.

        Parameters
        ----------
        name : str
            A tensor, as in `statistics`.
        symmetric : bool
            Whether low is to be -high.

        Returns
        -------
        (float, float)

        Raises
        ------
        KeyError
            For a name that is not in `statistics`.
        """
        statistics = self.statistics[name]
        if name in ("scores", "biased_scores") and not statistics.count:
            statistics = self.single_scores
        rule = self.rules.get(name, OBSERVERS[self.observer])
        return rule(statistics, symmetric) if statistics.count else (0.0, 0.0)

    def save(self, path: Path) -> None:
        """Write to a .safetensors file, whole or not at all: histograms and ranges, the rest as JSON metadata.

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
        _FILE.write(path, *self.to_state())

    def to_state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """The header and the tensors of a file."""
        tensors = {}
        for name, s in {**self.statistics, "single_scores": self.single_scores}.items():
            tensors[f"{name}.histogram"] = s.histogram
            tensors[f"{name}.range"] = np.array([s.minimum, s.maximum, s.exponent], np.float64)
        header = {"layer": self.layer, "observer": self.observer, "sources": list(self.sources),
                  "lowest_row_maximum": self.lowest_row_maximum if np.isfinite(self.lowest_row_maximum) else None,
                  "masked": self.masked}
        return header, tensors

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what ``save`` wrote.

        Parameters
        ----------
        path : str or path-like

        Returns
        -------
        Calibration

        Raises
        ------
        OSError
            When the file cannot be read.
        ValueError
            Naming the file, when it is truncated, of another kind, or does not hold what it says.
        """
        with _FILE.read(path, "quant.calibrate gives and Calibration.save writes it") as (header, tensors):
            return parse(header, {name: tensor.read() for name, tensor in tensors.items()})


def is_calibration(path: Path) -> bool:
    """Whether a file calls itself a calibration; False for a damaged file, too."""
    return _FILE.is_in(path)


def parse(header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Calibration:
    """The calibration of which ``Calibration.to_state`` gave these; ValueError where it did not."""
    sources = tuple(header["sources"])
    if sources not in SOURCES or header["observer"] not in OBSERVERS:
        raise ValueError(f"unknown sources {sources} or observer {header['observer']!r}")
    names = [*(f"{INPUTS[i]}_input" for i in sorted(set(sources))), "query", "key", "value", "scores", "context"]
    names += [name for name in ("output", "biased_scores") if f"{name}.range" in tensors]
    names.append("single_scores")
    expected = {f"{name}.{part}" for name in names for part in ("histogram", "range")}
    if set(tensors) != expected:
        raise ValueError(f"it must hold {sorted(expected)}; got {listed(sorted(tensors))}")
    statistics = {name: _parse_statistics(name, tensors[f"{name}.histogram"], tensors[f"{name}.range"])
                  for name in names}
    single_scores = statistics.pop("single_scores")
    lowest = header["lowest_row_maximum"]
    if lowest is None and not statistics["scores"].count:
        lowest = np.inf
    elif not isinstance(lowest, float) or not np.isfinite(lowest):
        raise ValueError("lowest_row_maximum must be a finite number")
    if not isinstance(header["masked"], bool):
        raise ValueError("masked must be true or false")
    return Calibration(str(header["layer"]), header["observer"], sources, statistics, single_scores, lowest,
                       header["masked"])


def _parse_statistics(name: str, histogram: NDArray[Any], numbers: NDArray[Any]) -> Statistics:
    if histogram.dtype != np.int64 or histogram.shape != (BINS,) or (histogram < 0).any():
        raise ValueError(f"{name}.histogram must be {BINS} counts, int64")
    if numbers.dtype != np.float64 or numbers.shape != (3,):
        raise ValueError(f"{name}.range must be a minimum, a maximum and an exponent, float64")
    minimum, maximum, exponent = (float(number) for number in numbers)
    largest = max(abs(minimum), abs(maximum))
    if histogram.any() and not (minimum <= maximum and largest < 2.0**exponent <= 2.0**129):
        raise ValueError(f"{name}.range is no range of its histogram")
    return Statistics(minimum, maximum, max(int(exponent), SMALLEST_EXPONENT), histogram)


def of_call(layer: MultiHeadAttention, call: Call | None) -> Calibration | None:
    """A calibration of one call, empty for None; None of a layer that static int8 has no form of."""
    try:
        check_layer(layer)
    except (TypeError, ValueError):
        return None
    total = Calibration(fingerprint(layer), "minmax", (0, 0, 0))
    if call is not None:
        observe(layer, call, total)
    return total


def of_one_layer(layer: object) -> str:
    """For an error: how a layer of an encoder, which is no encoder, becomes one."""
    return "; TransformerEncoder([layer]) is the encoder of it" if isinstance(layer, TransformerEncoderLayer) else ""


def check_layer(layer: object, scheme: object = "static") -> None:
    """Raise unless ``layer`` is a float layer that can be quantized by ``scheme``."""
    if not isinstance(layer, MultiHeadAttention):
        raise TypeError("layer must be a float MultiHeadAttention, TransformerEncoder, TextEncoder or ImageEncoder; "
                        f"got {type(layer).__name__}{of_one_layer(layer)}")
    if not is_one_of(scheme, ("static", "dynamic")):
        raise ValueError(f"scheme must be 'static' or 'dynamic'; got {scheme!r}")
    if scheme == "static":
        refuse_positions(layer, "quantize with scheme='dynamic'", ("rotary", "q_norm", "k_norm"))
        bias = layer.position_bias
        if bias is not None and not (isinstance(bias, ConstantPositionBias) and np.isfinite(bias.array).all()):
            raise ValueError("position_bias must be a finite array (H, L, S) for scheme='static', a constant that is "
                             f"added to codes, got {bias}; position_bias=layer.position_bias.rows(0, L, S) is the "
                             "array of one length, and scheme='dynamic' takes any")
    if layer.gated and scheme == "static":
        raise ValueError("layer must have no gate_weight: no TFLite kernel set has a gate; scheme='dynamic' takes it")
    if layer.extra_keys and scheme == "static":
        raise ValueError("layer must have no bias_k, bias_v and add_zero_attn: a static int8 layer holds tokens only; "
                         f"got {layer.extra_keys} added keys; scheme='dynamic' takes them")


def fingerprint(layer: MultiHeadAttention) -> str:
    """Checksum of a layer's weights and head counts: ranges seen in one layer mean nothing in another."""
    digest = hashlib.sha256(f"{layer.num_heads} {layer.num_kv_heads}".encode())
    for name in WEIGHTS:
        array = getattr(layer, name)
        digest.update(f"{name} {None if array is None else array.shape}".encode())
        if array is not None:
            digest.update(array.tobytes())
    if isinstance(layer.position_bias, ConstantPositionBias):
        digest.update(layer.position_bias.array.tobytes())
    return digest.hexdigest()[:16]


def observe(layer: MultiHeadAttention, call: Call, total: Calibration) -> None:
    """Add to a calibration what one call of the layer shows."""
    trace = float_trace(layer, call)
    scores = trace["scores"]
    if layer.position_bias is not None:
        scores = trace["biased_scores"] = scores + layer.position_bias.rows(0, *scores.shape[2:])
    permitted = np.broadcast_to(True if call.permitted is None else call.permitted, scores.shape)
    keys = permitted.sum(-1)
    single, several = permitted & (keys == 1)[..., None], permitted & (keys > 1)[..., None]
    for name, values in trace.items():
        if name != "probabilities":  # theirs is a fixed range
            seen = values[several] if name in ("scores", "biased_scores") else counted(name, values, call)
            total.statistics.setdefault(name, Statistics()).update(seen)
    total.single_scores.update(scores[single])
    rows = np.where(several, scores, -np.inf).max(-1, initial=-np.inf)
    total.lowest_row_maximum = min(total.lowest_row_maximum, float(rows[keys > 1].min(initial=np.inf)))
    lowest = np.where(several, scores, np.inf).min(-1, initial=np.inf)
    total.widest_row = max(total.widest_row, float((rows - lowest)[keys > 1].max(initial=0)))
    total.masked |= call.permitted is not None
