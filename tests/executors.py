"""All that computes attention, called alike; laws.py says what holds for every one.

An executor is called with query, key and value, arrays (B, ..., tokens, features), and with

- keep: bool, or float where it is in `takes`; (keys,) or (queries, keys)
- causal: bool; query i sees the keys up to i
- lengths: how many keys each batch entry has
- out: where it is in `takes`
- window_size, as everywhere
"""
import functools

import numpy as np
from workbench import random_input, random_layer

import edgeattn
import quant

WIDTH, HEADS = 32, 4  # of layers


def same(array):
    return array


class Executor:
    """What laws ask for beside the call; a kind of its own says what is otherwise."""

    bad = (np.nan, np.inf, -np.inf, 1e38)  # may stand where nobody looks
    bad_for_others = bad  # ... where other rows look
    tokens = 37  # in most laws: more than a tile, and no whole number of vectors
    near = 1e-6  # how far results lie apart at most where unseen keys differ: sums may then go in another order
    sliced = 2e-6  # ... where other keys are there, which may share a scale with those that are seen
    takes = ("float mask", "lengths", "out")
    empty = ((0, 4, 4), (2, 0, 3), (2, 3, 0), (0, 0, 0))  # B, L and S of calls in which some are 0
    features = None  # how many of a row are the result; what follows is of each key

    def __init__(self, name, **changes):
        self.name = name
        vars(self).update(changes)


class Function(Executor):
    """The functional form; put and get move arrays where they are not NumPy's."""

    put = get = staticmethod(same)

    def inputs(self, B, L, S):
        return [random_input(i, B, 2, tokens, 16) for i, tokens in enumerate((L, S, S))]

    def __call__(self, query, key, value, *, keep=None, causal=False, lengths=None, **options):
        put = self.put
        return self.get(self.attend(
            put(query), put(key), put(value), None if keep is None else put(keep), is_causal=causal,
            kv_lengths=None if lengths is None else put(np.asarray(lengths)), **options))

    attend = staticmethod(edgeattn.scaled_dot_product_attention)

    def nothing(self):
        return 0.0


class WithProbabilities(Function):
    """Every feature of the result, then the probability of every key."""

    near, features, takes = 0.0, 16, ("float mask", "lengths")

    def attend(self, *arrays, **options):
        return np.concatenate(edgeattn.scaled_dot_product_attention(*arrays, **options, return_weights=True), -1)


class Cache(Function):
    """Keys and values go into a cache in two pieces; then the queries attend."""

    dtype = "float32"
    empty = ((2, 0, 3), (2, 3, 0))

    def attend(self, query, key, value, keep, *, is_causal, kv_lengths, **options):
        (B, H, S, D), first = key.shape, key.shape[2] // 3
        cache = edgeattn.KVCache(B, H, max(S, 1), D, value_dim=value.shape[3], dtype=self.dtype)
        for part in (slice(first), slice(first, None)):
            cache.append(key[:, :, part], value[:, :, part])
        padding = None if kv_lengths is None else np.arange(S) < kv_lengths[:, None]
        return cache.attend(query, attn_mask=keep, key_padding_mask=padding, is_causal=is_causal, position=0, **options)


class Layer(Executor):
    """A layer with three inputs: `layer()` makes it."""

    near, sliced = 5e-6, 1e-5

    @functools.cached_property
    def made(self):
        return self.layer()

    def inputs(self, B, L, S):
        return [random_input(i, B, tokens, WIDTH) for i, tokens in enumerate((L, S, S))]

    def __call__(self, query, key, value, *, keep=None, causal=False, lengths=None, **options):
        if lengths is not None:
            options["key_padding_mask"] = np.arange(key.shape[-2]) < np.asarray(lengths)[:, None]
        return self.made(query, key, value, attn_mask=keep, is_causal=causal, **options)

    def nothing(self):
        return float_layer().out_bias


class StaticLayer(Layer):
    """Bytes inside: what is not seen changes none; no mask of numbers."""

    near, sliced, takes = 0.0, 0.0, ("lengths", "out")

    def nothing(self):
        x = self.inputs(1, 1, 1)
        return self.made(*x, attn_mask=np.zeros((1, 1), bool))[0, 0]


class LayerWithCache(Layer):
    """A layer whose keys and values go through a cache."""

    takes = ("lengths", "out")
    empty = Cache.empty
    dtype = None

    def __call__(self, query, key, value, **options):
        chosen = {} if self.dtype is None else {"dtype": self.dtype}
        cache = edgeattn.KVCache.for_layer(self.made, len(query), max(key.shape[1], 1), **chosen)
        return super().__call__(query, key, value, kv_cache=cache, **options)


def float_layer():
    return random_layer(1, H=HEADS, E=WIDTH)


def dynamic_layer():
    return quant.quantize(float_layer(), scheme="dynamic")


def static_layer(arithmetic="litert"):
    layer = float_layer()
    batch = dict(zip(("query", "key", "value"), Layer("").inputs(4, 37, 37), strict=True))
    return quant.quantize(layer, quant.calibrate(layer, [{**batch, "is_causal": True}]), arithmetic=arithmetic)


# Of bytes: how far results lie apart where other keys share a scale; a huge number would have it for itself.
SHARED = {"sliced": 0.1, "bad_for_others": (np.nan, np.inf, -np.inf)}
CPU = (
    Function("function"),
    WithProbabilities("function with probabilities"),
    Function("int8 function", attend=functools.partial(edgeattn.scaled_dot_product_attention, precision="int8"),
             near=0.0, **SHARED),
    Cache("float32 cache"),
    Cache("int8 cache", dtype="int8", near=0.0, **SHARED),
    Layer("float32 layer", layer=float_layer),
    Layer("dynamic layer", layer=dynamic_layer, **SHARED),
    StaticLayer("static layer", layer=static_layer),
    StaticLayer("static layer, tflm", layer=lambda: static_layer("tflm")),
    LayerWithCache("float32 layer, float32 cache", layer=float_layer, dtype="float32"),
    LayerWithCache("float32 layer, int8 cache", layer=float_layer, dtype="int8", **SHARED),
    LayerWithCache("dynamic layer, int8 cache", layer=dynamic_layer, dtype="int8", **SHARED),
)
