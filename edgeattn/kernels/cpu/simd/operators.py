"""Python's operators between two vectors."""
import operator

from edgeattn.runtime.compiler import intrinsic, overload, types

from .vector import MASK, Vec


def _binary(a, integer, real=None):
    """What an intrinsic of two vectors gives Numba: LLVM's instruction for integers, and for reals."""
    name = integer if a.dtype in (types.int32, types.int64, types.boolean) else real

    def generate(context, builder, sig, args):
        return getattr(builder, name)(*args)
    return a(a, a), generate


def _comparison(a, symbol):
    def generate(context, builder, sig, args):
        if a.dtype in (types.int32, types.int64):
            return builder.icmp_signed(symbol, *args)
        return builder.fcmp_ordered(symbol, *args)
    return MASK(a, a), generate


@intrinsic
def _add(typing, a, b):
    """v[l] = a[l] + b[l]"""
    return _binary(a, "add", "fadd")


@intrinsic
def _sub(typing, a, b):
    """v[l] = a[l] - b[l]"""
    return _binary(a, "sub", "fsub")


@intrinsic
def _mul(typing, a, b):
    """v[l] = a[l] * b[l]"""
    return _binary(a, "mul", "fmul")


@intrinsic
def _div(typing, a, b):
    """v[l] = a[l] / b[l]; of integers toward zero"""
    return _binary(a, "sdiv", "fdiv")


@intrinsic
def _and(typing, a, b):
    """v[l] = a[l] & b[l]"""
    return _binary(a, "and_")


@intrinsic
def _or(typing, a, b):
    """v[l] = a[l] | b[l]"""
    return _binary(a, "or_")


@intrinsic
def _xor(typing, a, b):
    """v[l] = a[l] ^ b[l]"""
    return _binary(a, "xor")


@intrinsic
def _shl(typing, a, b):
    """v[l] = a[l] << b[l]"""
    return _binary(a, "shl")


@intrinsic
def _shr(typing, a, b):
    """v[l] = a[l] >> b[l], the sign comes in from the left"""
    return _binary(a, "ashr")


@intrinsic
def shift_right_logical(typing, a, b):
    """v[l] = a[l] >> b[l], zeros come in from the left"""
    return _binary(a, "lshr")


@intrinsic
def _lt(typing, a, b):
    """v[l] = a[l] < b[l]"""
    return _comparison(a, "<")


@intrinsic
def _le(typing, a, b):
    """v[l] = a[l] <= b[l]"""
    return _comparison(a, "<=")


@intrinsic
def _gt(typing, a, b):
    """v[l] = a[l] > b[l]"""
    return _comparison(a, ">")


@intrinsic
def _ge(typing, a, b):
    """v[l] = a[l] >= b[l]"""
    return _comparison(a, ">=")


@intrinsic
def _eq(typing, a, b):
    """v[l] = a[l] == b[l]"""
    return _comparison(a, "==")


def _is_pair(a, b):
    return isinstance(a, Vec) and a == b


@overload(operator.add)
def _o_add(a, b):
    return (lambda a, b: _add(a, b)) if _is_pair(a, b) else None


@overload(operator.sub)
def _o_sub(a, b):
    return (lambda a, b: _sub(a, b)) if _is_pair(a, b) else None


@overload(operator.mul)
def _o_mul(a, b):
    return (lambda a, b: _mul(a, b)) if _is_pair(a, b) else None


@overload(operator.truediv)
def _o_div(a, b):
    return (lambda a, b: _div(a, b)) if _is_pair(a, b) else None


@overload(operator.and_)
def _o_and(a, b):
    return (lambda a, b: _and(a, b)) if _is_pair(a, b) else None


@overload(operator.or_)
def _o_or(a, b):
    return (lambda a, b: _or(a, b)) if _is_pair(a, b) else None


@overload(operator.xor)
def _o_xor(a, b):
    return (lambda a, b: _xor(a, b)) if _is_pair(a, b) else None


@overload(operator.lshift)
def _o_shl(a, b):
    return (lambda a, b: _shl(a, b)) if _is_pair(a, b) else None


@overload(operator.rshift)
def _o_shr(a, b):
    return (lambda a, b: _shr(a, b)) if _is_pair(a, b) else None


@overload(operator.lt)
def _o_lt(a, b):
    return (lambda a, b: _lt(a, b)) if _is_pair(a, b) else None


@overload(operator.le)
def _o_le(a, b):
    return (lambda a, b: _le(a, b)) if _is_pair(a, b) else None


@overload(operator.gt)
def _o_gt(a, b):
    return (lambda a, b: _gt(a, b)) if _is_pair(a, b) else None


@overload(operator.ge)
def _o_ge(a, b):
    return (lambda a, b: _ge(a, b)) if _is_pair(a, b) else None


@overload(operator.eq)
def _o_eq(a, b):
    return (lambda a, b: _eq(a, b)) if _is_pair(a, b) else None
