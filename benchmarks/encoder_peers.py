"""Whole encoders in other runtimes, each as fast as its own tools make it.

A builder takes what is common to all and a number of threads and gives {name: call}; a call takes (x, mask), ids or
features (B, L, ...) and int64 (B, L), and returns (B, L, E). It raises ImportError or RuntimeError where it cannot be
had, which is printed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Call = Callable[[np.ndarray, np.ndarray], np.ndarray]
SAMPLES = 60  # sentences or recordings that nncf.quantize sees
# What is converted for LiteRT, each shape by itself in some 20 s.
LITERT_SHAPES = ((1, 32), (1, 64), (1, 128))


class Common(NamedTuple):
    """What peers are made of: the float model, its torch module, an exported graph, examples of inputs."""

    model: Any
    module: Any
    graph: Path
    samples: list[np.ndarray]  # (1, L, ...)
    folder: Path

    @property
    def encoder(self) -> Any:
        """The TransformerEncoder."""
        return getattr(self.model, "encoder", self.model)


def torch_calls(common: Common, threads: int) -> dict[str, Call]:
    """The torch module itself."""
    import torch

    torch.set_num_threads(threads)

    def call(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return common.module(torch.from_numpy(x), torch.from_numpy(mask)).numpy()

    return {"torch float32": call}


def onnxruntime_calls(common: Common, threads: int) -> dict[str, Call]:
    """The graph with attention, GELU and norms fused by its optimizer; that after quantize_dynamic, per channel."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    found: dict[str, Call] = {}
    for name, path in _onnxruntime_files(common).items():
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found[name] = lambda x, mask, session=session: session.run(None, {"x": x, "mask": mask})[0]
    return found


def _onnxruntime_files(common: Common) -> dict[str, Path]:
    fused, path8 = common.graph.with_suffix(".fused.onnx"), common.graph.with_suffix(".int8.onnx")
    if not path8.exists():
        with quiet():
            import onnx
            from onnxruntime.quantization import QuantType, quantize_dynamic
            from onnxruntime.transformers import optimizer

            heads, width = common.encoder.layers[0].attention.num_heads, common.encoder.embed_dim
            made = optimizer.optimize_model(str(common.graph), "bert", num_heads=heads, hidden_size=width, opt_level=0)
            made.save_model_to_file(str(fused))
            quantize_dynamic(fused, path8, per_channel=True, weight_type=QuantType.QInt8,
                             extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})  # of its own operators
    return {"onnxruntime float32": fused, "onnxruntime int8": path8}


def openvino_calls(common: Common, threads: int) -> dict[str, Call]:
    """The graph compiled for each shape that comes; that after nncf.quantize with its preset for transformers."""
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    files = {"OpenVINO float32": common.graph}
    with contextlib.suppress(ImportError):  # it can be had without nncf
        files["OpenVINO int8"] = _openvino_int8(common.graph, common.samples)
    return {name: _by_shape(core, path, options) for name, path in files.items()}


