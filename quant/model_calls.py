"""Batches for whole encoders and models, each as a call of the model, on an executor of ours where that is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeattn.layers import TransformerEncoder
from edgeattn.models import ImageEncoder, TextEncoder
from quant.progress import track
from quant.trace import check_batches

if TYPE_CHECKING:
    from typing import Any, TypeAlias, TypeVar

    from edgeattn.ops import Ops
    from edgeattn.types import Bools
    from quant.types import ModelBatch

    Model: TypeAlias = TransformerEncoder | TextEncoder | ImageEncoder
    _M = TypeVar("_M", bound="TransformerEncoder | TextEncoder | ImageEncoder")

MODELS = (TransformerEncoder, TextEncoder, ImageEncoder)
# Arguments of a call, the first of which a batch may be alone.
ARGUMENTS = {
    TransformerEncoder: ("x", "lengths", "key_padding_mask", "attn_mask", "is_causal", "window_size"),
    TextEncoder: ("ids", "attention_mask", "token_type_ids"),
    ImageEncoder: ("pixels",),
}
_MASKS = ("key_padding_mask", "attention_mask")


class ModelCall(NamedTuple):
    """One call of a model.

    Attributes
    ----------
    where : str
        Which batch this is, for messages.
    arguments : dict
        Of the call, or {"sentences": texts} of `encode`.
    real : bool (tokens,) or None
        Which tokens are no padding, where the call says it.
    """

    where: str
    arguments: dict[str, Any]
    real: Bools | None

    def run(self, model: Model) -> Any:
        """What `model` gives for it.

        Raises
        ------
        TypeError, ValueError
            Naming the batch.
        """
        try:
            if "sentences" in self.arguments and isinstance(model, TextEncoder):
                return model.encode(**self.arguments)
            return model(**self.arguments)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.where}: {error}") from None

    def counted(self, rows: Any) -> Any:
        """Those of `rows` of tokens that are no padding."""
        return rows if self.real is None or len(rows) != len(self.real) else rows[self.real]


def encoder_of(model: Model) -> TransformerEncoder:
    """The layers of a model."""
    return model if isinstance(model, TransformerEncoder) else model.encoder


def on(ops: Ops[Any], model: _M) -> _M:
    """`model` with calls whose operations `ops` computes."""
    twin = object.__new__(type(model))
    vars(twin).update(vars(model), forward=lambda _, *arguments: model.forward(ops, *arguments))
    return twin


def read_model_calls(model: Model, batches: Iterable[ModelBatch], description: str) -> Iterator[ModelCall]:
    """Every batch as a call, under a progress bar. Batches are as ``quant.calibrate`` takes them.

    Raises
    ------
    TypeError, ValueError
        Naming the batch.
    """
    check_batches(batches)
    for i, batch in enumerate(track(batches, description)):
        yield _read(model, batch, f"batches[{i}]")


def _read(model: Model, batch: Any, where: str) -> ModelCall:
    names = next(names for kind, names in ARGUMENTS.items() if isinstance(model, kind))
    if isinstance(model, TextEncoder):
        if isinstance(batch, str):
            raise TypeError(f"{where} must be a list of texts, or token ids; got a text alone: put it into a list")
        if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], str):
            return ModelCall(where, {"sentences": batch}, None)
    # an opened .npz has keys, too, but is no Mapping in every NumPy
    arguments = dict(batch) if hasattr(batch, "keys") else {names[0]: batch}
    if arguments.get(names[0]) is None or set(arguments) - set(names):
        others = f" and any of {', '.join(map(repr, names[1:]))}" if names[1:] else ""
        raise ValueError(f"{where} must be what {type(model).__name__} is called with, or a mapping with "
                         f"{names[0]!r}{others}; got {sorted(map(str, arguments))}")
    if isinstance(model, (TransformerEncoder, ImageEncoder)):
        given = arguments[names[0]]
        for array in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(array, np.ndarray) and array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{where} holds NaN or infinite values")
    mask = next((arguments[name] for name in _MASKS if arguments.get(name) is not None), None)
    return ModelCall(where, arguments, None if mask is None else np.asarray(mask).astype(bool).ravel())
