"""Pairs of token and chosen expert, sorted by expert into whole tiles of rows, on the device."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SORTED_AT_ONCE = 256  # pairs that one program compares with each other
TILES_AT_ONCE = 64


class ExpertOrder(NamedTuple):
    """Tiles of `block_m` rows, each of one expert.

    `pairs` int32 [tiles * block_m]: pair ``token * top_k + choice`` of each row, undefined past
    the tile's rows; `experts` and `rows` int32 [tiles]: whose a tile is, and how many rows it has,
    0 for tiles that are not needed.
    """

    pairs: Tensor
    experts: Tensor
    rows: Tensor
    block_m: int


# Numbers that change from step to step must not make new kernels of these.
@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(chosen, counts, num_pairs, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(chosen + pair, mask=pair < num_pairs, other=0).to(tl.int32)
    held = tl.histogram(expert, EXPERTS, mask=pair < num_pairs)
    tl.store(counts + chunk * EXPERTS + tl.arange(0, EXPERTS), held)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles", "chunks"])
def _place_kernel(
    chosen,
    counts,
    pairs,
    experts,
    rows,
    num_pairs,
    num_tiles,
    chunks,
    SINGLE: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """Places the pairs of one chunk, in order; each program describes its share of the tiles."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    index = tl.arange(0, CHUNK)
    pair = chunk * CHUNK + index
    own = tl.load(chosen + pair, mask=pair < num_pairs, other=0).to(tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    if SINGLE:
        total = tl.histogram(own, EXPERTS, mask=pair < num_pairs)
    else:
        total = tl.zeros((EXPERTS,), tl.int32)
        for begin in range(0, chunks, STEP):
            at = begin + tl.arange(0, STEP)
            held = tl.load(
                counts + at[:, None] * EXPERTS + expert[None, :],
                mask=(at < chunks)[:, None],
                other=0,
            )
            total += tl.sum(held, 0)
            before += tl.sum(tl.where((at < chunk)[:, None], held, 0), 0)
    ends = tl.cumsum((total + BLOCK_M - 1) // BLOCK_M, 0)
    first = ends - (total + BLOCK_M - 1) // BLOCK_M
    # Where a pair stands among its expert's: so many before it in the chunk chose the same.
    place = tl.gather(before + first * BLOCK_M, own, 0)
    for begin in tl.static_range(0, CHUNK, PIECE):
        other = begin + tl.arange(0, PIECE)
        at = chunk * CHUNK + other
        theirs = tl.load(chosen + at, mask=at < num_pairs, other=-1).to(tl.int32)
        same = (own[:, None] == theirs[None, :]) & (other[None, :] < index[:, None])
        place += tl.sum(same.to(tl.int32), 1)
    tl.store(pairs + place, pair, mask=pair < num_pairs)
    for begin in range(chunk * TILES, num_tiles, chunks * TILES):
        tile = begin + tl.arange(0, TILES)
        owner = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
        is_owner = owner[:, None] == expert[None, :]
        left = (total + first * BLOCK_M)[None, :] - tile[:, None] * BLOCK_M
        held = tl.minimum(tl.sum(tl.where(is_owner, left, 0), 1), BLOCK_M)
        inside = tile < num_tiles
        tl.store(experts + tile, owner, mask=inside)
        tl.store(rows + tile, held, mask=inside)


def most_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Tiles that any choice of experts can need: all that are cut off are one for each expert."""
    return num_pairs // block_m + min(num_pairs, num_experts)


def order_by_expert(chosen: Tensor, num_experts: int, block_m: int) -> ExpertOrder:
    """Sort the pairs of chosen (int64 [T, top_k]); pairs of one expert keep their order."""
    num_pairs = chosen.numel()
    tiles = most_tiles(num_pairs, num_experts, block_m)
    device = chosen.device
    pairs = torch.empty(tiles * block_m, dtype=torch.int32, device=device)
    experts, rows = torch.empty((2, tiles), dtype=torch.int32, device=device)
    if not num_pairs:
        return ExpertOrder(pairs, experts, rows, block_m)
    width = max(16, triton.next_power_of_2(num_experts))
    chunk = min(max(16, triton.next_power_of_2(num_pairs)), SORTED_AT_ONCE)
    chunks = triton.cdiv(num_pairs, chunk)
    num_warps = 8 if chunk == SORTED_AT_ONCE else 4
    counts = pairs
    if chunks > 1:
        counts = torch.empty((chunks, width), dtype=torch.int32, device=device)
        _count_kernel[(chunks,)](
            chosen, counts, num_pairs, EXPERTS=width, CHUNK=chunk, num_warps=num_warps
        )
    _place_kernel[(chunks,)](
        chosen,
        counts,
        pairs,
        experts,
        rows,
        num_pairs,
        tiles,
        chunks,
        SINGLE=chunks == 1,
        EXPERTS=width,
        CHUNK=chunk,
        PIECE=min(chunk, 32),
        STEP=max(1, min(32, 8192 // width)),
        BLOCK_M=block_m,
        TILES=max(16, min(TILES_AT_ONCE, 8192 // width)),
        num_warps=num_warps,
    )
    return ExpertOrder(pairs, experts, rows, block_m)
