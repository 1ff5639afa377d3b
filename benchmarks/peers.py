"""The same layer in other libraries, each set up as fast as its interface allows.

Nothing is imported before it is needed. Sessions are warm, constants are packed, inputs lie in the library's own
memory and outputs are left there. Each builder takes a problem and a number of threads and returns a call to be timed
and a way to read the answer.
"""

from __future__ import annotations

import functools

import numpy as np

from quant.export.attention_graph import attention_graph
from quant.export.tflite import serialize, write_tflite

# -- ai-edge-litert and tflite-runtime: the same interface, XNNPACK in both

def _interpreter(make, model, x):
    """Only ``invoke`` is timed: the input is written once, before."""
    interpreter = make(model)
    interpreter.allocate_tensors()
    out, = interpreter.get_output_details()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    return interpreter.invoke, lambda: interpreter.get_tensor(out["index"])


def _litert(threads):
    from ai_edge_litert.interpreter import Interpreter
    return lambda model: Interpreter(model_content=model, num_threads=threads)


def _tflite_runtime(threads):
    from tflite_runtime.interpreter import Interpreter
    return lambda model: Interpreter(model_content=model, num_threads=threads)


def litert_float32(problem, threads):
    """Our float32 export: 1/sqrt(D) in the query projection, so nothing but products and a softmax."""
    return _interpreter(_litert(threads), write_tflite(problem.layer, sequence_length=problem.point.L), problem.x)


def litert_int8(problem, threads):
    """Our int8 export, the fastest form found: keys and values symmetric, no MUL."""
    return _interpreter(_litert(threads), write_tflite(problem.static, sequence_length=problem.point.L), problem.codes)


def litert_int8_usual(problem, threads):
    """What TensorFlow and ai-edge-quantizer write: keys and values with a zero point, MUL by 1/sqrt(D)."""
    return _interpreter(_litert(threads), write_tflite(problem.usual, sequence_length=problem.point.L), problem.codes)


def litert_dynamic(problem, threads):
    """Dynamic range: int8 weights per channel, activations in float32 and quantized on the fly by XNNPACK."""
    graph = attention_graph(problem.layer, batch=1, sequence_length=problem.point.L)
    for i, tensor in enumerate(graph.tensors):
        if tensor.data is not None and tensor.name.endswith("/weight"):
            codes, scale = _int8_rows(tensor.data)
            number = graph.constant(tensor.name, codes, channel_scale=scale)
            graph.tensors[i] = graph.tensors.pop(number)
    return _interpreter(_litert(threads), serialize(graph), problem.x)


def tflite_runtime_float32(problem, threads):
    """The same file as for LiteRT."""
    model = write_tflite(problem.layer, sequence_length=problem.point.L)
    return _interpreter(_tflite_runtime(threads), model, problem.x)


def tflite_runtime_int8(problem, threads):
    """The same file as for LiteRT; it rounds differently."""
    model = write_tflite(problem.static, sequence_length=problem.point.L)
    return _interpreter(_tflite_runtime(threads), model, problem.codes)


def _int8_rows(weight):
    scale = (np.abs(weight).max(1) / 127).astype(np.float32)
    return np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8), scale


# -- onnxruntime

def onnx_session(nodes, inputs, outputs, constants, threads):
    """A session of one graph.

    Parameters
    ----------
    nodes : list of onnx.NodeProto
    inputs, outputs : dict of str to (onnx type, shape)
    constants : dict of str to ndarray
    threads : int
    """
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(onnx_model(nodes, inputs, outputs, constants), options,
                                        providers=["CPUExecutionProvider"])


def onnx_model(nodes, inputs, outputs, constants):
    """The file of that graph."""
    from onnx import helper, numpy_helper
    graph = helper.make_graph(
        nodes, "layer", *([helper.make_tensor_value_info(name, *what) for name, what in side.items()]
                          for side in (inputs, outputs)),
        [numpy_helper.from_array(np.ascontiguousarray(values), name) for name, values in constants.items()])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def _bound(session, x):
    """Input and output bound once: no dictionary, no copy per call."""
    import onnxruntime
    wrap = onnxruntime.OrtValue.ortvalue_from_numpy
    out = wrap(np.zeros_like(x))  # the binding keeps it; a mere address of ours it would not
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", wrap(x))
    binding.bind_ortvalue_output("y", out)
    return lambda: session.run_with_iobinding(binding), lambda: out.numpy()


def _joined(layer):
    """Weights of the three input projections as one (E, 3 E) matrix, and their biases."""
    weight = np.concatenate([layer.q_weight, layer.k_weight, layer.v_weight]).T
    return weight, np.concatenate([layer.q_bias, layer.k_bias, layer.v_bias])


def _float_value(problem):
    from onnx import TensorProto
    return TensorProto.FLOAT, list(problem.x.shape)


