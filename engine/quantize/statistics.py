"""What calibration keeps of the activations that enter a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor


class InputStatistics:
    """Sums over the rows [T, K] that were seen; all float32 whatever the rows are.

    `gram` [K, K] is the sum of x^T x (the Hessian of the layer's squared output error is
    `2 / rows` of it), None if it is not wanted. `largest` [K] is the greatest |x|.
    """

    def __init__(self, columns: int, device: torch.device, with_gram: bool = True) -> None:
        self.rows = 0
        self.gram = torch.zeros(columns, columns, device=device) if with_gram else None
        self.largest = torch.zeros(columns, device=device)
        self._sum_abs = torch.zeros(columns, device=device)
        self._sum_squares = torch.zeros(columns, device=device)

    def add(self, rows: Tensor) -> None:
        """Take in rows float [T, K].

        Raises:
            ValueError: they hold NaN or infinity.
        """
        if not len(rows):
            return
        x = rows.float()
        magnitude = x.abs()
        largest = magnitude.amax(dim=0)
        if not bool(torch.isfinite(largest).all()):
            raise ValueError("activations hold NaN or infinity: the model cannot be calibrated")
        self.rows += len(x)
        self.largest = torch.maximum(self.largest, largest)
        self._sum_abs += magnitude.sum(dim=0)
        self._sum_squares += x.square().sum(dim=0)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)

    @property
    def mean_abs(self) -> Tensor:
        """Mean of |x| by column, float32 [K]."""
        return self._sum_abs / max(self.rows, 1)

    @property
    def norms(self) -> Tensor:
        """Euclidean norm of each column, float32 [K]."""
        return self._sum_squares.sqrt()
