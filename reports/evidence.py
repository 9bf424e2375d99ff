"""A run folder read once, and arranged as the two sides that the report compares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from autotune.records import LimitResult, RequestRecord, RunFolder, TrialRecord
from reports.formatting import mapping, number, sequence


class Step(Protocol):
    """What the report reads of a step record; see `RunFolder.read_steps`."""

    @property
    def start(self) -> float: ...  # noqa: D102
    @property
    def queue_length(self) -> float: ...  # noqa: D102
    @property
    def running(self) -> float: ...  # noqa: D102
    @property
    def blocks_used(self) -> float: ...  # noqa: D102
    @property
    def blocks_total(self) -> float: ...  # noqa: D102
    @property
    def preemptions(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Sample:
    """A server's gauges at one moment, where there are no steps; a `Step` to the charts."""

    start: float
    queue_length: float
    running: float
    blocks_used: float
    blocks_total: float = 1.0
    preemptions: int = 0


KNOBS_NOT_COMPARED = ("model", "tokenizer", "device", "seed")


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the comparison: the default, or what is set against it.

    `bench` holds the metrics of its trials and `source` says where they stand in the records.
    `requests` are those of all its trials; `steps` those of one, `steps_trial`.
    """

    label: str
    series: str
    config: Mapping[str, Any]
    bench: Mapping[str, Any]
    source: str
    slo: Sequence[LimitResult]
    trials: Sequence[TrialRecord]
    requests: Sequence[RequestRecord]
    steps: Sequence[Step]
    steps_trial: int | None

    def latency(self, metric: str, statistic: str) -> float | None:
        """A latency statistic in seconds, or None where there is none."""
        return number(mapping(self.bench.get(metric)).get(statistic))

    def interval(self, metric: str, statistic: str) -> tuple[float, float] | None:
        """The bootstrap interval of a latency statistic in seconds."""
        intervals = mapping(mapping(self.bench.get(metric)).get("intervals"))
        return as_interval(intervals.get(statistic))


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything the report rests on. `winner` is None where there is nothing to compare.

    `profile`, `diagnosis` and `advice` are the files of these names, empty where there are none or
    they cannot be read.
    """

    folder: Path
    run: Mapping[str, Any]
    result: Mapping[str, Any]
    trials: Sequence[TrialRecord]
    baseline: Side | None
    winner: Side | None
    profile: Mapping[str, Any] = field(default_factory=dict)
    diagnosis: Mapping[str, Any] = field(default_factory=dict)
    advice: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_single(self) -> bool:
        """Whether one configuration was measured by itself, with nothing to compare it with."""
        return self.run.get("kind") in ("bench", "profile")

    @property
    def sides(self) -> list[Side]:
        """The sides there are, the default first."""
        return [side for side in (self.baseline, self.winner) if side is not None]

    @property
    def search_trials(self) -> list[TrialRecord]:
        """The trials of the search itself, without calibration and proof."""
        return [t for t in self.trials if t.kind == "search"]

    @property
    def minimize(self) -> bool:
        """Whether a smaller objective is better."""
        return self.run.get("direction") == "minimize"

    def better(self, one: float, other: float) -> bool:
        """Whether the first objective is better than the second."""
        return one < other if self.minimize else one > other

    @property
    def varied_knobs(self) -> list[str]:
        """Knobs that took more than one value in the search, in the order of their importance."""
        seen: dict[str, set[str]] = {}
        for trial in self.search_trials:
            for name, value in trial.config.items():
                if name not in KNOBS_NOT_COMPARED:
                    seen.setdefault(name, set()).add(repr(value))
        shares = mapping(self.result.get("importances"))
        names = [name for name, values in seen.items() if len(values) > 1]
        return sorted(names, key=lambda n: (-(number(shares.get(n)) or 0.0), n))


def read_evidence(folder: Path) -> Evidence:
    """Read the records of a run, finished or not.

    Raises:
        BadInput: the folder holds no run.
    """
    files = RunFolder(folder)
    run = files.read_run()
    trials = files.read_trials()
    result = mapping(run.get("result"))
    profile = read_json(folder / "profile.json")
    if run.get("kind") == "profile":
        baseline, winner = _profile_side(files, run, profile), None
    elif result:
        baseline, winner = _proven_sides(files, result, trials)
    elif run.get("kind") == "bench":
        baseline, winner = _bench_side(files, run), None
    else:
        baseline, winner = _sides_so_far(files, trials, run.get("direction") == "minimize")
    diagnosis, advice = (read_json(folder / f"{n}.json") for n in ("diagnosis", "advice"))
    return Evidence(folder, run, result, trials, baseline, winner, profile, diagnosis, advice)


def best_so_far(trials: Sequence[TrialRecord], *, minimize: bool) -> TrialRecord | None:
    """The best search trial that met the SLO; the first of equals."""
    sign = 1.0 if minimize else -1.0
    feasible = [
        (sign * value, trial.number, trial)
        for trial in trials
        if trial.kind == "search" and trial.slo_met
        if (value := number(trial.objective)) is not None
    ]
    return min(feasible, key=lambda item: item[:2])[2] if feasible else None


