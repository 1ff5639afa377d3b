"""What a float attention layer holds: checked weights, and where they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import count, default_scale, flag, float_array, is_constant, to_float32
from edgeattn.files import checkpoints
from edgeattn.files.paths import listed, named
from edgeattn.hints import hinted
from edgeattn.layers.norm import norm_of
from edgeattn.layers.positions import POSITIONS, Positions
from edgeattn.layers.saveable import Saveable
from edgeattn.layers.sizes import Sizes
from edgeattn.layers.state import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, SupportsIndex

    from numpy.typing import ArrayLike
    from typing_extensions import Self

    from edgeattn.layers.norm import LayerNorm, RMSNorm
    from edgeattn.layers.positions import PositionBias
    from edgeattn.rotary import RotaryEmbedding
    from edgeattn.types import Flag, Float32s, OnnxModel, Path

TENSORS = (
    "q_weight", "k_weight", "v_weight", "out_weight", "gate_weight",
    "q_bias", "k_bias", "v_bias", "out_bias", "gate_bias")
KEY_TENSORS = ("bias_k", "bias_v")  # of a key that is no token, where a layer has one


class AttentionWeights(Positions, Sizes, Saveable):
    """Weights, numbers of heads and sizes of a float layer; parameters and attributes as `MultiHeadAttention`'s."""

    def __init__(
        self,
        num_heads: SupportsIndex,
        q_weight: ArrayLike | None = None,
        k_weight: ArrayLike | None = None,
        v_weight: ArrayLike | None = None,
        out_weight: ArrayLike | None = None,
        *,
        q_bias: ArrayLike | None = None,
        k_bias: ArrayLike | None = None,
        v_bias: ArrayLike | None = None,
        out_bias: ArrayLike | None = None,
        num_kv_heads: SupportsIndex | None = None,
        bias_k: ArrayLike | None = None,
        bias_v: ArrayLike | None = None,
        add_zero_attn: Flag = False,
        gate_weight: ArrayLike | None = None,
        gate_bias: ArrayLike | None = None,
        rotary: RotaryEmbedding | None = None,
        q_norm: LayerNorm | RMSNorm | None = None,
        k_norm: LayerNorm | RMSNorm | None = None,
        position_bias: ArrayLike | PositionBias | None = None,
    ):
        q_weight, k_weight, v_weight = check_weights(
            type(self), q_weight=q_weight, k_weight=k_weight, v_weight=v_weight)
        self.num_heads = count("num_heads", num_heads)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else count("num_kv_heads", num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        self.q_weight = _parameter("q_weight", q_weight, 2)
        self.k_weight = _parameter("k_weight", k_weight, 2)
        self.v_weight = _parameter("v_weight", v_weight, 2)
        self.out_weight = _optional("out_weight", out_weight, 2)
        self.q_bias = _optional("q_bias", q_bias, 1)
        self.k_bias = _optional("k_bias", k_bias, 1)
        self.v_bias = _optional("v_bias", v_bias, 1)
        self.out_bias = _optional("out_bias", out_bias, 1)
        self.gate_weight = _optional("gate_weight", gate_weight, 2)
        self.gate_bias = _optional("gate_bias", gate_bias, 1)

        self.head_dim = _split("q_weight", self.q_weight, "num_heads", self.num_heads)
        self.value_dim = _split("v_weight", self.v_weight, "num_kv_heads", self.num_kv_heads)
        self.embed_dim, self.kdim, self.vdim = (
            weight.shape[1] for weight in (self.q_weight, self.k_weight, self.v_weight)
        )
        self.scale = default_scale(self.head_dim)
        if self.k_weight.shape[0] != self.num_kv_heads * self.head_dim:
            raise ValueError(
                f"k_weight must have Hkv * D = {self.num_kv_heads} * {self.head_dim} rows, D from q_weight "
                f"{self.q_weight.shape}, got {self.k_weight.shape}; pass num_kv_heads if heads share keys"
            )
        context_dim = self.num_heads * self.value_dim
        if self.out_weight is not None and self.out_weight.shape[1] != context_dim:
            raise ValueError(
                f"out_weight must have H * Dv = {context_dim} columns, got shape {self.out_weight.shape}"
            )
        if self.out_weight is None and self.out_bias is not None:
            raise ValueError(
                "out_bias needs out_weight, got out_weight=None; pass numpy.eye to add a bias alone"
            )
        if self.gate_weight is None and self.gate_bias is not None:
            raise ValueError("gate_bias needs gate_weight, got gate_weight=None")
        if self.gate_weight is not None and self.gate_weight.shape != (context_dim, self.embed_dim):
            raise ValueError(
                f"gate_weight must have shape (H * Dv, E) = {(context_dim, self.embed_dim)}, got "
                f"{self.gate_weight.shape}"
            )
        self.gated = self.gate_weight is not None
        self.output_dim = context_dim if self.out_weight is None else self.out_weight.shape[0]
        for name in ("q", "k", "v", "out", "gate"):
            weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
            if bias is not None and bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"{name}_bias must have shape {weight.shape[:1]}, one per row of {name}_weight "
                    f"{weight.shape}, got {bias.shape}"
                )
        self.bias_k, self.bias_v, self.add_zero_attn, self.extra_keys = added_keys(
            bias_k, bias_v, add_zero_attn, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.value_dim)
        self._set_positions(self.num_heads, self.head_dim, rotary, q_norm, k_norm, position_bias)

    @classmethod
    def from_torch(cls, state_dict_or_path: Mapping[str, ArrayLike] | Path, num_heads: SupportsIndex, prefix: str = "",
                   *, add_zero_attn: Flag = False) -> Self:
        """The layer that torch.nn.MultiheadAttention stored; see `checkpoints.torch_weights`.

        Masks of this layer mean True = attend, the inverse of torch.nn.MultiheadAttention. Inputs are (B, L, E)
        whatever batch_first was.

        Parameters
        ----------
        state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
            A .pt, .pth, .bin or .ckpt file is read by torch.load(weights_only=True), which needs torch.
        num_heads : int
        prefix : str
            What stands before "in_proj_weight", such as "encoder.layers.0.self_attn.".
        add_zero_attn : bool
            What the layer was made with, which its state dict does not say.

        Returns
        -------
        layer of this class
            With the weights in float32.

        Raises
        ------
        OSError
            Where the file cannot be read.
        TypeError, ValueError
            Naming the argument, the file or the tensor, what was expected and what came.
        ImportError
            Naming the package that reads such a file, and how to install it.
        """
        with named(state_dict_or_path):
            weights = checkpoints.torch_weights(state_dict_or_path, num_heads, prefix)
            return cls._build(num_heads, {**weights, "add_zero_attn": add_zero_attn})

    @classmethod
    def from_bert(
        cls, state_dict_or_path: Mapping[str, ArrayLike] | Path, prefix: str, num_heads: SupportsIndex
    ) -> Self:
        """The attention of one BERT layer; see `checkpoints.bert_weights`.

        The residual connection and output.LayerNorm, which BERT also calls attention, are not part of it. The
        attention_mask of BERT models, 1 = a real token, is key_padding_mask=attention_mask != 0.

        Parameters
        ----------
        state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
        prefix : str
            What stands before "self.query.weight", such as "encoder.layer.0.attention.".
        num_heads : int

        Returns
        -------
        layer of this class
            With the weights in float32.

        Raises
        ------
        OSError
            Where the file cannot be read.
        TypeError, ValueError
            Naming the argument, the file or the tensor, what was expected and what came.
        ImportError
            Naming the package that reads such a file, and how to install it.
        """
        with named(state_dict_or_path):
            return cls._build(num_heads, checkpoints.bert_weights(state_dict_or_path, prefix, num_heads))

    @classmethod
    def from_checkpoint(
        cls, state_dict_or_path: Mapping[str, ArrayLike] | Path, prefix: str, num_heads: SupportsIndex
    ) -> Self:
        """The attention under a prefix, named as by torch, BERT, ViT, CLIP, Whisper, T5, Llama, GPT-2, timm and others.

        Heads that share keys are known by the keys' width. What the family does to positions is told by a warning.

        Parameters
        ----------
        state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
        prefix : str
            What stands before the names of one attention layer; where it fits several an error lists them.
        num_heads : int

        Returns
        -------
        layer of this class
            With the weights in float32.

        Raises
        ------
        OSError
            Where the file cannot be read.
        TypeError, ValueError
            Naming the argument, the file or the tensor, what was expected and what came.
        ImportError
            Naming the package that reads such a file, and how to install it.
        """
        with named(state_dict_or_path):
            num_kv_heads, weights = checkpoints.checkpoint_weights(state_dict_or_path, prefix, num_heads)
            return cls._build(num_heads, weights, num_kv_heads)

    @classmethod
    def from_gpt2(
        cls, state_dict_or_path: Mapping[str, ArrayLike] | Path, prefix: str, num_heads: SupportsIndex
    ) -> Self:
        """The attention of one GPT-2 layer; see `checkpoints.gpt2_weights`.

        GPT-2 is causal: call the layer with is_causal=True. Its attention_mask, 1 = a real token, is
        key_padding_mask=attention_mask != 0. The scale is 1 / sqrt(D): models whose configuration asks for another
        (scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True) do not say so in their weights.

        Parameters
        ----------
        state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
        prefix : str
            What stands before "c_attn.weight", such as "transformer.h.0.attn.".
        num_heads : int

        Returns
        -------
        layer of this class
            With the weights in float32.

        Raises
        ------
        OSError
            Where the file cannot be read.
        TypeError, ValueError
            Naming the argument, the file or the tensor, what was expected and what came.
        ImportError
            Naming the package that reads such a file, and how to install it.
        """
        with named(state_dict_or_path):
            return cls._build(num_heads, checkpoints.gpt2_weights(state_dict_or_path, prefix, num_heads))

    @classmethod
    def from_keras(
        cls, weights_or_path: Path | Mapping[str, ArrayLike] | Sequence[ArrayLike], layer: str | None = None
    ) -> Self:
        """A MultiHeadAttention or GroupQueryAttention of Keras; see `checkpoints.keras_weights`.

        Masks mean True = attend in both. Keras is called (query, value, key), this layer (query, key, value).
        use_causal_mask=True is is_causal=True, with causal_alignment="upper_left" where L != S. A query with no
        permitted key gives zeros here, in Keras the mean of all values.

        Parameters
        ----------
        weights_or_path : path, mapping of str to array, or sequence of arrays
            A .keras, .weights.h5, .h5 (these need h5py), .npz or .safetensors file, variables by their paths, or
            layer.get_weights(). Numbers of heads are in the shapes of the kernels.
        layer : str, optional
            The layer's name or its path in the file; not needed where there is one attention layer.

        Returns
        -------
        layer of this class
            With the weights in float32.

        Raises
        ------
        OSError
            Where the file cannot be read.
        TypeError, ValueError
            Naming the argument, the file or the tensor, what was expected and what came.
        ImportError
            Naming the package that reads such a file, and how to install it.
        """
        with named(weights_or_path):
            num_heads, num_kv_heads, weights = checkpoints.keras_weights(weights_or_path, layer)
            return cls._build(num_heads, weights, num_kv_heads)

    @classmethod
    @hinted
    def from_onnx(cls, path_or_model: Path | OnnxModel, node: str | SupportsIndex | None = None) -> Self:
        """The layer around an attention node of an ONNX model; see `checkpoints.onnx_weights`.

        Bool masks mean True = attend in both. What the graph says of masks (is_causal, unidirectional, a window, what
        is added to scores) is told by a warning, and is to be given with each call. Constant biases become the
        layer's `position_bias`, turned queries and keys its `rotary`; int8 weights times their scales the float
        weights. Inputs are (B, L, E), those of the projections before the node.

        Parameters
        ----------
        path_or_model : path or onnx.ModelProto
            Needs the onnx package.
        node : str or int, optional
            Name of a Softmax between two products, of Attention (opsets 23 to 25, com.microsoft), or of QAttention,
            MultiHeadAttention or GroupQueryAttention (com.microsoft); or its index among these. Not needed where
            there is one.

        Returns
        -------
        layer of this class
            With the weights in float32.

        Raises
        ------
        OSError
            Where the file cannot be read.
        TypeError, ValueError
            Naming the argument, the file or the tensor, what was expected and what came.
        ImportError
            Naming the package that reads such a file, and how to install it.
        """
        with named(path_or_model):
            return cls.from_found(*checkpoints.onnx_weights(path_or_model, node))

    @classmethod
    def from_found(cls, num_heads: int, num_kv_heads: int, found: Mapping[str, Any]) -> Self:
        """The layer of what a reader found.

        A rotary embedding is (features turned, base, interleaved), norms are what `norm_of` takes.
        """
        weights = dict(found)
        for part in ("q_norm", "k_norm"):
            if weights.get(part):
                weights[part] = norm_of(weights[part])
        if (turned := weights.get("rotary")) is not None:
            from edgeattn.rotary import RotaryEmbedding

            weights["rotary"] = RotaryEmbedding(turned[0], base=turned[1], interleaved=turned[2])
        return cls._build(num_heads, weights, num_kv_heads)

    @classmethod
    def _build(cls, num_heads: SupportsIndex, weights: Mapping[str, Any],
               num_kv_heads: SupportsIndex | None = None) -> Self:
        return cls(num_heads, **weights, num_kv_heads=num_kv_heads)

    def to_state(self) -> tuple[dict[str, Any], dict[str, Float32s]]:
        """(config, tensors): all that `from_state` needs to build an equal layer."""
        tensors = {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}
        config, added = added_keys_state(self)
        tensors |= added
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, **config,
                **positions_state(self, tensors)}, tensors

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, ArrayLike]) -> Self:
        """The layer of which `to_state` gave these."""
        tensors = dict(tensors)
        positions = positions_of(config, tensors)
        unexpected = sorted(set(tensors) - set(TENSORS + KEY_TENSORS))
        missing = sorted({"q_weight", "k_weight", "v_weight"} - set(tensors))
        if missing or unexpected:
            raise ValueError(f"missing tensors {missing}, unexpected tensors [{listed(map(repr, unexpected))}]")
        arguments = {**tensors, "add_zero_attn": config.get("add_zero_attn", False), **positions}
        return cls._build(config["num_heads"], arguments, config["num_kv_heads"])


