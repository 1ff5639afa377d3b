"""What the commands of `quant` read: LAYER with the options that say how, and DATA."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

from edgeattn.cli_open import open_model
from edgeattn.cli_parser import PARTS
from edgeattn.files.paths import reading
from edgeattn.files.tensor_files import read_npy, read_tensors
from edgeattn.layers import MultiHeadAttention, TransformerEncoder
from edgeattn.models import ImageEncoder, TextEncoder

# Of a .npy file: the results are the same however it is cut, and the (B, H, L, S) scores shall fit memory.
ROWS_AT_ONCE = 32
KERAS = (".keras", ".h5")
path_argument = click.Path(path_type=Path)
part_option = click.option("--part", type=click.Choice(PARTS),
                           help="Of a folder: text or vision, a half of CLIP and its kind; encoder, the layers alone.")


class Source(NamedTuple):
    """LAYER, and the options that say how it is read; None where one was not given."""

    path: Path
    num_heads: int | None
    prefix: str | None
    torch_prefix: str | None
    bert_prefix: str | None
    torch_encoder: str | None
    activation: str | None
    norm_first: bool
    node: str | None
    part: str | None

    def read(self, scheme: str | None = None, arithmetic: str | None = None):
        """The layer, encoder or model; of an .onnx file with quantizers as `scheme` says."""
        path = self.path
        given = {f"--{name.replace('_', '-')}": value for name, value in self._asdict().items()
                 if name.endswith("prefix") or name == "torch_encoder"}
        given = {name: value for name, value in given.items() if value is not None}
        if self.torch_encoder is None and (self.activation is not None or self.norm_first):
            raise click.UsageError("--activation and --norm-first need --torch-encoder: other files say what they are")
        if (scheme or arithmetic) and (given or self.node is not None or path.suffix in KERAS):
            raise click.UsageError(f"--{'scheme' if scheme else 'arithmetic'} must be left out for what is read as "
                                   f"float32; got {path}")
        if self.part is not None and (given or self.node is not None):
            raise click.UsageError(f"--part needs the folder of a model; got {path}")
        if self.node is not None:
            return self._of_node(given)
        if not given:
            if self.num_heads is not None:
                raise click.UsageError("--num-heads needs --prefix or --torch-prefix: a saved layer knows its heads")
            if path.suffix == ".npz":
                raise click.UsageError(f"{path} is a checkpoint: give --prefix or --torch-prefix, and --num-heads")
            if path.suffix in KERAS:
                return MultiHeadAttention.from_keras(path)
            return open_model(path, scheme=scheme, arithmetic=arithmetic, part=self.part)
        if len(given) > 1:
            raise click.UsageError(f"{' and '.join(given)} exclude each other")
        if self.num_heads is None:
            raise click.UsageError("--num-heads is required for a checkpoint, which does not name it")
        if self.torch_encoder is not None:
            return TransformerEncoder.from_torch(path, self.num_heads, prefix=self.torch_encoder,
                                                 activation=self.activation or "relu", norm_first=self.norm_first)
        if self.prefix is not None:
            return MultiHeadAttention.from_checkpoint(path, self.prefix, self.num_heads)
        if self.torch_prefix is not None:
            return MultiHeadAttention.from_torch(path, self.num_heads, self.torch_prefix)
        return MultiHeadAttention.from_bert(path, self.bert_prefix, self.num_heads)

    def _of_node(self, given):
        if given or self.num_heads is not None:
            raise click.UsageError(f"--node and {', '.join(given) or '--num-heads'} exclude each other")
        if self.path.suffix == ".onnx":
            return MultiHeadAttention.from_onnx(self.path, self.node)
        if self.path.suffix in KERAS:
            return MultiHeadAttention.from_keras(self.path, self.node)
        raise click.UsageError(f"--node needs an .onnx, .keras or .h5 file; got {self.path}")


def layer_options(command):
    """Give a command LAYER and the options that say how to read it, as one `source`."""
    @functools.wraps(command)
    def run(layer, **given):
        return command(source=Source(layer, **{name: given.pop(name) for name in Source._fields[1:]}), **given)

    for option in (
        part_option,
        click.option("--node", help="LAYER is an .onnx, .keras or .h5 file; the name of its attention node or layer."),
        click.option("--norm-first", is_flag=True, help="Of --torch-encoder: what its layers were made with."),
        click.option("--activation", help="Of --torch-encoder: what its layers were made with; relu unless given."),
        click.option("--torch-encoder", metavar="PREFIX",
                     help='LAYER holds a torch.nn.TransformerEncoder; what stands before "layers.0.", "" if nothing '
                          "does."),
        click.option("--num-heads", type=int, help="Number of heads in the checkpoint."),
        click.option("--bert-prefix", help='LAYER is a BERT checkpoint; what stands before "self.query.weight".'),
        click.option("--prefix", help="LAYER is a checkpoint whose names tell its family, BERT, ViT, CLIP, T5, Llama, "
                                      "GPT-2 ...; what stands before one attention layer's."),
        click.option("--torch-prefix", help="LAYER holds a torch.nn.MultiheadAttention; what stands before "
                                            '"in_proj_weight", "" if nothing does.'),
        click.argument("layer", type=path_argument),
    ):
        run = option(run)
    return run


def with_file_names(layer, data: tuple[Path, ...], run):
    """``run(batches)``, with the names of files in its error messages where they say ``batches[i]``."""
    names = []

    def batches():
        for path in data:
            for batch in read_batches(layer, path):
                names.append(path)
                yield batch

    try:
        return run(batches())
    except (TypeError, ValueError) as error:
        raise type(error)(re.sub(r"batches\[(\d+)\]", lambda match: str(names[int(match[1])]), str(error))) from None


def read_batches(layer, path: Path) -> Iterator[np.ndarray | dict | list]:
    """The batches for ``layer`` of one DATA file."""
    if path.suffix == ".npy":
        array = read_npy(path)
        axes = 2 if isinstance(layer, TextEncoder) else 4 - layer.spectrogram if isinstance(layer, ImageEncoder) else 3
        yield from pieces_of(array) if array.ndim == axes else [array]
    elif path.suffix == ".npz":
        tensors, _ = read_tensors(path)
        # single values: is_causal and causal_alignment
        arrays = {name: tensor.read() for name, tensor in tensors.items()}
        yield {name: array.item() if array.ndim == 0 else array for name, array in arrays.items()}
    elif path.suffix == ".txt" and isinstance(layer, TextEncoder):
        with open(path, "rb") as file, reading(path, ".txt file of UTF-8"):
            lines = file.read().decode("utf-8-sig").split("\n")
        yield from pieces_of([line.rstrip("\r") for line in lines if line.strip()])
    else:
        texts = " or .txt files" if isinstance(layer, TextEncoder) else " files"
        raise ValueError(f"DATA must be .npy{',' if texts != ' files' else ' or'} .npz{texts}; got {path}")


def pieces_of(rows):
    """At most ROWS_AT_ONCE rows at a time; what has none is one piece."""
    return [rows[start:start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)] or [rows]
