"""The public calls on arrays on the device, every case of tests/cases.py, in the emulator against the float64 oracle."""
import contextlib
import ctypes
import dataclasses
import sys
import types

import numpy as np
import pytest
import reference
from cases import CASES, Case
from cuda_cases import on_device as put
from cuda_emulated import emulated_only, long_form

import edgeattn
from edgeattn.executors.cuda import functional as on_cuda
from edgeattn.kernels.cuda import array_provider, dlpack
from edgeattn.kernels.cuda import attend as launches
from edgeattn.kernels.cuda import driver as driver_module

# an emulated block takes a tenth of a second; what is large elsewhere is so for the CPU's tiles
SMALLER = {"minilm": dict(H=2), "long": dict(S=270), "batch": dict(H=2), "grouped-one-query": dict(H=4),
           "cross-64-15": dict(B=1, H=2)}
# sizes around the CPU's vectors: a block here has 32 or 64 queries, 64 keys, pieces of 32 or 64 numbers, four at a time
ALIKE = {*(f"length-{n}" for n in (2, 3, 4, 5, 7, 8, 9, 15, 16, 63, 100)), *(f"causal-{n}" for n in (1, 3, 4, 16, 17, 64)),
         *(f"size-{n}" for n in (4, 5, 7, 9, 15, 17, 63)), *(f"value-size-{n}" for n in (1, 15, 16)),
         *(f"one-query-{n}" for n in (1, 15, 16, 64)), "one-key-17", "grouped-4-1", "grouped-6-3", "cross-3-8", "cross-8-3"}
EXTRA = [
    Case("tiles-65-129", H=1, L=65, S=129, D=40, Dv=24),
    Case("pieces", H=1, L=33, S=70, D=72, Dv=68),
    Case("wide-pieces", H=1, L=5, S=70, D=136, Dv=32),
    Case("band-tiles", H=1, L=130, S=130, D=8, window_size=(70, 3)),
    Case("decode-split", H=2, L=1, S=700, D=16),
    Case("decode-split-causal", B=2, H=2, Hkv=1, L=3, S=600, D=16, is_causal=True, causal_alignment="lower_right"),
]


pytestmark = pytest.mark.usefixtures("device")


def attend(case, arrays, masks, **options):
    mask = masks["keep"] if masks["bias"] is None else masks["bias"]
    if masks["padding"] is not None:  # the functional form has no padding argument
        seen = masks["padding"][:, None, None, :]
        mask = seen if mask is None else mask & seen if mask.dtype == bool else np.where(seen, mask, np.float32(-np.inf))
    return edgeattn.scaled_dot_product_attention(
        *map(put, arrays), put(mask), is_causal=case.is_causal, causal_alignment=case.causal_alignment, scale=case.scale,
        enable_gqa=case.kv_heads != case.H, softcap=case.softcap, window_size=case.window_size,
        kv_lengths=put(masks["lengths"]), **options)


def oracle(case, arrays, masks, dtype):
    permitted = reference.visible(
        case.B, case.H, case.L, case.S, keep=masks["keep"], padding=masks["padding"], causal=case.is_causal,
        alignment=case.causal_alignment or "upper_left", window=case.window_size, lengths=masks["lengths"])
    return reference.attention(*arrays, permitted, masks["bias"], scale=case.scale, softcap=case.softcap, dtype=dtype)[0]


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[long_form] if case.name in ALIKE else []) for case in [*CASES, *EXTRA]])
def test_case(case):
    case = dataclasses.replace(case, **SMALLER.get(case.name, {}))
    arrays, masks = case.qkv(), case.masks()
    result = attend(case, arrays, masks).numpy()
    assert result.dtype == np.float32
    plain = oracle(case, arrays, masks, np.float32)
    reference.assert_as_accurate(result, oracle(case, arrays, masks, np.float64), plain)


