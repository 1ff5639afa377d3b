"""What a process of its own costs: import, first results, memory. Prints one line of JSON.

Run by benchmarks.costs as ``python fresh.py start``, ``python fresh.py first KIND`` or ``python fresh.py memory
THREADS``, in a folder that holds copies of the packages. Imports nothing before the clock starts that edgeattn does not
need itself.
"""

import json
import resource
import sys
import time


def resident_mib():
    """Largest resident size of this process so far; where /proc says it, without that of its parent."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def layers(E, H, L):
    """name -> builder of a layer of random numbers, made without the workbench; a layer is called with a length."""
    import numpy as np

    import edgeattn
    from edgeattn.quantized import (
        DynamicMultiHeadAttention,
        QuantizedLinear,
        StaticMultiHeadAttention,
        TensorQuantization,
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, L, E)).astype(np.float32)
    codes = rng.integers(-128, 128, (1, L, E)).astype(np.int8)
    names = ("query", "key", "value", "output")
    weights = {name: (rng.standard_normal((E, E)) / E**0.5).astype(np.float32) for name in names}
    bias = np.zeros(E, np.float32)
    linears = {name: QuantizedLinear(rng.integers(-127, 128, (E, E)).astype(np.int8), np.full(E, 1e-3, np.float32))
               for name in names}
    tensors = {name: TensorQuantization(0.05, 0) for name in ("query_input", *names, "scores", "context")}

    def float32():
        layer = edgeattn.MultiHeadAttention(H, *weights.values(), q_bias=bias, k_bias=bias, v_bias=bias, out_bias=bias)
        return lambda length=L: layer(x[:, :length])

    def static():
        layer = StaticMultiHeadAttention(H, linears, tensors)
        return lambda length=L: layer.run_int8(codes[:, :length])

    def dynamic():
        layer = DynamicMultiHeadAttention(H, linears, {})
        return lambda length=L: layer(x[:, :length])

    return {"float32": float32, "int8": static, "dynamic": dynamic}


def everything(package):
    """Import what the package imports only when it is asked for."""
    for name in package.__all__:
        getattr(package, name)


def start():
    """Seconds of the import and of the first result of each layer, what was compiled, and resident memory.

    Processor time, which other processes do not disturb, and as "..._wall" the time that passed.
    """
    wall, processor = time.perf_counter(), time.process_time()
    import edgeattn
    everything(edgeattn)
    found = {"import": time.process_time() - processor, "import_wall": time.perf_counter() - wall,
             "import_mib": resident_mib()}
    from numba.core import event
    compiled = event.RecordingListener()
    event.register("numba:compile", compiled)
    for name, make in layers(128, 4, 64).items():
        call = make()
        wall, processor, before = time.perf_counter(), time.process_time(), len(compiled.buffer)
        call()
        found[name] = time.process_time() - processor
        found[f"{name}_wall"] = time.perf_counter() - wall
        found[f"{name}_compiled"] = len(compiled.buffer) > before
    return {**found, "mib": resident_mib()}


def first(kind):
    """What the first result of one kind of layer costs, from the start of the process on.

    "processor" seconds, resident "mib", and "lines" of LLVM's language that machine code was made of: a measure of the
    work that depends on no clock.
    """
    from numba.core import codegen
    finish, lines = codegen.CPUCodeLibrary._finalize_final_module, []

    def counted(library):
        lines.append(str(library._final_module).count("\n"))
        finish(library)
    codegen.CPUCodeLibrary._finalize_final_module = counted
    layers(128, 4, 64)[kind]()()
    return {"processor": time.process_time(), "mib": resident_mib(), "lines": sum(lines)}


def compiled_at_import():
    """Whether `import edgeattn` compiles anything."""
    from numba.core import event
    compiled = event.RecordingListener()
    event.register("numba:compile", compiled)
    import edgeattn
    everything(edgeattn)
    return {"compiled": len(compiled.buffer) > 0}


def memory(count):
    """Largest number of bytes above inputs and outputs that a call of each layer holds at 384/12/512."""
    import tracemalloc

    from edgeattn import threads
    threads.set_num_threads(count)
    found = {}
    for name, make in layers(384, 12, 512).items():
        call = make()
        call(1)  # packs the weights, and loads the kernel
        threads.scratch.clear()
        tracemalloc.start()
        out = call()
        found[name] = tracemalloc.get_traced_memory()[1] - out.nbytes
        tracemalloc.stop()
    return found


if __name__ == "__main__":
    what = {"start": start, "compiled": compiled_at_import, "memory": lambda: memory(int(sys.argv[2])),
            "first": lambda: first(sys.argv[2])}
    print(json.dumps(what[sys.argv[1]]()))
