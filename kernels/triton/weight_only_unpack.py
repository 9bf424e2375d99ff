"""Codes of quantized weights -> numbers of 16 bits, inside kernels, in about one instruction each.

Codes lie in int16 containers: lane j of a container holds code j, so that two neighbouring
containers are one register and one operation on it works on a pair. A code becomes a float by
being put into the mantissa of a power of two, which is then subtracted (Kim et al. 2022, "Who Says
Elephants Can't Run", section 3.3); conversions of integers run at a quarter of that rate or less.

Everything here is elementwise in the containers, whatever the layout of the tile. Triton places
such operations behind the load of the tile into the registers of a matrix operand only if their
inputs are loads and constants: hence no scalars among them. The interpreter cannot run machine
code, and computes the same numbers in float32.
"""

import triton
import triton.language as tl

# Kinds of codes; lanes in a container.
INT4, TABLE4, INT8, FP8 = (tl.constexpr(kind) for kind in range(4))
LANES = (4, 4, 2, 2)

# Zeros: none (symmetric: 8 for int4, 0 for int8), small integers with the scales, any float32.
SYMMETRIC, INTEGERS, FLOATS = (tl.constexpr(zeros) for zeros in range(3))


@triton.constexpr_function
def pair(bits: int) -> str:
    """16 bits twice, as an assembler's constant."""
    return f"0x{bits << 16 | bits:08x}"


@triton.constexpr_function
def _instructions(kind: int, lane: int, half: bool, zeros: int) -> list[str]:
    """PTX that leaves a pair of numbers in $0; codes in $1, parameters in $2 and $3."""
    one = [f"mov.b32 one, {pair(0x3F80)}"]
    if zeros == FLOATS:
        add = "fma.rn.bf16x2 $0, $0, one, z"
        # The codes exactly in bfloat16, which is the upper half of a float32.
        low, high = "shl.b32 s, $0, 16", "and.b32 v, $0, 0xffff0000"
        less = ["mov.b32 f, s", "sub.f32 f, f, $2", "mov.b32 g, v", "sub.f32 g, g, $3"]
        narrow = f"cvt.rn.{'f16x2' if half else 'bf16x2'}.f32 $0, g, f"
        if kind == INT8:
            # 128 + seven bits, less 128 or 256 by the sign's bit
            code = ["mov.b32 s, $1" if lane == 0 else "shr.b32 s, $1, 8"]
            code += [f"lop3.b32 $0, s, {pair(0x7F)}, {pair(0x4300)}, 0xea"]
            code += [f"lop3.b32 z, s, {pair(0x80)}, {pair(0xC300)}, 0xea", *one, add]
        else:
            code = ["mov.b32 s, $1" if lane == 0 else f"shr.b32 s, $1, {4 * lane}"]
            code += [f"lop3.b32 $0, s, {pair(0x000F)}, {pair(0x4300)}, 0xea"]
            code += [f"mov.b32 z, {pair(0xC300)}", *one, add]
        return [*code, low, high, *less, narrow]
    add = "add.f16x2 $0, $0, z" if half else "fma.rn.bf16x2 $0, $0, one, z"
    if kind == FP8:
        # Exponent and mantissa moved into place; the exponents' difference is multiplied away.
        down = 1 if half else 4
        kept = pair((0x7F << 7) if half else (0x7F << 4))
        if lane == 0:
            code = [f"shl.b32 v, $1, {8 - down}", "shl.b32 s, $1, 8"]
        else:
            code = [f"shr.b32 v, $1, {down}", "mov.b32 s, $1"]
        code += [f"and.b32 v, v, {kept}", f"lop3.b32 $0, s, {pair(0x8000)}, v, 0xea"]
        scale = pair(0x5C00 if half else 0x7B80)  # 2^8, 2^120
        if half:
            return [*code, f"mov.b32 z, {scale}", "mul.f16x2 $0, $0, z"]
        return [*code, f"mov.b32 one, {scale}", f"mov.b32 z, {pair(0x8000)}", add]
    if kind == INT8 and half:
        # 1024 + code + 128
        code = ["mov.b32 s, $1" if lane == 0 else "shr.b32 s, $1, 8"]
        code += [f"lop3.b32 s, s, {pair(0xFF)}, {pair(0x80)}, 0x6a"]
        return [*code, f"or.b32 $0, s, {pair(0x6400)}", f"mov.b32 z, {pair(0xE480)}", add]
    if kind == INT8:
        # As with nibbles below: code + 128, then a 64th of it.
        code = ["mov.b32 s, $1" if lane == 0 else "shr.b32 s, $1, 8"]
        code += [f"lop3.b32 $0, s, {pair(0xFF)}, {pair(0x80)}, 0x6a"]
        return [*code, f"mov.b32 z, {pair(0xC000)}", f"mov.b32 one, {pair(0x7F00)}", add]
    if half and lane % 2:
        # 1024 + 16 * nibble, a sixteenth of it: half the shifts, as float16 has bits to spare
        code = ["mov.b32 s, $1" if lane == 1 else "shr.b32 s, $1, 8"]
        code += [f"lop3.b32 $0, s, {pair(0x00F0)}, {pair(0x6400)}, 0xea"]
        if zeros == INTEGERS:
            zero = ["prmt.b32 z, $2, $3, 0x7632", "shl.b32 z, z, 4", f"or.b32 z, z, {pair(0xD400)}"]
        else:
            zero = [f"mov.b32 z, {pair(0xD480)}"]
        return [*code, *zero, f"mov.b32 one, {pair(0x2C00)}", "fma.rn.f16x2 $0, $0, one, z"]
    if half:
        # 1024 + nibble
        code = ["mov.b32 s, $1" if lane == 0 else "shr.b32 s, $1, 8"]
        code += [f"lop3.b32 $0, s, {pair(0x000F)}, {pair(0x6400)}, 0xea"]
        if zeros == INTEGERS:
            zero = ["prmt.b32 z, $2, $3, 0x7632", f"or.b32 z, z, {pair(0xE400)}"]
        else:
            zero = [f"mov.b32 z, {pair(0xE408)}"]
        return [*code, *zero, add]
    # The lowest 8 bits of a bfloat16 alone are that integer times 2^-133, be it subnormal or not.
    # The largest power of two takes them to a 64th.
    code = ["mov.b32 s, $1" if lane < 2 else "shr.b32 s, $1, 8"]
    code += [f"and.b32 $0, s, {pair(0x00F0 if lane % 2 else 0x000F)}"]
    if zeros == INTEGERS:
        # 128 + zero, then 2 - (128 + zero) / 64
        zero = ["prmt.b32 z, $2, $3, 0x7632", f"or.b32 z, z, {pair(0x4300)}"]
        zero += [f"mov.b32 one, {pair(0xBC80)}", f"mov.b32 v, {pair(0x4000)}"]
        zero += ["fma.rn.bf16x2 z, z, one, v"]
    else:
        zero = [f"mov.b32 z, {pair(0xBE00)}"]
    return [*code, *zero, f"mov.b32 one, {pair(0x7D00 if lane % 2 else 0x7F00)}", add]


