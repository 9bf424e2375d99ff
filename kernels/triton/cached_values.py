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

PLAIN, INT8, E4M3 = 0, 1, 2  # what a cache holds; the kernels' constant KIND
KINDS = {torch.int8: INT8, torch.float8_e4m3fn: E4M3}

_INT8 = tl.constexpr(INT8)
# float16 numbers 1024 + u have u in their low bits: 0x6400 | u. An int8 x is u - 128.
_MAGIC = tl.constexpr(0x6400)
_OFFSET = tl.constexpr(1152.0)
# By the bits of e4m3 alone a float16 is 2^8 too small: the exponents' biases are 7 and 15.
E4M3_BITS_SCALE = tl.constexpr(256.0)


def words_of(cache: Tensor) -> Tensor:
    """An 8-bit cache [.., Dh] as int16 [.., Dh / 2], even elements in the low bytes; or itself."""
    return cache.view(torch.int16) if cache.dtype in KINDS else cache


@triton.jit
def unpack(words, KIND: tl.constexpr):
    """Words of 16 bits -> float16 (even, odd); e4m3 too small by E4M3_BITS_SCALE, exactly."""
    if KIND == _INT8:
        shifted = words ^ -0x7F80  # 0x8080: both bytes from [-128, 127] to [0, 255]
        even = (shifted & 0xFF) | _MAGIC
        odd = ((shifted >> 8) & 0xFF) | _MAGIC
        even = even.to(tl.float16, bitcast=True) - _OFFSET
        odd = odd.to(tl.float16, bitcast=True) - _OFFSET
    else:
        low = words << 8
        even = ((low & -0x8000) | ((low >> 1) & 0x3F80)).to(tl.float16, bitcast=True)
        odd = ((words & -0x8000) | ((words >> 1) & 0x3F80)).to(tl.float16, bitcast=True)
    return even.to(tl.float16), odd.to(tl.float16)


@triton.jit
def slots_of(pages, positions, head, kv_heads, BLOCK_SIZE: tl.constexpr):
    """Where positions lie: rows of head_dim elements in a cache, elements of its scales."""
    return (pages.to(tl.int64) * kv_heads + head) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def cap_scores(scores, soft_cap):
    """``soft_cap * tanh(scores / soft_cap)``, float32. Both in the same units: those of exp2."""
    # tanh(x) = 1 - 2 / (e^2x + 1) and e^2x = 2^(2 log2(e) x).
    return soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (2.8853900817779268 / soft_cap)) + 1.0))
