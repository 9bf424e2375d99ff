"""Runs one trial of any kind and puts its record on disk."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from autotune.quality_guard import guard_reason
from autotune.records import LimitResult, RunFolder, TrialKind, TrialOutcome, TrialRecord, utc_now
from autotune.search.capacity import find_capacity
from autotune.search.configuration import Configuration
from autotune.search.evaluator import TrialEvaluator
from autotune.search.messages import (
    Answer,
    BrokeGuard,
    CutShort,
    Failed,
    MeasureCommand,
    Measured,
)
from autotune.search.objective import Objective
from autotune.search.schedule import Schedule
from autotune.slo import Slo


class TrialRunner:
    """Measures configs and appends a `TrialRecord` for each.

    Args:
        folder: where the records go.
        evaluator: measures.
        slo: what is promised.
        objective: what is compared.
        schedule: length and number of the loads of a trial.
        seed: of the bootstrap.
        next_number: number of the next trial.
        at_once: whether all requests of a window arrive at once.
        clock: tells the seconds that trials take.
    """

    def __init__(
        self,
        folder: RunFolder,
        evaluator: TrialEvaluator,
        slo: Slo,
        objective: Objective,
        schedule: Schedule,
        seed: int,
        next_number: int,
        at_once: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._folder = folder
        self._evaluator = evaluator
        self._slo = slo
        self._objective = objective
        self._schedule = schedule
        self._seed = seed
        self._at_once = at_once
        self.next_number = next_number
        # What the model loaded last says of how it is served.
        self.model_notes: list[str] = []
        self._guarded = False
        self._quantize_limit: float | None = None
        # Where the next capacity search begins: near the last answer the bracket is found fastest.
        self._capacity_start = 1.0

    def run(
        self,
        kind: TrialKind,
        source: str,
        config: Configuration,
        window: int = 0,
        round_: int = 0,
        *,
        guarded: bool = False,
        quantize_limit: float | None = None,
        predicted: Mapping[str, Any] | None = None,
    ) -> TrialRecord:
        """Measure `config` under a window of the workload; failures are records too.

        `guarded` and `quantize_limit` are those of `MeasureCommand`; `predicted` is what the trial
        was expected to measure.

        Raises:
            autotune.errors.Interrupted: the search was stopped; nothing is recorded.
        """
        number = self.next_number
        began, started_at = self._clock(), utc_now()
        self._guarded, self._quantize_limit = guarded, quantize_limit
        reply: Answer
        if kind != "calibration" and self._objective.name == "capacity":
            reply = self._capacity(number, config, window)
        else:
            factor = None if kind == "calibration" else 1.0
            reply = self._measure(number, config, window, factor)
        record = self._record(number, kind, source, config, reply, round_, started_at, began)
        if predicted is not None:
            record = dataclasses.replace(record, predicted=dict(predicted))
        self._folder.append_trial(record)
        self.next_number += 1
        return record

    def reject(self, source: str, config: Mapping[str, Any], reason: str) -> TrialRecord:
        """Record a point that no engine can be configured as, without measuring."""
        record = TrialRecord(
            number=self.next_number,
            kind="search",
            source=source,
            config=dict(config),
            outcome="rejected",
            seconds=0.0,
            started_at=utc_now(),
            reason=reason,
            seed=self._seed,
        )
        self._folder.append_trial(record)
        self.next_number += 1
        return record

    def _measure(
        self, number: int, config: Configuration, window: int, factor: float | None
    ) -> Answer:
        # What arrives at once is worked off after its last arrival, so that is the measurement.
        drain_limit = (
            self._schedule.calibration_s
            if factor is None
            else self._schedule.drain_limit + (self._schedule.window_s if self._at_once else 0.0)
        )
        command = MeasureCommand(
            trial=number,
            config=config.to_dict(),
            window=window,
            rate_factor=factor,
            drain_limit=drain_limit,
            seed=self._seed,
            slo=str(self._slo),
            guarded=self._guarded,
            quantize_limit=self._quantize_limit,
        )
        load = self._schedule.window_s / (factor or 1.0)
        answer = self._evaluator.measure(command, load + drain_limit)
        self.model_notes = answer.notes if isinstance(answer, Measured) else []
        return answer

    def _capacity(self, number: int, config: Configuration, window: int) -> Answer:
        found = find_capacity(
            lambda factor: self._measure(number, config, window, factor),
            self._slo,
            self._capacity_start,
            self._schedule.probes,
            keep=lambda: self._folder.set_part_aside(number),
        )
        if isinstance(found, (BrokeGuard, CutShort, Failed)):
            return found
        # The records of the last load lie on disk; the metrics are those of the best one.
        self._folder.take_part_back(number)
        rate = found.metrics["offered_rate"] if found.factor else 0.0
        if rate is None:
            return Failed("rejected", "a window with a single request has no rate: lengthen it")
        if found.factor:
            self._capacity_start = found.factor
        return Measured({**found.metrics, "capacity_requests_per_s": rate})

    def _record(
        self,
        number: int,
        kind: TrialKind,
        source: str,
        config: Configuration,
        reply: Answer,
        round_: int,
        started_at: str,
        began: float,
    ) -> TrialRecord:
        metrics = reply.metrics if isinstance(reply, (Measured, CutShort)) else None
        quality = _quality(reply)
        limits: list[LimitResult] = []
        if metrics is not None:
            limits = self._slo.evaluate(metrics)
        elif isinstance(reply, BrokeGuard):
            limits = self._slo.guard.evaluate(quality or {})
        objective = None
        if isinstance(reply, Measured) and kind != "calibration":
            objective = self._objective.value(reply.metrics, self._slo)
        return TrialRecord(
            number=number,
            kind=kind,
            source=source,
            config=config.to_dict(),
            outcome=_outcome(reply),
            seconds=self._clock() - began,
            started_at=started_at,
            reason=self._reason(reply),
            rate=None if metrics is None else metrics["offered_rate"],
            seed=self._seed,
            round=round_,
            metrics=metrics,
            slo=limits,
            slo_met=isinstance(reply, Measured) and all(r.met for r in limits),
            objective=objective,
            quality=quality,
        )

    def _reason(self, reply: Answer) -> str | None:
        if isinstance(reply, BrokeGuard):
            return guard_reason(self._slo, reply.quality)
        return reply.reason if isinstance(reply, (CutShort, Failed)) else None


def _outcome(reply: Answer) -> TrialOutcome:
    if isinstance(reply, BrokeGuard):
        return "quality"
    if isinstance(reply, CutShort):
        return "cut_short"
    return reply.kind if isinstance(reply, Failed) else "ok"


def _quality(reply: Answer) -> dict[str, Any] | None:
    if isinstance(reply, Measured):
        return reply.metrics.get("quality")
    return reply.quality if isinstance(reply, BrokeGuard) else None
