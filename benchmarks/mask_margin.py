"""How much room below its range an int8 score needs for a mask: the table in docs/masks.md.

    python -m benchmarks.mask_margin

For every margin, the scores' range reaches that far below the lowest row maximum seen at calibration (of rows with a
single permitted key, too), the mask is written into the layer (`with_mask`, as in an exported graph), and the cosine of
its output with the float layer's is averaged over random layers. "exact": the mask is given to the call instead, which
leaves masked keys out, and the range is that of the permitted scores, without any margin. Nothing of `quant.quantize`'s
own choice is used: the scores' quantization is set here.
"""

import time

import numpy as np

import edgeattn
import quant
from edgeattn.quantized import SelectMask, StaticMultiHeadAttention, TensorQuantization

MARGINS = (2, 4, 6, 8, 10, 12, 14, 16)
LENGTHS = (16, 64, 128, 256)
SPREADS = (0.5, 2.0)  # of the scores: standard deviation in a row, about
LAYERS = 6
B, H, E = 2, 4, 64
CALIBRATION_CALLS = 4


def random_layer(rng, spread):
    def weight(gain=1.0):
        return (rng.standard_normal((E, E)) * gain / np.sqrt(E)).astype(np.float32)

    return edgeattn.MultiHeadAttention(H, weight(spread), weight(), weight(), weight())


def random_mask(kind, rng, length):
    if kind == "causal":
        return np.tri(length, dtype=bool)
    return np.arange(length) < rng.integers(1, length + 1, (B, 1, 1, 1))


def with_score_range(layer, low, high, *score_ops):
    """The same int8 layer with scores from `low` to `high`."""
    low, high = min(0.0, low), max(0.0, high)
    scale = (high - low) / 255
    scores = TensorQuantization(scale, int(np.clip(np.rint(-128 - low / scale), -128, 127)))
    return StaticMultiHeadAttention(layer.num_heads, layer.linears, {**layer.tensors, "scores": scores},
                                    score_ops=score_ops)


def cosine(a, b):
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))


def measure(kind, length, spread):
    """Mean cosines: one per margin with the mask in the layer, and one with it given to the call."""
    carried, exact = np.zeros((LAYERS, len(MARGINS))), np.zeros(LAYERS)
    for i in range(LAYERS):
        rng = np.random.default_rng(i)
        layer = random_layer(rng, spread)
        calls = [{"query": rng.standard_normal((B, length, E), np.float32), "attn_mask": random_mask(kind, rng, length)}
                 for _ in range(CALIBRATION_CALLS)]
        calibration = quant.calibrate(layer, calls)
        quantized, seen = quant.quantize(layer, calibration), calibration.statistics["scores"]
        x, mask = rng.standard_normal((B, length, E), np.float32), random_mask(kind, rng, length)
        expected = layer(x, attn_mask=mask)
        for j, margin in enumerate(MARGINS):
            low = min(calibration.lowest_row_maximum, calibration.single_scores.minimum) - margin
            carried[i, j] = cosine(with_score_range(quantized, low, seen.maximum, SelectMask(mask))(x), expected)
        exact[i] = cosine(with_score_range(quantized, seen.minimum, seen.maximum)(x, attn_mask=mask), expected)
    return [*carried.mean(0), exact.mean()]


def main():
    start = time.perf_counter()
    print("Mean cosine to float, mask in the int8 layer, by margin (exact: mask given to the call, no margin)")
    print(f"{'mask':8}{'L':>5}{'spread':>8}" + "".join(f"{margin:>9}" for margin in MARGINS) + f"{'exact':>9}")
    rows = []
    for kind in ("causal", "padding"):
        for length in LENGTHS:
            for spread in SPREADS:
                row = measure(kind, length, spread)
                rows.append(row)
                print(f"{kind:8}{length:5}{spread:8}" + "".join(f"{value:9.5f}" for value in row), flush=True)
    print(f"{'mean':21}" + "".join(f"{value:9.5f}" for value in np.mean(rows, 0)))
    print(f"{'worst':21}" + "".join(f"{value:9.5f}" for value in np.min(rows, 0)))
    print(f"{LAYERS} random layers a row, B={B}, H={H}, E={E}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
