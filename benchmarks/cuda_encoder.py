"""How fast a whole encoder is on a GPU, beside torch.nn.TransformerEncoder: ``python -m benchmarks.cuda_encoder``.

Every answer is checked before it is timed; all are timed in turn. MiniLM's sizes: 6 layers, E = 384, F = 1536, H = 12.
"""

import argparse
import statistics
import sys
import time

from benchmarks.cuda import CALLS, Contender, missing, timed

SHAPES = [(1, 16), (1, 128), (32, 128)]  # B, L
WIDTH, HIDDEN, HEADS, LAYERS = 384, 1536, 12, 6
# Of the norm of the result: float32 products in another order, float16's rounding, int8's.
ALLOWED = {"ours float32": 1e-5, "ours dynamic int8": 0.05, "torch float32": 1e-5, "torch float16": 0.01}


def models(torch):
    """(name -> a function of x on the GPU, the torch encoder in float64)."""
    import edgeattn
    import quant

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, activation="gelu", batch_first=True, dropout=0.0)
    theirs = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    ours = edgeattn.TransformerEncoder.from_torch(
        {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}, HEADS, activation="gelu",
        norm_first=False)
    exact = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    exact.load_state_dict(theirs.state_dict())
    half = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    half.load_state_dict(theirs.state_dict())
    theirs, half = theirs.cuda(), half.cuda().half()
    placed = {"ours float32": ours.to("cuda"),
              "ours dynamic int8": quant.quantize(ours, scheme="dynamic").to("cuda"),
              "torch float32": theirs, "torch float16": lambda x: half(x.half())}
    return placed, exact.cuda().double()


def main(arguments=None):
    """Print a line per shape; 1 and the reason where nothing can be run, or an answer is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_encoder", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing per shape (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape after so long")
    options = parser.parse_args(arguments)
    if reason := missing():
        print(f"bench-cuda-encoder: not run, {reason}.", file=sys.stderr)
        return 1
    import torch

    end, wrong = time.monotonic() + options.seconds, 0
    with torch.inference_mode():
        calls, exact = models(torch)
        print(f"whole encoders, {torch.cuda.get_device_name()}; median of {options.rounds} rounds of {CALLS} calls")
        for batch, length in SHAPES:
            if time.monotonic() > end:
                print(f"{options.seconds:.0f} seconds have passed: the other shapes are left out")
                break
            x = torch.randn(batch, length, WIDTH, device="cuda")
            want = exact(x.double())
            for name, call in calls.items():
                error = float((call(x).double() - want).norm() / want.norm())
                if not error <= ALLOWED[name]:
                    wrong += 1
                    print(f"WRONG: {name} is off by {error:.2g}, more than {ALLOWED[name]:.2g}")
            found = {name: [] for name in calls}
            for _ in range(options.rounds):
                for name, call in calls.items():
                    found[name].append(timed(torch, lambda call=call, x=x: call(x), Contender.around))
            print(f"B {batch}, L {length}: " + "; ".join(
                f"{name} {statistics.median(gpu for gpu, _ in times):.0f} us, host "
                f"{statistics.median(host for _, host in times):.0f} us" for name, times in found.items()))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
