"""Write tests/files/golden: attention of TensorFlow's converter and Google's quantizer, and what LiteRT makes of it.

    python -m venv build/goldens && build/goldens/bin/pip install tensorflow-cpu==2.21.0 ai-edge-quantizer==0.10.0
    build/goldens/bin/python tools/goldens/make.py

Needs nothing of this project. Weights and data are random and seeded: the files come out the same, byte for byte.
"""

import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_quantizer import quantizer, recipe

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "files" / "golden"
L, S, E, H, D, DV = 6, 5, 12, 2, 4, 3
SHAPES = {"query": (1, L, E), "key": (1, S, E), "value": (1, S, E)}
RUNTIMES = {"litert": OpResolverType.AUTO, "litert-reference": OpResolverType.BUILTIN_REF}


def models():
    """{name: model}, of one input or of three, with weights by seed."""
    query, key, value = (keras.Input(shape[1:], batch_size=1, name=name) for name, shape in SHAPES.items())
    attention = keras.layers.MultiHeadAttention
    made = {
        "self": keras.Model(query, attention(H, D)(query, query)),
        "cross": keras.Model([query, key, value], attention(H, D, value_dim=DV)(query, value, key)),
        "causal": keras.Model(query, attention(H, D)(query, query, use_causal_mask=True)),
    }
    for model in made.values():
        random = np.random.default_rng(3)
        model.set_weights([random.normal(0, 0.5, w.shape).astype(np.float32) for w in model.get_weights()])
    return made


def samples(model):
    """Calibration data, by the names of the model's inputs."""
    random = np.random.default_rng(5)
    for _ in range(64):
        yield {x.name: random.standard_normal(SHAPES[x.name]).astype(np.float32) for x in model.inputs}


def converted(model):
    """The .tflite of TensorFlow's converter, int8 throughout."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: samples(model)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


def quantized(model):
    """The float .tflite of TensorFlow's converter, made int8 by ai-edge-quantizer."""
    tool = quantizer.Quantizer(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    tool.load_quantization_recipe(recipe.static_wi8_ai8())
    ranges = tool.calibrate({"serving_default": list(samples(model))})
    return bytes(tool.quantize(ranges).quantized_model)


def run(content, resolver, inputs):
    """One output of a .tflite, from inputs by name."""
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    for details in interpreter.get_input_details():
        name = details["name"].removeprefix("serving_default_").split(":")[0]
        interpreter.set_tensor(details["index"], inputs[name])
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def main():
    """Write the files and one archive of inputs and outputs."""
    FOLDER.mkdir(exist_ok=True)
    made = models()
    files = {f"keras_{name}": converted(model) for name, model in made.items()}
    files |= {f"quantizer_{name}": quantized(made[name]) for name in ("self", "cross")}
    random, arrays = np.random.default_rng(11), {}
    for name, content in files.items():
        (FOLDER / f"{name}.tflite").write_bytes(content)
        inputs = {k: random.integers(-128, 128, shape).astype(np.int8) for k, shape in SHAPES.items()}
        given = inputs if name.endswith("cross") else {"query": inputs["query"]}
        arrays |= {f"{name}.{k}": x for k, x in given.items()}
        arrays |= {f"{name}.{r}": run(content, resolver, inputs) for r, resolver in RUNTIMES.items()}
    np.savez_compressed(FOLDER / "litert.npz", **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