def closest(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The measured search trial that misses the SLO by the least, summed over its limits."""
    measured = [
        (sum(max(number(item.violation) or 0.0, 0.0) for item in trial.slo), trial.number, trial)
        for trial in trials
        if trial.kind == "search" and trial.metrics and trial.slo
    ]
    return min(measured, key=lambda item: item[:2])[2] if measured else None


def as_interval(value: object) -> tuple[float, float] | None:
    """Two finite numbers as an interval, or None."""
    pair = [number(item) for item in sequence(value)]
    if len(pair) != 2 or pair[0] is None or pair[1] is None:
        return None
    return pair[0], pair[1]


def read_limits(value: object) -> list[LimitResult]:
    """The limits as `run.json` has them; entries that are none are left out."""
    limits = []
    for item in sequence(value):
        try:
            limits.append(LimitResult(**mapping(item)))
        except TypeError:
            continue
    return limits


def _proven_sides(
    files: RunFolder, result: Mapping[str, Any], trials: Sequence[TrialRecord]
) -> tuple[Side | None, Side | None]:
    def side(key: str, label: str, slo: str) -> Side | None:
        bench = mapping(result.get(key))
        if not bench:
            return None
        config = mapping(bench.get("config"))
        if key == "winner":
            config = mapping(result.get("winner_config")) or config
        numbers = [n for n in sequence(result.get(f"{key}_trials")) if isinstance(n, int)]
        chosen = [t for t in trials if t.number in numbers]
        return _side(
            files, label, config, bench, f"result.{key}", read_limits(result.get(slo)), chosen
        )

    baseline = side("baseline", "default", "baseline_slo")
    # Where nothing beat the default, the winner is the default and there is one side to show.
    winner = side("winner", "winner", "slo") if mapping(result.get("changes")) else None
    return baseline, winner


def _sides_so_far(
    files: RunFolder, trials: Sequence[TrialRecord], minimize: bool
) -> tuple[Side | None, Side | None]:
    measured = [t for t in trials if t.kind == "search" and t.metrics]
    first = next((t for t in measured if t.source == "default"), None)
    best = best_so_far(measured, minimize=minimize)

    def side(trial: TrialRecord, label: str) -> Side:
        return _side(
            files,
            label,
            trial.config,
            mapping(trial.metrics),
            f"trials[{trial.number}].metrics",
            trial.slo,
            [trial],
        )

    baseline = side(first, "default") if first else None
    if best is None:
        near, label = closest(measured), "closest so far"
    else:
        near, label = best, "best so far"
    return baseline, side(near, label) if near and near is not first else None


def _bench_side(files: RunFolder, run: Mapping[str, Any]) -> Side | None:
    """The one side of a folder that `autotune bench` wrote, whose records are those of trial 0."""
    bench = read_json(files.path / "bench.json")
    return _only_side(files, run, bench, "bench") if bench else None


def _profile_side(
    files: RunFolder, run: Mapping[str, Any], profile: Mapping[str, Any]
) -> Side | None:
    """The same of one that `autotune profile` wrote; of a sampled server there are gauges alone."""
    return _only_side(files, run, mapping(profile.get("metrics")), "profile.metrics", profile)


def _only_side(
    files: RunFolder,
    run: Mapping[str, Any],
    bench: Mapping[str, Any],
    source: str,
    profile: Mapping[str, Any] | None = None,
) -> Side:
    requests: Sequence[RequestRecord] = files.read_requests(0)
    steps: Sequence[Step] = files.read_steps(0) or _samples(profile or {})
    config = mapping(run.get("engine_config"))
    return Side(
        "measured",
        "s-winner",
        config,
        bench,
        source,
        (),
        (),
        requests,
        steps,
        0 if steps else None,
    )


def _samples(profile: Mapping[str, Any]) -> list[Sample]:
    samples = []
    for point in map(mapping, sequence(profile.get("series"))):
        at, queue, running = (number(point.get(name)) for name in ("at_s", "queue", "running"))
        if at is not None:
            used = number(point.get("occupancy")) or 0.0
            samples.append(Sample(at, queue or 0.0, running or 0.0, used))
    return samples


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object, empty where the file is missing or damaged: the rest is worth showing."""
    try:
        return mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def _side(
    files: RunFolder,
    label: str,
    config: Mapping[str, Any],
    bench: Mapping[str, Any],
    source: str,
    slo: Sequence[LimitResult],
    trials: Sequence[TrialRecord],
) -> Side:
    requests: list[RequestRecord] = []
    steps: Sequence[Step] = []
    steps_trial = None
    for trial in trials:
        requests += files.read_requests(trial.number)
        if not steps:
            steps = files.read_steps(trial.number)
            steps_trial = trial.number if steps else None
    series = "s-default" if label == "default" else "s-winner"
    return Side(label, series, config, bench, source, slo, trials, requests, steps, steps_trial)
