"""A streaming encoder on frames of sound, ten milliseconds each: python examples/keyword_streaming.py

Log energies in bands (made by formula here: two chirps in noise) go, frame after frame, through a causal encoder of
4 layers whose caches hold the last half second. Printed: what a frame costs against the 10 ms that it lasts, in
float32 and int8, and whether the stream gave what one call over the whole recording gives. The weights are random:
this is about time, memory and equality. Drawn to out/keyword_streaming.png: the bands, and each frame's time.
"""

import sys
import time
from pathlib import Path

import matplotlib
import numpy as np

import edgeattn
import quant
from edgeattn import messages

matplotlib.use("Agg")  # before pyplot: draw into a file, no window
import matplotlib.pyplot as plt

OUT = Path(__file__).resolve().parents[1] / "out" / "keyword_streaming.png"
BANDS, WIDTH, HIDDEN, HEADS, LAYERS = 40, 96, 384, 4, 4
FRAMES, RATE, HOP = 500, 16_000, 160  # five seconds
SEEN = 50  # frames that a layer looks back
BUDGET = HOP / RATE


def log_bands(seed: int) -> np.ndarray:
    """(FRAMES, BANDS) log energies of noise with two chirps, each frame's mean and size taken out."""
    rng = np.random.default_rng(seed)
    t = np.arange(FRAMES * HOP + 240) / RATE
    sound = 0.05 * rng.standard_normal(t.size)
    for begin, low, rise in ((1.0, 400, 900), (3.0, 2500, -1500)):
        inside = (t >= begin) & (t < begin + 0.8)
        s = t[inside] - begin
        sound[inside] += np.sin(2 * np.pi * (low * s + rise / 2 * s ** 2)) * np.sin(np.pi * s / 0.8)
    frames = np.lib.stride_tricks.sliding_window_view(sound, 400)[::HOP][:FRAMES] * np.hanning(400)
    power = np.abs(np.fft.rfft(frames, 512)) ** 2
    edges = np.round(np.geomspace(2, 256, BANDS + 1)).astype(int)
    bands = np.log([[row[low:max(high, low + 1)].mean() + 1e-6 for low, high in zip(edges, edges[1:], strict=False)]
                    for row in power])
    return ((bands - bands.mean()) / bands.std()).astype(np.float32)


def encoder() -> tuple[np.ndarray, edgeattn.TransformerEncoder]:
    """A projection of the bands, and a pre-norm encoder of random weights."""
    rng = np.random.default_rng(1)

    def matrix(outputs, inputs):
        return rng.standard_normal((outputs, inputs), np.float32) / np.float32(inputs ** 0.5)

    def norm():
        return edgeattn.LayerNorm(np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32))

    layers = [edgeattn.TransformerEncoderLayer(
        edgeattn.MultiHeadAttention(HEADS, *(matrix(WIDTH, WIDTH) for _ in range(4)),
                                    rotary=edgeattn.RotaryEmbedding(WIDTH // HEADS)),
        edgeattn.FeedForward(edgeattn.Linear(matrix(HIDDEN, WIDTH)), edgeattn.Linear(matrix(WIDTH, HIDDEN))),
        norm(), norm(), norm_first=True) for _ in range(LAYERS)]
    return matrix(WIDTH, BANDS), edgeattn.TransformerEncoder(layers, norm=norm())


def stream(form: edgeattn.TransformerEncoder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Frame after frame: results (FRAMES, WIDTH), seconds of each frame, bytes of the caches."""
    window = edgeattn.sliding_window(SEEN)
    caches = form.make_caches(1, 2 * SEEN, window=SEEN)
    results, seconds = [], []
    for frame in x:
        began = time.perf_counter()
        results.append(form(frame[None, None], kv_cache=caches, window_size=window)[0, 0])
        seconds.append(time.perf_counter() - began)
    return np.array(results), np.array(seconds), sum(cache.nbytes for cache in caches)


def main() -> int:
    messages.show()
    edgeattn.set_num_threads(1)
    began = time.perf_counter()
    projection, float32 = encoder()
    bands = log_bands(0)
    x = bands @ projection.T
    print(f"{FRAMES} frames of {1e3 * BUDGET:.0f} ms, {BANDS} bands; "
          f"{LAYERS} layers of {WIDTH}, each sees the last {SEEN}")
    times, worst = {}, 0.0
    for name, form in {"float32": float32, "int8": quant.quantize(float32, scheme="dynamic")}.items():
        stream(form, x[:3])  # compiles, where nothing is compiled yet
        streamed, seconds, held = stream(form, x)
        whole = form(x[None], window_size=edgeattn.sliding_window(SEEN))[0]
        difference = float(np.abs(streamed - whole).max())
        times[name] = seconds
        print(f"{name:8s} a frame {1e6 * np.median(seconds):4.0f} us, 99 of 100 under "
              f"{1e6 * np.quantile(seconds, 0.99):4.0f} us: {np.median(seconds) / BUDGET:.1%} of its time; "
              f"caches {held / 1024:.0f} KiB")
        print(f"{'':8s} from one call over all: {difference:.1e} at most, of values up to {np.abs(whole).max():.1f}")
        if name == "float32":
            worst = difference
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
    at = np.arange(FRAMES) * BUDGET
    above.imshow(bands.T, origin="lower", aspect="auto", extent=(0, FRAMES * BUDGET, 0, BANDS), cmap="magma")
    above.set(ylabel="band", title="two chirps in noise, as an encoder hears them")
    for name, seconds in times.items():
        below.semilogy(at, 1e3 * seconds, ".", markersize=3, label=name)
    below.axhline(1e3 * BUDGET, color="tab:red", label="a frame lasts")
    below.set(xlabel="seconds", ylabel="ms for a frame")
    below.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)  # above the points
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=110)
    print(f"wrote out/{OUT.name}: the bands, and the time of each frame")
    print(f"Done in {time.perf_counter() - began:.1f} s.")
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
