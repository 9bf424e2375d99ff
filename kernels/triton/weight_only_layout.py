"""How weights that are widened as they are multiplied lie in memory: layout "triton".

Columns come in units. A unit of a row is QUARTER containers of 16 bits; lane j of its container i
(4 nibbles or 2 bytes, the lowest first) holds column ``j * QUARTER + i`` of the unit. A lane of
neighbouring containers is thus neighbouring columns, and needs no shuffling on its way into a
matrix instruction. A lane lies in one group of columns. K is padded to whole units with zeros.
Data is [units, N, QUARTER], so that the tile of a program is one piece of memory.

Scales and zeros are [groups, N]. Where scales are exact in 16 bits they come in words of two: the
scales of two groups [groups / 2, N, 2] of a symmetric format, or a scale and its integer zero
(int16 in the place of a float) [groups, N, 2]. Otherwise they are float32, zeros too. Zeros that
need no place have an empty tensor: float32 if symmetric, int16 if they are with the scales.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

QUARTERS = (64, 32, 16)  # containers of a unit; a matrix instruction takes 16 columns
LARGEST_INTEGER_ZERO = 15


class Units(NamedTuple):
    """Columns of a unit, containers of it, and units along K."""

    columns: int
    quarter: int
    total: int


@lru_cache(maxsize=4096)
def units_of(k: int, lanes: int, group_size: int) -> Units | None:
    """The units of a weight with K columns; None where groups of columns cut every kind of lane.

    The largest that divides K, or else the largest: bigger units take fewer, wider loads. A
    `group_size` of 0 means one group.
    """
    fitting = [quarter for quarter in QUARTERS if group_size % quarter == 0]
    if not fitting or k < 1:
        return None
    whole = [quarter for quarter in fitting if k % (quarter * lanes) == 0]
    quarter = (whole or fitting)[0]
    return Units(quarter * lanes, quarter, -(-k // (quarter * lanes)))


def pack_codes(codes: Tensor, lanes: int, units: Units) -> Tensor:
    """Codes uint8 [N, K] of 16 / lanes bits -> containers int16 [units, N, QUARTER]."""
    n, k = codes.shape
    padded = F.pad(codes, (0, units.columns * units.total - k))
    by_lane = padded.view(n, units.total, lanes, units.quarter)
    packed = by_lane[:, :, 0].to(torch.int32)
    for lane in range(1, lanes):
        packed |= by_lane[:, :, lane].to(torch.int32) << (16 // lanes * lane)
    return packed.to(torch.int16).transpose(0, 1).contiguous()


def sixteen_bits(values: Tensor) -> Tensor | None:
    """The values in float16 or bfloat16, whichever holds all of them exactly; None if neither."""
    for dtype in (torch.float16, torch.bfloat16):
        narrow = values.to(dtype)
        if torch.equal(narrow.float(), values.float()):
            return narrow
    return None


def pack_groups(
    scales: Tensor, zeros: Tensor | None, symmetric_zero: int, group_size: int, units: Units
) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N, groups] -> those of the layout.

    None for `zeros` means that all are `symmetric_zero`, to which they are compared otherwise.
    """
    groups = -(-units.columns * units.total // group_size)
    pairs = units.columns % (2 * group_size) == 0
    groups += groups % 2 if pairs else 0
    narrow = sixteen_bits(scales)
    symmetric = zeros is None or bool((zeros == symmetric_zero).all())
    no_zeros = scales.new_empty(0, dtype=torch.float32)
    if symmetric and pairs and narrow is not None:
        by_group = _padded(narrow, groups)  # [groups, N]
        words = by_group.view(groups // 2, 2, -1).transpose(1, 2).contiguous()
        return words, no_zeros
    if symmetric:
        return _padded(scales.float(), groups), no_zeros
    assert zeros is not None
    integers = bool(((zeros == zeros.round()) & (zeros >= 0)).all()) and (
        float(zeros.max()) <= LARGEST_INTEGER_ZERO
    )
    if integers and symmetric_zero and narrow is not None:
        bits = _padded(zeros, groups).to(torch.int16).view(narrow.dtype)
        words = torch.stack([_padded(narrow, groups), bits], dim=-1)
        return words, scales.new_empty(0, dtype=torch.int16)
    return _padded(scales.float(), groups), _padded(zeros.float(), groups)


def pack_table(table: Tensor) -> Tensor:
    """A table [16] -> float32 [32]: its numbers, then what they are looked up in by bytes.

    For bfloat16 and then for float16 four words of the 16 entries' lower bytes and four of their
    upper ones.
    """
    parts = [table.float()]
    for dtype in (torch.bfloat16, torch.float16):
        by_byte = table.to(dtype).view(torch.uint8).view(16, 2).t().contiguous()
        parts.append(by_byte.view(torch.int32).view(torch.float32).flatten())
    return torch.cat(parts)


def _padded(values: Tensor, groups: int) -> Tensor:
    """[N, groups] -> [groups, N], with groups of zeros for padded columns."""
    return F.pad(values, (0, groups - values.shape[1])).t().contiguous()
