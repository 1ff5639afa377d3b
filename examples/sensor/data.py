"""Vibration of a rotating machine with one of five faults, made by formula: nothing is downloaded.

A recording is two accelerometers at 1 kHz, 192 to 512 samples long. t in seconds, f = 20 to 30 Hz is the machine's
speed, w = 2 pi f, p a random phase:

    healthy       sin(w t + p)
    unbalance     2 sin(w t + p), the second accelerometer a quarter of a turn later
    misalignment  sin(w t + p) + 1.2 sin(2 w t + 2 p + 1)
    looseness     sin(w t + p) + 0.8 sin(w t / 2 + p), cut off at 0.9
    bearing       sin(w t + p) + knocks 3.58 times a turn, each ringing at 180 Hz and over in some 10 ms
    gear          sin(w t + p) + 0.8 (1 + sin(w t + p)) sin(9 w t + p)

times a level of 0.5 to 1.5, plus as much noise as NOISE says. A token is 8 samples of both; the shorter recordings are
padded to 64 tokens.
"""

from typing import NamedTuple

import numpy as np

FAULTS = ("healthy", "unbalance", "misalignment", "looseness", "bearing", "gear")
TOKENS, SAMPLES = 64, 8
RATE = 1000.0
NOISE = 0.8
TRAIN_SEED, TEST_SEED, TEST_RECORDINGS = 1, 2, 1200


class Recordings(NamedTuple):
    """x: (N, 64, 16) float32, zeros where there is none; lengths, labels: (N,)."""

    x: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


def vibration(fault: str, t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Both accelerometers, (samples, 2), without level and noise."""
    w, p = 2 * np.pi * rng.uniform(20, 30), rng.uniform(0, 2 * np.pi)
    turn = np.stack([w * t + p, w * t + p - 0.4], axis=-1)
    if fault == "unbalance":
        turn = np.stack([w * t + p, w * t + p - np.pi / 2], axis=-1)
        return 2 * np.sin(turn)
    base = np.sin(turn)
    if fault == "misalignment":
        return base + 1.2 * np.sin(2 * turn + 1)
    if fault == "looseness":
        return np.minimum(base + 0.8 * np.sin(turn / 2), 0.9)
    if fault == "bearing":
        since = 2 * np.pi * ((3.58 * turn / (2 * np.pi)) % 1) / (3.58 * w)  # seconds since the last knock
        return base + 2 * np.exp(-since / 0.003) * np.sin(2 * np.pi * 180 * since)
    if fault == "gear":
        return base + 0.8 * (1 + base) * np.sin(9 * turn)
    return base


def recordings(number: int, seed: int) -> Recordings:
    """So many recordings, the faults in turn."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % len(FAULTS)
    lengths = rng.integers(TOKENS * 3 // 8, TOKENS + 1, number)
    x = np.zeros((number, TOKENS, 2 * SAMPLES), np.float32)
    t = np.arange(TOKENS * SAMPLES) / RATE
    for row, length, label in zip(x, lengths, labels, strict=True):
        signal = vibration(FAULTS[label], t, rng) * rng.uniform(0.5, 1.5)
        signal += NOISE * rng.standard_normal(signal.shape)
        row[:length] = signal.reshape(TOKENS, 2 * SAMPLES)[:length]
    return Recordings(x, lengths, labels)
