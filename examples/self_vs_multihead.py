"""One head against many: the textbook comparison, on a trained model.

    python examples/self_vs_multihead.py

Two digits Transformers of the same width were trained alike (examples/digits/train.py): in one, every
attention layer has four heads, in the other one. Both see the same test images here. Printed, and drawn
to out/self_vs_multihead.png:

- what each head attends to: how far it looks, how widely it spreads, how much of it falls on ink, and which
  neighbour it looks at most;
- how different the heads are from each other, as a number (`diversity`);
- parameters, operations (by formula) and measured time, side by side.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
from digits.data import load_digits_split
from digits.model import GRID, NUM_LAYERS, NUM_PATCHES, ONE_HEAD_WEIGHTS, WEIGHTS, DigitsModel, patches

import edgeattn
from edgeattn import messages
from quant.tables import console as new_console
from quant.tables import short, table

matplotlib.use("Agg")  # before pyplot: draw into a file, no window
import matplotlib.pyplot as plt

OUT = Path(__file__).resolve().parents[1] / "out" / "self_vs_multihead.png"
SHOWN_IMAGE = 3  # of the test images
ROUNDS = 200  # timed calls of each layer

# Row and column of every patch in the image, and the distance between any two, in patches.
POSITIONS = np.stack(np.divmod(np.arange(NUM_PATCHES), GRID), axis=-1)
DISTANCES = np.linalg.norm(POSITIONS[:, np.newaxis] - POSITIONS, axis=-1)


def entropy(p: np.ndarray) -> np.ndarray:
    """-sum p log2 p over the last axis, in bits; 0 log 0 is 0."""
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=-1)


def diversity(weights: np.ndarray) -> float:
    """How differently the heads attend: the mean pairwise Jensen-Shannon divergence, in bits.

    For the attention rows p and q of two heads, JSD = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2.
    It is 0 when both look at the same keys in the same proportion, and 1 when no key is looked at by both.
    The mean is taken over all pairs of heads, all queries and all images.

    Parameters
    ----------
    weights : ndarray (B, H, L, S), H >= 2
    """
    pairs = itertools.combinations(range(weights.shape[1]), 2)
    divergences = [
        entropy((weights[:, a] + weights[:, b]) / 2) - (entropy(weights[:, a]) + entropy(weights[:, b])) / 2
        for a, b in pairs
    ]
    return float(np.mean(divergences))


def favourite_neighbour(weights: np.ndarray) -> tuple[str, float]:
    """Where the most attended patch most often lies, from the query, and how often; weights (B, L, S)."""
    target = POSITIONS[weights.argmax(axis=-1)]  # (B, L, 2)
    steps = Counter(map(tuple, (target - POSITIONS).reshape(-1, 2).tolist()))
    (down, right), count = steps.most_common(1)[0]
    return f"{down:+d}, {right:+d}", count / (target.size // 2)


def describe_heads(weights: dict[str, list[np.ndarray]], images: np.ndarray):
    """One row per head: what it attends to, over all test images."""
    ink = patches(images).mean(axis=-1)  # (B, L)
    inked = ink > ink.mean(axis=1, keepdims=True)
    titles = ("model", "layer", "head", "distance\npatches", "entropy\nbits", "on ink", "most often at\ndown, right")
    shown = table(*titles, title="What each head attends to, mean over the test images")
    for name, layers in weights.items():
        for layer, w in enumerate(layers):
            for head in range(w.shape[1]):
                one = w[:, head]
                where, share = favourite_neighbour(one)
                shown.add_row(
                    name,
                    str(layer),
                    str(head),
                    f"{(one * DISTANCES).sum(-1).mean():.2f}",
                    f"{entropy(one).mean():.2f}",
                    f"{(one * inked[:, np.newaxis]).sum(-1).mean():.0%}",
                    f"{where} ({share:.0%})",
                )
            shown.add_section()
    shown.add_row(
        "even attention",
        "",
        "",
        f"{DISTANCES.mean():.2f}",
        f"{np.log2(NUM_PATCHES):.2f}",
        f"{inked.mean():.0%}",
        "",
    )
    return shown


def median_times(layers, x: np.ndarray) -> list[float]:
    """Median seconds per call of each layer on x; the calls take turns, so a slow moment hits them all."""
    for layer in layers:
        layer(x)  # compile and warm up
    times = [[] for _ in layers]
    for _ in range(ROUNDS):
        for layer, own in zip(layers, times, strict=True):
            begin = time.perf_counter()
            layer(x)
            own.append(time.perf_counter() - begin)
    return [statistics.median(own) for own in times]


def num_parameters(layer) -> int:
    tensors = (
        layer.q_weight,
        layer.k_weight,
        layer.v_weight,
        layer.out_weight,
        layer.q_bias,
        layer.k_bias,
        layer.v_bias,
        layer.out_bias,
    )
    return sum(tensor.size for tensor in tensors if tensor is not None)


def operations(layer, length: int) -> tuple[int, int]:
    """Multiply-adds and exponentials of one self-attention call on (1, L, E), by formula.

    projections  4 L E E        scores  H L L D = L L E        context  H L L D = L L E        softmax  H L L
    """
    width = layer.embed_dim
    return 4 * length * width * width + 2 * length * length * width, layer.num_heads * length * length


def random_pair(width: int, num_heads: int) -> list[edgeattn.MultiHeadAttention]:
    """One head and `num_heads` heads with the very same random weights."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, width, width), dtype=np.float32) / np.float32(np.sqrt(width))
    return [edgeattn.MultiHeadAttention(heads, *weights) for heads in (1, num_heads)]


