"""The feed-forward of an encoder block against what else computes it, on one thread: python -m benchmarks.feed_forward

norm(x + w2 gelu(w1 x + b1) + b2) of MiniLM's widths. Beside edgeattn's fused kernels: its kernels of linear layers with
NumPy between, NumPy alone, and onnxruntime and torch where they can be imported (onnx too), each checked before it is
timed. The limits: multiply-adds in registers, of float32 and of bytes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.limits import limits
from benchmarks.timing import interleave
from edgeattn import threads
from edgeattn.kernels.cpu import encoder_dynamic, encoder_float32, projection_dynamic
from edgeattn.kernels.cpu.layer_dynamic import quantize_weight

E, F, EPS = 384, 1536, 1e-12
ROWS = (1, 8, 16, 32, 128)
FLOAT_ERROR, INT8_ERROR = 1e-5, 0.03  # relative, in the mean square: more is another function


def weights() -> dict[str, np.ndarray]:
    """Of one feed-forward, its norm's last."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (F, E), "b1": (F,), "w2": (E, F), "b2": (E,), "weight": (E,), "bias": (E,)}
    return {name: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
            for name, shape in shapes.items()}


def gelu(x: np.ndarray) -> np.ndarray:
    """With erf by Abramowitz and Stegun 7.1.26, as a NumPy user has it."""
    z = np.abs(x) * np.float32(0.70710678)
    t = 1 / (1 + np.float32(0.3275911) * z)
    p = np.float32(1.061405429)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = p * t + np.float32(c)
    return np.float32(0.5) * x * (1 + np.sign(x) * (1 - p * t * np.exp(-z * z)))


def ours(w: dict[str, np.ndarray]) -> dict[str, Callable]:
    """name -> call of x."""
    norm = "layer", w["weight"], w["bias"], EPS
    arguments = w["w1"], w["b1"], w["w2"], w["b2"]
    first, second = (encoder_float32.Linear(*arguments[i:i + 2]).of for i in (0, 2))
    bytes_ = [projection_dynamic.DynamicProjection(*quantize_weight(arguments[i]), arguments[i + 1]) for i in (0, 2)]
    quantize = encoder_dynamic.quantize_linear
    apart = (quantize(w["w1"], columns=range(4)), w["b1"], quantize(w["w2"], columns=range(4), split=4), w["b2"])

    def normed(x: np.ndarray) -> np.ndarray:
        d = x - x.mean(-1, keepdims=True)
        return d / np.sqrt((d * d).mean(-1, keepdims=True) + np.float32(EPS)) * w["weight"] + w["bias"]

    def fused(kernel: Callable) -> Callable:
        return lambda x: kernel(x, x, np.empty_like(x))

    return {
        "float32": fused(encoder_float32.FeedForward(*arguments, norm=norm)),
        "int8": fused(encoder_dynamic.FeedForward(*arguments, norm=norm)),
        "int8, columns apart": fused(encoder_dynamic.FeedForward(*apart, norm=norm)),
        "float32 linear, NumPy": lambda x: normed(x + second(gelu(first(x)))),
        "int8 linear, NumPy": lambda x: normed(x + bytes_[1](gelu(bytes_[0](x)))),
        "float32 NumPy": lambda x: normed(x + gelu(x @ w["w1"].T + w["b1"]) @ w["w2"].T + w["b2"]),
    }


def onnxruntime(w: dict[str, np.ndarray]) -> dict[str, Callable]:
    """As `ours`; nothing where it is not installed."""
    try:
        import onnx
        import onnxruntime as ort
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        return {}
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    stored = [onnx.numpy_helper.from_array(np.ascontiguousarray(w[name].T), name) for name in w]
    nodes = [node("MatMul", ["x", "w1"], ["p1"]), node("Add", ["p1", "b1"], ["h1"]), node("Gelu", ["h1"], ["h"]),
             node("MatMul", ["h", "w2"], ["p2"]), node("Add", ["p2", "b2"], ["h2"]), node("Add", ["h2", "x"], ["s"]),
             node("LayerNormalization", ["s", "weight", "bias"], ["y"], epsilon=EPS)]
    graph = onnx.helper.make_graph(nodes, "feed_forward", [info("x", 1, ["n", E])], [info("y", 1, ["n", E])], stored)
    options, found = ort.SessionOptions(), {}
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        paths = {"float32 onnxruntime": Path(folder) / "f.onnx", "int8 onnxruntime": Path(folder) / "i.onnx"}
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9),
                  paths["float32 onnxruntime"])
        quantize_dynamic(*paths.values(), per_channel=True, weight_type=QuantType.QInt8)
        for name, path in paths.items():
            session = ort.InferenceSession(str(path), options)
            found[name] = lambda x, session=session: session.run(None, {"x": x})[0]
    return found


def torch(w: dict[str, np.ndarray]) -> dict[str, Callable]:
    """As `ours`; nothing where it is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(1)
    model = torch.nn.TransformerEncoderLayer(E, 1, F, layer_norm_eps=EPS)  # of which the feed-forward is called
    with torch.no_grad():
        for parameter, name in ((model.linear1.weight, "w1"), (model.linear1.bias, "b1"), (model.linear2.weight, "w2"),
                                (model.linear2.bias, "b2"), (model.norm2.weight, "weight"), (model.norm2.bias, "bias")):
            parameter.copy_(torch.from_numpy(w[name]))
    int8 = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    def call(layer: torch.nn.Module) -> Callable:
        @torch.inference_mode()
        def run(x: np.ndarray) -> np.ndarray:
            y = torch.from_numpy(x)
            return layer.norm2(y + layer.linear2(torch.nn.functional.gelu(layer.linear1(y)))).numpy()
        return run
    return {"float32 torch": call(model), "int8 torch": call(int8)}


def check(calls: dict[str, Callable], x: np.ndarray) -> None:
    """Raise where a contender computes something else than ours in float32."""
    want = calls["float32"](x)
    for name, call in calls.items():
        error = np.linalg.norm(call(x) - want) / np.linalg.norm(want)
        if not error < (INT8_ERROR if "int8" in name else FLOAT_ERROR):
            raise AssertionError(f"{name} is off by {error:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number of rows")
    options = parser.parse_args()
    threads.set_num_threads(1)
    w = weights()
    calls = {**ours(w), **onnxruntime(w), **torch(w)}
    bounds = {name.split()[0]: limit for name, limit in limits(1).items()}
    for rows in options.rows:
        x = np.random.default_rng(rows).standard_normal((rows, E)).astype(np.float32)
        check(calls, x)
        timed = {name: (lambda call=call: call(x)) for name, call in calls.items()}  # noqa: B023
        times = {name: np.array(found) for name, found in interleave(
            timed | {f"{kind} limit": call for kind, (call, _) in bounds.items()}, seconds=options.seconds).items()}
        rates = {kind: operations / times.pop(f"{kind} limit") for kind, (_, operations) in bounds.items()}
        print(f"{rows} tokens")
        for name, found in times.items():
            kind = "int8" if "int8" in name else "float32"
            share, ratio = np.median(4 * rows * E * F / found / rates[kind]), np.median(found / times[kind])
            print(f"  {name:24s} {np.median(found) * 1e6:8.0f} us, least {found.min() * 1e6:8.0f}, {ratio:5.2f} times "
                  f"ours, {share:4.0%} of the limit", flush=True)


if __name__ == "__main__":
    main()
