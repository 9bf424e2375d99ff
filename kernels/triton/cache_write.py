"""Keys and values into their pages, rounded on the way; with the rotary embedding fused, or not."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.head_norms import HeadNorms
from kernels.layer_cache import LayerCache
from kernels.triton.norm import fits_weight, heads_are_packed
from kernels.triton.rotary import HEADS_PER_PROGRAM, takes_rotary, turn, turned
from kernels.triton.rounding import code_of, magnitude, rounded, scales
from kernels.triton.runtime import FLOATS, facts_of

NOT_ROUNDED = tl.constexpr(-1)


@triton.jit
def _store_heads(
    heads,
    data,
    data_scales,
    slot,
    first_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Store heads of the token at `heads` as they are."""
    head = first_head + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < NUM_HEADS)[:, None] & (column < HEAD_DIM)
    rows = (slot // PAGE * NUM_HEADS + head) * PAGE + slot % PAGE
    targets = data + rows[:, None] * HEAD_DIM + column
    values = tl.load(heads + head[:, None] * HEAD_DIM + column, mask=inside, other=0.0)
    if CODE == NOT_ROUNDED:
        tl.store(targets, values, mask=inside)
    else:
        values = values.to(tl.float32)
        scale, inverse = scales(tl.max(magnitude(values), 1), 0.0, CODE)
        tl.store(data_scales + rows, scale, mask=head < NUM_HEADS)
        tl.store(targets, rounded(values * inverse[:, None], CODE), mask=inside)


@triton.jit
def _store_turned_heads(
    heads,
    table,
    position,
    norm,
    eps,
    data,
    data_scales,
    slot,
    first_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNING: tl.constexpr,
    PAGE: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """Norm, turn and store heads of the token at `heads`; the token's own stay as they are."""
    head = first_head + tl.arange(0, BLOCK_HEADS)
    exists = (head < NUM_HEADS)[:, None]
    first, second, rest = turned(
        heads + head[:, None] * HEAD_DIM,
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
    rows = (slot // PAGE * NUM_HEADS + head) * PAGE + slot % PAGE
    column = tl.arange(0, BLOCK_HALF)[None, :]
    inside = exists & (column < TURNING // 2)
    targets = data + rows[:, None] * HEAD_DIM + column
    left = TURNING + tl.arange(0, BLOCK_REST)[None, :]
    in_rest = exists & (left < HEAD_DIM)
    rest_targets = data + rows[:, None] * HEAD_DIM + left
    if CODE != NOT_ROUNDED:
        # From the keys' dtype, as if they had been turned in place.
        first, second, rest = first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)
        largest = tl.max(tl.maximum(magnitude(first), magnitude(second)), 1)
        if TURNING < HEAD_DIM:
            largest = tl.maximum(largest, tl.max(magnitude(rest), 1))
        scale, inverse = scales(largest, 0.0, CODE)
        tl.store(data_scales + rows, scale, mask=head < NUM_HEADS)
        inverse = inverse[:, None]
        first, second = rounded(first * inverse, CODE), rounded(second * inverse, CODE)
        rest = rounded(rest * inverse, CODE)
    tl.store(targets, first, mask=inside)
    tl.store(targets + TURNING // 2, second, mask=inside)
    if TURNING < HEAD_DIM:
        tl.store(rest_targets, rest, mask=in_rest)


@triton.jit
def _rotary_and_write_kernel(
    q,
    k,
    v,
    positions,
    table,
    slots,
    keys,
    values,
    key_scales,
    value_scales,
    query_norm,
    key_norm,
    q_stride,
    k_stride,
    v_stride,
    eps,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNING: tl.constexpr,
    PAGE: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    QUERY_BLOCKS: tl.constexpr = (QUERY_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KEY_BLOCKS: tl.constexpr = (KEY_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    if part < QUERY_BLOCKS:
        turn(
            q + token * q_stride,
            table,
            tl.load(positions + token),
            query_norm,
            eps,
            part * BLOCK_HEADS,
            QUERY_HEADS,
            HEAD_DIM,
            TURNING,
            BLOCK_HALF,
            BLOCK_REST,
            BLOCK_HEADS,
            ROUND_FIRST,
        )
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            if part < QUERY_BLOCKS + KEY_BLOCKS:
                _store_turned_heads(
                    k + token * k_stride,
                    table,
                    tl.load(positions + token),
                    key_norm,
                    eps,
                    keys,
                    key_scales,
                    slot,
                    (part - QUERY_BLOCKS) * BLOCK_HEADS,
                    KEY_HEADS,
                    HEAD_DIM,
                    TURNING,
                    PAGE,
                    CODE,
                    BLOCK_HALF,
                    BLOCK_REST,
                    BLOCK_HEADS,
                    ROUND_FIRST,
                )
            else:
                _store_heads(
                    v + token * v_stride,
                    values,
                    value_scales,
                    slot,
                    (part - QUERY_BLOCKS - KEY_BLOCKS) * BLOCK_HEADS,
                    KEY_HEADS,
                    HEAD_DIM,
                    PAGE,
                    CODE,
                    BLOCK_D,
                    BLOCK_HEADS,
                )


@triton.jit
def _write_kernel(
    k,
    v,
    slots,
    keys,
    values,
    key_scales,
    value_scales,
    k_stride,
    v_stride,
    KEY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    KEY_BLOCKS: tl.constexpr = (KEY_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    slot = tl.load(slots + token)
    if slot >= 0:
        if part < KEY_BLOCKS:
            _store_heads(
                k + token * k_stride,
                keys,
                key_scales,
                slot,
                part * BLOCK_HEADS,
                KEY_HEADS,
                HEAD_DIM,
                PAGE,
                CODE,
                BLOCK_D,
                BLOCK_HEADS,
            )
        else:
            _store_heads(
                v + token * v_stride,
                values,
                value_scales,
                slot,
                (part - KEY_BLOCKS) * BLOCK_HEADS,
                KEY_HEADS,
                HEAD_DIM,
                PAGE,
                CODE,
                BLOCK_D,
                BLOCK_HEADS,
            )


def _takes_cache(k: Tensor, v: Tensor, cache: LayerCache, slots: Tensor) -> bool:
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    if not all(t is None or t.is_contiguous() for t in tensors):
        return False
    rounds = cache.keys.dtype in (torch.int8, torch.float8_e4m3fn)
    if cache.keys.dtype != cache.values.dtype or cache.is_quantized != rounds:
        return False
    if not cache.is_quantized and cache.keys.dtype != k.dtype:
        return False
    return (
        k.dtype in FLOATS
        and v.dtype == k.dtype
        and heads_are_packed(k)
        and heads_are_packed(v)
        and k.shape == v.shape
        and k.shape[1:] == (cache.num_kv_heads, cache.keys.shape[3])
        and k.shape[2] <= 512
        and slots.dtype == torch.int64
        and slots.is_contiguous()
        and slots.shape[0] == k.shape[0]
    )


def _code(cache: LayerCache) -> int:
    if not cache.is_quantized:
        return int(NOT_ROUNDED.value)
    return code_of(cache.keys.dtype, facts_of(cache.keys))


def _bytes(data: Tensor, cache: LayerCache) -> Tensor:
    return data.view(torch.uint8) if cache.is_quantized else data


def write_kv(k: Tensor, v: Tensor, cache: LayerCache, slots: Tensor) -> bool:
    """Store heads at their slots; False if the operands are not of the expected kind."""
    if not _takes_cache(k, v, cache, slots):
        return False
    tokens, heads, head_dim = k.shape
    if not tokens:
        return True
    _write_kernel[(tokens, 2 * triton.cdiv(heads, HEADS_PER_PROGRAM))](
        k,
        v,
        slots,
        _bytes(cache.keys, cache),
        _bytes(cache.values, cache),
        cache.key_scales,
        cache.value_scales,
        k.stride(0),
        v.stride(0),
        KEY_HEADS=heads,
        HEAD_DIM=head_dim,
        PAGE=cache.block_size,
        CODE=_code(cache),
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_HEADS=HEADS_PER_PROGRAM,
        num_warps=2,
        enable_fp_fusion=False,
    )
    return True


def rotary_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    cache: LayerCache,
    slots: Tensor,
    norms: HeadNorms | None = None,
) -> bool:
    """Norm and rotate queries in place, store such keys, and values; k is left as it is."""
    if not takes_rotary(q, k, positions, cos_sin_cache) or not _takes_cache(k, v, cache, slots):
        return False
    query_norm, key_norm, eps = norms or (None, None, 0.0)
    if query_norm is not None and key_norm is not None:
        if query_norm.dtype != key_norm.dtype:
            return False
        if not all(fits_weight(norm, q, q.shape[2]) for norm in (query_norm, key_norm)):
            return False
    tokens, heads, head_dim = q.shape
    kv_heads, turning = k.shape[1], cos_sin_cache.shape[1]
    if not tokens:
        return True
    parts = triton.cdiv(heads, HEADS_PER_PROGRAM) + 2 * triton.cdiv(kv_heads, HEADS_PER_PROGRAM)
    _rotary_and_write_kernel[(tokens, parts)](
        q,
        k,
        v,
        positions,
        cos_sin_cache,
        slots,
        _bytes(cache.keys, cache),
        _bytes(cache.values, cache),
        cache.key_scales,
        cache.value_scales,
        query_norm,
        key_norm,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        eps,
        QUERY_HEADS=heads,
        KEY_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        TURNING=turning,
        PAGE=cache.block_size,
        CODE=_code(cache),
        BLOCK_HALF=triton.next_power_of_2(turning // 2),
        BLOCK_REST=triton.next_power_of_2(max(1, head_dim - turning)),
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_HEADS=HEADS_PER_PROGRAM,
        ROUND_FIRST=query_norm is not None and query_norm.dtype == q.dtype,
        num_warps=2,
        enable_fp_fusion=False,
    )
    return True
