"""Tiles of prefill attention: defaults by device, what may be measured, how contexts are split."""

from collections.abc import Mapping

import triton
from torch import Tensor

from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata
from kernels.triton import tuning
from kernels.triton.decode_tiles import MOST_STRETCHES, splits_of
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Choice, Problem

# Tokens of a stretch: below it the float32 rows that a tile passes on for each are as much to
# write and read as the stretch's keys and values.
LEAST_STRETCH = 512
MOST_SCRATCH = 64 << 20  # bytes of stretches that wait for their merge
MOST_WARPS = 8  # of a multiprocessor, of threads that take up to 255 of its 65,536 registers each


def problem_of(q: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> Problem:
    """Sizes: head size, query heads of a key/value head, page size, new tokens of a sequence."""
    chunks = metadata.query_lens[metadata.num_decodes :]
    group = q.shape[1] // cache.num_kv_heads
    sizes = (q.shape[2], group, cache.block_size, min(tuning.round_rows(max(chunks)), 1024))
    return Problem("prefill_attention", sizes, (str(q.dtype), str(cache.keys.dtype)))


def _tiles(
    problem: Problem, block_m: int, block_n: int, warps: int, stages: int, overlapped: int
) -> Choice:
    """Tiles of at least one token."""
    return Choice(
        "triton",
        {
            "block_m": max(block_m, int(triton.next_power_of_2(problem.sizes[1]))),
            "block_n": block_n,
            "num_warps": warps,
            "num_stages": stages,
            "overlapped": overlapped,
        },
    )


def _shared_memory(problem: Problem, tiles: Mapping[str, int]) -> int:
    """Bytes that a program needs at most: queries, keys and values of every stage."""
    width = int(triton.next_power_of_2(problem.sizes[0]))
    itemsize = 1 if problem.dtypes[1] in ("torch.int8", "torch.float8_e4m3fn") else 2
    cached = 2 * tiles["block_n"] * width * itemsize * tiles["num_stages"]
    late = tiles["overlapped"] * tiles["block_n"] * width * itemsize
    return tiles["block_m"] * width * 2 + cached + late + 1024


def default_choice(problem: Problem, facts: DeviceFacts) -> Choice:
    """Rows for two groups of four warps where there are as many, else for one."""
    head_dim, group, _, new = problem.sizes
    plain = problem.dtypes[0] == problem.dtypes[1]
    large = new * group > 64
    rows, warps = (128, 8) if large else (64, 4)
    if problem.dtypes[1] == "torch.float32":
        return _tiles(problem, 32, 32 if head_dim <= 128 else 16, 4, 1, 0)
    if facts.capability < (9, 0):
        if head_dim > 128:
            return _tiles(problem, 64, 32, 8, 2, 0)
        return _tiles(problem, rows, *((64, warps, 2, 0) if head_dim <= 64 else (32, warps, 3, 0)))
    if head_dim > 128:
        return _tiles(problem, *((128, 32, 8, 2, 1) if plain else (64, 32, 8, 2, 0)))
    return _tiles(problem, rows, 64, warps, *((3, 1) if plain else (2, 0)))


def choices(problem: Problem, facts: DeviceFacts) -> list[Choice]:
    """Tiles of 64 and 128 rows; where products are asynchronous, overlapped and not."""
    found = [default_choice(problem, facts)]
    if problem.dtypes[1] == "torch.float32":
        return found
    tried = [(128, 64, 8, 2, 0), (128, 32, 8, 3, 0), (64, 64, 4, 2, 0), (64, 32, 4, 3, 0)]
    tried += [(64, 32, 8, 2, 0), (128, 64, 4, 2, 0)]
    if facts.capability >= (9, 0):
        tried += [(128, 128, 8, 2, 0), (64, 128, 4, 2, 0)]
        if problem.dtypes[0] == problem.dtypes[1]:
            tried += [(128, 64, 8, 3, 1), (128, 64, 8, 2, 1), (64, 64, 4, 3, 1)]
    for block_m, block_n, warps, stages, overlapped in tried:
        choice = _tiles(problem, block_m, block_n, warps, stages, overlapped)
        fits = _shared_memory(problem, choice.tiles) <= facts.shared_memory
        if fits and choice not in found:
            found.append(choice)
    return found


def splits_for(
    problem: Problem,
    tiles: Mapping[str, int],
    metadata: AttentionMetadata,
    heads: int,
    kv_heads: int,
    window: int,
    facts: DeviceFacts,
) -> int:
    """Into how many stretches contexts are split: 1 where tiles fill the device.

    Else as many as fill it once or twice, of LEAST_STRETCH tokens or more in the longest context,
    that fit MOST_SCRATCH. Reads the host's lists.
    """
    chunks = metadata.query_lens[metadata.num_decodes :]
    tokens = tiles["block_m"] // problem.sizes[1]
    programs = kv_heads * sum(-(-new // tokens) for new in chunks)
    resident = facts.shared_memory // _shared_memory(problem, tiles)
    slots = facts.multiprocessors * max(1, min(MOST_WARPS // tiles["num_warps"], resident))
    row = heads * 4 * (problem.sizes[0] + 1)
    most = min(2 * slots // programs, MOST_SCRATCH // (row * sum(chunks)))
    if most <= 1:
        return 1
    longest = max(metadata.context_lens_list[metadata.num_decodes :])
    if window:
        longest = min(longest, window + tokens - 1)
    return splits_of(programs, longest, slots, LEAST_STRETCH, min(most, MOST_STRETCHES))


tuning.announce("prefill_attention", choices)
