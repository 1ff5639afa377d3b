"""Small encoders and models of random weights for tests."""

import numpy as np
from arrays import numbers as random

import edgeattn
from edgeattn.layers import (
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    PatchEmbedding,
    TransformerEncoder,
    TransformerEncoderLayer,
)

E, F, H = 32, 64, 4


def encoder(*, norm_first=False, gate=False, seed=0, layers=2, **positions):
    """Weights of such sizes that features stay near 1."""
    def linear(outputs, inputs, seed):
        return Linear(random(outputs, inputs, seed=seed) / np.float32(inputs**0.5), random(outputs, seed=seed + 1))

    def layer(i):
        weights = [random(E, E, seed=i + j) / np.float32(E**0.5) for j in range(4)]
        attention = edgeattn.MultiHeadAttention(H, *weights, **positions)
        feed_forward = FeedForward(linear(F, E, i + 4), linear(E, F, i + 6), gate=linear(F, E, i + 8) if gate else None)
        return TransformerEncoderLayer(attention, feed_forward, LayerNorm(np.ones(E)), LayerNorm(np.ones(E)),
                                       norm_first=norm_first)

    return TransformerEncoder([layer(seed + 10 + 20 * i) for i in range(layers)])


def text_encoder(**options):
    """Of 50 tokens and 20 positions."""
    return edgeattn.TextEncoder(Embedding(random(50, E), random(20, E), norm=LayerNorm(np.ones(E))), encoder(),
                                **options)


def image_encoder():
    """Of images of two channels, 8 by 8, in patches of 4 by 4."""
    return edgeattn.ImageEncoder(PatchEmbedding(
        Linear(random(E, 32) / 6), random(4, E), patch_size=(4, 4), image_size=(8, 8)), encoder())
