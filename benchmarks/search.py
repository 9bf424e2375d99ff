"""What a search finds for its cost: random, TPE and ours in a grid that was measured whole.

Every strategy begins with the default and pays the recorded seconds of each measurement, probes
included; none may measure beyond its budget. At each budget a run answers with the best that it
saw, and is scored by what that is of the best in the grid, 0 if it breaks the promise. A strategy
sees one round of measurements; the score is over all rounds. What a strategy computes itself is
told apart from what it measures; `total` counts both. TPE gets repeated suggestions for nothing.

    python -m benchmarks.search_grid FOLDER --scenario throughput
    python -m benchmarks.search FOLDER [--seeds 10] [--out search.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from autotune.errors import Interrupted
from autotune.hardware.detect import describe_hardware
from autotune.hardware.versions import library_versions
from autotune.records import RunFolder, TrialRecord, utc_now
from autotune.search.tune import tune
from benchmarks.exact_tests import rank_sum_p, resampled
from benchmarks.recorded_grid import (
    DEFAULT,
    KNOBS,
    Key,
    RecordedEvaluator,
    RecordedGrid,
    begin_run,
)
from benchmarks.search_grid import KNOB_VALUES
from engine.config import KNOBS as ALL_KNOBS

# Shares of what measuring the whole grid costs.
BUDGETS = (0.025, 0.05, 0.075, 0.10, 0.15)
CLAIMED = 0.10
ENOUGH = 0.98
# Suggestions in a row that were measured before, after which the sampler has nothing to say.
MAX_REPEATS = 200


@dataclass(frozen=True, slots=True)
class Run:
    """One search: what was measured by when in seconds, and what it computed in core seconds."""

    seed: int
    measured: tuple[tuple[float, Key], ...]
    computing_s: float

    def choice(self, grid: RecordedGrid, most_s: float) -> Key | None:
        """The best that was seen within a budget: what keeps the promise before what does not."""
        seen = [(grid.seen(key, self.seed), key) for at, key in self.measured if at <= most_s]
        sign = -1.0 if grid.maximise else 1.0

        def order(item: tuple[TrialRecord, Key]) -> tuple[float, float]:
            assert item[0].objective is not None
            return item[0].missed, sign * item[0].objective

        usable = [item for item in seen if item[0].objective is not None]
        return min(usable, key=order)[1] if usable else None

    def share(self, grid: RecordedGrid, most_s: float) -> float:
        """What the choice within a budget is of the best."""
        return grid.share(self.choice(grid, most_s))


def search_at_random(grid: RecordedGrid, seed: int, most_s: float) -> Run:
    """The default, and then any other, none twice."""
    others = [key for key in grid.keys if key != DEFAULT]
    random.Random(seed).shuffle(others)
    return _paying(grid, seed, most_s, iter([DEFAULT, *others]).__next__, None)


def search_by_tpe(grid: RecordedGrid, seed: int, most_s: float) -> Run:
    """Optuna's TPE as it comes, with the limits as constraints; the default is its first point."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        direction="maximize" if grid.maximise else "minimize",
        sampler=optuna.samplers.TPESampler(seed=seed),
    )
    study.enqueue_trial({name: _position(name, v) for name, v in zip(KNOBS, DEFAULT, strict=True)})
    waiting: list[optuna.trial.Trial] = []

    def ask() -> Key:
        trial = study.ask()
        waiting.append(trial)
        return tuple(_suggested(trial, name) for name in KNOBS)

    def tell(key: Key) -> None:
        record, trial = grid.seen(key, seed), waiting.pop()
        for result in record.slo:
            trial.set_constraint(result.limit, result.violation)
        trial.set_constraint("outcome", 0.0 if record.outcome == "ok" else 100.0)
        study.tell(trial, 0.0 if record.objective is None else record.objective)

    return _paying(grid, seed, most_s, ask, tell)


def search_by_tune(grid: RecordedGrid, seed: int, most_s: float) -> Run:
    """`autotune run` itself, which measures nothing but asks the record."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "run"
        # The proof is no part of the comparison: its share comes on top.
        typical = statistics.median(grid.seen(key, seed).seconds for key in grid.keys)
        begin_run(grid, path, seed, most_s + 4 * typical)
        evaluator = RecordedEvaluator(grid, RunFolder(path), seed, most_s)

        with contextlib.suppress(Interrupted):
            tune(None, path, evaluator=evaluator, clock=lambda: evaluator.measured_s)
    return Run(seed, tuple(evaluator.history), time.process_time() - began)


STRATEGIES: dict[str, Callable[[RecordedGrid, int, float], Run]] = {
    "random": search_at_random,
    "tpe": search_by_tpe,
    "ours": search_by_tune,
}


def _paying(
    grid: RecordedGrid,
    seed: int,
    most_s: float,
    ask: Callable[[], Key],
    tell: Callable[[Key], None] | None,
) -> Run:
    """Measure what is asked for until the budget ends; what is known already costs nothing."""
    began = time.process_time()
    measured: dict[Key, float] = {}
    spent, repeats = 0.0, 0
    while spent < most_s and len(measured) < len(grid.keys) and repeats < MAX_REPEATS:
        key = ask()
        repeats += 1
        if key not in measured:
            repeats = 0
            spent += grid.seen(key, seed).seconds
            measured[key] = spent
        if tell is not None:
            tell(key)
    history = tuple((at, key) for key, at in measured.items())
    return Run(seed, history, time.process_time() - began)


def _position(name: str, value: Any) -> Any:
    return KNOB_VALUES[name].index(value) if _is_number(name) else value


def _suggested(trial: optuna.trial.Trial, name: str) -> Any:
    values = KNOB_VALUES[name]
    if _is_number(name):
        return values[trial.suggest_int(name, 0, len(values) - 1)]
    return trial.suggest_categorical(name, values)


def _is_number(name: str) -> bool:
    return ALL_KNOBS[name].type in (int, float)


def compared(grid: RecordedGrid, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Shares of the best over budget, by strategy, and what the differences prove."""
    body: dict[str, Any] = {"budgets": {}}
    for budget in BUDGETS:
        shares = {
            name: [run.share(grid, budget * grid.cost_s) for run in found]
            for name, found in runs.items()
        }
        body["budgets"][f"{budget:g}"] = {
            name: _told(values, shares) | {"runs": values} for name, values in shares.items()
        }
    for name, found in runs.items():
        reached = [_reached(grid, run) for run in found]
        body.setdefault("cost_of_98_percent", {})[name] = {
            "median_share_of_grid_cost": float(np.median([_or_infinity(r) for r in reached]))
            if sum(r is None for r in reached) * 2 < len(reached)
            else None,
            "reached": sum(r is not None for r in reached),
            "runs": reached,
        }
        body.setdefault("computing_s", {})[name] = {
            "median": statistics.median(run.computing_s for run in found),
            "runs": [run.computing_s for run in found],
        }
    return body


