"""Attention that is taken apart: a Softmax between the product of queries and keys and that with the values."""

import itertools

import numpy as np

from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.files.checkpoints.onnx_elements import BLOCKED, Elements, Term, trace
from edgeattn.files.checkpoints.onnx_outputs import FAR_BEHIND
from edgeattn.files.checkpoints.onnx_probes import computed
from edgeattn.files.checkpoints.onnx_products import product
from edgeattn.files.checkpoints.onnx_projections import Parts, is_map_of, linear, projected
from edgeattn.files.checkpoints.onnx_values import NotRead

_FEW_NODES = 400  # between queries and what is added to scores


def _groups(lead):
    """A function that makes (..., rows, columns) to (groups, rows, columns), `lead` the axes of the product."""
    return lambda x: np.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, *x.shape[-2:])


def from_softmax(graph, node, name):
    """The `Parts` around a Softmax."""
    scores, term, masks, told = _scores(graph, node, name)
    first = product(graph, graph.maker[term.source])
    scale = np.broadcast_to(np.float32(term.factor) * np.float32(first.factor), scores.shape)

    def to_product(each):
        return each == graph.output(node)

    second, side, weights = _reader_product(graph, node, name, to_product)
    if [term.source for term in weights.terms] != [graph.output(node)] or second.factor != 1 or not np.all(
            weights.terms[0].factor == 1):
        raise NotRead(f"the probabilities of {name} must be multiplied by the values as they are")
    is_map = is_map_of(graph)
    left = trace(graph, graph.input(first.node, 0), is_map).moved(first.left)
    right = trace(graph, _right(graph, first.node), is_map).moved(lambda x: first.right(x).swapaxes(-1, -2))
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    length, keys = left.shape[-2], right.shape[-2]
    codes = first.codes((*lead, length, keys)).reshape(-1)
    comp = codes[term.index.reshape(-1)]  # of each score, where it is in the product
    values = trace(graph, side, is_map).moved(second.right)
    probabilities = weights.moved(second.left)
    lead2 = np.broadcast_shapes(probabilities.shape[:-2], values.shape[:-2])
    place = _groups(lead2)(probabilities.terms[0].index)
    at = comp[place]
    if scores.shape[-1] != keys:
        raise NotRead(f"{name} must be over the keys alone, {keys}, got {scores.shape[-1]} numbers in a row: an "
                      "attention sink, which takes a part of the weight, has no place in a layer")
    if (
        at.shape[1:] != (length, keys)
        or (at - at[:, :1, :1] != np.arange(length * keys).reshape(length, keys)).any()
        or (at[:, 0, 0] % (length * keys)).any()
    ):
        raise NotRead(f"{name} must weigh values by rows of queries and columns of keys, got scores in another order")
    offset = None if scores.offset is None else np.broadcast_to(np.float32(scores.offset), scores.shape).reshape(-1)
    factors = _factors(scale.reshape(-1)[place], None if offset is None else offset[place], name)
    q = projected(graph, left, _groups(lead), f"the queries of {name}")
    k = projected(graph, right, _groups(lead), f"the keys of {name}")
    v = projected(graph, values, _groups(lead2), f"the values of {name}")
    bias = None
    if offset is not None and offset.any() and not masks:  # else a part of the mask
        bias = offset[place]
    told += [f"{name} adds {mask} to its scores; pass it, if it masks, as attn_mask or key_padding_mask in each call"
             for mask in sorted(set(masks))]
    return Parts(q, k, v, at[:, 0, 0] // (length * keys), graph.output(second.node),
                 second.codes((*lead2, length, values.shape[-1])), factors, bias, told,
                 products=(first.node, second.node))


def _right(graph, node):
    """The name of the right side of a product."""
    return graph.input(node, 3 if node.op_type == "QLinearMatMul" else 1)


