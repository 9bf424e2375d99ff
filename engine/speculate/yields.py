"""What drafted tokens are expected to yield, and how many of them are worth a step's time."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from engine.speculate.acceptance_history import Floats
from engine.speculate.cost_curves import SpeculationCosts

# Drafts must promise so much more than none, as promises err.
MARGIN = 0.02


@runtime_checkable
class UncertainCosts(Protocol):
    """Costs that know how far they may be off."""

    def uncertainty(self, num_sequences: int) -> float:
        """The standard error of steps' seconds, as a share of them."""
        ...

    def hope(self, num_sequences: int) -> float:
        """The share by which steps with drafts may well take less, as few or none were run yet."""
        ...


class Margin:
    """What drafts have to promise beyond the tokens of a second without them, as a share."""

    def __init__(self, costs: SpeculationCosts) -> None:
        self._uncertain = costs if isinstance(costs, UncertainCosts) else None

    def of(self, num_sequences: int) -> float:
        """That of a step of so many sequences: the surer its costs are, the less."""
        uncertain = self._uncertain
        return MARGIN + (0.0 if uncertain is None else uncertain.uncertainty(num_sequences))

    def hope(self, num_sequences: int) -> float:
        """What drafts may yield beyond what they promise, as a share, that only a try tells."""
        return 0.0 if self._uncertain is None else self._uncertain.hope(num_sequences)


def best_counts(
    gains: Floats, num_requests: int, seconds: Floats, margin: float
) -> tuple[list[int], float, float]:
    """How many tokens of each row to verify, so that a second yields most.

    gains: [rows, tokens], each row falling and 0 behind its end; seconds: [most + 1] of a step with
    so many drafted tokens; `margin` is what they have to yield beyond none, as a share.

    Returns also how many are expected to be accepted, and the seconds that as many tokens would
    take longer without drafts.
    """
    rows = len(gains)
    # By depth first, so that of equal chances in a row the first comes first.
    flat = gains.T.ravel()
    order = np.argsort(-flat, kind="stable")[: len(seconds) - 1]
    accepted = np.cumsum(flat[order])
    rates = (num_requests + accepted) / seconds[1 : len(order) + 1]
    if not len(rates):
        return [0] * rows, 0.0, 0.0
    best = int(np.argmax(rates))
    gain = float(rates[best] * seconds[0]) / num_requests
    if gain <= 1.0 + margin:
        return [0] * rows, 0.0, 0.0
    counts: list[int] = np.bincount(order[: best + 1] % rows, minlength=rows).tolist()
    return counts, float(accepted[best]), (gain - 1.0) * float(seconds[best + 1])
