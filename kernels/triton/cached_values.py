"""Keys and values as attention kernels read them: pages of 16- or 32-bit floats, or of 8-bit pairs.

Matrix units take 8-bit elements only where both operands have 8 bits, and the transposing loads
from shared memory move 16 bits at a time. So an 8-bit cache is read as pairs of neighbours in the
head dimension, [.., head_dim / 2] words of 16 bits, which become two float16 tiles: the even and
the odd elements. Products run over each by itself; nothing has to change places.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.runtime import DeviceFacts

PLAIN, INT8, E4M3 = 0, 1, 2  # what a cache holds; the kernels' constant KIND
KINDS = {torch.int8: INT8, torch.float8_e4m3fn: E4M3}
# How words are unpacked; the kernels' constant ASSEMBLY. Triton's own 16-bit operations take one
# word at a time, assembly takes two; the interpreter has none.
NO_ASSEMBLY, BITS, CONVERSIONS = 0, 1, 2

# Two words $2 in; their even ($0) and odd ($1) elements out, two float16 each.
# float16 numbers 1024 + u have u in their low bits: 0x6400 | u. An int8 x is u - 128.
INT8_BITS = """{
.reg .b32 shifted, even, odd, offset;
mov.b32 offset, 0x64806480;
xor.b32 shifted, $2, 0x80808080;
prmt.b32 even, shifted, 0x64646464, 0x4240;
prmt.b32 odd, shifted, 0x64646464, 0x4341;
sub.f16x2 $0, even, offset;
sub.f16x2 $1, odd, offset;
}"""
# Sign, exponent and mantissa of an e4m3 at their places in a float16; the exponents' biases are 7
# and 15, so that a factor of 2^8 is missing.
E4M3_BITS = """{
.reg .b32 word, even, odd, sign;
shl.b32 word, $2, 8;
shr.b32 odd, $2, 1;
and.b32 odd, odd, 0x3f803f80;
and.b32 sign, $2, 0x80008000;
shr.b32 even, word, 1;
and.b32 even, even, 0x3f803f80;
or.b32 $1, odd, sign;
and.b32 sign, word, 0x80008000;
or.b32 $0, even, sign;
}"""
E4M3_CONVERSIONS = """{
.reg .b16 first, second;
.reg .b32 low, high;
mov.b32 {first, second}, $2;
cvt.rn.f16x2.e4m3x2 low, first;
cvt.rn.f16x2.e4m3x2 high, second;
prmt.b32 $0, low, high, 0x5410;
prmt.b32 $1, low, high, 0x7632;
}"""

_INT8 = tl.constexpr(INT8)
_NO_ASSEMBLY = tl.constexpr(NO_ASSEMBLY)
_BITS = tl.constexpr(BITS)
_CONVERSIONS = tl.constexpr(CONVERSIONS)
_INT8_BITS = tl.constexpr(INT8_BITS)
_E4M3_BITS = tl.constexpr(E4M3_BITS)
_E4M3_CONVERSIONS = tl.constexpr(E4M3_CONVERSIONS)
_MAGIC = tl.constexpr(0x6400)
_OFFSET = tl.constexpr(1152.0)


def words_of(cache: Tensor) -> Tensor:
    """An 8-bit cache [.., Dh] as int16 [.., Dh / 2], even elements in the low bytes; or itself."""
    return cache.view(torch.int16) if cache.dtype in KINDS else cache


def columns_of(head_dim: int, kind: int) -> int:
    """Width of a tile: a power of two that holds a head's elements, or its pairs.

    At least 16, which is what a matrix instruction sums over.
    """
    return max(16, int(triton.next_power_of_2(head_dim if kind == PLAIN else head_dim // 2)))


def assembly_for(kind: int, facts: DeviceFacts, device: torch.device) -> int:
    """How words are unpacked on a device: e4m3 is converted by hardware from 8.9 on."""
    if kind == PLAIN or device.type == "cpu":
        return NO_ASSEMBLY
    return CONVERSIONS if kind == E4M3 and facts.capability >= (8, 9) else BITS


@triton.jit
def unpack(words, KIND: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Words of 16 bits -> float16 (even, odd); e4m3 by its bits is 2^8 too small, but exact."""
    if ASSEMBLY != _NO_ASSEMBLY:
        floats: tl.constexpr = _E4M3_BITS if ASSEMBLY == _BITS else _E4M3_CONVERSIONS
        code: tl.constexpr = _INT8_BITS if KIND == _INT8 else floats
        even, odd = tl.inline_asm_elementwise(
            code, "=r,=r,r", [words], (tl.float16, tl.float16), is_pure=True, pack=2
        )
    elif KIND == _INT8:
        shifted = words ^ -0x7F80  # 0x8080: both bytes from [-128, 127] to [0, 255]
        even = ((shifted & 0xFF) | _MAGIC).to(tl.float16, bitcast=True) - _OFFSET
        odd = (((shifted >> 8) & 0xFF) | _MAGIC).to(tl.float16, bitcast=True) - _OFFSET
        even, odd = even.to(tl.float16), odd.to(tl.float16)
    else:
        low = words << 8
        even = ((low & -0x8000) | ((low >> 1) & 0x3F80)).to(tl.float16, bitcast=True)
        odd = ((words & -0x8000) | ((words >> 1) & 0x3F80)).to(tl.float16, bitcast=True)
    return even, odd


@triton.jit
def missing_factor(KIND: tl.constexpr, ASSEMBLY: tl.constexpr):
    """What unpacked elements have yet to be multiplied by."""
    return 1.0 if KIND <= _INT8 or ASSEMBLY == _CONVERSIONS else 256.0


@triton.jit
def pages_of(table, start, first, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of positions [start, start + BLOCK_N): one if a page holds them all, else [BLOCK_N].

    `start` is a multiple of BLOCK_N. Nothing is read for positions outside [first, end).
    """
    if BLOCK_SIZE >= BLOCK_N:
        pages = tl.load(table + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        offsets = tl.arange(0, BLOCK_N)
        mask = (start + offsets >= first) & (start + offsets < end)
        pages = tl.load(table + start // BLOCK_SIZE + offsets // BLOCK_SIZE, mask=mask, other=0)
    return pages


@triton.jit
def rows_of(
    cache,
    pages,
    start,
    kv_heads,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pointers [BLOCK_N] to the positions' rows of WIDTH elements in a head's part of a cache.

    `cache` points to the head in page 0. Products are 32 by 32 bits, and what does not change
    between tiles is left for the compiler to take out of the loop.
    """
    offsets = tl.arange(0, BLOCK_N)
    if BLOCK_SIZE >= BLOCK_N:
        offsets += start % BLOCK_SIZE
    else:
        offsets = offsets % BLOCK_SIZE
    stride = kv_heads * (BLOCK_SIZE * WIDTH)
    return cache + pages.to(tl.int64) * stride + offsets * WIDTH
