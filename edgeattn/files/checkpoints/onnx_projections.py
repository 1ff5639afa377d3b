"""Linear maps of an ONNX graph, and the projections that reach attention from them."""

import dataclasses
import math
from typing import Any

import numpy as np

from edgeattn.files.checkpoints.onnx_elements import Elements, Term, trace
from edgeattn.files.checkpoints.onnx_nodes import title
from edgeattn.files.checkpoints.onnx_probes import norm_between
from edgeattn.files.checkpoints.onnx_values import NotRead

_FEW_VALUES = 16  # of a norm of heads
_NEAR = 1e-4  # of angles, which exporters store in float32 or compute
_NEAR_HALF, _ROUGH = 1e-2, 0.03  # of cosines, and of angles, in half precision
_CLEAR, _SUBNORMAL = 1e-3, 4e-6  # angles that tell a base in half precision, and those that have no digits there


@dataclasses.dataclass(frozen=True)
class Map:
    """The linear map of a node: rows of `source` times weight plus bias."""

    source: str
    weight: np.ndarray  # (inputs, outputs)
    bias: np.ndarray | None = None


def linear(graph, name):
    """The map whose result, without what is added later, is a value; None where it is made otherwise."""
    if name in graph.maps:
        return graph.maps[name]
    node = graph.maker.get(name)
    if node is None or name != graph.output(node):
        return None
    kind, at = node.op_type, graph.input

    def known(i):
        return graph.constant(at(node, i)) if at(node, i) else None

    weight, source, bias = None, at(node, 0), None
    attributes = graph.attributes(node)
    if graph.constant(source) is not None:
        return None
    if kind == "Mul":
        return _integer_map(graph, node)
    if kind in ("MatMul", "FusedMatMul", "Gemm"):
        weight = known(1)
        if weight is None or weight.ndim != 2 or attributes.get("transA"):
            return None
        weight = weight.T if attributes.get("transB") else weight
        if attributes.get("alpha", 1.0) != 1:
            weight = weight * np.float32(attributes["alpha"])
        if kind == "Gemm" and at(node, 2):
            bias = known(2)
            if bias is None:
                return None
            bias = bias * np.float32(attributes.get("beta", 1.0))
    elif kind == "DynamicQuantizeMatMul":
        weight, bias = real(known(1), known(2), known(3)), known(4)
    elif kind == "MatMulIntegerToFloat":
        weight, bias = real(known(1), known(3), known(5)), known(6)
        source = before_codes(graph, source)
    elif kind in ("QLinearMatMul", "QGemm"):
        weight = real(known(3), known(4), known(5))
        weight = weight.T if weight is not None and attributes.get("transB") else weight
        if kind == "QGemm" and at(node, 6) and weight is not None:
            scale = known(1)
            if scale is None or known(6) is None:
                return None
            bias = known(6) * (np.float32(scale) * np.float32(known(4))).reshape(-1)
    if weight is None or weight.ndim != 2 or weight.dtype.kind != "f":
        return None
    if bias is not None and (bias.size != weight.shape[1] or bias.shape[-1:] != weight.shape[1:]):
        return None
    return Map(source, weight, None if bias is None else bias.reshape(-1))


def _integer_map(graph, node):
    """MatMulInteger, whose sums are made real by Cast and Mul of both scales."""
    for sums, scales in (list(node.input), list(node.input)[::-1]) if len(node.input) == 2 else ():
        cast, product = graph.maker.get(sums), graph.maker.get(scales)
        if cast is None or product is None or cast.op_type != "Cast" or product.op_type != "Mul":
            continue
        integer = graph.maker.get(graph.input(cast, 0))
        if integer is None or integer.op_type != "MatMulInteger":
            continue
        scale = [graph.constant(name) for name in product.input]
        scale = [each for each in scale if each is not None]
        zero = graph.constant(graph.input(integer, 3)) if graph.input(integer, 3) else None
        weight = real(graph.constant(graph.input(integer, 1)), scale[0] if len(scale) == 1 else None, zero)
        if weight is not None and weight.ndim == 2:
            return Map(before_codes(graph, graph.input(integer, 0)), weight)
    return None


def before_codes(graph, name):
    """The value that codes are of."""
    maker = graph.maker.get(name)
    return (
        graph.input(maker, 0)
        if maker is not None and maker.op_type in ("DynamicQuantizeLinear", "QuantizeLinear")
        else name
    )


