"""What each instruction set does in its own way, a file for each row of `edgeattn.runtime.isa.TABLES`, by its name.

`CODE` is that of this process. Its methods write LLVM's language for the intrinsics, whose meaning they keep: which
of them a set takes over from which, the first lines of the files say.
"""
import importlib

from edgeattn.runtime.isa import ISA

CODE = importlib.import_module(f"{__name__}.{ISA.name}").Code()