@pytest.mark.parametrize("name", ["cross-17-33", "everything", "empty-keys", "decode-split", "lengths-lower"])
def test_lse_is_the_log_of_the_sum(name):
    case = next(case for case in [*CASES, *EXTRA] if case.name == name)
    arrays, masks = case.qkv(), case.masks()
    _, lse = attend(case, arrays, masks, return_lse=True)
    permitted = reference.visible(
        case.B, case.H, case.L, case.S, keep=masks["keep"], causal=case.is_causal,
        alignment=case.causal_alignment or "upper_left", window=case.window_size, lengths=masks["lengths"])
    q, k = (np.asarray(x, np.float64) for x in arrays[:2])
    scores = q @ np.repeat(k, case.H // case.kv_heads, 1).swapaxes(2, 3)
    scores *= case.D**-0.5 if case.scale is None else case.scale
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    with np.errstate(divide="ignore"):
        want = np.log(np.where(permitted, np.exp(scores), 0).sum(-1))
    np.testing.assert_allclose(lse.numpy(), want, rtol=3e-6, atol=3e-6)


def test_alibi_slopes():
    case = Case("alibi", B=2, H=2, L=5, S=70, D=8)
    arrays, slopes = case.qkv(), np.array([[0.5, 0.02], [0.1, 1.0]], np.float32)
    distance = np.abs(np.arange(5)[:, None] + 65 - np.arange(70)).astype(np.float32)
    bias = -slopes[:, :, None, None] * distance
    got = edgeattn.scaled_dot_product_attention(*map(put, arrays), alibi_slopes=put(slopes), causal_alignment="lower_right")
    want = [reference.attention(*arrays, None, bias, dtype=dtype)[0] for dtype in (np.float64, np.float32)]
    reference.assert_as_accurate(got.numpy(), *want)


def test_float16_arrays_are_computed_in_float32():
    case = Case("half", B=1, H=2, L=9, S=70, D=16, Dv=8)
    for shape in ((9, 70), (1, 70)):
        arrays = [x.astype(np.float16) for x in case.qkv()]
        got = edgeattn.scaled_dot_product_attention(*map(put, arrays)).numpy()
        assert got.dtype == np.float16, shape
        want = reference.attention(*arrays)[0]
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    narrow = [np.ascontiguousarray(x[..., :7]) for x in arrays]
    got = edgeattn.scaled_dot_product_attention(*map(put, narrow)).numpy()
    np.testing.assert_allclose(got, reference.attention(*narrow)[0], rtol=1e-3, atol=1e-4)


def test_more_heads_than_a_grid_has_rows_are_refused():
    q, k, v = (put(np.zeros((65536, 1, 1, 1), np.float32)) for _ in range(3))
    for precision in ("float32", "int8"):
        with pytest.raises(ValueError, match="query must have at most 65535 batch entries times heads on CUDA, got 65536"):
            edgeattn.scaled_dot_product_attention(q, k, v, precision=precision)


@pytest.mark.parametrize(("place", "poison"), [
    ("key", np.nan), ("value", np.inf), pytest.param("key", np.inf, marks=long_form), pytest.param("value", np.nan, marks=long_form)])
def test_what_is_behind_a_mask_stays_there(place, poison):
    case = Case("nan", B=1, H=2, L=70, S=70, D=8)
    arrays = list(case.qkv())
    arrays[1 if place == "key" else 2][:, :, 40] = poison
    got = edgeattn.scaled_dot_product_attention(*map(put, arrays), is_causal=True).numpy()
    assert np.isfinite(got[:, :, :40]).all()
    assert not np.isfinite(got[:, :, 40:]).any(-1).any() or place == "key" or poison == np.inf
    assert not np.isfinite(got[:, :, 40:]).all()
    keep = np.arange(70) != 40
    got = edgeattn.scaled_dot_product_attention(*map(put, arrays), put(keep)).numpy()
    want = [reference.attention(*arrays, np.broadcast_to(keep, (1, 2, 70, 70)), dtype=d)[0] for d in (np.float64, np.float32)]
    reference.assert_as_accurate(got, *want)
    bias = np.where(keep, np.float32(0), np.float32(-np.inf)).reshape(1, 70)
    got = edgeattn.scaled_dot_product_attention(*map(put, arrays), put(bias)).numpy()
    reference.assert_as_accurate(got, *want)


@pytest.mark.parametrize("precision", ["float32", "float16", "tf32", "int8"])
def test_a_query_that_is_not_a_number_shows(precision):
    """A GPU makes one NaN of all, whose bits, were they added to, would be the largest number's."""
    q, k, v = Case("nan-query", B=1, H=1, L=5, S=9, D=8).qkv()
    q[0, 0, 2, 3], v = np.nan, v / 100  # of larger values the sum would be infinite, and the result NaN after all
    got = edgeattn.scaled_dot_product_attention(*map(put, (q, k, v)), precision=precision).numpy()
    np.testing.assert_array_equal(np.isnan(got), np.broadcast_to(np.arange(5)[:, None] == 2, got.shape))


def test_only_the_values_nan_row_is_nan():
    case = Case("nan-channel", B=1, H=1, L=3, S=5, D=4)
    arrays = list(case.qkv())
    arrays[2][0, 0, 2, 1] = np.nan
    got = edgeattn.scaled_dot_product_attention(*map(put, arrays)).numpy()
    assert np.isnan(got[..., 1]).all() and np.isfinite(got[..., [0, 2, 3]]).all()


def test_a_finite_mask_hides_no_key_by_itself():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 5, 8)).astype(np.float32) for _ in range(3))
    mask = np.full((5, 5), np.finfo(np.float32).min, np.float32)  # the scores are lost beside it: all keys alike
    result = edgeattn.scaled_dot_product_attention(*map(put, (q, k, v, mask))).numpy()
    np.testing.assert_allclose(result, np.broadcast_to(v.mean(2, keepdims=True), v.shape), rtol=1e-5, atol=1e-6)
    mask[:, 1] = 0
    result = edgeattn.scaled_dot_product_attention(*map(put, (q, k, v, mask))).numpy()
    np.testing.assert_array_equal(result, np.broadcast_to(v[:, :, 1:2], v.shape))


