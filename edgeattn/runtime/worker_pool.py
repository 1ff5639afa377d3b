"""Handing parts of a call to waiting threads, from inside compiled code.

A hand-over through Python needs the interpreter's lock on both sides and a wake-up by the kernel: tens of microseconds,
as long as a whole small layer. Here the threads of a pool wait in `worker_loop`, compiled and without that lock, for
the state word of a task_queue to change; a caller posts a job there, and everybody, the caller too, claims its parts
one by one. A thread that is late finds nothing left: nobody waits for a thread that has not begun. One that has waited
for long sleeps in the kernel, from where the next job's poster wakes it, still without the interpreter.

A caller takes the pool for one job, and leaves it when that is done, in compiled code too: an exception of Python's,
which may come between any two of its steps, cannot come between these. Who finds it taken does all parts himself.
"""
import os
import sys
import time

import numpy as np

from edgeattn.runtime.arrays import array_at
from edgeattn.runtime.compiler import cgutils, inline, intrinsic, ir, jit, task, types
from edgeattn.runtime.isa import ISA

# Positions on a task_queue, int64 elements; what different threads write lies on different cache lines.
STATE, FINISHED, CODE, DATA, TAKEN, STOP, _SLEEPERS = 0, 8, 16, 17, 18, 24, 32
# Then a sleeper for each thread that serves: how it sleeps, its number in the kernel, a semaphore of the C library, the
# processors it may use, those it is to wake on, and those it finds that it may use when awake.
_SLEEP, _THREAD, _SEMAPHORE, _HOME, _AWAY, _FOUND, _SLEEPER_SIZE = 0, 1, 2, 8, 24, 40, 56
_AWAKE, _ASLEEP, _WOKEN, _MOVED = 0, 1, 2, 3
_MOST_PROCESSORS = 64 * (_AWAY - _HOME)
# A long call that a signal may end brings a task_queue of its own instead, shorter than any other: where that of the
# pool is and its size (0 for no pool); whether a signal's handler has raised, and what (three pointers); when to look
# for signals next and how long after that, in nanoseconds; a time; and where the functions are by which that is done.
POOL, POOL_SIZE, RAISED, ERROR, _NEXT_LOOK, PAUSE, _TIME, FUNCTIONS = 0, 1, 2, 3, 6, 7, 8, 10
LONG_SIZE = FUNCTIONS + 5
_READ_CLOCK, _ENSURE, _CHECK_SIGNALS, _FETCH, _RELEASE = range(FUNCTIONS, LONG_SIZE)
_CLOCK = getattr(time, "CLOCK_MONOTONIC", 0)
# The state word: generation, then the next part nobody has claimed, then the number of parts.
_NEXT, _GENERATION, _FIELD = np.int64(20), np.int64(40), np.int64((1 << 20) - 1)
# Looks at the task_queue before going to sleep: 0.3 to 0.7 ms, what Python does between two calls of an encoder. A
# thread that sleeps is missed for the first 50 us of a job, and waking it takes its caller 10.
PATIENCE = 16000
# A thread of ours may have lost its processor to the caller who waits for it. Any other gets a whole slice by a yield,
# so that comes late: after about a millisecond.
_SPINS_BEFORE_YIELD = 20_000 if ISA.x86 else 80_000

CAN_SLEEP = sys.platform == "linux"  # in compiled code: with what follows, of the C library
_sem_init = types.ExternalFunction("sem_init", types.int32(types.int64, types.int32, types.uint32))
_sem_wait = types.ExternalFunction("sem_wait", types.int32(types.int64))
_sem_post = types.ExternalFunction("sem_post", types.int32(types.int64))
_sched_getcpu = types.ExternalFunction("sched_getcpu", types.int32())
_sched_getaffinity = types.ExternalFunction("sched_getaffinity", types.int32(types.int32, types.int64, types.int64))
_sched_setaffinity = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.int64, types.int64))

_I32, _I64, _VOID = ir.IntType(32), ir.IntType(64), ir.VoidType()
_JOB = ir.FunctionType(_VOID, [_I64, _I64, _I64])
_HAS_YIELD = os.name == "posix"


