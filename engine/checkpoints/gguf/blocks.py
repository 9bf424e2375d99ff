"""The block types of GGUF: their bytes, the floats they stand for, and their forms.

Layouts and formulas follow ggml's structures (`block_q4_0` and so on). A row is a run of blocks;
`unpack` functions take uint8 [rows, blocks, bytes of a block].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.quantize.forms import DenseForm, IntGroupForm, LinearForm

_Bytes = NDArray[np.uint8]
_Floats = NDArray[np.float32]
K_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Affine:
    """Integers and what makes floats of them: `values = scale * q + offset` by group.

    q [rows, groups, group size] in 0 .. 2**bits - 1; scale and offset float32 [rows, groups].
    """

    q: NDArray[np.uint8]
    scale: _Floats
    offset: _Floats
    bits: int


@dataclass(frozen=True, slots=True)
class BlockType:
    """One tensor type: `elements` in each block of `bytes`.

    `dequantize` makes float32 [rows, elements of a row] of the blocks. `affine` gives the integers
    where the type is integers with scales and offsets in groups that the kernels multiply by.
    """

    name: str
    elements: int
    bytes: int
    dequantize: Callable[[_Bytes], _Floats]
    affine: Callable[[_Bytes], Affine] | None = None

    def floats(self, rows: _Bytes) -> Tensor:
        """float32 [rows, elements] of uint8 [rows, bytes]."""
        blocks = rows.reshape(rows.shape[0], -1, self.bytes)
        values = self.dequantize(blocks).reshape(rows.shape[0], -1)
        # A type that needs no arithmetic is still a view of the mapped file.
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def form(self, rows: _Bytes) -> LinearForm:
        """The weight of a linear layer: kept as integers where there is a path for them."""
        if self.affine is None:
            return DenseForm(self.floats(rows))
        parts = self.affine(rows.reshape(rows.shape[0], -1, self.bytes))
        # A group whose scale is 0 is constant; as a form it counts offsets: (0 - 1) * -offset.
        flat = parts.scale == 0
        scale = np.where(flat, -parts.offset, parts.scale)
        q = np.where(flat[..., None], 0, parts.q).astype(np.uint8)
        with np.errstate(divide="ignore", invalid="ignore"):
            zeros = np.where(flat, 1.0, -parts.offset / parts.scale)
        return IntGroupForm(
            torch.from_numpy(q.reshape(rows.shape[0], -1)),
            torch.from_numpy(np.ascontiguousarray(scale, np.float32)),
            torch.from_numpy(np.ascontiguousarray(zeros, np.float32)),
            parts.q.shape[-1],
            parts.bits,
        )


def _half(blocks: _Bytes, at: int) -> _Floats:
    """The float16 at byte `at` of each block, as float32 [rows, blocks]."""
    return (
        np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)
    )


def _nibbles(packed: _Bytes) -> _Bytes:
    """Low nibbles, then high ones: the halves of a block, not its pairs."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: _Bytes, at: int) -> _Bytes:
    """32 bits from byte `at` on, each in place of a fifth bit."""
    word = np.ascontiguousarray(blocks[..., at : at + 4]).view(np.uint32)
    bits = (word >> np.arange(32, dtype=np.uint32)) & 1
    return (bits << 4).astype(np.uint8)


def _f32(blocks: _Bytes) -> _Floats:
    return np.ascontiguousarray(blocks).view(np.float32)


def _f16(blocks: _Bytes) -> _Floats:
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def _bf16(blocks: _Bytes) -> _Floats:
    return (np.ascontiguousarray(blocks).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: _Bytes) -> _Floats:
    return _half(blocks, 0)[..., None] * blocks[..., 2:].view(np.int8).astype(np.float32)


def _q8_0_affine(blocks: _Bytes) -> Affine:
    scale = _half(blocks, 0)
    return Affine(np.bitwise_xor(blocks[..., 2:], np.uint8(0x80)), scale, -128 * scale, 8)


def _q4_0(blocks: _Bytes) -> _Floats:
    q = _nibbles(blocks[..., 2:]).astype(np.int8) - 8
    return _half(blocks, 0)[..., None] * q.astype(np.float32)


