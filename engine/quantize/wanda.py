"""Wanda in the 2:4 pattern: of every four neighbours along K the two least important become zero.

Source: Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models, section
3: the importance of a weight is `|W_ij| * ||X_j||`, its size times its input's Euclidean norm, and
weights compete with others of the same row; for N:M sparsity within each M (section 4.2).
"""

from __future__ import annotations

import torch
from torch import Tensor


def prune_2_of_4(weight: Tensor, input_norms: Tensor) -> Tensor:
    """A copy of weight float [N, K] in which 2 of every 4 along K are zero; norms float [K].

    Of equally important weights the earlier stay.

    Raises:
        ValueError: K is no multiple of 4, or there is NaN in either.
    """
    rows, columns = weight.shape
    if columns % 4:
        raise ValueError(f"2:4 sparsity needs columns that 4 divides, got {columns}")
    importance = (weight.float().abs() * input_norms.float()).reshape(rows, columns // 4, 4)
    if bool(importance.isnan().any()):
        raise ValueError("the weight or its inputs hold NaN")
    order = importance.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(importance, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return torch.where(keep.reshape(rows, columns), weight, torch.zeros_like(weight))
