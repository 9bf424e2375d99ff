"""Weights of four or eight bits times activations of sixteen: Int4, Int8 groups, tables, FP8.

Few rows of x: the weight is read once, K split among programs whose partial sums a second kernel
adds in a fixed order. More rows: ordinary tiles. Many: the weight is widened once into memory and
the vendor's library multiplies. Activations of 32 bits always take the last way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton import tuning
from kernels.triton.runtime import DeviceFacts, facts_of
from kernels.triton.tuning import Choice, Problem, choice_for, round_rows
from kernels.triton.weight_only_kernels import merge_kernel, weight_only_kernel, widen_kernel
from kernels.triton.weight_only_layout import Units, pack_codes, pack_groups, pack_table, units_of
from kernels.triton.weight_only_unpack import (
    FLOATS,
    FP8,
    INT4,
    INT8,
    INTEGERS,
    LANES,
    SYMMETRIC,
    TABLE4,
)
from kernels.weights import (
    Fp8Weight,
    Int4Weight,
    Int8GroupWeight,
    LinearWeight,
    Table4Weight,
    unpack_nibbles,
)

KERNEL = "weight_only_linear"
# Rows of x from which the weight is widened into memory unless measured otherwise: the library's
# product then takes several times as long as the widening.
WIDEN_FROM = 512
MERGE_BLOCK = 1024
WIDEN_ROWS = 32
MOST_SPLITS = 16
FEW_ROWS = 32
# (block_m, block_n, block_k), num_warps, num_stages
FEW = (
    ((32, 128, 256), 4, 3),
    ((32, 64, 256), 4, 3),
    ((32, 64, 256), 4, 4),
    ((32, 64, 128), 4, 5),
    ((32, 128, 256), 8, 3),
    ((32, 128, 128), 4, 4),
    ((32, 32, 256), 2, 4),
)
# From this capability on sums are kept in a memory of their own, of 512 columns.
TENSOR_MEMORY = (10, 0)
RESERVED_SHARED_MEMORY = 1024  # of each block, by the system


class Form(NamedTuple):
    """What a kernel is specialised for; see ``weight_only_unpack`` for kinds and zeros."""

    kind: int
    zeros: int
    words: bool
    half_scales: bool
    group: int
    units: Units

    @property
    def lanes(self) -> int:
        """Codes in a container."""
        return LANES[self.kind]


def pack(weight: LinearWeight) -> LinearWeight | None:
    """A plain weight in layout "triton"; None where it is another's or its groups cut lanes."""
    if isinstance(weight, Fp8Weight):
        return _pack_fp8(weight)
    if not isinstance(weight, (Int4Weight, Int8GroupWeight, Table4Weight)):
        return None
    kind = _kind_of(weight)
    units = units_of(weight.shape[1], LANES[kind], weight.group_size)
    if units is None:
        return None
    codes = weight.data.view(torch.uint8) if kind == INT8.value else unpack_nibbles(weight.data)
    data = pack_codes(codes, LANES[kind], units)
    zeros = None if isinstance(weight, Table4Weight) else weight.zeros
    neutral = 8 if kind == INT4.value else 0
    scales, packed = pack_groups(weight.scales, zeros, neutral, weight.group_size, units)
    if isinstance(weight, Table4Weight):
        table = pack_table(weight.table)
        return replace(weight, data=data, scales=scales, table=table, layout="triton")
    return replace(weight, data=data, scales=scales, zeros=packed, layout="triton")


def _pack_fp8(weight: Fp8Weight) -> Fp8Weight | None:
    if weight.activations != "none":
        return None
    rows, columns = weight.block_shape or (0, 0)
    units = units_of(weight.shape[1], LANES[FP8.value], columns)
    if units is None:
        return None
    data = pack_codes(weight.data.view(torch.uint8), LANES[FP8.value], units)
    scales = weight.scales
    if rows:
        by_row = scales.repeat_interleave(rows, 0)[: weight.shape[0]]
        scales, _ = pack_groups(by_row, None, 0, columns, units)
    return replace(weight, data=data, scales=scales, layout="triton")


def takes(weight: LinearWeight) -> bool:
    """Whether a weight in layout "triton" was packed here."""
    if isinstance(weight, Fp8Weight):
        return weight.activations == "none"
    return isinstance(weight, (Int4Weight, Int8GroupWeight, Table4Weight))


def _kind_of(weight: LinearWeight) -> int:
    if isinstance(weight, Int4Weight):
        return int(INT4.value)
    if isinstance(weight, Table4Weight):
        return int(TABLE4.value)
    return int(INT8.value) if isinstance(weight, Int8GroupWeight) else int(FP8.value)


