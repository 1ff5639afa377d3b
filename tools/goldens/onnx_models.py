"""Write tests/models/golden/NAME/EXPORTER.onnx: golden models as torch's exporters and onnxruntime's tools do.

    python -m venv build/models && build/models/bin/pip install torch transformers onnxscript onnxruntime
    build/models/bin/python tools/goldens/onnx_models.py [NAME ...]

Needs tools/goldens/models.py to have run, whose results the files must give. torchscript14 and 17 are opsets of
torch.onnx.export(dynamo=False), dynamo18 and 23 of dynamo=True, without what it says about its own source; fused is
torchscript14 behind onnxruntime.transformers.optimizer, int8 that behind quantize_dynamic, qdq torchscript17 behind
quantize_static. Made with torch 2.13, transformers 5.24, onnxscript 0.7.2, onnxruntime 1.32.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
import transformers
from onnxruntime import quantization
from onnxruntime.transformers import optimizer

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "models" / "golden"
EXPORTS = {
    "bert": ["torchscript14", "dynamo18", "fused", "int8", "qdq"], "distilbert": ["torchscript17"],
    "roberta": ["torchscript17"], "mpnet": ["torchscript17"],
    "electra": ["dynamo18"], "albert": ["fused"], "gpt2": ["torchscript17"],
    "modernbert": ["dynamo23", "torchscript17"], "vit": ["dynamo18"], "deit": ["torchscript17"]}


class Text(torch.nn.Module):
    """The last hidden state and, for BERT, a mean of tokens that is normalized, as sentence-transformers exports it."""

    def __init__(self, model, pooled):
        super().__init__()
        self.model, self.pooled = model, pooled

    def forward(self, ids, mask):
        """Of (B, L) ids."""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        if not self.pooled:
            return hidden
        wide = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * wide).sum(1) / wide.sum(1).clamp(min=1e-9)
        return hidden, torch.nn.functional.normalize(mean, p=2, dim=1)


class Image(torch.nn.Module):
    """The last hidden state."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        """Of (B, C, height, width) pixels."""
        return self.model(pixel_values=pixels).last_hidden_state


class Once(quantization.CalibrationDataReader):
    """One batch."""

    def __init__(self, inputs):
        self.batches = iter([inputs])

    def get_next(self):
        """The batch, then None."""
        return next(self.batches, None)


def export(name, kind, path):
    """One file."""
    known = np.load(FOLDER / name / "expected.npz")
    model = transformers.AutoModel.from_pretrained(FOLDER / name).eval()
    if "ids" in known:
        inputs = {"input_ids": known["ids"], "attention_mask": known["attention_mask"]}
        module, axes = Text(model, name == "bert"), {0: "batch", 1: "length"}
    else:
        inputs, module, axes = {"pixel_values": known["pixels"]}, Image(model), {0: "batch"}
    arguments = tuple(torch.from_numpy(np.asarray(array, np.int64 if array.dtype.kind in "iub" else np.float32))
                      for array in inputs.values())
    exporter, opset = ("torchscript", 14) if kind in ("fused", "int8") else ("torchscript", 17) if kind == "qdq" else (
        kind[:-2], int(kind[-2:]))
    options = {"input_names": list(inputs), "output_names": ["hidden"], "opset_version": opset}
    if exporter == "torchscript":
        options |= {"dynamo": False, "dynamic_axes": dict.fromkeys(inputs, axes)}
    else:
        options |= {"dynamo": True, "external_data": False, "dynamic_shapes": tuple(
            {i: torch.export.Dim(axis, max=20) for i, axis in axes.items()} for _ in inputs)}
    with torch.no_grad():
        torch.onnx.export(module, arguments, str(path), **options)
    if kind in ("fused", "int8"):
        heads, width = model.config.num_attention_heads, model.config.hidden_size
        optimizer.optimize_model(str(path), "bert", num_heads=heads, hidden_size=width, opt_level=0
                                 ).save_model_to_file(str(path))
    batch = {key: array.numpy() for key, array in zip(inputs, arguments, strict=True)}
    if kind == "int8":
        quantization.quantize_dynamic(path, path, weight_type=quantization.QuantType.QInt8, per_channel=True,
                                      extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
    if kind == "qdq":
        quantization.quantize_static(path, path, Once(batch), per_channel=True)
    found = onnx.load(path)
    del found.graph.value_info[:], found.metadata_props[:]
    for node in found.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    return found.SerializeToString()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for golden in sys.argv[1:] or EXPORTS:
            for exported in EXPORTS[golden]:
                content = export(golden, exported, Path(folder) / "model.onnx")
                (FOLDER / golden / f"{exported}.onnx").write_bytes(content)
                print(golden, exported, len(content), flush=True)