@intrinsic
def job(typing, function, arguments):
    """(code, data): call(code, data, worker, part) runs function(*arguments, worker, part).

    `arguments` is kept in the frame of the calling function, which must outlive the calls.
    """
    signature = typing.resolve_function_type(function, (*arguments.types, types.int64, types.int64), {})
    if signature is None:
        return None

    def generate(context, builder, sig, args):
        kept = cgutils.alloca_once_value(builder, args[1])
        compiled = function.dispatcher.get_compile_result(signature)
        context.add_linking_libs([compiled.library])
        adapter = ir.Function(builder.module, _JOB, builder.module.get_unique_name("job"))
        adapter.linkage = "internal"
        inside = ir.IRBuilder(adapter.append_basic_block())
        values = inside.load(inside.inttoptr(adapter.args[0], kept.type))
        values = cgutils.unpack_tuple(inside, values, len(arguments.types))
        callee = context.declare_function(builder.module, compiled.fndesc)
        # Inlined, it would be optimized and translated again for every job of a kernel.
        context.call_conv.call_function(inside, callee, signature.return_type, signature.args,
                                        (*values, adapter.args[1], adapter.args[2]), attrs=("noinline",))
        inside.ret_void()
        return context.make_tuple(builder, sig.return_type,
                                  [builder.ptrtoint(adapter, _I64), builder.ptrtoint(kept, _I64)])
    return types.UniTuple(types.int64, 2)(function, arguments), generate


@intrinsic
def call(typing, code, data, worker, part):
    """Run one part of a job."""
    def generate(context, builder, sig, args):
        builder.call(builder.inttoptr(args[0], _JOB.as_pointer()), args[1:])
    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def _word(context, builder, board_type, task_queue, at):
    return builder.gep(context.make_array(board_type)(context, builder, task_queue).data, [at])


@intrinsic
def read(typing, task_queue, at):
    """task_queue[at], seeing all that was written before the `write` or `add` it reads from"""
    def generate(context, builder, sig, args):
        return builder.load_atomic(_word(context, builder, sig.args[0], *args), "acquire", 8)
    return types.int64(task_queue, types.intp), generate


@intrinsic
def write(typing, task_queue, at, value):
    """task_queue[at] = value, after all that was written before"""
    def generate(context, builder, sig, args):
        builder.store_atomic(args[2], _word(context, builder, sig.args[0], *args[:2]), "release", 8)
    return types.void(task_queue, types.intp, types.int64), generate


@intrinsic
def add(typing, task_queue, at, value):
    """task_queue[at] += value in one step"""
    def generate(context, builder, sig, args):
        builder.atomic_rmw("add", _word(context, builder, sig.args[0], *args[:2]), args[2], "acq_rel")
    return types.void(task_queue, types.intp, types.int64), generate


@intrinsic
def exchange(typing, task_queue, at, old, new):
    """In one step: whether task_queue[at] == old, and if so task_queue[at] = new"""
    def generate(context, builder, sig, args):
        both = builder.cmpxchg(_word(context, builder, sig.args[0], *args[:2]), args[2], args[3], "acq_rel", "acquire")
        return builder.extract_value(both, 1)
    return types.boolean(task_queue, types.intp, types.int64, types.int64), generate


@intrinsic
def relax(typing):
    """Tell the core that this is a waiting loop."""
    def generate(context, builder, sig, args):
        name, arguments = ("llvm.x86.sse2.pause", []) if ISA.x86 else ("llvm.aarch64.isb", [ir.Constant(_I32, 15)])
        if ISA.name == "generic":  # the barrier still keeps the loop's loads in the loop
            builder.fence("seq_cst")
            return
        signature = ir.FunctionType(_VOID, [a.type for a in arguments])
        builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)
    return types.void(), generate


@intrinsic
def give_way(typing):
    """Let another thread have this core, where the operating system can be asked to."""
    def generate(context, builder, sig, args):
        if _HAS_YIELD:
            signature = ir.FunctionType(_I32, [])
            builder.call(cgutils.get_or_insert_function(builder.module, signature, "sched_yield"), [])
    return types.void(), generate


@intrinsic
def fence(typing):
    """What was written before is seen by others before anything after this is read."""
    def generate(context, builder, sig, args):
        builder.fence("seq_cst")
    return types.void(), generate


@intrinsic
def address(typing, task_queue, at):
    """Where task_queue[at] is."""
    def generate(context, builder, sig, args):
        return builder.ptrtoint(_word(context, builder, sig.args[0], *args), _I64)
    return types.int64(task_queue, types.intp), generate


@intrinsic
def foreign(typing, function, arguments):
    """What a C function at an address returns, an int; its arguments are integers and pointers."""
    def generate(context, builder, sig, args):
        given = cgutils.unpack_tuple(builder, args[1], len(arguments.types))
        kind = ir.FunctionType(_I32, [_I64] * len(given))
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), given)
    return types.int32(types.int64, arguments), generate


