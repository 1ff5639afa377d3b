"""Whole models, from the folders that transformers and sentence-transformers save."""

from edgeattn.lazy import dir_of, names_from

# A name's module is imported when the name is asked for: one kind of layer does not bring in all others.
_HOMES = {
    "ImageEncoder": "image_encoder",
    "TextEncoder": "text_encoder",
    "from_pretrained": "pretrained",
}

__all__ = list(_HOMES)

TYPE_CHECKING = False  # what type checkers take for True; tests/test_packaging.py holds the two lists together
if TYPE_CHECKING:
    from edgeattn.models.image_encoder import ImageEncoder as ImageEncoder
    from edgeattn.models.pretrained import from_pretrained as from_pretrained
    from edgeattn.models.text_encoder import TextEncoder as TextEncoder
else:
    __getattr__ = names_from(__name__, _HOMES)
    __dir__ = dir_of(__name__, _HOMES)
