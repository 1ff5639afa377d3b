"""What nodes of ONNX compute, with NumPy: of constants, of shapes, and of where elements go.

`LAYOUT` moves elements and changes none, so that it does with an array of numbers what it does with one of indices.
Every function takes a node's attributes and its inputs, None for those left out.
"""

import math

import numpy as np

from edgeattn.files.checkpoints.onnx_resize import resize
from edgeattn.files.paths import reason

_LONGEST_RANGE = 2**16
_MOST_AXES, _LARGEST_TILE = 12, 2**22


def reshape(attributes, x, shape):
    """Reshape; 0 in `shape` keeps an axis."""
    shape = whole_numbers(shape, "a shape")
    if not attributes.get("allowzero"):
        shape = [x.shape[i] if n == 0 and i < x.ndim else n for i, n in enumerate(shape)]
    return x.reshape(shape)


def transpose(attributes, x):
    """Transpose."""
    perm = attributes.get("perm")
    if perm is not None and sorted(perm) != list(range(x.ndim)):
        raise ValueError(f"a Transpose must have a permutation of {x.ndim} axes, got {reason(perm)}")
    return x.transpose(perm)


def squeeze(attributes, x, axes=None):
    """Squeeze."""
    axes = attributes.get("axes") if axes is None else whole_numbers(axes, "axes")
    return x.squeeze(None if axes is None else tuple(axes))


def unsqueeze(attributes, x, axes=None):
    """Unsqueeze."""
    axes = attributes.get("axes", ()) if axes is None else whole_numbers(axes, "axes")
    return np.expand_dims(x, tuple(axes))


def flatten(attributes, x):
    """Flatten."""
    axis = attributes.get("axis", 1)
    axis += x.ndim * (axis < 0)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def slice_(attributes, x, starts=None, ends=None, axes=None, steps=None):
    """Slice."""
    starts, ends, axes = (
        attributes.get(name) if value is None else whole_numbers(value, name)
        for name, value in (("starts", starts), ("ends", ends), ("axes", axes))
    )
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else whole_numbers(steps, "steps")
    cut = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        length = x.shape[axis]
        if step < 0 and end < -length:
            end = None
        cut[axis] = slice(start, end, step)
    return x[tuple(cut)]


def gather(attributes, x, indices):
    """Gather."""
    indices = np.asarray(indices)
    if indices.dtype.kind not in "iu":
        raise ValueError(f"indices must be whole numbers, got {indices.dtype}")
    axis = attributes.get("axis", 0)
    if indices.ndim == 0:
        return x[(slice(None),) * (axis % x.ndim) + (int(indices),)]
    return np.take(x, indices, axis=axis)


def split(attributes, x, sizes=None, outputs=1):
    """Split, a list."""
    axis = attributes.get("axis", 0)
    sizes = attributes.get("split") if sizes is None else whole_numbers(sizes, "sizes of a Split")
    if sizes is None:
        part = -(-x.shape[axis] // outputs)
        sizes = [part] * (outputs - 1) + [x.shape[axis] - part * (outputs - 1)]
    if len(sizes) != outputs or min(sizes) < 0 or sum(sizes) != x.shape[axis]:
        raise ValueError(f"a Split must cut {x.shape[axis]} elements in {outputs}, got {reason(sizes)}")
    ends = np.cumsum(sizes)
    moved = np.moveaxis(x, axis, 0)
    return [np.moveaxis(moved[end - size : end], 0, axis) for size, end in zip(sizes, ends, strict=True)]


def expand(_, x, shape):
    """Expand."""
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(whole_numbers(shape, "a shape"))))


def tile(_, x, repeats):
    """Tile."""
    repeats = whole_numbers(repeats, "repeats")
    if min(repeats, default=1) < 0 or x.size * math.prod(repeats) > _LARGEST_TILE:
        raise ValueError(f"a Tile must give at most {_LARGEST_TILE} elements, got {x.size} times {reason(repeats)}")
    return np.tile(x, repeats)


def concat(attributes, *parts):
    """Concat."""
    return np.concatenate(parts, attributes.get("axis", 0))