def cost_table(trained):
    """Parameters, operations and time of one head and many: trained, on a longer input, in a wider layer."""
    headings = (
        "width x\nlength",
        "heads",
        "param-\neters",
        "multiply-\nadds",
        "expo-\nnentials",
        "time\nus",
        "ratio",
    )
    shown = table(*headings, text=0, title="Cost of one layer on one sequence")
    rng = np.random.default_rng(0)
    verdicts = []
    for pair, length in ((trained, NUM_PATCHES), (trained, 128), (random_pair(256, 8), 128)):
        x = rng.standard_normal((1, length, pair[0].embed_dim), dtype=np.float32)
        times = median_times(pair, x)
        size = f"{pair[0].embed_dim} x {length}"
        for layer, seconds in zip(pair, times, strict=True):
            multiply_adds, exponentials = operations(layer, length)
            shown.add_row(
                size,
                str(layer.num_heads),
                f"{num_parameters(layer):,}",
                f"{multiply_adds:,}",
                f"{exponentials:,}",
                f"{seconds * 1e6:,.0f}",
                f"{seconds / times[0]:.2f}",
            )
        shown.add_section()
        verdicts.append(f"{pair[1].num_heads} heads take {times[1] / times[0]:.2f} times as long as one at {size}")
    return shown, verdicts


def _frame(corner, width: float, linewidth: float):
    """A blue frame around the query whose attention is shown."""
    return plt.Rectangle(
        corner, width, 1, fill=False, edgecolor="tab:blue", linewidth=linewidth, zorder=4, clip_on=False
    )


