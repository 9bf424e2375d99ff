"""GPTQ: columns are rounded one after another, and those still to come make up for each error.

Source: Frantar et al. 2022, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers, section 3 and algorithm 1. With the Hessian H = 2 X X^T of the layer's squared output
error, rounding column j costs `(w_j - q_j)^2 / [H_F^-1]_jj` and the optimal correction of the
columns F not yet rounded is `-(w_j - q_j) / [H_F^-1]_jj * [H_F^-1]_j,:` (equation 2). All the rows
of H_F^-1 that this ever needs are those of the Cholesky factor of H^-1 ("step 3").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantize.forms import IntGroupForm
from engine.quantize.grid import group_grid, round_to_grid, search_grid


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """How to round.

    `damping` is added to H's diagonal, as a share of its mean. Corrections reach the columns of
    their own block of `block_columns` at once and all others block by block ("step 2").
    `activation_order` rounds the columns with the largest inputs first, while there are many left
    to make up for them; groups and their grids stay those of neighbours in the file, so that
    nothing has to be gathered at run time. `search` picks each group's grid by output error,
    otherwise it spans the extremes.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    damping: float = 0.01
    block_columns: int = 128
    activation_order: bool = True
    search: bool = True


def quantize_gptq(
    weight: Tensor, gram: Tensor, options: GptqOptions, keep: Tensor | None = None
) -> IntGroupForm:
    """Quantize weight float [N, K] for inputs whose `gram` [K, K] is the sum of x^T x.

    Where `keep` (bool [N, K]) is false the result is exactly zero, and other columns make up for
    that as they do for rounding (Frantar and Alistarh 2023, SparseGPT, section 3).

    Without activation order and search, a group's grid is made when its first column is reached,
    from the weights as corrected so far, as the paper does.

    Raises:
        ValueError: NaN or infinity, shapes that do not fit, or K no multiple of the group size.
    """
    rows, columns = weight.shape
    size = options.group_size
    if gram.shape != (columns, columns) or columns % size:
        raise ValueError(
            f"weight of {rows} x {columns} needs a gram of {columns} x {columns} and groups that "
            f"divide {columns}, got {tuple(gram.shape)} and groups of {size}"
        )
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(gram).all()):
        raise ValueError("the weight or its inputs hold NaN or infinity")
    work = weight.float().clone()
    ahead = options.activation_order or options.search
    scales, zeros = _grids(work, gram, options) if ahead else _empty_grids(work, size)
    diagonal = gram.diagonal()
    order = torch.arange(columns, device=work.device)
    if options.activation_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    factor = inverse_factor(gram[order][:, order], options.damping)
    work = work[:, order]
    q = torch.empty_like(work)
    group_of = [column // size for column in order.tolist()]
    for start in range(0, columns, options.block_columns):
        end = min(start + options.block_columns, columns)
        errors = torch.empty(rows, end - start, device=work.device)
        for j in range(start, end):
            group = group_of[j]
            if not ahead and j % size == 0:
                # Corrections from this block that later columns have not had yet are due now.
                reach = work[:, j : j + size].clone()
                if j + size > end:
                    reach[:, end - j :] -= errors[:, : j - start] @ factor[start:j, end : j + size]
                scales[:, group], zeros[:, group] = group_grid(
                    reach, options.bits, options.symmetric
                )
            scale, zero = scales[:, group], zeros[:, group]
            column = round_to_grid(work[:, j], scale, zero, options.bits)
            if keep is not None:
                column = torch.where(keep[:, order[j]], column, zero)
            q[:, j] = column
            error = (work[:, j] - (column - zero) * scale) / factor[j, j]
            work[:, j + 1 : end] -= error[:, None] * factor[j, j + 1 : end]
            errors[:, j - start] = error
        work[:, end:] -= errors @ factor[start:end, end:]
    restored = torch.empty_like(q, dtype=torch.uint8)
    restored[:, order] = q.to(torch.uint8)
    return IntGroupForm(restored, scales, zeros, size, options.bits)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of the inverse of the damped Hessian, H^-1 = U^T U; float32 [K, K].

    A column that was never active has nothing to do with the others: its diagonal becomes 1. H is
    factored in float64, since its smallest eigenvalues are what the inverse is made of. Where even
    the damped matrix is not positive definite the damping grows tenfold.

    Raises:
        ValueError: it never becomes positive definite.
    """
    hessian = gram.to(torch.float64, copy=True)
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    diagonal[~live] = mean
    applied = 0.0
    for _ in range(8):
        # In place: of a wide layer each copy takes gigabytes.
        diagonal += (damping - applied) * mean
        applied = damping
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                factor: Tensor = upper.float()
                return factor
        damping = max(damping * 10, 1e-6)
    raise ValueError("the inputs' second moments have no positive definite form")


def _grids(weight: Tensor, gram: Tensor, options: GptqOptions) -> tuple[Tensor, Tensor]:
    if options.search:
        return search_grid(weight, gram, options.group_size, options.bits, options.symmetric)
    groups = weight.reshape(len(weight), -1, options.group_size)
    return group_grid(groups, options.bits, options.symmetric)


def _empty_grids(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    scales = torch.empty(len(weight), weight.shape[1] // size, device=weight.device)
    return scales, torch.empty_like(scales)
