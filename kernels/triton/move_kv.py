"""Keys and values from slots to slots: rows are gathered into a buffer, then scattered.

Two launches, because a slot may be the source of one row and the target of another, and programs of
one launch do not wait for each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layer_cache import LayerCache
from kernels.triton.rotary import HEADS_PER_PROGRAM


@triton.jit
def _copy_heads(
    data,
    scales,
    slot,
    buffer,
    scale_buffer,
    kept_row,
    first_head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SCALED: tl.constexpr,
    SCATTERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Some heads of keys or of values between a slot and a row [HEADS, Dh] of the buffer."""
    head = first_head + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_D)[None, :]
    exists = head < HEADS
    inside = exists[:, None] & (column < HEAD_DIM)
    rows = (slot // PAGE * HEADS + head) * PAGE + slot % PAGE
    kept = kept_row * HEADS + head
    cached = data + rows[:, None] * HEAD_DIM + column
    buffered = buffer + kept[:, None] * HEAD_DIM + column
    if SCATTERS:
        tl.store(cached, tl.load(buffered, mask=inside, other=0), mask=inside)
    else:
        tl.store(buffered, tl.load(cached, mask=inside, other=0), mask=inside)
    if SCALED:
        if SCATTERS:
            found = tl.load(scale_buffer + kept, mask=exists, other=0.0)
            tl.store(scales + rows, found, mask=exists)
        else:
            found = tl.load(scales + rows, mask=exists, other=0.0)
            tl.store(scale_buffer + kept, found, mask=exists)


@triton.jit
def _copy_kernel(
    keys,
    values,
    key_scales,
    value_scales,
    buffer,
    scale_buffer,
    sources,
    targets,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SCALED: tl.constexpr,
    SCATTERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Sources to the buffers [row, keys or values, HEADS, Dh], or if SCATTERS those to targets.

    Grid (rows, blocks of heads of keys and then of values).
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    HEAD_BLOCKS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    source = tl.load(sources + row)
    target = tl.load(targets + row)
    if (source >= 0) & (target >= 0):
        slot = source
        if SCATTERS:
            slot = target
        if part < HEAD_BLOCKS:
            _copy_heads(
                keys, key_scales, slot, buffer, scale_buffer, row * 2, part * BLOCK_HEADS,
                HEADS, HEAD_DIM, PAGE, SCALED, SCATTERS, BLOCK_D, BLOCK_HEADS,
            )  # fmt: skip
        else:
            _copy_heads(
                values, value_scales, slot, buffer, scale_buffer, row * 2 + 1,
                (part - HEAD_BLOCKS) * BLOCK_HEADS,
                HEADS, HEAD_DIM, PAGE, SCALED, SCATTERS, BLOCK_D, BLOCK_HEADS,
            )  # fmt: skip


def move_kv(cache: LayerCache, sources: Tensor, targets: Tensor) -> bool:
    """As ``ops.move_kv``; False if the operands are not of the expected kind."""
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    if not all(t is None or t.is_contiguous() for t in tensors):
        return False
    if cache.keys.dtype != cache.values.dtype or sources.shape != targets.shape:
        return False
    for slots in (sources, targets):
        if slots.dtype != torch.int64 or not slots.is_contiguous():
            return False
    # Bytes stay bytes: not every device has a type for FP8.
    keys, values = (
        t.view(torch.uint8) if t.element_size() == 1 else t for t in (cache.keys, cache.values)
    )
    rows, heads, head_dim = sources.shape[0], cache.num_kv_heads, keys.shape[3]
    buffer = keys.new_empty((rows, 2, heads, head_dim))
    scales = None
    if cache.key_scales is not None:
        scales = cache.key_scales.new_empty((rows, 2, heads))
    for scatters in (False, True):
        _copy_kernel[(rows, 2 * triton.cdiv(heads, HEADS_PER_PROGRAM))](
            keys,
            values,
            cache.key_scales,
            cache.value_scales,
            buffer,
            scales,
            sources,
            targets,
            HEADS=heads,
            HEAD_DIM=head_dim,
            PAGE=cache.block_size,
            SCALED=scales is not None,
            SCATTERS=scatters,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_HEADS=HEADS_PER_PROGRAM,
            num_warps=2,
        )
    return True
