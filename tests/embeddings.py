"""int8 embeddings and their SHA-256, which is the same on every machine.

python tests/embeddings.py > tests/embeddings.sha256 writes down what this machine gives, after a change that is meant.
python tests/embeddings.py FOLDER NAME... computes with models that `save` wrote, so that quantization needs no kernel.
"""
import functools
import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from places import ROOT

import edgeattn
from edgeattn.runtime import prebuilt
from edgeattn.runtime.isa import ISA

KNOWN = Path(__file__).with_name("embeddings.sha256")
ATTENTION = ("int8", "float32")
SENTENCES = ["A", "Good morning!", "The pump has stopped.", "Die Pumpe steht, seit heute früh.", "ポンプが止まった",
             "The pump stopped at noon, and nobody has found out why yet.", "", "0123456789" * 6 + "abc", "The pump has stopped"]
# Kernels that the models in int8 call, as a library has to have them; the first are those of whole sequences.
KERNELS = ("layer dynamic", "feed-forward dynamic", "norm", "projection dynamic", "linear dynamic", "store rows", "decode int8")
E, F, H = 48, 150, 4


class ByteTokenizer:
    """A text's bytes between two marks: a tokenizer that needs no package."""

    def encode_batch(self, texts):
        """As that of tokenizers."""
        ids = [[256, *text.encode(), 257] for text in texts]
        return [SimpleNamespace(ids=each, type_ids=[0] * len(each)) for each in ids]


def fractions(rng, *shape, scale=1.0):
    """Random multiples of 1/64 within +-1, times a power of two: the same numbers everywhere."""
    return rng.integers(-64, 65, shape).astype(np.float32) / np.float32(64) * np.float32(scale)


