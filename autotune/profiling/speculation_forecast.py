"""What speculation would be worth by load: tokens of a step against what verifying costs it.

With B sequences that decode, t tokens of each from a step and d drafted ones verified for each,

    speed-up = t * step(B, no drafts) / step(B, d drafted tokens each)

by the fitted cost of a step, at the context that decodes had. It falls below 1 where arithmetic
bounds a step: then nothing is drafted, as the engine does where `speculative_adaptive` is on.
Drafting itself is taken to cost nothing, as looking tokens up nearly does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from autotune.predict.step_cost import StepWork
from autotune.profiling.counted_cost import CostOfSteps
from autotune.profiling.speculation_schema import Bounded, SpeculativeLoad
from autotune.profiling.step_columns import StepColumns
from engine.config import EngineConfig


class Drafting(NamedTuple):
    """Drafts of `asked` tokens: `verified` for a decode on the mean, and the `tokens` it gets."""

    asked: int
    verified: float
    tokens: Bounded


def forecast(
    draftings: Sequence[Drafting],
    config: EngineConfig,
    steps: StepColumns,
    cost: CostOfSteps,
    cost_error: float | None,
) -> list[SpeculativeLoad]:
    """The best number of draft tokens for 1, 2, 4 and so on sequences, and what it is worth.

    Args:
        draftings: what may be drafted.
        config: the engine's, whose limits bound a step.
        steps: of the load, which tell the decodes' context.
        cost: of a step.
        cost_error: by how much it is off for a typical step, as a share; None where not known.
    """
    decodes = float(steps.decodes.sum())
    if not decodes:
        return []
    context = float((steps.kv_tokens - steps.prefill_kv_tokens).sum()) / decodes
    loads = []
    sequences = 1
    while sequences <= config.max_num_seqs:
        work = StepWork(sequences, 0, sequences, sequences, sequences * context, 0, 0)
        plain = _seconds(cost, work)
        best = Drafting(0, 0.0, Bounded(value=1.0, low=1.0, high=1.0))
        gain = 1.0
        for drafting in draftings:
            rows = 1 + drafting.verified
            if sequences * (1 + drafting.asked) > config.max_num_batched_tokens:
                continue
            worth = drafting.tokens.value * plain / _seconds(cost, work.verifying(rows))
            if worth > gain:
                best, gain = drafting, worth
        loads.append(_load(sequences, best, gain, cost_error or 0.0))
        sequences *= 2
    return loads


def _load(sequences: int, best: Drafting, gain: float, error: float) -> SpeculativeLoad:
    """The row of a load, whose interval is that of the tokens widened by the cost's error."""
    tokens = best.tokens
    error = error if best.asked else 0.0
    return SpeculativeLoad(
        sequences=sequences,
        num_tokens=best.asked,
        tokens_per_step=tokens.value,
        predicted=Bounded(
            value=gain,
            low=gain * tokens.low / tokens.value / (1 + error),
            high=gain * tokens.high / tokens.value * (1 + error),
        ),
    )


def _seconds(cost: CostOfSteps, work: StepWork) -> float:
    return cost.device_seconds(work) + cost.host_seconds(work)