SAME = ("Identity", "Dropout", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear")
LAYOUT = {
    "Reshape": reshape,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Flatten": flatten,
    "Slice": slice_,
    "Gather": gather,
    "Split": split,
    "Expand": expand,
    "Tile": tile,
}


def whole_numbers(array, what):
    """A list of a short array of whole numbers."""
    array = np.asarray(array)
    if array.dtype.kind not in "iu" or array.size > 64:
        raise ValueError(f"{what} must be few whole numbers, got {array.size} of {array.dtype}")
    return array.reshape(-1).tolist()


_erf = np.frompyfunc(math.erf, 1, 1)


def erf(x):
    """The error function."""
    return _erf(x).astype(x.dtype)


def gelu(x):
    """GELU by the error function."""
    return x * (1 + erf(x / math.sqrt(2))) / 2


def _gelu(attributes, x):
    if attributes.get("approximate") == "tanh":
        return gelu_tanh(x)
    return gelu(x)


def gelu_tanh(x):
    """GELU by tanh."""
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def _divide(_, x, y):
    # whole numbers are cut towards 0
    return np.trunc(np.divide(x, y)).astype(np.result_type(x, y)) if np.result_type(x, y).kind in "iu" else x / y


def _clip(attributes, x, low=None, high=None):
    return np.clip(x, attributes.get("min") if low is None else low, attributes.get("max") if high is None else high)


def _plain(function):
    return lambda _, *inputs: function(*inputs)


ELEMENTWISE = {
    "Div": _divide,
    "Gelu": _gelu,
    "Clip": _clip,
    "Erf": _plain(erf),
    "QuickGelu": lambda a, x: x * sigmoid(a.get("alpha", 1.702) * x),
    "Swish": lambda a, x: x * sigmoid(a.get("alpha", 1.0) * x),
    "Silu": _plain(lambda x: x * sigmoid(x)),
    "Sigmoid": _plain(sigmoid),
    "Relu": _plain(lambda x: np.maximum(x, 0)),
    "Reciprocal": _plain(lambda x: 1 / x),
    "HardSigmoid": lambda a, x: np.clip(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0, 1),
    "HardSwish": _plain(lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "Where": _plain(np.where),
    "Sum": _plain(lambda *x: sum(x[1:], x[0])),
    "Pow": _plain(lambda x, y: np.power(x, y).astype(x.dtype)),
    "Min": _plain(lambda *x: np.minimum.reduce(np.broadcast_arrays(*x))),
    "Max": _plain(lambda *x: np.maximum.reduce(np.broadcast_arrays(*x))),
    **{
        name: _plain(getattr(np, function))
        for name, function in {
            "Add": "add",
            "Sub": "subtract",
            "Mul": "multiply",
            "Sqrt": "sqrt",
            "Exp": "exp",
            "Log": "log",
            "Neg": "negative",
            "Abs": "abs",
            "Tanh": "tanh",
            "Cos": "cos",
            "Sin": "sin",
            "Not": "logical_not",
            "And": "logical_and",
            "Or": "logical_or",
            "Equal": "equal",
            "Less": "less",
            "LessOrEqual": "less_equal",
            "Greater": "greater",
            "GreaterOrEqual": "greater_equal",
            "Floor": "floor",
            "Ceil": "ceil",
            "Round": "round",
            "Sign": "sign",
            "IsNaN": "isnan",
            "IsInf": "isinf",
            "Mod": "mod",
        }.items()
    },
}


def _reduced(function):
    def reduce(attributes, x, axes=None):
        axes = attributes.get("axes") if axes is None else whole_numbers(axes, "axes")
        if not axes and attributes.get("noop_with_empty_axes"):
            return x
        return function(x, axis=tuple(axes) if axes else None, keepdims=bool(attributes.get("keepdims", 1)))

    return reduce


def _range(_, start, limit, delta):
    start, limit, delta = (np.asarray(each).reshape(-1)[0] for each in (start, limit, delta))
    if not delta or not 0 <= (limit - start) / delta <= _LONGEST_RANGE:
        raise ValueError(f"a Range must have at most {_LONGEST_RANGE} elements, got {start} to {limit} by {delta}")
    return np.arange(start, limit, delta)


def _trilu(attributes, x, k=0):
    return (np.triu if attributes.get("upper", 1) else np.tril)(x, int(np.asarray(k).reshape(-1)[0]))


def layer_norm(attributes, x, scale=1.0, bias=0.0):
    """LayerNormalization over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + attributes.get("epsilon", 1e-5)) * scale + bias


def rms_norm(attributes, x, scale=1.0):
    """RMSNormalization over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + attributes.get("epsilon", 1e-5)) * scale


REDUCED = {
    f"Reduce{name}": _reduced(function)
    for name, function in {
        "Mean": np.mean,
        "Sum": np.sum,
        "Max": np.max,
        "Min": np.min,
        "Prod": np.prod,
        "SumSquare": lambda x, **how: np.square(x).sum(**how),
        "L2": lambda x, **how: np.sqrt(np.square(x).sum(**how)),
    }.items()
}
def _lp_norm(attributes, x):
    axis = attributes.get("axis", -1)
    return x / (np.abs(x).sum(axis, keepdims=True) if attributes.get("p", 2) == 1
                else np.sqrt((x * x).sum(axis, keepdims=True)))


def _gather_nd(attributes, x, indices):
    if attributes.get("batch_dims") or indices.dtype.kind not in "iu":
        raise ValueError("a GatherND must have whole numbers and no batch_dims")
    return x[tuple(np.moveaxis(indices, -1, 0))]


def _scatter_nd(attributes, x, indices, updates):
    if attributes.get("reduction", "none") != "none" or indices.dtype.kind not in "iu":
        raise ValueError("a ScatterND must have whole numbers and no reduction")
    x = x.copy()
    x[tuple(np.moveaxis(indices, -1, 0))] = updates
    return x


def _cumsum(attributes, x, axis):
    axis = int(np.asarray(axis).reshape(-1)[0])
    x = np.flip(x, axis) if attributes.get("reverse") else x
    sums = np.cumsum(x, axis, dtype=x.dtype) - (x if attributes.get("exclusive") else 0)
    return np.flip(sums, axis) if attributes.get("reverse") else sums


def _einsum(attributes, *inputs):
    """Of a few letters: rotary embeddings have the outer product of positions and frequencies."""
    text = attributes.get("equation", "").replace(" ", "")
    terms = text.partition("->")[0].split(",")
    if len(terms) != len(inputs) or any(len(term) != x.ndim for term, x in zip(terms, inputs, strict=True)):
        raise ValueError(f"an Einsum of constants must have a letter for each axis, got {text[:100]!r}")
    sizes = dict(zip("".join(terms), [size for x in inputs for size in x.shape], strict=True))
    if math.prod(sizes.values()) > _LARGEST_TILE:
        raise ValueError(f"an Einsum of constants must be of at most {_LARGEST_TILE} products, got {reason(sizes)}")
    return np.einsum(text, *inputs)


OTHERS = {
    "Resize": resize,
    "EyeLike": lambda a, x: np.eye(*x.shape, a.get("k", 0), dtype=np.float32),
    "Einsum": _einsum,
    "GatherElements": lambda a, x, indices: np.take_along_axis(x, indices, a.get("axis", 0)),
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "LpNormalization": _lp_norm,
    "Range": _range,
    "Trilu": _trilu,
    "Concat": concat,
    "MatMul": _plain(np.matmul),
    "CumSum": _cumsum,
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "SimplifiedLayerNormalization": rms_norm,
}


def dequantized(attributes, x, scale, zero_point=None):
    """DequantizeLinear of stored codes."""
    scale = np.asarray(scale, np.float32)
    scale, zero_point = _along_axis(attributes, x, scale, zero_point)
    codes = x.astype(np.float32)
    return (codes if zero_point is None else codes - zero_point.astype(np.float32)) * scale


def quantized(attributes, x, scale, zero_point=None):
    """QuantizeLinear of stored numbers, whose codes are uint8 where no zero point says otherwise."""
    scale = np.asarray(scale, np.float32)
    zero_point = np.zeros_like(scale, np.uint8) if zero_point is None else np.asarray(zero_point)
    scale, zero_point = _along_axis(attributes, x, scale, zero_point)
    limits = np.iinfo(zero_point.dtype)
    return np.clip(np.rint(x / scale) + zero_point, limits.min, limits.max).astype(zero_point.dtype)


def _along_axis(attributes, x, scale, zero_point):
    """(scale, zero_point) of each channel, as they broadcast to x."""
    if scale.size < 2 or scale.ndim != 1:
        return scale, zero_point
    axis = attributes.get("axis", 1)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be one of {x.ndim}, got {axis}")
    shape = [1] * x.ndim
    shape[axis] = -1
    return scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)


def check_axes(shape):
    """Raise for more axes than NumPy's own functions bear."""
    if len(shape) > _MOST_AXES:
        raise ValueError(f"tensors must have at most {_MOST_AXES} axes, got {len(shape)}")
