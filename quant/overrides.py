"""What the `overrides` of `quant.quantize` say: the scheme of half a layer, or how a tensor's range is found."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from edgeattn.checks import is_one_of
from edgeattn.files.paths import listed
from quant.model_calibration import ModelCalibration
from quant.observers import OBSERVERS, percentile, span

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from edgeattn.layers import TransformerEncoder
    from quant.calibration import Calibration
    from quant.observers import Statistics

SCHEMES = ("static", "dynamic", "float32")
_RULES = (f"one of {', '.join(map(repr, OBSERVERS))}, ('percentile', share) with a share from 0 to below 0.5 or (low, "
          "high) with low below high, within 2**65")
_LARGEST = 2**65  # int8 scales end at 2**60


class Given(NamedTuple):
    """A range that takes the place of what calibration saw."""

    low: float
    high: float

    def __call__(self, _: Statistics, symmetric: bool = False) -> tuple[float, float]:
        """As an observer."""
        return span(self.low, self.high, symmetric)


def of_layer(overrides: Any, calibration: Calibration) -> Calibration:
    """A layer's calibration whose ranges are found as `overrides` says."""
    return _ruled(calibration, {name: _rule(name, value) for name, value in
                                _matched(overrides, calibration.statistics, "tensors").items()})


def of_model(overrides: Any, names: Iterable[str], calibration: Any) -> tuple[dict[str, str], Any]:
    """(scheme by the name of half a layer, the calibration whose ranges are found as `overrides` says)."""
    names = list(names)
    schemes = {pattern: value for pattern, value in _mapping(overrides).items() if is_one_of(value, SCHEMES)}
    rules = {pattern: value for pattern, value in _mapping(overrides).items() if pattern not in schemes}
    halves: dict[str, str] = _matched(schemes, names, "halves of layers")
    if not rules:
        return halves, calibration
    for name in names:  # "*" alone may mean its tensors
        if name in rules:
            raise ValueError(f"overrides of {name} must be one of {', '.join(map(repr, SCHEMES))}; got {rules[name]!r}")
    if not isinstance(calibration, ModelCalibration):
        raise ValueError(f"overrides of ranges need a quant.ModelCalibration; got {listed(rules)} without one, and a "
                         f"half of a layer may be {', '.join(map(repr, SCHEMES))}")
    # the inputs of attention have ranges of features, which are spread, not cut
    tensors = [f"{name}.{tensor}" for name, seen in calibration.attention.items() for tensor in seen.statistics
               if not tensor.endswith("_input")]
    found = {name: _rule(name, value) for name, value in _matched(rules, tensors, "tensors of attention").items()}
    return halves, dataclasses.replace(calibration, attention={
        name: _ruled(seen, {tensor: value for tensor in seen.statistics
                            if (value := found.get(f"{name}.{tensor}")) is not None})
        for name, seen in calibration.attention.items()})


def halves_of(encoder: TransformerEncoder) -> dict[int, str]:
    """The name of each half of a layer by its id; what stands in several places has the name of the first."""
    names: dict[int, str] = {}
    for i, layer in enumerate(encoder.layers):
        for part in ("attention", "feed_forward"):
            names.setdefault(id(getattr(layer, part)), f"layers.{i}.{part}")
    return names


def _mapping(overrides: Any) -> Mapping[str, Any]:
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError("overrides must be a mapping from names, which may hold * and ?, to schemes or ranges; got "
                        f"{type(overrides).__name__}")
    return {} if overrides is None else overrides


def _matched(overrides: Any, names: Iterable[str], what: str) -> dict[str, Any]:
    """The value that each name is given, that of the last pattern it fits."""
    names, found = list(names), {}
    for pattern, value in _mapping(overrides).items():
        some = [name for name in names if isinstance(pattern, str) and fnmatch.fnmatchcase(name, pattern)]
        if not some:
            raise ValueError(f"overrides must name {what} that there are, {listed(names)}; got {pattern!r}")
        found.update(dict.fromkeys(some, value))
    return found


def _ruled(calibration: Calibration, rules: Mapping[str, Any]) -> Calibration:
    return dataclasses.replace(calibration, rules=dict(rules))


def _rule(name: str, value: Any) -> Any:
    """An observer."""
    if is_one_of(value, OBSERVERS):
        return OBSERVERS[value]
    if isinstance(value, (tuple, list)) and len(value) == 2:
        kind, last = value
        if kind == "percentile" and _is_real(last) and 0 <= last < 0.5:
            return functools.partial(percentile, tail=float(last))
        if _is_real(kind) and _is_real(last) and kind < last:
            return Given(float(kind), float(last))
    raise ValueError(f"overrides of {name} must be {_RULES}; got {value!r}")


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST
