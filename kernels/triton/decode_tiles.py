"""Tiles of decode attention: defaults by device, what may be measured, how contexts are split."""

import triton
from torch import Tensor

from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata
from kernels.triton import tuning
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Choice, Problem

LEAST_ROWS = 16  # of a matrix instruction
# Below it a stretch costs more by its start and its merge than by its bytes.
LEAST_STRETCH = 256
MOST_STRETCHES = 64


def product_rows(query_len: int, group: int) -> int:
    """Rows of a program's matrix products."""
    return max(LEAST_ROWS, int(triton.next_power_of_2(query_len * group)))


def problem_of(q: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> Problem:
    """Sizes: head size, rows, page size, programs without splitting, and tokens a table holds."""
    group = q.shape[1] // cache.num_kv_heads
    sizes = (
        q.shape[2],
        product_rows(metadata.decode_query_len, group),
        cache.block_size,
        tuning.round_rows(metadata.num_decodes * cache.num_kv_heads),
        tuning.round_rows(metadata.block_tables.shape[1] * cache.block_size),
    )
    return Problem("decode_attention", sizes, (str(q.dtype), str(cache.keys.dtype)))


def splits_of(
    programs: int,
    longest: int,
    slots: int,
    least: int = LEAST_STRETCH,
    most: int = MOST_STRETCHES,
) -> int:
    """Into how many stretches contexts of at most `longest` tokens are split, `least` in each.

    `programs` are there without splitting, `slots` run at a time. The fewest stretches are taken
    whose waves of programs are about as full as any number's.
    """
    most = max(1, min(most, longest // least))
    full = [programs * n / (-(-programs * n // slots) * slots) for n in range(1, most + 1)]
    return next(n for n, part in enumerate(full, 1) if part >= 0.95 * max(full))


def _tiles(problem: Problem, facts: DeviceFacts, block_n: int, stages: int, warps: int) -> Choice:
    """Tiles, with how many programs a multiprocessor holds at a time: by shared memory, and by
    the registers of 128 threads, of which each takes up to 168.
    """
    itemsize = {"torch.int8": 1, "torch.float8_e4m3fn": 1, "torch.float32": 4}
    row = triton.next_power_of_2(problem.sizes[0]) * itemsize.get(problem.dtypes[1], 2)
    # Keys and values of every stage but the one that is loaded when another is done with, and
    # what weights and maxima need to pass between warps.
    shared = 2 * block_n * row * max(1, stages - 1) + problem.sizes[1] * (row + 4 * block_n)
    return Choice(
        "triton",
        {
            "block_n": block_n,
            "num_stages": stages,
            "num_warps": warps,
            "resident": min(3, facts.shared_memory // shared),
        },
    )


def default_choice(problem: Problem, facts: DeviceFacts) -> Choice:
    """Tiles that keep two or more programs on a multiprocessor, each with loads in flight."""
    head_dim, rows, *_ = problem.sizes
    warps = 8 if rows > 64 else 4
    if problem.dtypes[1] == "torch.float32":
        return _tiles(problem, facts, 32 if head_dim <= 128 else 16, 1, warps)
    # An 8-bit tile is half as many bytes: another one is needed to have as many on their way.
    stages = 4 if problem.dtypes[1] in ("torch.int8", "torch.float8_e4m3fn") else 3
    large = _tiles(problem, facts, 64, stages, warps)
    if large.tiles["resident"] >= 2 and head_dim <= 128 and rows <= 32:
        return large
    chosen = _tiles(problem, facts, 32, stages, warps)
    while stages > 2 and not chosen.tiles["resident"]:
        stages -= 1
        chosen = _tiles(problem, facts, 32, stages, warps)
    return chosen


def choices(problem: Problem, facts: DeviceFacts) -> list[Choice]:
    """Tiles of 32 to 128 tokens, two to four of them in flight."""
    found = [default_choice(problem, facts)]
    if problem.dtypes[1] == "torch.float32":
        return found
    for block_n, stages, warps in (
        *((32, 3, 2), (32, 4, 2), (32, 3, 4), (32, 4, 4), (32, 5, 4)),
        *((64, 3, 2), (64, 3, 4), (64, 4, 4), (64, 3, 8), (128, 3, 4), (128, 3, 8)),
    ):
        choice = _tiles(problem, facts, block_n, stages, warps)
        if choice.tiles["resident"] and choice not in found:
            found.append(choice)
    return found


tuning.announce("decode_attention", choices)
