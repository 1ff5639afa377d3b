"""Streams, lifetimes and GPUs: what is done before and after what, on a stub of the driver (cuda_stub.py)."""
import gc
import threading
import types
import weakref

import numpy as np
import pytest
from cases import Case
from cuda_emulated import EmulatedDriver, emulated_only, long_form
from test_cuda_float32 import OverDLPack, put

import edgeattn
from edgeattn.executors.cuda import functional as on_cuda
from edgeattn.executors.cuda.call_cache import CallCache
from edgeattn.kernels.cuda import driver as driver_module

pytestmark = emulated_only
SHAPES = dict(query=(1, 1, 2, 8), key=(1, 1, 3, 8), value=(1, 1, 3, 8), attn_mask=(2, 3), kv_lengths=(1,), alibi_slopes=(1,),
              out=(1, 1, 2, 8))
attention = edgeattn.scaled_dot_product_attention


@pytest.fixture
def gpus(monkeypatch):
    """An emulated driver of two GPUs."""
    found = EmulatedDriver(devices=2)
    monkeypatch.setattr(driver_module, "_current", found)
    monkeypatch.setattr(on_cuda, "_CALLS", CallCache())
    return found


class Elsewhere:
    """An array that another library uses on a stream of its own."""

    def __init__(self, array, stream, **changes):
        self.array, self.numpy, self.shape = array, array.numpy, array.shape
        self.__cuda_array_interface__ = array.__cuda_array_interface__ | {"stream": stream} | changes


def arrays():
    made = {name: put(np.zeros(shape, np.int64 if name == "kv_lengths" else np.float32)) for name, shape in SHAPES.items()}
    return made | {"kv_lengths": put(np.array([3]))}


@pytest.mark.parametrize("name", [*SHAPES][1:])
def test_launches_and_every_arrays_stream_wait_for_each_other(gpus, name):
    api, given = gpus.api, arrays()
    given[name] = Elsewhere(given[name], 77)
    for _ in range(2):  # the second is a known call
        api.work(77)
        done, before = api.before(77)[77], len(api.launches)
        attention(**given, causal_alignment="upper_left")
        launches = api.launches[before:]
        assert launches and all(launch.stream == 0 and launch.before[77] == done for launch in launches)
        assert api.before(77)[0] == api.before(0)[0]  # all that was launched
    assert len(on_cuda._CALLS) == 1 and not (name == "out" and given[name].numpy().any())


def test_arrays_of_the_launchs_stream_need_no_events(gpus):
    given = arrays()
    for stream in (None, 1):
        given["key"] = Elsewhere(given["key"], stream)
        api, launched = gpus.api, len(gpus.api.launches)
        for _ in range(2):
            attention(**given, causal_alignment="upper_left")
        assert len(api.launches) == launched + 2 and not api.before(77) and set(api.before(0)) == {0}


def test_a_query_names_the_stream_of_the_call_and_of_its_result(gpus):
    q, k, v = map(put, Case("stream", B=1, H=1, L=2, S=3).qkv())
    want = attention(q, k, v).numpy()
    for stream, named in ((77, 77), (2, 2), (None, 1), (1, 1)):
        for precision in ("float32", "int8"):  # which needs scratch memory
            for _ in range(2):
                gpus.streams.clear()
                got = attention(Elsewhere(q, stream), k, v, precision=precision)
                assert set(gpus.streams) == {0 if named == 1 else named}
                assert got.__cuda_array_interface__["stream"] == named
                gpus.api.calls.clear()
                host = got.numpy()
                assert gpus.api.calls == [("cuMemcpyDtoHAsync", got.stream), ("cuStreamSynchronize", got.stream)]
                if precision == "float32":
                    np.testing.assert_array_equal(host, want)
    assert attention(got, k, v).stream == got.stream


def test_what_is_copied_there_is_there_for_every_stream(gpus):
    eye = np.eye(8, dtype=np.float32)
    edgeattn.MultiHeadAttention(1, eye, eye, eye).to("cuda")
    calls = gpus.api.calls
    copies = [i for i, call in enumerate(calls) if call == "cuMemcpyHtoD"]
    assert copies and all(calls[i + 1] == ("cuStreamSynchronize", 0) for i in copies)


class Told(OverDLPack):
    """An array of DLPack that is told a stream and wants another."""

    stream = 1

    def __dlpack__(self, *, stream):
        assert stream == self.stream
        return super().__dlpack__(stream=1)


def test_dlpack_is_told_the_stream_of_the_launch(gpus):
    q, k, v = map(put, Case("told", B=1, H=1, L=2, S=3).qkv())
    want = attention(q, k, v).numpy()
    np.testing.assert_array_equal(attention(Told(q), k, v).numpy(), want)
    key = Told(k)
    key.stream = 77
    np.testing.assert_array_equal(attention(Elsewhere(q, 77), key, v).numpy(), want)


