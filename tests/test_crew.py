"""Jobs handed from compiled code to waiting threads: every part once, whoever runs it."""
import threading

import numpy as np
import pytest

from edgeattn import crew, threads
from edgeattn.jit import jit


@crew.separate
def mark(done, workers, steps, worker, part):
    """Work for a while, then note who did which part."""
    x = 0.0
    for i in range(steps):
        x += np.sqrt(x + i)
    done[part] += 1 if x >= 0 else 0
    workers[part] = worker


@jit
def run(done, workers, steps, scratch, board, count):
    crew.share(board, done.size, mark, done, workers, steps)


@pytest.fixture(autouse=True)
def one_thread_afterwards():
    yield
    threads.set_num_threads(1)


def call(parts, steps=100, work=threads.SMALLEST_SHARED_WORK):
    done, workers = np.zeros(parts, np.int64), np.full(parts, -1)
    threads.run(run, (done, workers, steps), np.float32, 0, 16, work)
    assert (done == 1).all()
    return set(workers.tolist())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_part_runs_once(count):
    threads.set_num_threads(count)
    for parts in (1, 2, 3, 7, 100, 0):
        for _ in range(50):
            assert call(parts) <= set(range(count))


def test_another_thread_takes_parts():
    threads.set_num_threads(2)
    # 0.2 s of work, many times what waking a thread takes; a busy machine gets some more tries
    assert any(call(200, 300_000) == {0, 1} for _ in range(20))


def test_little_work_stays_on_the_calling_thread():
    threads.set_num_threads(3)
    assert call(100, work=threads.SMALLEST_SHARED_WORK - 1) == {0}


def test_callers_at_the_same_time_and_a_changing_number_of_threads():
    threads.set_num_threads(2)
    failures = []

    def caller():
        try:
            for _ in range(200):
                call(9)
        except AssertionError as error:
            failures.append(error)
    callers = [threading.Thread(target=caller) for _ in range(4)]
    for thread in callers:
        thread.start()
    for i in range(20):
        threads.set_num_threads(1 + i % 3)
    for thread in callers:
        thread.join()
    assert not failures


def test_no_thread_is_left_behind():
    threads.set_num_threads(3)
    call(10)
    assert sum(thread.name.startswith("edgeattn") for thread in threading.enumerate()) == 2
    threads.set_num_threads(1)
    assert not any(thread.name.startswith("edgeattn") for thread in threading.enumerate())
