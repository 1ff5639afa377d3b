"""Formats of queries, keys and values: four neighbouring numbers as float32, the first `left` of which exist."""
from edgeattn.kernels.cuda.language import device, float32, int32
from edgeattn.kernels.cuda.ptx import (
    float_of_bits,
    load_b32,
    load_b32x2,
    load_f16,
    load_f32,
    load_f32x4,
    load_s8,
    to_float,
    unpack_f16,
)


@device
def fetch_float32(wide, address, good, left):
    """Of float32."""
    if wide:
        return load_f32x4(good & (left > 0), address)
    return (load_f32(good & (left > 0), address), load_f32(good & (left > 1), address + 4),
            load_f32(good & (left > 2), address + 8), load_f32(good & (left > 3), address + 12))


@device
def fetch_float16(wide, address, good, left):
    """Of float16."""
    if wide:
        low, high = load_b32x2(good & (left > 0), address)
        a, b = unpack_f16(low)
        c, d = unpack_f16(high)
        return a, b, c, d
    return (load_f16(good & (left > 0), address), load_f16(good & (left > 1), address + 2),
            load_f16(good & (left > 2), address + 4), load_f16(good & (left > 3), address + 6))


@device
def fetch_int8(wide, address, good, left):
    """Of int8 codes."""
    if wide:
        word = load_b32(good & (left > 0), address)
        return (to_float(int32(int32(word << 24) >> 24)), to_float(int32(int32(word << 16) >> 24)),
                to_float(int32(int32(word << 8) >> 24)), to_float(int32(word >> 24)))
    return (to_float(load_s8(good & (left > 0), address)), to_float(load_s8(good & (left > 1), address + 1)),
            to_float(load_s8(good & (left > 2), address + 2)), to_float(load_s8(good & (left > 3), address + 3)))


@device
def fetch_codes(wide, address, good, left):
    """Four int8 codes as they are: one word, by its bits."""
    word = load_b32(good & (left > 0), address)
    return float_of_bits(word), float32(0.0), float32(0.0), float32(0.0)


# format -> (function, bytes of a number)
FETCH = {"float32": (fetch_float32, 4), "float16": (fetch_float16, 2), "int8": (fetch_int8, 1),
         "codes": (fetch_codes, 1)}