def form_of(weight: LinearWeight) -> Form:
    """How a weight in layout "triton" lies."""
    assert isinstance(weight, (Int4Weight, Int8GroupWeight, Table4Weight, Fp8Weight))
    zeros = SYMMETRIC
    if isinstance(weight, (Int4Weight, Int8GroupWeight)):
        if weight.zeros.dtype == torch.int16:
            zeros = INTEGERS
        elif weight.zeros.numel():
            zeros = FLOATS
    if isinstance(weight, Fp8Weight):
        group = 0 if weight.block_shape is None else weight.block_shape[1]
    else:
        group = weight.group_size
    return _form(_kind_of(weight), zeros.value, weight.scales.dtype, group, weight.shape[1])


@lru_cache(maxsize=4096)
def _form(kind: int, zeros: int, scales: torch.dtype, group: int, k: int) -> Form:
    units = units_of(k, LANES[kind], group)
    assert units is not None, "a weight in this layout has units"
    words = scales != torch.float32
    return Form(kind, zeros, words, scales == torch.float16, group, units)


def tensors_of(weight: LinearWeight, form: Form) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data, scales (words as int32), zeros and table; what there is none of is another tensor."""
    assert isinstance(weight, (Int4Weight, Int8GroupWeight, Table4Weight, Fp8Weight))
    scales = weight.scales.view(torch.int32) if form.words else weight.scales
    zeros, table = scales, scales
    if isinstance(weight, (Int4Weight, Int8GroupWeight)) and weight.zeros.numel():
        zeros = weight.zeros
    if isinstance(weight, Table4Weight):
        table = weight.table
    return weight.data, scales, zeros, table


def linear(rows: Tensor, weight: LinearWeight) -> Tensor:
    """``rows @ w.T + bias``; rows [M, K], columns as stored -> [M, N] in rows' dtype."""
    m, (n, k) = rows.shape[0], weight.shape
    if m == 0 or n == 0:
        return rows.new_empty((m, n))
    form = form_of(weight)
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return _widened_linear(rows, weight, form)
    facts = facts_of(rows)
    sizes = (round_rows(m), n, k, form.group, form.kind, form.zeros)
    problem = Problem(KERNEL, sizes, (str(rows.dtype),))
    choice = choice_for(problem, default_choice, facts)
    if choice.path == "widen":
        return _widened_linear(rows, weight, form)
    return _tiled_linear(rows, weight, form, choice.tiles)


def _widened_linear(x: Tensor, weight: LinearWeight, form: Form) -> Tensor:
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    return F.linear(x, _widened(weight, form, x.dtype), bias)


