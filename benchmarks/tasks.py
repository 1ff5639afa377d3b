"""How well int8 does what models are for, beside other runtimes: python -m benchmarks.tasks

- sentences: all-MiniLM-L6-v2 on the sentences of examples/minilm: cosine of embeddings to float32, mean and least, and
  how alike all pairs are put in order (Spearman's rank correlation of their similarities);
- recordings: the encoder of examples/sensor on its first test recordings: how many are told right;
- images: the encoder of examples/digits on its test images: how many are told right;
- shapes: encoders of other families' shapes with random weights and a few large features: cosine of the other ones'
  results.

Peers are those of `benchmarks.models`, as it makes them; --ours leaves them out.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import edgeattn
import quant
from benchmarks.models import OURS, ROOT, SAMPLES, Question, Subject, contenders, minilm, padded, sensor
from quant.report import cosines, pair_order

RECORDINGS = 300  # each a call of its own: some peers take one length, and one at a time
CALIBRATION = 256  # images
STATIC = {"edgeattn int8, static": None, "edgeattn int8, static attention": {"*.feed_forward": "dynamic"}}
TASKS = ("sentences", "recordings", "images", "shapes")
SEQUENCES, LARGE = 8, 3  # of `shapes`; large features


class Shape(NamedTuple):
    """Of an encoder."""

    width: int
    heads: int
    hidden: int
    tokens: int
    norm_first: bool = False
    shared: bool = False


SHAPES = {"as BERT-base is": Shape(768, 12, 3072, 64), "as ViT-small is, norms first": Shape(384, 6, 1536, 197, True),
          "as ALBERT is, one layer twice": Shape(768, 12, 3072, 64, shared=True),
          "as MiniLM is, 512 tokens": Shape(384, 12, 1536, 512)}


def ours(subject: Subject, calibration: list[Any]) -> dict[str, Callable]:
    """name -> call of an input, or a list of rows; float32 is torch's place where there is none."""
    found = {name: subject.model if settings is None else quant.quantize(subject.model, scheme="dynamic", **settings)
             for name, settings in OURS.items()}
    seen = quant.calibrate(subject.model, calibration)
    for name, overrides in STATIC.items():
        found[name] = quant.quantize(subject.model, seen, overrides=overrides)
    return found


def with_peers(subject: Subject, mine: dict[str, Callable], alone: bool, judge: Callable[[dict[str, Callable]], None]
               ) -> None:
    """Judge ours, and what can be imported beside it."""
    if alone:
        judge({name: lambda q, call=call: call(q.x if q.rows is None else q.rows) for name, call in mine.items()})
        return
    from benchmarks.encoder_peers import Common
    from benchmarks.encoder_torch import Encoder

    with tempfile.TemporaryDirectory() as folder:
        common = Common(subject.model, Encoder(subject.model), Path(folder) / "model.onnx", subject.samples,
                        Path(folder))
        common.module.exported(subject.samples[0], str(common.graph))
        judge(contenders(common, mine, 1))


def sentences(alone: bool) -> None:
    """Print the table of sentences."""
    subject = minilm()

    def judge(calls: dict[str, Callable]) -> None:
        rows = {name: [np.asarray(call(Question(*padded([ids], subject.longest), [ids]))[0])[: len(ids)].mean(axis=0)
                       for ids in subject.judged] for name, call in calls.items()}
        print(f"\n{subject.title}: {len(subject.judged)} texts\n  {'':34} {'cosine':>8} {'least':>8} {'order':>8}")
        for name, embeddings in rows.items():
            pairs = list(zip(rows["edgeattn float32"], embeddings, strict=True))
            found = cosines(pairs)
            print(f"  {name:34} {found.mean:8.5f} {found.minimum:8.5f} {pair_order(pairs):8.5f}", flush=True)

    with_peers(subject, ours(subject, subject.samples), alone, judge)


def recordings(alone: bool) -> None:
    """Print the table of recordings."""
    from safetensors import safe_open

    data, subject = example("sensor", "data"), sensor()
    with safe_open(ROOT / "examples" / "sensor" / "sensor.safetensors", framework="numpy") as file:
        weight, bias, position, head, head_bias = (file.get_tensor(name).astype(np.float32) for name in (
            "embed.weight", "embed.bias", "position", "head.weight", "head.bias"))
    test, seen = data.recordings(data.TEST_RECORDINGS, data.TEST_SEED), data.recordings(60, data.TRAIN_SEED)
    tokens = test.x[:RECORDINGS] @ weight.T + bias + position
    calibration = [{"x": seen.x @ weight.T + bias + position, "lengths": seen.lengths}]
    rows = [x[:length] for x, length in zip(tokens, test.lengths, strict=False)]
    tell("recordings", subject, calibration, rows, test.labels, lambda y: y @ head.T + head_bias, alone)