def test_an_interface_that_knows_no_stream_gives_way_to_dlpack(gpus):
    q, k, v = map(put, Case("version-2", B=1, H=1, L=2, S=3).qkv())
    want = attention(q, k, v).numpy()
    key, told = Told(k), []
    key.__cuda_array_interface__ = {name: x for name, x in k.__cuda_array_interface__.items() if name != "stream"} | {"version": 2}
    key.__class__ = type("Version2", (Told,), {"__dlpack__": lambda self, *, stream: (
        told.append(stream) or OverDLPack.__dlpack__(self, stream=1))})
    for stream in (77, 78):
        np.testing.assert_array_equal(attention(Elsewhere(q, stream), key, v).numpy(), want)
    assert told == [77, 78]


@pytest.mark.parametrize("make", [OverDLPack, lambda array: Elsewhere(array, None)], ids=["dlpack", "interface"])
def test_what_a_launch_reads_is_kept_until_it_has_passed(gpus, make):
    q, k, v = map(put, Case("kept", B=1, H=1, L=2, S=3).qkv())
    for _ in range(2):
        gone = []
        for other in (k, v):
            array = make(other)
            gone.append(weakref.ref(array))
            attention(q, array, v)
            del array
        gc.collect()
        assert all(one() is not None for one in gone), "memory is given back while a kernel may read it"
        gpus.api.passed |= set(gpus.api.events)
        attention(q, make(k), v)
        gc.collect()
        assert all(one() is None for one in gone) and len(gpus.api.events) == 1
        gpus.api.passed |= set(gpus.api.events)


def test_memory_is_given_back_by_a_thread_without_a_context(gpus):
    box, before = [put(np.zeros(8, np.float32))], len(gpus.memory)
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert len(gpus.memory) == before - 1


def test_a_captured_stream_waits_for_no_other(gpus):
    """Whoever captures a graph lets what came before end first: an event from outside would make the capture fail."""
    given = arrays()
    given["query"] = Elsewhere(given["query"], 5)
    want = attention(**given, causal_alignment="upper_left").numpy()
    gpus.api.capturing.add(5)
    np.testing.assert_array_equal(attention(**given, causal_alignment="upper_left").numpy(), want)
    assert gpus.api.launches[-1].stream == 5
    gpus.api.capturing.add(0)  # both: a fork of the capture
    attention(**given, causal_alignment="upper_left")
    assert gpus.api.before(0)[5] == gpus.api.before(5)[5]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_calls_of_a_cache_follow_each_other(gpus, dtype):
    cache = edgeattn.KVCache(1, 1, 8, 8, dtype=dtype).to("cuda")
    rows = put(np.ones((1, 1, 2, 8), np.float32))
    cache.append(Elsewhere(rows, 77), rows)
    appended = gpus.api.before(77)[77]
    cache.attend(Elsewhere(rows, 78))
    assert gpus.api.launches[-1].stream == 78 and gpus.api.launches[-1].before[77] == appended
    gpus.api.calls.clear()
    cache.held()
    assert set(gpus.api.calls) == {(name, 78) for name in ("cuMemcpyDtoHAsync", "cuStreamSynchronize")}
    eye = np.eye(8, dtype=np.float32)
    edgeattn.MultiHeadAttention(1, eye, eye, eye).to("cuda")(put(np.ones((1, 2, 8), np.float32)), kv_cache=cache)
    assert gpus.api.launches[-1].before[78] and cache._keys.stream == 0


def test_a_call_runs_on_the_gpu_of_its_arrays(gpus):
    host = Case("second", B=1, H=1, L=2, S=3).qkv()
    want = attention(*map(put, host)).numpy()
    with gpus.on(1):
        arrays = [put(x) for x in host]
    for precision in ("float32", "int8"):
        for make in (lambda x: x, lambda x: Elsewhere(x, None)):
            for _ in range(2):
                got = attention(*map(make, arrays), precision=precision)
                assert got.device == gpus.api.launches[-1].device == 1 and gpus.device() == 0
                if precision == "float32":
                    np.testing.assert_array_equal(got.numpy(), want)
    dlpack = OverDLPack(arrays[0])
    dlpack.__class__ = type("Second", (OverDLPack,), {"__dlpack_device__": lambda self: (2, 1)})
    np.testing.assert_array_equal(attention(dlpack, *arrays[1:]).numpy(), want)
    assert gpus.device() == 0


@pytest.mark.parametrize("name", [*SHAPES][1:])
def test_arrays_on_two_gpus_are_refused(gpus, name):
    given = arrays()
    with gpus.on(1):
        given[name] = arrays()[name]
    for make in (lambda x: x, lambda x: Elsewhere(x, None)):
        with pytest.raises(ValueError, match=f"{name} must lie on the GPU of query, number 0, got an array on number 1"):
            attention(**given | {name: make(given[name])}, causal_alignment="upper_left")


