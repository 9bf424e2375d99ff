"""The search trials: the default, and then what forecasts, advice or the sampler say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

from autotune.errors import Interrupted
from autotune.quality_guard import uncertain_limits
from autotune.records import TrialRecord
from autotune.search.advised import traced
from autotune.search.advised_space import advised_seeds
from autotune.search.explorer import MAX_REPEATS, Explorer
from autotune.search.forecast import Choice
from autotune.search.guide import Guide
from autotune.search.methods_offered import heirs
from autotune.search.prepare import Prepared
from autotune.search.study import Study, combined_improvements
from autotune.search.verdict import changed_knobs
from engine.config import KNOBS, EngineConfig
from engine.errors import ConfigError
from engine.quantize.method_table import METHODS

T = TypeVar("T")

# Of the trials after the default's, as many may follow advice; other seeds stop at half of all.
ADVISED_SHARE = 0.75
# How many points are asked for at once, to be measured in the order that reloads least often.
WAVE = 4
# Knobs that decide the quality; the model's dtype is the same for all trials.
QUALITY_KNOBS = ("quantization", "kv_cache_dtype")


class Exploration(Explorer[Prepared]):
    """Measures the bundled engine's configurations.

    The space may change between the default and the rest.
    """

    @cached_property
    def _default(self) -> dict[str, Any]:
        return self._prepared.base.to_dict()

    @cached_property
    def _uncertain_told(self) -> set[tuple[str, str]]:
        """Variants and sentences that were told, each once."""
        return set()

    def explore(self, advice: Sequence[Mapping[str, Any]], guide: Guide | None = None) -> None:
        """Measure points until the budget or the space ends: a guide's, or else the sampler's."""
        study = self._study()
        self._tell_phase()
        advised = advised_seeds(self._prepared.space, self._prepared.base, advice)
        if guide is not None:
            self._follow(study, guide, advised)
        else:
            self._sample(study, advised)

    def _sample(
        self, study: Study[EngineConfig], advised: Sequence[tuple[str, dict[str, Any]]]
    ) -> None:
        """Measure what is advised, the ends of each knob's values, and what the sampler asks for.

        One-at-a-time seeds show what each knob does alone; the sampler needs the other half.
        """
        space, expected = self._prepared.space, self._spending.expected_trials()
        seeds = space.seeds(self._prepared.base)
        known = [point for _, point in advised]
        extremes = [s for s in seeds[1:] if s[1] not in known]
        # What is advised has evidence for it, which the sampler has not yet.
        most = max(expected // 2, min(len(advised), int((expected - 1) * ADVISED_SHARE)))
        seeds = [seeds[0], *advised, *extremes][: 1 + max(0, most)]
        for source, point in seeds:
            study.enqueue(source, point)
        for record in self._searched:  # of a resumed run: what was to be tried next
            self._enqueue_heirs(record)
        combined = len(self._searched) > len(seeds)
        repeats = 0
        while (
            self._spending.pays_for_trial()
            and repeats < MAX_REPEATS
            and len(self._searched) < space.size
        ):
            if not combined and len(self._searched) >= len(seeds):
                combined = True
                joined = combined_improvements(
                    self._searched[0], self._searched, space, self._objective
                )
                if joined is not None:
                    study.enqueue("combination of the seeds that helped", joined)
            wave = [study.ask() for _ in range(self._wave_size(len(seeds)))]
            wave.sort(key=lambda s: self._reload_rank(s.point, self._searched[-1]))
            for suggestion in wave:
                record_known = self._known(suggestion.point) or self._foreseen(suggestion.point)
                if record_known is not None:
                    repeats += 1
                    study.tell(suggestion, record_known)
                elif self._spending.pays_for_trial():
                    repeats = 0
                    record = self._measure(suggestion.source, suggestion.point)
                    study.tell(suggestion, record)
                    self._enqueue_heirs(record)

    def _follow(
        self,
        study: Study[EngineConfig],
        guide: Guide,
        advised: Sequence[tuple[str, dict[str, Any]]],
    ) -> None:
        """Measure what forecasts promise, in waves; of each, one point follows the advice."""
        repeats = 0
        after, wave = self._interrupted_wave(guide, advised)
        while (
            self._spending.pays_for_trial()
            and repeats < MAX_REPEATS
            and len(self._searched) < self._prepared.space.size
        ):
            if not wave:
                after = len(self._searched)
                wave = self._wave(guide, advised, after)
            suggestions = [(c, study.take(c.source, c.point)) for c in wave]
            if not wave:  # nothing is left that can be forecast
                suggestion = study.ask()
                suggestions = [(Choice(suggestion.source, suggestion.point, None), suggestion)]
            wave = []
            for choice, suggestion in suggestions:
                known = self._known(choice.point) or self._foreseen(choice.point)
                if known is not None:
                    repeats += 1
                    study.tell(suggestion, known)
                elif self._spending.pays_for_trial():
                    repeats = 0
                    predicted = None
                    if choice.forecast is not None:
                        predicted = {**choice.forecast.to_json(), "after_trials": after}
                    record = self._measure(choice.source, choice.point, predicted)
                    study.tell(suggestion, record)

    def _wave(
        self, guide: Guide, advised: Sequence[tuple[str, dict[str, Any]]], after: int
    ) -> list[Choice]:
        """What to measure after so many trials; it follows from their records alone."""
        records = self._searched[:after]

        def excluded(point: Mapping[str, Any]) -> bool:
            return any(f(point, records) is not None for f in (self._known, self._foreseen))

        most = self._options.trials
        size = WAVE if most is None else min(WAVE, most - after)
        following = [(s, p) for s, p in advised if not excluded(p)][: 1 if size > 1 else 0]
        wave = [
            Choice(s, p, self._asked(partial(guide.forecast, records, p), None))
            for s, p in following
        ]
        taken = [c.point for c in wave]
        names = {str(sorted(p.items())): s for s, p in advised}
        left = size - len(wave)
        chosen: list[Choice] = self._asked(
            lambda: guide.choose(records, left, lambda p: p in taken or excluded(p)), []
        )
        for choice in chosen:
            source = names.get(str(sorted(choice.point.items())), choice.source)
            wave.append(dataclasses.replace(choice, source=source))
        return sorted(wave, key=lambda c: self._reload_rank(c.point, records[-1]))

    def _asked(self, ask: Callable[[], T], otherwise: T) -> T:
        """An answer of the guide; a fault in it must not cost what was measured."""
        try:
            return ask()
        except Interrupted:
            raise
        except Exception as error:
            self._note(f"a forecast is missing, a fault of ours ({traced(self._folder, error)})")
            return otherwise

    def _interrupted_wave(
        self, guide: Guide, advised: Sequence[tuple[str, dict[str, Any]]]
    ) -> tuple[int, list[Choice]]:
        """What an earlier process had chosen after so many trials and did not come to measure."""
        after = (self._searched[-1].predicted or {}).get("after_trials")
        if after is None:
            return 0, []
        wave = self._wave(guide, advised, after)
        return after, [c for c in wave if not self._known(c.point)]

    def predicted(
        self, guide: Guide | None, config: EngineConfig, window: int
    ) -> dict[str, Any] | None:
        """What another trial is expected to measure under a window; None if it cannot be told."""
        point = self._prepared.space.point_of(config)
        if guide is None or point is None:
            return None
        forecast = self._asked(lambda: guide.forecast(self._searched, point, window), None)
        after = {"after_trials": len(self._searched)}
        return None if forecast is None else {**forecast.to_json(), **after}

    def _wave_size(self, num_seeds: int) -> int:
        """How many points to order together: none may push one out that was meant to come first."""
        measured = len(self._searched)
        most = self._options.trials
        left = WAVE if most is None else min(WAVE, most - measured)
        return min(left, num_seeds - measured) if measured < num_seeds else left

    def _reload_rank(
        self, point: Mapping[str, Any], last: TrialRecord
    ) -> tuple[bool, str, bool, str]:
        """Points with the weights that `last` loaded come first, equal weights side by side.

        Of equal weights, those that draft as `last` did come first, as a draft is loaded too.
        """
        weights = {n: v for n, v in point.items() if KNOBS[n].reload == "weights"}
        current, method = last.config, str(point.get("speculative_method"))
        return (
            any(current.get(n) != v for n, v in weights.items()),
            str(sorted(weights.items())),
            method != str(current.get("speculative_method")),
            method,
        )

    def _foreseen(
        self, point: Mapping[str, Any], records: Sequence[TrialRecord] | None = None
    ) -> TrialRecord | None:
        """A trial that tells what this point would come to, as it quantizes in the same way.

        The quality does not depend on other knobs, and neither does what quantizing takes.
        """
        for record in self._searched if records is None else records:
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
            if not (self._known(candidate) or self._foreseen(candidate)):
                self._study().enqueue(f"as fast as {method} and calibrated", candidate)

    def _measure(
        self, source: str, point: Mapping[str, Any], predicted: Mapping[str, Any] | None = None
    ) -> TrialRecord:
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
                quantize_limit=self._spending.quantize_limit(),
                predicted=predicted,
            )
        if not self._searched:
            self._keep_notes(self._trials.model_notes)
        self._searched.append(record)
        self._listener.trial_ended(record, self.best())
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