def test_out_takes_the_result_and_nothing_around_it():
    case = Case("out", B=2, H=2, L=5, S=9, D=8)
    arrays = case.qkv()
    around = put(np.full((4, 2, 5, 8), 7, np.float32))

    class Middle:
        __cuda_array_interface__ = {**around.__cuda_array_interface__, "shape": (2, 2, 5, 8),
                                    "data": (around.pointer + around.strides[0], False)}

    out = Middle()
    assert edgeattn.scaled_dot_product_attention(*map(put, arrays), out=out) is out
    host = around.numpy()
    assert (host[[0, 3]] == 7).all()
    np.testing.assert_array_equal(host[1:3], edgeattn.scaled_dot_product_attention(*map(put, arrays)).numpy())


def test_a_call_like_one_before_is_the_same_launch():
    case = Case("again", B=1, H=2, L=5, S=9, D=8)
    first, second = case.qkv(), [x + 1 for x in case.qkv()]
    keep, bias_mask = np.arange(9) < 7, np.linspace(-1, 1, 9, dtype=np.float32)
    for mask in (None, keep, bias_mask):
        for arrays in (first, second):
            alone = edgeattn.scaled_dot_product_attention(*map(put, arrays), put(mask), softcap=2.0).numpy()
            seen, bias = (None, mask) if mask is bias_mask else (mask, None)
            permitted = None if seen is None else np.broadcast_to(seen, (1, 2, 5, 9))
            want = reference.attention(*arrays, permitted, bias, softcap=2.0)[0]
            np.testing.assert_allclose(alone, want, atol=1e-5)
            for _ in range(2):
                out = put(np.zeros((1, 2, 5, 8), np.float32))
                edgeattn.scaled_dot_product_attention(*map(put, arrays), put(mask), softcap=2.0, out=out)
                np.testing.assert_array_equal(out.numpy(), alone)
    q, k, v = map(put, first)
    with pytest.raises(TypeError, match="is_causal must be True or False"):
        edgeattn.scaled_dot_product_attention(q, k, v, is_causal=0, softcap=2.0, out=put(np.zeros((1, 2, 5, 8), np.float32)))
    same = [put(np.zeros((1, 2, 5, 8), np.float32)) for _ in range(4)]
    for _ in range(2):
        edgeattn.scaled_dot_product_attention(*same[:3], out=same[3])
    with pytest.raises(ValueError, match="out must not overlap"):
        edgeattn.scaled_dot_product_attention(*same[:3], out=same[1])
    edgeattn.scaled_dot_product_attention(*same[:3], window_size=(2, 1))
    with pytest.raises(TypeError, match=r"window_size must be two integers .* got \(2.0, 1.0\)"):
        edgeattn.scaled_dot_product_attention(*same[:3], window_size=(2.0, 1.0))


