"""Rotary embedding, in place, in one kernel for queries and keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.norm import FLOATS, heads_are_packed

HEADS_PER_PROGRAM = 8  # of one token; they share its cosines and sines


@triton.jit
def angles_of(table, position, TURNING: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Cosines and sines of one position, [1, BLOCK_HALF] each, and where they are [1, BLOCK_HALF].

    The table is [max_position, TURNING], cosines then sines.
    """
    HALF: tl.constexpr = TURNING // 2
    column = tl.arange(0, BLOCK_HALF)
    inside = column < HALF
    places = table + position * TURNING + column
    cos = tl.load(places, mask=inside, other=0.0)
    sin = tl.load(places + HALF, mask=inside, other=0.0)
    return cos[None, :], sin[None, :], inside[None, :]


@triton.jit
def turn(
    heads,
    table,
    position,
    first_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNING: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Turn BLOCK_HEADS heads of the token at `heads`, from `first_head` on, in place."""
    cos, sin, inside = angles_of(table, position, TURNING, BLOCK_HALF)
    head = first_head + tl.arange(0, BLOCK_HEADS)
    inside = inside & (head < NUM_HEADS)[:, None]
    places = heads + head[:, None] * HEAD_DIM + tl.arange(0, BLOCK_HALF)[None, :]
    first = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(places + TURNING // 2, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = heads.dtype.element_ty
    tl.store(places, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(places + TURNING // 2, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def _rotary_kernel(
    q,
    k,
    positions,
    table,
    q_stride,
    k_stride,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNING: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_HEADS
    QUERY_BLOCKS: tl.constexpr = (QUERY_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    position = tl.load(positions + token)
    if tl.program_id(1) < QUERY_BLOCKS:
        heads = q + token * q_stride
        turn(heads, table, position, first, QUERY_HEADS, HEAD_DIM, TURNING, BLOCK_HALF, BLOCK_HEADS)
    else:
        heads = k + token * k_stride
        first -= QUERY_BLOCKS * BLOCK_HEADS
        turn(heads, table, position, first, KEY_HEADS, HEAD_DIM, TURNING, BLOCK_HALF, BLOCK_HEADS)


def takes_rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> bool:
    """Whether the kernels take these operands of a rotary embedding."""
    turning = cos_sin_cache.shape[-1]
    return (
        q.dtype in FLOATS
        and k.dtype == q.dtype
        and heads_are_packed(q)
        and heads_are_packed(k)
        and q.shape[0] == k.shape[0] == positions.shape[0]
        and q.shape[2] == k.shape[2] <= 512
        and 0 < turning <= q.shape[2]
        and turning % 2 == 0
        and cos_sin_cache.dtype == torch.float32
        and cos_sin_cache.is_contiguous()
        and positions.dtype == torch.int64
        and positions.is_contiguous()
    )


def rotary_embedding(q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> bool:
    """Rotate in place; False if the operands are not of the expected kind."""
    if not takes_rotary(q, k, positions, cos_sin_cache):
        return False
    tokens, heads, head_dim = q.shape
    turning = cos_sin_cache.shape[1]
    if not tokens:
        return True
    blocks = sum(triton.cdiv(count, HEADS_PER_PROGRAM) for count in (heads, k.shape[1]))
    _rotary_kernel[(tokens, blocks)](
        q,
        k,
        positions,
        cos_sin_cache,
        q.stride(0),
        k.stride(0),
        QUERY_HEADS=heads,
        KEY_HEADS=k.shape[1],
        HEAD_DIM=head_dim,
        TURNING=turning,
        BLOCK_HALF=triton.next_power_of_2(turning // 2),
        BLOCK_HEADS=HEADS_PER_PROGRAM,
        num_warps=2,
        enable_fp_fusion=False,
    )
    return True
