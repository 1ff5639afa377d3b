"""Jobs handed from compiled code to waiting threads: every part once, whoever runs it."""
import functools
import os
import subprocess
import sys
import threading
import time

import numba
import numpy as np
import pytest
from places import ROOT

from edgeattn import threads
from edgeattn.runtime import worker_pool
from edgeattn.runtime.jit import jit


@worker_pool.task
def mark(done, workers, steps, worker, part):
    """Work for a while, then note who did which part."""
    x = 0.0
    for i in range(steps):
        x += np.sqrt(x + i)
    done[part] += 1 if x >= 0 else 0
    workers[part] = worker


@jit
def run(done, workers, steps, scratch, task_queue, count):
    worker_pool.parallel_for(task_queue, done.size, mark, done, workers, steps)


@worker_pool.task
def locate(processors, steps, worker, part):
    """Note which processor a worker runs its first part on, then work for a while."""
    if processors[worker] < 0:
        processors[worker] = worker_pool._sched_getcpu()
    x = 0.0
    for i in range(steps):
        x += np.sqrt(x + i)
    processors[-1] += 1 if x >= 0 else 0


@jit
def run_locate(processors, parts, steps, scratch, task_queue, count):
    worker_pool.parallel_for(task_queue, parts, locate, processors, steps)


pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


def call(parts, steps=100, work=threads.SMALLEST_SHARED_WORK):
    done, workers = np.zeros(parts, np.int64), np.full(parts, -1)
    threads.run(functools.partial(run, done, workers, steps), np.float32, 0, 16, work)
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


def test_threads_that_cannot_be_started_are_done_without(monkeypatch):
    start, started = threading.Thread.start, []

    def start_one(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)
    monkeypatch.setattr(threading.Thread, "start", start_one)
    threads.set_num_threads(4)
    for _ in range(3):
        assert call(10) <= {0, 1}
    threads.set_num_threads(1)
    assert len(started) == 1 and not started[0].is_alive()


def asleep(task_queue):
    """Wait until the one thread that serves a task_queue sleeps."""
    end = time.monotonic() + 30
    while task_queue[worker_pool._SLEEPERS + worker_pool._SLEEP] != worker_pool._ASLEEP:
        assert time.monotonic() < end
        time.sleep(0.001)


def processors_of_two():
    """The processors where the caller and the pool's one thread begin, the thread having slept before."""
    for _ in range(20):  # of a busy machine
        asleep(threads._pool.task_queue)
        found = np.full(3, -1)
        threads.run(functools.partial(run_locate, found, 100, 30_000), np.float32, 0, 16, threads.SMALLEST_SHARED_WORK)
        if found[1] >= 0:
            return found[:2].tolist()
    raise AssertionError("the thread took no part")


@pytest.mark.skipif(not worker_pool.CAN_SLEEP or len(os.sched_getaffinity(0)) < 2,
                    reason="needs Linux, and two processors for this process")
def test_a_thread_wakes_on_another_processor_than_the_callers_and_keeps_those_it_may_use():
    threads.set_num_threads(2)
    call(10)
    worker, allowed = threads._pool._threads[0].native_id, os.sched_getaffinity(0)
    try:
        for cpu in allowed:
            os.sched_setaffinity(0, {cpu})
            caller, other = processors_of_two()
            assert caller == cpu != other
            assert os.sched_getaffinity(worker) == allowed
        # a thread that somebody has bound to the caller's processor stays there
        os.sched_setaffinity(worker, {cpu})
        assert processors_of_two() == [cpu, cpu]
        assert os.sched_getaffinity(worker) == {cpu}
    finally:
        os.sched_setaffinity(0, allowed)


@jit
def sleep_once(task_queue):
    worker_pool._sem_init(worker_pool.address(task_queue, worker_pool._SLEEPERS + worker_pool._SEMAPHORE), 0, 0)
    worker_pool.sleep(task_queue, worker_pool._SLEEPERS)


@jit
def wake_moved(task_queue):
    worker_pool.write(task_queue, worker_pool._SLEEPERS + worker_pool._SLEEP, worker_pool._MOVED)
    worker_pool._sem_post(worker_pool.address(task_queue, worker_pool._SLEEPERS + worker_pool._SEMAPHORE))


@pytest.mark.skipif(not worker_pool.CAN_SLEEP or len(os.sched_getaffinity(0)) < 2,
                    reason="needs Linux, and two processors for this process")
@pytest.mark.parametrize("chosen", [False, True])
def test_processors_chosen_by_others_while_a_thread_wakes_are_kept(chosen):
    allowed = os.sched_getaffinity(0)
    away, other = [{cpu} for cpu in sorted(allowed)[:2]]
    task_queue, numbers, sleeper = np.zeros(worker_pool.task_queue_size(1), np.int64), [], worker_pool._SLEEPERS
    for at, cpus in ((worker_pool._HOME, allowed), (worker_pool._AWAY, away)):
        for cpu in cpus:
            task_queue[sleeper + at + cpu // 64] |= np.int64(1) << (cpu % 64)

    def worker_loop():
        numbers.append(threading.get_native_id())
        sleep_once(task_queue)
        numbers.append(os.sched_getaffinity(0))
    thread = threading.Thread(target=worker_loop)
    thread.start()
    asleep(task_queue)
    os.sched_setaffinity(numbers[0], other if chosen else away)
    wake_moved(task_queue)
    thread.join()
    assert numbers[1] == (other if chosen else allowed)


def test_jobs_count_no_references():
    """What tells Numba so (`_nrt`) is not of its public interface; without it kernels call for every tile they finish."""
    from edgeattn.runtime.jit import inline

    def step(some, i, out, at):
        out[at] += some[i]

    def sum_up(finish, x, out, worker, part):
        some, arguments = x[part:], (out, part)
        for i in range(some.size):
            finish(some, i, *arguments)
    def call_job(job, finish, x, out):
        job(finish, x, out, 0, 1)
    floats = numba.float64[::1]
    for make, make_step, expected in ((worker_pool.task, inline, False), (numba.njit, numba.njit, True)):
        finish, job = make_step(step), make(sum_up)
        job.compile((numba.typeof(finish), floats, floats, numba.int64, numba.int64))
        assembly, = job.inspect_asm().values()
        assert ("NRT_incref" in assembly) == expected
        x, out = np.arange(5.0), np.zeros(2)
        numba.njit(call_job)(job, finish, x, out)
        assert out.tolist() == [0, 10]


def test_where_compiled_code_cannot_sleep_threads_look_for_work_now_and_then():
    program = """
import time
import numba
from edgeattn import threads
from edgeattn.runtime import worker_pool
from edgeattn.runtime import worker_pool
worker_pool.CAN_SLEEP = False
worker_pool.worker_loop = numba.njit(nogil=True)(worker_pool.worker_loop.py_func)  # compiled now: the cache holds it as it is on this system
import test_worker_pool
threads.set_num_threads(2)
for _ in range(200):
    time.sleep(0.002)
    if test_worker_pool.call(200, 30_000) == {0, 1}:
        break
else:
    raise AssertionError("the thread took no part")
assert (threads._pool.task_queue[worker_pool._SLEEPERS + worker_pool._SLEEP::worker_pool._SLEEPER_SIZE] == 0).all()
threads.set_num_threads(1)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, text=True,
                          capture_output=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
