"""What the sum of parts leaves out of a step's time, learned from steps: a factor by its shape.

Parts of a step are measured alone, with warm caches and nothing between them; within a step they
push each other out of caches, and kernels meet sizes that were not probed. What that does changes
smoothly with the size of a step. So the factor is a straight-line spline, over the logarithm of the
rows where all sequences decode, and of the rows where prompts are among them, fitted by ridge
regression (scikit-learn). It is kept only if it tells steps better that it was not fitted to: those
of other stretches of time; otherwise each kind of step has one factor.

Steps weigh by their expected time, so that sums come out right: what a load takes is a sum, and the
long tail of single steps is part of it. Of steps of decodes alone the factor hangs on their rows
only, so that their time stays straight in the context, as `DecodeLine` needs it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autotune.predict.robust_fit import Floats
from autotune.predict.step_cost import StepWork

# Knots lie so far apart, in doublings, and only where there are so many steps.
SPACING = 0.5
LEAST_STEPS_OF_KNOT = 8
# Steps of each size are expected where the sum says, as if so many with that result had been seen.
PRIOR_STEPS = 6.0
# Steps that took so many times as long as expected, or so much less, were disturbed.
LEAST_RATIO, LARGEST_RATIO = 0.4, 2.5
_LEAST_FACTOR, _LARGEST_FACTOR = 0.6, 1.7
_PRIOR_LEVEL_STEPS = 5.0
_MOST_FOLDS = 8


@dataclass(frozen=True, slots=True)
class Residual:
    """Factors on a step's device time: values at knots, straight between and level beyond.

    `decode_*` by log2 of the rows of steps that only decode, their sequences and drafted tokens,
    `prompt_*` by log2 of the rows of the others. No knots mean a factor of 1.
    """

    decode_knots: tuple[float, ...] = ()
    decode_factors: tuple[float, ...] = ()
    prompt_knots: tuple[float, ...] = ()
    prompt_factors: tuple[float, ...] = ()
    _known: dict[tuple[bool, float], float] = field(default_factory=dict, compare=False, repr=False)

    def factor(self, work: StepWork) -> float:
        """The factor of a step."""
        prompt = work.prefill_sequences > 0
        # Not the rows that fill a captured step up.
        key = (prompt, work.rows if prompt else work.decode_sequences + work.drafted)
        known = self._known.get(key)
        if known is None:
            knots = self.prompt_knots if prompt else self.decode_knots
            factors = self.prompt_factors if prompt else self.decode_factors
            known = self._known[key] = _interpolated(knots, factors, math.log2(max(key[1], 1.0)))
        return known

    def factors(self, sizes: Floats, prompts: NDArray[np.bool_]) -> Floats:
        """The factors of many steps, by rows; see `fit_residual`."""
        places = np.log2(np.maximum(sizes, 1.0))
        found = np.ones(len(sizes))
        for which, knots, factors in (
            (~prompts, self.decode_knots, self.decode_factors),
            (prompts, self.prompt_knots, self.prompt_factors),
        ):
            if knots:
                found[which] = np.interp(places[which], knots, factors)
        return found


NO_RESIDUAL = Residual()


def fit_residual(
    sizes: Floats,
    prompts: NDArray[np.bool_],
    measured: Floats,
    expected: Floats,
    blocks: NDArray[np.intp],
) -> Residual:
    """Fit the factor to steps.

    Args:
        sizes: rows of the steps.
        prompts: which steps have prompts.
        measured: device seconds.
        expected: the same by the sum.
        blocks: the stretch of time that each step belongs to; errors are cross-validated by them.

    Where the splines do not tell steps of other stretches better, what is left of them is one
    factor for each kind of step.
    """
    ratios = np.clip(measured / expected, LEAST_RATIO, LARGEST_RATIO)
    places = np.log2(np.maximum(sizes, 1.0))
    levels = {kind: _level(ratios, expected, prompts == kind) for kind in (False, True)}
    ratios = ratios / np.where(prompts, levels[True], levels[False]) - 1.0
    decode, prompt = _knots(places[~prompts]), _knots(places[prompts])
    features = np.zeros((len(sizes), len(decode) + len(prompt)))
    features[~prompts, : len(decode)] = _hats(places[~prompts], decode)
    features[prompts, len(decode) :] = _hats(places[prompts], prompt)
    if not _tells_more(features, ratios, expected, blocks):
        return Residual((0.0,), (levels[False],), (0.0,), (levels[True],))
    found = np.clip(1.0 + _solve(features, ratios, expected), _LEAST_FACTOR, _LARGEST_FACTOR)
    return Residual(
        tuple(decode) or (0.0,),
        tuple(levels[False] * float(f) for f in found[: len(decode)]) or (levels[False],),
        tuple(prompt) or (0.0,),
        tuple(levels[True] * float(f) for f in found[len(decode) :]) or (levels[True],),
    )


def _level(ratios: Floats, expected: Floats, which: NDArray[np.bool_]) -> float:
    """How many times as long as expected steps of a kind took together."""
    time = float(expected[which].sum())
    prior = _PRIOR_LEVEL_STEPS * float(expected.mean())
    return (float(expected[which] @ ratios[which]) + prior) / (time + prior)


def _tells_more(
    features: Floats, ratios: Floats, expected: Floats, blocks: NDArray[np.intp]
) -> bool:
    """Whether the factors bring steps of stretches that they were not fitted to nearer."""
    stretches = np.unique(blocks)
    if not features.shape[1] or len(stretches) < 2:
        return False
    fold = np.searchsorted(stretches, blocks) % _MOST_FOLDS
    before = after = 0.0
    for number in range(min(_MOST_FOLDS, len(stretches))):
        held = fold == number
        learned = _solve(features[~held], ratios[~held], expected[~held])
        before += float(expected[held] @ ratios[held] ** 2)
        after += float(expected[held] @ (ratios[held] - features[held] @ learned) ** 2)
    return after < before


def _knots(places: Floats) -> list[float]:
    """Where there are enough steps, of sizes as log2."""
    if not len(places):
        return []
    index, counts = np.unique((places / SPACING).round().astype(int), return_counts=True)
    return [SPACING * float(place) for place in index[counts >= LEAST_STEPS_OF_KNOT]]


def _hats(places: Floats, knots: Sequence[float]) -> Floats:
    """How much each knot's value counts at each place."""
    if not knots:
        return np.zeros((len(places), 0))
    return np.stack([np.interp(places, knots, unit) for unit in np.eye(len(knots))], axis=1)


def _solve(features: Floats, ratios: Floats, weights: Floats) -> Floats:
    from sklearn.linear_model import Ridge  # takes its time to import, and predicting needs it not

    # A ridge of 1 on coefficients in units of their priors; a step at a knot weighs as its time.
    time = features.T @ weights
    seen = features.sum(axis=0)
    unit = 1.0 / np.sqrt(PRIOR_STEPS * np.maximum(time, 1e-12) / np.maximum(seen, 1e-12))
    model = Ridge(alpha=1.0, fit_intercept=False)
    model.fit(features * unit, ratios, sample_weight=weights)
    return np.asarray(model.coef_ * unit, dtype=float)


def _interpolated(knots: Sequence[float], values: Sequence[float], place: float) -> float:
    if not knots:
        return 1.0
    right = bisect_right(knots, place)
    if right == 0 or right == len(knots):
        return values[min(right, len(knots) - 1)]
    share = (place - knots[right - 1]) / (knots[right] - knots[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])