def _q4_0_affine(blocks: _Bytes) -> Affine:
    scale = _half(blocks, 0)
    return Affine(_nibbles(blocks[..., 2:]), scale, -8 * scale, 4)


def _q4_1_affine(blocks: _Bytes) -> Affine:
    return Affine(_nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2), 4)


def _q4_1(blocks: _Bytes) -> _Floats:
    parts = _q4_1_affine(blocks)
    return parts.scale[..., None] * parts.q.astype(np.float32) + parts.offset[..., None]


def _q5_0(blocks: _Bytes) -> _Floats:
    q = (_nibbles(blocks[..., 6:]) | _fifth_bits(blocks, 2)).astype(np.int8) - 16
    return _half(blocks, 0)[..., None] * q.astype(np.float32)


def _q5_1(blocks: _Bytes) -> _Floats:
    q = (_nibbles(blocks[..., 8:]) | _fifth_bits(blocks, 4)).astype(np.float32)
    return _half(blocks, 0)[..., None] * q + _half(blocks, 2)[..., None]


def _six_bit_scales(packed: _Bytes) -> tuple[_Floats, _Floats]:
    """12 bytes -> scales and minima of 8 sub-blocks, 6 bits each, float32 [..., 8]."""
    low, middle, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _sub_blocks(packed: _Bytes) -> _Bytes:
    """128 bytes -> 8 sub-blocks of 32 nibbles: of each 32 bytes the low ones, then the high."""
    quarters = packed.reshape(*packed.shape[:-1], 4, 1, 32)
    both = np.concatenate([quarters & 15, quarters >> 4], axis=-2)
    return both.reshape(*packed.shape[:-1], 8, 32)


def _k_affine(blocks: _Bytes, q: _Bytes, bits: int) -> Affine:
    """Q4_K and Q5_K: `d * scale * q - dmin * minimum` by sub-block."""
    scales, minima = _six_bit_scales(blocks[..., 4:16])
    rows, groups = blocks.shape[0], blocks.shape[1] * 8
    return Affine(
        q.reshape(rows, groups, 32),
        (_half(blocks, 0)[..., None] * scales).reshape(rows, groups),
        -(_half(blocks, 2)[..., None] * minima).reshape(rows, groups),
        bits,
    )


def _q4_k_affine(blocks: _Bytes) -> Affine:
    return _k_affine(blocks, _sub_blocks(blocks[..., 16:]), 4)


def _q4_k(blocks: _Bytes) -> _Floats:
    parts = _q4_k_affine(blocks)
    return parts.scale[..., None] * parts.q.astype(np.float32) + parts.offset[..., None]


def _q5_k(blocks: _Bytes) -> _Floats:
    planes = blocks[..., 16:48][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None]
    q = _sub_blocks(blocks[..., 48:]) | ((planes & 1) << 4).astype(np.uint8)
    parts = _k_affine(blocks, q, 5)
    return parts.scale[..., None] * parts.q.astype(np.float32) + parts.offset[..., None]


def _q6_k(blocks: _Bytes) -> _Floats:
    shape = blocks.shape[:-1]
    low = blocks[..., :128].reshape(*shape, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=-2).reshape(*shape, 2, 4, 32)
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32)
    high = ((high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3).astype(np.uint8)
    q = (low | (high << 4)).astype(np.int8).reshape(*shape, 16, 16) - 32
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    return (_half(blocks, 208)[..., None] * scales)[..., None] * q.astype(np.float32)


BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, _f32),
    1: BlockType("F16", 1, 2, _f16),
    2: BlockType("Q4_0", 32, 18, _q4_0, _q4_0_affine),
    3: BlockType("Q4_1", 32, 20, _q4_1, _q4_1_affine),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0, _q8_0_affine),
    12: BlockType("Q4_K", K_BLOCK, 144, _q4_k, _q4_k_affine),
    13: BlockType("Q5_K", K_BLOCK, 176, _q5_k),
    14: BlockType("Q6_K", K_BLOCK, 210, _q6_k),
    30: BlockType("BF16", 1, 2, _bf16),
}
"""Types by their code in the file (`enum ggml_type`)."""