def _by_shape(core: Any, path: Path, options: dict[str, Any]) -> Call:
    @functools.cache
    def request(shape: tuple[int, ...]) -> Any:
        model = core.read_model(path)
        model.reshape({"x": list(shape), "mask": list(shape[:2])})
        return core.compile_model(model, "CPU", options).create_infer_request()

    def call(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        made = request(x.shape)
        made.infer({"x": x, "mask": mask}, share_inputs=True)
        return made.get_output_tensor().data

    return call


def _openvino_int8(graph: Path, samples: list[np.ndarray]) -> Path:
    path = graph.with_suffix(".int8.xml")
    if not path.exists():
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        data = nncf.Dataset([{"x": x, "mask": np.ones(x.shape[:2], np.int64)} for x in samples])
        with quiet():
            model = nncf.quantize(openvino.Core().read_model(graph), data, subset_size=len(samples),
                                  model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.MIXED)
        openvino.save_model(model, path, compress_to_fp16=False)
    return path


def ctranslate2_calls(common: Common, threads: int) -> dict[str, Call]:
    """Its encoder, for a text model alone: it has no other input than ids."""
    import ctranslate2

    if not hasattr(common.model, "embedding"):
        raise RuntimeError("it reads ids of tokens alone")
    found: dict[str, Call] = {}
    for name in ("float32", "int8"):
        path = common.folder / f"ctranslate2-{name}"
        if not path.exists():
            _ctranslate2_model(common.model, path, name)
        encoder = ctranslate2.Encoder(str(path), compute_type=name, intra_threads=threads, inter_threads=1)

        def call(x: np.ndarray, mask: np.ndarray, encoder: Any = encoder) -> np.ndarray:
            view = ctranslate2.StorageView.from_array
            lengths = view(mask.sum(axis=1, dtype=np.int32))
            hidden = encoder.forward_batch(view(x.astype(np.int32)), lengths).last_hidden_state
            return np.asarray(hidden)

        found[f"CTranslate2 {name}"] = call
    return found


def _ctranslate2_model(model: Any, path: Path, compute_type: str) -> None:
    """Write what its converters of transformers' models write."""
    from ctranslate2.specs import common_spec, transformer_spec

    embedding, layers = model.embedding, model.encoder.layers
    encoder = transformer_spec.TransformerEncoderSpec(
        len(layers), layers[0].attention.num_heads, pre_norm=False, activation=common_spec.Activation.GELU,
        layernorm_embedding=True, num_source_embeddings=2, embeddings_merge=common_spec.EmbeddingsMerge.ADD)
    spec = transformer_spec.TransformerEncoderModelSpec(encoder)
    encoder.scale_embeddings = False
    tables = embedding.token_weight.copy(), embedding.type_weight.copy()  # it writes to what it quantizes
    encoder.embeddings[0].weight, encoder.embeddings[1].weight = tables
    encoder.position_encodings.encodings = embedding.position_weight.copy()

    def fill_norm(to: Any, norm: Any) -> None:
        to.gamma, to.beta = norm.weight.copy(), norm.bias.copy()

    def fill(to: Any, weights: list[np.ndarray], biases: list[np.ndarray]) -> None:
        to.weight, to.bias = np.concatenate(weights), np.concatenate(biases)

    fill_norm(encoder.layernorm_embedding, embedding.norm)
    for to, layer in zip(encoder.layer, layers, strict=True):
        a, f = layer.attention, layer.feed_forward
        fill(to.self_attention.linear[0], [a.q_weight, a.k_weight, a.v_weight], [a.q_bias, a.k_bias, a.v_bias])
        fill(to.self_attention.linear[1], [a.out_weight], [a.out_bias])
        fill_norm(to.self_attention.layer_norm, layer.norm1)
        fill(to.ffn.linear_0, [f.linear1.weight], [f.linear1.bias])
        fill(to.ffn.linear_1, [f.linear2.weight], [f.linear2.bias])
        fill_norm(to.ffn.layer_norm, layer.norm2)
    spec.register_vocabulary([f"[{i}]" for i in range(len(embedding.token_weight))])
    spec.config.layer_norm_epsilon = layers[0].norm1.eps
    spec.config.unk_token = "[0]"
    spec.validate()
    spec.optimize(quantization=compute_type)
    path.mkdir()
    spec.save(str(path))


def litert_calls(common: Common, threads: int) -> dict[str, Call]:
    """What litert-torch makes of the module for one of LITERT_SHAPES; that with int8 weights, dynamic range."""
    import ai_edge_litert.interpreter  # noqa: F401 - told to be missing before anything is converted

    with quiet():
        import ai_edge_quantizer  # noqa: F401
        import litert_torch  # noqa: F401
    return {f"LiteRT {kind}": _litert_by_shape(common, kind, threads) for kind in ("float32", "int8")}


def _litert_by_shape(common: Common, kind: str, threads: int) -> Call:
    from ai_edge_litert.interpreter import Interpreter

    @functools.cache
    def interpreter(shape: tuple[int, ...], dtype: np.dtype) -> Any:
        made = Interpreter(str(_litert_file(common, shape, dtype, kind)), num_threads=threads)
        made.allocate_tensors()
        return made, *(each["index"] for each in made.get_input_details()), made.get_output_details()[0]["index"]

    def call(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        x = x.astype(np.int32) if x.dtype.kind == "i" else x
        made, at_x, at_mask, at_y = interpreter(x.shape, x.dtype)
        made.set_tensor(at_x, x)
        made.set_tensor(at_mask, mask.astype(np.int32))
        made.invoke()
        return made.get_tensor(at_y)

    return call


def _litert_file(common: Common, shape: tuple[int, ...], dtype: np.dtype, kind: str) -> Path:
    name = "x".join(map(str, shape))
    plain, int8 = (common.folder / f"{name}.{each}.tflite" for each in ("float32", "int8"))
    with quiet():
        import ai_edge_quantizer
        import litert_torch
        import torch

        if not plain.exists():
            given = torch.from_numpy(np.zeros(shape, dtype)), torch.ones(shape[:2], dtype=torch.int32)
            with common.module.unfused():
                litert_torch.convert(common.module, given).export(str(plain))
        if kind == "int8" and not int8.exists():
            quantizer = ai_edge_quantizer.Quantizer(str(plain), ai_edge_quantizer.recipe.dynamic_wi8_afp32())
            quantizer.quantize().export_model(str(int8), overwrite=True)
    return int8 if kind == "int8" else plain


BUILDERS = {"torch": torch_calls, "onnxruntime": onnxruntime_calls, "OpenVINO": openvino_calls,
            "CTranslate2": ctranslate2_calls, "LiteRT": litert_calls}


@contextlib.contextmanager
def quiet() -> Any:
    """What tools print while they convert is kept back, also what their C++ prints; it comes with an error."""
    disabled, told = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        with contextlib.redirect_stdout(told):
            yield
    except Exception:
        print(told.getvalue()[-2000:])
        raise
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
        logging.disable(disabled)
