"""How drafts fared, from the steps of a load that drafted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from autotune.predict.chunk_traces import chunk_traces, tree_traces
from autotune.predict.drafting import (
    CHOOSING_COST,
    LOOKUP_COST,
    MEASURED_ERROR,
    DraftCost,
    DraftProfile,
)
from autotune.predict.virtual_heads import Heads, fitted_heads
from autotune.records import RequestRecord
from autotune.speculation_counts import SpeculationTotals, design_effects
from engine.config import MODEL_METHODS, EngineConfig
from engine.speculate.draft import MOST_DRAFTED
from engine.step_record import StepRecord

# Of fewer drafts or steps nothing can be said.
FEWEST_DRAFTS = 20
FEWEST_STEPS = 8
_MOST_STEPS = 4000
Floats = NDArray[np.float64]
# Steps whose drafting took so many times as long as the middle one's were disturbed.
_DISTURBED = 20.0


def measured_drafts(
    steps: Sequence[StepRecord], config: EngineConfig, records: Sequence[RequestRecord] = ()
) -> DraftProfile | None:
    """What the steps and requests of a load under `config` tell of its drafts; None of too few."""
    totals = SpeculationTotals()
    for step in steps:
        totals.count(step)
    if totals.drafted_decodes < FEWEST_DRAFTS:
        return None
    costs_device = config.speculative_method in MODEL_METHODS
    adaptive = config.speculative_adaptive
    cost = draft_cost(steps, costs_device=costs_device, adaptive=adaptive)
    acceptance = _acceptance(steps, adaptive=adaptive)
    first = acceptance[0]
    effect = max(design_effects([s for s in steps if s.decode_sequences]), default=1.0)
    trials = totals.drafted_decodes / effect
    error = 1.0 / math.sqrt(max(trials * first * (1.0 - first), 1.0))
    is_tree = config.speculative_method == "medusa"
    deepest = len(totals.drafted_by_depth) if is_tree else MOST_DRAFTED
    traces = {}
    heads: Heads | None = None
    if is_tree:
        nodes = totals.drafted_tokens / totals.drafted_decodes
        heads = fitted_heads(acceptance, max(1, round(nodes)))
    if costs_device and not adaptive:
        most = config.num_speculative_tokens
        traces = tree_traces(records) if is_tree else chunk_traces(records, most)
    return DraftProfile(
        acceptance=acceptance,
        # A model drafts whenever it is asked.
        share=1.0 if costs_device else totals.drafted_decodes / totals.decodes,
        cost=cost or (DraftCost() if costs_device else LOOKUP_COST),
        costs_device=costs_device,
        deepest=deepest,
        breadth=totals.drafted_tokens / sum(totals.drafted_by_depth) if is_tree else 1.0,
        heads=heads,
        choosing=CHOOSING_COST if costs_device and not adaptive else DraftCost(),
        knows=costs_device,
        traces=traces,
        error=math.hypot(error, MEASURED_ERROR),
    )


def draft_cost(
    steps: Sequence[StepRecord], *, costs_device: bool, adaptive: bool
) -> DraftCost | None:
    """What drafting takes by what is drafted: relative least squares without negative costs.

    Prompts are computed by a model that drafts when it is first asked about them; their tokens are
    counted since the step before that drafted. With adaptive lengths a step may verify less than
    was drafted before it: of steps that look alike the quick ones are those that did not. None of
    too few steps.
    """
    rows: list[tuple[float, ...]] = []
    seconds: list[float] = []
    prompts = 0
    for step in steps:
        depth = len(step.drafted_by_depth)
        asked = step.drafted_by_depth[0] if depth and costs_device else step.decode_sequences
        if step.draft_seconds > 0 and asked and (depth or not costs_device):
            rows.append((1.0, asked, depth, depth * asked, prompts))
            seconds.append(step.draft_seconds)
            prompts = 0
        prompts += step.prefill_tokens
    if len(rows) < FEWEST_STEPS:
        return None
    places = np.unique(np.linspace(0, len(rows) - 1, _MOST_STEPS).round().astype(int))
    table, took = np.array(rows)[places], np.array(seconds)[places]
    if not costs_device:  # looking up takes as long however much is found
        table[:, 2] = table[:, 2] > 0
        table[:, 3:] = 0.0
    if costs_device and adaptive:
        table, took = _quick(table, took)
    usual = took <= _DISTURBED * np.median(took) + 1e-3 * table[:, 4]
    table, took = table[usual], took[usual]
    weight = 1.0 / np.sqrt(np.maximum(took, float(np.median(took))))
    matrix = table * weight[:, None]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
    found, _ = nnls(matrix / scale, took * weight)
    return DraftCost(*(float(value) for value in found / scale))


def _quick(table: Floats, took: Floats) -> tuple[Floats, Floats]:
    """Equal rows with the lower quartile of their seconds, each as often as it is there."""
    kinds, which = np.unique(table, axis=0, return_inverse=True)
    which = which.ravel()
    low = np.array([np.quantile(took[which == kind], 0.25) for kind in range(len(kinds))])
    return table, low[which]


def pooled(profiles: Sequence[DraftProfile]) -> DraftProfile:
    """Of several loads that drafted alike, the one with the least error, at the mean cost."""
    best = min(profiles, key=lambda profile: profile.error)
    costs = np.array([dataclasses.astuple(profile.cost) for profile in profiles])
    return dataclasses.replace(best, cost=DraftCost(*(float(c) for c in costs.mean(axis=0))))


def _acceptance(steps: Sequence[StepRecord], *, adaptive: bool) -> tuple[float, ...]:
    """The chance of each depth, once the tokens before were accepted.

    Adaptive lengths end drafts where they are expected to be wrong. So of the drafts that got as
    far as a depth all count that are of a step which went on, also those that did not themselves.
    """
    chances: list[float] = []
    for depth in range(MOST_DRAFTED):
        deep = [s for s in steps if len(s.drafted_by_depth) > depth]
        reached = right = 0
        for step in deep:
            drafted = step.drafted_by_depth[depth]
            before = step.accepted_by_depth[depth - 1] if depth else drafted
            reached += before if adaptive else min(before, drafted)
            right += step.accepted_by_depth[depth]
        if reached < FEWEST_DRAFTS:
            break
        chances.append(min(1.0, right / reached))
    return tuple(chances)


def conditional(survival: Sequence[float]) -> tuple[float, ...]:
    """Chances given that the tokens before were accepted, from those that all are."""
    chances, before = [], 1.0
    for share in survival:
        chances.append(min(1.0, share / before) if before > 0 else 0.0)
        before = share
    return tuple(chances)
