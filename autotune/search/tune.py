"""The whole search: calibrate, search, prove, decide; resumable at any point."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.errors import Interrupted
from autotune.quality_guard import qualities, uncertain_limits
from autotune.records import RunFolder, TrialRecord
from autotune.search.evaluator import Evaluator
from autotune.search.events import Listener, Silent
from autotune.search.methods_offered import heirs
from autotune.search.options import TuneOptions
from autotune.search.prepare import Prepared, conclude, offer_traffic, open_folder, prepare
from autotune.search.proof import Contender, choose_finalists, judge, ranked
from autotune.search.study import Study, combined_improvements
from autotune.search.trials import TrialRunner
from autotune.search.verdict import changed_knobs, result_json
from engine.config import KNOBS, EngineConfig
from engine.errors import ConfigError
from engine.quantize.method_table import METHODS

# How many points are asked for at once, to be measured in the order that reloads least often.
WAVE = 4
# The space counts as exhausted after so many suggestions in a row that were measured before.
MAX_REPEATS = 50
# Knobs that decide the quality; the model's dtype is the same for all trials.
QUALITY_KNOBS = ("quantization", "kv_cache_dtype")
# Quantizing with a calibrated method takes at most so much of the search time that is left, so that
# a large model's calibration does not eat the search; on a short budget, so many seconds.
QUANTIZE_SHARE = 1 / 3
MIN_QUANTIZE_S = 20.0


def tune(
    options: TuneOptions | None,
    path: Path,
    *,
    command: Sequence[str] = (),
    stop: threading.Event | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Tune the engine for a workload and an SLO; returns the content of `run.json`.

    Args:
        options: what to do; None resumes the run in `path`.
        path: the run folder; it must not exist, or be empty, unless a run is resumed.
        command: the command line, for the record.
        stop: set it to stop cleanly; what was measured is kept.
        listener: told of progress.

    Raises:
        BadInput: options that make no sense, or a folder that cannot be used.
        EnvironmentMissing: no disk space, or the trial process does not start.
        Interrupted: `stop` was set; `run.json` says so and the run can be resumed.
        engine.errors.EngineError: the model cannot be used.
    """
    began = time.monotonic()
    listener = listener or Silent()
    stop = stop or threading.Event()
    with open_folder(path, resume=options is None) as folder:
        prepared = prepare(folder, options, command)
        if prepared.run["status"] == "done":
            listener.note(f"{path} is finished; nothing is measured again")
            return prepared.run
        with Evaluator(folder, stop, listener.progress) as evaluator:
            search = _Search(prepared, folder, evaluator, listener, began)
            try:
                search.go()
            except Interrupted:
                # Before the proof there is a best trial, which the records tell, but no result.
                result = search.result() if search.proof_has_intervals else None
                conclude(folder, prepared.run, "interrupted", result)
                raise
        conclude(folder, prepared.run, "done", search.result())
        return prepared.run


