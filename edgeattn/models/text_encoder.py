"""Encoders of texts: from token ids or sentences to vectors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast, get_args

import numpy as np

from edgeattn.checks import as_array, count, flag, is_one_of
from edgeattn.device import Placeable
from edgeattn.files import checkpoints
from edgeattn.files.paths import named, reading, reason
from edgeattn.hints import hinted
from edgeattn.layers.embedding import Embedding
from edgeattn.layers.encoder import TransformerEncoder
from edgeattn.layers.linear import Linear
from edgeattn.layers.norm import norm_of
from edgeattn.layers.ragged import gathered, runs_of, spread
from edgeattn.layers.state import Stored
from edgeattn.ops import Pooling
from edgeattn.runtime.plan_cache import planned

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, SupportsIndex

    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import Self

    from edgeattn.kv_cache import KVCache
    from edgeattn.ops import Ops, Sequences, T
    from edgeattn.types import Arithmetic, Flag, Float32s, OnnxModel, OnnxScheme, Path

_POOLINGS = get_args(Pooling)


class TextEncoder(Placeable, Stored):
    """An embedding and an encoder's layers, with the tokenizer and the pooling that make one vector of a text.

    Parameters
    ----------
    embedding : Embedding
        Of token ids, positions and types.
    encoder : TransformerEncoder
    pooling : {"mean", "cls", "max", "last"}
        What `encode` makes of the vectors of a text's tokens.
    normalize : bool
        Whether `encode` brings the result to length 1.
    is_causal : bool
        A token sees none after it, as in GPT-2.
    tokenizer : str, optional
        The text of a tokenizer.json.
    max_length : int, optional
        Texts are cut after so many tokens; unless given, those too long for the positions are refused.
    lower_case : bool
        Whether texts become lower case first.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    def __init__(self, embedding: Embedding, encoder: TransformerEncoder, *, pooling: Pooling = "mean",
                 normalize: Flag = False, is_causal: Flag = False, tokenizer: str | None = None,
                 max_length: SupportsIndex | None = None, lower_case: Flag = False):
        if not isinstance(embedding, Embedding) or not isinstance(encoder, TransformerEncoder):
            raise TypeError("embedding must be an edgeattn.layers.Embedding and encoder an "
                            f"edgeattn.TransformerEncoder, got {type(embedding).__name__} and {type(encoder).__name__}")
        if embedding.embed_dim != encoder.embed_dim:
            raise ValueError(f"embedding must give the encoder's E = {encoder.embed_dim}, got {embedding.embed_dim}")
        if not is_one_of(pooling, _POOLINGS):
            raise ValueError(f"pooling must be one of {', '.join(_POOLINGS)}, got {pooling!r}")
        if tokenizer is not None and not isinstance(tokenizer, str):
            raise TypeError(f"tokenizer must be the text of a tokenizer.json, or None, got {type(tokenizer).__name__}")
        self.embedding, self.encoder, self.pooling = embedding, encoder, pooling
        self.normalize, self.is_causal = flag("normalize", normalize), flag("is_causal", is_causal)
        self.tokenizer, self.lower_case = tokenizer, flag("lower_case", lower_case)
        self.max_length = None if max_length is None else count("max_length", max_length)

    @classmethod
    @hinted
    def from_onnx(cls, path_or_model: Path | OnnxModel, *, tokenizer: Path | None = None,
                  scheme: OnnxScheme = "float32", arithmetic: Arithmetic | None = None) -> Self:
        """The text encoder of an ONNX model: BERT, DistilBERT, RoBERTa and the like, whatever exported it.

        The layers are found as `TransformerEncoder.from_onnx` finds them; in front of them embeddings of token ids, of
        positions and of types are gathered and added. Pooling is the graph's, where it has one, or that of a folder of
        sentence-transformers; "mean" where neither says. Heads behind the layers are left out.

        Parameters
        ----------
        path_or_model : path or onnx.ModelProto
            Needs the onnx package.
        tokenizer : path, optional
            Folder with tokenizer.json and what sentence-transformers puts beside it. Unless given it is looked for in
            the model's folder and the one around that.
        scheme : {"float32", "static"}
        arithmetic : str, optional
            As of `TransformerEncoder.from_onnx`; the embedding is float32 in both.

        Returns
        -------
        TextEncoder

        Raises
        ------
        ImportError
            Where the package onnx is missing.
        OSError
            Where a file is missing or cannot be read.
        ValueError
            Naming the file, and the node where something else stands than in a text encoder.
        """
        from edgeattn.models.sentence_folder import folder_of, modules_of, options_beside

        folder = folder_of(path_or_model, tokenizer)
        with named(path_or_model):
            found = checkpoints.onnx_text(path_or_model, checkpoints.kernel_set_of(scheme, arithmetic))
            projection = None if found.projection is None else Linear(*found.projection)
            norm: Any = norm_of(found.norm)
            embedding = Embedding(found.tokens, found.positions, found.types, norm=norm,
                                  projection=projection, padding_id=found.padding_id)
            encoder = TransformerEncoder.from_found(found.encoder)
        options = {} if folder is None else options_beside(folder, modules_of(folder), encoder.embed_dim)
        if found.pooling is not None:
            options |= {"pooling": found.pooling, "normalize": found.normalize}
        return cls(embedding, encoder, is_causal=found.is_causal, **options)

    @property
    def embed_dim(self) -> int:
        """E."""
        return self.encoder.embed_dim

    def forward(self, ops: Ops[T], ids: NDArray[np.int64], positions: NDArray[np.int64], types: NDArray[np.int64],
                sequences: Sequence[Sequences], name: str = "") -> T:
        """Ids, positions and types of tokens (tokens,) -> (tokens, E)."""
        x = self.embedding.forward(ops, ids, positions, types, name + "embedding.")
        return self.encoder.forward(ops, x, sequences, name + "encoder.")

    def __call__(self, ids: ArrayLike | Sequence[ArrayLike], attention_mask: ArrayLike | None = None, *,
                 token_type_ids: ArrayLike | Sequence[ArrayLike] | None = None,
                 kv_cache: Sequence[KVCache] | None = None) -> Float32s:
        """The last hidden state of each token.

        Parameters
        ----------
        ids : (B, L) int array, or list of lists of ints
            Sequences in a list may differ in length; nothing is computed for padding.
        attention_mask : (B, L) array of 0 and 1, or bool, optional
            1 = a real token.
        token_type_ids : like `ids`, optional
            0 unless given.
        kv_cache : list of KVCache, optional
            See `TransformerEncoder`; `model.encoder.make_caches` makes them.

        Returns
        -------
        (B, L, E) float32 array
            Rows of padding are zeros; L is the longest of a list.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        from edgeattn.executors.compiled import CompiledOps

        ids, lengths = _id_array("ids", ids)
        self._check_ids(ids, "ids", len(self.embedding.token_weight), "vocabulary")
        if token_type_ids is None:
            types = np.zeros(ids.shape, np.int64)
        else:
            types, type_lengths = _id_array("token_type_ids", token_type_ids)
            if types.shape != ids.shape or type_lengths != lengths:
                raise ValueError(f"token_type_ids must have the shape of ids, {_shape(ids, lengths)}, got "
                                 f"{_shape(types, type_lengths)}")
            table = self.embedding.type_weight
            self._check_ids(types, "token_type_ids", 1 if table is None else len(table), "token types")
        real, lengths = _real_tokens(ids, lengths, attention_mask)
        held = _held(kv_cache)
        if lengths is not None and kv_cache is not None:
            name = "ids" if attention_mask is None else "attention_mask"
            raise ValueError(f"{name} must be of sequences of one length with kv_cache, got lengths "
                             f"{str(lengths)[:100]}; decode those of each length with caches of their own")
        if held and real is not None:
            raise ValueError("attention_mask must be left out, or of 1 alone, with a kv_cache that holds tokens, "
                             "got a 0")
        self._check_length(held + (ids.shape[1] if lengths is None else max(lengths, default=0)))
        options: dict[str, Any] = {"lengths": lengths, "is_causal": self.is_causal, "kv_cache": kv_cache}
        if lengths is None and real is not None:
            options["key_padding_mask"] = real
        positions = self.embedding.positions(ids, held)
        runs, shape = None if lengths is None else runs_of(lengths), (*ids.shape, self.embed_dim)
        tokens, places, kinds = (each.ravel() if runs is None else gathered(each, runs) if runs else each[:0, 0]
                                 for each in (ids, positions, types))
        # A forward of its own, as on a GPU or where a calibration looks on, is more than the encoder's call.
        own = "forward" in vars(self) or type(self).forward is not TextEncoder.forward
        result: Any
        if tokens.size and not own:
            # As a call of the encoder, which keeps what such calls are.
            x = self.embedding.computed(tokens, places, kinds)
            if lengths is not None:
                result = self.encoder.encode_rows(x, ids.shape, lengths, is_causal=self.is_causal)
            else:
                result = self.encoder(x.reshape(shape), key_padding_mask=real, is_causal=self.is_causal,
                                      kv_cache=kv_cache)
        else:
            with self.encoder.prepared(ids.shape, **options) as sequences:
                result = (self.forward(CompiledOps(), tokens, places, kinds, sequences) if tokens.size
                          else np.zeros((0, self.embed_dim), np.float32))
        if runs is not None:
            return spread(result, runs, shape)
        result = result.reshape(shape)
        if real is not None:
            result[~real] = 0
        return cast("Float32s", result)

    def encode(self, sentences: Iterable[str], batch_size: SupportsIndex = 32, *, normalize: Flag | None = None,
               show_progress: Flag = False) -> Float32s:
        """One vector per sentence.

        Parameters
        ----------
        sentences : list, or other iterable, of str
        batch_size : int
            Sentences computed at a time, those of similar length together. A sentence's vector is the same bit for bit
            in every batch.
        normalize : bool, optional
            Whether vectors are brought to length 1; as the model's folder says unless given.
        show_progress : bool
            Tell at stderr how many are done.

        Returns
        -------
        (n, E) float32 array
            In the order of `sentences`.

        Raises
        ------
        TypeError, ValueError
            Naming the sentence that is no text, gives no token, or is too long where nothing says how to cut it.
        ImportError
            Where the package tokenizers is missing.
        """
        from edgeattn.executors.compiled import CompiledOps

        sentences = _sentences(sentences)
        size, normalize = count("batch_size", batch_size), self.normalize if normalize is None else flag(
            "normalize", normalize)
        texts = [text.lower() for text in sentences] if self.lower_case else sentences
        encoded, entries = self._tokens(texts), len(self.embedding.token_weight)
        for i, tokens in enumerate(encoded):
            if not tokens.ids:
                raise ValueError(f"sentences[{i}] gives no token: {sentences[i][:50]!r}; leave it out")
            self._check_length(len(tokens.ids), f"sentences[{i}]")
            if max(tokens.ids) >= entries:
                raise ValueError(f"sentences[{i}] gives token {max(tokens.ids)}, and the model's vocabulary has "
                                 f"{entries}; use the tokenizer.json that was saved with the model")
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
        result = np.zeros((len(encoded), self.embed_dim), np.float32)
        for first in range(0, len(order), size):
            some = order[first : first + size]
            hidden = self([encoded[i].ids for i in some], token_type_ids=[encoded[i].type_ids for i in some])
            lengths = [len(encoded[i].ids) for i in some]
            rows = hidden[np.arange(hidden.shape[1]) < np.array(lengths)[:, None]]
            result[some] = CompiledOps().pool(rows, lengths, self.pooling, "pooled")
            if flag("show_progress", show_progress):
                print(f"\redgeattn: {min(first + size, len(order))} of {len(order)} sentences", end="", file=sys.stderr)
        if show_progress and order:
            print(file=sys.stderr)
        if normalize:
            result /= np.maximum(np.sqrt((result * result).sum(axis=1, keepdims=True)), np.float32(1e-12))
        return result

    def _tokens(self, texts: list[str]) -> Any:
        """What the tokenizer makes of texts."""
        tokenizer = self._tokenizer
        try:
            return tokenizer.encode_batch(texts)
        except BaseException as error:  # it is written in Rust, whose panics are no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the tokenizer is not a whole tokenizer.json: {reason(error)}; use the one that was "
                             "saved with the model") from error

    @functools.cached_property
    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("this TextEncoder has no tokenizer: pass token ids to the model itself, or put a "
                             "tokenizer.json into its folder")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError("encode needs the package tokenizers, which cuts sentences into tokens: "
                              "pip install 'edgeattn[text]'") from error
        with reading("the tokenizer", "tokenizer.json"):
            made = Tokenizer.from_str(self.tokenizer)
        made.no_padding()
        made.no_truncation()
        if self.max_length is not None:
            made.enable_truncation(self.max_length)
        return made

    def _check_ids(self, ids: NDArray[np.int64], name: str, entries: int, what: str) -> None:
        if ids.size and np.maximum.reduce(ids.view(np.uint64), None) >= entries:  # where negative ones are large
            row, column = np.argwhere((ids < 0) | (ids >= entries))[0]
            raise ValueError(f"{name} must lie between 0 and {entries - 1}, the model's {what}, got "
                             f"{ids[row, column]} in sequence {row} at token {column}; is the tokenizer this model's?")

    def _check_length(self, tokens: int, name: str = "ids") -> None:
        longest = self.embedding.longest
        if longest is not None and tokens > longest:
            raise ValueError(f"{name} must have at most the model's {longest} positions, got {tokens} tokens; cut the "
                             "text, or give the TextEncoder a max_length")

    def __repr__(self) -> str:
        return (f"TextEncoder({len(self.embedding.token_weight)} tokens, {self.encoder}, pooling={self.pooling!r}, "
                f"normalize={self.normalize}, is_causal={self.is_causal}, max_length={self.max_length})")


def _id_array(name: str, ids: Any) -> tuple[NDArray[np.int64], list[int] | None]:
    """Ids (B, L) as int64; of a list of sequences that differ in length, padded with zeros, the lengths too."""
    lengths = None
    if isinstance(ids, str) or isinstance(ids, (list, tuple)) and any(isinstance(each, str) for each in ids):
        raise TypeError(f"{name} must be a list of lists of integers, or a (B, L) integer array, got texts, which "
                        "encode takes")
    if isinstance(ids, (list, tuple)):
        rows = [as_array(f"{name}[{i}]", row) for i, row in enumerate(ids)]
        if any(row.ndim != 1 or row.size and row.dtype.kind not in "iu" for row in rows):
            raise TypeError(f"{name} must be a list of lists of integers, or a (B, L) integer array")
        lengths = [len(row) for row in rows]
        array = np.zeros((len(rows), max(lengths, default=0)), np.int64)
        for padded, row in zip(array, rows, strict=True):
            padded[: len(row)] = row
        return array, lengths if len(set(lengths)) > 1 else None
    array = as_array(name, ids)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an integer array, got dtype {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{name} must be (B, L), got shape {array.shape}")
    return np.ascontiguousarray(array, np.int64), lengths


def _shape(ids: NDArray[np.int64], lengths: list[int] | None) -> str:
    return str(ids.shape) if lengths is None else f"a list of lengths {str(lengths)[:100]}"


def _held(kv_cache: Any) -> int:
    """How many tokens the caches hold."""
    if kv_cache is None:
        return 0
    from edgeattn.kv_cache import KVCache

    listed = isinstance(kv_cache, (list, tuple))
    caches = [cache for cache in (kv_cache if listed else ()) if isinstance(cache, KVCache)]
    if not listed or len(caches) != len(kv_cache):
        raise TypeError("kv_cache must be a list of edgeattn.KVCache, one per layer, as model.encoder.make_caches "
                        f"gives it, got {kv_cache!s:.100}")
    return caches[0].length if caches else 0


def _sentences(sentences: Iterable[str]) -> list[str]:
    """The texts in their order; what may be gone through once is gone through once."""
    if isinstance(sentences, (str, bytes, set, frozenset, Mapping)) or not isinstance(sentences, Iterable):
        raise TypeError("sentences must be a list of strings, got "
                        f"{'a string; pass [text]' if isinstance(sentences, str) else type(sentences).__name__}")
    texts = list(sentences)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"sentences must be a list of strings, got {type(text).__name__} as sentences[{i}]")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"sentences[{i}] must be text that UTF-8 can hold, got a lone surrogate in {text[:50]!r}; "
                             "read it with errors='replace', or leave it out") from None
    return texts


def _real_tokens(ids: NDArray[np.int64], lengths: list[int] | None, attention_mask: ArrayLike | None
                 ) -> tuple[NDArray[np.bool_] | None, list[int] | None]:
    """Which tokens are real (B, L), and the lengths of sequences where all others stand at their ends.

    None where all are real; and for lengths where others stand elsewhere.
    """
    if attention_mask is None:
        if lengths is None:
            return None, None
        return np.arange(ids.shape[1]) < np.array(lengths, np.int64)[:, None], lengths
    if lengths is not None:
        raise ValueError("attention_mask must be left out where ids are a list of sequences that differ in length, "
                         "got both")
    mask = as_array("attention_mask", attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape of ids, {ids.shape}, got {mask.shape}")
    if mask.dtype.kind not in "biuf":
        raise ValueError(_OF_0_AND_1)
    if mask.nbytes > _FEW:
        return _told_by(mask)
    return planned(_told_by_content, mask.dtype, mask.shape, mask.tobytes())


_FEW = 4096  # bytes of a mask that is known by its content
_OF_0_AND_1 = "attention_mask must be of 0 and 1, 1 = a real token, got other values"


def _told_by_content(dtype: np.dtype[Any], shape: tuple[int, ...], content: bytes
                     ) -> tuple[NDArray[np.bool_] | None, list[int] | None]:
    return _told_by(np.frombuffer(content, dtype).reshape(shape))


def _told_by(mask: NDArray[Any]) -> tuple[NDArray[np.bool_] | None, list[int] | None]:
    """What `_real_tokens` gives of a mask of numbers; the array is read-only."""
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(_OF_0_AND_1)
    real = mask != 0
    if real.all():
        return None, None
    real.flags.writeable = False
    counts = real.sum(axis=1)
    ends = (real == (np.arange(mask.shape[1]) < counts[:, None])).all()
    return real, counts.tolist() if ends else None
