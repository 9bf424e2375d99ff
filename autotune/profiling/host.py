"""How long the device waits for the host."""

from __future__ import annotations

import numpy as np

from autotune.profiling.schema import Host
from autotune.profiling.step_columns import StepColumns


def host(steps: StepColumns) -> Host | None:
    """The host's part of the steps' time, drafting apart; None without steps.

    What a draft model takes is the device's work, though no step's.
    """
    total = float(steps.seconds.sum())
    if total <= 0:
        return None
    waited = np.maximum(steps.host - steps.drafting, 0.0)
    decodes = (steps.prefill_tokens == 0) & (steps.decodes > 0)
    in_decodes = float(steps.seconds[decodes].sum())
    return Host(
        share=float(waited.sum()) / total,
        decode_share=float(waited[decodes].sum()) / in_decodes if in_decodes > 0 else None,
        per_step_s=float(np.median(waited)),
        scheduler_share=float(steps.scheduler.sum()) / total,
    )
