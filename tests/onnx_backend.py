"""ONNX's Attention and RotaryEmbedding carried out by edgeattn: what each attribute and input means in its terms."""

import numpy as np
import onnx.helper

import edgeattn

# Elements of the tensors that edgeattn takes; bfloat16 is no dtype of NumPy's.
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
# What the fourth output is, by qk_matmul_output_mode: the scores after one of these steps, or what softmax gave.
SCALED, CAPPED, MASKED, PROBABILITIES = range(4)


def unsupported(model):
    """Why edgeattn cannot give every output of a one-node model, or None."""
    kinds = {given.type.tensor_type.elem_type for given in model.graph.input}
    if onnx.TensorProto.BFLOAT16 in kinds:
        return "bfloat16 is refused: NumPy has no such dtype"
    return None


def run(model, inputs):
    """The outputs of a model of one node, in the node's order; None for one that is absent."""
    (node,) = model.graph.node
    given = dict(zip((value.name for value in model.graph.input), inputs, strict=True))
    arguments = [given.get(name) for name in node.input]
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    outputs = {"Attention": attention, "RotaryEmbedding": rotary_embedding}[node.op_type](*arguments, **attributes)
    return [output if name else None for name, output in zip(node.output, outputs, strict=False)]


def attention(
    Q,
    K,
    V,
    attn_mask=None,
    past_key=None,
    past_value=None,
    nonpad_kv_seqlen=None,
    *,
    is_causal=0,
    kv_num_heads=None,
    left_window_size=-1,
    q_num_heads=None,
    qk_matmul_output_mode=0,
    right_window_size=-1,
    scale=None,
    softcap=0.0,
    softmax_precision=None,  # any: float32 throughout, exponentials and sums included
):
    """Attention of opsets 23 to 25: (Y, present_key, present_value, qk_matmul_output)."""
    three_axes = Q.ndim == 3
    if three_axes:
        Q, K, V = (split_heads(x, n) for x, n in ((Q, q_num_heads), (K, kv_num_heads), (V, kv_num_heads)))
    past = 0 if past_key is None else past_key.shape[2]
    if past_key is not None:
        K, V = np.concatenate((past_key, K), axis=2), np.concatenate((past_value, V), axis=2)
    keys = K.shape[2]
    if attn_mask is not None and attn_mask.shape[-1] != keys:
        # "the last dimension can be shorter and will be padded with negative infinity"
        fill = False if attn_mask.dtype == np.bool_ else -np.inf
        widths = [(0, 0)] * (attn_mask.ndim - 1) + [(0, keys - attn_mask.shape[-1])]
        attn_mask = np.pad(attn_mask, widths, constant_values=fill)
    common = dict(
        attn_mask=attn_mask, is_causal=bool(is_causal), scale=scale, softcap=softcap,
        window_size=(left_window_size, right_window_size))

    def attend(**wanted):
        if past_key is None:
            # The first query stands at the first key, or the last one at the last of nonpad_kv_seqlen.
            return edgeattn.scaled_dot_product_attention(
                Q, K, V, **common, **wanted, enable_gqa=Q.shape[1] != K.shape[1], kv_lengths=nonpad_kv_seqlen,
                causal_alignment="upper_left" if nonpad_kv_seqlen is None else "lower_right")
        cache = edgeattn.KVCache(K.shape[0], K.shape[1], keys, K.shape[3], value_dim=V.shape[3])
        cache.append(past_key, past_value)
        cache.append(K[:, :, past:], V[:, :, past:])
        return cache.attend(Q, **common, **wanted, position=past)

    # the probabilities take another kernel than the output alone: both must agree with ONNX
    output, (same, weights) = attend(), attend(return_weights=True)
    np.testing.assert_allclose(output, same, rtol=1e-3, atol=1e-5)
    if three_axes:
        output = output.swapaxes(1, 2).reshape(len(output), output.shape[2], -1)
    if qk_matmul_output_mode == PROBABILITIES:
        return output, K, V, weights
    return output, K, V, scores(Q, K, V, qk_matmul_output_mode, common, nonpad_kv_seqlen, past)


def scores(Q, K, V, mode, common, kv_lengths, past):
    """The scores after the step that `mode` names. No kernel keeps them; probabilities and log-sum-exp hold them:

    weight = exp(score - lse), so score = log(weight) + lse.
    """
    steps = {"scale": common["scale"], "enable_gqa": Q.shape[1] != K.shape[1]}
    if mode >= CAPPED:
        steps["softcap"] = common["softcap"]
    if mode == MASKED:
        steps.update(common, kv_lengths=kv_lengths)
        steps["causal_alignment"] = "upper_left" if kv_lengths is None else "lower_right"
        if past:  # the first query stands behind the past keys: neither alignment
            seen = np.tri(Q.shape[2], K.shape[2], past, bool) | (not common["is_causal"])
            steps.update(is_causal=False, attn_mask=np.where(seen, common["attn_mask"], -np.inf))
    _, weights, lse = edgeattn.scaled_dot_product_attention(Q, K, V, **steps, return_weights=True, return_lse=True)
    with np.errstate(divide="ignore"):  # no weight: a score of -inf
        return (np.log(weights) + lse[..., None]).astype(Q.dtype)


def rotary_embedding(
    X, cos_cache, sin_cache, position_ids=None, *, interleaved=0, num_heads=0, rotary_embedding_dim=0
):
    """RotaryEmbedding of opset 23."""
    x = split_heads(X, num_heads) if X.ndim == 3 else X
    turned = edgeattn.apply_rotary_embedding(
        x,
        cos_cache,
        sin_cache,
        position_ids=position_ids,
        interleaved=bool(interleaved),
        rotary_embedding_dim=rotary_embedding_dim,
    )
    return [turned.swapaxes(1, 2).reshape(X.shape) if X.ndim == 3 else turned]


def split_heads(x, heads):
    """(B, L, H * D) -> (B, H, L, D)"""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
