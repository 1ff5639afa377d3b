"""Every kernel, in the usual formats, and what its machine code may use: registers, and a block's shared memory.

The ceilings are what the assembler gave for sm_87 and sm_90 when they were written, and a few registers: going above one
is a reason to look, not to raise it. No kernel may spill, keep an array in memory, or multiply 64-bit integers more often
than the last column says: an address is int32, and only gemmlowp's reciprocal, once per row, needs them.
"""
from edgeattn.kernels.cuda import attention, elements, int8, key_mean, linear, masks, merge, quantize

LIMITS = [
    # kernel, registers on sm_87 and sm_90, shared memory, 64-bit multiplications
    (attention.attention("float32", 64, 64, "float32", "float32", True, "float32"), (255, 255), 49152, 0),
    (attention.attention("float32", 64, 32, "float32", "float32", True, "float32"), (216, 216), 32768, 0),
    (attention.attention("float32", 32, 64, "float32", "float32", True, "float32"), (255, 255), 32768, 0),
    (attention.attention("float32", 32, 32, "float32", "float32", False, "float32"), (232, 232), 20480, 0),
    (attention.attention("float32", 32, 64, "float32", "int8", True, "float32"), (216, 224), 32768, 0),
    (attention.attention("float32", 64, 64, "float16", "float16", True, "float16"), (255, 240), 49152, 0),
    (attention.attention("float16", 64, 32, "float32", "float32", True, "float32"), (176, 208), 10240, 0),
    (attention.attention("float16", 64, 64, "float32", "float32", True, "float32"), (216, 216), 18432, 0),
    (attention.attention("float16", 32, 64, "float32", "float32", True, "float32"), (255, 255), 13824, 0),
    (attention.attention("float16", 64, 64, "float16", "float16", True, "float16"), (208, 200), 18432, 0),
    (attention.attention("float16", 64, 128, "float16", "float16", True, "float16"), (255, 255), 34816, 0),
    (attention.attention("float16", 32, 128, "float16", "float16", True, "float16"), (248, 255), 26112, 0),
    (attention.attention("float16", 32, 64, "float32", "int8", True, "float32"), (184, 224), 13824, 0),
    (attention.attention("tf32", 64, 64, "float32", "float32", True, "float32"), (224, 216), 34816, 0),
    (attention.attention("tf32", 32, 64, "float32", "float32", True, "float32"), (255, 255), 26112, 0),
    (attention.attention("tf32", 32, 32, "float32", "float32", False, "float32"), (192, 184), 13824, 0),
    (attention.attention("int8", 64, 64, "codes", "codes", True, "float32"), (216, 200), 16384, 0),
    (attention.attention("int8", 64, 64, "codes", "codes", False, "float32"), (216, 200), 16384, 0),
    (attention.attention("float32", 64, 64, "float32", "float32", True, "float32", True), (255, 255), 49152, 0),
    (attention.attention("float32", 32, 64, "float32", "int8", True, "float32", True), (255, 255), 32768, 0),
    (attention.attention("float16", 64, 64, "float16", "float16", True, "float16", True), (255, 255), 18432, 0),
    (attention.attention("tf32", 32, 32, "float32", "float32", False, "float32", True), (255, 255), 13824, 0),
    (elements.mean_of_heads(), (40, 40), 0, 0),
    (elements.gate(), (40, 40), 0, 0),
    (key_mean.smooth(), (48, 48), 512, 0),
    (masks.both(), (32, 32), 0, 0),
    (merge.merge("float32"), (48, 48), 0, 0),
    (linear.linear(True), (144, 144), 16384, 0),
    (linear.linear(False), (144, 144), 16384, 0),
    (quantize.store_rows("cache"), (40, 40), 0, 0),
    (quantize.store_rows("dynamic"), (48, 48), 0, 0),
    (quantize.store_rows("fixed"), (48, 48), 0, 0),
    (quantize.store_rows(None), (40, 40), 0, 0),
    (int8.linear_int8("float_rne", True), (128, 176), 10240, 0),
    (int8.linear_int8("double", False), (144, 160), 10240, 0),
    (int8.linear_int8("ruy", True), (128, 216), 10240, 0),
    (int8.linear_int8("float64", True), (128, 128), 10240, 0),
    (int8.linear_int8(None, True), (128, 128), 10240, 0),
    (int8.static_attention("float_rne", "float_rne", "lut_f32"), (232, 248), 38656, 0),
    (int8.static_attention("double", "double", "lut_f32"), (232, 248), 38656, 0),
    (int8.static_attention("ruy", "ruy", "lut_f32"), (232, 248), 38656, 0),
    (int8.static_attention("float_rne", "float_rne", "lut_u16"), (232, 248), 22016, 0),
    (int8.static_attention("double", "double", "fixed"), (232, 248), 22016, 14),
    (int8.static_attention("float_rne", "float_rne", "lut_f32", True), (232, 248), 38656, 0),
    (int8.static_attention("float_rne", "float_rne", "lut_f32", False, True), (255, 255), 38656, 0),
    (int8.static_attention("double", "double", "fixed", True), (240, 255), 22016, 14),
    (int8.static_attention("double", "double", "fixed", True, True), (255, 255), 22016, 14),
]
CAPABILITIES = [(8, 7), (9, 0)]