def real(codes, scale, zero):
    """The numbers that int8 codes (inputs, outputs) stand for; None where these or their scale are not known."""
    if codes is None or scale is None:
        return None
    if codes.dtype.kind == "f":  # of a QuantizeLinear of stored numbers, which does not round
        return codes
    return (codes.astype(np.float32) - (0 if zero is None else zero.astype(np.float32))) * scale.astype(np.float32)


@dataclasses.dataclass
class Projection:
    """Rows of heads: element (g, l, d) is feature `features[g, d]` of row `rows[g, l]` of a map, scaled and offset."""

    source: str
    maps: Map
    rows: np.ndarray  # (G, L)
    features: np.ndarray  # (G, D)
    factor: np.ndarray  # (G, D)
    offset: np.ndarray  # (G, D)
    rotary: tuple | None = None  # (features turned, base, interleaved)
    norm: tuple = ()  # of each head, behind the map: as `norm_between` gives it

    def weights(self, groups):
        """(rows of the weight, biases or None) of some groups, one after the other."""
        features, factor = self.features[groups].reshape(-1), self.factor[groups].reshape(-1)
        weight = self.maps.weight.T[features]
        bias = np.zeros(len(features), np.float32) if self.maps.bias is None else self.maps.bias[features]
        plain = (factor == 1).all()
        offset = self.offset[groups].reshape(-1)
        bias = (bias if plain else bias * factor) + offset
        biased = self.maps.bias is not None or offset.any()
        return (
            np.asarray(weight if plain else weight * factor[:, None], np.float32),
            np.asarray(bias, np.float32) if biased else None,
        )


def projected(graph, elements, heads_first, place):
    """The projection that elements are, laid out by `heads_first` as (groups of heads, length, features).

    Raises
    ------
    NotRead
        Naming what stands where the map was looked for.
    """
    check_sources(graph, elements, place)
    if len({term.source for term in elements.terms}) > 1:
        raise NotRead(
            f"{place} must come from one MatMul or Gemm, got the sum of "
            f"{', '.join(sorted({title(graph.maker[t.source]) for t in elements.terms}))}"
        )
    elements, source = elements.moved(heads_first), elements.terms[0].source
    mapped = linear(graph, source)
    if mapped is None:
        return _normed(graph, elements, source, place)
    width = mapped.weight.shape[1]
    if graph.shapes[source][-1] != width:
        raise NotRead(f"{place} must have as many features as weights, {width}, got {graph.shapes[source]}")
    return Projection(source, mapped, *_laid_out(graph, elements, source, place))


def _laid_out(graph, elements, source, place):
    """(rows (G, L), features (G, D), factor (G, D), offset (G, D), rotary) of elements of rows of features."""
    width = graph.shapes[source][-1]
    if len(elements.shape) != 3:
        raise NotRead(f"{place} must have at least 2 axes, got {elements.shape}")
    kept = [(np.asarray(t.index), np.broadcast_to(np.float32(t.factor), elements.shape)) for t in elements.terms]
    kept = [(index, factor) for index, factor in kept if factor.any()]
    offset = np.broadcast_to(np.float32(0 if elements.offset is None else elements.offset), elements.shape)
    of_tokens = np.zeros(elements.shape[:-1], bool)
    for _, factor in kept:
        of_tokens |= (factor != 0).any(-1)
    if of_tokens.any() and not of_tokens.all():
        raise NotRead(f"{place} must be of tokens alone, got {elements.shape[1]} rows of which "
                      f"{int((~of_tokens[0]).sum())} are constants: keys and values that attention adds "
                      "(bias_k, bias_v, add_zero_attn) are read by MultiHeadAttention.from_torch, from the model's own "
                      "weights")
    if len(kept) == 1 and (kept[0][1] == kept[0][1][:, :1]).all():
        index, factor = kept[0]
        rotary = None
    elif kept:
        index, factor, rotary = _turned(kept, offset, width, place, graph.half)
    else:
        raise no_projection(graph, None, place)
    rows, features = index // width, index % width
    if (index < 0).any() or (rows != rows[:, :, :1]).any() or (features != features[:, :1]).any():
        raise NotRead(
            f"{place} must be features of a MatMul or Gemm cut into heads, the same for each token, by "
            f"Split, Reshape and Transpose; got elements in another order behind {title(graph.maker[source])}"
        )
    if rotary is None and (offset != offset[:, :1]).any():
        raise NotRead(
            f"{place} must have the same bias for each token, got one by position behind {title(graph.maker[source])}"
        )
    return rows[:, :, 0], features[:, 0], factor[:, 0], offset[:, 0], rotary


