"""Random float layers and calls for the tests of the workbench."""
import platform

import numpy as np
import pytest
from arrays import numbers

import edgeattn
from quant.export.bundle import check_numba
from quant.export.linker import find_linker


def random_layer(seed=0, *, H=4, Hkv=None, D=8, Dv=None, E=32, kdim=None, vdim=None, bias=True, output=True):
    rng = np.random.default_rng(seed)
    Hkv, Dv = Hkv or H, Dv or D
    kdim, vdim = kdim or E, vdim or E

    def weight(o, i):
        return (rng.standard_normal((o, i)) * rng.uniform(0.7, 1.8) / np.sqrt(i)).astype(np.float32)

    def vector(o):
        return rng.normal(0, 0.3, o).astype(np.float32) if bias else None

    return edgeattn.MultiHeadAttention(
        H, weight(H * D, E), weight(Hkv * D, kdim), weight(Hkv * Dv, vdim), weight(E, H * Dv) if output else None,
        q_bias=vector(H * D), k_bias=vector(Hkv * D), v_bias=vector(Hkv * Dv),
        out_bias=vector(E) if output else None, num_kv_heads=Hkv)


def random_input(seed, *shape):
    return numbers(*shape, seed=seed)


def random_call(layer, sources, seed=0, *, B=2, L=12, S=9):
    """The positional inputs of a call of this kind."""
    query = random_input(seed, B, L, layer.embed_dim)
    if sources == (0, 0, 0):
        return (query,)
    key = random_input(seed + 1, B, S, layer.kdim)
    return (query, key) if sources == (0, 1, 1) else (query, key, random_input(seed + 2, B, S, layer.vdim))


def as_batch(inputs, **masks):
    return {**dict(zip(("query", "key", "value"), inputs, strict=False)), **masks}


def needs_compiler(machine=None):
    """Skip where no bundle can be made for a machine, this one unless named."""
    try:
        check_numba()
        find_linker(machine or platform.machine())
    except RuntimeError as error:
        pytest.skip(str(error))
