"""On a card, with PyTorch: streams, DLPack, graphs and threads, which the emulator cannot show."""
import importlib.util
import threading

import numpy as np
import pytest

import edgeattn
from edgeattn.kernels.cuda import driver as driver_module

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.skipif("not config.getoption('--cuda')", reason="needs a card: --cuda, which make test-cuda gives"),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch, built with CUDA: pip install torch")]
MOST = {"float32": 1e-5, "tf32": 3e-3, "float16": 3e-3, "int8": 8e-2}
attention = edgeattn.scaled_dot_product_attention


@pytest.fixture
def torch():
    import torch

    torch.manual_seed(0)
    return torch


@pytest.fixture
def qkv(torch):
    return tuple(torch.randn(2, 4, n, 64, device="cuda") for n in (200, 300, 300))


def exact(torch, *arrays):
    return torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in arrays))


def near(got, want, precision="float32"):
    assert ((got.double() - want).norm() / want.norm()).item() < MOST[precision]


@pytest.mark.parametrize("precision", MOST)
def test_tensors_in_a_tensor_out(torch, qkv, precision):
    got = attention(*qkv, precision=precision)
    assert isinstance(got, torch.Tensor) and got.is_cuda
    near(got, exact(torch, *qkv), precision)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]  # lies as (B, L, H, D)
    near(attention(*turned, precision=precision), exact(torch, *qkv), precision)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_side_stream_whose_input_comes_late(torch, qkv, precision):
    q, k, v = qkv
    attention(q, k, v, precision=precision)  # compiled now, not between the sleep and the launch
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = torch.zeros_like(q)
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        got = attention(late, k, v, precision=precision) + 0
    side.synchronize()
    near(got, exact(torch, *qkv), precision)


def test_an_array_of_ours_waits_for_a_tensors_stream_and_it_for_ours(torch, qkv):
    q, k, v = qkv
    ours = [driver_module.driver().array(x.cpu().numpy()) for x in qkv]
    attention(*ours)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        key = torch.zeros_like(k)
        torch.cuda._sleep(50_000_000)
        key.copy_(k)
        got = attention(ours[0], key, ours[2])  # on the default stream
        key.zero_()
    near(torch.from_numpy(got.numpy()), exact(torch, *qkv).cpu())


def test_a_layer_placed_within_a_side_stream_reads_its_weights(torch):
    rng = np.random.default_rng(0)
    layer = edgeattn.MultiHeadAttention(8, *(rng.standard_normal((1024, 1024), np.float32) / 32 for _ in range(4)))
    x = torch.randn(1, 64, 1024, device="cuda")
    want = layer.to("cuda")(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = [layer.to("cuda")(x) for _ in range(5)]
    torch.cuda.synchronize()
    assert all((y == want).all() for y in got)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_graph_replayed_on_other_numbers(torch, qkv, precision):
    q, k, v = (x.clone() for x in qkv)
    out = torch.empty_like(q)
    attention(q, k, v, out=out, precision=precision)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(q, k, v, out=out, precision=precision)
    q.normal_()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    near(out, exact(torch, q, k, v), precision)


def test_a_graph_of_a_layer(torch):
    rng = np.random.default_rng(0)
    layer = edgeattn.MultiHeadAttention(4, *(rng.standard_normal((64, 64), np.float32) / 8 for _ in range(4))).to("cuda")
    x = torch.randn(1, 40, 64, device="cuda")
    want, out = layer(x).clone(), torch.empty_like(x)
    layer(x, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, out=out)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    near(out, want.double())


def test_threads_with_streams_of_their_own(torch, qkv):
    want, found, errors = exact(torch, *qkv), {}, []

    def work(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    found[i] = attention(*qkv)
                torch.cuda.current_stream().synchronize()
        except Exception as error:  # noqa: BLE001 - shown below
            errors.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 4
    for got in found.values():
        near(got, want)


class OnlyDLPack:
    """A tensor that has nothing but DLPack to tell of itself."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_arrays_over_dlpack_made_late_and_dropped_early(torch, qkv):
    q, k, v = qkv
    attention(*map(OnlyDLPack, qkv))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(5):
            torch.cuda._sleep(10_000_000)
            got = attention(*(OnlyDLPack(x * 1) for x in qkv))
            torch.full_like(k, 9.0)  # where the dropped ones lay, if they are gone
        got = torch.as_tensor(got, device="cuda") + 0
        torch.cuda.current_stream().synchronize()
    near(got, exact(torch, *qkv))


def test_memory_given_back_by_a_thread_without_a_context(torch):
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    for _ in range(4):
        box = [driver_module.driver().empty((1 << 28,), np.int8)]
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
    assert free - torch.cuda.mem_get_info()[0] < 1 << 28


def test_the_stride_of_an_axis_of_one(torch):
    big = torch.empty_strided((1, 2, 8, 16), (1 << 33, 256, 32, 1), device="cuda").normal_()
    near(attention(big, big, big), exact(torch, big, big, big))


def test_tensors_on_the_second_card(torch, qkv):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    second = [x.to("cuda:1") for x in qkv]
    got = attention(*second)
    assert got.device == second[0].device
    near(got, exact(torch, *second))
    with pytest.raises(ValueError, match="key must lie on the GPU of query"):
        attention(second[0], qkv[1], second[2])