def _scores(graph, node, name):
    """(the scores of a Softmax, their term of a product, names of what else is added, what is told)."""

    def scores_source(each):
        maker = graph.maker.get(each)
        return product(graph, maker) is not None or (maker is not None and maker.op_type == "Tanh")

    scores = trace(graph, graph.input(node, 0), scores_source)
    axis = graph.attributes(node).get("axis", -1 if graph.opset >= 13 else len(scores.shape) - 1)
    if axis % len(scores.shape) != len(scores.shape) - 1:
        raise NotRead(f"{name} must be over the last axis, the keys, got axis {axis}")
    term, masks = _scores_term(graph, scores, name)
    if graph.maker[term.source].op_type != "Tanh":
        return scores, term, masks, []
    softcap = float(np.max(term.factor))
    inner = trace(
        graph, graph.maker[term.source].input[0], lambda each: product(graph, graph.maker.get(each)) is not None
    )
    below, more = _scores_term(graph, inner, name)
    term = Term(below.source, below.index.reshape(-1)[term.index], np.float32(below.factor) * softcap)
    return scores, term, masks + more, [f"{name} caps its scores; pass softcap={softcap:g} in each call"]


def _factors(factors, offset, name):
    """The number that each head's scores are scaled by; of each score its factor, and what is added, or None."""
    if offset is not None:  # where a mask takes the score's place, it has no factor
        free = offset > BLOCKED
        one = np.argmax(free.reshape(len(free), -1), 1)
        factors = np.where(free, factors, factors.reshape(len(free), -1)[np.arange(len(free)), one][:, None, None])
    if (factors != factors[:, :1, :1]).any():
        raise NotRead(f"the scores of {name} must be scaled by one number in a head")
    return factors[:, 0, 0]


def _scores_term(graph, scores, name):
    """(the term of the product, names of what else is added)."""

    def is_product(term):
        maker = graph.maker.get(term.source)
        return product(graph, maker) is not None or (maker is not None and maker.op_type == "Tanh")

    terms = [term for term in scores.terms if is_product(term)]
    if len(terms) > 1:  # a product may be under a computed mask too
        raise NotRead(f"the scores of {name} must be one product of queries and keys, got {len(terms)}")
    if not terms:
        through = _behind_mask(graph, scores, name)
        if through is not None:
            return through
        raise _no_projection_of_scores(graph, scores, name)
    rest = [term.source for term in scores.terms if term is not terms[0] and not _one_for_all_keys(term, scores.shape)]
    for each in rest:
        if _is_of_queries(graph, each, graph.maker[terms[0].source]):
            raise NotRead(f"the scores of {name} must be one product of queries and keys, got {_called(graph, each)} "
                          "added, which is computed of these: relative positions as DeBERTa's have no place in a layer")
    return terms[0], [_called(graph, each) for each in rest]


def _one_for_all_keys(term, shape):
    """Whether a term is the same for all keys, as the highest score that some subtract: a softmax does not see it."""
    index, factor = (np.broadcast_to(each, shape) for each in (term.index, term.factor))
    return bool((index == index[..., :1]).all() and (factor == factor[..., :1]).all())


def _is_of_queries(graph, value, node):
    """Whether a value is computed of the queries or keys that a product takes, or of the rows that these are of."""
    maps = set()

    def is_map(each):
        found = linear(graph, each)
        if found is not None:
            maps.add(each)
            rows = found.source
            while rows in graph.maker and graph.maker[rows].op_type in (*functions.SAME, *functions.LAYOUT):
                rows = graph.maker[rows].input[0]
            if rows not in graph.inputs:  # of which masks may be computed, too
                maps.add(rows)
        return found is not None

    for each in node.input:
        trace(graph, each, is_map)
    todo, seen = [value], set()
    while todo and len(seen) < _FEW_NODES:
        each = todo.pop()
        if each in maps:
            return True
        if each not in seen and graph.constant(each) is None:
            seen.add(each)
            maker = graph.maker.get(each)
            if maker is not None and maker.op_type != "Shape":
                todo.extend(name for name in maker.input if name)
    return False


def _called(graph, name):
    node = graph.maker.get(name)
    return f"{name[:60]!r}" if node is None else f"{name[:60]!r} (of a {node.op_type} node)"


