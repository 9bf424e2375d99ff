"""What the sum of parts leaves out of a step's time, learned from steps: a factor by its shape.

Parts of a step are measured alone, with warm caches and nothing between them; within a step they
push each other out of caches, and kernels meet sizes that were not probed. What that does changes
smoothly with the size of a step. So the logarithm of the factor is a straight-line spline, over the
logarithm of the sequences where all of them decode, and of the rows where prompts are among them,
fitted by ridge regression (scikit-learn). It is kept only if it tells steps better that it was not
fitted to: those of other stretches of time.

Of steps of decodes alone the factor hangs on their number only, so that their time stays straight
in the context, as `DecodeLine` needs it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autotune.predict.step_cost import StepWork

Floats = NDArray[np.float64]

# Steps of a size that nothing is known of are expected where the sum says, as if so many steps with
# that result had been seen there.
PRIOR_STEPS = 20.0
# Errors beyond it are disturbances.
LARGEST_LOG = 0.7
# Knots lie at doublings, and only where there are so many steps.
LEAST_STEPS_OF_KNOT = 8
# A share of the error below which an improvement is chance.
LEAST_IMPROVEMENT = 0.02
QUIET_LOG = 0.05


@dataclass(frozen=True, slots=True)
class Residual:
    """Factors on a step's device time: logarithms at knots, straight between and level beyond.

    `decode_*` by log2 of the sequences of steps that only decode, `prompt_*` by log2 of the rows of
    the others. No knots mean a factor of 1.
    """

    decode_knots: tuple[float, ...] = ()
    decode_logs: tuple[float, ...] = ()
    prompt_knots: tuple[float, ...] = ()
    prompt_logs: tuple[float, ...] = ()
    _known: dict[tuple[bool, float], float] = field(default_factory=dict, compare=False, repr=False)

    def factor(self, work: StepWork) -> float:
        """The factor of a step."""
        if work.prefill_sequences:
            return self._factor(True, work.rows)
        return self._factor(False, work.decode_sequences)

    def _factor(self, prompt: bool, size: float) -> float:
        key = (prompt, size)
        known = self._known.get(key)
        if known is None:
            knots = self.prompt_knots if prompt else self.decode_knots
            logs = self.prompt_logs if prompt else self.decode_logs
            place = math.log2(max(size, 1.0))
            known = self._known[key] = math.exp(_interpolated(knots, logs, place))
        return known


NO_RESIDUAL = Residual()


def fit_residual(works: Sequence[StepWork], ratios: Floats, blocks: NDArray[np.intp]) -> Residual:
    """Fit the factor to measured over expected seconds of steps.

    Args:
        works: the steps.
        ratios: measured over expected device seconds.
        blocks: the stretch of time that each step belongs to; errors are cross-validated by them.

    Returns `NO_RESIDUAL` where it does not tell steps of other stretches better.
    """
    logs = np.clip(np.log(np.maximum(ratios, 1e-9)), -LARGEST_LOG, LARGEST_LOG)
    knots = _knots(works)
    if knots is None or len(np.unique(blocks)) < 2:
        return NO_RESIDUAL
    features = _features(works, *knots)
    without, left = [], []
    for block in np.unique(blocks):
        held = blocks == block
        learned = _solve(features[~held], logs[~held])
        without.append(np.abs(logs[held]))
        left.append(np.abs(logs[held] - features[held] @ learned))
    # The middle of each stretch's errors, so that a long one does not decide alone.
    before = float(np.mean([np.median(errors) for errors in without]))
    after = float(np.mean([np.median(errors) for errors in left]))
    if after > (1 - LEAST_IMPROVEMENT) * before:
        return NO_RESIDUAL
    found = _solve(features, logs)
    decode, prompt = knots
    return Residual(
        tuple(decode),
        tuple(float(value) for value in found[: len(decode)]),
        tuple(prompt),
        tuple(float(value) for value in found[len(decode) :]),
    )


def _knots(works: Sequence[StepWork]) -> tuple[list[float], list[float]] | None:
    """Knots for steps of decodes and for steps with prompts; None if there are none."""
    decodes = [w.decode_sequences for w in works if not w.prefill_sequences]
    prompts = [w.rows for w in works if w.prefill_sequences]
    found = _doublings(decodes), _doublings(prompts)
    return found if found[0] or found[1] else None


def _doublings(sizes: Sequence[float]) -> list[float]:
    places = np.log2(np.maximum(np.asarray(sizes, dtype=float), 1.0)).round().astype(int)
    counts = np.bincount(places) if len(places) else np.zeros(0, dtype=int)
    return [float(place) for place in np.flatnonzero(counts >= LEAST_STEPS_OF_KNOT)]


def _features(works: Sequence[StepWork], decode: list[float], prompt: list[float]) -> Floats:
    features = np.zeros((len(works), len(decode) + len(prompt)))
    for line, work in zip(features, works, strict=True):
        if work.prefill_sequences:
            _put_hats(line[len(decode) :], prompt, math.log2(max(work.rows, 1.0)))
        else:
            _put_hats(line[: len(decode)], decode, math.log2(max(work.decode_sequences, 1.0)))
    return features


def _put_hats(line: Floats, knots: list[float], place: float) -> None:
    """How much each knot's value counts at a place."""
    if not knots:
        return
    right = bisect_right(knots, place)
    if right == 0 or right == len(knots):
        line[min(right, len(knots) - 1)] = 1.0
        return
    share = (place - knots[right - 1]) / (knots[right] - knots[right - 1])
    line[right - 1], line[right] = 1.0 - share, share


def _solve(features: Floats, logs: Floats) -> Floats:
    """Ridge regression in which disturbed steps lose their weight."""
    from sklearn.linear_model import Ridge  # takes its time to import, and predicting needs it not

    weights = np.ones(len(logs))
    found = np.zeros(features.shape[1])
    for _ in range(5):
        model = Ridge(alpha=PRIOR_STEPS, fit_intercept=False)
        model.fit(features, logs, sample_weight=weights)
        found = np.asarray(model.coef_, dtype=float)
        errors = np.abs(logs - features @ found)
        quiet = max(QUIET_LOG, 1.5 * float(np.median(errors)))
        weights = 1.0 / (1.0 + (errors / quiet) ** 2)
    return found


def _interpolated(knots: Sequence[float], values: Sequence[float], place: float) -> float:
    if not knots:
        return 0.0
    right = bisect_right(knots, place)
    if right == 0 or right == len(knots):
        return values[min(right, len(knots) - 1)]
    share = (place - knots[right - 1]) / (knots[right] - knots[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])
