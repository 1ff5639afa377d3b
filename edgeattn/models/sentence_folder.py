"""What stands beside a text encoder's weights: its tokenizer, how texts are cut, and what becomes of their tokens."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from edgeattn.files.paths import as_path, listed, reading
from edgeattn.models.checkpoint import read_json

if TYPE_CHECKING:
    import pathlib
    from typing import Any

    from edgeattn.types import Path

MODULES = "modules.json"
_UNLIMITED = 2**24  # a model_max_length beyond it says that there is none
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last"}


def folder_of(path_or_model: object, tokenizer: Path | None) -> pathlib.Path | None:
    """The folder that says how texts become tokens: the one given, the model's, the one around that; or None."""
    if tokenizer is not None:
        folder = as_path(tokenizer)
        if not folder.is_dir():
            raise NotADirectoryError(f"tokenizer must be a folder with a tokenizer.json, got {str(folder)!r}")
        return folder
    if not isinstance(path_or_model, (str, os.PathLike)):
        return None
    folder = as_path(path_or_model).absolute().parent
    places = [folder.parent] if (folder.parent / MODULES).is_file() else []
    return next((each for each in [folder, *places] if (each / MODULES).is_file()
                 or (each / "tokenizer.json").is_file()), None)


def options_beside(folder: pathlib.Path, modules: dict[str, dict[str, Any]], width: int) -> dict[str, Any]:
    """Arguments of a `TextEncoder` that its folder says; `modules` are the folder's."""
    inner = folder / modules.get("Transformer", {}).get("path", "")
    tokenizer, truncation = _tokenizer(inner / "tokenizer.json")
    settings = inner / "sentence_bert_config.json"
    options = read_json(settings) if settings.is_file() else {}
    return {"pooling": _pooling(folder, modules, width), "normalize": "Normalize" in modules, "tokenizer": tokenizer,
            "max_length": _max_length(inner, options, truncation), "lower_case": options.get("do_lower_case") is True}


def modules_of(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The modules of a sentence-transformers folder by their kinds, {} for another folder."""
    path = folder / MODULES
    if not path.is_file():
        return {}
    modules = {}
    for module in read_json(path, list):
        kind = str(module.get("type")).rpartition(".")[2] if isinstance(module, dict) else str(module)[:100]
        where = module.get("path") if isinstance(module, dict) else None
        if kind not in ("Transformer", "Pooling", "Normalize") or kind in modules or not isinstance(where, str) or (
                where.startswith(("/", "\\")) or ".." in where):
            raise ValueError(f"{path} must name one Transformer, one Pooling and at most one Normalize, in folders "
                             f"inside this one, got {kind!r} in {str(where)[:100]!r}")
        modules[kind] = module
    if "Transformer" not in modules:
        raise ValueError(f"{path} must name one Transformer, got {listed(modules) or 'no module'}; remove the file if "
                         "the model is in this folder itself")
    prompts = folder / "config_sentence_transformers.json"
    default = read_json(prompts).get("default_prompt_name") if prompts.is_file() else None
    if default is not None:
        raise ValueError(f"{prompts}: default_prompt_name must be null, got {str(default)[:100]!r}: put the prompt "
                         "before the sentences yourself")
    return modules


def _pooling(folder: pathlib.Path, modules: dict[str, dict[str, Any]], width: int) -> Any:
    if "Pooling" not in modules:
        return "mean"
    path = folder / modules["Pooling"]["path"] / "config.json"
    config = read_json(path)
    modes = [config["pooling_mode"]] if "pooling_mode" in config else [
        _POOLINGS.get(name, name) for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    modes = ["last" if mode == "lasttoken" else mode for mode in modes]
    if len(modes) != 1 or modes[0] not in _POOLINGS.values():
        raise ValueError(f"{path}: pooling must be one of {', '.join(_POOLINGS.values())}, got {str(modes)[:100]}")
    size = config.get("embedding_dimension", config.get("word_embedding_dimension", width))
    if size != width:
        raise ValueError(f"{path}: the dimension must be the model's {width}, got {str(size)[:100]}")
    return modes[0]


def _tokenizer(path: pathlib.Path) -> tuple[str | None, dict[str, Any]]:
    """The text of a tokenizer.json, and how it cuts; None and {} where there is none."""
    if not path.is_file():
        return None, {}
    with open(path, "rb") as file, reading(path, "tokenizer.json"):
        text = file.read().decode()
        content = json.loads(text)
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict) or "vocab" not in model:
            raise ValueError("it must hold an object whose model is an object with a vocab")
        truncation = content.get("truncation")
        if not isinstance(truncation, (dict, type(None))):
            raise ValueError(f"truncation must be null or an object, got {str(truncation)[:100]}")
        return text, truncation or {}


def _max_length(folder: pathlib.Path, options: dict[str, Any], truncation: dict[str, Any]) -> int | None:
    """Where texts are cut: what sentence-transformers' file says, or the tokenizer's two."""
    where, longest = "sentence_bert_config.json: max_seq_length", options.get("max_seq_length")
    settings = folder / "tokenizer_config.json"
    if longest is None and settings.is_file():
        where, longest = "tokenizer_config.json: model_max_length", read_json(settings).get("model_max_length")
        longest = None if isinstance(longest, (int, float)) and longest > _UNLIMITED else longest
    if longest is None:
        where, longest = "tokenizer.json: truncation.max_length", truncation.get("max_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ValueError(f"{folder / where} must be a positive integer, got {str(longest)[:100]}")
    return longest
