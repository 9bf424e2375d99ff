"""What is refused before a weight is packed: shapes, dtypes and values that no matmul would notice.

Every check raises ValueError with one sentence that says what was found and what would be right.
"""

import torch
from torch import Tensor

from kernels.weights import Activations

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def check_int8(q: Tensor, scales: Tensor, outlier_threshold: float = 0.0) -> None:
    """Refuse unless q is int8 [N, K], scales has N elements and the threshold is not negative."""
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"int8 weight must be int8 [N, K], got {q.dtype} {tuple(q.shape)}")
    if scales.numel() != q.shape[0]:
        raise ValueError(f"int8 weight has {q.shape[0]} rows but {scales.numel()} scales")
    if not outlier_threshold >= 0:
        raise ValueError(f"outlier threshold must be 0 or above, got {outlier_threshold}")


def check_nibbles(q: Tensor, group_size: int, what: str = "int4") -> tuple[int, int]:
    """Refuse unless q is 0..15 in [N, K]; returns the shape of the scales, (N, K / group_size)."""
    if q.dim() != 2 or q.dtype not in _INTEGERS:
        raise ValueError(f"{what} weight must be integers [N, K], got {q.dtype} {tuple(q.shape)}")
    n, k = q.shape
    if group_size < 1 or k % group_size or k % 2:
        raise ValueError(f"group size {group_size} does not divide an even K, K is {k}")
    if q.numel() and (int(q.min()) < 0 or int(q.max()) > 15):
        raise ValueError(f"{what} weight holds values outside 0..15")
    return n, k // group_size


def check_int4(q: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> None:
    """Refuse unless q is 0..15, [N, K], with [N, K / group_size] scales and zeros."""
    expected = check_nibbles(q, group_size)
    if tuple(scales.shape) != expected or tuple(zeros.shape) != expected:
        raise ValueError(
            f"int4 weight needs scales and zeros of {expected}, "
            f"got {tuple(scales.shape)} and {tuple(zeros.shape)}"
        )


def check_int8_groups(q: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> None:
    """Refuse unless q is int8 [N, K] with [N, K / group_size] scales and zeros."""
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"int8 weight must be int8 [N, K], got {q.dtype} {tuple(q.shape)}")
    n, k = q.shape
    if group_size < 1 or k % group_size:
        raise ValueError(f"group size {group_size} does not divide K, K is {k}")
    expected = (n, k // group_size)
    if tuple(scales.shape) != expected or tuple(zeros.shape) != expected:
        raise ValueError(
            f"int8 weight in groups needs scales and zeros of {expected}, "
            f"got {tuple(scales.shape)} and {tuple(zeros.shape)}"
        )


def check_table4(q: Tensor, scales: Tensor, table: Tensor, group_size: int) -> None:
    """Refuse unless q is 0..15, [N, K], with [N, K / group_size] scales and a table of 16."""
    expected = check_nibbles(q, group_size, "table")
    if tuple(scales.shape) != expected:
        raise ValueError(f"table weight needs scales of {expected}, got {tuple(scales.shape)}")
    if table.numel() != 16:
        raise ValueError(f"a table of 4-bit values has 16 entries, got {table.numel()}")


def check_permutation(permutation: Tensor | None, k: int) -> None:
    """Refuse unless it is None or holds each of 0..k - 1 once."""
    if permutation is None:
        return
    expected = torch.arange(k, device=permutation.device)
    if permutation.dtype != torch.int64 or not torch.equal(permutation.sort().values, expected):
        raise ValueError(f"a permutation of columns must hold each of 0..{k - 1} once, in int64")


def check_fp8(
    data: Tensor,
    scales: Tensor,
    block_shape: tuple[int, int] | None,
    activations: Activations,
    input_scale: Tensor | None,
) -> None:
    """Refuse unless data is e4m3 [N, K] and the scales are those that its description asks for."""
    if data.dtype != torch.float8_e4m3fn or data.dim() != 2:
        raise ValueError(f"fp8 weight must be float8_e4m3fn, got {data.dtype} {tuple(data.shape)}")
    n, k = data.shape
    if block_shape is None:
        if scales.numel() not in (1, n):
            raise ValueError(f"fp8 weight of {n} rows needs 1 or {n} scales, got {scales.numel()}")
    else:
        expected = (-(-n // block_shape[0]), -(-k // block_shape[1]))
        if tuple(scales.shape) != expected:
            raise ValueError(
                f"fp8 weight [{n}, {k}] in blocks of {block_shape} needs scales of {expected}, "
                f"got {tuple(scales.shape)}"
            )
    if activations not in ("none", "dynamic", "static"):
        raise ValueError(f"fp8 activations are none, dynamic or static, not {activations!r}")
    if activations == "static" and (input_scale is None or input_scale.numel() != 1):
        raise ValueError("static fp8 activations need an input scale of one element")