def draw(image: np.ndarray, weights: dict[str, list[np.ndarray]], path: Path) -> None:
    """Attention of both models for one image (8, 8): per layer the whole map, and where one patch looks.

    weights: model name -> per layer (H, L, S).
    """
    columns = [(name, head) for name, layers in weights.items() for head in range(len(layers[0]))]
    query = int(image.reshape(GRID, 2, GRID, 2).sum(axis=(1, 3)).argmax())  # the patch with the most ink
    corner = POSITIONS[query][::-1]
    strongest = 0.5  # the colour scale's end: a few weights lie above it
    box = (0, GRID, GRID, 0)  # left, right, bottom, top: one unit is one patch

    figure, axes = plt.subplots(
        2 * NUM_LAYERS, 1 + len(columns), figsize=(2.0 * len(columns) + 3.2, 8.6), layout="constrained"
    )
    figure.suptitle("One head against four: one digit, two trained models of the same width\n", fontsize=15)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis in axes[:, 0]:
        axis.set_axis_off()
    for row in range(1, 2 * NUM_LAYERS, 2):
        axes[row, 0].imshow(image, cmap="Greys", extent=box)
        axes[row, 0].set_title("the digit", fontsize=10)
        for line in range(GRID + 1):
            axes[row, 0].axhline(line, color="0.7", linewidth=0.8)
            axes[row, 0].axvline(line, color="0.7", linewidth=0.8)
        axes[row, 0].add_patch(_frame(corner, 1, 2.5))
    for layer in range(NUM_LAYERS):
        key = axes[2 * layer, 0]
        key.text(0.0, 0.92, f"layer {layer}", fontsize=13, weight="bold", va="top", transform=key.transAxes)
        legend = (
            "top: a row per query\npatch, a column per key\n\nbottom: where the patch\nframed in blue looks"
        )
        key.text(0.0, 0.66, legend, fontsize=10.5, va="top", transform=key.transAxes)

    for x, (name, head) in enumerate(columns, start=1):
        axes[0, x].set_title(name if len(weights[name][0]) == 1 else f"{name}: head {head}", fontsize=12)
        for layer in range(NUM_LAYERS):
            one = weights[name][layer][head]
            whole, view = axes[2 * layer, x], axes[2 * layer + 1, x]
            shown = whole.imshow(one, cmap="Reds", vmin=0.0, vmax=strongest)
            whole.add_patch(_frame((-0.5, query - 0.5), NUM_PATCHES, 1.6))
            view.imshow(image, cmap="Greys", extent=box, vmax=2.0)  # pale, so that the colour above it shows
            seen = one[query].reshape(GRID, GRID)
            view.imshow(
                seen,
                cmap="Reds",
                vmin=0.0,
                vmax=strongest,
                extent=box,
                alpha=np.clip(2.5 * seen / strongest, 0.0, 0.8),
            )
            view.add_patch(_frame(corner, 1, 2.5))
    figure.colorbar(shown, ax=axes, shrink=0.5, aspect=30, pad=0.02, extend="max", label="attention weight")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare one head with four, on trained layers.")
    parser.add_argument("--out", type=Path, default=OUT, help="where to draw (default: in out/)")
    out = parser.parse_args().out
    messages.show()
    started = time.perf_counter()
    console = new_console()
    digits = load_digits_split()

    weights, layers = {}, {}
    for name, path in (("one head", ONE_HEAD_WEIGHTS), ("four heads", WEIGHTS)):
        model = DigitsModel(path)
        layers[name] = model.attention_layers()
        correct = int((model.predict(digits.test_images) == digits.test_labels).sum())
        console.print(f"{name:10s}: {correct} of {len(digits.test_labels)} test images right")
        inputs = model.attention_inputs(digits.test_images)
        weights[name] = [
            layer(x, need_weights=True)[1] for layer, x in zip(layers[name], inputs, strict=True)
        ]

    console.print()
    console.print(describe_heads(weights, digits.test_images))
    console.print("on ink: the weight that falls on patches with more ink than the mean patch")
    console.print("most often at: the most attended patch, seen from the query (share of queries)")
    values = ", ".join(f"layer {i} {diversity(w):.3f} bit" for i, w in enumerate(weights["four heads"]))
    console.print(f"\nDiversity of the four heads: {values}")
    console.print("(mean pairwise Jensen-Shannon divergence; 0 = all alike, 1 = no key in common)\n")

    costs, verdicts = cost_table((layers["one head"][0], layers["four heads"][0]))
    console.print(costs)
    console.print("Parameters and multiply-adds are the same; only the softmax grows, one per head.")

    draw(digits.test_images[SHOWN_IMAGE], {n: [w[SHOWN_IMAGE] for w in ws] for n, ws in weights.items()}, out)
    console.print(f"\nwrote {short(out)}: the attention maps", soft_wrap=True, markup=False)
    console.print(f"Done in {time.perf_counter() - started:.1f} s: {verdicts[-1]}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