@pytest.mark.parametrize("name", ["attn_mask", "alibi_slopes", "kv_lengths"])
def test_out_must_not_overlap_a_mask(name):
    """Blocks of queries would read what others wrote."""
    shape = (1, 1, 9, 9)
    q, k, v, apart, out = (put(np.zeros(shape, np.float32)) for _ in range(5))

    class Within:
        """A mask that lies where an array does."""

        def __init__(self, array):
            provider = {"attn_mask": (shape, "<f4"), "alibi_slopes": ((1,), "<f4"), "kv_lengths": ((1,), "<i4")}
            self.__cuda_array_interface__ = array.__cuda_array_interface__ | dict(
                zip(("shape", "typestr"), provider[name], strict=True))

    options = dict(causal_alignment="upper_left", out=out)
    for mask in (out, apart, out):  # the last one in a call that is known
        with pytest.raises(ValueError, match="out must not overlap an input") if mask is out else contextlib.nullcontext():
            edgeattn.scaled_dot_product_attention(q, k, v, **options, **{name: Within(mask)})
    layer = edgeattn.MultiHeadAttention(1, *(np.eye(9, dtype=np.float32),) * 3).to("cuda")
    x, out = (put(np.zeros((1, 9, 9), np.float32)) for _ in range(2))
    for mask in (out, apart, out) if name != "kv_lengths" else ():
        with pytest.raises(ValueError, match="out must not overlap an input") if mask is out else contextlib.nullcontext():
            layer(x, out=out, **{name: Within(mask)})
    if name == "attn_mask":
        cache = edgeattn.KVCache(1, 1, 9, 9).to("cuda")
        cache.append(k, v)
        with pytest.raises(ValueError, match="out must not overlap an input"):
            cache.attend(q, attn_mask=k, out=k)


@pytest.mark.parametrize("options", [
    dict(precision="int8"), dict(return_weights=True, return_lse=True), dict(attn_mask=True, return_lse=True),
    dict(attn_mask=True, precision="int8"), dict(kv_lengths=True), dict(alibi_slopes=True, causal_alignment="upper_left"),
], ids=lambda options: "-".join(options))
@pytest.mark.parametrize("keys", [9, pytest.param(700, marks=long_form)])
def test_a_known_call_reads_and_writes_its_own_arrays(keys, options, monkeypatch):
    case, made = Case("known", B=1, H=2, L=1, S=keys, D=8), []
    rng = np.random.default_rng(3)
    for _ in range(2):
        given = dict(options)
        for name, array in (("attn_mask", rng.random((1, keys)) < 0.7), ("kv_lengths", rng.integers(3, 9, 1)),
                            ("alibi_slopes", rng.random(2, np.float32))):
            if name in given:
                given[name] = put(array)
        made.append(([put(x + rng.random(dtype=np.float32)) for x in case.qkv()], given))
    made.append(([made[0][0][0], made[1][0][1], made[0][0][2]], made[1][1]))

    def results(arrays, given):
        found = edgeattn.scaled_dot_product_attention(*arrays, **given)
        return [x.numpy() for x in (found if isinstance(found, tuple) else (found,))]

    known = [results(*one) for one in made]
    assert len(on_cuda._CALLS) == 1
    for one, ours in zip(made, known, strict=True):
        on_cuda._CALLS.clear()
        for x, y in zip(ours, results(*one), strict=True):
            np.testing.assert_array_equal(x, y)
    monkeypatch.setattr(launches, "attend", None)  # a known call does not come by here
    results(*made[0])


def test_an_array_given_twice_is_not_taken_for_two():
    q, k, v = map(put, Case("twice", B=1, H=2, L=5, S=5, D=8).qkv())
    alone = edgeattn.scaled_dot_product_attention(q, k, v).numpy()
    on_cuda._CALLS.clear()
    for precision in ("float32", "int8"):
        edgeattn.scaled_dot_product_attention(q, q, q, precision=precision)
    np.testing.assert_array_equal(edgeattn.scaled_dot_product_attention(q, k, v).numpy(), alone)


@emulated_only
def test_arrays_of_torch_give_arrays_of_torch_on_its_stream(device, monkeypatch):
    class Tensor:
        """What is asked of a torch.Tensor on a GPU."""

        __module__, is_cuda, requires_grad, device = "torch", True, False, "cuda:0"

        def __init__(self, array):
            self.ours, self.shape, self.dtype = array, array.shape, f"torch.{array.dtype.name}"
            self.data_ptr, self.numpy, self.get_device = lambda: array.pointer, array.numpy, lambda: 0
            self.stride = lambda: tuple(n // array.dtype.itemsize for n in array.strides)
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    stream = types.SimpleNamespace(cuda_stream=99)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(
        float32=np.float32, int8=np.int8,
        cuda=types.SimpleNamespace(current_stream=lambda device: {"cuda:0": stream}[device]),
        empty=lambda shape, dtype, device: {"cuda:0": Tensor}[device](driver_module.driver().empty(shape, dtype))))
    arrays = Case("torch", B=1, H=2, L=5, S=9, D=8).qkv()
    for precision in ("float32", "int8"):
        want = edgeattn.scaled_dot_product_attention(*map(put, arrays), precision=precision).numpy()
        for _ in range(2):
            device.streams.clear()
            got = edgeattn.scaled_dot_product_attention(*(Tensor(put(x)) for x in arrays), precision=precision)
            assert type(got) is Tensor and set(device.streams) == {99}
            np.testing.assert_array_equal(got.numpy(), want)