class _Search:
    """One run under way."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        evaluator: Evaluator,
        listener: Listener,
        began: float,
    ) -> None:
        self._prepared = prepared
        self._options = prepared.options
        self._default = prepared.base.to_dict()
        self._folder = folder
        self._listener = listener
        self._slo = prepared.options.parsed_slo
        self._objective = prepared.options.parsed_objective
        earlier = folder.read_trials()
        self._calibration = [t for t in earlier if t.kind == "calibration"]
        self._searched = [t for t in earlier if t.kind == "search"]
        self._proof = [t for t in earlier if t.kind == "proof"]
        self._began, self._spent_earlier = began, sum(t.seconds for t in earlier)
        self._study: Study | None = None
        self._uncertain_told: set[tuple[str, str]] = set()
        self._trials = TrialRunner(
            folder,
            evaluator,
            self._slo,
            self._objective,
            prepared.schedule,
            prepared.options.seed,
            next_number=1 + max((t.number for t in earlier), default=-1),
            at_once=prepared.options.traffic.rate == math.inf,
        )

    def go(self) -> None:
        """Measure all that is not on disk yet."""
        self._offer_traffic()
        self._search()
        self._prove()
        self._listener.phase("done", None, None)

    def result(self) -> dict[str, Any] | None:
        """The result as far as the records go; None if not even the default was measured."""
        if not self._searched:
            return None
        configs = [self._searched[0].config, *(t.config for t in self._finalists())]
        # Without a proof the search's own trials are shown, and nothing counts as proven.
        trials = self._proof or [t for t in self._searched if t.config in configs]
        contenders = judge(
            self._folder,
            configs,
            trials,
            slo=self._slo,
            objective=self._objective,
            confidence=self._options.confidence,
            seed=self._options.seed,
        )
        if contenders[0].metrics is None and all(c.metrics is None for c in contenders):
            return None
        return result_json(
            contenders,
            self._objective,
            self._objective.unit(self._slo),
            self._study.importances() if self._study else {},
            [*self._prepared.notes, *self._quality_notes(contenders)],
            qualities(self._searched, self._slo),
        )

    def _quality_notes(self, contenders: Sequence[Contender]) -> list[str]:
        """What the measured values leave open of the limits on the quality."""
        measured = [(c.metrics or {}).get("quality") for c in contenders]
        return list(dict.fromkeys(n for q in measured for n in uncertain_limits(self._slo, q)))

    @property
    def proof_has_intervals(self) -> bool:
        """Whether every contender was measured in at least two rounds of the proof."""
        if not self._searched:
            return False
        contenders = [self._searched[0], *self._finalists()]
        return all(sum(t.config == c.config for t in self._proof) >= 2 for c in contenders)

    def _spent(self) -> float:
        """Seconds that the run took: this process whole, of earlier ones what they measured."""
        return self._spent_earlier + time.monotonic() - self._began

    def _trial_s(self) -> float:
        """What a trial takes on this machine; before one is known, what the schedule expects.

        The first trial, which loads everything, and failed ones are not typical.
        """
        typical = [t.seconds for t in (*self._searched[1:], *self._proof) if t.outcome == "ok"]
        return statistics.median(typical) if typical else self._prepared.schedule.trial_s

    def _seconds_left(self) -> float | None:
        budget = self._options.budget_s
        return None if budget is None else max(0.0, budget - self._spent())

    def _offer_traffic(self) -> None:
        """Find the rate if it is to be measured, and put the windows on disk."""
        if self._prepared.run.get("workload"):
            return
        saturated = None
        if self._options.traffic.rate_is_measured:
            if not self._calibration:
                self._listener.phase("calibration", self._seconds_left(), 1)
                offer_traffic(self._folder, self._prepared, saturated=None)
                number = self._trials.next_number
                self._listener.trial_started(number, "all requests at once", {})
                record = self._trials.run("calibration", "calibration", self._prepared.base)
                self._calibration.append(record)
                self._listener.trial_ended(record, None)
            saturated = self._calibration[-1]
        offer_traffic(self._folder, self._prepared, saturated=saturated, final=True)
        for note in self._prepared.notes:
            self._listener.note(note)

    def _search(self) -> None:
        space, base = self._prepared.space, self._prepared.base
        study = self._study = Study(
            self._folder.journal, space, self._objective, self._options.seed, self._searched, base
        )
        if self._proof:
            return
        schedule = self._prepared.schedule
        expected = self._options.trials
        if self._options.budget_s is not None:
            affordable = max(0, int(schedule.search_time_left(self._spent()) / schedule.trial_s))
            affordable += len(self._searched)
            expected = min(affordable, expected) if expected is not None else affordable
        assert expected is not None
        self._listener.phase("search", self._seconds_left(), expected)
        seeds = space.seeds(base)
        # One-at-a-time seeds show what each knob does alone; the sampler needs the other half.
        for source, point in seeds[: max(1, 1 + expected // 2)]:
            study.enqueue(source, point)
        num_seeds = min(len(seeds), max(1, 1 + expected // 2))
        for record in self._searched:  # of a resumed run: what was to be tried next
            self._enqueue_heirs(record)
        combined = len(self._searched) > num_seeds
        repeats = 0
        while self._may_go_on() and repeats < MAX_REPEATS and len(self._searched) < space.size:
            if not combined and len(self._searched) >= num_seeds:
                combined = True
                joined = combined_improvements(
                    self._searched[0], self._searched, space, self._objective
                )
                if joined is not None:
                    study.enqueue("combination of the seeds that helped", joined)
            # The default alone first: every claim is a gain over it, whatever happens later.
            wave = [study.ask() for _ in range(self._wave_size(num_seeds))]
            wave.sort(key=lambda s: self._reload_rank(s.point))
            for suggestion in wave:
                known = self._known(suggestion.point) or self._foreseen(suggestion.point)
                if known is not None:
                    repeats += 1
                    study.tell(suggestion, known)
                elif self._may_go_on():
                    repeats = 0
                    record = self._measure(suggestion.source, suggestion.point)
                    study.tell(suggestion, record)
                    self._enqueue_heirs(record)

    def _wave_size(self, num_seeds: int) -> int:
        """How many points to order together: none may push one out that was meant to come first."""
        measured = len(self._searched)
        if measured == 0:
            return 1
        most = self._options.trials
        left = WAVE if most is None else min(WAVE, most - measured)
        return min(left, num_seeds - measured) if measured < num_seeds else left

    def _may_go_on(self) -> bool:
        if not self._searched:
            return True
        if self._options.trials is not None and len(self._searched) >= self._options.trials:
            return False
        schedule = self._prepared.schedule
        trial_s = self._trial_s()
        return schedule.search_time_left(self._spent(), trial_s) >= trial_s

    def _reload_rank(self, point: Mapping[str, Any]) -> tuple[bool, str]:
        """Points with the weights that are loaded now come first, equal weights side by side."""
        weights = {n: v for n, v in point.items() if KNOBS[n].reload == "weights"}
        current = self._searched[-1].config if self._searched else {}
        return any(current.get(n) != v for n, v in weights.items()), str(sorted(weights.items()))

    def _known(self, point: Mapping[str, Any]) -> TrialRecord | None:
        for record in self._searched:
            if all(record.config[name] == value for name, value in point.items()):
                return record
        return None

    def _foreseen(self, point: Mapping[str, Any]) -> TrialRecord | None:
        """A trial that tells what this point would come to, as it quantizes in the same way.

        The quality does not depend on other knobs, and neither does what quantizing takes.
        """
        for record in self._searched:
            hopeless = record.outcome == "quality" or (
                record.outcome == "timeout" and METHODS[record.config["quantization"]].calibrated
            )
            if hopeless and all(
                record.config[n] == point.get(n, self._default[n]) for n in QUALITY_KNOBS
            ):
                return record
        return None

    def _enqueue_heirs(self, record: TrialRecord) -> None:
        """Where a method broke the guard, try those that are as fast and gentler."""
        method = record.config["quantization"]
        if record.outcome != "quality" or METHODS[method].calibrated:
            return
        space = self._prepared.space
        point = {name: record.config[name] for name in space.values}
        for heir in heirs(method, space.values.get("quantization", ())):
            candidate = {**point, "quantization": heir}
            if self._study is not None and not (
                self._known(candidate) or self._foreseen(candidate)
            ):
                self._study.enqueue(f"as fast as {method} and calibrated", candidate)

    def _quantize_limit(self) -> float | None:
        """Longest time that quantizing the weights for one trial may take."""
        budget = self._options.budget_s
        if budget is None:
            return None
        left = self._prepared.schedule.search_time_left(self._spent(), self._trial_s())
        return max(MIN_QUANTIZE_S, left * QUANTIZE_SHARE)

    def _measure(self, source: str, point: Mapping[str, Any]) -> TrialRecord:
        default = self._default
        changes = {n: c[1] for n, c in changed_knobs(default, {**default, **point}).items()}
        self._listener.trial_started(self._trials.next_number, source, changes)
        try:
            config = self._prepared.space.config_of(point, self._prepared.base)
        except ConfigError as error:
            record = self._trials.reject(source, {**default, **point}, str(error))
        else:
            # Every claim is a gain over the default, so that it is measured whatever its quality.
            record = self._trials.run(
                "search",
                source,
                config,
                guarded=bool(self._searched) and self._slo.needs_quality,
                quantize_limit=self._quantize_limit() if self._searched else None,
            )
        if not self._searched:
            self._keep_notes(self._trials.model_notes)
        self._searched.append(record)
        self._listener.trial_ended(record, self._best())
        self._tell_what_is_uncertain(record)
        return record

    def _keep_notes(self, notes: Sequence[str]) -> None:
        """Tell what of the checkpoint is served otherwise than stored; a resumed run knows too."""
        for text in notes:
            self._note(text)
        if notes:
            self._prepared.run["notes"] = self._prepared.notes
            self._folder.write_json(self._folder.run_json, self._prepared.run)

    def _tell_what_is_uncertain(self, record: TrialRecord) -> None:
        quality = record.quality
        told = self._uncertain_told
        for sentence in uncertain_limits(self._slo, quality):
            if quality is not None and (quality["variant"], sentence) not in told:
                told.add((quality["variant"], sentence))
                self._listener.note(f"{quality['variant']}: {sentence}")

    def _best(self) -> TrialRecord | None:
        return next(iter(ranked(self._searched, self._objective)), None)

    def _finalists(self) -> list[TrialRecord]:
        count = self._options.finalists
        return choose_finalists(self._searched, self._objective, count, self._slo)

    def _prove(self) -> None:
        contenders = [self._searched[0], *self._finalists()]
        rounds = self._options.rounds
        self._listener.phase("proof", self._seconds_left(), rounds * len(contenders))
        done = {(t.round, str(t.config)) for t in self._proof}
        for round_ in range(rounds):
            if not any(t.round == round_ for t in self._proof) and not self._pays_for_round(
                round_, len(contenders)
            ):
                self._note(f"the budget paid for {round_} of {rounds} rounds of the proof")
                break
            # Rotated, so that a machine that slows down or warms up favours none of them.
            turn = round_ % len(contenders)
            for contender in contenders[turn:] + contenders[:turn]:
                if (round_, str(contender.config)) in done:
                    continue
                config = EngineConfig.from_mapping(contender.config)
                changes = changed_knobs(self._prepared.base.to_dict(), contender.config)
                source = f"proof of trial {contender.number}"
                self._listener.trial_started(
                    self._trials.next_number, source, {n: c[1] for n, c in changes.items()}
                )
                window = self._prepared.proof_window(round_)
                record = self._trials.run("proof", source, config, window, round_)
                self._proof.append(record)
                self._listener.trial_ended(record, self._best())

    def _pays_for_round(self, round_: int, num_contenders: int) -> bool:
        # An interval needs two rounds, whatever they take.
        schedule = self._prepared.schedule
        return round_ < 2 or schedule.pays_for(num_contenders, self._spent(), self._trial_s())

    def _note(self, text: str) -> None:
        if text not in self._prepared.notes:
            self._prepared.notes.append(text)
            self._listener.note(text)
