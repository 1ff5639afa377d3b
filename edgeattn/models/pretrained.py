"""Models from folders that transformers or sentence-transformers saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from edgeattn.checks import is_one_of
from edgeattn.files.paths import as_path, named
from edgeattn.hints import hinted
from edgeattn.models.checkpoint import Checkpoint
from edgeattn.models.families import encoder, family_of, patch_embedding, text_embedding
from edgeattn.models.image_encoder import ImageEncoder
from edgeattn.models.sentence_folder import modules_of, options_beside
from edgeattn.models.text_encoder import TextEncoder

if TYPE_CHECKING:
    from edgeattn.layers import TransformerEncoder
    from edgeattn.types import ModelPart, Path


PARTS = ("text", "vision", "encoder")


@overload
def from_pretrained(folder: Path, *, part: Literal["text"]) -> TextEncoder: ...


@overload
def from_pretrained(folder: Path, *, part: Literal["vision"]) -> ImageEncoder: ...


@overload
def from_pretrained(folder: Path, *, part: Literal["encoder"]) -> TransformerEncoder: ...


@overload
def from_pretrained(folder: Path, *, part: None = None) -> TextEncoder | ImageEncoder: ...


@hinted
def from_pretrained(folder: Path, *, part: ModelPart | None = None) -> Any:
    """The model in a folder, as `save_pretrained` of transformers or sentence-transformers writes it.

    docs/encoders.md has the table of families. Everything is computed in float32.

    Parameters
    ----------
    folder : str or path
        With config.json and model.safetensors, or model.safetensors.index.json and its parts; for
        `TextEncoder.encode` with tokenizer.json too, and where there is a modules.json with what that names.
    part : {"text", "vision", "encoder"}, optional
        Which half of a model of texts and images, such as CLIP; or the layers alone, whatever stands before them.

    Returns
    -------
    TextEncoder or ImageEncoder; TransformerEncoder of the layers alone

    Raises
    ------
    OSError
        Where a file is missing or cannot be read.
    ValueError
        Naming the file, and the option or tensor in it, for a damaged file, a family or option that is not supported,
        tensors that are missing, mis-shaped or left over, and weights that are not finite.
    """
    folder = as_path(folder)
    if part is not None and not is_one_of(part, PARTS):
        raise ValueError(f"part must be one of {', '.join(map(repr, PARTS))}, or left out, got {part!r}")
    if not folder.is_dir():
        raise NotADirectoryError(f"folder must be one with config.json and model.safetensors, got {str(folder)!r}; "
                                 "models are read from a disk, huggingface-cli download NAME fetches one")
    modules = modules_of(folder)
    inner = folder / modules.get("Transformer", {}).get("path", "")
    checkpoint = Checkpoint(inner)
    with named(inner):
        family = family_of(checkpoint, part)
        if part == "encoder":
            return encoder(checkpoint, family, alone=True)
        if family.patches:
            patches = patch_embedding(checkpoint, family)
            return ImageEncoder(patches, encoder(checkpoint, family), spectrogram="num_mel_bins" in checkpoint.config)
        embedding = text_embedding(checkpoint, family)
        layers = encoder(checkpoint, family)
    options = options_beside(folder, modules, layers.embed_dim)
    if family.pooling and "Pooling" not in modules:
        options["pooling"] = family.pooling
    return TextEncoder(embedding, layers, is_causal=family.is_causal, **options)
