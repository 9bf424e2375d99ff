"""Straight-line PTX on the registers of many threads at once: inline assembly without a GPU.

Triton's interpreter cannot run it. Only what the kernels' assembly uses is known; any other
instruction raises KeyError. Subnormals count, as they do without ``.ftz``.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

PAIRS = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}


def pair_of(low: torch.Tensor, high: torch.Tensor) -> np.ndarray:
    """Tensors of 16 bits -> the registers that hold them two by two."""
    halves = torch.stack([low, high], dim=-1).contiguous()
    return halves.view(torch.int16).numpy().view(np.uint32)[..., 0].copy()


def halves_of(register: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of ``pair_of``."""
    halves = torch.from_numpy(register.view(np.int16).reshape(*register.shape, 2).copy())
    low, high = halves.view(dtype).unbind(-1)
    return low, high


def _by_half(kind: str, function: Callable[..., torch.Tensor]) -> Callable[..., np.ndarray]:
    dtype = PAIRS[kind]

    def run(*operands: np.ndarray) -> np.ndarray:
        halves = [[half.double() for half in halves_of(o, dtype)] for o in operands]
        # Exact in float64, so that there is one rounding.
        return pair_of(*(function(*(h[i] for h in halves)).to(dtype) for i in (0, 1)))

    return run


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bit by bit, the bit of the table that three bits name."""
    out = np.zeros_like(a)
    for index in range(8):
        if int(table.flat[0]) >> index & 1:
            terms = (v if index >> at & 1 else ~v for v, at in ((a, 2), (b, 1), (c, 0)))
            out |= np.bitwise_and.reduce(list(terms))
    return out


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Each nibble of the selector picks one of eight bytes, or its sign eight times."""
    out = np.zeros_like(a)
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    for place in range(4):
        nibble = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        byte = np.where(nibble & 8, np.where(byte & np.uint64(128), 255, 0), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * place)
    return out


def _f32(register: np.ndarray) -> np.ndarray:
    return register.view(np.float32)


def _narrow(kind: str) -> Callable[..., np.ndarray]:
    def run(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
        return pair_of(*(torch.from_numpy(_f32(r)).to(PAIRS[kind]) for r in (lower, upper)))

    return run


INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a.copy(),
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "sub.f32": lambda a, b: (_f32(a) - _f32(b)).view(np.uint32),
    "add.f16x2": _by_half("f16x2", lambda a, b: a + b),
    "mul.f16x2": _by_half("f16x2", lambda a, b: a * b),
    "fma.rn.f16x2": _by_half("f16x2", lambda a, b, c: a * b + c),
    "fma.rn.bf16x2": _by_half("bf16x2", lambda a, b, c: a * b + c),
    "cvt.rn.f16x2.f32": _narrow("f16x2"),
    "cvt.rn.bf16x2.f32": _narrow("bf16x2"),
}


def run(assembly: str, outputs: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs $0, $1 ... of assembly whose further operands are `inputs`, uint32 [threads]."""
    values = {f"${outputs + i}": register for i, register in enumerate(inputs)}

    def operand(text: str) -> np.ndarray:
        if re.fullmatch(r"0x[0-9a-f]+|\d+", text):
            return np.full_like(inputs[0], int(text, 0))
        return values[text]

    for line in assembly.strip().strip("{}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name and name != ".reg":
            target, *sources = [text.strip() for text in rest.split(",")]
            values[target] = INSTRUCTIONS[name](*(operand(text) for text in sources))
    return [values[f"${i}"] for i in range(outputs)]