@inline
def claim(task_queue):
    """The next part of the posted job, now this thread's to run; -1 if there is none."""
    while True:
        state = read(task_queue, STATE)
        part = (state >> _NEXT) & _FIELD
        if part >= (state & _FIELD):
            return np.int64(-1)
        if exchange(task_queue, STATE, state, state + (np.int64(1) << _NEXT)):
            return part


@task
def wake_all(task_queue):
    """Wake those who sleep by the task_queue, each on another processor than this thread's.

    Left to itself Linux may wake a thread beside the one that wakes it; both busy, they share that processor for
    milliseconds. Awake, it may use its own processors again. Microseconds of a job in eight parts, with its work on one
    thread and the time between two jobs: median / 99th of 100 / mean, on two Zen 3 processors that others keep busy, by
    turns in two processes, one of them without the calls of sched_setaffinity:

    | job                 | woken elsewhere        | left to Linux          | on one thread          |
    | ------------------- | ---------------------- | ---------------------- | ---------------------- |
    | 40 us, every 1 ms   |          64 / 149 / 70 |       46 / 2,121 / 124 |           40 / 99 / 44 |
    | 40 us, every 20 ms  |        101 / 166 / 104 |       71 / 5,376 / 203 |          63 / 114 / 65 |
    | 320 us, every 2 ms  |        324 / 476 / 333 |      441 / 9,653 / 708 |        323 / 543 / 340 |
    | 320 us, every 20 ms |        272 / 509 / 326 |      457 / 7,814 / 621 |        332 / 503 / 353 |
    | 3.2 ms, every 5 ms  | 3,060 / 28,580 / 4,546 | 3,328 / 28,789 / 7,731 | 3,073 / 23,225 / 5,136 |
    """
    fence()
    for sleeper in range(_SLEEPERS, task_queue.size, _SLEEPER_SIZE):
        if read(task_queue, sleeper + _SLEEP) != _ASLEEP or not exchange(task_queue, sleeper + _SLEEP, _ASLEEP, _WOKEN):
            continue
        thread, size, others = task_queue[sleeper + _THREAD], _MOST_PROCESSORS // 8, np.int64(0)
        # A sandbox may forbid any of this: then the kernel's choice stands.
        if _sched_getaffinity(thread, size, address(task_queue, sleeper + _HOME)) == 0:
            here = max(np.int64(_sched_getcpu()), np.int64(0))
            for i in range(_AWAY - _HOME):
                here_too = np.int64(1) << here % 64 if i == here // 64 else np.int64(0)
                task_queue[sleeper + _AWAY + i] = task_queue[sleeper + _HOME + i] & ~here_too
                others |= task_queue[sleeper + _AWAY + i]
        moved = others != 0 and _sched_setaffinity(thread, size, address(task_queue, sleeper + _AWAY)) == 0
        write(task_queue, sleeper + _SLEEP, _MOVED if moved else _AWAKE)
        _sem_post(address(task_queue, sleeper + _SEMAPHORE))


@inline
def sleep(task_queue, sleeper):
    """Sleep until woken; not if there is something to claim, or an end."""
    write(task_queue, sleeper + _SLEEP, _ASLEEP)
    fence()
    state = read(task_queue, STATE)
    nothing = (state >> _NEXT) & _FIELD >= state & _FIELD and read(task_queue, STOP) == 0
    if not nothing and exchange(task_queue, sleeper + _SLEEP, _ASLEEP, _AWAKE):
        return
    while _sem_wait(address(task_queue, sleeper + _SEMAPHORE)) != 0:  # a signal interrupts it
        pass
    size = _MOST_PROCESSORS // 8
    if read(task_queue, sleeper + _SLEEP) != _MOVED or _sched_getaffinity(0, size, address(task_queue,
                                                                                           sleeper + _FOUND)) != 0:
        return
    for i in range(_AWAY - _HOME):
        if task_queue[sleeper + _FOUND + i] != task_queue[sleeper + _AWAY + i]:
            return  # somebody else has chosen its processors since
    _sched_setaffinity(0, size, address(task_queue, sleeper + _HOME))


@task
def raised(task_queue):
    """Whether a signal's handler has raised during a long call, `task_queue` being that call's.

    Python runs handlers on its main thread, between two steps of its own: while that is in a kernel, only here, where
    it is asked to now and then. What a handler raised is kept until the kernel has returned.
    """
    foreign(task_queue[_READ_CLOCK], (np.int64(_CLOCK), address(task_queue, _TIME)))
    now = task_queue[_TIME] * np.int64(1_000_000_000) + task_queue[_TIME + 1]
    if now >= task_queue[_NEXT_LOOK]:
        lock = np.int64(foreign(task_queue[_ENSURE], ()))
        if foreign(task_queue[_CHECK_SIGNALS], ()) != 0:
            foreign(task_queue[_FETCH], (address(task_queue, ERROR), address(task_queue, ERROR + 1),
                                         address(task_queue, ERROR + 2)))
            task_queue[RAISED] = 1
        foreign(task_queue[_RELEASE], (lock,))
        foreign(task_queue[_READ_CLOCK], (np.int64(_CLOCK), address(task_queue, _TIME)))
        task_queue[_NEXT_LOOK] = task_queue[_TIME] * np.int64(1_000_000_000) + task_queue[_TIME + 1] + task_queue[PAUSE]
    return task_queue[RAISED] != 0


