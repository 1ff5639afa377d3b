"""Layers and models are what their states say: sizes, equals, copies, files."""
import copy
import pickle

import numpy as np
import pytest

import edgeattn
import quant
from edgeattn.layers.embedding import Embedding


def random_weights(seed=0):
    rng = np.random.default_rng(seed)
    return lambda *shape: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def attention(seed=0, **options):
    w = random_weights(seed)
    return edgeattn.MultiHeadAttention(2, *(w(8, 8) for _ in range(4)), out_bias=w(8), **options)


def feed_forward(seed=0, activation="gelu"):
    w = random_weights(seed)
    return edgeattn.FeedForward(edgeattn.Linear(w(16, 8), w(16)), edgeattn.Linear(w(8, 16)), activation=activation)


def encoder_layer(seed=0, norm_first=False):
    norm = edgeattn.LayerNorm(np.ones(8), np.zeros(8))
    return edgeattn.TransformerEncoderLayer(attention(seed), feed_forward(seed), norm, norm, norm_first=norm_first)


def static(seed=0):
    batches = [np.random.default_rng(seed).standard_normal((1, 4, 8)).astype(np.float32)]
    return quant.quantize(attention(), quant.calibrate(attention(), batches))


def text_encoder(seed=0):
    embedding = Embedding(random_weights(seed)(11, 8), random_weights(seed)(6, 8))
    return edgeattn.TextEncoder(embedding, edgeattn.TransformerEncoder([encoder_layer()]))


# A maker of each kind, and what makes another of it.
KINDS = [
    (lambda: edgeattn.Linear(np.eye(3)), lambda: edgeattn.Linear(np.eye(3), np.zeros(3))),
    (lambda: edgeattn.LayerNorm(np.ones(3)), lambda: edgeattn.LayerNorm(np.ones(3), eps=1e-4)),
    (lambda: edgeattn.RMSNorm(np.ones(3)), lambda: edgeattn.RMSNorm(np.ones(4))),
    (feed_forward, lambda: feed_forward(activation="relu")),
    (attention, lambda: attention(add_zero_attn=True)),
    (static, lambda: static(1)),
    (lambda: quant.quantize(attention(), scheme="dynamic"), lambda: quant.quantize(attention(1), scheme="dynamic")),
    (encoder_layer, lambda: encoder_layer(norm_first=True)),
    (lambda: edgeattn.TransformerEncoder([encoder_layer()]), lambda: edgeattn.TransformerEncoder([encoder_layer()] * 2)),
    (lambda: quant.quantize(edgeattn.TransformerEncoder([encoder_layer()]), scheme="dynamic"),
     lambda: edgeattn.TransformerEncoder([encoder_layer()])),
    (text_encoder, lambda: text_encoder(1)),
]
NAMES = "linear layer_norm rms_norm feed_forward attention static dynamic layer encoder int8 text".split()


@pytest.mark.parametrize("make, make_other", KINDS, ids=NAMES)
def test_equal_states_are_equal_and_no_others(make, make_other):
    one, same, other = make(), make(), make_other()
    assert one == one and one == same and hash(one) == hash(same)
    assert one != other and one != "text" and one is not None
    assert len({one, same, other}) == 2


@pytest.mark.parametrize("make", [make for make, _ in KINDS], ids=NAMES)
def test_copies_pickles_and_files_hold_an_equal(make, tmp_path):
    one = make()
    one.save(tmp_path / "one.safetensors")
    assert edgeattn.load(tmp_path / "one.safetensors") == one
    assert copy.deepcopy(one) == one and pickle.loads(pickle.dumps(one)) == one
    again = copy.deepcopy(one)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


@pytest.mark.parametrize("make", [make for make, _ in KINDS], ids=NAMES)
def test_nbytes_are_those_of_a_file(make, tmp_path):
    one = make()
    one.save(tmp_path / "one.safetensors")
    header = int.from_bytes((tmp_path / "one.safetensors").read_bytes()[:8], "little")
    assert one.nbytes == (tmp_path / "one.safetensors").stat().st_size - 8 - header


def test_numbers_decide_and_their_dtype():
    weight = np.eye(3)
    weight[0, 0] = np.nextafter(np.float32(1), np.float32(2))
    assert edgeattn.Linear(weight) != edgeattn.Linear(np.eye(3))


@pytest.mark.parametrize("package", [edgeattn, quant])
def test_names_that_a_package_shows_are_the_public_ones(package):
    assert {name for name in dir(package) if not name.startswith("__")} == set(package.__all__)
