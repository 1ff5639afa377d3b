"""Faults of a rotating machine by a whole encoder, in float32, dynamic and static int8: python examples/sensor/run.py

The encoder (2 layers, width 64, hidden 256, 4 heads) was trained by train.py on vibration made by formula (data.py).
The exit status is 0 only when float32 gives the accuracy noted at training, within one recording: sines differ in
their last bit between machines.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
from data import TEST_RECORDINGS, TEST_SEED, TRAIN_SEED, recordings
from safetensors import safe_open

import edgeattn
import quant
from edgeattn import messages

WEIGHTS = Path(__file__).with_name("sensor.safetensors")
CALLS = 51
CALIBRATION_RECORDINGS = 60


def main() -> int:
    messages.show()
    with safe_open(WEIGHTS, framework="numpy") as file:
        noted = int(file.metadata()["test_correct"])
        names = ("embed.weight", "embed.bias", "position", "head.weight", "head.bias")
        weight, bias, position, head, head_bias = (file.get_tensor(name).astype(np.float32) for name in names)
    encoder = edgeattn.TransformerEncoder.from_torch(WEIGHTS, 4, activation="gelu", norm_first=True, prefix="encoder.")
    test = recordings(TEST_RECORDINGS, TEST_SEED)
    tokens = test.x @ weight.T + bias + position
    edgeattn.set_num_threads(1)
    seen = recordings(CALIBRATION_RECORDINGS, TRAIN_SEED)
    calibration = quant.calibrate(encoder, [{"x": seen.x @ weight.T + bias + position, "lengths": seen.lengths}])
    forms = {"float32": encoder, "int8": quant.quantize(encoder, scheme="dynamic"),
             "static": quant.quantize(encoder, calibration)}
    correct = {}
    for name, form in forms.items():
        encoded = form(tokens, lengths=test.lengths)  # rows of padding are zeros
        scores = encoded.sum(axis=1) / test.lengths[:, None] @ head.T + head_bias
        correct[name] = int((scores.argmax(axis=-1) == test.labels).sum())
        seconds = []
        for _ in range(CALLS):
            began = time.perf_counter()
            form(tokens[:1], lengths=test.lengths[:1])
            seconds.append(time.perf_counter() - began)
        print(f"{name} {correct[name]} of {TEST_RECORDINGS} right, {correct[name] / TEST_RECORDINGS:.2%}; "
              f"a recording of {test.lengths[0]} tokens: {1e6 * statistics.median(seconds):.0f} us")
    return 0 if abs(correct["float32"] - noted) <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
