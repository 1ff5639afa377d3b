"""The pictures of the documentation that are drawn: python tools/pictures.py, into docs/pictures.

What they show is computed here, by the formulas that the pages give; heads.png is drawn by
examples/self_vs_multihead.py.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # before pyplot: draw into a file, no window
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures"
BLUE, RED, GREY = "#1f6fb2", "#c0392b", "0.55"
YES, NO = "#e3f1ec", "#f4f4f4"


def save(figure, name: str) -> None:
    """Write a figure whose bytes depend on its content alone."""
    figure.savefig(OUT / name, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    path = OUT / name
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def codes(x, step):
    """Symmetric int8: the nearest multiple of a step, at most 127 of them."""
    return np.clip(np.rint(x / step), -127, 127) * step


def draw_codes() -> None:
    """A range cut into steps: few steps, so that one sees them."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    x = np.linspace(0, 2 * np.pi, 400)
    real, step = np.sin(x) + 0.3 * np.sin(3 * x), 0.16
    axis.plot(x, real, color=GREY, label="real values")
    axis.step(x, codes(real, step), color=BLUE, where="mid", label="codes x scale")
    for level in np.arange(-7, 8) * step:
        axis.axhline(level, color="0.9", linewidth=0.7, zorder=0)
    axis.set(xticks=[], ylabel="value", title="15 codes instead of 255, so that the steps can be seen")
    axis.legend(frameon=False, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "codes.svg")


def draw_outlier() -> None:
    """One feature sets the step of all others; kept apart in float32, it does not."""
    rng = np.random.default_rng(0)
    token = rng.standard_normal(48) * 0.5
    token[17] = 60.0
    rest = np.delete(token, 17)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, largest, title in ((axes[0], 60.0, "one scale for all: a step of {:.2f}"),
                                 (axes[1], np.abs(rest).max(), "the large one in float32: a step of {:.3f}")):
        step = largest / 127
        got = codes(token, step)
        places = np.arange(48)
        axis.bar(places, token, color="0.8", label="real")
        shown = np.abs(token) <= largest
        axis.plot(places[shown], got[shown], "_", color=BLUE, markersize=7, markeredgewidth=2, label="code x scale")
        if largest < 60:
            axis.plot(17, 1.9, "^", color=RED)
            axis.annotate("60, float32", (17, 1.9), xytext=(19, 1.75), color=RED)
        else:
            axis.annotate("60", (17, 1.9), xytext=(18.5, 1.75), color=RED)
        axis.set(ylim=(-2, 2.1), xticks=[], title=title.format(step), xlabel="the features of one token")
        axis.spines[["top", "right"]].set_visible(False)
        error = np.sqrt(np.mean((np.delete(got, 17) - rest) ** 2) / np.mean(rest ** 2))
        axis.text(0.02, 0.03, f"error of the others {100 * error:.1f} %", transform=axis.transAxes)
    axes[1].legend(frameon=False, loc="lower right", fontsize=9, handlelength=1)
    save(figure, "outlier.svg")


def draw_probabilities() -> None:
    """Rows of softmax in steps of 1/256: what a long even row keeps of its weight."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    keys = np.array([8, 16, 32, 64, 128, 256, 400, 512, 700, 1024])
    rng = np.random.default_rng(0)
    kept = []
    for count in keys:
        scores = rng.standard_normal((200, count))
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        kept.append(np.minimum(np.rint(weights * 256), 255).sum(1).mean() / 256)
    axis.semilogx(keys, np.array(kept) * 100, "o-", color=RED, base=2)
    axis.set(xticks=[8, 32, 128, 512, 1024], ylim=(0, 112), ylabel="weight kept, %",
             xlabel="keys of a row (random scores of variance 1)")
    axis.set_xticklabels(["8", "32", "128", "512", "1024"])
    axis.minorticks_off()
    axis.set_title("What a row keeps of its weight when probabilities are multiples of 1/256")
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "probabilities.svg")


def draw_forms() -> None:
    """Which form for which board, as questions from the top; narrow, so that a phone shows all of it."""
    figure, axis = plt.subplots(figsize=(5.5, 7.4))
    axis.set(xlim=(0, 5.5), ylim=(-0.1, 7.3))
    axis.axis("off")

    def box(x, y, width, colour, lines):
        shape = FancyBboxPatch((x, y - 0.42), width, 0.84, boxstyle="round,pad=0.04", facecolor=colour, edgecolor="0.4")
        axis.add_patch(shape)
        for i, (text, weight, shade) in enumerate(lines):
            axis.text(x + width / 2, y + 0.22 * ((len(lines) - 1) / 2 - i), text, ha="center", va="center", fontsize=9,
                      weight=weight, color=shade)

    def question(text):
        return [(line, "normal", "black") for line in text.splitlines()]

    def answer(form, *remarks):
        return [(form, "bold", "black"), *((remark, "normal", "0.3") for remark in remarks)]

    rows = [
        ("a microcontroller\n(Cortex-M)?", answer("C99", 'quant.export(static, "layer.c")')),
        ("a 32-bit system, or an\napp that has LiteRT?", answer(".tflite", 'quant.export(static, "layer.tflite")')),
        ("a workstation, or\nnothing that hurries?", answer("pip install .", "kernels compile at their first call")),
        ("one model, one file,\nNumPy alone?",
         answer("bundle", "quant export model.safetensors", "model.so --target cortex-a72")),
    ]
    y = 6.7
    for asked, said in rows:
        box(0.05, y, 1.9, NO, question(asked))
        box(2.5, y, 2.95, YES, said)
        axis.annotate("", (2.44, y), (2.01, y), arrowprops={"arrowstyle": "->", "color": "0.3"})
        axis.text(2.22, y + 0.1, "yes", ha="center", fontsize=9)
        axis.annotate("", (1.0, y - 0.96), (1.0, y - 0.48), arrowprops={"arrowstyle": "->", "color": "0.3"})
        axis.text(1.1, y - 0.76, "no", fontsize=9)
        y -= 1.45
    box(0.05, y, 3.2, YES, answer("wheel with every kernel compiled", "make wheels; pip install --no-deps"))
    save(figure, "forms.svg")


if __name__ == "__main__":
    plt.rcParams.update({"svg.hashsalt": "edgeattn", "svg.fonttype": "none", "font.size": 10})
    OUT.mkdir(parents=True, exist_ok=True)
    for draw in (draw_codes, draw_outlier, draw_probabilities, draw_forms):
        draw()