# The only class that is made so: what Python's own errors call it, of the function that `hinted` calls, too.
_init: Any = AttentionWeights.__init__
_init.__qualname__ = getattr(_init, "__wrapped__", _init).__qualname__ = "MultiHeadAttention.__init__"


def check_weights(kind: type, **weights: ArrayLike | None) -> list[ArrayLike]:
    """The weights; raise where a layer is made without its weights, as layers are that learn theirs."""
    missing = [name for name, weight in weights.items() if weight is None]
    if missing:
        first = "" if kind.__name__ == "SelfAttention" else "num_heads, "
        raise TypeError(
            f"{' and '.join(missing)} must be given: {kind.__name__}({first}q_weight, k_weight, v_weight, out_weight, "
            "q_bias=..., ...) is made of trained weights, arrays (outputs, inputs); from_torch, from_bert, from_gpt2, "
            "from_keras and from_onnx read them from what trained them")
    return [weight for weight in weights.values() if weight is not None]


def added_keys(bias_k: ArrayLike | None, bias_v: ArrayLike | None, add_zero_attn: Flag, key_size: int, value_size: int
               ) -> tuple[Float32s | None, Float32s | None, bool, int]:
    """(bias_k, bias_v, add_zero_attn, extra_keys), checked: the keys that a layer adds to those of its tokens."""
    keys, values = _key_tensor("bias_k", bias_k, key_size), _key_tensor("bias_v", bias_v, value_size)
    if (keys is None) != (values is None):
        given, missing = ("bias_k", "bias_v") if values is None else ("bias_v", "bias_k")
        raise ValueError(f"{missing} must be given with {given}: the added key needs a value, got None")
    zero = flag("add_zero_attn", add_zero_attn)
    return keys, values, zero, (keys is not None) + zero