def blocks(rng, layers=2):
    """Encoder layers with all that int8 treats apart: a feature that is large, outputs whose weights are."""
    def linear(outputs, inputs):
        weight = fractions(rng, outputs, inputs, scale=0.25)
        weight[outputs // 3] *= 8
        return edgeattn.Linear(weight, fractions(rng, outputs, scale=0.125))

    def norm():
        weight = 1 + fractions(rng, E, scale=0.25)
        weight[11] = 24
        return edgeattn.LayerNorm(weight, fractions(rng, E, scale=0.125), 1e-12)

    def layer():
        names = "q_bias", "k_bias", "v_bias", "out_bias"
        attention = edgeattn.MultiHeadAttention(H, *(fractions(rng, E, E, scale=0.25) for _ in names),
                                                **{name: fractions(rng, E, scale=0.5) for name in names})
        return edgeattn.TransformerEncoderLayer(attention, edgeattn.FeedForward(linear(F, E), linear(E, F)), norm(), norm())

    return edgeattn.TransformerEncoder([layer() for _ in range(layers)])


def text_encoder():
    """A BERT of random weights."""
    rng = np.random.default_rng(14)
    tables = [fractions(rng, entries, E) for entries in (258, 72, 2)]
    embedding = edgeattn.layers.Embedding(*tables, norm=edgeattn.LayerNorm(np.ones(E)))
    return edgeattn.TextEncoder(embedding, blocks(rng), normalize=True)


def sensor_encoder():
    """The one that examples/sensor has."""
    path = ROOT / "examples" / "sensor" / "sensor.safetensors"
    return edgeattn.TransformerEncoder.from_torch(path, 4, activation="gelu", norm_first=True, prefix="encoder.")


FLOAT = {"texts": text_encoder, "sensor": sensor_encoder, "steps": lambda: blocks(np.random.default_rng(16))}


@functools.cache
def int8(model, attention, folder=None):
    """A model of FLOAT in int8, quantized here or as `save` wrote it to a folder."""
    if folder is not None:
        return edgeattn.load(Path(folder, f"{model}.safetensors"))
    import quant  # which a board without Numba cannot

    return quant.quantize(FLOAT[model](), scheme="dynamic", attention=attention)


def save(folder):
    """Write the models that are int8 throughout."""
    for model in FLOAT:
        edgeattn.save(int8(model, "int8"), Path(folder, f"{model}.safetensors"))


def embeddings(hidden, lengths):
    """Of states (B, L, E), as `encode` makes them: the mean of a sentence's tokens, brought to length 1."""
    mean = np.stack([row[:length].mean(axis=0) for row, length in zip(hidden, lengths, strict=True)])
    return mean / np.maximum(np.sqrt((mean * mean).sum(axis=1, keepdims=True)), np.float32(1e-12))


def of_texts(model):
    """(name of a way, call) of the embeddings of SENTENCES."""
    vars(model)["_tokenizer"] = ByteTokenizer()
    ids = [each.ids for each in ByteTokenizer().encode_batch(SENTENCES)]
    lengths = [len(row) for row in ids]
    padded, real = np.zeros((len(ids), 70), int), np.zeros((len(ids), 70), bool)
    for row, some in enumerate(ids):
        padded[row, : len(some)], real[row, : len(some)] = some, True
    yield "whole", lambda: model.encode(SENTENCES)
    for size in (1, 2, 5):
        yield f"batches of {size}", lambda size=size: model.encode(SENTENCES, size)
    yield "in another order", lambda: model.encode(SENTENCES[::-1], 4)[::-1]
    yield "as arrays with padding", lambda: embeddings(model(padded, real), lengths)
    yield "saved and loaded", lambda: embeddings(model.from_state(*model.to_state())(ids), lengths)


def of_sensor(encoder):
    """Likewise of the states of the tokens of six recordings."""
    lengths = [64, 1, 17, 33, 40, 5]
    x = fractions(np.random.default_rng(15), len(lengths), 64, 64, scale=2)
    real = np.arange(64) < np.array(lengths)[:, None]
    yield "whole", lambda: encoder(x, lengths=lengths)[real]
    yield "alone", lambda: np.concatenate([encoder(row[:n]) for row, n in zip(x, lengths, strict=True)])
    yield "as a list", lambda: np.concatenate(encoder([row[:n] for row, n in zip(x, lengths, strict=True)]))
    yield "three and three", lambda: np.concatenate(
        [encoder(x[some], lengths=lengths[some])[real[some]] for some in (slice(3), slice(3, 6))])
    if not isinstance(encoder.layers[0].attention, edgeattn.MultiHeadAttention):  # float32 sums of rows with keys that nobody sees go in another order
        yield "with a mask of padding", lambda: encoder(x, key_padding_mask=real)[real]


def of_steps(encoder):
    """Likewise of the states of causal sequences by way of int8 caches."""
    x = fractions(np.random.default_rng(17), 2, 23, E, scale=2)

    def by(chunk):
        caches = encoder.make_caches(2, 23, dtype="int8")
        return np.concatenate([encoder(x[:, i : i + chunk], is_causal=True, kv_cache=caches) for i in range(0, 23, chunk)], 1)

    yield "whole", lambda: by(23)
    for chunk in (1, 4, 22):
        yield f"{chunk} at a time", lambda chunk=chunk: by(chunk)


WAYS = {"texts": of_texts, "sensor": of_sensor, "steps": of_steps}
NAMES = [f"{model}, attention {attention}" for attention in ATTENTION for model in FLOAT]


def ways(name, folder=None):
    """{name of a way: what it gives}, the first of which is that of `digest`."""
    model, attention = name.split(", attention ")
    return dict(WAYS[model](int8(model, attention, folder)))


def digest(array):
    """SHA-256 of float32 in C order, little endian."""
    return hashlib.sha256(np.ascontiguousarray(array, "<f4").tobytes()).hexdigest()


def known():
    """name -> digest, as written down."""
    lines = KNOWN.read_text().splitlines()
    return {name: hashed for hashed, name in (line.split("  ", 1) for line in lines)}


def main(folder=None, *names):
    """Print the digests, of NAMES or of all that are known; what computed them to stderr."""
    print(f"{ISA.name}, {'compiled here' if prebuilt.LIBRARY is None else prebuilt.LIBRARY.path}", file=sys.stderr)
    for name in names or NAMES[:len(FLOAT)]:
        print(f"{digest(ways(name, folder)['whole']())}  {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
