"""Several kernels in one call: a list of stages that one compiled loop walks, with one scratch.

A stage is a prepared call. What it writes is there for those after it, as with calls one by one: each is done, on all
threads, before the next begins. Each lays out the scratch anew, so that nothing in it passes from one to the next.
"""
import numpy as np
from numba import types
from numba.extending import intrinsic

from edgeattn import threads
from edgeattn.runtime.addresses import address
from edgeattn.runtime.arrays import array_at
from edgeattn.runtime.jit import compiled_for, jit

from .call import entry
from .records import named, record

# Of a stage: where its kernel's code is, where its two records are and how long; whether threads share it.
STAGE = record("code parameters parameters_size addresses addresses_size shared")
_SIZE = len(STAGE)
_INTS, _FLOATS = types.Array(types.int64, 1, "C"), types.Array(types.float32, 1, "C")
_KERNEL = _INTS, _INTS, _FLOATS, _INTS, types.int64


@intrinsic
def call_kernel(typing, code, parameters, addresses, scratch, task_queue, count):
    """Call the kernel at an address; what kind of numbers its scratch holds makes no difference to a call."""
    def generate(context, builder, sig, args):
        kind = context.call_conv.get_function_type(types.none, _KERNEL)
        context.call_conv.call_function(builder, builder.inttoptr(args[0], kind.as_pointer()), types.none, _KERNEL,
                                        args[1:])
        return context.get_dummy_value()
    return types.none(types.int64, *_KERNEL), generate


@jit
def run_stages(stages, scratch, task_queue, count):
    """Run stages, records of STAGE side by side, one after the other."""
    for at in range(0, stages.size, _SIZE):
        stage = named(stages[at:], STAGE)
        parameters = array_at(stage.parameters, stage.parameters_size, np.int64)
        addresses = array_at(stage.addresses, stage.addresses_size, np.int64)
        if stage.shared != 0:
            call_kernel(stage.code, parameters, addresses, scratch, task_queue, count)
        else:
            call_kernel(stage.code, parameters, addresses, scratch, task_queue[:0], 1)


def code_of(kernel, dtype):
    """The address of the code of a kernel whose scratch is of this dtype; it takes no functions."""
    entry(kernel, dtype)
    compiled, = kernel.overloads.values()
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)


class Stages:
    """Prepared calls as one.

    Parameters
    ----------
    calls : list of PreparedCall
        Of kernels without functions among their arguments.
    """

    def __init__(self, calls):
        number = np.zeros(1, np.int64)
        self._calls, self._run = calls, compiled_for(run_stages, (number, np.zeros(1, np.float32), number, 1))
        self._stages = np.zeros((len(calls), _SIZE), np.int64)
        for stage, call in zip(self._stages, calls, strict=True):
            stage[:3] = code_of(call.kernel, call.dtype), address(call.parameters), call.parameters.size
            stage[5] = call.work >= threads.SMALLEST_SHARED_WORK
        self._shared, self._private = (max(size) for size in zip(*((c.shared, c.private) for c in calls), strict=True))
        self._work, self._jobs = sum(call.work for call in calls), max(call.jobs for call in calls)

    def __call__(self, *arrays):
        """Run them; arrays: of each call, those that it takes."""
        stages = self._stages.copy()
        records = [call.addresses(*given) for call, given in zip(self._calls, arrays, strict=True)]
        stages[:, 3:5] = [(address(where), where.size) for where in records]
        threads.run(self._run, (stages.reshape(-1),), np.float32, self._shared, self._private, self._work, self._jobs)
