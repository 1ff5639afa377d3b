"""Calls of layers between marks that count_plugin.c counts at: python count_calls.py RUNTIME FILE INPUT.npy ...

Under emulation, in a process of its own for each runtime; one thread. A mark, CALLS calls, a mark, twice as many, a
mark: the difference leaves CALLS calls, and nothing of the marks.
"""
import ctypes
import sys

import numpy as np

CALLS = 4
WARM = 3  # calls before: what the first ones plan, pack and allocate is not counted
GETPGID, MARK = 155, 1818845549  # as in count_plugin.c


def edgeattn_call(path, x):
    """The layer's call, a static one's from codes to codes."""
    import edgeattn

    edgeattn.set_num_threads(1)
    layer = edgeattn.load(path)
    forward = layer.run_int8 if x.dtype == np.int8 else layer
    return lambda: forward(x)


def litert_call(path, x):
    """An interpreter's invoke, with XNNPACK as it comes; copies of input and output are not counted."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    for place in interpreter.get_input_details():
        interpreter.set_tensor(place["index"], x.astype(place["dtype"]).reshape(place["shape"]))
    return interpreter.invoke


def onnxruntime_call(path, x):
    """A session's run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})


RUNTIMES = {"edgeattn": edgeattn_call, "litert": litert_call, "onnxruntime": onnxruntime_call}


def main():
    """Call every file's layer."""
    runtime, *files = sys.argv[1:]
    mark = ctypes.CDLL(None).syscall
    for path, at in zip(files[::2], files[1::2], strict=True):
        call = RUNTIMES[runtime](path, np.load(at))
        for _ in range(WARM):
            call()
        for calls in (0, CALLS, 2 * CALLS):
            for _ in range(calls):
                call()
            mark(GETPGID, MARK)


if __name__ == "__main__":
    main()
