"""How fast on a GPU, beside torch and SageAttention: ``make bench-cuda``. Ratios, with the card named.

Every answer is checked before it is timed, by benchmarks.rounding; all are timed in turn, and a ratio is the median
over the rounds: the contender's time by that of our call in the precision named behind it, so above 1 is faster than
the contender.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable

from benchmarks import rounding

# B, H, L, D: edge shapes, then one that fills a card
SHAPES = [(1, 4, 32, 32), (1, 4, 128, 32), (1, 8, 128, 64), (4, 12, 256, 64), (1, 12, 1024, 64), (4, 12, 1024, 64)]
CALLS = 20  # between two events


@dataclasses.dataclass(frozen=True)
class Contender:
    """Somebody else's attention.

    Parameters
    ----------
    name : str
    precision : str
        Which of ours it is compared with, and how exact it must be.
    needs : str
        The module it is in.
    make : callable
        (torch, q, k, v, causal) -> a call without arguments; RuntimeError or ValueError where it does not take these.
    around : callable
        (torch) -> a context that the calls want around them, which is not timed.
    """

    name: str
    precision: str
    needs: str
    make: Callable
    around: Callable = lambda _torch: contextlib.nullcontext()


def _sdpa(kind):
    def make(torch, q, k, v, causal):
        arrays = [x.to(getattr(torch, kind)) for x in (q, k, v)]
        return lambda: torch.nn.functional.scaled_dot_product_attention(*arrays, is_causal=causal)

    return make


def _by(backend):
    def around(_torch):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, backend))

    return around


def _int_mm(torch, q, k, v, causal):
    """int8 products by torch._int_mm, which takes one matrix at a time; every row and value column by its own range."""
    def codes(x, axis):
        scale = x.abs().amax(axis, keepdim=True).clamp_min(1e-12) / 127
        return torch.round(x / scale).to(torch.int8), scale

    if q.shape[2] <= 16 or q.shape[2] % 8 or q.shape[3] % 8:
        raise ValueError("torch._int_mm takes more than 16 rows, and multiples of 8")
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1) if causal else None

    def call():
        out = torch.empty_like(q)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                (qc, qs), (kc, ks), (vc, vs) = codes(q[b, h], 1), codes(k[b, h], 1), codes(v[b, h], 0)
                scores = torch._int_mm(qc, kc.t()) * (qs * ks.t() * q.shape[3] ** -0.5)
                if causal:
                    scores = scores.masked_fill(hidden, float("-inf"))
                pc, ps = codes(torch.softmax(scores, 1), 1)
                out[b, h] = torch._int_mm(pc, vc) * (ps * vs)
        return out

    return call


def _sage(_torch, q, k, v, causal):
    from sageattention import sageattn

    arrays = [x.half() for x in (q, k, v)]
    return lambda: sageattn(*arrays, tensor_layout="HND", is_causal=causal)


CONTENDERS = [
    Contender("torch float32 efficient", "float32", "torch", _sdpa("float32"), _by("EFFICIENT_ATTENTION")),
    Contender("torch float32 math", "float32", "torch", _sdpa("float32"), _by("MATH")),
    Contender("torch float16 flash", "float16", "torch", _sdpa("float16"), _by("FLASH_ATTENTION")),
    Contender("torch float16 efficient", "float16", "torch", _sdpa("float16"), _by("EFFICIENT_ATTENTION")),
    Contender("torch float16 math", "float16", "torch", _sdpa("float16"), _by("MATH")),
    Contender("torch int8 _int_mm", "int8", "torch", _int_mm),
    Contender("SageAttention", "int8", "sageattention", _sage),
]


def missing():
    """A line that says what is missing, or None."""
    from edgeattn.kernels.cuda.driver import why_not

    if reason := why_not():
        return f"no GPU to run on: {reason}"
    if importlib.util.find_spec("torch") is None:
        return "torch makes the arrays, and is not installed"
    import torch

    return None if torch.cuda.is_available() else "this torch was built without CUDA"


def main(arguments=None):
    """Print the contenders and a line per shape; 1 and the reason where nothing can be run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing per shape (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape after so long")
    options = parser.parse_args(arguments)
    print("contender, and which of ours it is compared with:")
    for contender in CONTENDERS:
        there = importlib.util.find_spec(contender.needs) is not None
        print(f"  {contender.name}: {contender.precision}{'' if there else f' ({contender.needs} is not installed)'}")
    if reason := missing():
        print(f"bench-cuda: not run, {reason}.", file=sys.stderr)
        return 1
    import torch

    from edgeattn.kernels.cuda.driver import driver

    print(f"{driver().name()}, torch {torch.__version__}; median of {options.rounds} rounds of {CALLS} calls")
    end = time.monotonic() + options.seconds
    for shape in SHAPES:
        for causal in (False, True):
            if time.monotonic() > end:
                print(f"{options.seconds:.0f} seconds have passed: the other shapes are left out")
                return 0
            _compare(torch, shape, causal, options.rounds)
    return 0


def _ours(torch, q, k, v, causal, precision):
    """Our call; float16 products of float16 arrays, as the contenders have them."""
    import edgeattn

    arrays = [x.half() if precision == "float16" else x for x in (q, k, v)]
    out = torch.empty_like(arrays[0])

    def call():
        return edgeattn.scaled_dot_product_attention(*arrays, is_causal=causal, precision=precision, out=out)

    return call


def timed(torch, call, around):
    """(us on the device, us on the host) of a call; `around` it is a context, which costs it nothing."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with around(torch):
        torch.cuda.synchronize()
        before = time.perf_counter()
        begin.record()
        for _ in range(CALLS):
            call()
        end.record()
        host = time.perf_counter() - before
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / CALLS * 1e3, host / CALLS * 1e6


def _compare(torch, shape, causal, rounds):
    torch.manual_seed(0)
    q, k, v = (torch.randn(*shape, device="cuda") for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=causal)
    host, exact = [x.cpu().numpy() for x in (q, k, v)], want.cpu().numpy()
    allowed = {precision: rounding.allowed(*host, exact, causal, precision) for precision in rounding.PRECISIONS}
    calls, errors, left_out = {}, {}, []

    def add(name, precision, make, around):
        call = make()
        with around(torch):
            error = rounding.off(call().double().cpu().numpy(), exact)
        if not error <= allowed[precision]:
            raise ValueError(f"{name} is off by {error:.2g}, more than the {allowed[precision]:.2g} of its rounding")
        calls[name], errors[name] = (call, around), error

    for precision in rounding.PRECISIONS:
        add(f"ours {precision}", precision, lambda precision=precision: _ours(torch, q, k, v, causal, precision),
            Contender.around)
    for contender in CONTENDERS:
        try:
            add(contender.name, contender.precision,
                lambda contender=contender: contender.make(torch, q, k, v, causal), contender.around)
        except (ImportError, RuntimeError, ValueError) as error:
            left_out.append(f"{contender.name} ({str(error).splitlines()[0]})")
    device, host = {name: [] for name in calls}, {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            on_device, on_host = timed(torch, *call)
            device[name].append(on_device)
            host[name].append(on_host)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls["ours float32"][0]()
    graph.replay()
    torch.cuda.synchronize()
    print("/".join(map(str, shape)) + (" causal" if causal else ""), flush=True)
    for precision in rounding.PRECISIONS:
        ours = f"ours {precision}"
        ratios = []
        for name in (c.name for c in CONTENDERS if c.precision == precision and c.name in calls):
            ratio = statistics.median(t / o for t, o in zip(device[name], device[ours], strict=True))
            ratios.append(f"{ratio:.2f} x {name}")
        print(f"  {ours}: {statistics.median(device[ours]):.1f} us, host {statistics.median(host[ours]):.1f} us, error "
              f"{errors[ours]:.1e}; {', '.join(ratios)}")
    if left_out:
        print("  left out: " + "; ".join(left_out))


if __name__ == "__main__":
    sys.exit(main())
