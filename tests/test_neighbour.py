"""What a process with edgeattn takes from its neighbours: memory that does not grow, no time while idle, mapped weights.

`make bench-resident` has the long form, and memory of an encoder of MiniLM's sizes under a limit.
"""
import ctypes
import resource as usage

import embeddings
import numpy as np
import pytest

import edgeattn
import quant
from benchmarks import resident


def test_calls_of_random_lengths_and_batches_leave_no_memory_behind():
    assert resident.growth(1000) <= 1024


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_sleep_after_a_call(threads, one_thread_afterwards):
    assert resident.idle(threads, 0.3) < 0.01


def owner(array):
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base.obj if isinstance(array.base, memoryview) else array.base
    return array


def test_weights_of_a_loaded_file_are_the_file(tmp_path):
    path, table = tmp_path / "model.safetensors", np.ones((40_000, embeddings.E), np.float32)
    table[:258] = embeddings.text_encoder().embedding.token_weight
    encoder = embeddings.blocks(np.random.default_rng(14))
    model = edgeattn.TextEncoder(edgeattn.layers.Embedding(table), encoder)
    edgeattn.save(quant.quantize(model, scheme="dynamic"), path)
    before = np.array(resident.kibibytes("RssAnon", "RssFile"))
    model = edgeattn.load(path)  # which looks at every weight, and keeps none in memory for that
    after = np.array(resident.kibibytes("RssAnon", "RssFile"))
    assert (after - before < table.nbytes / 1024 / np.array([4, 2])).all()
    np.testing.assert_array_equal(model.embedding.token_weight, table)
    layer = model.encoder.layers[0]
    for array in (model.embedding.token_weight, layer.feed_forward.linear1.codes, layer.attention.weights["query"].weight):
        assert isinstance(owner(array), ctypes.Array) and not array.flags.writeable
    # a file that takes this one's place is no harm
    y = model([[1, 2, 3]])
    edgeattn.save(quant.quantize(embeddings.text_encoder(), scheme="dynamic"), path)
    np.testing.assert_array_equal(model([[1, 2, 3]]), y)


@pytest.mark.parametrize("take", [np.asarray, lambda a: a.copy(), lambda a: np.lib.stride_tricks.as_strided(a, writeable=False)])
def test_an_array_that_somebody_can_write_to_is_copied(take):
    weight = np.ones((3, 4), np.float32)
    given = take(weight)
    kept = edgeattn.Linear(given)
    weight[:] = 2
    if given.flags.writeable:
        given[:] = 2
    assert (kept.weight == 1).all()


def test_a_large_batch_asks_for_little_new_memory():
    """A call that comes again finds its memory in the process: of pages it may want its result's, not each layer's."""
    rng = np.random.default_rng(0)
    model = edgeattn.TextEncoder(edgeattn.layers.Embedding(np.ones((40, embeddings.E), np.float32)), embeddings.blocks(rng))
    ids = rng.integers(0, 40, (64, 256 * 1024 // (4 * embeddings.E) // 8))  # 2 MiB of rows, which no chain takes
    for _ in range(4):
        y = model(ids)
    before = usage.getrusage(usage.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        y = model(ids)
    pages = (usage.getrusage(usage.RUSAGE_SELF).ru_minflt - before) / 4
    assert pages <= 1.2 * y.nbytes / usage.getpagesize()
