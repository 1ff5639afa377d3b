"""Attention weights of other libraries, as arguments for `edgeattn.MultiHeadAttention`."""

import collections.abc

import numpy as np

from edgeattn.checks import count, float_array
from edgeattn.storage import read_tensors

# Part of what BERT calls attention, but after it.
_BERT_NORM = (
    "output.LayerNorm.weight",
    "output.LayerNorm.bias",
    "output.LayerNorm.gamma",
    "output.LayerNorm.beta",
)


def torch_weights(state_dict_or_path, num_heads, prefix=""):
    """Weights of a torch.nn.MultiheadAttention.

    in_proj_weight holds the rows of Q, K and V one after the other; where kdim or vdim differ from E there
    are q_proj_weight, k_proj_weight and v_proj_weight instead, still with one in_proj_bias.

    Parameters
    ----------
    state_dict_or_path : mapping of str to array, or path of a .safetensors or .npz file
    num_heads : int
    prefix : str
        What stands before these names.

    Returns
    -------
    dict of str to array
        q_weight, k_weight, v_weight, out_weight, and the biases where there are any.

    Raises
    ------
    ValueError
        Listing all missing, unexpected and mis-shaped tensors.
    """
    tensors = _Tensors(state_dict_or_path, prefix, "in_proj_weight", "q_proj_weight")
    for name in ("bias_k", "bias_v"):
        if name in tensors.found:
            raise ValueError(
                f"{tensors.source} has {prefix}{name}: layers made with add_bias_kv=True "
                "are not supported yet"
            )
    packed = "in_proj_weight" in tensors.found or "q_proj_weight" not in tensors.found
    embed = tensors.axis("in_proj_weight" if packed else "q_proj_weight", 1)
    if packed:
        tensors.expect("in_proj_weight", (_times(3, embed), embed))
    else:
        tensors.expect("q_proj_weight", (embed, embed))
        tensors.expect("k_proj_weight", (embed, tensors.axis("k_proj_weight", 1)))
        tensors.expect("v_proj_weight", (embed, tensors.axis("v_proj_weight", 1)))
    tensors.expect("out_proj.weight", (embed, embed))
    biased = "in_proj_bias" in tensors.found or "out_proj.bias" in tensors.found
    if biased:
        tensors.expect("in_proj_bias", (_times(3, embed),))
        tensors.expect("out_proj.bias", (embed,))
    found = tensors.checked()
    _check_heads(num_heads, embed)

    if packed:
        q_weight, k_weight, v_weight = np.split(found["in_proj_weight"], 3)
    else:
        q_weight, k_weight, v_weight = (found[f"{letter}_proj_weight"] for letter in "qkv")
    weights = {
        "q_weight": q_weight,
        "k_weight": k_weight,
        "v_weight": v_weight,
        "out_weight": found["out_proj.weight"],
    }
    if biased:
        weights["q_bias"], weights["k_bias"], weights["v_bias"] = np.split(found["in_proj_bias"], 3)
        weights["out_bias"] = found["out_proj.bias"]
    return weights


def bert_weights(state_dict_or_path, prefix, num_heads):
    """Weights of the attention in one layer of a BERT model as the transformers library names them.

    Parameters
    ----------
    state_dict_or_path : mapping of str to array, or path of a .safetensors or .npz file
    prefix : str
        What stands before "self.query.weight".
    num_heads : int

    Returns
    -------
    dict of str to array
        q_weight, k_weight, v_weight, out_weight and the biases. output.LayerNorm is left where it is.

    Raises
    ------
    ValueError
        Listing all missing, unexpected and mis-shaped tensors.
    """
    tensors = _Tensors(state_dict_or_path, prefix, "self.query.weight")
    inner, embed = tensors.axis("self.query.weight", 0), tensors.axis("self.query.weight", 1)
    names = {"q": "self.query", "k": "self.key", "v": "self.value", "out": "output.dense"}
    for name in names.values():
        shape = (embed, inner) if name == "output.dense" else (inner, embed)
        tensors.expect(f"{name}.weight", shape)
        tensors.expect(f"{name}.bias", shape[:1])
    found = tensors.checked(ignored=_BERT_NORM)
    _check_heads(num_heads, inner)
    return {
        f"{ours}_{part}": found[f"{theirs}.{part}"]
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    }


class _Tensors:
    """The tensors under a prefix, what is expected of them, and what is wrong with them."""

    def __init__(self, state_dict_or_path, prefix, *landmarks):
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string, got {prefix!r}")
        if isinstance(state_dict_or_path, collections.abc.Mapping):
            self.source = "state_dict"
            names = [name for name in state_dict_or_path if isinstance(name, str)]
            found = {name: state_dict_or_path[name] for name in names if name.startswith(prefix)}
        else:
            self.source = str(state_dict_or_path)
            found, names = read_tensors(state_dict_or_path, prefix)
        if not found:
            elsewhere = sorted(
                {name[: -len(end)] for name in names for end in landmarks if name.endswith(end)}
            )
            raise ValueError(
                f"prefix {prefix!r} fits no tensor in {self.source}; "
                f"prefixes with {' or '.join(landmarks)}: {elsewhere}"
            )
        self.prefix = prefix
        self.found = {name[len(prefix) :]: _array(name, tensor) for name, tensor in found.items()}
        self.expected = {}

    def axis(self, name, axis):
        """Length of an axis of a matrix, None if the tensor is missing or no matrix."""
        tensor = self.found.get(name)
        return tensor.shape[axis] if tensor is not None and tensor.ndim == 2 else None

    def expect(self, name, shape):
        """Ask for a tensor; an axis of None could not be known and fits everything."""
        self.expected[name] = shape

    def checked(self, ignored=()):
        """All expected tensors, or one error about all that is wrong."""
        missing = [self.prefix + name for name in self.expected if name not in self.found]
        unexpected = [
            self.prefix + name for name in self.found if name not in self.expected and name not in ignored
        ]
        misshaped = []
        for name, shape in self.expected.items():
            if name in self.found and not _fits(self.found[name].shape, shape):
                wanted = ", ".join("any" if axis is None else str(axis) for axis in shape)
                misshaped.append(f"{self.prefix}{name} must be ({wanted}), got {self.found[name].shape}")
        wrong = [
            f"{title}: {', '.join(entries)}"
            for title, entries in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("mis-shaped", misshaped),
            )
            if entries
        ]
        if wrong:
            raise ValueError(
                f"{self.source} does not hold the attention layer expected under prefix "
                f"{self.prefix!r}: " + "; ".join(wrong)
            )
        return {name: float_array(self.prefix + name, self.found[name]) for name in self.expected}


def _array(name, tensor):
    # A tensor library says in its own words, and its own exceptions, why an array cannot be had of it.
    try:
        return np.asarray(tensor)
    except Exception as error:
        raise TypeError(f"state_dict[{name!r}] cannot be read as a NumPy array: {error}") from error


def _fits(given, wanted):
    return len(given) == len(wanted) and all(axis in (None, length) for axis, length in zip(wanted, given, strict=True))


def _times(factor, length):
    return None if length is None else factor * length


def _check_heads(num_heads, width):
    if width % count("num_heads", num_heads):
        raise ValueError(f"num_heads must divide the width {width} of the projections, got {num_heads}")