@inline
def withdraw(task_queue):
    """Claim every part of the posted job that nobody has, and count it as done."""
    while True:
        state = read(task_queue, STATE)
        part, parts = (state >> _NEXT) & _FIELD, state & _FIELD
        if part >= parts:
            return
        if exchange(task_queue, STATE, state, state + ((parts - part) << _NEXT)):
            add(task_queue, FINISHED, parts - part)
            return


@task
def hand_out(task_queue, parts, code, data):
    """The parts of a job, whose task_queue is not empty."""
    long = task_queue.size == LONG_SIZE
    if long and task_queue[RAISED] != 0:
        return
    pool = array_at(task_queue[POOL], task_queue[POOL_SIZE], np.int64) if long else task_queue
    if pool.size == 0 or parts <= 1 or not exchange(pool, TAKEN, 0, 1):
        for part in range(parts):
            call(code, data, 0, part)
            if long and raised(task_queue):
                return
        return
    pool[CODE], pool[DATA], pool[FINISHED] = code, data, 0
    generation = (read(pool, STATE) >> _GENERATION) + 1
    write(pool, STATE, (generation << _GENERATION) | parts)
    if CAN_SLEEP:
        wake_all(pool)
    while True:
        part = claim(pool)
        if part < 0:
            break
        call(code, data, 0, part)
        add(pool, FINISHED, 1)
        if long and raised(task_queue):
            withdraw(pool)
    spins = 0
    while read(pool, FINISHED) < parts:
        relax()
        spins += 1
        if spins > _SPINS_BEFORE_YIELD:
            give_way()
    write(pool, TAKEN, 0)


@inline
def parallel_for(task_queue, parts, function, *arguments):
    """function(*arguments, worker, part) for every part in range(parts); returns when all are done.

    On this thread (worker 0) and those that serve the task_queue; an empty task_queue stands for this thread alone.
    When the call is a long one and a signal's handler has raised, parts are left out, of this job and those to come.
    """
    code, data = job(function, arguments)
    if task_queue.size == 0:
        for part in range(parts):
            call(code, data, 0, part)
    else:
        hand_out(task_queue, parts, code, data)


@jit
def worker_loop(task_queue, worker, thread, patience):
    """Run parts of whatever is posted, until told to stop; sleep when nothing has come for `patience` looks.

    `thread` is this one's number in the operating system. False when told to stop, and at once where another thread is
    this worker; where compiled code cannot sleep, True instead of sleeping.
    """
    sleeper = _SLEEPERS + (worker - 1) * _SLEEPER_SIZE
    if task_queue[sleeper + _THREAD] != thread and not exchange(task_queue, sleeper + _THREAD, 0, thread):
        return False
    if CAN_SLEEP:
        _sem_init(address(task_queue, sleeper + _SEMAPHORE), 0, 0)
    idle = 0
    while True:
        part = claim(task_queue)
        if part >= 0:
            call(task_queue[CODE], task_queue[DATA], worker, part)
            add(task_queue, FINISHED, 1)
            idle = 0
        elif read(task_queue, STOP) != 0:
            return False
        elif idle < patience:
            relax()
            idle += 1
        elif not CAN_SLEEP:
            return True
        else:
            sleep(task_queue, sleeper)
            idle = 0


@jit
def dismiss(task_queue):
    """Have those who serve a task_queue end once they have done what they have begun."""
    write(task_queue, STOP, 1)
    if CAN_SLEEP:
        wake_all(task_queue)


@jit
def run_in_turn(calls):
    """Call the functions of a library at the even places of an array, each with what stands behind it."""
    for i in range(0, calls.size, 2):
        foreign(calls[i], (calls[i + 1],))


def task_queue_size(workers):
    """Elements of a task_queue that so many threads serve."""
    return _SLEEPERS + workers * _SLEEPER_SIZE


def is_served(task_queue, worker):
    """Whether a thread is the worker of that number."""
    return task_queue[_SLEEPERS + (worker - 1) * _SLEEPER_SIZE + _THREAD] != 0
