"""The time that a run took, and what it may still take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from autotune.records import TrialRecord
from autotune.search.schedule import Schedule

# Quantizing with a calibrated method takes at most so much of the search time that is left, so that
# a large model's calibration does not eat the search; on a short budget, so many seconds.
QUANTIZE_SHARE = 1 / 3
MIN_QUANTIZE_S = 20.0


class Spending:
    """What of the budget is spent; times in seconds.

    Args:
        schedule: the shares of the budget.
        most_trials: most search trials, None if the budget bounds them alone.
        elapsed: tells how long this process has worked on the run.
        earlier_s: what earlier processes measured.
        searched: search trials so far; grows as they end.
        proof: trials of the proof so far; grows as they end.
        first_is_typical: whether the first trial takes no longer for loading everything.
    """

    def __init__(
        self,
        schedule: Schedule,
        most_trials: int | None,
        elapsed: Callable[[], float],
        earlier_s: float,
        searched: Sequence[TrialRecord],
        proof: Sequence[TrialRecord],
        *,
        first_is_typical: bool = False,
    ) -> None:
        self._schedule = schedule
        self._most_trials = most_trials
        self._elapsed = elapsed
        self._earlier_s = earlier_s
        self._searched = searched
        self._proof = proof
        self._atypical = 0 if first_is_typical else 1

    def spent(self) -> float:
        """Seconds that the run took: this process whole, of earlier ones what they measured."""
        return self._earlier_s + self._elapsed()

    def left(self) -> float | None:
        """Seconds that are left of the budget; None without one."""
        budget = self._schedule.budget_s
        return None if budget is None else max(0.0, budget - self.spent())

    def trial_s(self) -> float:
        """What a trial takes on this machine; before one is known, what the schedule expects.

        A first trial that loads everything, and failed ones, are not typical.
        """
        trials = (*self._searched[self._atypical :], *self._proof)
        typical = [t.seconds for t in trials if t.outcome == "ok"]
        return statistics.median(typical) if typical else self._schedule.trial_s

    def search_left(self) -> float:
        """Seconds that the search may still take, with the proof's share kept back."""
        return self._schedule.search_time_left(self.spent(), self.trial_s())

    def expected_trials(self) -> int:
        """How many search trials there will be in all, as far as that can be told."""
        most = self._most_trials
        if self._schedule.budget_s is None:
            assert most is not None
            return most
        left = self._schedule.search_time_left(self.spent())
        affordable = len(self._searched) + max(0, int(left / self._schedule.trial_s))
        return affordable if most is None else min(affordable, most)

    def pays_for_trial(self) -> bool:
        """Whether another search trial may begin; the default's may in any case."""
        if not self._searched:
            return True
        if self._most_trials is not None and len(self._searched) >= self._most_trials:
            return False
        return self.search_left() >= self.trial_s()

    def pays_for_round(self, round_: int, num_contenders: int) -> bool:
        """Whether a round of the proof may begin: an interval needs two, whatever they take."""
        return round_ < 2 or self._schedule.pays_for(num_contenders, self.spent(), self.trial_s())

    def quantize_limit(self) -> float | None:
        """Longest time that quantizing the weights for one trial may take."""
        if self._schedule.budget_s is None or not self._searched:
            return None
        return max(MIN_QUANTIZE_S, self.search_left() * QUANTIZE_SHARE)
