"""What launches have in common, and those of small kernels: rows, masks, gates. Nothing here waits for the GPU.

Letters as in attention.py. Every `like` is an array whose kind scratch memory is of, and `stream` a handle, an int.
"""
import numpy as np

from edgeattn.kernels.cuda import elements as el
from edgeattn.kernels.cuda import masks as mk
from edgeattn.kernels.cuda import quantize as qz
from edgeattn.kernels.cuda.array_provider import kind
from edgeattn.kernels.cuda.arrays import View, view
from edgeattn.kernels.cuda.launch_graph import capturing, launch

SMALL = 2**31
MOST_HEADS = 65535  # the second axis of a grid


def bits(x):
    """The bits of a float32 as an int."""
    return int(np.float32(x).view(np.int32))


def ceil_div(n, by):
    """n / by, rounded up."""
    return -(-n // by)


def round_up(n, to):
    """n, rounded up to a multiple of `to`."""
    return -(-n // to) * to


def scratch(shape, dtype, like):
    """A View of new memory of the kind of `like`, not filled."""
    made = view("scratch", kind(like).empty(tuple(shape), dtype, like))
    record = capturing()
    return made if record is None else record.place(made)


def spread(mask):
    """Strides in bytes of a (B or 1, H or 1, L or 1, S) mask along (B, H, L, S); zeros where None."""
    if mask is None:
        return (0, 0, 0, 0)
    return tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.strides, strict=True))


def check_reach(name, array):
    """Raise unless offsets within an array are int32, as kernels count them."""
    low, high = array.span()
    if array.size and high - low >= SMALL:
        raise ValueError(f"{name} must reach over less than 2 GiB on CUDA, where offsets are int32, got shape "
                         f"{array.shape} and strides {array.strides} bytes; call with parts of the batch")


def check_heads(batch, heads):
    """Raise unless there is a block row for every head of every batch entry."""
    if batch * heads > MOST_HEADS:
        raise ValueError(f"query must have at most {MOST_HEADS} batch entries times heads on CUDA, got {batch} times "
                         f"{heads}; call with parts of the batch")


def address(array):
    """The address of a View, 0 for None."""
    return 0 if array is None else array.pointer


def part(x, axis, begin, end):
    """x[begin:end] along an axis of a View."""
    shape = (*x.shape[:axis], end - begin, *x.shape[axis + 1:])
    return View(x.owner, x.pointer + begin * x.strides[axis], shape, x.strides, x.dtype, x.read_only)


def masks_part(masks, rows, keys):
    """The masks of queries rows[0] to rows[1] - 1 and keys keys[0] to keys[1] - 1."""
    found = masks | {"offset": masks["offset"] + rows[0] - keys[0]}
    for name in ("keep", "bias"):
        for axis, (begin, end) in ((2, rows), (3, keys)):
            if found.get(name) is not None and found[name].shape[axis] > 1:
                found[name] = part(found[name], axis, begin, end)
    return found


def is_wide(arrays):
    """Whether four numbers at a time can be read and written in all arrays: sizes, addresses and strides allow it."""
    return all(a.shape[-1] % 4 == 0 and a.pointer % (4 * a.dtype.itemsize) == 0
               and all(s % (4 * a.dtype.itemsize) == 0 for s in a.strides[:-1]) for a in arrays)


# -- element by element ----------------------------------------------------------------------------------------------


def mean_of_heads(x, out, stream):
    """out (B, L, S) = the mean of x (B, H, L, S) over the heads; float32 in C order."""
    B, H, L, S = x.shape
    check_reach("the probabilities", x)
    launch(el.mean_of_heads(), (ceil_div(B * L * S, el.THREADS), 1, 1), [x.pointer, out.pointer],
           [B * L * S, H, L * S, bits(H)], stream)


def open_gate(gate, x, stream):
    """x (B, T, width) *= sigmoid(gate), gate as many numbers in C order; float32."""
    size, (_, T, width) = gate.size, x.shape
    launch(el.gate(), (ceil_div(size, el.THREADS), 1, 1), [gate.pointer, x.pointer], [size, T, width, *x.strides[:2]],
           stream)


def both(keep, padding, stream, like):
    """`keep` (B or 1, H or 1, L or 1, S or 1) and `padding` (B, S), Views, as one of (B, H or 1, L or 1, S)."""
    shape = (padding.shape[0], *keep.shape[1:3], padding.shape[1])
    out = scratch(shape, np.bool_, like)
    for array in (keep, padding, out):
        check_reach("attn_mask and key_padding_mask together", array)
    if out.size:
        p = [out.size, *shape[1:], *spread(keep), *padding.strides]
        launch(mk.both(), (ceil_div(out.size, mk.THREADS), 1, 1), [keep.pointer, padding.pointer, out.pointer],
           p, stream)
    return out


# -- rows ------------------------------------------------------------------------------------------------------------


def store_rows(x, out, scale, stream, up=0, out_strides=None, rule="cache", factor=1.0, minus=None):
    """x (B, H, T, D) float32 to out, as it is or, where out is int8, as codes; rows in one piece.

    scale : View (B, H, T) that takes theirs, None for the rule "fixed"; up : numbers of a row that are written, zeros
    behind D; out_strides : bytes along (B, H, T, D), out's unless given; rule, factor, minus : as the kernel's.
    """
    B, H, T, D = x.shape
    check_reach("a cache", out)
    p = [B * H * T, H, T, D, max(up, D), bits(factor), *x.strides[:3], *(out_strides or out.strides),
         *((0, 0, 0) if scale is None else scale.strides)]
    launch(qz.store_rows(rule if out.dtype == np.int8 else None), (ceil_div(B * H * T, qz.ROWS), 1, 1),
           [x.pointer, out.pointer, address(scale), address(minus)], p, stream)


def words(rows):
    """(B, H, T) or (B, H, T, ...), rows of whole words that fill their stride, as (B, H, T, words) float32."""
    return View(rows.owner, rows.pointer, (*rows.shape[:3], rows.strides[2] // 4), (*rows.strides[:3], 4),
                np.dtype(np.float32))


def to_front(rows, begin, count, stream, like):
    """Move `count` rows of (B, H, capacity, ...) from `begin` on to the front."""
    rows = words(rows)
    check_reach("a cache", rows)
    kept = part(rows, 2, begin, begin + count)
    if begin < count:  # not onto what is still to be read
        aside = scratch(kept.shape, np.float32, like)
        store_rows(kept, aside, None, stream)
        kept = aside
    store_rows(kept, part(rows, 2, 0, count), None, stream)
