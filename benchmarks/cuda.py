"""How fast on a GPU, beside torch's scaled_dot_product_attention: ``make bench-cuda``. Ratios, with the card named.

Every answer is checked before it is timed; contenders are timed in turn, and a ratio is the median over the rounds.
"""

import argparse
import importlib.util
import statistics
import sys
import time

# B, H, L, D: edge shapes, then one that fills a card
SHAPES = [(1, 4, 32, 32), (1, 4, 128, 32), (1, 8, 128, 64), (4, 12, 256, 64), (1, 12, 1024, 64), (4, 12, 1024, 64)]


def main(arguments=None):
    """Print a table; 1 and a line that says why where there is no GPU or no torch for it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing per shape (default: %(default)s)")
    options = parser.parse_args(arguments)
    from edgeattn.cuda.driver import driver, why_not

    reason = why_not()
    if reason:
        print(f"bench-cuda: not run. {reason}.", file=sys.stderr)
        return 1
    if importlib.util.find_spec("torch") is None:
        print("bench-cuda: not run. It compares with torch, which is not installed.", file=sys.stderr)
        return 1
    import torch

    if not torch.cuda.is_available():
        print("bench-cuda: not run. This torch was built without CUDA.", file=sys.stderr)
        return 1
    print(f"{driver().name()}, torch {torch.__version__}; times as fast as the contender, median of "
          f"{options.rounds} rounds")
    for shape in SHAPES:
        for causal in (False, True):
            _compare(torch, shape, causal, options.rounds)
    return 0


def _contenders(torch, q, k, v, causal):
    """name -> call, for each backend of torch that takes these inputs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found = {}
    for kind, arrays in (("float32", (q, k, v)), ("float16", tuple(x.half() for x in (q, k, v)))):
        for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            def call(arrays=arrays, backend=backend):
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(*arrays, is_causal=causal)

            try:
                call()
            except RuntimeError:  # a backend says so of inputs that it does not take
                continue
            found[f"torch {kind} {backend.name.partition('_')[0].lower()}"] = call
    return found


def _compare(torch, shape, causal, rounds):
    import edgeattn

    B, H, L, D = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, L, D, device="cuda") for _ in range(3))
    out = torch.empty_like(q)

    def ours():
        return edgeattn.scaled_dot_product_attention(q, k, v, is_causal=causal, out=out)

    contenders = _contenders(torch, q, k, v, causal)
    want = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=causal)
    error = (ours().double() - want).abs().max().item()
    if not error < 1e-5:
        raise SystemExit(f"bench-cuda: {shape}, causal {causal}: our result is off by {error:.2g}; nothing is timed")
    calls = {"ours": ours, **contenders}
    device, host = {name: [] for name in calls}, {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            before = time.perf_counter()
            begin.record()
            for _ in range(20):
                call()
            end.record()
            host[name].append((time.perf_counter() - before) / 20 * 1e6)
            torch.cuda.synchronize()
            device[name].append(begin.elapsed_time(end) / 20 * 1e3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours()
    graph.replay()
    torch.cuda.synchronize()
    ratios = {name: statistics.median(theirs / mine for theirs, mine in zip(device[name], device["ours"], strict=True))
              for name in contenders}
    print(f"{B}/{H}/{L}/{D}{' causal' if causal else ''}: {statistics.median(device['ours']):.1f} us, host "
          f"{statistics.median(host['ours']):.1f} us, error {error:.1e}; "
          + ", ".join(f"{ratio:.2f} x {name}" for name, ratio in ratios.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
