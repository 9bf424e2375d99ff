"""Bytes of one quantized weight, from its sizes and its method alone; imports no torch."""

from __future__ import annotations

from engine.quantize.method_table import METHODS

# Smaller groups follow the weights closer and cost more scales: 64 adds an eighth of a byte a
# weight at most and is what the CPU and GPU int4 matmuls take.
INT4_GROUP_SIZE = 64

# As the kernels hold them on a CPU with AMX: float32, and float16 for what it holds exactly.
_SCALE = 4
_ZERO = 2


def int4_group_size(columns: int, largest: int = INT4_GROUP_SIZE) -> int | None:
    """The largest group of at most `largest` that divides `columns` by halving.

    None if there is none of at least 16, below which the scales cost more than they save.
    """
    size = largest
    while size >= 16:
        if columns % size == 0:
            return size
        size //= 2
    return None


def linear_bytes(rows: int, columns: int, method: str, dtype_bytes: int = 2) -> int:
    """Bytes of one weight [rows, columns] and its scales.

    Raises:
        KeyError: a method that does not exist.
    """
    bits = METHODS[method].weight_bits
    if bits == 16:
        return rows * columns * dtype_bytes
    group_size = int4_group_size(columns) if bits == 4 else None
    if group_size is None:
        return rows * columns + rows * _SCALE
    per_group = _SCALE if method == "nf4" else _SCALE + _ZERO
    return rows * columns // 2 + rows * (columns // group_size) * per_group
