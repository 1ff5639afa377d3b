"""Linear, the norms and FeedForward against their formulas."""

import pickle

import numpy as np
import pytest
import reference_encoder as oracle

import quant
from edgeattn import (
    FeedForward,
    LayerNorm,
    Linear,
    MultiHeadAttention,
    RMSNorm,
    TransformerEncoder,
    TransformerEncoderLayer,
)

CLOSE = dict(rtol=0, atol=3e-6)


def normal(*shape, seed=0, size=1.0):
    return np.random.default_rng(seed).normal(0, size, shape).astype(np.float32)


W, B, X = normal(5, 7), normal(5, seed=1), normal(2, 3, 7, seed=2)


@pytest.mark.parametrize("bias", [None, B])
def test_linear(bias):
    layer = Linear(W, bias)
    np.testing.assert_allclose(layer(X), oracle.linear(X, W, bias), **CLOSE)
    np.testing.assert_array_equal(layer(X)[1, 2], layer(X[1, 2]))
    assert layer(X.astype(np.float16)).dtype == np.float16 and layer(np.zeros((0, 7))).shape == (0, 5)


@pytest.mark.parametrize("weight, bias", [(normal(7), None), (normal(7), normal(7, seed=1))])
def test_layer_norm(weight, bias):
    x = X * 100 + 1000
    np.testing.assert_allclose(LayerNorm(weight, bias, 1e-3)(x), oracle.layer_norm(x, weight, bias, 1e-3), **CLOSE)


def test_rms_norm():
    np.testing.assert_allclose(RMSNorm(normal(7), 1e-2)(X), oracle.rms_norm(X, normal(7), 1e-2), **CLOSE)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", sorted(oracle.ACTIVATIONS))
def test_feed_forward(kind, gated):
    w = oracle.random_layer(np.random.default_rng(4), 7, 11, gated=gated)
    gate = Linear(*w["gate"]) if gated else None
    layer = FeedForward(Linear(*w["linear1"]), Linear(*w["linear2"]), activation=kind, gate=gate)
    x = X * 3
    np.testing.assert_allclose(layer(x), oracle.feed_forward(x, w, kind), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@pytest.mark.parametrize("scheme", ["float32", "dynamic"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_feed_forward_alone_has_the_bits_that_it_has_in_an_encoder(gated, scheme):
    random = np.random.default_rng(5)
    linear1, linear2, gate = (Linear(random.standard_normal(shape), random.standard_normal(shape[0]))
                              for shape in ((300, 16), (16, 300), (300, 16)))
    nothing = MultiHeadAttention(2, **{f"{name}_weight": np.zeros((16, 16)) for name in ("q", "k", "v", "out")})
    made = TransformerEncoder([TransformerEncoderLayer(
        nothing, FeedForward(linear1, linear2, gate=gate if gated else None), None, None)])
    if scheme == "dynamic":
        made = quant.quantize(made, scheme=scheme)
    x = random.standard_normal((3, 7, 16), np.float32)
    alone = made.layers[0].feed_forward(x)
    np.testing.assert_array_equal(made(x), alone + x)  # attention adds nothing
    np.testing.assert_array_equal(made.layers[0].feed_forward(x[:, ::2]), alone[:, ::2])


@pytest.mark.parametrize("kind", sorted(oracle.ACTIVATIONS))
def test_activations_far_and_near(kind):
    x = np.concatenate([np.linspace(-12, 12, 4801), [-100, 100, -1e30, 1e30, 0, 1e-30]]).astype(np.float32)
    one = Linear(np.ones((1, 1)))
    result = FeedForward(one, one, activation=kind)(x[:, None])[:, 0]
    with np.errstate(over="ignore"):
        wanted = [oracle.ACTIVATIONS[kind](float(each)) if abs(each) < 600 else max(float(each), 0.0) for each in x]
    np.testing.assert_allclose(result, wanted, rtol=2e-6, atol=3e-6)


def test_weights_are_copies_and_read_only():
    weight = W.copy()
    layer = Linear(weight)
    weight[:] = 0
    np.testing.assert_array_equal(layer.weight, W)
    assert not layer.weight.flags.writeable


@pytest.mark.parametrize("call, error, message", [
    (lambda: Linear(B), ValueError, r"weight must be \(outputs, inputs\), got shape \(5,\)"),
    (lambda: Linear(W, W), ValueError, r"bias must be \(outputs,\), got shape \(5, 7\)"),
    (lambda: Linear(W, normal(7)), ValueError, r"bias must have shape \(5,\), one per row of weight"),
    (lambda: Linear(W.astype(int)), TypeError, "weight must be a float16, float32 or float64 array"),
    (lambda: Linear(W)(X[..., :-1]), ValueError, "x must have a last axis of 7"),
    (lambda: Linear(W)(X, out=np.empty((2, 3, 4), np.float32)), ValueError, "out must have shape"),
    (lambda: LayerNorm(B, W[0]), ValueError, "bias must have the shape of weight"),
    (lambda: LayerNorm(B, eps=0), ValueError, "eps must be greater than 0, got 0.0"),
    (lambda: RMSNorm(W), ValueError, r"weight must be \(features,\), got shape \(5, 7\)"),
    (lambda: FeedForward(W, Linear(W.T)), TypeError, "linear1 must be an edgeattn.Linear, got ndarray"),
    (lambda: FeedForward(Linear(W), Linear(W)), ValueError, "linear2 must have linear1's 5 outputs as inputs"),
    (lambda: FeedForward(Linear(W), Linear(W.T), gate=Linear(W.T)), ValueError, "gate must have the sizes of linear1"),
    (lambda: FeedForward(Linear(W), Linear(W.T), activation="tanh"), ValueError,
     "activation must be one of gelu, gelu_tanh, relu, silu, got 'tanh'"),
])
def test_errors_say_what_was_required(call, error, message):
    with pytest.raises(error, match=message):
        call()
