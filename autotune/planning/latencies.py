"""Latency statistics of an option with their intervals, simulated or by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autotune.metrics import STATISTICS
from autotune.planning.arithmetic import row_statistic
from autotune.planning.estimate import Estimate
from autotune.planning.trial import Trial
from autotune.simulation.interval import Interval
from autotune.slo import Slo


def simulated_latencies(trials: Sequence[Trial]) -> dict[str, Any] | None:
    """Statistics of trials at drawn costs, by the keys of `bench`; None where requests piled up."""
    middle = median_trial(trials)
    found = [trial.metrics for trial in trials if trial.metrics is not None]
    if middle.metrics is None:
        return None
    told: dict[str, Any] = {}
    for metric in ("ttft", "tpot", "itl", "e2e"):
        told[metric] = {}
        for name, value in middle.metrics[metric].items():
            if not isinstance(value, float):
                continue
            drawn = [m[metric][name] for m in found if m[metric].get(name) is not None]
            told[metric][name] = Interval.of(value, [*drawn, value]).to_json()
    return told


def limit_rows(slo: Slo, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """How each limit fared in the trials."""
    middle = median_trial(trials)
    judged = [slo.evaluate(trial.metrics) for trial in trials if trial.metrics is not None]
    rows = []
    for place, limit in enumerate(slo.limits):
        told = None
        if middle.metrics is not None:
            value = slo.evaluate(middle.metrics)[place].measured
            values = [r[place].measured for r in judged]
            known = [v for v in values if v is not None]
            told = None if value is None else Interval.of(value, [*known, value]).to_json()
        met = sum(trial.violations[place] <= 0 for trial in trials)
        rows.append(
            {"limit": limit.text, "bound": limit.bound, "measured": told, "p": met / len(trials)}
        )
    return rows


def arithmetic_latencies(known: Estimate, rate: float) -> dict[str, Any] | None:
    """Statistics of a replica at a rate, by arithmetic; None where requests pile up.

    Its rates are those of the simulation as far as this corrected them.
    """
    corrected = rate / known.correction
    middle, drawn = known.at(corrected), known.drawn_replicas
    if middle.saturated[0]:
        return None
    others = None if drawn is None else drawn.at(np.full(len(drawn.seats), corrected))
    told: dict[str, Any] = {}
    for metric in ("ttft", "tpot", "e2e"):
        told[metric] = {}
        for name in STATISTICS:
            value = float(row_statistic(getattr(middle, metric), name)[0])
            draws = [value]
            if others is not None:
                found = row_statistic(getattr(others, metric), name)
                draws += found[~others.saturated].tolist()
            told[metric][name] = Interval.of(value, draws).to_json()
    # The gaps between tokens differ more than their means; arithmetic tells the mean alone.
    told["itl"] = {"mean": told["tpot"]["mean"]}
    return told


def usual_latencies(known: Estimate, rate: float) -> dict[str, Any] | None:
    """Statistics of a replica at a rate, by corrected arithmetic, without intervals."""
    state = known.at(rate / known.correction)
    if state.saturated[0]:
        return None
    return {
        metric: {name: float(row_statistic(getattr(state, metric), name)[0]) for name in STATISTICS}
        for metric in ("ttft", "tpot", "e2e")
    }


def median_trial(trials: Sequence[Trial]) -> Trial:
    """The trial whose violation is the lower median."""
    ordered = sorted(trials, key=lambda trial: trial.violation)
    return ordered[(len(ordered) - 1) // 2]
