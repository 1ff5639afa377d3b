"""Calibration over executors: threads, processes and a Dask cluster see what one loop sees, bit for bit."""

import multiprocessing
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import whole_models
from arrays import numbers

import quant
from quant.over_executor import BATCHES_AT_ONCE, TASKS_AHEAD


def model_batches():
    """Of every kind and length, among them one that is all padding."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 50, (2, 3 + i % 7)) for i in range(3 * BATCHES_AT_ONCE + 1)]
    return [*batches, {"ids": rng.integers(0, 50, (2, 4)), "attention_mask": np.arange(4) < [[3], [1]]},
            *[{"ids": np.zeros((1, 3), int), "attention_mask": np.zeros((1, 3), int)}] * BATCHES_AT_ONCE]


def layer_batches():
    return [{"query": numbers(2, 2 + i % 5, whole_models.E, seed=i), "is_causal": i % 3 == 0} for i in range(30)]


def same(a, b, folder):
    a.save(folder / "a.safetensors")
    b.save(folder / "b.safetensors")
    return (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


class Backwards(Executor):
    """Runs what it was given last first, when it has so many tasks."""

    def __init__(self, tasks):
        self.tasks, self.waiting = tasks, []

    def submit(self, function, *arguments):
        future = Future()
        self.waiting.append((future, function, arguments))
        if len(self.waiting) == self.tasks:
            while self.waiting:
                future_, function_, arguments_ = self.waiting.pop()
                future_.set_result(function_(*arguments_))
        return future


class Client:
    """As a Dask client is: what it submits has futures of its own."""

    def submit(self, function, *arguments):
        return object()


@pytest.fixture(scope="module")
def cluster():
    """A client of two workers, processes of their own, on this machine."""
    distributed = pytest.importorskip("distributed", reason="pip install 'edgeattn[dask]'")
    with (distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as local,
          distributed.Client(local) as client):
        yield client


def test_layers_and_models_over_threads_in_any_order(tmp_path):
    model, layer = whole_models.text_encoder(), whole_models.encoder().layers[0].attention
    for of, batches in ((model, model_batches()), (layer, layer_batches())):
        alone = quant.calibrate(of, batches)
        for executor in (ThreadPoolExecutor(3), Backwards(-(-len(batches) // BATCHES_AT_ONCE))):
            assert same(alone, quant.calibrate(of, iter(batches), executor=executor), tmp_path)
        halves = [quant.calibrate(of, batches[some]) for some in (slice(0, 5), slice(5, None))]
        assert same(alone, halves[1].merge(halves[0]), tmp_path)


def test_over_processes(tmp_path):
    layer, batches = whole_models.encoder().layers[0].attention, layer_batches()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        assert same(quant.calibrate(layer, batches), quant.calibrate(layer, batches, executor=executor), tmp_path)


def test_over_a_dask_cluster(cluster, tmp_path):
    model, batches = whole_models.text_encoder(), model_batches()
    assert same(quant.calibrate(model, batches), quant.calibrate(model, batches, executor=cluster.get_executor()), tmp_path)


def test_an_error_names_the_batch_among_all_and_ends_what_waits():
    layer, batches = whole_models.encoder().layers[0].attention, layer_batches()
    batches[BATCHES_AT_ONCE + 3]["query"][0, 0, 0] = np.nan
    with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError, match=rf"batches\[{BATCHES_AT_ONCE + 3}\] holds NaN"):
        quant.calibrate(layer, batches, executor=executor)


def test_batches_are_read_as_they_are_needed():
    read = 0

    def batches():
        nonlocal read
        for batch in layer_batches() * 20:
            read += 1
            yield batch

    class Broken(Executor):
        def submit(self, function, *arguments):
            future = Future()
            future.set_exception(RuntimeError("no worker"))
            return future

    with pytest.raises(RuntimeError, match="no worker"):
        quant.calibrate(whole_models.encoder().layers[0].attention, batches(), executor=Broken())
    assert read == TASKS_AHEAD * BATCHES_AT_ONCE


@pytest.mark.parametrize(("batches", "executor", "error", "words"), [
    ([], ThreadPoolExecutor(1), ValueError, "batches must hold at least one batch; got none"),
    ("x", ThreadPoolExecutor(1), TypeError, "batches must be an iterable of batches"),
    ([], 3, TypeError, "executor must be a concurrent.futures.Executor.*got int"),
    ([], ThreadPoolExecutor, TypeError, "executor must be .*got the class ThreadPoolExecutor"),
    ([], Client(), TypeError, r"executor must be .*client.get_executor\(\); got Client"),
])
def test_bad_input_is_refused(batches, executor, error, words):
    with pytest.raises(error, match=words):
        quant.calibrate(whole_models.encoder().layers[0].attention, batches, executor=executor)
