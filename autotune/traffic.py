"""From a workload file or preset to the requests of each measurement window."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autotune.errors import BadInput
from autotune.model_info import ModelInfo
from autotune.traffic_options import PRESET_CONTEXT, TrafficOptions
from autotune.workload.arrivals import spread_grid
from autotune.workload.describe import describe
from autotune.workload.materialise import LoadRequest, materialise, tokenise
from autotune.workload.presets import PRESETS, make_preset
from autotune.workload.read import read_workload
from autotune.workload.rows import Workload
from autotune.workload.transform import (
    clip_lengths,
    repeat_workload,
    scale_lengths,
    scale_rate,
    slice_workload,
)
from engine.config import EngineConfig
from engine.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

# Requests of a window whose load is offered all at once, if their number is not given.
BURST_REQUESTS = 256


class ModelLimits(Protocol):
    """What traffic must keep to; `autotune.model_info.ModelInfo` has it."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output."""
        ...


@dataclass(frozen=True, slots=True)
class Offered:
    """Requests by window, what `run.json` says of the traffic, and notes for the report."""

    windows: list[list[LoadRequest]]
    description: dict[str, Any]
    notes: list[str]


class Traffic:
    """A workload fitted to a model, from which windows of requests are cut.

    Args:
        options: what was asked for.
        model: whose limits the lengths must keep and whose vocabulary the prompts use.
        workload: rows of the file, lengths scaled; None for a preset, drawn when windows are made.
        length_factor: multiplies a preset's lengths.
        special_ids: token ids that synthesised prompts avoid.
        seed: of everything drawn.
        texts: the workload's prompts, where it has texts.
    """

    def __init__(
        self,
        options: TrafficOptions,
        model: ModelLimits,
        workload: Workload | None,
        length_factor: float,
        special_ids: frozenset[int],
        seed: int,
        texts: tuple[str, ...] = (),
    ) -> None:
        self.texts = texts
        self._options = options
        self._model = model
        self._workload = workload
        self._length_factor = length_factor
        self._special_ids = special_ids
        self._seed = seed

    def burst(self, most: int) -> list[LoadRequest]:
        """At most so many of the workload's first requests, all arriving at once."""
        if self._workload is None:
            workload = self._preset(most, rate=1.0, seed=self._seed)
        else:
            workload = slice_workload(self._workload, max_requests=most)
        requests = self._materialise(workload, self._seed)
        return [dataclasses.replace(request, arrival_s=0.0) for request in requests]

    def windows(self, rate: float | None, window_s: float, count: int) -> Offered:
        """Windows of `window_s` seconds at a mean of `rate` requests per second.

        A preset gives `count` windows drawn with different seeds; a file as many successive
        stretches as it holds, at least one (played again if it is shorter than one window). With
        an infinite rate each window's requests come at once. `rate` None keeps a file's own.

        Raises:
            BadInput: the file's rows have no arrival times and no rate is given, or its own times
                leave a window empty.
        """
        if self._workload is None:
            assert rate is not None
            workloads = self._preset_windows(rate, window_s, count)
        else:
            workloads = self._file_windows(self._workload, rate, window_s, count)
        workloads = [self._capped(workload) for workload in workloads]
        first = workloads[0]
        scaling = {
            "rate": "own" if rate is None else rate if math.isfinite(rate) else "inf",
            "lengths": self._length_factor,
            "slice": f"from {self._options.start_s:g} s, windows of {window_s:g} s",
        }
        notes = list(first.notes)
        if len(workloads) < count:
            notes.append(
                "the workload is too short for windows of their own in the proof: the winner was "
                "proved on traffic that the search had seen"
                if len(workloads) == 1
                else f"the proof has {len(workloads) - 1} windows of traffic for its rounds"
            )
        requests = [
            self._materialise(workload, self._seed + index)
            for index, workload in enumerate(workloads)
        ]
        description = describe(first, scaling)
        # The fitted rows of window 0 are described; the notes of all the fitting belong to it.
        return Offered(requests, description, notes)

    def _preset(self, num_requests: int, rate: float, seed: int) -> Workload:
        drawn = make_preset(
            self._options.source,
            num_requests,
            rate,
            burstiness=self._options.burstiness,
            seed=seed,
        )
        return clip_lengths(scale_lengths(drawn, self._length_factor), self._model.max_model_len)

    def _preset_windows(self, rate: float, window_s: float, count: int) -> list[Workload]:
        at_once = math.isinf(rate)
        most = self._options.requests or BURST_REQUESTS
        number = most if at_once else max(2, round(rate * window_s))
        return [
            _all_at_once(self._preset(number, 1.0, self._seed + index))
            if at_once
            else self._preset(number, rate, self._seed + index)
            for index in range(count)
        ]

    def _file_windows(
        self, workload: Workload, rate: float | None, window_s: float, count: int
    ) -> list[Workload]:
        if rate is not None and math.isinf(rate):
            most = self._options.requests or BURST_REQUESTS
            pieces = [workload.rows[i * most : (i + 1) * most] for i in range(count)]
            # A shorter last piece would be another load.
            kept = [piece for piece in pieces if len(piece) == most] or [workload.rows[:most]]
            return [_all_at_once(workload.with_rows(piece)) for piece in kept]
        if rate is None and not workload.timed:
            raise BadInput(
                f"{workload.source} has no arrival times: give --rate (requests per second, or "
                "inf), or --load to have the rate found by measurement"
            )
        if rate is not None:
            if len(workload.rows) == 1:
                # One arrival has no rate that could be scaled; several of the same request have.
                number = max(2, math.ceil(rate * window_s))
                workload = workload.with_rows(
                    workload.rows * number,
                    f"its only request was offered {number} times in a window",
                )
            workload = scale_rate(
                workload, rate, seed=self._seed, burstiness=self._options.burstiness
            )
        if workload.duration_s < window_s:
            workload = repeat_workload(workload, window_s)
        whole = max(1, min(count, int(workload.duration_s // window_s)))
        windows = []
        for index in range(whole):
            try:
                windows.append(
                    slice_workload(workload, start_s=index * window_s, duration_s=window_s)
                )
            except BadInput:
                # A quiet stretch of the trace; without it in front nothing could be measured.
                if index == 0:
                    raise
        return windows

    def _capped(self, workload: Workload) -> Workload:
        most = self._options.requests
        return workload if most is None else slice_workload(workload, max_requests=most)

    def _materialise(self, workload: Workload, seed: int) -> list[LoadRequest]:
        return materialise(workload, self._model.vocab_size, seed, special_ids=self._special_ids)


def load_traffic(
    options: TrafficOptions, model: ModelInfo, config: EngineConfig, seed: int
) -> Traffic:
    """Read the workload and fit it to the model: skip, tokenise, scale and clip its lengths.

    Raises:
        BadInput: no such file or preset, a bad row, or texts without a tokenizer to count them.
    """
    folder = config.tokenizer or config.model
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    return fit_traffic(options, model, tokenizer, _special_ids(tokenizer, model.vocab_size), seed)


def fit_traffic(
    options: TrafficOptions,
    model: ModelLimits,
    tokenizer: Tokenizer | None,
    special: frozenset[int],
    seed: int,
) -> Traffic:
    """As `load_traffic`, for a model of which no more is known; `special` ids are not drawn.

    Raises:
        BadInput: no such file or preset, a bad row, or texts without a tokenizer to count them.
    """
    if options.is_preset:
        factor = options.length_factor
        if factor is None:
            factor = min(1.0, model.max_model_len / PRESET_CONTEXT)
        return Traffic(options, model, None, factor, special, seed)
    if not Path(options.source).exists():
        raise BadInput(
            f"workload {options.source!r} is neither a file nor a preset; presets are "
            f"{', '.join(PRESETS)}"
        )
    workload = read_workload(options.source, options.format)
    if options.start_s:
        workload = slice_workload(workload, start_s=options.start_s)
    texts = tuple(row.prompt for row in workload.rows if row.prompt)
    if tokenizer is not None:
        workload = tokenise(workload, tokenizer)
    if not options.keep_grid:
        workload = spread_grid(workload, seed)
    factor = 1.0 if options.length_factor is None else options.length_factor
    workload = clip_lengths(scale_lengths(workload, factor), model.max_model_len)
    return Traffic(options, model, workload, factor, special, seed, texts)


def _all_at_once(workload: Workload) -> Workload:
    return workload.with_rows(
        (dataclasses.replace(row, arrival_s=0.0) for row in workload.rows),
        "all requests of a window were offered at once",
    )


def _special_ids(tokenizer: Tokenizer | None, vocab_size: int) -> frozenset[int]:
    if tokenizer is None:
        return frozenset()
    return frozenset(i for i in range(vocab_size) if tokenizer.is_special(i))
