"""Static layers of random weights, calibrated on random calls, and codes for them."""
import numpy as np
from workbench import as_batch, random_call, random_layer

import quant

SOURCES = [(0, 0, 0), (0, 1, 1), (0, 1, 2)]


def make(seed=1, sources=(0, 0, 0), *, masked=True, **options):
    layer = random_layer(seed, **options)
    masks = {"is_causal": True, "causal_alignment": "lower_right"} if masked else {}
    calls = [as_batch(random_call(layer, sources, 10 * i), **masks) for i in range(20)]
    return layer, quant.quantize(layer, quant.calibrate(layer, calls))


def codes(seed, *shape):
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)
