"""What public calls give, as checksums: python tests/call_hashes.py FOLDER. Equal where every byte is.

Float32 attention sums as many numbers at a time as a vector has: its lines say how many those are, and are equal where
that is. All others are on every instruction set with fused multiply-add.
Layers and numbers are made once, in that folder, and read by those that come after: on another machine, with another
NumPy or a library of compiled kernels, calibrating would give other scales. Every kernel of
edgeattn.kernels.cpu.entries runs, alone and on two threads. Reading needs nothing but NumPy and the package.
"""
import hashlib
import sys
from pathlib import Path

import numpy as np

import edgeattn
from edgeattn import KVCache, scaled_dot_product_attention, threads
from edgeattn.kernels.cpu import call, entries
from edgeattn.runtime import prebuilt
from edgeattn.runtime.isa import ISA

FORMATS = "float32", "dynamic", "static"
SIZES = ((64, 4, 32), (96, 4, 70), (128, 8, 130))
SHAPES = ((2, 4, 33, 40, 24), (1, 4, 64, 64, 16), (1, 2, 150, 170, 32), (1, 4, 1, 64, 16))
WIDTH, FEATURES, TOKENS = 48, 80, 21  # of encoders
# Kinds of calls with float32 attention, which a layer of dynamic int8 has with a cache.
BY_LANES = {"function float32", "layer float32", "cache float32 float32", "cache float32 int8", "cache dynamic float32",
            "cache dynamic int8", "encoder float32", "encoder mixed"}


class Numbers:
    """Normal numbers, one array after the other, always the same."""

    def __init__(self, all_of_them):
        self._all, self._at = all_of_them, 0

    def __call__(self, *shape):
        size = int(np.prod(shape))
        if self._at + size > self._all.size:
            self._at = 0
        self._at += size
        return self._all[self._at - size:self._at].reshape(shape)


def make(folder):
    """Write numbers and layers."""
    import quant

    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "numbers.npy", np.random.default_rng(5).standard_normal(400_000).astype(np.float32))
    numbers = Numbers(np.load(folder / "numbers.npy"))
    for E, H, L in SIZES:
        weights = [numbers(E, E) / np.float32(E**0.5) for _ in range(4)]
        biases = dict(zip(("q_bias", "k_bias", "v_bias", "out_bias"), numbers(4, E), strict=True))
        layer = edgeattn.MultiHeadAttention(H, *weights, **biases)
        made = (layer, quant.quantize(layer, scheme="dynamic"),
                quant.quantize(layer, quant.calibrate(layer, [numbers(2, L, E)])))
        for name, each in zip(FORMATS, made, strict=True):
            edgeattn.save(each, folder / f"{name}-{E}.safetensors")
    for gate in (False, True):
        for name, each in encoders(numbers, gate).items():
            edgeattn.save(each, folder / f"encoder-{name}-{gate:d}.safetensors")


def encoders(numbers, gate):
    """name -> a small encoder, in float32 and dynamic int8."""
    import quant

    def linear(outputs, inputs):
        return edgeattn.Linear(numbers(outputs, inputs) / np.float32(inputs**0.5), numbers(outputs))

    attention = edgeattn.MultiHeadAttention(4, *(numbers(WIDTH, WIDTH) / np.float32(WIDTH**0.5) for _ in range(4)))
    feed_forward = edgeattn.FeedForward(linear(FEATURES, WIDTH), linear(WIDTH, FEATURES),
                                        gate=linear(FEATURES, WIDTH) if gate else None)
    norms = [edgeattn.LayerNorm(1 + numbers(WIDTH) / 8) for _ in range(2)]
    found = edgeattn.TransformerEncoder([edgeattn.TransformerEncoderLayer(attention, feed_forward, *norms,
                                                                         norm_first=gate)])
    return {"float32": found, "dynamic": quant.quantize(found, scheme="dynamic"),
            "mixed": quant.quantize(found, scheme="dynamic", attention="float32")}