@triton.constexpr_function
def factor(kind: int, zeros: int, dtype: tl.dtype, interpreted: bool) -> float:
    """What the numbers of ``unpacked`` are to be multiplied by: 64 where they are 64ths."""
    scaled = kind in (INT4, INT8) and zeros != FLOATS and dtype == tl.bfloat16
    return 64.0 if scaled and not interpreted else 1.0


@triton.constexpr_function
def assembly(kind: int, lane: int, half: bool, zeros: int) -> str:
    """The PTX of a pair of numbers."""
    return (
        "{ .reg .b32 s, v, z, one; .reg .f32 f, g; "
        + "; ".join(_instructions(kind, lane, half, zeros))
        + "; }"
    )


@triton.constexpr_function
def table_assembly() -> str:
    """PTX that looks two containers' nibbles ($4) up; pairs of the four lanes go to $0 to $3.

    A byte permutation picks 4 of 8 bytes by 4 nibbles' lower bits: two of them look the 4 nibbles
    of a container up in 16 bytes, and the nibbles' upper bits choose. So for the entries' lower
    bytes, in $5, $7, $9, $11, and their upper, in $13, $15, $17, $19 (each comes twice).
    """
    code = []
    for element in (0, 1):
        e = f"e{element}"
        code += [f"shr.b32 {e}, $4, {16 * element}" if element else f"mov.b32 {e}, $4"]
        code += [f"and.b32 s, {e}, 0x7777", f"and.b32 m, {e}, 0x8888"]
        code += ["shr.b32 m, m, 1", "or.b32 m, m, 0x3210"]
        for half, first in (("low", 5), ("high", 13)):
            code += [f"prmt.b32 a, ${first}, ${first + 2}, s"]
            code += [f"prmt.b32 b, ${first + 4}, ${first + 6}, s", f"prmt.b32 {half}, a, b, m"]
        code += [f"prmt.b32 x{element}, low, high, 0x5140"]
        code += [f"prmt.b32 y{element}, low, high, 0x7362"]
    for lane, kept in enumerate("xxyy"):
        selector = "0x7632" if lane % 2 else "0x5410"
        code += [f"prmt.b32 ${lane}, {kept}0, {kept}1, {selector}"]
    registers = "e0, e1, s, m, a, b, low, high, x0, x1, y0, y1"
    return "{ .reg .b32 " + registers + "; " + "; ".join(code) + "; }"


