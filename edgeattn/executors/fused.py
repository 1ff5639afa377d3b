"""An encoder layer as a few compiled stages, found in what its forward does.

The forward is run once upon names instead of numbers, which gives a tree of operations. Stages are patterns in it:
attention with its projections; linear, activation and linear; each with the residual's sum and the norm beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edgeattn.executors.stages import AttentionStage, RowStage
from edgeattn.kernels.cpu import encoder_dynamic, encoder_float32
from edgeattn.kernels.cpu.activation import ACTIVATIONS
from edgeattn.ops import LacksOperationError, Ops

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from edgeattn.executors.stages import Stage
    from edgeattn.ops import Activation
    from edgeattn.types import Float32s

_NORMS = {"layer_norm": "layer", "rms_norm": "rms"}


def stages_of(layer: Any) -> list[Stage] | None:
    """What follows upon each other in the layer's forward, each (rows, sequences) -> rows.

    None where a pattern is not one of ours: then the operations are run one by one.
    """
    parts = parts_of(layer)
    return None if parts is None else [_made(part) for part in parts]


class Part(NamedTuple):
    """last(x + branch(first(x))), or last(x) without a branch; each norm is an operation, or None."""

    branch: _Operation | None
    first: _Operation | None
    last: _Operation | None


def parts_of(layer: Any) -> list[Part] | None:
    """The patterns that follow upon each other in the layer's forward; None where one is not of ours."""
    x = _Operation("input")
    try:
        result = layer.forward(_Recorder(), x, None, "")
    except LacksOperationError:
        return None
    return _parts(result, x)


def feed_forward_kernel(feed_forward: Any) -> encoder_float32.RowKernel | None:
    """The kernel of a feed-forward alone; None where there is none for its weights together."""
    branch = feed_forward.forward(_Recorder(), _Operation("input"))
    return None if _feed_forward_input(branch) is None else _feed_forward_kernel(branch, None, None)


class _Operation(NamedTuple):
    """An operation, those whose results it reads, and the layer or activation that it is made with."""

    kind: str
    inputs: tuple[_Operation, ...] = ()
    made_with: Any = None


class _Recorder(Ops[_Operation]):
    """`edgeattn.ops.Ops` upon operations: none is computed."""

    def linear(self, x: _Operation, linear: Any, name: str) -> _Operation:
        return _Operation("linear", (x,), linear)

    def attention(self, q: _Operation, k: _Operation, v: _Operation, layer: Any, sequences: Any, name: str
                  ) -> _Operation:
        return _Operation("attention", (q, k, v), layer)

    def static(self, x: _Operation, layer: Any, sequences: Any, name: str) -> _Operation:
        return _Operation("static", (x,), layer)

    def layer_norm(self, x: _Operation, norm: Any, name: str) -> _Operation:
        return _Operation("layer_norm", (x,), norm)

    def rms_norm(self, x: _Operation, norm: Any, name: str) -> _Operation:
        return _Operation("rms_norm", (x,), norm)

    def activation(self, x: _Operation, kind: Activation, name: str) -> _Operation:
        return _Operation("activation", (x,), kind)

    def add(self, a: _Operation, b: _Operation, name: str) -> _Operation:
        return _Operation("add", (a, b))

    def multiply(self, a: _Operation, b: _Operation, name: str) -> _Operation:
        return _Operation("multiply", (a, b))


def _parts(result: _Operation, x: _Operation) -> list[Part] | None:
    """The parts from x to a result: norm(a + f(a)), a + f(norm(a)) or norm(a), a being what came before."""
    if result is x:
        return []
    norm, inner = (result, result.inputs[0]) if result.kind in _NORMS else (None, result)
    if inner.kind != "add":
        before = None if norm is None else _parts(inner, x)
        return None if norm is None or before is None else [*before, Part(None, None, norm)]
    source, branch = inner.inputs
    before = _parts(source, x)
    if before is None:
        return None
    for input_of in _MAKERS:
        read = input_of(branch)
        if read is source:
            return [*before, Part(branch, None, norm)]
        if read is not None and read.kind in _NORMS and read.inputs[0] is source:
            return [*before, Part(branch, read, None)] + [Part(None, None, norm)] * (norm is not None)
    return None


def _made(part: Part) -> Stage:
    """The compiled stage of a part."""
    if part.branch is None:
        return _normed(part.last)
    make = next(make for input_of, make in _MAKERS.items() if input_of(part.branch) is not None)
    return make(part.branch, part.first, part.last)


