"""How unequal the steps are."""

from __future__ import annotations

import numpy as np

from autotune.profiling.enough import LEAST_STEPS
from autotune.profiling.schema import Imbalance
from autotune.profiling.step_columns import Floats, StepColumns


def imbalance(steps: StepColumns) -> Imbalance | None:
    """Coefficients of variation of the steps' time and tokens; None of too few steps."""
    if len(steps) < LEAST_STEPS:
        return None
    return Imbalance(step_time_cv=_variation(steps.seconds), step_tokens_cv=_variation(steps.rows))


def _variation(values: Floats) -> float:
    mean = float(values.mean())
    return float(np.std(values)) / mean if mean > 0 else 0.0
