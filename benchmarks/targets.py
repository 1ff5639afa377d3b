"""The targets, one row each, and how many of the measured cases meet them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.contenders import PEERS
from benchmarks.problem import Point
from benchmarks.timing import median_ratio

FLOAT_PEERS = {row.name for row in PEERS if row.kind == "float32"}
ALL_PEERS = {row.name for row in PEERS}
MIB = 2**20


@dataclass(frozen=True)
class Outcome:
    """How far a target is met: each case's number over the demanded one, so that 1 is enough and more is better.

    Parameters
    ----------
    number : str
        Of the target; "A" for what a release must reach, "+" for what else is watched.
    text : str
    cases : dict of str to float
    demanded : float
        What 1 stands for, in ``unit``.
    unit : str
        Of the figure that is shown.
    at_most : bool
        The figure is a cost: the demanded number over the measured one is what ``cases`` holds.
    part : float
        Of the cases, which must meet it.
    """

    number: str
    text: str
    cases: dict[str, float]
    demanded: float = 1.0
    unit: str = " x"
    at_most: bool = False
    part: float = 1.0

    @property
    def met(self) -> int:
        """Cases that meet it."""
        return sum(value >= 1 for value in self.cases.values())

    @property
    def reached(self) -> bool:
        """Whether as many cases meet it as must."""
        return self.met >= self.part * len(self.cases)

    @property
    def worst(self) -> str:
        """The case furthest from it."""
        return min(self.cases, key=self.cases.get)

    @property
    def figure(self) -> str:
        """What was measured in the worst case."""
        share = self.cases[self.worst]
        value = self.demanded / max(share, 1e-9) if self.at_most else self.demanded * share
        return f"{value:.0%}" if self.unit == "%" else f"{value:.2f}{self.unit}"


def speed(record: dict, name: str) -> np.ndarray:
    """Operations per second in every round."""
    operations = record["bounds"].get(name, record["operations"])
    return operations / np.array(record["times"][name])


def share(record: dict, name: str, bound: str) -> float:
    """Speed of a contender as a part of a measured limit, median over rounds."""
    return float(np.median(speed(record, name) / speed(record, bound)))


def fastest(record: dict, names: Iterable[str]) -> str | None:
    """The contender among ``names`` with the smallest median time."""
    present = [name for name in names if name in record["times"]]
    return min(present, key=lambda name: np.median(record["times"][name])) if present else None


def _against(ours: str, peers: Callable | set, lengths: range | None = None) -> Callable:
    """Times as fast as the fastest of ``peers``, of layers with so many tokens."""
    def measure(record):
        if lengths is not None and Point.parse(record["case"]).L not in lengths:
            return None
        names = peers if isinstance(peers, set) else {peers}
        peer = fastest(record, names)
        if peer is None or ours not in record["times"]:
            return None
        return median_ratio(record["times"][peer], record["times"][ours])
    return measure


def _of_limit(ours: str, bound: str, smallest: Point) -> Callable:
    def measure(record):
        point = Point.parse(record["case"])
        if point.E < smallest.E or point.L < smallest.L or ours not in record["times"]:
            return None
        return share(record, ours, bound)
    return measure


def _causal(ours: str, part: Callable) -> Callable:
    def measure(record):
        return part(record) * median_ratio(record["times"][ours], record["times"][f"{ours} causal"])
    return measure


class Target(NamedTuple):
    """A row of TARGETS: ``measure(record)`` gives what must be ``demanded`` or more, or None of other records."""

    number: str
    text: str
    section: str
    measure: Callable
    demanded: float
    unit: str = " x"
    part: float = 1.0


_LONGER, _SHORTEST = range(64, 1 << 30), range(32, 33)
TARGETS = (
    Target("1", "float32: as fast as any float32 peer", "layer", _against("edgeattn float32", FLOAT_PEERS), 1),
    Target("1", "float32: 70 % of its limit, from 128/4/128 up", "layer",
           _of_limit("edgeattn float32", "float32 limit", Point(128, 4, 128)), 0.7, "%"),
    Target("2", "int8: 3 times as fast as LiteRT's best int8", "layer", _against("edgeattn int8", "litert int8"), 3),
    Target("2", "int8: twice as fast as any float32 peer", "layer", _against("edgeattn int8", FLOAT_PEERS), 2),
    Target("2", "int8: 10 times as fast as the usual int8 file", "layer",
           _against("edgeattn int8", "litert int8 usual"), 10),
    Target("2", "int8: 50 % of its limit, from 256/4/128 up", "layer",
           _of_limit("edgeattn int8", "int8 limit", Point(256, 4, 128)), 0.5, "%"),
    Target("3", "dynamic: as fast as any peer at any precision", "layer", _against("edgeattn dynamic", ALL_PEERS), 1),
    Target("4", "decode: as fast as torch", "decode", _against("edgeattn float32", "torch sdpa"), 1),
    Target("4", "decode: as fast as GroupQueryAttention", "decode", _against("edgeattn float32", "onnxruntime GQA"), 1),
    Target("4", "decode: int8 cache twice as fast as float32", "decode",
           _against("edgeattn int8", "edgeattn float32"), 2),
    Target("A", "float32: ahead of its peers at 90 % of the shapes", "layer",
           _against("edgeattn float32", FLOAT_PEERS), 1, part=0.9),
    Target("A", "float32: at least 0.9 times as fast as its peers", "layer",
           _against("edgeattn float32", FLOAT_PEERS), 0.9),
    Target("A", "int8: twice LiteRT's best int8 where L >= 64", "layer",
           _against("edgeattn int8", "litert int8", _LONGER), 2),
    Target("A", "int8: 1.5 times any float32 peer where L >= 64", "layer",
           _against("edgeattn int8", FLOAT_PEERS, _LONGER), 1.5),
    Target("A", "int8: ahead of both where L = 32", "layer",
           _against("edgeattn int8", FLOAT_PEERS | {"litert int8"}, _SHORTEST), 1),
    Target("+", "causal attention: 60 % of the time of full", "causal attention",
           _causal("edgeattn float32", lambda _: 0.6), 1),
    *(Target("+", f"causal {kind} layer: its operations' part of full (+ 10 %)", "causal layer",
             _causal(f"edgeattn {kind}", lambda record: 1.1 * record["causal_operations"] / record["operations"]), 1)
      for kind in ("float32", "int8", "dynamic")),
    Target("+", "small attention of all kinds: as fast as NumPy", "cases", _against("edgeattn float32", "numpy"), 1),
    Target("+", "small attention of all kinds: as fast as torch", "cases",
           _against("edgeattn float32", "torch sdpa"), 1),
)


def outcomes(found: dict) -> list[Outcome]:
    """Every target about which something was measured."""
    rows = []
    for target in TARGETS:
        cases = {}
        for record in found["records"]:
            value = target.measure(record) if record["section"] == target.section else None
            if value is not None:
                cases[_case(record)] = value / target.demanded
        rows.append(Outcome(target.number, target.text, cases, target.demanded, target.unit, part=target.part))
    if "long" in found:
        costs = {r["case"]: float(np.median(r["times"]["edgeattn float32"])) / r["operations"] for r in found["long"]}
        first = next(iter(costs.values()))
        rows.append(Outcome("+", "rows to 16384 keys: time grows as L S (+ 15 %)",
                            {case: 1.15 * first / cost for case, cost in costs.items()}, 1.15, at_most=True))
    if "overhead" in found:
        rows.append(Outcome("5", "call: under 5 us beside its kernel",
                            {name: 5e-6 / value for name, value in found["overhead"]["seconds"].items()},
                            5, " us", at_most=True))
    if "process" in found:
        rows += _of_processes(found["process"])
    return [row for row in rows if row.cases]


def _of_processes(process):
    warm, kinds = process["warm"], ("float32", "int8", "dynamic")
    memory = {f"{kind}, {count} threads": MIB * int(count) / max(size, 1)
              for count, sizes in process["memory"].items() for kind, size in sizes.items()}
    return [
        Outcome("6", "import: under 0.5 s", {"import": 0.5 / warm["import"]}, 0.5, " s", at_most=True),
        Outcome("6", "import: under 100 MiB resident", {"import": 100 / warm["import_mib"]}, 100, " MiB",
                at_most=True),
        Outcome("6", "warm cache: first result under 0.3 s more", {kind: 0.3 / warm[kind] for kind in kinds}, 0.3,
                " s", at_most=True),
        Outcome("6", "warm cache, import: nothing compiled",
                {"import": float(not process["compiled_at_import"]),
                 **{kind: float(not warm[f"{kind}_compiled"]) for kind in kinds}}, unit=""),
        Outcome("7", "memory: 384/12/512 under 1 MiB a thread", memory, 1, " MiB", at_most=True),
    ]


def _case(record):
    return record["case"] if record["threads"] == 1 else f"{record['case']} on {record['threads']}"
