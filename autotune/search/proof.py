"""Measuring the finalists again, against the default, on traffic that no trial was chosen by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.metrics import compute_metrics
from autotune.quality_guard import breaks_guard
from autotune.records import LimitResult, RequestRecord, RunFolder, TrialRecord
from autotune.search.gain import Gain, paired_gain
from autotune.search.objective import Objective
from autotune.search.pooled_figures import pooled_engine, pooled_speculation
from autotune.slo import QUALITY_METRICS, Slo
from engine.config import EngineConfig
from engine.step_record import StepRecord


@dataclass(frozen=True, slots=True)
class Contender:
    """One configuration in the proof: its rounds' trials, pooled metrics and gain over the default.

    `gain` is None for the default itself, and where fewer than two rounds of both were measured.
    """

    config: dict[str, Any]
    trials: list[int]
    metrics: dict[str, Any] | None
    slo: list[LimitResult]
    slo_met: bool
    load_delivered: bool
    gain: Gain | None


def choose_finalists(
    records: Sequence[TrialRecord], objective: Objective, count: int, slo: Slo
) -> list[TrialRecord]:
    """The search trials worth proving, best first; the default, the first record, is not one.

    A config whose quality breaks the SLO is none, however fast and however few the others are.
    """
    seen: list[Mapping[str, Any]] = [records[0].config]
    chosen: list[TrialRecord] = []
    for record in ranked(records, objective):
        feasible = not breaks_guard(slo, record.slo)
        if feasible and record.config not in seen and len(chosen) < count:
            seen.append(record.config)
            chosen.append(record)
    return chosen


def ranked(records: Sequence[TrialRecord], objective: Objective) -> list[TrialRecord]:
    """The trials that measured an objective, best first.

    Those that met the SLO come first, by their objective; the others by how far they missed it.
    """
    sign = -1.0 if objective.maximise else 1.0

    def key(record: TrialRecord) -> tuple[float, float, int]:
        assert record.objective is not None
        return record.missed, sign * record.objective, record.number

    return sorted((r for r in records if r.outcome == "ok" and r.objective is not None), key=key)


def judge(
    folder: RunFolder,
    configs: Sequence[Mapping[str, Any]],
    proof: Sequence[TrialRecord],
    *,
    slo: Slo,
    objective: Objective,
    confidence: float,
    seed: int,
    bundled: bool = True,
) -> list[Contender]:
    """What the rounds say of each config; the first is the default, to which the others compare.

    Rounds in which either measurement failed are left out of a pair. With several finalists the
    confidence is shared among them. `bundled` tells whose configs these are: the bundled engine's,
    or flags of another.
    """
    by_config = [[t for t in proof if t.config == dict(config)] for config in configs]
    default_rounds = {t.round: t for t in by_config[0] if t.objective is not None}
    contenders = []
    for index, trials in enumerate(by_config):
        gain = None
        if index > 0:
            pairs = [
                (default_rounds[t.round].objective, t.objective)
                for t in trials
                if t.round in default_rounds and t.objective is not None
            ]
            gain = paired_gain(
                [d for d, _ in pairs if d is not None],
                [c for _, c in pairs],
                maximise=objective.maximise,
                confidence=confidence,
                comparisons=max(1, len(configs) - 1),
            )
        contenders.append(
            _contender(folder, dict(configs[index]), trials, slo, gain, seed, bundled)
        )
    return contenders


def _contender(
    folder: RunFolder,
    config: dict[str, Any],
    trials: Sequence[TrialRecord],
    slo: Slo,
    gain: Gain | None,
    seed: int,
    bundled: bool,
) -> Contender:
    measured = [t for t in trials if t.metrics is not None]
    metrics = _pooled(folder, config, measured, slo, seed, bundled) if measured else None
    limits = slo.evaluate(metrics) if metrics is not None else []
    complete = len(measured) == len(trials) > 0
    return Contender(
        config=config,
        trials=[t.number for t in trials],
        metrics=metrics,
        slo=limits,
        # A config that failed in one round keeps no promise, whatever the other rounds say.
        slo_met=complete and all(limit.met for limit in limits),
        load_delivered=all((t.metrics or {}).get("load_delivered", False) for t in measured),
        gain=gain,
    )


def _pooled(
    folder: RunFolder,
    config: dict[str, Any],
    trials: Sequence[TrialRecord],
    slo: Slo,
    seed: int,
    bundled: bool,
) -> dict[str, Any]:
    """Metrics over all requests of several rounds, laid end to end."""
    records: list[RequestRecord] = []
    steps: list[StepRecord] = []
    duration = 0.0
    notes = []
    for trial in trials:
        assert trial.metrics is not None
        for record in folder.read_requests(trial.number):
            records.append(
                dataclasses.replace(
                    record,
                    request_id=f"{trial.round}-{record.request_id}",
                    intended_send=record.intended_send + duration,
                    send=record.send + duration,
                    token_times=tuple(t + duration for t in record.token_times),
                )
            )
        for step in folder.read_steps(trial.number):
            steps.append(dataclasses.replace(step, start=step.start + duration))
        duration += trial.metrics["duration_s"]
        if trial.metrics["load_note"]:
            notes.append(trial.metrics["load_note"])
    rounds = [t.metrics for t in trials if t.metrics is not None]
    metrics = compute_metrics(
        records,
        slo,
        duration=duration,
        config=EngineConfig.from_mapping(config) if bundled else config,
        load_delivered=all(t.metrics["load_delivered"] for t in trials if t.metrics),
        load_note=notes[0] if notes else None,
        steps=steps,
        seed=seed,
        engine=None if bundled else pooled_engine([m["engine"] for m in rounds]),
        speculation=None if bundled else pooled_speculation([m["speculation"] for m in rounds]),
    )
    metrics["config"] = config
    # Laid end to end, the rounds' arrivals have pauses between them that no load had.
    offered = [t.metrics["offered_rate"] for t in trials if t.metrics]
    metrics["offered_rate"] = None if None in offered else sum(offered) / len(offered)
    # Quality belongs to the weights and not to a round's load.
    first = trials[0].metrics or {}
    metrics |= {n: first[n] for n in ("quality", *QUALITY_METRICS) if n in first}
    rates = [t.metrics.get("capacity_requests_per_s") for t in trials if t.metrics]
    if all(rate is not None for rate in rates):
        metrics["capacity_requests_per_s"] = sum(r for r in rates if r is not None) / len(rates)
    return metrics