def _told(values: Sequence[float], shares: dict[str, list[float]]) -> dict[str, Any]:
    mean, low, high = resampled(values)
    told: dict[str, Any] = {
        "mean": mean,
        "low": low,
        "high": high,
        "median": statistics.median(values),
        "worst": min(values),
    }
    for other in ("random", "tpe"):
        if other in shares and shares[other] is not values:
            told[f"p_better_than_{other}"] = rank_sum_p(values, shares[other])
    return told


def _reached(grid: RecordedGrid, run: Run) -> float | None:
    """The share of the grid's cost at which a run's choice came to 98% of the best."""
    for at, _ in run.measured:
        if run.share(grid, at) >= ENOUGH:
            return at / grid.cost_s
    return None


def _or_infinity(value: float | None) -> float:
    return float("inf") if value is None else value


def print_table(grid: RecordedGrid, body: dict[str, Any], strategies: Sequence[str]) -> None:
    """Shares by strategy and budget."""
    seconds = f"{grid.cost_s:.0f} s for {len(grid.keys)} configurations"
    print(f"\nshare of the best, by share of the grid's cost ({seconds}): mean [95% interval]")
    print("strategy".ljust(9) + "".join(f"{budget:>22.1%}" for budget in BUDGETS))
    for name in strategies:
        cells = []
        for budget in BUDGETS:
            told = body["budgets"][f"{budget:g}"][name]
            cells.append(f"{told['mean']:.3f} [{told['low']:.3f}, {told['high']:.3f}]")
        print(name.ljust(9) + "".join(cell.rjust(22) for cell in cells))
    claimed = body["budgets"][f"{CLAIMED:g}"]
    for name in strategies:
        told = claimed[name]
        chances = [f"p against {o}: {told[k]:.2g}" for o in strategies if (k := _p(o)) in told]
        cost = body["cost_of_98_percent"][name]
        median = cost["median_share_of_grid_cost"]
        print(
            f"{name}: at {CLAIMED:.0%}, worst {told['worst']:.3f}; 98% reached in "
            f"{cost['reached']} of {len(cost['runs'])} runs"
            + ("" if median is None else f", after {median:.1%} on the median")
            + f"; computing {body['computing_s'][name]['median']:.1f} s"
            + "".join(f"; {chance}" for chance in chances)
        )


def _p(other: str) -> str:
    return f"p_better_than_{other}"


def main() -> None:
    """Search the recorded grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    grid = RecordedGrid(options.folder)
    strategies = options.strategies.split(",")
    most_s = max(BUDGETS) * grid.cost_s
    began = time.perf_counter()
    runs: dict[str, list[Run]] = {}
    for name in strategies:
        runs[name] = []
        for seed in range(options.seeds):
            run = STRATEGIES[name](grid, seed, most_s)
            runs[name].append(run)
            shares = [f"{run.share(grid, budget * grid.cost_s):.3f}" for budget in BUDGETS]
            print(f"{name} {seed}: {' '.join(shares)}, computing {run.computing_s:.1f} s")
    body = compared(grid, runs)
    print_table(grid, body, strategies)
    report = {
        "machine": describe_hardware("cpu"),
        "versions": library_versions(),
        "at": utc_now(),
        "seconds": time.perf_counter() - began,
        "seeds": options.seeds,
        "grid": {
            "measured_at": grid.run["started_at"],
            "configurations": len(grid.keys),
            "feasible": sum(grid.feasible(key) for key in grid.keys),
            "rounds": grid.num_rounds,
            "noise": grid.noise(),
            "cost_s": grid.cost_s,
            "best": grid.best,
            "default_share": grid.share(DEFAULT),
            "objective": grid.run["objective"],
            "slo": grid.run["slo"],
            "workload": grid.run["workload"],
            "knobs": {name: list(values) for name, values in KNOB_VALUES.items()},
        },
        **body,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