def test_the_kind_of_an_array_is_that_of_what_it_is_derived_from():
    tensor = type("Tensor", (), {"__module__": "torch"})
    image = type("Image", (tensor,), {"__module__": "torchvision.tv_tensors"})
    assert array_provider.kind(image()) is array_provider.kind(tensor()) is array_provider._Torch
    assert array_provider.kind(type("Buffer", (), {"__module__": "elsewhere"})()) is array_provider._Foreign


def test_an_interface_without_strides_is_that_of_a_contiguous_array():
    class Plain:
        """Strides are optional in `__cuda_array_interface__`."""

        def __init__(self, array):
            self.keeps = array
            self.__cuda_array_interface__ = {
                name: value for name, value in array.__cuda_array_interface__.items() if name != "strides"}

    arrays = [put(x) for x in Case("plain", B=1, H=2, L=5, S=9, D=8).qkv()]
    want = edgeattn.scaled_dot_product_attention(*arrays).numpy()
    for _ in range(2):
        got = edgeattn.scaled_dot_product_attention(*map(Plain, arrays)).numpy()
        np.testing.assert_array_equal(got, want)
    assert len(on_cuda._CALLS) == 2


@emulated_only
def test_strided_inputs_are_read_in_place(device):
    case = Case("strided", B=2, H=3, L=6, S=9, D=8)
    arrays = case.qkv()
    # (B, L, H, D), as projections leave it, seen as (B, H, L, D)
    stored = [put(np.ascontiguousarray(x.swapaxes(1, 2))) for x in arrays]

    def turned(array):
        b, l, h, d = array.strides
        B, L, H, D = array.shape
        return type("Turned", (), {"keeps": array, "shape": (B, H, L, D), "__cuda_array_interface__": {
            **array.__cuda_array_interface__, "shape": (B, H, L, D), "strides": (b, h, l, d)}})()

    before = len(device.memory)
    got = edgeattn.scaled_dot_product_attention(*map(turned, stored))
    assert len(device.memory) == before + 1  # the result, and no copy of an input
    np.testing.assert_array_equal(got.numpy(), edgeattn.scaled_dot_product_attention(*map(put, arrays)).numpy())


class OverDLPack:
    """An array on the device that has nothing but DLPack to tell of itself."""

    def __init__(self, array, strides=None, **changes):
        self.keeps = array, (ctypes.c_int64 * len(array.shape))(*array.shape), strides and (
            ctypes.c_int64 * len(strides))(*strides)
        provider = {"i": 0, "u": 1, "f": 2, "b": 6}
        fields = dict(data=array.pointer, device_type=2, ndim=len(array.shape), code=provider[array.dtype.kind],
                      bits=8 * array.dtype.itemsize, lanes=1, shape=self.keeps[1], byte_offset=0)
        self.tensor = dlpack._Tensor(**fields | changes)
        if strides:
            self.tensor.strides = self.keeps[2]

    def __dlpack_device__(self):
        return self.tensor.device_type, 0

    def __dlpack__(self, *, stream):
        assert stream == 1
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(self.tensor), b"dltensor", None)


