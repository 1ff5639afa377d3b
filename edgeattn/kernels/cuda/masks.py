"""Two bool masks as one: which keys a query may see, and which keys are tokens at all."""
from edgeattn.kernels.cuda.language import Kernel, int32, specialised
from edgeattn.kernels.cuda.ptx import (
    block_x,
    load_u8,
    quotient,
    remainder,
    select_i,
    store_s8,
    thread,
    times,
    times_wide,
)

THREADS = 128
(A_KEEP, A_PADDING, A_OUT, A_COUNT) = range(4)
(P_SIZE, P_H, P_L, P_S, P_KEEP_B, P_KEEP_H, P_KEEP_L, P_KEEP_S, P_PADDING_B, P_PADDING_S, P_COUNT) = range(11)


@specialised
def both():
    """The kernel: out[b, h, l, s] = keep[b, h, l, s] and padding[b, s], bytes; out (B, H, L, S) in C order.

    Grid ceil(B H L S / 128).
    """

    def both_kernel(a, p):
        n = int32(block_x() * THREADS + thread())
        good = n < p[P_SIZE]
        s, row = remainder(n, p[P_S]), quotient(n, p[P_S])
        i, head = remainder(row, p[P_L]), quotient(row, p[P_L])
        h, b = remainder(head, p[P_H]), quotient(head, p[P_H])
        at = (times_wide(b, p[P_KEEP_B]) + times_wide(h, p[P_KEEP_H]) + times_wide(i, p[P_KEEP_L])
              + times(s, p[P_KEEP_S]))
        seen = load_u8(good, a[A_KEEP] + at) != 0
        real = load_u8(good, a[A_PADDING] + times_wide(b, p[P_PADDING_B]) + times(s, p[P_PADDING_S])) != 0
        store_s8(good, a[A_OUT] + n, select_i(seen & real, int32(1), int32(0)))

    return Kernel(both_kernel, A_COUNT, P_COUNT, THREADS, 0)
