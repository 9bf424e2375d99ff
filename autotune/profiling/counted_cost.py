"""A step's cost from its records alone, where this machine's probes are not there.

It knows how time goes with the tokens of a step and not why, so that it separates what prompts,
decodes and context cost, and leaves the rest unexplained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.optimize import nnls

from autotune.predict.step_cost import TERMS, StepWork
from autotune.profiling.step_columns import Floats, StepColumns


class CostOfSteps(Protocol):
    """What a profile asks of a step's cost; `autotune.predict.step_cost.StepCost` is one."""

    def device_seconds(self, work: StepWork) -> float:
        """Seconds that the device takes for a step."""
        ...

    def host_seconds(self, work: StepWork) -> float:
        """Seconds of a step that the device waits for the host."""
        ...

    def terms(self, work: StepWork) -> dict[str, float]:
        """Device seconds by `autotune.predict.step_cost.TERMS`."""
        ...


@dataclass(frozen=True, slots=True)
class CountedCost:
    """Seconds a step, a row, a cached token that decodes read, and a pair of query and key."""

    base: float
    row: float
    kv_token: float
    pair: float
    host_base: float
    host_sequence: float

    @classmethod
    def fit(cls, steps: StepColumns) -> CountedCost:
        """Least squares of relative errors, without negative costs; there is at least one step."""
        one = np.ones(len(steps))
        decode_kv = steps.kv_tokens - steps.prefill_kv_tokens
        device = _solve([one, steps.rows, decode_kv, steps.prefill_pairs], steps.device)
        host = _solve([one, steps.sequences], np.maximum(steps.host - steps.drafting, 0.0))
        return cls(*device, *host)

    def device_seconds(self, work: StepWork) -> float:
        """Seconds that the device takes for a step."""
        return sum(self.terms(work).values())

    def host_seconds(self, work: StepWork) -> float:
        """Seconds of a step that the device waits for the host, drafting apart."""
        return self.host_base + self.host_sequence * work.sequences

    def terms(self, work: StepWork) -> dict[str, float]:
        """Device seconds by term; what a step costs whatever it computes is `overhead`."""
        return dict.fromkeys(TERMS, 0.0) | {
            "overhead": self.base,
            "linear_compute": self.row * work.rows,
            "kv_reads": self.kv_token * work.decode_kv_tokens,
            "prefill_attention": self.pair * work.prefill_pairs,
        }


def _solve(columns: list[Floats], seconds: Floats) -> tuple[float, ...]:
    """Coefficients of at least 0 of the columns; each step's error counts relative to its time."""
    weight = 1.0 / np.maximum(seconds, max(float(np.median(seconds)) * 0.1, 1e-9))
    matrix = np.stack(columns, axis=1) * weight[:, None]
    # Columns of like size, without which the solver stops early.
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
    solution, _ = nnls(matrix / scale, seconds * weight)
    return tuple(float(value) for value in solution / scale)
