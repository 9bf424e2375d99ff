"""What drafts were worth in a load that speculated, from its steps and its requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from autotune.predict.step_cost import StepWork
from autotune.profiling.breakdown import undrafted
from autotune.profiling.counted_cost import CostOfSteps
from autotune.profiling.enough import LEAST_REQUESTS, LEAST_STEPS, lacking
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.speculation_schema import (
    Bounded,
    DraftCost,
    MeasuredSpeculation,
    SpeculativeLoad,
)
from autotune.records import RequestRecord
from autotune.speculation_counts import speculation_metrics
from autotune.speculation_gain import doublings
from engine.config import EngineConfig
from engine.step_record import StepRecord

_SAMPLED_STEPS = 2000


def measured_speculation(
    evidence: LoadEvidence,
    config: EngineConfig,
    cost: CostOfSteps | None,
    cost_error: float | None,
) -> tuple[MeasuredSpeculation | None, list[str]]:
    """The measurement, or why there is none; None without a word where nothing speculated.

    Args:
        evidence: the load.
        config: the engine's.
        cost: what explains the steps' device seconds; without it nothing is predicted.
        cost_error: by how much it is off for a typical step, as a share; None where not known.
    """
    found = speculation_metrics(evidence.steps, config)
    if found is None:
        return None, []
    if not found["decodes"]:
        return None, ["what speculation yields is unknown: no step decoded"]
    drafted = sum(step.drafted_tokens > 0 for step in evidence.steps)
    partial = []
    if 0 < drafted < LEAST_STEPS:
        partial.append(lacking("what drafts yield", "steps", LEAST_STEPS, drafted))
    found.pop("acceptance_rate")
    loads = [SpeculativeLoad.model_validate(row) for row in found.pop("loads")]
    if cost is not None:
        predicted = predicted_gains(evidence.steps, cost, cost_error)
        loads = [
            load.model_copy(update={"predicted": predicted.get(_range_of(load.sequences))})
            for load in loads
        ]
    return (
        MeasuredSpeculation.model_validate(
            {
                **found,
                "method": config.speculative_method,
                "num_speculative_tokens": config.num_speculative_tokens,
                "adaptive": config.speculative_adaptive,
                "tokens_per_step_by_request": by_request(evidence.requests),
                "draft_cost": draft_cost(evidence.steps),
                "loads": loads,
            }
        ),
        partial,
    )


def predicted_gains(
    steps: Sequence[StepRecord], cost: CostOfSteps, cost_error: float | None
) -> dict[int, Bounded]:
    """The speed-up that the cost of a step says, by doubling of the decoding sequences.

    As it is measured (`autotune.speculation_gain`), with costs in the place of seconds; drafting
    takes what it took. Its interval is the cost's error.
    """
    alone = [step for step in steps if step.decode_sequences and not step.prefill_tokens]
    ranges = doublings([step.decode_sequences for step in alone])
    found = {}
    for place in set(ranges.tolist()):
        chosen = [step for step, of in zip(alone, ranges, strict=True) if of == place]
        chosen = chosen[:: max(1, len(chosen) // _SAMPLED_STEPS)]
        plain = spent = 0.0
        for step in chosen:
            worth = 1 + step.accepted_tokens / step.decode_sequences
            plain += worth * _seconds(cost, StepWork.of(undrafted(step)))
            spent += _seconds(cost, StepWork.of(step)) + step.draft_seconds
        if spent > 0:
            value, error = plain / spent, cost_error or 0.0
            found[place] = Bounded(value=value, low=value / (1 + error), high=value * (1 + error))
    return found


def by_request(requests: Sequence[RequestRecord]) -> Bounded | None:
    """Tokens that the requests got from a step after the first: their mean, and 80% of them.

    Tokens of one step come at one moment. None of fewer than so many requests with as many steps
    that it says something of each.
    """
    ratios = []
    for request in requests:
        tokens = len(request.token_times) - 1
        steps = len(set(request.token_times)) - 1
        if steps >= LEAST_STEPS // 2:
            ratios.append(tokens / steps)
    if len(ratios) < LEAST_REQUESTS:
        return None
    low, high = np.percentile(ratios, [10, 90])
    return Bounded(value=float(np.mean(ratios)), low=float(low), high=float(high))


def draft_cost(steps: Sequence[StepRecord]) -> DraftCost | None:
    """What drafting takes by what is drafted, by least squares without negative costs.

    None of too few steps.
    """
    drafting = [step for step in steps if step.draft_seconds > 0]
    if len(drafting) < LEAST_STEPS:
        return None
    seconds = np.array([step.draft_seconds for step in drafting])
    sequences = np.array([step.decode_sequences for step in drafting], dtype=np.float64)
    depths = np.array([len(step.drafted_by_depth) for step in drafting], dtype=np.float64)
    columns = np.stack([np.ones(len(drafting)), sequences, depths, depths * sequences], axis=1)
    # Each error counts relative to its time; a first step that compiles something is not the rule.
    weight = 1.0 / np.maximum(seconds, float(np.median(seconds)))
    matrix = columns * weight[:, None]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
    solution, _ = nnls(matrix / scale, seconds * weight)
    base, sequence, depth, both = (float(value) for value in solution / scale)
    return DraftCost(base=base, sequence=sequence, depth=depth, depth_sequence=both)


def _range_of(sequences: float) -> int:
    """The range that a mean of its numbers lies in."""
    return int(np.ceil(np.log2(sequences) - 1e-9))


def _seconds(cost: CostOfSteps, work: StepWork) -> float:
    return cost.device_seconds(work) + cost.host_seconds(work)
