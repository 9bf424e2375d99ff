"""Int8 weights by channel with rows of activations rounded to int8 (W8A8).

LLM.int8()'s outliers (Dettmers et al. 2022) are left out of the rounding and multiplied in floating
point. Where along K a row has any is a bit in a word of its own, so that the product visits only
those places, and the host is never asked.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import plain_linear
from kernels.triton import rounding, scaled_tiles, tuning
from kernels.triton.norm import row_warps
from kernels.triton.quantize_rows import quantize_rows
from kernels.triton.rounding import INT8
from kernels.triton.runtime import FLOATS, DeviceFacts, facts_of
from kernels.triton.scaled_matmul import chunk_size, merge, scaled_matmul
from kernels.triton.tuning import Choice, Problem
from kernels.weights import Int8Weight, LinearWeight

WIDEST = 65_536  # columns of a row that one program holds in registers


@triton.jit
def _split_kernel(
    x,
    data,
    row_scales,
    words,
    stride,
    width,
    threshold,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A row without its outliers in int8, and the chunks of columns that hold any."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, COUNT)
    column = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    inside = column < width
    values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    outlying = tl.abs(values) >= threshold
    held = tl.max(outlying.to(tl.int32), 1)
    tl.store(words + row, tl.sum(held << chunk, 0))
    values = tl.where(outlying, 0.0, values)
    largest = tl.max(tl.max(rounding.magnitude(values), 1), 0)
    scale, inverse = rounding.scales(largest, 0.0, INT8)
    tl.store(row_scales + row, scale)
    tl.store(data + row * width + column, rounding.rounded(values * inverse, INT8), mask=inside)


def split_outliers(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> (int8 [M, K] without elements at or above the threshold, scales [M], words [M]).

    Bit c of a row's word (int32) says whether any of its columns from ``c * chunk_size(K)`` on is
    an outlier.
    """
    rows, width = x.shape
    data = torch.empty((rows, width), dtype=torch.int8, device=x.device)
    row_scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    words = torch.empty(rows, dtype=torch.int32, device=x.device)
    chunk = chunk_size(width)
    count = triton.next_power_of_2(triton.cdiv(width, chunk))
    if rows:
        _split_kernel[(rows,)](
            x,
            data.view(torch.uint8),
            row_scales,
            words,
            x.stride(0),
            width,
            threshold,
            COUNT=count,
            CHUNK=chunk,
            num_warps=row_warps(count * chunk),
            enable_fp_fusion=False,
        )
    return data, row_scales, words


def default_choice(problem: Problem, facts: DeviceFacts) -> Choice:
    """Tiles for this number of rows; outliers of 32 bits take four times the codes' memory."""
    choice = scaled_tiles.default_choice(problem, facts)
    if "outliers" in problem.dtypes and "torch.float32" in problem.dtypes:
        tile = choice.tiles
        small = {"block_m": min(tile["block_m"], 64), "block_n": 64, "block_k": 128}
        return Choice("triton", {**tile, **small, "num_warps": 4})
    return choice


def choices(problem: Problem, facts: DeviceFacts) -> list[Choice]:
    """Triton's tiles, and PyTorch's int8 product where nothing needs padding but rows."""
    default = default_choice(problem, facts)
    found = scaled_tiles.triton_choices(problem, facts)
    found = [default, *(choice for choice in found if choice != default)]
    _, n, k = problem.sizes
    if n % 8 == 0 and k % 8 == 0 and "outliers" not in problem.dtypes:
        found.append(Choice("int_mm"))
    return found


tuning.announce("int8_linear", choices)


def pack(weight: LinearWeight) -> Int8Weight | None:
    """The same tensors: rows of K bytes are what the kernels read."""
    if not isinstance(weight, Int8Weight) or weight.shape[1] % 16:
        return None
    if weight.outlier_threshold and weight.shape[1] > WIDEST:
        return None
    return replace(weight, layout="triton")


def takes(weight: LinearWeight) -> bool:
    """Whether this module packed the weight."""
    return isinstance(weight, Int8Weight)


def dequantize(weight: LinearWeight) -> Tensor:
    """[N, K] in float32."""
    return plain_linear.dequantize(weight)


def linear(rows: Tensor, weight: LinearWeight) -> Tensor:
    """rows [M, K] -> [M, N] in their dtype."""
    assert isinstance(weight, Int8Weight)
    if rows.dtype not in FLOATS:
        return plain_linear.linear(rows, weight)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    threshold = weight.outlier_threshold
    kinds = (str(rows.dtype), "outliers") if threshold else (str(rows.dtype),)
    problem = Problem("int8_linear", (tuning.round_rows(rows.shape[0]), *weight.shape), kinds)
    choice = tuning.choice_for(problem, default_choice, facts_of(rows))
    if threshold:
        rows = rows.contiguous()
        x, scales, words = split_outliers(rows, threshold)
        outliers = (rows, words, threshold)
        return scaled_matmul(
            x, scales, weight.data, weight.scales, weight.bias, rows.dtype, choice.tiles, outliers
        )
    x, scales = quantize_rows(rows, torch.int8)
    if choice.path == "int_mm":
        out = torch.empty((len(x), weight.shape[0]), dtype=rows.dtype, device=x.device)
        if len(x):
            merge(
                plain_linear.int8_matmul(x, weight.data)[None],
                scales,
                weight.scales,
                weight.bias,
                out,
            )
        return out
    return scaled_matmul(
        x, scales, weight.data, weight.scales, weight.bias, rows.dtype, choice.tiles
    )
