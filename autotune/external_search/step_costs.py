"""What a step of another engine costs, as far as the answers of a load tell.

    seconds = base + sequence * decodes + token * prompt tokens

Between two tokens of an answer lies one step: of the sequences that decode then, and of the prompts
whose first token comes with it. So every gap in every stream is one line of a regression. It tells
neither what attention costs nor what lies between steps; for an order of configurations that the
same engine runs, whose batches differ, that is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from autotune.records import RequestRecord

_MOST_GAPS = 20_000
_FEWEST_GAPS = 50
# Longer gaps than this quantile's times so much are stalls of the machine, not steps.
_LONGEST_QUANTILE, _LONGEST_FACTOR = 0.99, 3.0
_LEAST_S = 1e-5
# Stamps of one step differ by less than this share of the usual gap.
_LATE = 0.3

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds of a step by what it computes; a `Cost` of the virtual engine."""

    base: float
    sequence: float
    token: float

    def device_seconds(self, work: StepWork) -> float:
        """Seconds of a step."""
        return self.base + self.sequence * work.decode_sequences + self.token * work.prompt_tokens

    def host_seconds(self, work: StepWork) -> float:
        """None apart: the gaps between tokens hold both."""
        return 0.0 * work.rows

    def decode_line(self, sequences: int) -> DecodeLine:
        """Seconds of steps that decode so many sequences, whatever these see."""
        return DecodeLine((0.0,), (self.base + self.sequence * sequences,))


def fit_cost(records: Sequence[RequestRecord]) -> LinearCost | None:
    """The costs that explain the gaps of a load; None where they are too few."""
    finished = [r for r in records if r.completed and r.token_times]
    streams = [np.unique(np.asarray(r.token_times, dtype=np.float64)) for r in finished]
    starts = np.concatenate([s[:-1] for s in streams]) if streams else np.empty(0)
    ends = np.concatenate([s[1:] for s in streams]) if streams else np.empty(0)
    if len(starts) < _FEWEST_GAPS:
        return None
    firsts = np.array([s[0] for s in streams])
    lasts = np.array([s[-1] for s in streams])
    computed = np.array([max(0, r.input_tokens - r.cached_tokens) for r in finished], dtype=float)
    if len(starts) > _MOST_GAPS:
        places = np.linspace(0, len(starts) - 1, _MOST_GAPS).round().astype(np.int64)
        starts, ends = starts[places], ends[places]
    decodes = _count(np.sort(firsts), starts) - _count(np.sort(lasts), starts)
    gaps = ends - starts
    # Stamps of one step lie a little apart: a first token just behind a gap's end belongs to it.
    late = _LATE * float(np.median(gaps))
    prompts = _sum_until(firsts, computed, ends + late) - _sum_until(
        firsts, computed, starts + late
    )
    usual = (gaps >= _LEAST_S) & (gaps <= _LONGEST_FACTOR * np.quantile(gaps, _LONGEST_QUANTILE))
    if usual.sum() < _FEWEST_GAPS:
        return None
    lines = np.column_stack([np.ones(len(gaps)), decodes, prompts])[usual]
    sends = np.array([r.send for r in finished])
    lines, seconds = _with_first_tokens(lines, gaps[usual], sends, firsts, lasts, computed)
    # By relative errors: otherwise the few long steps would decide alone.
    found, _ = nnls(lines / seconds[:, None], np.ones(len(seconds)))
    base, sequence, token = (float(value) for value in found)
    return LinearCost(max(base, _LEAST_S), sequence, token)


def _with_first_tokens(
    lines: Floats, seconds: Floats, sends: Floats, firsts: Floats, lasts: Floats, computed: Floats
) -> tuple[Floats, Floats]:
    """With the prompts that met an idle engine: what they waited for is their own step."""
    order = np.argsort(sends, kind="stable")
    sent, first = sends[order], firsts[order]
    busy_until = np.concatenate([[-np.inf], np.maximum.accumulate(lasts[order])[:-1]])
    following = np.concatenate([sent[1:], [np.inf]])
    waits = first - sent
    alone = (sent > busy_until) & (following > first) & (waits > _LEAST_S)
    prompts = computed[order][alone]
    ones, none = np.ones(len(prompts)), np.zeros(len(prompts))
    rows = np.column_stack([ones, none, prompts])
    return np.vstack([lines, rows]), np.concatenate([seconds, waits[alone]])


def _count(moments: Floats, until: Floats) -> Floats:
    """How many of the sorted moments are at or before each of `until`."""
    return np.searchsorted(moments, until, side="right").astype(np.float64)


def _sum_until(moments: Floats, amounts: Floats, until: Floats) -> Floats:
    """The sum of the amounts whose moment is at or before each of `until`."""
    order = np.argsort(moments)
    sums = np.concatenate([[0.0], np.cumsum(amounts[order])])
    return sums[np.searchsorted(moments[order], until, side="right")]