def _normed(graph, elements, source, place):
    """The projection behind whose map there is a norm of each head."""
    above, (kind, weight, bias, eps) = _norm_above(graph, source)
    outer = _features_of(elements, len(weight))
    elements = Elements(elements.shape, tuple(
        Term(term.source, term.index, term.factor / outer[term.index % len(weight)]) for term in elements.terms),
        elements.offset)
    rows, features, factor, offset, rotary = _laid_out(graph, elements, source, place)
    if any((each != each[:1]).any() for each in (features, offset)) or (factor != 1).any() or (
            np.sort(features[0]) != np.arange(len(weight))).any():
        raise NotRead(f"{place} must be normed over the features of a head, {features.shape[1]}, alike in all heads; "
                      f"got {title(graph.maker[source])} over {len(weight)}: a norm over all heads has no place in a "
                      "layer")
    order = features[0]
    scale = outer[order]
    place_of = rows[:, :, None] * len(order) + order
    inner = trace(graph, above, is_map_of(graph))
    check_sources(graph, inner, place)
    inner = inner.moved(lambda x: x.reshape(-1)[place_of])
    found = projected(graph, inner, lambda x: x, place)
    if found.norm or found.rotary:
        raise NotRead(f"{place} must be normed once, in front of a rotary embedding")
    bias = offset[0] + (0 if bias is None else bias[order] * scale)
    if kind == "RMSNorm" and bias.any():
        raise NotRead(f"{place} must have nothing added behind an RMSNorm")
    return dataclasses.replace(found, rotary=rotary, norm=(
        kind, np.float32(weight[order] * scale), np.float32(bias) if bias.any() else None, eps))


def _features_of(elements, width):
    """(width,): what each feature of a source is multiplied by at the first position, where nothing is turned."""
    numbers = np.ones(width, np.float32)
    for term in elements.terms:
        factor = np.broadcast_to(np.float32(term.factor), elements.shape)[:, 0]
        numbers[term.index[:, 0][factor != 0] % width] = factor[factor != 0]
    return numbers


def _norm_above(graph, name):
    """(the value furthest above whose norm over the last axis a value is, the norm); None where it is none."""
    if name not in graph.norms:
        todo, seen, graph.norms[name] = [name], set(), None
        while todo and len(seen) < _FEW_VALUES:
            each = todo.pop(0)
            if each in seen or graph.constant(each) is not None:
                continue
            seen.add(each)
            if each != name and (norm := norm_between(graph, each, name)):
                graph.norms[name] = each, norm
            node = graph.maker.get(each)
            if node is not None and (each == name or linear(graph, each) is None):
                todo += [value for value in node.input if value]
    return graph.norms[name]


def check_sources(graph, elements, place):
    """Raise where elements come from something else than linear maps, or norms of them."""
    for term in elements.terms:
        if linear(graph, term.source) is None and _norm_above(graph, term.source) is None:
            raise no_projection(graph, term.source, place)
    if not elements.terms:
        raise no_projection(graph, None, place)


def no_projection(graph, name, place):
    """The error for what comes from something else."""
    node = graph.maker.get(name) if name is not None else None
    found = (
        title(node)
        if node is not None
        else "nothing but constants"
        if name is None
        else (f"{name[:100]!r}, an input of the graph")
    )
    return NotRead(
        f"{place} must come from a MatMul or Gemm with constant weights, through nothing but sums and products with "
        f"constants and what moves elements (Reshape, Transpose, Split, Slice, Gather, Concat ...), got {found}"
    )


