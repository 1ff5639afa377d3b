"""Faults in a series of many sensors, by cross-attention: python examples/sensor_anomaly.py

Six sensors of a machine (made by formula: load, temperature, pressure, flow, current, vibration). What a sensor should
read now is the mean of what it read in the past, weighed by how much the others' past is like their present: attention,
with the present as queries and a healthy past as keys and values, kept by `project_kv`. Nothing is trained. A reading
far from that is a fault. Printed: which faults are found, in float32 and int8. Drawn to out/sensor_anomaly.png.
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

OUT = Path(__file__).resolve().parents[1] / "out" / "sensor_anomaly.png"
SENSORS = ("load", "temperature", "pressure", "flow", "current", "vibration")
PAST, PRESENT = 1024, 600
# sensor, first minute, minutes, what is added: a drift, a sensor that sticks, a leak
FAULTS = ((1, 120, 80, 0.9), (5, 300, 60, 1.2), (3, 450, 90, -0.9))
SHARPNESS = 40.0  # of the softmax: how like the past has to be
LIMIT = 4.0  # standard deviations of the healthy past


def series(minutes: int, seed: int) -> np.ndarray:
    """(minutes, sensors): all follow the load, with a delay, and each in its own way."""
    rng = np.random.default_rng(seed)
    t = np.arange(minutes + 60)
    waves = np.sin(t / 37 + rng.uniform(0, 6)) + 0.5 * np.sin(t / 11 + rng.uniform(0, 6))
    load = waves + 0.1 * rng.standard_normal(t.size)
    delayed = np.convolve(load, np.ones(30) / 30)[:t.size]
    pressure = 0.4 * load + 0.7 * delayed
    columns = (load, delayed * 1.4, pressure, np.tanh(1.5 * pressure), 0.8 * load + 0.2 * load ** 2, 0.5 * load ** 2)
    return (np.stack(columns, axis=1)[60:] + 0.05 * rng.standard_normal((minutes, len(SENSORS)))).astype(np.float32)


def layers() -> list[edgeattn.MultiHeadAttention]:
    """For each sensor one head that compares the others and takes the mean of that one's readings."""
    eye = np.eye(len(SENSORS), dtype=np.float32)
    made = []
    for sensor in range(len(SENSORS)):
        others = np.delete(eye, sensor, axis=0) * np.float32(SHARPNESS ** 0.5)
        root = np.float32(len(others) ** 0.25)  # the layer divides scores by the root of the head's width
        made.append(edgeattn.MultiHeadAttention(1, root * others, root * others, eye[sensor:sensor + 1]))
    return made


def expected(form, now: np.ndarray, past: np.ndarray, sensor: int) -> np.ndarray:
    """What the sensor should read, by the others: softmax(q k - k k / 2) weighs by distance, for q q / 2 is common."""
    nearness = -0.5 * SHARPNESS * (np.delete(past, sensor, axis=1) ** 2).sum(axis=1)
    return form(now, form.project_kv(past), attn_mask=nearness[None])[:, 0]


def main() -> int:
    messages.show()
    began = time.perf_counter()
    past, healthy, now = series(PAST, 0), series(PRESENT, 1), series(PRESENT, 2)
    for sensor, first, minutes, added in FAULTS:
        now[first:first + minutes, sensor] += added
    found = {}
    for name in ("float32", "int8"):
        score = np.empty_like(now)
        for sensor, layer in enumerate(layers()):
            form = layer if name == "float32" else quant.quantize(layer, scheme="dynamic")
            usual = (healthy[:, sensor] - expected(form, healthy, past, sensor)).std()
            score[:, sensor] = np.abs(now[:, sensor] - expected(form, now, past, sensor)) / usual
        found[name] = score
        wrong = np.zeros(now.shape, bool)
        for sensor, first, minutes, _ in FAULTS:
            wrong[first:first + minutes, sensor] = True
        clean = ~wrong.any(axis=1)
        told = [f"{SENSORS[sensor]} {np.mean(score[first:first + minutes, sensor] > LIMIT):.0%}"
                for sensor, first, minutes, _ in FAULTS]
        print(f"{name:8s} minutes of a fault that are found: {', '.join(told)}; "
              f"false alarms where nothing is wrong "
              f"{np.mean((score[clean] > LIMIT).any(axis=1)):.1%}")
    figure, axes = plt.subplots(len(SENSORS), 1, figsize=(10, 8), sharex=True, layout="constrained")
    for i, axis in enumerate(axes):
        axis.plot(now[:, i], color="0.4", linewidth=1)
        for sensor, first, minutes, _ in FAULTS:
            if sensor == i:
                axis.axvspan(first, first + minutes, color="tab:red", alpha=0.12)
        alarm = np.flatnonzero(found["int8"][:, i] > LIMIT)
        axis.plot(alarm, now[alarm, i], ".", color="tab:red", markersize=3)
        axis.set(ylabel=SENSORS[i], yticks=[])
    axes[0].set_title("shaded: a fault; red: far from what the others say, of which one may be at fault (int8)")
    axes[-1].set_xlabel("minutes")
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=100)
    print(f"wrote out/{OUT.name}: the series and the alarms")
    print(f"Done in {time.perf_counter() - began:.1f} s.")
    least = min(np.mean(found["int8"][first:first + minutes, sensor] > LIMIT) for sensor, first, minutes, _ in FAULTS)
    return 0 if least > 0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