def _attention_input(branch: _Operation) -> _Operation | None:
    """What a branch reads that is attention with four projections; None for another."""
    inner = branch.inputs[0] if branch.kind == "linear" else None
    if inner is None or inner.kind != "attention":
        return None
    reads = [each.inputs[0] for each in inner.inputs if each.kind == "linear"]
    return reads[0] if len(reads) == 3 and reads[0] is reads[1] is reads[2] else None


def _static_input(branch: _Operation) -> _Operation | None:
    """What a branch reads that is a layer of static int8; None for another."""
    return branch.inputs[0] if branch.kind == "static" else None


def _feed_forward_input(branch: _Operation) -> _Operation | None:
    """What a branch reads that is a feed-forward of a kernel's; None for another."""
    parts = _feed_forward_parts(branch)
    if parts is None:
        return None
    kind, linear1, gate, linear2 = parts
    active = linear1 if gate is None else gate
    same = linear1.kind == active.kind == "linear" and linear1.inputs[0] is active.inputs[0]
    together = same and kind in ACTIVATIONS and go_together(linear1.made_with, active.made_with, linear2)
    return linear1.inputs[0] if together else None


def _feed_forward_parts(branch: _Operation) -> Any:
    """(activation, linear1, gate or None, the layer linear2) of a feed-forward; None for another branch."""
    inner = branch.inputs[0] if branch.kind == "linear" else None
    if inner is not None and inner.kind == "activation":
        return inner.made_with, inner.inputs[0], None, branch.made_with
    if inner is not None and inner.kind == "multiply" and inner.inputs[0].kind == "activation":
        active, linear1 = inner.inputs
        return active.made_with, linear1, active.inputs[0], branch.made_with
    return None


def go_together(linear1: Any, gate: Any, linear2: Any) -> bool:
    """Whether a feed-forward kernel reads these weights: all float, or bytes as `encoder_dynamic.FeedForward` says."""
    if len({type(linear) for linear in (linear1, gate, linear2)}) > 1 or not linear1.outputs:
        return False
    if linear1.quantized is None:
        return True
    first, second = linear1.quantized, gate.quantized
    whole = not len(first.residual_outputs) and not len(second.residual_outputs)
    # Not np.array_equal, which takes what a signal's handler raises meanwhile for "no": a layer asks this once.
    return whole and bool(first.outlier_columns.tolist() == second.outlier_columns.tolist())


def _attention(branch: _Operation, first: _Operation | None, last: _Operation | None) -> Stage:
    return AttentionStage(branch.inputs[0].made_with, *(
        None if norm is None else encoder_float32.Norm(_norm(norm)) for norm in (first, last)))


def _feed_forward(branch: _Operation, first: _Operation | None, last: _Operation | None) -> Stage:
    return RowStage(_feed_forward_kernel(branch, first, last), residual=True)


def _feed_forward_kernel(branch: _Operation, first: _Operation | None, last: _Operation | None
                         ) -> encoder_float32.RowKernel:
    activation, linear1, gate, linear2 = _feed_forward_parts(branch)
    norm = first or last
    kernels = encoder_float32 if linear2.quantized is None else encoder_dynamic
    kernel: encoder_float32.RowKernel = kernels.FeedForward(
        *_weights(linear1.made_with), *_weights(linear2), activation=activation,
        gate=None if gate is None else _weights(gate.made_with), norm=None if norm is None else _norm(norm),
        norm_first=first is not None)
    return kernel


def _static(branch: _Operation, first: _Operation | None, last: _Operation | None) -> Stage:
    norms = (None if norm is None else _norm(norm) for norm in (first, last))
    stage: Stage = branch.made_with.stage(*norms)
    return stage


def _normed(norm: Any) -> Stage:
    return RowStage(encoder_float32.Norm(_norm(norm)), residual=False)


# Of each kind of branch what it reads, None for another, and what makes its stage.
_MAKERS: dict[Callable[[_Operation], _Operation | None],
              Callable[[_Operation, _Operation | None, _Operation | None], Stage]] = {
    _attention_input: _attention, _feed_forward_input: _feed_forward, _static_input: _static}


def _norm(norm: _Operation) -> tuple[str, Float32s, Float32s | None, float]:
    of = norm.made_with
    return _NORMS[norm.kind], of.weight, of.bias, of.eps


def _weights(linear: Any) -> tuple[Any, Float32s | None]:
    return linear.weight if linear.quantized is None else linear.quantized, linear.bias
