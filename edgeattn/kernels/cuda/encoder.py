"""What an encoder has beside attention, from Views to launches: linear maps of rows and what follows them, norms, sums.

Rows are Views (tokens, features) or (B, L, features); inputs in C order, results with neighbours along the last axis.
"""
import numpy as np

from edgeattn.kernels.cuda import elements as el
from edgeattn.kernels.cuda import linear as fl
from edgeattn.kernels.cuda import linear_dynamic as ld
from edgeattn.kernels.cuda import norm as nm
from edgeattn.kernels.cuda.host import address, bits, ceil_div, check_reach, is_wide, round_up, scratch
from edgeattn.kernels.cuda.launch_graph import launch
from edgeattn.kernels.cuda.layers import as_heads, batched, owned, padded_list, padded_weight, project_addresses


class Norm:
    """The parameters of a layer norm or RMS norm on the device."""

    def __init__(self, kind, weight, bias, eps):
        self.kind, self.weight, self.eps = kind, owned(weight), eps
        self.bias = None if bias is None else owned(bias)


class DynamicRows:
    """The parameters of a linear map with int8 weights, some inputs of which are float32, on the device.

    Parameters
    ----------
    weight : edgeattn.kernels.cpu.encoder_dynamic.QuantizedWeight
        An output has one residual at most.
    bias : float32 (outputs,) or None
    """

    takes_a_residual = True

    def __init__(self, weight, bias):
        residual = weight.residual_outputs
        if len(set(residual.tolist())) < len(residual):
            raise ValueError(f"residual_outputs must be outputs that differ, on CUDA, got {residual.tolist()}")
        codes, outputs = weight.codes, len(weight.codes) - len(residual)
        self.outputs, self.columns = outputs, weight.outlier_columns.tolist()
        self.codes = owned(padded_weight(codes[:outputs], 1))
        self.scale = owned(padded_list(weight.scale[:outputs], 1))
        self.bias = owned(padded_list(np.zeros(outputs, np.float32) if bias is None else bias, 1))
        self.apart = owned(padded_list(np.ascontiguousarray(weight.outlier_weight.T), 1)) if self.columns else None
        self.sums = owned(padded_list(_sums_by_group(codes[:outputs]), 1))
        self.second = self.second_of = None
        if len(residual):
            none = np.zeros(0, np.int64)
            self.second = DynamicRows(weight._replace(
                codes=codes[outputs:], scale=weight.scale[outputs:], residual_outputs=none, outlier_columns=none,
                outlier_weight=np.zeros((len(residual), 0), np.float32)), None)
            of = np.full(self.codes.shape[0], -1, np.int32)
            of[residual] = np.arange(len(residual))
            self.second_of = owned(of)


def _sums_by_group(codes):
    """int32 (groups, outputs): of the weights of ld.GROUP inputs each."""
    starts = range(0, max(codes.shape[1], 1), ld.GROUP)
    return np.stack([codes[:, i:i + ld.GROUP].sum(1, dtype=np.int32) for i in starts])


def quantize(x, columns, grouped, stream, like):
    """(codes, scales, what codes are short of or None) of rows x, whose features `columns` count as 0."""
    rows, width = _count(x), x.shape[-1]
    up = round_up(width, 64)
    group = ld.GROUP if grouped else up
    groups = max(ceil_div(width, group), 1)
    codes, scales = scratch((rows, up), np.int8, like), scratch((rows, groups), np.float32, like)
    minus = scratch((rows, groups), np.int32, like) if grouped else None
    check_reach("the tokens", x)
    p = [rows, width, up, group, groups, *_four(columns)]
    launch(ld.quantize(grouped), (ceil_div(rows * groups, ld.ROWS), 1, 1),
           [x.pointer, codes.pointer, scales.pointer, address(minus)], p, stream)
    return codes, scales, minus


def linear_dynamic(quantized, x, linear, out, stream, like, *, activation="identity", factor=None, residual=None):
    """out = activation(x weight^T + bias) * factor + residual; `quantized` is made of rows x, linear a DynamicRows."""
    codes, scales, minus = quantized
    seconds = None
    if linear.second is not None:
        seconds = scratch((_count(x), linear.second.outputs), np.float32, like)
        linear_dynamic(quantized, x, linear.second, seconds, stream, like)
    check_reach("a projection", out)
    rows, features_up = codes.shape[0], linear.codes.shape[0]
    to, J = batched(out), _four(linear.columns)
    a = [codes.pointer, linear.codes.pointer, linear.scale.pointer, linear.bias.pointer, scales.pointer, address(minus),
         linear.sums.pointer, x.pointer, address(linear.apart), address(seconds), address(linear.second_of),
         address(factor), address(residual), out.pointer]
    p = [rows, to.shape[1], codes.shape[1], linear.outputs, features_up, scales.shape[1], len(linear.columns), *J,
         x.shape[-1], 0 if seconds is None else seconds.shape[1], *to.strides[:2]]
    launch(ld.linear_rows(activation, minus is not None), (ceil_div(rows, ld.TILE), features_up // ld.TILE, 1), a, p,
           stream)


def linear_float(x, linear, out, stream, *, activation="identity", factor=None, residual=None):
    """The same in float32; linear : FloatLinear."""
    a, p, grid = project_addresses([linear.into(batched(x), as_heads(batched(out), 1))])
    launch(fl.linear(is_wide([batched(x), linear.weight]), activation), grid, [*a, address(factor), address(residual)],
           p, stream)


def norm_rows(x, norm, out, stream):
    """out = norm(x)"""
    to, width = batched(out), x.shape[-1]
    check_reach("the tokens", x)
    p = [_count(x), to.shape[1], width, bits(width), bits(norm.eps), *to.strides[:2]]
    launch(nm.norm(norm.kind), (ceil_div(_count(x), nm.ROWS), 1, 1),
           [x.pointer, norm.weight.pointer, address(norm.bias), out.pointer], p, stream)


def add_rows(x, y, out, stream):
    """out = x + y"""
    to = batched(out)
    launch(el.add_rows(), (ceil_div(x.size, el.THREADS), 1, 1), [x.pointer, y.pointer, out.pointer],
           [x.size, *to.shape[1:], *to.strides[:2]], stream)


def take_rows(x, rows, out, stream):
    """out[i] = x[rows[i]], zeros for a number below 0; rows int32."""
    to = batched(out)
    launch(el.take_rows(), (ceil_div(out.size, el.THREADS), 1, 1), [x.pointer, rows.pointer, out.pointer],
           [out.size, *to.shape[1:], *to.strides[:2]], stream)


def _count(x):
    return x.size // x.shape[-1] if x.shape[-1] else 0


def _four(columns):
    return [*columns, *[-1] * (ld.MOST_APART - len(columns))]