def _turned(terms, offset, width, place, half_precision):
    """(index, factor, (features turned, base, interleaved)) of a rotary embedding of positions 0, 1, ..."""
    wrong = NotRead(
        f"{place} must be turned as by a rotary embedding, by angles p * base^(-2 i / R) of positions p "
        "from 0 on, or not at all; got sums of features by another rule, as scaled ones, or those of images in two "
        "directions (DINOv3, EVA-02), which have no place in a layer" + (
            ", or cosines in half precision, which tell no base: export the float32 model" if half_precision else "")
    )
    length, size = terms[0][0].shape[1:]
    if length < 2:
        raise NotRead(f"{place} must have more than one position for its rotary embedding to be read; got {length}")
    at_zero = np.stack([factor[:, 0] for _, factor in terms])  # (terms, G, D): 0 but for one
    if (np.count_nonzero(at_zero, 0) != 1).any():
        raise wrong
    own = np.argmax(at_zero != 0, 0)[:, None]
    index = np.take_along_axis(np.stack([i for i, _ in terms]), np.broadcast_to(own, terms[0][0].shape)[None], 0)[0]
    scale = at_zero.sum(0)[:, None]
    cosines, sines, partner = np.zeros(index.shape), np.zeros(index.shape), np.full(index.shape, -1)
    for i, factor in terms:
        same = i == index
        cosines += np.where(same, factor, 0)
        turned = ~same & (factor != 0)
        if ((partner[turned] >= 0) & (partner[turned] != i[turned])).any():
            raise wrong
        partner[turned] = i[turned]
        sines += np.where(turned, factor, 0)
    cosines, sines = cosines / scale, sines / scale
    moved = (partner >= 0).any((0, 1))  # features that are turned
    count = int(moved.sum())
    features = index[0, 0] % width
    half = count // 2
    if count % 2 or not moved[:count].all() or (partner[:, 1:, :count] < 0).any():
        raise wrong
    other = (partner[0, 1, :count] % width).tolist()
    if other == [*features[half:count], *features[:half]]:
        interleaved, first, second = False, np.arange(half), np.arange(half, count)
    elif other == features[:count].reshape(-1, 2)[:, ::-1].reshape(-1).tolist():
        interleaved, first, second = True, np.arange(0, count, 2), np.arange(1, count, 2)
    else:
        raise wrong
    angles = np.arctan2(sines[0, 1, second], cosines[0, 1, second])
    base, near = _base_of(angles), _NEAR
    if base is None:
        raise wrong
    if half_precision and (coarse := _coarse_base_of(angles)) is not None:
        base, near = coarse, _NEAR_HALF
    wanted = np.arange(length)[:, None] * base ** (-np.arange(half) / half)
    for part, sign in ((first, -1), (second, 1)):
        if not np.allclose(cosines[:, :, part], np.cos(wanted), atol=near) or not np.allclose(
            sines[:, :, part], sign * np.sin(wanted), atol=near
        ):
            raise wrong
    # what is added before it turns too: at position 0 it is as it was
    start = offset[:, :1]
    expected = start * np.ones((1, length, 1), np.float32)
    for part, against, sign in ((first, second, -1), (second, first, 1)):
        expected[:, :, part] = start[:, :, part] * np.cos(wanted) + sign * start[:, :, against] * np.sin(wanted)
    if not np.allclose(offset, expected, atol=1e-3 * max(1.0, float(np.abs(start).max()))):
        raise wrong
    return index, np.broadcast_to(scale, index.shape), (count, float(base), interleaved)


def _base_of(angles):
    """The base of a rotary embedding that turns position 1 by some angles."""
    half = len(angles)
    if (angles <= 0).any():
        return None
    base = 1e4 if half < 2 else math.exp(-np.log(angles[1:] / angles[0]).sum() / np.arange(1, half).sum() * half)
    return round(base) if abs(base - round(base)) < 1e-2 * base and base > 100 else base


def _coarse_base_of(angles):
    """The base of angles in half precision, of two digits as those that models have; None where these do not fit.

    Each angle must be near: of embeddings that are scaled for long texts only the small ones differ.
    """
    clear = np.flatnonzero(angles > _CLEAR)
    if len(clear) < 2 or (clear != np.arange(len(clear))).any():
        return None
    half, last = len(angles), int(clear[-1])
    base = float(f"{math.exp(-np.log(angles[1:last + 1] / angles[0]).sum() / np.arange(1, last + 1).sum() * half):.1e}")
    wanted = base ** (-np.arange(half) / half)
    seen = wanted > _SUBNORMAL
    return base if (np.abs(angles / wanted - 1)[seen] < _ROUGH).all() else None


@dataclasses.dataclass
class Parts:
    """What attention is made of, before its heads are brought in order."""

    q: Projection
    k: Projection
    v: Projection
    value_groups: Any  # the group of queries of each group of values
    context: str
    codes: Any  # flat index in (groups of values, L, Dv) of each element of `context`
    scale: Any  # of scores, for each group of queries; 1 / sqrt(D) not taken off
    bias: Any = None  # (groups of values, L, S)
    told: Any = ()
    causal: bool = False
    rotary: Any = None
    window: Any = (-1, -1)
    products: Any = None  # the nodes of both, where attention is taken apart


def is_map_of(graph):
    """A function that says whether a value is the result of a linear map."""
    return lambda each: linear(graph, each) is not None