def onnxruntime_attention(problem, threads):
    """com.microsoft.Attention in float32, MatMul, Add."""
    from onnx import helper
    weight, bias = _joined(problem.layer)
    nodes = [helper.make_node("Attention", ["x", "w", "b"], ["a"], domain="com.microsoft", num_heads=problem.point.H),
             helper.make_node("MatMul", ["a", "wo"], ["m"]), helper.make_node("Add", ["m", "bo"], ["y"])]
    constants = {"w": weight, "b": bias, "wo": problem.layer.out_weight.T, "bo": problem.layer.out_bias}
    value = _float_value(problem)
    return _bound(onnx_session(nodes, {"x": value}, {"y": value}, constants, threads), problem.x)


def onnxruntime_mha(problem, threads):
    """com.microsoft.MultiHeadAttention after three MatMul: its blocked softmax wins where rows are long."""
    value = _float_value(problem)
    return _bound(onnx_session(mha_nodes(problem.layer), {"x": value}, {"y": value}, mha_constants(problem.layer),
                               threads), problem.x)


def mha_nodes(layer):
    """Its nodes: "x" to "y"."""
    from onnx import helper
    nodes = [helper.make_node("MatMul", ["x", f"w{name}"], [name]) for name in "qkv"]
    return [*nodes,
            helper.make_node("MultiHeadAttention", ["q", "k", "v", "b"], ["a"], domain="com.microsoft",
                             num_heads=layer.num_heads),
            helper.make_node("MatMul", ["a", "wo"], ["m"]), helper.make_node("Add", ["m", "bo"], ["y"])]


def mha_constants(layer):
    """... and what they read of the layer."""
    constants = {"b": _joined(layer)[1], "wo": layer.out_weight.T, "bo": layer.out_bias}
    return constants | {f"w{name}": getattr(layer, f"{name}_weight").T for name in "qkv"}


def onnxruntime_qattention(problem, threads):
    """com.microsoft.QAttention and DynamicQuantizeMatMul: int8 weights, activations quantized on the fly."""
    from onnx import helper
    weight, bias = _joined(problem.layer)
    constants = {"b": bias, "bo": problem.layer.out_bias}
    for name, values in (("w", weight), ("wo", problem.layer.out_weight.T)):
        scale = np.float32(np.abs(values).max() / 127)
        constants |= {name: np.clip(np.rint(values / scale), -127, 127).astype(np.int8), f"{name}_scale": scale,
                      f"{name}_zero": np.int8(0)}
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "x_scale", "x_zero"]),
             helper.make_node("QAttention", ["xq", "w", "b", "x_scale", "w_scale", "", "x_zero", "w_zero"], ["a"],
                              domain="com.microsoft", num_heads=problem.point.H),
             helper.make_node("DynamicQuantizeMatMul", ["a", "wo", "wo_scale", "wo_zero", "bo"], ["y"],
                              domain="com.microsoft")]
    value = _float_value(problem)
    return _bound(onnx_session(nodes, {"x": value}, {"y": value}, constants, threads), problem.x)


# -- PyTorch

@functools.cache
def _inference_mode():
    """Inference mode for good: entering it anew in every call would cost microseconds."""
    import torch
    mode = torch.inference_mode()
    mode.__enter__()
    return mode


def torch_with(threads):
    """The module, set to a number of threads, in inference mode."""
    import torch
    torch.set_num_threads(threads)
    _inference_mode()
    return torch


def torch_module(problem, threads):
    """nn.MultiheadAttention on its fast path: eval, inference mode, no weights asked for."""
    torch = torch_with(threads)
    layer = problem.layer
    module = torch.nn.MultiheadAttention(problem.point.E, problem.point.H, batch_first=True).eval()
    module.requires_grad_(False)
    weight, bias = _joined(layer)
    for parameter, values in ((module.in_proj_weight, weight.T), (module.in_proj_bias, bias),
                              (module.out_proj.weight, layer.out_weight), (module.out_proj.bias, layer.out_bias)):
        parameter.copy_(torch.from_numpy(np.array(values)))
    x, answer = torch.from_numpy(problem.x), []

    def call():
        answer[:] = module(x, x, x, need_weights=False)[:1]

    return call, lambda: answer[0].numpy()


def torch_sdpa(problem, threads):
    """One linear for queries, keys and values, scaled_dot_product_attention, one linear."""
    torch = torch_with(threads)
    linear, attend = torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention
    layer, (E, H, L) = problem.layer, (problem.point.E, problem.point.H, problem.point.L)
    weight, bias = (torch.from_numpy(np.array(a)) for a in _joined(layer))
    weight = weight.T.contiguous()
    out_weight, out_bias = (torch.from_numpy(np.array(a)) for a in (layer.out_weight, layer.out_bias))
    x, answer = torch.from_numpy(problem.x), []

    def call():
        q, k, v = linear(x, weight, bias).view(1, L, 3, H, E // H).permute(2, 0, 3, 1, 4).unbind()
        answer[:] = [linear(attend(q, k, v).transpose(1, 2).reshape(1, L, E), out_weight, out_bias)]

    return call, lambda: answer[0].numpy()