@emulated_only
def test_arrays_that_only_have_dlpack():
    q, k, v = Case("dlpack", B=1, H=2, L=5, S=9, D=8).qkv()
    keep = np.arange(9) < 7
    want = edgeattn.scaled_dot_product_attention(put(q), put(k), put(v), put(keep)).numpy()
    turned = put(np.ascontiguousarray(k.swapaxes(1, 2)))  # (B, S, H, D), seen as (B, H, S, D)
    turned.shape = k.shape
    shifted = put(np.concatenate([np.zeros(8, np.float32), v.ravel()]))
    shifted.shape = v.shape
    got = edgeattn.scaled_dot_product_attention(
        OverDLPack(put(q)), OverDLPack(turned, (144, 8, 16, 1)), OverDLPack(shifted, byte_offset=32), OverDLPack(put(keep)))
    np.testing.assert_array_equal(got.numpy(), want)
    layer = edgeattn.MultiHeadAttention(1, *(np.eye(8, dtype=np.float32),) * 3).to("cuda")
    x = q[0]
    np.testing.assert_array_equal(layer(OverDLPack(put(x))).numpy(), layer(put(x)).numpy())
    with pytest.raises(TypeError, match="query must have a dtype that NumPy has, got DLPack's code 4 with 16 bits"):
        edgeattn.scaled_dot_product_attention(OverDLPack(put(q), code=4, bits=16), put(k), put(v))
    with pytest.raises(TypeError, match="key must be an array on the device like query"):
        edgeattn.scaled_dot_product_attention(put(q), OverDLPack(put(k), device_type=1), put(v))


@emulated_only
def test_the_arrays_stream_is_used(device):
    case = Case("stream", L=2, S=3)
    q, k, v = map(put, case.qkv())

    class OnStream:
        shape = q.shape
        __cuda_array_interface__ = {**q.__cuda_array_interface__, "stream": 77}

    edgeattn.scaled_dot_product_attention(OnStream(), k, v)
    assert device.streams == [77]


GOOD = dict(query=(1, 2, 5, 8), key=(1, 2, 7, 8), value=(1, 2, 7, 8))


@pytest.mark.parametrize(("error", "words", "options"), [
    (TypeError, "key must be an array on the device like query", {"key": np.zeros((1, 2, 7, 8), np.float32)}),
    (TypeError, "query must be float32 or float16 on CUDA, got dtype float64", {"query": np.float64}),
    (TypeError, "value must have the dtype of query, float32, on CUDA, got float16", {"value": np.float16}),
    (ValueError, "causal_alignment is needed because L = 5 queries", {"is_causal": True}),
    (TypeError, "attn_mask must be bool .* or float32 .* on CUDA, got dtype float64", {"attn_mask": ((5, 7), np.float64)}),
    (ValueError, r"attn_mask must broadcast to .* = \(1, 2, 5, 7\), got shape \(4, 7\)", {"attn_mask": ((4, 7), np.float32)}),
    (TypeError, "attn_mask must be an array on the device", {"attn_mask": np.ones((5, 7), bool)}),
    (TypeError, r"window_size must be two integers \(left, right\), -1 for unbounded, got 3", {"window_size": 3}),
    (TypeError, "kv_lengths must be int32 or int64 on CUDA, got dtype int16", {"kv_lengths": ((1,), np.int16)}),
    (ValueError, r"kv_lengths must have shape \(1,\)", {"kv_lengths": ((2,), np.int32)}),
    (TypeError, "alibi_slopes must be float32 on CUDA", {"alibi_slopes": ((2,), np.float16), "causal_alignment": "upper_left"}),
    (ValueError, r"alibi_slopes must have shape \(H,\)", {"alibi_slopes": ((3,), np.float32), "causal_alignment": "upper_left"}),
    (TypeError, "out must have dtype float32", {"out": ((1, 2, 5, 8), np.float16)}),
    (ValueError, r"out must have shape \(1, 2, 5, 8\)", {"out": ((1, 2, 5, 7), np.float32)}),
    (TypeError, "out must be an array on the device", {"out": np.zeros((1, 2, 5, 8), np.float32)}),
])
def test_errors_name_the_argument(error, words, options):
    arrays = {name: put(np.zeros(shape, options.pop(name) if isinstance(options.get(name), type) else np.float32))
              for name, shape in GOOD.items()}
    arrays |= {name: put(np.zeros(*value)) if isinstance(value, tuple) else value for name, value in options.items()}
    with pytest.raises(error, match=words):
        edgeattn.scaled_dot_product_attention(**arrays)


def test_out_must_not_overlap_an_input():
    q, k, v = (put(np.zeros((1, 2, 5, 8), np.float32)) for _ in range(3))
    with pytest.raises(ValueError, match="out must not overlap an input on CUDA"):
        edgeattn.scaled_dot_product_attention(q, k, v, out=k)


def test_lengths_need_an_alignment_where_positions_matter():
    q, k, v = (put(np.zeros((2, 2, 5, 8), np.float32)) for _ in range(3))
    with pytest.raises(ValueError, match="causal_alignment is needed"):
        edgeattn.scaled_dot_product_attention(q, k, v, is_causal=True, kv_lengths=put(np.array([3, 5])))
