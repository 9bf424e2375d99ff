"""Rounding to int8 and e4m3 inside kernels, with the bits of ``kernels.rounding``.

Kernels that use it are launched with ``enable_fp_fusion=False``: a product fused with the addition
that rounds it would be rounded once where PyTorch rounds twice.
"""

import torch
import triton
import triton.language as tl

from kernels.rounding import FP8_MAX, INT8_MAX, SMALLEST
from kernels.triton.runtime import DeviceFacts

INT8 = tl.constexpr(0)
FP8_NATIVE = tl.constexpr(1)  # the conversion of compute capability 8.9 and above
FP8_BITS = tl.constexpr(2)

_SMALLEST = tl.constexpr(SMALLEST)
_INT8_MAX = tl.constexpr(float(INT8_MAX))
_FP8_MAX = tl.constexpr(FP8_MAX)
# Added to a float32 below 2^22 it leaves no room for a fraction: the sum is rounded to nearest
# even, and the low byte of its bits is the integer in two's complement.
_TO_INTEGER = tl.constexpr(1.5 * 2**23)
_TO_SUBNORMAL = tl.constexpr(2.0**14)  # the same at e4m3's least step, 2^-9


def code_of(dtype: torch.dtype, facts: DeviceFacts) -> int:
    """The constant that tells a kernel to round to `dtype`, int8 or float8_e4m3fn."""
    if dtype == torch.int8:
        return int(INT8.value)
    return int((FP8_NATIVE if facts.capability >= (8, 9) else FP8_BITS).value)


@triton.jit
def magnitude(x):
    """|x| of float32 as int32, in the same order, NaN above all: a maximum keeps NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales(largest, LEAST: tl.constexpr, CODE: tl.constexpr):
    """(scale, its inverse) from the greatest magnitude.

    With LEAST 0 tiny maxima have scale 0, as in ``rounding.quantize_last``; else maxima count as
    at least LEAST, as in ``plain_linear.round_fp8``.
    """
    MOST: tl.constexpr = _INT8_MAX if CODE == INT8 else _FP8_MAX
    largest = largest.to(tl.float32, bitcast=True)
    most = tl.full(largest.shape, MOST, tl.float32)
    if LEAST > 0:
        # Not a maximum, which would lose NaN.
        largest = tl.where(largest < LEAST, LEAST, largest)
        inverse = tl.div_rn(most, largest)
    else:
        largest = tl.where(largest < _SMALLEST, 0.0, largest)
        inverse = tl.div_rn(most, tl.where(largest > 0, largest, 1.0))
        inverse = tl.where(largest > 0, inverse, 0.0)
    return tl.div_rn(largest, most), inverse


@triton.jit
def e4m3_bits(x):
    """float32 -> the nearest e4m3 code as uint8, ties to even, saturating; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # Below 2^-6 codes are multiples of 2^-9.
    small = tl.abs(x) + _TO_SUBNORMAL
    subnormal = small.to(tl.int32, bitcast=True) & 0xFF
    # Above, 20 bits of the fraction go, and the exponent's bias falls from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def rounded(scaled, CODE: tl.constexpr):
    """float32 within the range -> codes as uint8 (int8 in two's complement)."""
    if CODE == INT8:
        codes = (scaled + _TO_INTEGER).to(tl.int32, bitcast=True).to(tl.uint8)
    elif CODE == FP8_NATIVE:
        codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = e4m3_bits(scaled)
    return codes