def test_a_layer_and_a_cache_stay_on_their_gpu(gpus):
    eye = np.eye(8, dtype=np.float32)
    layer = edgeattn.MultiHeadAttention(1, eye, eye, eye)
    x = np.arange(16, dtype=np.float32).reshape(1, 2, 8)
    with gpus.on(1):
        placed, cache, second = layer.to("cuda"), edgeattn.KVCache(1, 1, 8, 8).to("cuda"), put(x)
    want = layer.to("cuda")(x)
    np.testing.assert_array_equal(placed(x), want)  # NumPy arrays are copied to where the weights are
    for _ in range(2):
        np.testing.assert_array_equal(placed(second).numpy(), want)
    assert {launch.device for launch in gpus.api.launches[-2:]} == {1}
    with pytest.raises(ValueError, match="query must lie on the GPU of the layer's weights, number 1, got an array on number 0"):
        placed(put(x))
    with pytest.raises(ValueError, match="key must lie on the GPU of the cache, number 1, got an array on number 0"):
        cache.append(put(x[None]), put(x[None]))
    with pytest.raises(ValueError, match="the GPU of the cache, number 1, got an array on number 0"):
        layer.to("cuda")(put(x), kv_cache=cache)
    assert gpus.device() == 0


def test_arrays_of_torch_and_cupy_say_where_they_are(gpus, monkeypatch):
    import sys

    from edgeattn.kernels.cuda.array_provider import _CuPy, _Torch, kind

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=types.SimpleNamespace(
        current_stream=lambda device: types.SimpleNamespace(cuda_stream={"cuda:1": 9}[device]))))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=types.SimpleNamespace(
        get_current_stream=lambda: types.SimpleNamespace(ptr=8))))
    tensor = type("Tensor", (), {"__module__": "torch", "device": "cuda:1", "get_device": lambda self: 1})()
    array = type("ndarray", (), {"__module__": "cupy", "device": types.SimpleNamespace(id=1)})()
    assert (kind(tensor), _Torch.device(tensor), _Torch.stream(tensor)) == (_Torch, 1, 9)
    assert (kind(array), _CuPy.device(array), _CuPy.stream(array)) == (_CuPy, 1, 8)


@pytest.mark.parametrize("stride", [2**33, 0, -4, *(pytest.param(n, marks=long_form) for n in (4, 12345))])
def test_the_stride_of_an_axis_of_one_means_nothing(gpus, stride):
    host = Case("one", B=1, H=2, L=1, S=3, D=8).qkv()
    want = attention(*map(put, host)).numpy()
    q, k, v = map(put, host)
    _, h, row, one = q.strides
    got = attention(Elsewhere(q, None, strides=(stride, h, stride, one)),
                    *(Elsewhere(x, None, strides=(stride, *x.strides[1:])) for x in (k, v)))
    np.testing.assert_array_equal(got.numpy(), want)
    layer = edgeattn.MultiHeadAttention(1, *(np.eye(8, dtype=np.float32),) * 3).to("cuda")
    x = put(host[0][0])  # (2, 1, 8)
    np.testing.assert_array_equal(layer(Elsewhere(x, None, strides=(32, stride, 4))).numpy(), layer(x).numpy())
    np.testing.assert_array_equal(layer(OverDLPack(x, (8, stride, 1))).numpy(), layer(x).numpy())
    cache = edgeattn.KVCache(1, 2, 8, 8).to("cuda")
    cache.append(Elsewhere(k, None, strides=(stride, *k.strides[1:])), v)
    np.testing.assert_array_equal(cache.attend(q).numpy(), want)
    mask = Elsewhere(put(np.array([[True, False, True]])), None, strides=(stride, 1))
    np.testing.assert_array_equal(attention(q, k, v, mask).numpy(), attention(q, k, v, put(np.array([True, False, True]))).numpy())


def test_a_view_is_reshaped_as_numpy_reshapes_it():
    from edgeattn.kernels.cuda.arrays import View

    rng, joined = np.random.default_rng(0), 0
    for _ in range(2000):
        shape = rng.integers(1, 5, rng.integers(1, 5))
        stored = np.zeros(shape * rng.integers(1, 3, len(shape)), np.int8)
        array = stored[tuple(slice(n) for n in shape)].transpose(rng.permutation(len(shape)))
        new, left = [], array.size
        while left > 1:
            new.append(int(rng.choice([n for n in range(1, left + 1) if left % n == 0])))
            left //= new[-1]
        like, view = array.reshape(new), View(None, 0, array.shape, array.strides, array.dtype)
        if np.shares_memory(like, array):
            got = view.reshape(*new)
            assert [s for s, n in zip(got.strides, new, strict=True) if n > 1] == [
                s for s, n in zip(like.strides, new, strict=True) if n > 1]
            joined += 1
        else:
            with pytest.raises(ValueError, match="cannot be joined"):
                view.reshape(*new)
    assert 500 < joined < 1900
