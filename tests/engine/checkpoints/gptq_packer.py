"""GPTQ and AWQ layers packed bit by bit from their specifications, in Python integers."""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def signed_words(big: int, words: int) -> list[int]:
    """The 32-bit words of a little-endian number, as int32 has them."""
    unsigned = [(big >> (32 * w)) & 0xFFFFFFFF for w in range(words)]
    return [u - (1 << 32) if u >> 31 else u for u in unsigned]


def pack_line(values: list[int], bits: int) -> list[int]:
    big = sum(value << (i * bits) for i, value in enumerate(values))
    return signed_words(big, -(-len(values) * bits // 32))


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """[R, C] -> int32 [R, words], along the last dimension."""
    return torch.tensor([pack_line(row, bits) for row in values.tolist()], dtype=torch.int32)


def subtract_ones(packed: Tensor, bits: int, count: int) -> Tensor:
    """One less in each of `count` fields of a packed row, the row taken as words of 32 bits."""
    ones = pack_rows(torch.ones(packed.shape[0], count, dtype=torch.long), bits)
    wrapped = (packed.long() - ones.long()) & 0xFFFFFFFF
    return torch.where(wrapped >= 1 << 31, wrapped - (1 << 32), wrapped).to(torch.int32)


def random_integers(
    rows: int, columns: int, bits: int, group_size: int, seed: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, K], zeros [N, groups] and scales float16 [N, groups] of a layer."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    q = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator)
    if symmetric:
        zeros.fill_(1 << (bits - 1))
    scales = torch.rand(rows, groups, generator=generator).add(0.1).mul(0.05).half()
    return q, zeros, scales


def gptq_layer(
    q: Tensor, zeros: Tensor, scales: Tensor, bits: int, g_idx: Tensor, version: int = 1
) -> tuple[dict[str, Tensor], Tensor]:
    """What a GPTQ layer stores, and its weight in float64."""
    qzeros = pack_rows(zeros.T, bits)
    if version == 1:
        qzeros = subtract_ones(qzeros, bits, zeros.shape[0])
    stored = {
        "qweight": pack_rows(q, bits).T.contiguous(),
        "qzeros": qzeros,
        "scales": scales.T.contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }
    weight = (q.double() - zeros.double()[:, g_idx]) * scales.double()[:, g_idx]
    return stored, weight


def awq_layer(
    q: Tensor, zeros: Tensor, scales: Tensor, group_size: int
) -> tuple[dict[str, Tensor], Tensor]:
    """What an AWQ layer in layout "gemm" stores, and its weight in float64."""

    def interleave(values: Tensor) -> Tensor:
        rows = values.shape[0]
        eights = values.view(rows, -1, 8)[:, :, list(AWQ_ORDER)]
        return pack_rows(eights.reshape(rows, -1), 4)

    stored = {
        "qweight": interleave(q.T.contiguous()),
        "qzeros": interleave(zeros.T.contiguous()),
        "scales": scales.T.contiguous(),
    }
    group = torch.arange(q.shape[1]) // group_size
    return stored, (q.double() - zeros.double()[:, group]) * scales.double()[:, group]