def _behind_mask(graph, scores, name):
    """The term behind a Where whose condition is computed."""
    if len(scores.terms) != 1:
        return None
    node = graph.maker.get(scores.terms[0].source)
    if node is None or node.op_type != "Where":
        return None
    for i in (1, 2):
        if graph.constant(graph.input(node, i)) is None:
            inner = trace(graph, graph.input(node, i), lambda each: product(graph, graph.maker.get(each)) is not None)
            term, masks = _scores_term(graph, inner, name)
            if inner.shape != graph.shapes[graph.output(node)]:
                return None
            outer = scores.terms[0]
            factor = np.broadcast_to(np.float32(term.factor), term.index.shape).reshape(-1)[outer.index]
            return Term(term.source, term.index.reshape(-1)[outer.index], factor * np.float32(outer.factor)), [
                *masks,
                f"{graph.input(node, 0)[:60]!r} (of a Where node)",
            ]
    return None


def _no_projection_of_scores(graph, scores, name):
    """The error for a Softmax over something else than a product."""
    found = ", ".join(_called(graph, term.source) for term in scores.terms) or "constants"
    return NotRead(f"the scores of {name} must be a product of queries and keys, scaled and masked, got {found}")


def _reader_product(graph, node, name, is_source):
    """(the product of probabilities and values, the values' name, the probabilities' elements)."""
    value = graph.output(node)
    for _ in range(FAR_BEHIND):
        readers = [each for each in graph.readers.get(value, ()) if each.op_type not in ("Shape", "IsNaN", "Size")]
        for reader in readers:
            found = product(graph, reader)
            if found is not None and graph.input(reader, 0) == value:
                second = _right(graph, reader)
                elements = _past_nan(graph, trace(graph, value, is_source), is_source)
                whole = [term.source for term in elements.terms] == [graph.output(node)]
                return found, second, elements if whole or (
                    same := _unchanged(graph, graph.output(node))) is None else same[2]
        following = [each for each in readers if each.op_type in (*functions.SAME, *functions.LAYOUT, "Where")]
        if not following:
            break
        value = graph.output(following[0])
    if (found := _unchanged(graph, graph.output(node))) is not None:
        return found
    raise NotRead(f"the probabilities of {name} must be the left side of a MatMul with the values")


def _unchanged(graph, probabilities):
    """As `_reader_product`, of probabilities that nodes leave as they are: nan_to_num, a division by their own sum."""
    shape = graph.shapes.get(probabilities)
    if not shape or not 0 < np.prod(shape, dtype=np.float64) <= graph.most_elements:
        return None
    made_up = np.random.default_rng(0).random(shape)
    made_up /= made_up.sum(-1, keepdims=True)
    for node in itertools.islice(graph.nodes_behind(probabilities), 2 * FAR_BEHIND):
        found = product(graph, node)
        if found is None:
            continue
        try:
            made = computed(graph, graph.input(node, 0), {probabilities: made_up})
        except NotRead:
            return None
        second = _right(graph, node)
        same = made is not None and made.shape == shape and np.allclose(made, made_up, rtol=1e-6, atol=0)
        return (found, second, Elements.of(probabilities, shape)) if same else None
    return None


def _past_nan(graph, elements, is_source):
    """Probabilities behind Where(IsNaN(p), 0, p), or of a condition of whole rows: exporters write both for rows
    without keys.
    """
    node = graph.maker.get(elements.terms[0].source) if len(elements.terms) == 1 else None
    if node is None or node.op_type != "Where" or len(node.input) != 3 or is_source(elements.terms[0].source):
        return elements
    condition, shape = graph.maker.get(node.input[0]), graph.shapes.get(node.input[0])
    of_rows = (condition is not None and condition.op_type == "IsNaN") or (shape is not None and shape[-1:] == (1,))
    computed = [name for name in node.input[1:] if graph.constant(name) is None]
    if not of_rows or len(computed) != 1:
        return elements
    inner, outer = trace(graph, computed[0], is_source), elements.terms[0]
    if len(inner.terms) != 1 or inner.shape != graph.shapes.get(graph.output(node)):
        return elements
    (term,) = inner.terms
    factor = np.broadcast_to(np.float32(term.factor), term.index.shape).reshape(-1)[outer.index]
    index = term.index.reshape(-1)[outer.index]
    return Elements(elements.shape, (Term(term.source, index, factor * np.float32(outer.factor)),))