def _tiled_linear(x: Tensor, weight: LinearWeight, form: Form, tiles: Mapping[str, int]) -> Tensor:
    m, (n, k) = x.shape[0], weight.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    units, splits = form.units, tiles["splits"]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    partial = out
    if splits > 1:
        partial = torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    bias = weight.bias
    tiles_m = -(-m // tiles["block_m"])
    data, scales, zeros, table = tensors_of(weight, form)
    weight_only_kernel[(tiles_m * -(-n // tiles["block_n"]), splits)](
        x,
        data,
        scales,
        zeros,
        table,
        scales if bias is None else bias,
        partial,
        m,
        n,
        k,
        units.total,
        x.stride(0),
        tiles_m,
        -(-units.total // splits),
        KIND=form.kind,
        ZEROS=form.zeros,
        WORDS=form.words,
        HALF_SCALES=form.half_scales,
        GROUP=form.group,
        UNIT=units.columns,
        LANES=form.lanes,
        EVEN_K=k % units.columns == 0,
        HAS_BIAS=bias is not None and splits == 1,
        BLOCK_M=tiles["block_m"],
        BLOCK_N=tiles["block_n"],
        BLOCK_K=tiles["block_k"],
        STAGES=tiles["num_stages"],
        INTERPRETED=x.device.type == "cpu",
        num_warps=tiles["num_warps"],
    )
    if splits > 1:
        merge_kernel[(-(-m * n // MERGE_BLOCK),)](
            partial,
            scales if bias is None else bias,
            out,
            m * n,
            n,
            SPLITS=splits,
            HAS_BIAS=bias is not None,
            BLOCK=MERGE_BLOCK,
        )
    return out


def dequantize(weight: LinearWeight) -> Tensor:
    """The weight [N, K] in float32, columns as stored.

    ``linear`` multiplies by exactly this where zeros are small integers or none and tables are
    exact in 16 bits; other numbers are rounded to x's dtype before they are scaled.
    """
    return _widened(weight, form_of(weight), torch.float32)


def _widened(weight: LinearWeight, form: Form, dtype: torch.dtype) -> Tensor:
    n, k = weight.shape
    data, scales, zeros, table = tensors_of(weight, form)
    out = torch.empty((n, k), dtype=dtype, device=data.device)
    widen_kernel[(form.units.total, -(-n // WIDEN_ROWS))](
        data,
        scales,
        zeros,
        table,
        out,
        n,
        k,
        KIND=form.kind,
        ZEROS=form.zeros,
        WORDS=form.words,
        HALF_SCALES=form.half_scales,
        GROUP=form.group,
        UNIT=form.units.columns,
        LANES=form.lanes,
        BLOCK_N=WIDEN_ROWS,
    )
    return out


def _units_of_problem(problem: Problem) -> Units:
    _, _, k, group, kind, _ = problem.sizes
    units = units_of(k, LANES[kind], group)
    assert units is not None, "only packed weights have problems"
    return units


def shared_memory(tiles: Mapping[str, int], lanes: int) -> int:
    """Bytes that the tiles in flight take: containers and x."""
    columns = tiles["block_k"]
    stage = tiles["block_n"] * columns // lanes * 2 + tiles["block_m"] * columns * 2
    return stage * tiles["num_stages"]


def best_splits(programs: int, units: int, slots: int, block_m: int) -> int:
    """Into how many parts K is cut: the fewest turns of the multiprocessors, counted in units.

    `programs` run without a cut, `slots` at a time. A program costs a unit beside its own, and one
    for every 16 rows of x if it is one of several: a partial sum in float32 is written and read,
    which is 8 bytes for each row where a unit of nibbles is 128.
    """

    def turns(splits: int) -> int:
        partial = -(-block_m // 16) if splits > 1 else 0
        return -(-programs * splits // slots) * (-(-units // splits) + 1 + partial)

    return min(range(1, min(units, MOST_SPLITS) + 1), key=turns)


def _tiled(
    problem: Problem,
    facts: DeviceFacts,
    shape: tuple[int, int, int],
    num_warps: int,
    num_stages: int,
) -> Choice:
    """Tiles of at most this (block_m, block_n, block_k), K cut where they are few."""
    rows, n, _, _, kind, _ = problem.sizes
    units = _units_of_problem(problem)
    block_m, block_n, block_k = shape
    tiles = {
        "block_m": min(block_m, max(16, rows)),
        "block_n": block_n,
        "block_k": min(block_k, units.columns),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    while tiles["num_stages"] > 1 and shared_memory(tiles, LANES[kind]) > facts.shared_memory:
        tiles["num_stages"] -= 1
    each = shared_memory(tiles, LANES[kind]) + RESERVED_SHARED_MEMORY
    # Registers let about 16 warps of these kernels run at once.
    blocks = max(1, min(16 // num_warps, facts.shared_memory // each))
    programs = -(-n // block_n) * -(-rows // tiles["block_m"])
    slots = facts.multiprocessors * blocks
    splits = best_splits(programs, units.total, slots, tiles["block_m"])
    return Choice("triton", {**tiles, "splits": splits})


def default_choice(problem: Problem, facts: DeviceFacts) -> Choice:
    """Tiles that fit the number of rows; from WIDEN_FROM rows the library."""
    rows, n, _, _, kind, _ = problem.sizes
    if rows >= WIDEN_FROM:
        return Choice("widen")
    if rows > FEW_ROWS:
        return _tiled(problem, facts, *_many(facts)[rows > 64])
    # Wide tiles take fewer instructions for a weight, narrow ones are more of them.
    wide = -(-n // 128) * min(_units_of_problem(problem).total, MOST_SPLITS)
    narrow = wide < 2 * facts.multiprocessors or kind == TABLE4.value  # tables take registers
    return _tiled(problem, facts, *FEW[narrow])


def choices(problem: Problem, facts: DeviceFacts) -> list[Choice]:
    """What may be measured: tiles by rows, and the library from 64 rows."""
    rows = problem.sizes[0]
    found = [_tiled(problem, facts, *shape) for shape in FEW if rows <= FEW_ROWS]
    if found:
        found += [_with_splits(found[0], splits) for splits in (1, 2, 4, 8)]
    else:
        found = [_tiled(problem, facts, *shape) for shape in _many(facts)]
    if rows >= 64:
        found.append(Choice("widen"))
    lanes = LANES[problem.sizes[4]]
    fitting = [
        choice
        for choice in found
        if choice.path == "widen" or shared_memory(choice.tiles, lanes) <= facts.shared_memory
    ]
    return [choice for i, choice in enumerate(fitting) if choice not in fitting[:i]]


def _many(facts: DeviceFacts) -> Sequence[tuple[tuple[int, int, int], int, int]]:
    """Tiles for up to 64 rows, for more, and what else there is."""
    if facts.capability >= TENSOR_MEMORY:
        # Weights and sums of a larger tile exceed it; what was compiled would stop the device.
        few, many = ((64, 128, 128), 8, 4), ((64, 128, 128), 4, 3)
        return (few, few, many, ((64, 64, 128), 4, 4))
    largest = ((128, 128, 128), 8, 3)
    # Where products are issued by warps, not by groups of four, its registers do not suffice.
    hopper = facts.capability >= (9, 0)
    main = largest if hopper else ((128, 128, 64), 8, 4)
    other = ((128, 128, 64), 8, 4) if hopper else ((128, 64, 64), 4, 4)
    return (((64, 128, 128), 8, 4), main, other, ((64, 64, 128), 4, 4))


def _with_splits(choice: Choice, splits: int) -> Choice:
    return Choice(choice.path, {**choice.tiles, "splits": splits})


tuning.announce(KERNEL, choices)
