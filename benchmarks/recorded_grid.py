"""A grid that `benchmarks.search_grid` measured, to be searched without measuring again."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from autotune.errors import Interrupted
from autotune.records import RunFolder, TrialRecord
from autotune.search.messages import (
    Answer,
    Failed,
    MeasureCommand,
    Measured,
    ProbeCommand,
    Probed,
)
from benchmarks.search_grid import KNOB_VALUES, PROBES_NAME

Key = tuple[Any, ...]
KNOBS = tuple(KNOB_VALUES)
# Where every strategy begins: the default, as far as the grid goes.
DEFAULT: Key = ("none", "auto", 128, 2048)


def key_of(config: Mapping[str, Any]) -> Key:
    """The place of a configuration in the grid."""
    return tuple(config[name] for name in KNOBS)


class RecordedGrid:
    """The trials of a grid by configuration and round.

    A strategy sees the measurements of one round; what it chose is judged by the mean over all.
    """

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.run = self.folder.read_run()
        self.maximise = self.run["direction"] == "maximize"
        self._rounds: dict[int, dict[Key, TrialRecord]] = {}
        for trial in self.folder.read_trials():
            self._rounds.setdefault(trial.round, {})[key_of(trial.config)] = trial
        whole = max(len(trials) for trials in self._rounds.values())
        # A round that is still under way would favour what was measured first.
        self._rounds = {n: t for n, t in sorted(self._rounds.items()) if len(t) == whole}
        probes = json.loads((path / PROBES_NAME).read_text())
        self.probes = Probed(probes["ceilings"], probes["probes"])
        self.probes_s = float(probes["probes"]["seconds"])

    @property
    def num_rounds(self) -> int:
        """How often the whole grid was measured."""
        return len(self._rounds)

    @property
    def keys(self) -> list[Key]:
        """Every configuration."""
        return list(next(iter(self._rounds.values())))

    def seen(self, key: Key, seed: int) -> TrialRecord:
        """What a run of this seed sees of a configuration."""
        return self._rounds[sorted(self._rounds)[seed % self.num_rounds]][key]

    @cached_property
    def cost_s(self) -> float:
        """Seconds that measuring every configuration once takes."""
        return statistics.mean(sum(t.seconds for t in r.values()) for r in self._rounds.values())

    @cached_property
    def best(self) -> float:
        """The best objective of the configurations that keep the promise."""
        feasible = [self._mean(key) for key in self.keys if self.feasible(key)]
        return max(feasible) if self.maximise else min(feasible)

    def feasible(self, key: Key) -> bool:
        """Whether a configuration keeps the promise, on the mean over the rounds."""
        trials = self._of(key)
        if any(t.objective is None or t.outcome != "ok" for t in trials):
            return False
        limits = zip(*(t.slo for t in trials), strict=True)
        return all(statistics.mean(r.violation for r in results) <= 0 for results in limits)

    def share(self, key: Key | None) -> float:
        """What a choice is of the best; 0 for one that breaks the promise, or none."""
        if key is None or not self.feasible(key):
            return 0.0
        mean = self._mean(key)
        return mean / self.best if self.maximise else self.best / mean

    def _of(self, key: Key) -> list[TrialRecord]:
        return [trials[key] for trials in self._rounds.values()]

    def _mean(self, key: Key) -> float:
        return statistics.mean(t.objective for t in self._of(key) if t.objective is not None)

    def noise(self) -> float | None:
        """Relative standard deviation of one measurement; None with a single round."""
        if self.num_rounds < 2:
            return None
        ratios = []
        for key in self.keys:
            values = [t.objective for t in self._of(key) if t.objective is not None]
            if len(values) == self.num_rounds:
                ratios.append(statistics.variance(values) / statistics.mean(values) ** 2)
        return float(statistics.mean(ratios) ** 0.5)


class RecordedEvaluator:
    """Answers a search's commands with what the grid's trials measured.

    `measured_s` is what measuring would have taken so far, probes included. At `most_s`, and where
    the search ends and its proof would begin, it stops the run as Ctrl-C does.
    """

    def __init__(self, grid: RecordedGrid, folder: RunFolder, seed: int, most_s: float) -> None:
        self._grid = grid
        self._folder = folder
        self._seed = seed
        self._most_s = most_s
        self.measured_s = 0.0
        self.history: list[tuple[float, Key]] = []

    def measure(self, command: MeasureCommand, time_limit: float) -> Answer:  # noqa: ARG002
        """The recorded metrics; the trial's records are copied into the run."""
        if command.window or self.measured_s >= self._most_s:
            raise Interrupted("the recorded search is over")
        key = key_of(command.config)
        record = self._grid.seen(key, self._seed)
        self.measured_s += record.seconds
        self.history.append((self.measured_s, key))
        if record.metrics is None:
            return Failed("crash", record.reason or "no reason was recorded")
        for name in ("requests", "steps"):
            self._copy_part(record.number, command.trial, name)
        return Measured({**record.metrics, "config": dict(command.config)})

    def probe(self, command: ProbeCommand) -> Probed | Failed:  # noqa: ARG002
        """What the probes found in the hour of the grid."""
        self.measured_s += self._grid.probes_s
        return self._grid.probes

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> RecordedEvaluator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _copy_part(self, number: int, trial: int, name: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._folder.parts.mkdir(exist_ok=True)
        table = pq.read_table(self._grid.folder.parts / f"{number:05d}.{name}.parquet")
        place = table.schema.get_field_index("trial")
        column = pa.array([trial] * len(table), table.schema.field(place).type)
        table = table.set_column(place, table.schema.field(place), column)
        pq.write_table(table, self._folder.parts / f"{trial:05d}.{name}.parquet")


def begin_run(
    grid: RecordedGrid, path: Path, seed: int, budget_s: float, sampler: str = "simulator"
) -> None:
    """A run folder under the grid's traffic that `tune` can take up, for a budget in seconds."""
    path.mkdir(parents=True)
    for file in grid.folder.path.iterdir():
        if file.suffix == ".parquet":
            shutil.copy(file, path / file.name)
    run = dict(grid.run)
    narrowing = {name: list(values) for name, values in KNOB_VALUES.items()}
    fixed = {name: [grid.run["engine_config"][name]] for name in _others(grid)}
    start = dict(zip(KNOBS, DEFAULT, strict=True))
    run["engine_config"] = {**run["engine_config"], **start}
    run["search_space"] = {n: list(v) for n, v in _ordered(narrowing, run["search_space"])}
    run["options"] = {
        **run["options"],
        "config": start,
        "narrowing": {**narrowing, **fixed},
        "seed": seed,
        "sampler": sampler,
        "budget_s": budget_s,
        "trials": None,
        "rounds": 2,
        "finalists": 1,
    }
    run["schedule"] = {**run["schedule"], "rounds": 2, "finalists": 1, "budget_s": budget_s}
    run |= {"budget_s": budget_s, "max_trials": None, "seeds": {"seed": seed}, "notes": []}
    folder = RunFolder(path)
    folder.write_json(folder.run_json, run)


def _others(grid: RecordedGrid) -> list[str]:
    return [name for name in grid.run["search_space"] if name not in KNOBS]


def _ordered(
    values: Mapping[str, list[Any]], space: Mapping[str, Any]
) -> Iterator[tuple[str, list[Any]]]:
    """Knobs in the order of the space that the grid was cut from."""
    for name in sorted(values, key=list(space).index):
        yield name, values[name]
