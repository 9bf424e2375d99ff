"""How a time budget is shared among calibration, search and proof."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.calibration import CALIBRATION_LIMIT_S
from autotune.errors import BadInput

# Time of a trial beyond its load: reconfiguring or reloading, warm-up, draining, computing.
TRIAL_OVERHEAD_S = 2.0
MIN_WINDOW_S = 3.0
MAX_WINDOW_S = 60.0
DEFAULT_WINDOW_S = 10.0
# Most of a budget that the calibration may take.
CALIBRATION_SHARE = 1 / 12
# Trials take longer than planned on a busy machine; by so much may the proof exceed the budget
# before it leaves rounds out.
PROOF_EXCESS = 0.1
# Trials that a budget should pay for when the window's length is ours to choose.
WANTED_TRIALS = 16


@dataclass(frozen=True, slots=True)
class Schedule:
    """Shares of a run's time, in seconds.

    `window_s` is the length of the load of one measurement, `trial_s` what one is expected to take
    with its overhead; a capacity trial measures `probes` loads. `start_s` is what starting an
    engine takes, where each trial starts one.
    """

    window_s: float
    probes: int
    rounds: int
    finalists: int
    budget_s: float | None
    start_s: float = 0.0

    @property
    def trial_s(self) -> float:
        """Expected time of one trial."""
        return self.start_s + self.probes * (self.window_s + TRIAL_OVERHEAD_S)

    @property
    def proof_s(self) -> float:
        """Expected time of the proof: the default and the finalists, every round."""
        return self.trial_s * self.rounds * (self.finalists + 1)

    @property
    def drain_limit(self) -> float:
        """How long after the last arrival unfinished requests are waited for."""
        return max(5.0, 0.5 * self.window_s)

    @property
    def calibration_s(self) -> float:
        """Longest time of the calibration."""
        if self.budget_s is None:
            return CALIBRATION_LIMIT_S
        share = self.budget_s * CALIBRATION_SHARE
        return max(self.drain_limit, min(CALIBRATION_LIMIT_S, share))

    def search_time_left(self, spent: float, trial_s: float | None = None) -> float:
        """Time that the search may still take, with the proof's share kept back.

        `trial_s` is what a trial took so far; without it, what one is expected to take.
        """
        if self.budget_s is None:
            return float("inf")
        trials = self.rounds * (self.finalists + 1)
        return self.budget_s - spent - (self.trial_s if trial_s is None else trial_s) * trials

    def pays_for(self, trials: int, spent: float, trial_s: float) -> bool:
        """Whether the budget, and what a proof may exceed it by, pays for so many more trials."""
        if self.budget_s is None:
            return True
        return spent + trials * trial_s <= self.budget_s * (1 + PROOF_EXCESS)


def plan_schedule(
    budget_s: float | None,
    window_s: float | None,
    probes: int,
    rounds: int,
    finalists: int,
    start_s: float = 0.0,
) -> Schedule:
    """Choose the window's length if it is not given, and check that the budget pays for a result.

    Raises:
        BadInput: the budget is too small for the default, one other trial and their proof; the
            message says what would be enough.
    """
    if window_s is None:
        window_s = DEFAULT_WINDOW_S
        if budget_s is not None:
            loads = probes * (WANTED_TRIALS + rounds * (finalists + 1))
            load_s = (budget_s - start_s * loads / probes) / loads
            window_s = min(MAX_WINDOW_S, max(MIN_WINDOW_S, load_s - TRIAL_OVERHEAD_S))
    schedule = Schedule(window_s, probes, rounds, finalists, budget_s, start_s)
    needed = 2 * schedule.trial_s + schedule.proof_s
    if budget_s is not None and budget_s < needed:
        raise BadInput(
            f"--budget {budget_s:.0f}s is too small: two trials of {schedule.trial_s:.0f} s and a "
            f"proof of {schedule.proof_s:.0f} s need {needed:.0f}s; raise it, or lower "
            "--duration, --rounds or --finalists"
        )
    return schedule