@triton.jit
def table_words(table, DTYPE: tl.constexpr):
    """The eight words of a packed table for ``looked_up``, [1, 1] each."""
    first = 16 + (8 if tl.float16 == DTYPE else 0)
    words = table.to(tl.pointer_type(tl.int32)) + first + tl.zeros((1, 1), tl.int32)
    return (
        tl.load(words),
        tl.load(words + 1),
        tl.load(words + 2),
        tl.load(words + 3),
        tl.load(words + 4),
        tl.load(words + 5),
        tl.load(words + 6),
        tl.load(words + 7),
    )


@triton.jit
def looked_up(containers, words, DTYPE: tl.constexpr):
    """The entries of the four lanes in DTYPE; words as ``table_words`` gives them."""
    return tl.inline_asm_elementwise(
        table_assembly(),
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [
            containers,
            tl.broadcast_to(words[0], containers.shape),
            tl.broadcast_to(words[1], containers.shape),
            tl.broadcast_to(words[2], containers.shape),
            tl.broadcast_to(words[3], containers.shape),
            tl.broadcast_to(words[4], containers.shape),
            tl.broadcast_to(words[5], containers.shape),
            tl.broadcast_to(words[6], containers.shape),
            tl.broadcast_to(words[7], containers.shape),
        ],
        dtype=(DTYPE.value, DTYPE.value, DTYPE.value, DTYPE.value),
        is_pure=True,
        pack=2,
    )


@triton.jit
def code_of(containers, LANE: tl.constexpr, KIND: tl.constexpr):
    """The codes of a lane as int32: unsigned nibbles, signed bytes, bits of e4m3."""
    wide = containers.to(tl.int32)
    if KIND == 0 or KIND == 1:
        return (wide >> (4 * LANE)) & 15
    if KIND == 2:
        return (wide << (24 - 8 * LANE)) >> 24
    return (wide >> (8 * LANE)) & 0xFF


@triton.jit
def value_of(containers, LANE: tl.constexpr, KIND: tl.constexpr, table):
    """The numbers of a lane in float32, zeros not subtracted; `table` [16] of TABLE4 alone."""
    code = code_of(containers, LANE, KIND)
    if KIND == 1:
        return tl.load(table + code)
    if KIND == 3:
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return code.to(tl.float32)


@triton.jit
def unpacked(
    containers,
    params,
    table,
    LANE: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The numbers of a lane less their zeros, over ``factor``, in DTYPE (bfloat16 or float16).

    containers int16 [rows, columns]; params of the same shape: int32 whose upper half is the zero
    (INTEGERS), float32 zeros (FLOATS), anything otherwise. Exact but for FLOATS and tables, which
    are rounded once.
    """
    if INTERPRETED:
        value = value_of(containers, LANE, KIND, table)
        if ZEROS == 2:
            value -= params
        elif ZEROS == 1:
            value -= (params >> 16).to(tl.float32)
        elif KIND == 0:
            value -= 8.0
        return value.to(DTYPE)
    HALF: tl.constexpr = tl.float16 == DTYPE
    if ZEROS == 2:
        return tl.inline_asm_elementwise(
            assembly(KIND, LANE, HALF, ZEROS),
            "=&r,r,f,f",
            [containers, params],
            dtype=DTYPE.value,
            is_pure=True,
            pack=2,
        )
    if ZEROS == 1:
        return tl.inline_asm_elementwise(
            assembly(KIND, LANE, HALF, ZEROS),
            "=&r,r,r,r",
            [containers, params],
            dtype=DTYPE.value,
            is_pure=True,
            pack=2,
        )
    return tl.inline_asm_elementwise(
        assembly(KIND, LANE, HALF, ZEROS),
        "=&r,r",
        [containers],
        dtype=DTYPE.value,
        is_pure=True,
        pack=2,
    )
