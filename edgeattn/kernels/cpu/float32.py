"""Attention in float32 by whichever kernel can give what is asked for."""
from edgeattn.checks import to_float32

from . import functional_float32, reference_float32

SCALES = (1e-18, 1e6)


def is_ordinary(scale, softcap):
    """Whether float32 holds what kernels make of the scale before the products: else reference_float32.attention
    must.
    """
    size = abs(scale / softcap) if softcap else abs(scale)
    return softcap <= 1e30 and (size == 0 or SCALES[0] <= size <= SCALES[1])


def attention(q, k, v, mask, out, *, scale, softcap=0.0, weights=None, lse=None):
    """out = softmax(softcap(q k^T * scale) + mask) v; arguments as for `reference_float32.attention`, but with any
    strides.
    """
    if weights is None and lse is None and out.size and k.size and is_ordinary(scale, softcap):
        functional_float32.attention(q, k, v, out, scale, softcap, mask.for_kernels())
    else:
        reference_float32.attention(*map(to_float32, (q, k, v)), mask, scale=scale, softcap=softcap, out=out,
                                    weights=weights,
                        lse=lse)
