"""Whole encoders beside other runtimes, each answer checked before it is timed: python -m benchmarks.models

An encoder of MiniLM's sizes and one of a sensor's, with weights drawn at random by torch.nn.TransformerEncoder, which
gives the answer that the others are held to, too. onnxruntime runs the exported graph, as it is and after its own
quantize_dynamic. Peers are what can be imported; without torch there is nothing to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import edgeattn
import quant
from benchmarks.timing import interleave

FLOAT_ERROR = 1e-4  # the largest difference from torch, of outputs of about 3
INT8_COSINE = 0.98


class Model(NamedTuple):
    """What is timed: (batch, tokens) of each call."""

    layers: int
    heads: int
    width: int
    hidden: int
    shapes: tuple[tuple[int, int], ...]


MODELS = {"MiniLM": Model(6, 12, 384, 1536, ((1, 1), (1, 8), (1, 16), (1, 32), (1, 64), (1, 128), (8, 32))),
          "sensor": Model(2, 4, 64, 256, ((1, 64),))}


def contenders(model: Model, threads: int):
    """(name -> call of x (B, L, E), torch first; the torch module)."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(False)  # what can be exported; the other way is no faster at one text
    layer = torch.nn.TransformerEncoderLayer(model.width, model.heads, model.hidden, dropout=0.0, activation="gelu",
                                             batch_first=True)
    theirs = torch.nn.TransformerEncoder(layer, model.layers, enable_nested_tensor=False).eval()
    state = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    ours = edgeattn.TransformerEncoder.from_torch(state, model.heads, activation="gelu", norm_first=False)

    def by_torch(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return theirs(torch.from_numpy(x)).numpy()

    return {"torch float32": by_torch, "edgeattn float32": ours,
            "edgeattn int8": quant.quantize(ours, scheme="dynamic"),
            "edgeattn int8, attention float32": quant.quantize(ours, scheme="dynamic", attention="float32")}, theirs


def onnxruntime_calls(theirs, x: np.ndarray, folder: Path, threads: int) -> dict[str, Callable]:
    """The same of onnxruntime, for x of this shape: what torch exports knows no other."""
    try:
        import onnx  # noqa: F401 - what exports and quantizes needs it
        import onnxruntime
        import torch
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        return {}
    path, path8 = folder / "float.onnx", folder / "int8.onnx"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(theirs, (torch.from_numpy(x),), str(path), input_names=["x"], output_names=["y"],
                          dynamo=False)
        quantize_dynamic(path, path8, per_channel=True, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    found = {}
    for name, file in (("onnxruntime float32", path), ("onnxruntime int8", path8)):
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        found[name] = lambda x, session=session: session.run(None, {"x": x})[0]
    return found


def check(calls: dict[str, Callable], x: np.ndarray) -> dict[str, float]:
    """The cosine of each answer to torch's; ValueError for a wrong one."""
    exact = calls["torch float32"](x).astype(np.float64)
    cosines = {}
    for name, call in calls.items():
        y = call(x).astype(np.float64)
        cosines[name] = float((y * exact).sum() / np.linalg.norm(y) / np.linalg.norm(exact))
        wrong = cosines[name] < INT8_COSINE if "int8" in name else np.abs(y - exact).max() > FLOAT_ERROR
        if wrong:
            raise ValueError(f"{name} is not this encoder: cosine {cosines[name]:.6f}")
    return cosines


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4, help="for each row (default: 4)")
    options = parser.parse_args()
    edgeattn.set_num_threads(options.threads)
    for title, model in MODELS.items():
        ours, theirs = contenders(model, options.threads)
        print(f"{title}: {model.layers} layers, E {model.width}, F {model.hidden}, {options.threads} thread(s); "
              "ms per call, median of rounds in turn")
        for batch, tokens in model.shapes:
            x = np.random.default_rng(0).standard_normal((batch, tokens, model.width), np.float32)
            with tempfile.TemporaryDirectory() as folder:
                calls = ours | onnxruntime_calls(theirs, x, Path(folder), options.threads)
                cosines = check(calls, x)
                times = interleave({name: lambda call=call, x=x: call(x) for name, call in calls.items()},
                                   seconds=options.seconds, threads=options.threads)
                print(f"  {batch} x {tokens}")
                for name, seconds in times.items():
                    print(f"    {name:34} {1e3 * float(np.median(seconds)):9.3f}   cosine {cosines[name]:.5f}")


if __name__ == "__main__":
    main()
