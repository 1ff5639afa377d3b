"""Running the sections of a benchmark: each gives records that JSON can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks import cases as small
from benchmarks import contenders, costs, decode, functional
from benchmarks.contenders import CannotSayError, Contender, WrongAnswerError
from benchmarks.limits import limits, read_limits, read_rates
from benchmarks.problem import Point, Problem
from benchmarks.timing import interleave
from edgeattn.threads import set_num_threads

SECTIONS = ("layer", "functional", "cases", "decode", "causal", "long", "overhead", "process")
PARTS = {"functional": 1 / 3, "decode": 1 / 3, "cases": 1 / 30}  # of the seconds that a layer is timed for
CAUSAL_POINT = Point(384, 12, 512)
OVERHEAD_POINT = Point(64, 4, 32)

Progress = Callable[[str], object]


def record(section: str, problem, rows: Sequence[Contender], threads: int, seconds: float, bounds: dict) -> dict:
    """Check every contender on one problem, then time those that passed against each other.

    Parameters
    ----------
    section : str
    problem : Problem, decode.DecodeProblem or functional.AttentionProblem
    rows : sequence of Contender
    threads : int
        edgeattn must be set to it.
    seconds : float
        To spend on timing, about.
    bounds : dict
        What ``limits`` gave: timed like contenders.

    Returns
    -------
    dict
        section, threads, case, operations (of the problem, and of each bound), times (name -> seconds per call in each
        round), refused (name -> why).
    """
    ready, refused = {}, {}  # a contender's memory may hang on its reader: kept until all is timed
    for row in rows:
        try:
            ready[row.name] = row.ready(problem, threads)
        except WrongAnswerError as error:
            refused[row.name] = str(error)
        except CannotSayError:
            continue
    calls = {name: contender.call for name, contender in ready.items()}
    calls |= {name: call for name, (call, _) in bounds.items()}
    times = interleave(calls, seconds=seconds, threads=threads) if calls else {}
    return {"section": section, "threads": threads, "case": str(problem.point), "operations": problem.point.operations,
            "bounds": {name: operations for name, (_, operations) in bounds.items()}, "times": times,
            "refused": refused}


def available(rows: Iterable[Contender]) -> list[Contender]:
    """The rows that can run here."""
    return [row for row in rows if row.why_not() is None]


def _set_blas_threads(count: int) -> None:
    """NumPy's matrix products, where the package that can steer them is installed (scikit-learn brings it)."""
    try:
        import threadpoolctl
    except ImportError:
        return
    threadpoolctl.threadpool_limits(count, user_api="blas")


def run(sections: Sequence[str], points: Sequence[Point], counts: Sequence[int], seconds: float, peers: bool,
        progress: Progress) -> dict:
    """Measure.

    Parameters
    ----------
    sections : sequence of str
        Of SECTIONS.
    points : sequence of Point
        Of the layer section.
    counts : sequence of int
        Numbers of threads.
    seconds : float
        Per case, about.
    peers : bool
    progress : callable
        Told what comes next.

    Returns
    -------
    dict
        "records": list as ``record`` gives them; "reads": by number of threads, as ``read_rates`` gives it; "long",
        "overhead", "process": see `benchmarks.costs`.
    """
    def rows(module):
        return available([*module.OURS, *(module.PEERS if peers else ())])

    found: dict = {"records": []}
    for count in sorted(counts):
        set_num_threads(count)
        _set_blas_threads(count)
        bounds = limits(count)
        cases = []
        if "layer" in sections:
            cases += [("layer", Problem, point, contenders) for point in points]
        if "functional" in sections:
            cases += [("functional", functional.AttentionProblem, shape, functional) for shape in functional.SHAPES]
        if "cases" in sections:
            cases += [("cases", small.CaseProblem, point, small) for point in small.CASES]
        if "decode" in sections:
            found.setdefault("reads", {})[str(count)] = read_rates(count)
            cases += [("decode", decode.DecodeProblem, step, decode) for step in decode.STEPS]
        for section, kind, point, module in cases:
            progress(f"{section} {point}, {count} thread{'s' * (count > 1)}")
            part, problem = seconds * PARTS.get(section, 1), kind(point)
            beside = {} if section == "cases" else bounds
            if section == "decode":
                beside = read_limits(problem.caches(), point.operations)
            found["records"].append(record(section, problem, rows(module), count, part, beside))
        if "causal" in sections:
            cases = [("causal layer", CAUSAL_POINT, Problem, functional.causal_layer_calls)]
            cases += [("causal attention", shape, functional.AttentionProblem, functional.causal_calls)
                      for shape in functional.CAUSAL]
            for section, point, kind, calls in cases:
                progress(f"{section} {point}")
                found["records"].append({
                    "section": section, "threads": count, "case": str(point), "operations": point.operations,
                    "causal_operations": point.causal_operations, "bounds": {}, "refused": {},
                    "times": interleave(calls(kind(point)), seconds=seconds, threads=count)})
    set_num_threads(1)
    if "long" in sections:
        found["long"] = []
        for shape in functional.LONG:
            progress(f"long rows {shape}")
            problem = functional.AttentionProblem(shape)
            call, _ = functional.OURS[0].build(problem, 1)
            times = interleave({"edgeattn float32": call, **{k: c for k, (c, _) in limits(1).items()}},
                               seconds=seconds / 3)
            found["long"].append({"section": "long", "threads": 1, "case": str(shape), "operations": shape.operations,
                                  "bounds": {k: n for k, (_, n) in limits(1).items()}, "times": times, "refused": {}})
    if "overhead" in sections:
        progress(f"call overhead {OVERHEAD_POINT}")
        problem = Problem(OVERHEAD_POINT)
        found["overhead"] = {"case": str(OVERHEAD_POINT), "seconds": costs.call_overhead(problem),
                             "steps": costs.cached_steps(problem)}
    if "process" in sections:
        progress("import, first results and memory in processes of their own (compiles everything once)")
        found["process"] = costs.processes(peers, sorted({*counts, 1}))
    return found
