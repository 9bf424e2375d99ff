"""How much faster decoding was with drafts than without, by how many sequences decoded at once.

Steps without a drafted token tell what a step costs: with b sequences p(b) seconds on the mean,
drafting apart. Without speculation the tokens that a step of b sequences yielded would have taken
tokens / b such steps, so that over the steps of a range of b

    speed-up = sum(tokens / b * p(b)) / sum(seconds)

where the seconds are of all its steps: those in which drafting found nothing, and cost time, count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.step_record import StepRecord

_LEAST_STEPS = 20
# Of one number of sequences; of fewer steps a mean is a coincidence.
_LEAST_PLAIN = 5
_STRETCHES = 20
_RESAMPLES = 400
_SEED = 20

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def gains_by_batch(steps: Sequence[StepRecord]) -> list[dict[str, Any]]:
    """A row for each doubling of the decoding sequences, with at least so many steps.

    By the keys of `autotune.profiling.speculation_schema.SpeculativeLoad`: `sequences`,
    `num_tokens` and `tokens_per_step` as means, `measured` the speed-up with its 95% interval, None
    where no step of so many sequences was without drafts. Steps with prompts tell nothing here.
    """
    alone = [step for step in steps if step.decode_sequences and not step.prefill_tokens]
    ranges = doublings([step.decode_sequences for step in alone])
    rows = []
    for place in sorted(set(ranges.tolist())):
        chosen = [step for step, of in zip(alone, ranges, strict=True) if of == place]
        if len(chosen) < _LEAST_STEPS or not any(step.drafted_tokens for step in chosen):
            continue
        decodes = sum(step.decode_sequences for step in chosen)
        rows.append(
            {
                "sequences": decodes / len(chosen),
                "num_tokens": sum(step.drafted_tokens for step in chosen) / decodes,
                "tokens_per_step": 1 + sum(step.accepted_tokens for step in chosen) / decodes,
                "measured": _measured(chosen),
                "steps": len(chosen),
            }
        )
    return rows


def doublings(sequences: Sequence[int]) -> Integers:
    """Which range each number of sequences lies in: 1, 2, 3 to 4, 5 to 8 and so on."""
    return np.ceil(np.log2(np.asarray(sequences, dtype=np.float64))).astype(np.int64)


def _measured(steps: Sequence[StepRecord]) -> dict[str, float] | None:
    """The speed-up over steps in time, with its interval by the block bootstrap (Künsch 1989)."""
    sequences, batch = np.unique([step.decode_sequences for step in steps], return_inverse=True)
    plain = np.array([step.drafted_tokens == 0 for step in steps])
    known = np.bincount(batch[plain], minlength=len(sequences)) >= _LEAST_PLAIN
    inside = known[batch]
    if not inside.any() or int(inside.sum()) < _LEAST_STEPS:
        return None
    seconds = np.array([step.seconds for step in steps])
    alone = np.array([step.seconds - step.draft_seconds for step in steps])
    worth = np.array([1 + step.accepted_tokens / step.decode_sequences for step in steps])
    owner = np.arange(len(steps)) * _STRETCHES // len(steps)

    def sums(values: Floats, chosen: npt.NDArray[np.bool_]) -> Floats:
        """Of the chosen steps' values, by stretch and number of sequences."""
        table = np.zeros((_STRETCHES, len(sequences)))
        np.add.at(table, (owner[chosen], batch[chosen]), values[chosen])
        return table

    one = np.ones(len(steps))
    tables = (sums(worth, inside), sums(seconds, inside), sums(alone, plain), sums(one, plain))
    value = _speedup(*(table.sum(axis=0) for table in tables))
    rng = np.random.default_rng(_SEED)
    drawn = []
    for _ in range(_RESAMPLES):
        times = np.bincount(rng.integers(_STRETCHES, size=_STRETCHES), minlength=_STRETCHES)
        drawn.append(_speedup(*(times @ table for table in tables)))
    low, high = np.percentile([v for v in drawn if v > 0] or [value], [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def _speedup(worth: Floats, seconds: Floats, plain_seconds: Floats, plain: Floats) -> float:
    """The formula of the module; batches without a plain step in a resample are left out."""
    there = plain > 0
    cost = np.divide(plain_seconds, plain, out=np.zeros(len(plain)), where=there)
    total = float(seconds[there].sum())
    return float(worth @ cost) / total if total > 0 else 0.0
