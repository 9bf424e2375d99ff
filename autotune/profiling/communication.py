"""What the collectives among ranks take of the device's time."""

from __future__ import annotations

import numpy as np

from autotune.profiling.schema import Communication
from autotune.profiling.step_columns import StepColumns


def communication(steps: StepColumns, ranks: int) -> tuple[Communication | None, list[str]]:
    """The collectives of a model that is divided among ranks; None for one rank."""
    if ranks == 1 or not len(steps):
        return None, []
    if bool(np.isnan(steps.communication).any()):
        return Communication(ranks=ranks), [
            "the time of collectives is unknown: on a GPU they run beside the host, which cannot "
            "time them; autotune profile --trace shows them"
        ]
    device = float(steps.device.sum())
    return Communication(
        ranks=ranks,
        share=float(steps.communication.sum()) / device if device > 0 else None,
        per_step_s=float(np.median(steps.communication)),
        imbalance=_imbalance(steps),
    ), []


def _imbalance(steps: StepColumns) -> float | None:
    """The part of the collectives' time that was waiting for slower ranks."""
    total = float(steps.communication.sum())
    waited = steps.waiting
    if total <= 0 or bool(np.isnan(waited).any()):
        return None
    return min(1.0, float(waited.sum()) / total)
