"""Products of rounded rows with rounded weights, both scaled: int8 x int8 and e4m3 x e4m3.

``out[m, n] = (sum_k x[m, k] * w[n, k]) * row_scales[m] * column_scales[n] + bias[n]``. Integers are
summed in int32 and so exactly. Products of e4m3 are summed in the tensor core over one tile of K
only, because Hopper's keeps 14 bits of such sums, and the tiles in float32 (Liu et al. 2024,
"DeepSeek-V3 Technical Report", section 3.3.2).
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.runtime import facts_of
from kernels.triton.scaled_tiles import splits_for
from kernels.triton.tuning import round_rows
from kernels.triton.weight_only_unpack import FP8, SYMMETRIC, unpacked

CHUNKS = 32  # bits of a row's word that says where along K its outliers are


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tiles in groups of rows, so that what runs at once shares its operands in the cache."""
    in_group = GROUP * tiles_n
    first = (program // in_group) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + (program % in_group) % height, (program % in_group) // height


@triton.jit
def _product(x, w, acc, SWAP: tl.constexpr, KIND: tl.constexpr):
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee", out_dtype=KIND)
    else:  # noqa: RET505 - only one of two types may be returned, and a branch not taken is not
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee", out_dtype=KIND)


@triton.jit
def product(x, w, acc, SWAP: tl.constexpr, WIDEN: tl.constexpr, INTERPRETED: tl.constexpr):
    """x [M, K] times w [N, K], added to acc unless that is None: [M, N], or [N, M] when swapped.

    With WIDEN both hold two codes of e4m3 in each int16, [.., K / 2], and become float16.
    """
    if WIDEN:
        even = unpacked(x, x, x, 0, FP8, SYMMETRIC, tl.float16, INTERPRETED)
        odd = unpacked(x, x, x, 1, FP8, SYMMETRIC, tl.float16, INTERPRETED)
        even_w = unpacked(w, w, w, 0, FP8, SYMMETRIC, tl.float16, INTERPRETED)
        odd_w = unpacked(w, w, w, 1, FP8, SYMMETRIC, tl.float16, INTERPRETED)
        sums = _product(even, even_w, acc, SWAP, tl.float32)
        return _product(odd, odd_w, sums, SWAP, tl.float32)
    else:  # noqa: RET505 - a branch not taken is not compiled, what follows a return is
        KIND: tl.constexpr = tl.int32 if x.dtype == tl.int8 else tl.float32
        return _product(x, w, acc, SWAP, KIND)


@triton.jit
def outlier_product(
    acc,
    rows_of_x,
    rows_of_w,
    words,
    offsets,
    begin,
    end,
    k,
    threshold,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Adds the product of the elements at or above the threshold, where a tile holds any."""
    for chunk in range(tl.cdiv(k, CHUNK)):
        if (words >> chunk) & 1:
            low = tl.maximum(chunk * CHUNK, begin)
            high = tl.minimum(chunk * CHUNK + CHUNK, end)
            # Not pipelined: seldom entered, and its stages would take the shared memory.
            for at in tl.range(low, high, BLOCK_K, num_stages=1):
                inside = (at + offsets < k)[None, :]
                x = tl.load(rows_of_x + at, mask=inside, other=0.0)
                w = tl.load(rows_of_w + at, mask=inside, other=0)
                wide = x.to(tl.float32)
                x = tl.where(tl.abs(wide) >= threshold, wide, 0.0).to(x.dtype)
                w = w.to(tl.float32).to(x.dtype)
                if SWAP:
                    acc += tl.dot(w, tl.trans(x), input_precision="ieee")
                else:
                    acc += tl.dot(x, tl.trans(w), input_precision="ieee")
    return acc


@triton.jit
def either(a, b):
    """The bits of both."""
    return a | b


# Numbers that change from step to step must not make a new kernel of it.
@triton.jit(do_not_specialize=["m"])
def scaled_matmul_kernel(
    x,
    row_scales,
    w,
    column_scales,
    bias,
    raw,
    words,
    out,
    m,
    n,
    k,
    row_scale_stride,
    length,
    threshold,
    INTEGERS: tl.constexpr,
    WIDEN: tl.constexpr,
    SWAP: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of the output, or of one part of K's products when split.

    x [m, k], w [n, k] contiguous, k and BLOCK_K counting int16 with WIDEN; `out` [m, n], or the
    parts [SPLITS, m, n] in int32 or float32. With CHUNK > 0 elements of `raw` [m, k] at or above
    `threshold` are added, in chunks of K that the rows' `words` tell; x has zeros there.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = tl.arange(0, BLOCK_K)
    # Past the edge the last row is read again: no mask, and nothing of it is stored.
    read_rows = tl.minimum(rows, m - 1).to(tl.int64)[:, None] * k + offsets[None, :]
    read_columns = tl.minimum(columns, n - 1).to(tl.int64)[:, None] * k + offsets[None, :]
    KIND: tl.constexpr = tl.int32 if INTEGERS else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), KIND)
    begin = split * length
    end = tl.minimum(begin + length, k)
    for at in range(begin, end, BLOCK_K):
        if EVEN_K:
            a = tl.load(x + read_rows + at)
            b = tl.load(w + read_columns + at)
        else:
            inside = (at + offsets < k)[None, :]
            a = tl.load(x + read_rows + at, mask=inside, other=0.0)
            b = tl.load(w + read_columns + at, mask=inside, other=0.0)
        if INTEGERS or WIDEN:
            acc = product(a, b, acc, SWAP, WIDEN, INTERPRETED)
        else:
            acc += product(a, b, None, SWAP, WIDEN, INTERPRETED)
    if SWAP:
        place = rows.to(tl.int64)[None, :] * n + columns[:, None]
        stored = (rows < m)[None, :] & (columns < n)[:, None]
    else:
        place = rows.to(tl.int64)[:, None] * n + columns[None, :]
        stored = (rows < m)[:, None] & (columns < n)[None, :]
    if CHUNK > 0 or SPLITS == 1:
        by_row = tl.load(row_scales + rows * row_scale_stride, mask=rows < m, other=0.0)
    if CHUNK > 0:
        sums = acc.to(tl.float32) * (by_row[None, :] if SWAP else by_row[:, None])
        held = tl.reduce(tl.load(words + rows, mask=rows < m, other=0), 0, either)
        sums = outlier_product(
            sums,
            raw + read_rows,
            w + read_columns,
            held,
            offsets,
            begin,
            end,
            k,
            threshold,
            CHUNK,
            BLOCK_K,
            SWAP,
        )
    elif SPLITS == 1:
        sums = acc.to(tl.float32) * (by_row[None, :] if SWAP else by_row[:, None])
    else:
        sums = acc
    if SPLITS == 1:
        by_column = tl.load(column_scales + columns, mask=columns < n, other=0.0)
        sums *= by_column[:, None] if SWAP else by_column[None, :]
        if BIAS:
            added = tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)
            sums += added[:, None] if SWAP else added[None, :]
    else:
        place += split.to(tl.int64) * m * n
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=stored)


@triton.jit
def merge_kernel(
    parts,
    row_scales,
    column_scales,
    bias,
    out,
    n,
    row_stride,
    part_stride,
    row_scale_stride,
    SPLITS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the parts of one row in order, scales them and adds the bias.

    Element (s, m, n) of `parts` is at ``s * part_stride + m * row_stride + n``.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n
    acc = tl.load(parts + row * row_stride + columns, mask=inside, other=0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(parts + split * part_stride + row * row_stride + columns, inside, other=0)
    sums = acc.to(tl.float32)
    if SCALE_ROWS:
        sums *= tl.load(row_scales + row * row_scale_stride)
    if SCALE_COLUMNS:
        sums *= tl.load(column_scales + columns, mask=inside, other=0.0)
    if BIAS:
        sums += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * n + columns, sums.to(out.dtype.element_ty), mask=inside)


def scaled_matmul(
    x: Tensor,
    row_scales: Tensor,
    w: Tensor,
    column_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Mapping[str, int],
    outliers: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """The product as the module describes it: x [M, K], w [N, K] -> [M, N] in `dtype`.

    x and w are int8 or e4m3, or two codes of it in each int16 [.., K / 2]. `row_scales` has M
    elements, or one for all rows. `outliers` are (x before rounding [M, K], the words of its rows
    [M], the threshold); K is a multiple of 16.
    """
    (m, k), n = x.shape, w.shape[0]
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if m == 0:
        return out
    integers = x.dtype == torch.int8
    widen = x.dtype == torch.int16
    block_m, block_n = tile["block_m"], tile["block_n"]
    block_k = tile["block_k"] // 2 if widen else tile["block_k"]
    splits = splits_for(m, n, k, {**tile, "block_k": block_k}, facts_of(x))
    length = triton.cdiv(triton.cdiv(k, splits), block_k) * block_k
    splits = triton.cdiv(k, length)
    stride = 0 if row_scales.numel() == 1 else 1
    parts = out
    if splits > 1:
        kind = torch.int32 if integers and outliers is None else torch.float32
        parts = torch.empty((splits, m, n), dtype=kind, device=x.device)
    raw, words, threshold = outliers or (x, x, 0.0)
    added = out if bias is None else bias
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n), splits)
    scaled_matmul_kernel[grid](
        x,
        row_scales,
        w,
        column_scales,
        added,
        raw,
        words,
        parts,
        m,
        n,
        k,
        stride,
        length,
        threshold,
        INTEGERS=integers,
        WIDEN=widen,
        SWAP=bool(tile["swap"]),
        SPLITS=splits,
        EVEN_K=k % block_k == 0,
        BIAS=bias is not None,
        CHUNK=0 if outliers is None else chunk_size(k),
        GROUP=8,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        INTERPRETED=x.device.type == "cpu",
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    if splits > 1:
        merge(parts, None if outliers else row_scales, column_scales, bias, out)
    return out


def merge(
    parts: Tensor,
    row_scales: Tensor | None,
    column_scales: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Sum of `parts` [S, >= M, >= N], int32 or float32, into `out` [M, N].

    Scaled by rows (M scales or one) and by columns (N) where scales are given.
    """
    m, n = out.shape
    block_n = min(1024, triton.next_power_of_2(n))
    merge_kernel[(m, triton.cdiv(n, block_n))](
        parts,
        parts if row_scales is None else row_scales,
        parts if column_scales is None else column_scales,
        out if bias is None else bias,
        out,
        n,
        parts.stride(1),
        parts.stride(0),
        0 if row_scales is None or row_scales.numel() == 1 else 1,
        SPLITS=parts.shape[0],
        SCALE_ROWS=row_scales is not None,
        SCALE_COLUMNS=column_scales is not None,
        BIAS=bias is not None,
        BLOCK_N=block_n,
        num_warps=4,
    )


def chunk_size(k: int) -> int:
    """Columns of one bit of the words: a power of two, so that tiles of K divide it."""
    return max(512, round_rows(-(-k // CHUNKS)))
