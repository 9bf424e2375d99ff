"""The traffic of a plan: its lengths, and the share of it that one replica gets.

Only lengths and shared prefixes matter here, so neither a tokenizer nor a vocabulary is needed;
token ids stand for themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autotune.errors import BadInput
from autotune.traffic_options import PRESET_CONTEXT, TrafficOptions
from autotune.workload.arrivals import draw_arrivals, spread_grid
from autotune.workload.describe import describe, prefix_share
from autotune.workload.materialise import LoadRequest, materialise, tokenise
from autotune.workload.presets import PRESETS, make_preset
from autotune.workload.read import read_workload
from autotune.workload.rows import Workload, WorkloadRow
from autotune.workload.transform import clip_lengths, scale_lengths, scale_rate, slice_workload

Floats = npt.NDArray[np.float64]

# Rows of a preset that its lengths are told by, and the most of any traffic that the arithmetic
# looks at.
_PRESET_ROWS = 1024
SAMPLE_ROWS = 256
# Ids of synthesised tokens lie below this; only whether they are equal matters.
_VOCABULARY = 1 << 16
# Beyond so many parts, arrivals of a part are as even as they get.
_MOST_PARTS = 64
_MOST_SESSION_PARTS = 8
_PEAK_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class LengthSample:
    """Requests as likely as each other, by their tokens: `new` of the `inputs` are in no cache."""

    inputs: Floats
    new: Floats
    outputs: Floats

    @property
    def mean_context(self) -> float:
        """Cached tokens of a decoding sequence, as a mean over moments and sequences.

        A long answer decodes for longer and so is met more often: prompts and answers are weighed
        by the answer's length, of which half is there on the mean: E[(I + O/2) O] / E[O].
        """
        weights = np.maximum(self.outputs - 1, 1e-9)
        return float(np.average(self.inputs + self.outputs / 2, weights=weights))

    @property
    def mean_footprint(self) -> float:
        """The most tokens that a request of the mean moment has in the cache: all of them."""
        weights = np.maximum(self.outputs, 1)
        return float(np.average(self.inputs + self.outputs, weights=weights))

    def scaled(self, inputs: float, outputs: float, longest: int) -> LengthSample:
        """Lengths times factors, cut where a request would be longer than `longest` tokens."""
        answers = np.maximum(1.0, np.round(self.outputs * outputs))
        prompts = np.maximum(1.0, np.round(self.inputs * inputs))
        over = np.minimum(1.0, longest / (prompts + answers))
        ratio = self.new / self.inputs
        prompts = np.maximum(1.0, np.floor(prompts * over))
        answers = np.maximum(1.0, np.floor(answers * over))
        return LengthSample(prompts, np.maximum(1.0, prompts * ratio), answers)


class PlannedTraffic:
    """A workload at a rate, of which streams for one replica are cut.

    Args:
        workload: its rows; of a preset a sample.
        rate: mean requests per second of all replicas together.
        options: what was asked for.
        length_factor: multiplies a preset's lengths.
        max_model_len: most tokens of prompt and output together.
        sticky: whether the turns of a session go to one replica.
        seed: of everything drawn.
    """

    def __init__(
        self,
        workload: Workload,
        rate: float,
        options: TrafficOptions,
        length_factor: float,
        max_model_len: int,
        *,
        sticky: bool,
        seed: int,
    ) -> None:
        self.rate = rate
        self.workload = workload
        self.notes = list(workload.notes)
        self._options = options
        self._factor = length_factor
        self._max_model_len = max_model_len
        self._sticky = sticky
        self._seed = seed
        self._drawn: dict[tuple[int, int, int], list[LoadRequest]] = {}
        self.shares_prefixes = any(row.prefix_ids or row.token_ids for row in workload.rows)
        rows = _evenly(workload.rows, SAMPLE_ROWS)
        inputs = np.array([row.input_tokens for row in rows], dtype=np.float64)
        share = prefix_share(workload) if self.shares_prefixes else 0.0
        self.prefix_share = share
        self.sample = LengthSample(
            inputs,
            np.maximum(1.0, inputs * (1 - share)),
            np.array([row.output_tokens for row in rows], dtype=np.float64),
        )
        self.mean_output = float(np.mean([row.output_tokens for row in workload.rows]))
        self.mean_input = float(np.mean([row.input_tokens for row in workload.rows]))
        self.longest = max(row.input_tokens + row.output_tokens for row in workload.rows)

    @property
    def burstiness(self) -> float:
        """Squared coefficient of variation of the gaps between all arrivals; 1 for Poisson's."""
        if self._options.is_preset or not self.workload.timed:
            return 1.0 / self._options.burstiness
        gaps = np.diff([row.arrival_s for row in self.workload.rows])
        return float(np.var(gaps) / np.mean(gaps) ** 2) if len(gaps) > 1 else 1.0

    def peak_ratio(self) -> float | None:
        """The rate of a trace's busiest minute over its mean; None of a short or made-up one."""
        if self._options.is_preset or self.workload.duration_s < 5 * _PEAK_WINDOW_S:
            return None
        times = np.array([row.arrival_s for row in self.workload.rows])
        counts = np.bincount((times // _PEAK_WINDOW_S).astype(np.int64))
        mean = len(times) / self.workload.duration_s * _PEAK_WINDOW_S
        return float(counts.max() / mean)

    def cut(self, max_model_len: int) -> PlannedTraffic:
        """The same for a shorter longest sequence."""
        return PlannedTraffic(
            clip_lengths(self.workload, max_model_len),
            self.rate,
            self._options,
            self._factor,
            max_model_len,
            sticky=self._sticky,
            seed=self._seed,
        )

    def stream(self, rate: float, count: int, parts: int, draw: int) -> list[LoadRequest]:
        """`count` requests that reach one of `parts` replicas, at a mean of `rate` a second.

        Replicas are served in turn. For arrivals that are a renewal process with Gamma gaps, those
        of one replica then have gaps of `parts` times the shape; of a trace each gets every
        `parts`-th row. The same arguments give the same requests, and another rate moves only their
        times.
        """
        parts = max(1, min(parts, _MOST_PARTS))
        key = (count, parts, draw)
        if key not in self._drawn:
            self._drawn[key] = self._draw(count, parts, draw)
        return [
            LoadRequest(r.request_id, r.arrival_s / rate, r.token_ids, r.output_tokens)
            for r in self._drawn[key]
        ]

    def describe(self) -> dict[str, Any]:
        """As `run.json` describes a workload."""
        scaling = {"rate": self.rate, "lengths": self._factor, "slice": None}
        return describe(self.workload, scaling)

    def _draw(self, count: int, parts: int, draw: int) -> list[LoadRequest]:
        """Requests at one a second."""
        seed = self._seed + 1 + draw
        if self._options.is_preset:
            rows = self._preset_rows(count, parts, seed)
            shape = self._options.burstiness * parts
            times = draw_arrivals(count, 1.0, shape, np.random.default_rng((seed, count)))
            rows = [
                dataclasses.replace(row, arrival_s=float(time))
                for row, time in zip(rows, times, strict=True)
            ]
        else:
            rows = self._trace_rows(count, parts, draw)
        if not self.shares_prefixes:
            return [
                LoadRequest(str(i), row.arrival_s, (i + 1,) * row.input_tokens, row.output_tokens)
                for i, row in enumerate(rows)
            ]
        return materialise(self.workload.with_rows(rows), _VOCABULARY, self._seed)

    def _preset_rows(self, count: int, parts: int, seed: int) -> list[WorkloadRow]:
        split = PRESETS[self._options.source].turns > 1 and not self._sticky
        every = min(parts, _MOST_SESSION_PARTS) if split else 1
        drawn = make_preset(self._options.source, count * every, 1.0, seed=seed)
        kept = drawn.with_rows(drawn.rows[::every])
        return list(clip_lengths(scale_lengths(kept, self._factor), self._max_model_len).rows)

    def _trace_rows(self, count: int, parts: int, draw: int) -> list[WorkloadRow]:
        """Every `parts`-th row from a place that differs by draw, played again where it ends."""
        rows = self.workload.rows
        first = (draw * count * parts + draw) % len(rows)
        shared = max((abs(i) for row in rows for i in row.prefix_ids or ()), default=0) + 1
        period = self.workload.duration_s + 1 / self.rate
        taken = []
        for index in range(first, first + count * parts, parts):
            turn, place = divmod(index, len(rows))
            row = rows[place]
            ids = row.prefix_ids
            taken.append(
                dataclasses.replace(
                    row,
                    arrival_s=row.arrival_s + turn * period,
                    prefix_ids=tuple(i + 2 * turn * shared for i in ids) if ids else ids,
                )
            )
        begin, end = taken[0].arrival_s, taken[-1].arrival_s
        scale = (count - 1) / (end - begin) if end > begin else 0.0
        return [
            dataclasses.replace(row, arrival_s=(row.arrival_s - begin) * scale) for row in taken
        ]


def plan_traffic(
    options: TrafficOptions, model: Path, model_limit: int, *, sticky: bool, seed: int
) -> PlannedTraffic:
    """Read the workload and fit its lengths to the model's longest sequence, `model_limit` tokens.

    Raises:
        BadInput: no such file or preset, a bad row, or a trace without a rate.
    """
    if options.is_preset:
        assert options.rate is not None
        factor = options.length_factor
        if factor is None:
            factor = min(1.0, model_limit / PRESET_CONTEXT)
        drawn = make_preset(
            options.source,
            _PRESET_ROWS,
            options.rate,
            burstiness=options.burstiness,
            seed=seed,
        )
        workload = clip_lengths(scale_lengths(drawn, factor), model_limit)
        rate = options.rate
    else:
        workload = _read(options, model, seed)
        factor = 1.0 if options.length_factor is None else options.length_factor
        workload = clip_lengths(scale_lengths(workload, factor), model_limit)
        rate = _rate(workload)
    if not 0 < rate < math.inf:
        raise BadInput(f"the workload's rate is {rate:g}; it must be above 0 requests per second")
    return PlannedTraffic(workload, rate, options, factor, model_limit, sticky=sticky, seed=seed)


def _read(options: TrafficOptions, model: Path, seed: int) -> Workload:
    if not Path(options.source).exists():
        raise BadInput(
            f"workload {options.source!r} is neither a file nor a preset; presets are "
            f"{', '.join(PRESETS)}"
        )
    workload = _without_texts(read_workload(options.source, options.format), model)
    if options.start_s or options.duration_s is not None or options.requests is not None:
        workload = slice_workload(
            workload,
            start_s=options.start_s,
            duration_s=options.duration_s,
            max_requests=options.requests,
        )
    if not options.keep_grid:
        workload = spread_grid(workload, seed)
    if options.rate is None:
        if not workload.timed:
            raise BadInput(
                f"{workload.source} has no arrival times, so that its rate is not known: give "
                "--rate in requests per second"
            )
        return workload
    if len(workload.rows) == 1:
        workload = workload.with_rows(workload.rows * 2, "its only request is offered repeatedly")
    return scale_rate(workload, options.rate, seed=seed, burstiness=options.burstiness)


def _rate(workload: Workload) -> float:
    return workload.rate or 0.0


def _without_texts(workload: Workload, model: Path) -> Workload:
    """Texts as token ids where the model folder has a tokenizer, else as estimated lengths."""
    texts = sum(row.prompt is not None for row in workload.rows)
    if not texts:
        return workload
    folder = model if model.is_dir() else model.parent
    from engine.tokenizer import has_tokenizer, load_tokenizer

    if has_tokenizer(folder):
        return tokenise(workload, load_tokenizer(folder))
    return workload.with_rows(
        (dataclasses.replace(row, prompt=None, completion=None) for row in workload.rows),
        f"beside the config there is no tokenizer: the lengths of {texts} texts are estimates, and "
        "prompts count as sharing nothing",
    )


def _evenly(rows: Sequence[WorkloadRow], most: int) -> list[WorkloadRow]:
    if len(rows) <= most:
        return list(rows)
    return [rows[i * len(rows) // most] for i in range(most)]
