"""What setup.cfg says, where edgeattn can run; elsewhere pip ends with the words below and not with a compiler's."""

import struct
import sys

from setuptools import setup

if struct.calcsize("P") < 8:
    sys.exit("edgeattn needs a 64-bit Python, and this one is of 32 bits, as on a Raspberry Pi with a 32-bit system "
             "(armv7l, armv6l): neither Numba nor compiled kernels exist for it. Ways out: a 64-bit Raspberry Pi OS, "
             "which a Pi 3, Zero 2 W and every later one can run; or, on a 64-bit machine, quant.export(layer, "
             "'attention.tflite', sequence_length=L) for LiteRT, or 'attention.c' for a C compiler "
             "(docs/deployment.md).")
setup()
