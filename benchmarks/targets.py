"""The targets, one row each, and how many of the measured cases meet them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from benchmarks.contenders import PEERS
from benchmarks.problem import Point
from benchmarks.timing import median_ratio

FLOAT_PEERS = {row.name for row in PEERS if row.kind == "float32"}
ALL_PEERS = {row.name for row in PEERS}
MIB = 2**20


@dataclass(frozen=True)
class Outcome:
    """How far a target is met: each case's number over the demanded one, so that 1 is enough and more is better."""

    number: str
    text: str
    cases: dict[str, float]

    @property
    def met(self) -> int:
        """Cases that meet it."""
        return sum(value >= 1 for value in self.cases.values())

    @property
    def worst(self) -> str:
        """The case furthest from it."""
        return min(self.cases, key=self.cases.get)


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


def _against(ours: str, times: float, peers: Callable | set) -> Callable:
    def measure(record):
        names = peers if isinstance(peers, set) else {peers}
        peer = fastest(record, names)
        if peer is None or ours not in record["times"]:
            return None
        return median_ratio(record["times"][peer], record["times"][ours]) / times
    return measure


def _of_limit(ours: str, bound: str, part: float, smallest: Point) -> Callable:
    def measure(record):
        point = Point.parse(record["case"])
        if point.E < smallest.E or point.L < smallest.L or ours not in record["times"]:
            return None
        return share(record, ours, bound) / part
    return measure


def _causal(ours: str, part: Callable) -> Callable:
    def measure(record):
        return part(record) * median_ratio(record["times"][ours], record["times"][f"{ours} causal"])
    return measure


# number, what is demanded, section, what one record says: the measured number over the demanded one, or None
_OF_RECORDS = (
    ("1", "float32: as fast as any float32 peer", "layer", _against("edgeattn float32", 1, FLOAT_PEERS)),
    ("1", "float32: 70 % of its limit, from 128/4/128 up", "layer",
     _of_limit("edgeattn float32", "float32 limit", 0.7, Point(128, 4, 128))),
    ("2", "int8: 3 times as fast as LiteRT's best int8", "layer", _against("edgeattn int8", 3, {"litert int8"})),
    ("2", "int8: twice as fast as any float32 peer", "layer", _against("edgeattn int8", 2, FLOAT_PEERS)),
    ("2", "int8: 10 times as fast as the usual int8 file", "layer",
     _against("edgeattn int8", 10, {"litert int8 usual"})),
    ("2", "int8: 50 % of its limit, from 256/4/128 up", "layer",
     _of_limit("edgeattn int8", "int8 limit", 0.5, Point(256, 4, 128))),
    ("3", "dynamic: as fast as any peer at any precision", "layer", _against("edgeattn dynamic", 1, ALL_PEERS)),
    ("4", "decode: as fast as torch", "decode", _against("edgeattn float32", 1, {"torch sdpa"})),
    ("4", "decode: as fast as GroupQueryAttention", "decode", _against("edgeattn float32", 1, {"onnxruntime GQA"})),
    ("4", "decode: int8 cache twice as fast as float32", "decode",
     _against("edgeattn int8", 2, {"edgeattn float32"})),
    ("+", "causal attention: 60 % of the time of full", "causal attention", _causal("edgeattn float32", lambda _: 0.6)),
    *(("+", f"causal {kind} layer: its operations' part of full (+ 10 %)", "causal layer",
       _causal(f"edgeattn {kind}", lambda record: 1.1 * record["causal_operations"] / record["operations"]))
      for kind in ("float32", "int8", "dynamic")),
)


def outcomes(found: dict) -> list[Outcome]:
    """Every target about which something was measured."""
    rows = []
    for number, text, section, measure in _OF_RECORDS:
        cases = {}
        for record in found["records"]:
            value = measure(record) if record["section"] == section else None
            if value is not None:
                cases[_case(record)] = value
        rows.append(Outcome(number, text, cases))
    if "long" in found:
        costs = {r["case"]: float(np.median(r["times"]["edgeattn float32"])) / r["operations"] for r in found["long"]}
        first = next(iter(costs.values()))
        rows.append(Outcome("+", "rows to 16384 keys: time grows as L S (+ 15 %)",
                            {case: 1.15 * first / cost for case, cost in costs.items()}))
    if "overhead" in found:
        case = found["overhead"]["case"]
        rows.append(Outcome("5", "call: under 5 us beside its kernel",
                            {f"{name} {case}": 5e-6 / value for name, value in found["overhead"]["seconds"].items()}))
    if "process" in found:
        rows += _of_processes(found["process"])
    return [row for row in rows if row.cases]


def _of_processes(process):
    warm, kinds = process["warm"], ("float32", "int8", "dynamic")
    memory = {f"{kind}, {count} threads": MIB * int(count) / max(size, 1)
              for count, sizes in process["memory"].items() for kind, size in sizes.items()}
    return [
        Outcome("6", "import: under 0.5 s", {"import": 0.5 / warm["import"]}),
        Outcome("6", "import: under 100 MiB resident", {"import": 100 / warm["import_mib"]}),
        Outcome("6", "warm cache: first result under 0.3 s more", {kind: 0.3 / warm[kind] for kind in kinds}),
        Outcome("6", "warm cache, import: nothing compiled",
                {"import": float(not process["compiled_at_import"]),
                 **{kind: float(not warm[f"{kind}_compiled"]) for kind in kinds}}),
        Outcome("7", "memory: 384/12/512 under 1 MiB a thread", memory),
    ]


def _case(record):
    return record["case"] if record["threads"] == 1 else f"{record['case']} on {record['threads']}"