def added_keys_state(layer: Any) -> tuple[dict[str, bool], dict[str, Float32s]]:
    """(config, tensors) of the added keys, empty for a layer without."""
    tensors = {name: getattr(layer, name) for name in KEY_TENSORS if getattr(layer, name) is not None}
    return {"add_zero_attn": True} if layer.add_zero_attn else {}, tensors


def positions_state(layer: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Config of `rotary`, `q_norm`, `k_norm` and `position_bias`, where there are any; their arrays go to `tensors`."""
    return {name: pack(part, name, tensors) for name in POSITIONS if (part := getattr(layer, name)) is not None}


def positions_of(config: Mapping[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `positions_state`: arguments; their arrays are taken out of `tensors`."""
    return {name: unpack(config[name], tensors) for name in POSITIONS if name in config}


def _key_tensor(name: str, value: ArrayLike | None, size: int) -> Float32s | None:
    """An owned, read-only float32 (size,) of `bias_k` or `bias_v`, or None."""
    if value is None:
        return None
    array = float_array(name, value)
    if array.shape not in ((size,), (1, 1, size)):
        raise ValueError(
            f"{name} must have shape {(size,)} or {(1, 1, size)}, Hkv heads side by side, got {array.shape}")
    array = np.array(to_float32(array)).reshape(size)
    array.flags.writeable = False
    return array


def _optional(name: str, value: ArrayLike | None, axes: int) -> Float32s | None:
    """`_parameter` of what may be left out."""
    return None if value is None else _parameter(name, value, axes)


def _parameter(name: str, value: ArrayLike, axes: int) -> Float32s:
    """An owned, read-only float32 copy of a weight or bias; what is constant is kept."""
    array = float_array(name, value)
    if array.ndim != axes:
        wanted = "(outputs, inputs)" if axes == 2 else "(outputs,)"
        raise ValueError(f"{name} must be {wanted}, got shape {array.shape}")
    if array.dtype != np.float32 or not is_constant(array):
        array = np.array(to_float32(array))
        array.flags.writeable = False
    return array


def _split(name: str, weight: Float32s, heads_name: str, heads: int) -> int:
    """Size of one head."""
    if weight.shape[0] % heads:
        raise ValueError(
            f"{name} must have rows for {heads_name} = {heads} heads of equal size, got shape {weight.shape}"
        )
    return int(weight.shape[0] // heads)
