"""Rotary embedding, in place, in one kernel for queries and keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.norm import heads_are_packed, weighted
from kernels.triton.runtime import FLOATS

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
def turned(
    places,
    table,
    position,
    norm,
    eps,
    exists,
    HEAD_DIM: tl.constexpr,
    TURNING: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """Heads of one token, read at `places` [H, 1] where they exist, normed and turned.

    Returns both halves of what turns, [H, BLOCK_HALF], and what does not, [H, BLOCK_REST] (the
    first half once more where everything turns), rounded to the heads' dtype after the norm and
    after the turn as if each had been an operation of its own. A norm of None is none.
    """
    HALF: tl.constexpr = TURNING // 2
    dtype: tl.constexpr = places.dtype.element_ty
    cos, sin, in_half = angles_of(table, position, TURNING, BLOCK_HALF)
    column = tl.arange(0, BLOCK_HALF)
    inside = exists & in_half
    first = tl.load(places + column[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(places + HALF + column[None, :], mask=inside, other=0.0).to(tl.float32)
    rest = first
    if TURNING < HEAD_DIM:
        left = TURNING + tl.arange(0, BLOCK_REST)
        in_rest = exists & (left < HEAD_DIM)[None, :]
        rest = tl.load(places + left[None, :], mask=in_rest, other=0.0).to(tl.float32)
    if norm is not None:
        total = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if TURNING < HEAD_DIM:
            total += tl.sum(rest * rest, 1)
        inverse = tl.rsqrt(total / HEAD_DIM + eps)[:, None]
        weight = tl.load(norm + column, mask=column < HALF, other=0.0)[None, :]
        first = weighted(first * inverse, weight, dtype, ROUND_FIRST).to(tl.float32)
        weight = tl.load(norm + HALF + column, mask=column < HALF, other=0.0)[None, :]
        second = weighted(second * inverse, weight, dtype, ROUND_FIRST).to(tl.float32)
        if TURNING < HEAD_DIM:
            weight = tl.load(norm + left, mask=left < HEAD_DIM, other=0.0)[None, :]
            rest = weighted(rest * inverse, weight, dtype, ROUND_FIRST)
    turned_first = (first * cos - second * sin).to(dtype)
    return turned_first, (second * cos + first * sin).to(dtype), rest.to(dtype)


@triton.jit
def turn(
    heads,
    table,
    position,
    norm,
    eps,
    first_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNING: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """Norm and turn BLOCK_HEADS heads of the token at `heads`, from `first_head` on, in place."""
    head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    exists = head < NUM_HEADS
    places = heads + head * HEAD_DIM
    first, second, rest = turned(
        places,
        table,
        position,
        norm,
        eps,
        exists,
        HEAD_DIM,
        TURNING,
        BLOCK_HALF,
        BLOCK_REST,
        ROUND_FIRST,
    )
    column = tl.arange(0, BLOCK_HALF)[None, :]
    inside = exists & (column < TURNING // 2)
    tl.store(places + column, first, mask=inside)
    tl.store(places + TURNING // 2 + column, second, mask=inside)
    if norm is not None and TURNING < HEAD_DIM:
        column = TURNING + tl.arange(0, BLOCK_REST)[None, :]
        tl.store(places + column, rest, mask=exists & (column < HEAD_DIM))


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
    if tl.program_id(1) < QUERY_BLOCKS:
        turn(
            q + token * q_stride,
            table,
            tl.load(positions + token),
            None,
            0.0,
            first,
            QUERY_HEADS,
            HEAD_DIM,
            TURNING,
            BLOCK_HALF,
            1,
            BLOCK_HEADS,
            False,
        )
    else:
        turn(
            k + token * k_stride,
            table,
            tl.load(positions + token),
            None,
            0.0,
            first - QUERY_BLOCKS * BLOCK_HEADS,
            KEY_HEADS,
            HEAD_DIM,
            TURNING,
            BLOCK_HALF,
            1,
            BLOCK_HEADS,
            False,
        )


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
