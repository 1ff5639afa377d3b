"""Compiles what tests of many files call, on every core: python tests/compile_first.py [--host] [--prebuilt].

conftest.py runs it before the processes of a whole suite start: each would compile the same kernels at the same time.
No two of CALLS need the same kernel, and what takes longest comes first. Then the plainest instruction set, for the
tests that compare others with it, and the object files that bundles and libraries of this machine are linked from, and
README's for another; `--host`: without these. `--prebuilt`: this machine's library, where it is not there, instead of
CALLS; these where it cannot be linked.
"""
import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from bundle_ways import targets_here
from places import TESTS
from workbench import random_input, random_layer

import edgeattn
import quant
from edgeattn.kernels.cpu.encoder_int8 import Ends
from edgeattn.kinds import KINDS
from edgeattn.runtime import prebuilt
from edgeattn.runtime.isa import ISA
from quant.export.kernel_objects import objects
from quant.export.kernels import build

PLAINEST = "generic"
BUNDLED = "StaticMultiHeadAttention", "MultiHeadAttention", "DynamicMultiHeadAttention", "LayerNorm", "DynamicLinear"
CROSS = "cortex-a76"  # what README exports for


def float_layer():
    random_layer()(random_input(0, 1, 9, 32))


def dynamic_layer():
    quant.quantize(random_layer(), scheme="dynamic")(random_input(0, 1, 9, 32))


def static_layer():
    layer, x = random_layer(), random_input(0, 1, 9, 32)
    static = quant.quantize(layer, quant.calibrate(layer, [x]), arithmetic="litert")
    static(x)
    static(x, kv_cache=edgeattn.KVCache.for_layer(static, 1, 9))


def caches():
    for layer in (random_layer(), quant.quantize(random_layer(), scheme="dynamic")):
        for dtype in ("float32", "int8"):
            layer(random_input(0, 1, 1, 32), kv_cache=edgeattn.KVCache.for_layer(layer, 1, 1, dtype=dtype))


def encoders():
    x = random_input(0, 1, 3, 32)
    parts = edgeattn.Linear(np.ones((8, 32))), edgeattn.Linear(np.ones((32, 8)))
    norms = edgeattn.LayerNorm(np.ones(32)), edgeattn.LayerNorm(np.ones(32))
    layer = edgeattn.TransformerEncoderLayer(random_layer(), edgeattn.FeedForward(*parts), *norms, norm_first=True)
    made = edgeattn.TransformerEncoder([layer])
    for each in (made, quant.quantize(made, scheme="dynamic", attention="float32")):
        each(x)
    static = quant.quantize(made, quant.calibrate(made, [x]), attention="float32")
    static.layers[0].feed_forward(x)
    ends = Ends(32, 32, (1.0, 0), (1.0, 0))
    ends.to_rows(*ends.to_codes(x[0]), None)


def function(**options):
    edgeattn.scaled_dot_product_attention(*np.ones((3, 1, 1, 9, 8), np.float32), **options)


def others(*names):
    """CALLS of these names under the plainest instruction set, in a process of its own."""
    subprocess.run([sys.executable, TESTS / "compile_first.py", *names], check=True,
                   env={**os.environ, "EDGEATTN_ISA": PLAINEST, "EDGEATTN_JIT": "1"})


CALLS = {
    "float32 layer": float_layer,
    "probabilities": lambda: function(return_weights=True),  # calibration's: before the static layer
    "static layer": static_layer,
    "dynamic layer": dynamic_layer,
    "caches": caches,
    "encoders": encoders,
    "float32 function": function,
    "int8 function": lambda: function(precision="int8"),
}
OTHERS = ("dynamic layer", "static layer")  # of int8_layers.py


def objects_of_bundles():
    """What is kept of every export: those of layers of several kinds here, of a static one for another machine."""
    try:
        for target, kinds in ((targets_here()[ISA.name], BUNDLED), (CROSS, BUNDLED[:1])):
            objects([target], dict.fromkeys(name for kind in kinds for name in KINDS[kind].kernels))
    except RuntimeError as error:  # the tests that need them say so too
        print(error)


def library():
    """Whether there is a library for this machine; it is compiled where there is none."""
    if prebuilt.LIBRARY is not None:
        return True
    try:
        build([targets_here()[ISA.name]], Path(prebuilt.FOLDER))
    except (KeyError, RuntimeError) as error:
        print(f"kernels are compiled by each Python, for there is no library: {error}")
        return False
    return True


def compile_one(name, instruction_set=ISA.name):
    CALLS[name]() if instruction_set == ISA.name else others(name)


def main(arguments):
    names = [name for name in arguments if name in CALLS]
    for name in names:
        CALLS[name]()
    if names:
        return
    work = [] if "--prebuilt" in arguments and library() else [(name, ISA.name) for name in CALLS]
    everything = "--host" not in arguments
    if everything and ISA.name != PLAINEST:
        work += [(name, PLAINEST) for name in OTHERS]
    cores = len(os.sched_getaffinity(0))
    with concurrent.futures.ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(compile_one, *each) for each in work]:
            done.result()
    if everything:
        objects_of_bundles()


if __name__ == "__main__":
    main(sys.argv[1:])
