"""Tiles of products of 8-bit rows with 8-bit weights: a sensible choice, and the others."""

from collections.abc import Mapping

from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Choice, Problem, round_rows


def tiles(m: int, facts: DeviceFacts) -> dict[str, int]:
    """Tiles that suit m rows of 8-bit operands.

    Up to 64 rows the weight's bytes are what takes time: the weight is the operand with 64 rows
    that Hopper's tensor core asks for, and stages are deep. Beyond, two tiles of 128 x 128 share a
    multiprocessor.
    """
    roomy = facts.shared_memory >= 160_000
    if m <= 64:
        rows = max(16, round_rows(m))
        return {
            "swap": 1,
            "block_m": rows,
            "block_n": 64,
            "block_k": 256 if roomy and rows <= 32 else 128,
            "splits": 0,  # as many as fill the device
            "num_warps": 4,
            "num_stages": 4,
        }
    return {
        "swap": 0,
        "block_m": 128 if m > 128 else 64,
        "block_n": 128,
        "block_k": 128,
        "splits": 0,
        "num_warps": 8 if m > 128 else 4,
        "num_stages": 3,
    }


def splits_for(m: int, n: int, k: int, tile: Mapping[str, int], facts: DeviceFacts) -> int:
    """Into how many parts K is cut: enough for two blocks on each multiprocessor, 8 at most.

    Each part has four tiles of K or more, so that its loads overlap.
    """
    if tile["splits"]:
        return tile["splits"]
    # By the rounded number, as tiles are: other numbers of parts would be other kernels.
    blocks = _cdiv(round_rows(m), tile["block_m"]) * _cdiv(n, tile["block_n"])
    wanted = _cdiv(2 * facts.multiprocessors, blocks)
    if wanted < 3 and blocks >= facts.multiprocessors:
        return 1  # a second wave that is half empty costs less than a merge
    return max(1, min(wanted, 8, k // (4 * tile["block_k"])))


def default_choice(problem: Problem, facts: DeviceFacts) -> Choice:
    """Triton's kernel with tiles for this number of rows."""
    return Choice("triton", tiles(problem.sizes[0], facts))


def triton_choices(problem: Problem, facts: DeviceFacts) -> list[Choice]:
    """Tiles worth measuring that fit the device's shared memory."""
    m = problem.sizes[0]
    start = tiles(m, facts)
    changes: list[dict[str, int]] = [{}]
    if m <= 64:
        changes += [
            {"splits": 1},
            {"block_k": 128, "num_stages": 6},
            {"block_k": 128, "num_stages": 4},
            {"block_n": 128, "num_warps": 4},
            {"block_n": 128, "block_k": 128, "num_stages": 4, "splits": 1},
            {"block_k": 512, "num_stages": 3},
            {"splits": 4},
        ]
    else:
        changes += [
            {"num_stages": 4},
            {"block_m": 64, "block_n": 128, "num_warps": 4, "num_stages": 4},
            {"block_m": 128, "block_n": 256, "num_warps": 8, "num_stages": 3},
            {"block_m": 128, "block_n": 128, "block_k": 64, "num_stages": 5},
            {"block_m": 128, "block_n": 64, "num_warps": 4, "num_stages": 4},
        ]
    found: list[Choice] = []
    for change in changes:
        tile = {**start, **change}
        needed = (tile["block_m"] + tile["block_n"]) * tile["block_k"] * tile["num_stages"]
        choice = Choice("triton", tile)
        if needed <= facts.shared_memory - 2048 and choice not in found:
            found.append(choice)
    return found


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
