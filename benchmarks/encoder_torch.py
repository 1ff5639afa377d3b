"""The encoder that peers are made of: a torch module that computes what edgeattn does, from the same weights."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence

import numpy as np
import torch

import edgeattn

BLOCKED = -10000.0  # added to scores of padding, as transformers did for long


class Block(torch.nn.Module):
    """An encoder layer in the operations of transformers' BERT, which exporters and their optimizers know."""

    def __init__(self, layer: edgeattn.TransformerEncoderLayer):
        super().__init__()
        attention, feed_forward = layer.attention, layer.feed_forward
        self.heads, self.size, self.norm_first = attention.num_heads, attention.head_dim, layer.norm_first
        for name in "qkv":
            setattr(self, name, linear(getattr(attention, f"{name}_weight"), getattr(attention, f"{name}_bias")))
        self.out = linear(attention.out_weight, attention.out_bias)
        self.linear1, self.linear2 = (linear(each.weight, each.bias)
                                      for each in (feed_forward.linear1, feed_forward.linear2))
        self.norm1, self.norm2 = norm(layer.norm1), norm(layer.norm2)
        self.fused = True  # what torch itself runs fastest; it is exported operation by operation

    def attend(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Multi-head attention of x (B, L, E), with a bias (B, 1, 1, L)."""
        split = x.shape[0], x.shape[1], self.heads, self.size
        q, k, v = (map_(x).view(split).permute(0, 2, 1, 3) for map_ in (self.q, self.k, self.v))
        if self.fused:
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            scores = torch.matmul(q, k.transpose(-1, -2)) / self.size**0.5 + bias
            y = torch.matmul(torch.softmax(scores, dim=-1), v)
        y = y.permute(0, 2, 1, 3).contiguous()
        return self.out(y.view(x.shape[0], x.shape[1], self.heads * self.size))

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The layer, residuals and norms as it has them."""
        if self.norm_first:
            x = x + self.attend(self.norm1(x), bias)
            return x + self.feed(self.norm2(x))
        x = self.norm1(self.attend(x, bias) + x)
        return self.norm2(self.feed(x) + x)

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        """The feed-forward network."""
        return self.linear2(torch.nn.functional.gelu(self.linear1(x)))


class Encoder(torch.nn.Module):
    """A TextEncoder of BERT's kind called with ids, or a TransformerEncoder called with features; a mask beside."""

    def __init__(self, model: edgeattn.TextEncoder | edgeattn.TransformerEncoder):
        super().__init__()
        embedding = getattr(model, "embedding", None)
        encoder = model if embedding is None else model.encoder
        self.tables = None
        if embedding is not None:
            tables = embedding.token_weight, embedding.position_weight, embedding.type_weight
            self.tables = torch.nn.ModuleList(
                torch.nn.Embedding.from_pretrained(torch.from_numpy(table.copy())) for table in tables)
            self.first = norm(embedding.norm)
        self.layers = torch.nn.ModuleList(map(Block, encoder.layers))
        self.last = None if encoder.norm is None else norm(encoder.norm)
        self.eval()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Ids or features, and a mask (B, L) of int64, 1 = real -> (B, L, E)."""
        bias = (1.0 - mask[:, None, None, :].to(torch.float32)) * BLOCKED
        if self.tables is not None:
            tokens, positions, types = self.tables
            places = torch.arange(x.shape[1])[None, :]
            x = self.first(tokens(x) + types(torch.zeros_like(x)) + positions(places))
        for layer in self.layers:
            x = layer(x, bias)
        return x if self.last is None else self.last(x)

    @contextlib.contextmanager
    def unfused(self) -> Iterator[None]:
        """Attention operation by operation, as exporters want it."""
        for layer in self.layers:
            layer.fused = False
        yield
        for layer in self.layers:
            layer.fused = True

    def exported(self, x: np.ndarray, path: str) -> None:
        """Write an ONNX file whose batch and length are free."""
        free = {0: "batch", 1: "length"}
        given = torch.from_numpy(x), torch.ones(x.shape[:2], dtype=torch.int64)
        with self.unfused(), contextlib.redirect_stderr(io.StringIO()):  # says that there is a newer exporter
            torch.onnx.export(self, given, path, input_names=["x", "mask"], output_names=["y"], opset_version=17,
                              dynamic_axes={"x": free, "mask": free, "y": free}, dynamo=False)


def linear(weight: np.ndarray, bias: np.ndarray) -> torch.nn.Linear:
    """A torch layer of these weights."""
    made = torch.nn.Linear(*weight.shape[::-1])
    _fill(made, weight, bias)
    return made


def norm(of: edgeattn.LayerNorm) -> torch.nn.LayerNorm:
    """A torch layer like ours."""
    made = torch.nn.LayerNorm(of.inputs, of.eps)
    _fill(made, of.weight, of.bias)
    return made


def _fill(layer: torch.nn.Module, *arrays: np.ndarray) -> None:
    with torch.no_grad():
        for parameter, array in zip((layer.weight, layer.bias), arrays, strict=True):
            parameter.copy_(torch.from_numpy(array.copy()))


def padded(rows: Sequence[np.ndarray], longest: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sequences as one array, at least `longest` long, and its mask: what peers take."""
    longest = max(longest, *map(len, rows))
    x = np.zeros((len(rows), longest, *rows[0].shape[1:]), rows[0].dtype)
    mask = np.zeros(x.shape[:2], np.int64)
    for i, row in enumerate(rows):
        x[i, : len(row)], mask[i, : len(row)] = row, 1
    return x, mask
