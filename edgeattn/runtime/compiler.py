"""What kernels are written with: of Numba and LLVM, or placeholders where this process runs prebuilt kernels."""
from edgeattn.runtime import prebuilt

if prebuilt.LIBRARY is None:
    prebuilt.require_compiler()
    from typing import NamedTuple

    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic, models, overload, register_jitable, register_model

    from edgeattn.runtime.jit import compiled, compiled_for, inline, jit, task
else:
    from edgeattn.runtime.placeholders import (
        NamedTuple,
        cgutils,
        inline,
        intrinsic,
        ir,
        models,
        overload,
        register_jitable,
        register_model,
        task,
        types,
    )
    from edgeattn.runtime.prebuilt import compiled, compiled_for, jit

__all__ = ["NamedTuple", "cgutils", "compiled", "compiled_for", "inline", "intrinsic", "ir", "jit", "models",
           "overload", "register_jitable", "register_model", "task", "types"]
