"""What attention sees in a photograph: python examples/image_attention.py

A photograph that scikit-learn ships is cut into 14 x 14 patches, as a ViT-tiny cuts it, and goes through one layer of
three heads whose queries and keys compare colour, texture and place: projections are principal components of the
patches' own features, and a bias for each key makes their product a distance, so nothing was trained. Printed: what
float32 and int8 differ by. Drawn to out/image_attention.png: for three patches, where each head looks, in float32 and
in int8.
"""

import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
from sklearn.datasets import load_sample_image

import edgeattn
import quant
from edgeattn import messages

matplotlib.use("Agg")  # before pyplot: draw into a file, no window
import matplotlib.pyplot as plt

OUT = Path(__file__).resolve().parents[1] / "out" / "image_attention.png"
GRID, PATCH, HEAD = 14, 16, 64
HEADS = ("colour", "texture", "place")
SHARPNESS = (2.5, 2.0, 4.0)  # how much larger queries and keys are than standardized features
QUERIES = ((2, 11), (7, 5), (12, 3))  # row and column of a patch: sky, building, lake


def photograph() -> np.ndarray:
    """(224, 224, 3) of 0 to 1, from the middle of the picture."""
    picture = load_sample_image("china.jpg")[:420, 100:520].astype(np.float32) / 255
    rows = (np.arange(GRID * PATCH) * len(picture) / (GRID * PATCH)).astype(int)
    return picture[rows][:, rows]


def features(picture: np.ndarray) -> list[np.ndarray]:
    """For each head (196, n): what it compares, of mean 0 and variance 1."""
    cut = picture.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 1, 3, 4)
    patches = cut.reshape(GRID * GRID, PATCH, PATCH, 3)
    colour = np.concatenate([patches.mean((1, 2)), patches.std((1, 2))], axis=1)
    grey = patches.mean(-1)
    texture = np.log1p(100 * np.abs(np.fft.rfft2(grey - grey.mean((1, 2), keepdims=True)))[:, :8, :8].reshape(-1, 64))
    place = np.stack(np.divmod(np.arange(GRID * GRID), GRID), axis=1).astype(np.float32)
    return [(f - f.mean(0)) / (f.std(0) + 1e-6) for f in (colour, texture, place)]


def layer_of(parts: list[np.ndarray]) -> tuple[np.ndarray, edgeattn.MultiHeadAttention]:
    """Tokens (196, E), the features side by side, and a layer whose heads each compare one part of them."""
    x = np.concatenate(parts, axis=1).astype(np.float32)
    width = x.shape[1]
    weight = np.zeros((len(parts) * HEAD, width), np.float32)
    begin = 0
    for head, (part, sharpness) in enumerate(zip(parts, SHARPNESS, strict=True)):
        directions = np.linalg.svd(part - part.mean(0), full_matrices=False)[2][:HEAD]
        scale = sharpness * (HEAD ** 0.25) / part.shape[1] ** 0.5
        weight[head * HEAD:head * HEAD + len(directions), begin:begin + part.shape[1]] = scale * directions
        begin += part.shape[1]
    return x, edgeattn.MultiHeadAttention(len(parts), weight, weight, weight)


def nearness(x: np.ndarray, layer: edgeattn.MultiHeadAttention) -> np.ndarray:
    """(H, 1, S), -k k / 2 as scores are scaled: q k - k k / 2 is a distance, for q q / 2 is common to a row."""
    keys = (x @ layer.k_weight.T).reshape(len(x), len(HEADS), HEAD)
    return (-0.5 * (keys ** 2).sum(-1) / HEAD ** 0.5).T[:, None]


def draw(picture: np.ndarray, maps: dict[str, np.ndarray]) -> None:
    """For each patch of QUERIES and each head: float32 beside int8."""
    figure, axes = plt.subplots(len(QUERIES), 1 + 2 * len(HEADS), figsize=(14, 6.4), layout="constrained")
    size = GRID * PATCH
    for number, (down, right) in enumerate(QUERIES):
        views = [("the patch", None)] + [(f"{head}, {name}", weights[i, down * GRID + right].reshape(GRID, GRID))
                                         for i, head in enumerate(HEADS) for name, weights in maps.items()]
        for axis, (title, seen) in zip(axes[number], views, strict=True):
            axis.imshow(picture, alpha=1.0 if seen is None else 0.35, extent=(0, size, size, 0))
            if seen is not None:
                axis.imshow(seen / seen.max(), cmap="inferno", alpha=0.7, extent=(0, size, size, 0))
            corner = right * PATCH, down * PATCH
            axis.add_patch(plt.Rectangle(corner, PATCH, PATCH, fill=False, edgecolor="cyan", lw=2))
            axis.set(xticks=[], yticks=[])
            if number == 0:
                axis.set_title(title, fontsize=11)
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=100)


def main() -> int:
    messages.show()
    began = time.perf_counter()
    picture = photograph()
    x, layer = layer_of(features(picture))
    int8 = quant.quantize(layer, scheme="dynamic")
    bias = nearness(x, layer)
    maps = {name: form(x, attn_mask=bias, need_weights=True)[1] for name, form in (("float32", layer), ("int8", int8))}
    print(f"{len(x)} patches of {PATCH} x {PATCH}, {len(HEADS)} heads of {HEAD}")
    for i, head in enumerate(HEADS):
        exact, coded = maps["float32"][i], maps["int8"][i]
        shared = float(np.minimum(exact, coded).sum(-1).mean())
        print(f"{head:8s} {shared:.1%} of the weight lies on the same patches in int8; "
              f"a row spreads over {np.exp2(-(exact * np.log2(exact + 1e-30)).sum(-1)).mean():.0f} patches")
    outputs = layer(x, attn_mask=bias), int8(x, attn_mask=bias)
    cosine = (outputs[0] * outputs[1]).sum(-1) / np.prod([np.linalg.norm(y, axis=-1) for y in outputs], axis=0)
    print(f"results: cosine of int8 to float32 {cosine.mean():.5f}, least {cosine.min():.5f}")
    draw(picture, maps)
    print(f"wrote out/{OUT.name}: where each head looks")
    print(f"Done in {time.perf_counter() - began:.1f} s.")
    return 0 if cosine.min() > 0.99 else 1


if __name__ == "__main__":
    sys.exit(main())
