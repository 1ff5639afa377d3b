"""scikit-learn's bundled digits: 1797 images of 8x8 pixels, and the one split everybody here uses.

train.py learns from the training part, run.py calibrates on some of it and judges on the test part. Both call
`load_digits_split`, so no test image can slip into training or calibration.
"""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SPLIT_SEED = 0
TEST_SHARE = 0.3


class Digits(NamedTuple):
    """Images are float32 in [0, 1], shape (N, 8, 8); labels are int64 in 0..9, shape (N,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits_split() -> Digits:
    """Return the images and labels, 70 % for training and 30 % for testing, each digit in proportion."""
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)  # the pixels are counts from 0 to 16
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=TEST_SHARE, stratify=digits.target, random_state=SPLIT_SEED
    )
    return Digits(train_images, train_labels, test_images, test_labels)
