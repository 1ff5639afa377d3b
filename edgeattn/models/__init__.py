"""Whole models, from the folders that transformers and sentence-transformers save."""

from edgeattn.models.image_encoder import ImageEncoder
from edgeattn.models.pretrained import from_pretrained
from edgeattn.models.text_encoder import TextEncoder

__all__ = ["ImageEncoder", "TextEncoder", "from_pretrained"]