def masks_of(numbers, batch, heads, queries, keys):
    """Masks of a call of the function."""
    return ({}, {"attn_mask": numbers(batch, 1, queries, keys) > -0.5}, {"attn_mask": numbers(queries, keys)},
            {"is_causal": True, "causal_alignment": "lower_right"},
            {"window_size": (7, 2), "causal_alignment": "lower_right"}, {"kv_lengths": np.arange(batch) + keys // 2},
            {"alibi_slopes": np.linspace(0.1, 0.5, heads, dtype=np.float32), "causal_alignment": "lower_right"})


def function_calls(numbers):
    """(kind, result) of the function of arrays."""
    for B, H, L, S, D in SHAPES:
        q, k, v = numbers(B, H, L, D), numbers(B, H, S, D), numbers(B, H, S, D)
        for mask in masks_of(numbers, B, H, L, S):
            for precision in ("float32", "int8"):
                yield f"function {precision}", scaled_dot_product_attention(q, k, v, precision=precision, **mask)
        yield "function softcap", scaled_dot_product_attention(q, k, v, softcap=3.0)
        yield from (("function probabilities", x)
                    for x in scaled_dot_product_attention(q, k, v, return_weights=True))


def layer_calls(numbers, folder):
    """(kind, result) of layers, then of steps with caches."""
    for E, _, L in SIZES:
        x = numbers(2, L, E)
        masks = ({}, {"attn_mask": numbers(L, L) > -0.5}, {"is_causal": True}, {"window_size": (7, 2)},
                 {"key_padding_mask": numbers(2, L) > -0.5}, {"attn_mask": numbers(L, L)})
        for name in FORMATS:
            layer = edgeattn.load(folder / f"{name}-{E}.safetensors")
            for mask in masks:
                if name == "static" and mask.get("attn_mask", np.zeros(0, bool)).dtype == np.float32:
                    continue
                yield f"layer {name}", layer(x, **mask)
                if mask.keys() <= {"is_causal"}:
                    yield from ((f"layer {name} probabilities", y) for y in layer(x, need_weights=True, **mask))
            for dtype in ("float32", "int8")[name == "static":]:
                cache = KVCache.for_layer(layer, 2, L + 8, dtype=dtype)
                for part in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 12)):
                    yield f"cache {name} {dtype}", layer(x[:, part], kv_cache=cache, is_causal=True)


def encoder_calls(numbers, folder):
    """(kind, result) of encoders and their parts."""
    x = numbers(2, TOKENS, WIDTH)
    for path in sorted(folder.glob("encoder-*.safetensors")):
        name, encoder = path.stem.split("-")[1], edgeattn.load(path)
        for padding in ({}, {"key_padding_mask": numbers(2, TOKENS) > -0.5}):
            yield f"encoder {name}", encoder(x, **padding)
        yield f"linear {name}", encoder.layers[0].feed_forward.linear1(x)
        yield f"norm {name}", encoder.layers[0].norm1(x)


def main(folder):
    """Print what is computed with, and a checksum for each kind of call and for all."""
    folder = Path(folder)
    if not (folder / "numbers.npy").exists():
        make(folder)
    before = "numba" in sys.modules
    found, everything = {}, hashlib.sha256()
    for count in (1, 2):
        threads.set_num_threads(count)
        numbers = Numbers(np.load(folder / "numbers.npy"))
        for calls in (function_calls(numbers), layer_calls(numbers, folder), encoder_calls(numbers, folder)):
            for kind, result in calls:
                content = np.ascontiguousarray(result).tobytes()
                everything.update(content)
                found.setdefault(kind, [0, hashlib.sha256()])[0] += 1
                found[kind][1].update(content)
    unused = [name for name, entry in entries.ENTRIES.items() if not was_called(entry)]
    if unused:
        sys.exit(f"no call runs {', '.join(unused)}")
    if prebuilt.LIBRARY is not None and not before and sys.modules.get("numba"):
        sys.exit("Numba was imported, and kernels came compiled")
    print(f"# kernels: {prebuilt.LIBRARY.target if prebuilt.LIBRARY else f'compiled here ({prebuilt.REASON})'}")
    lanes = f" ({ISA.lanes} lanes)"
    for kind, (count, digest) in found.items():
        print(f"{kind}: {count} calls {digest.hexdigest()[:16]}{lanes if kind in BY_LANES else ''}")
    print(f"all: {sum(count for count, _ in found.values())} calls {everything.hexdigest()[:16]}{lanes}")


def was_called(entry):
    """Whether the compiled function of a row of ENTRIES was asked for."""
    before = call.entry.cache_info().misses
    call.entry(*entry)
    return call.entry.cache_info().misses == before


if __name__ == "__main__":
    main(*sys.argv[1:])
