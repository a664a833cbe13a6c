"""What kernels need of fp8.py: the same scales and the same rounding, in registers.

Rounding is spelled out in integers, for Triton's interpreter has its own idea of a conversion to e4m3; the way back,
which is exact and on the path of every key, is the device's instruction.
"""

import triton
import triton.language as tl


@triton.jit
def row_scale(largest):
    """int32: the scale of rows whose largest absolute values, float32, these are."""
    bits = largest.to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 1), 253)


@triton.jit
def power(scale):
    """float32 2 ** (scale - 127) of int32 or uint8."""
    return (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def quantise(x, scale):
    """e4m3 of float32 `x`, to nearest, ties to even; `scale` is int32 and broadcasts."""
    x = x * power(254 - scale)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # 3 bits of 23, exponent bias 7 of 127
    # 2 ** 14 is so large that what is added to it is rounded to a multiple of 2 ** -9, the smallest e4m3
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))  # below 2 ** -6; not above 448
    code = tl.where(size > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