def images(alone: bool) -> None:
    """Print the table of images."""
    digits, model = example("digits", "data").load_digits_split(), example("digits", "model").DigitsModel()
    seen, rows = (model.embed(some) for some in (digits.train_images[:CALIBRATION], digits.test_images))
    subject = Subject("the digits' encoder", model.encoder, ((1, len(seen[0])),), False, lambda shape: seen[:shape[0]],
                      [x[None] for x in seen[:SAMPLES]], list(rows), len(seen[0]))
    tell("images", subject, [seen], subject.judged, digits.test_labels,
         lambda y: y @ model.head_weight.T + model.head_bias, alone)


def tell(what: str, subject: Subject, calibration: list[Any], rows: list[np.ndarray], labels: np.ndarray,
         head: Callable[[np.ndarray], np.ndarray], alone: bool) -> None:
    """Print how many of `rows` each encoder tells right: `head` of the mean of its tokens is largest at the label."""
    def judge(calls: dict[str, Callable]) -> None:
        print(f"\n{subject.title}: {len(rows)} {what}")
        for name, call in calls.items():
            right = 0
            for row, label in zip(rows, labels, strict=False):
                y = np.asarray(call(Question(*padded([row], subject.longest), [row]))[0])[:len(row)]
                right += int(head(y.mean(axis=0)).argmax() == label)
            print(f"  {name:34} {right:5} right, {right / len(rows):.2%}", flush=True)

    with_peers(subject, ours(subject, calibration), alone, judge)


def shapes(_: bool) -> None:
    """Print the table of shapes; there are no peers."""
    for title, shape in SHAPES.items():
        made, rng = random_encoder(shape), np.random.default_rng(1)
        data = [rng.standard_normal((SEQUENCES, shape.tokens, shape.width), np.float32) for _ in range(2)]
        for x in data:
            x[..., :LARGE] *= 15
        exact = made(data[1])
        print(f"\n{title}\n  {'':34} {'cosine':>8} {'least':>8}")
        subject = Subject(title, made, (), False, rng.standard_normal, [], [], shape.tokens)
        for name, int8 in ours(subject, [data[0]]).items():
            found = cosines([(a[:, LARGE:], b[:, LARGE:]) for a, b in zip(exact, int8(data[1]), strict=True)])
            print(f"  {name:34} {found.mean:8.5f} {found.minimum:8.5f}", flush=True)


def random_encoder(shape: Shape) -> edgeattn.TransformerEncoder:
    """Two layers, or one twice; some features of the residual stream and some hidden ones are larger than others."""
    rng = np.random.default_rng(0)
    # norms that come last make what is large so; before others it is in the data
    large = np.where(np.arange(shape.width) < LARGE, 1.0 if shape.norm_first else 15.0, 1.0)

    def linear(outputs: int, inputs: int) -> edgeattn.Linear:
        weight = rng.standard_normal((outputs, inputs), np.float32) / np.float32(inputs**0.5)
        weight[:LARGE if outputs > inputs else 0] *= 6
        return edgeattn.Linear(weight, rng.standard_normal(outputs, np.float32) / 10)

    def layer() -> edgeattn.TransformerEncoderLayer:
        weights = [linear(shape.width, shape.width).weight for _ in range(4)]
        network = edgeattn.FeedForward(linear(shape.hidden, shape.width), linear(shape.width, shape.hidden))
        return edgeattn.TransformerEncoderLayer(
            edgeattn.MultiHeadAttention(shape.heads, *weights), network, edgeattn.LayerNorm(large),
            edgeattn.LayerNorm(large), norm_first=shape.norm_first)

    first = layer()
    return edgeattn.TransformerEncoder([first, first if shape.shared else layer()])


def example(folder: str, module: str) -> Any:
    """A module of an example: several have one of the same name."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{module}", ROOT / "examples" / folder / f"{module}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"there is no examples/{folder}/{module}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", action="store_true", help="without other runtimes")
    parser.add_argument("--task", choices=TASKS, action="append", help="this one alone")
    options = parser.parse_args()
    edgeattn.set_num_threads(1)
    for name in options.task or TASKS:
        globals()[name](options.ours)


if __name__ == "__main__":
    main()
