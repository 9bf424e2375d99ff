"""What a measurement means: every metric's formula, once, with its interval.

Names differ between tools; the formulas are what to compare. Ours and theirs:

| here | vllm bench serve | guidellm | AIPerf |
|---|---|---|---|
| `ttft`, from the *intended* send | `ttft`, from the send | `time_to_first_token` | the same |
| `tpot` = (e2e - ttft) / (n - 1) | `tpot` | `inter_token_latency` | `inter_token_latency` |
| `itl`, each gap between chunks, pooled | `itl` | - | `inter_chunk_latency` |
| `e2e`, from the intended send | `e2el`, from the send | `request_latency` | `request_latency` |
| `goodput_requests_per_s` | `request_goodput` | - | `goodput` |

guidellm's `time_per_output_token` is something else: it includes the time to the first token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from autotune.confidence import CONFIDENCE, wilson_interval
from autotune.records import RequestRecord
from autotune.slo import Slo, statistic_of
from autotune.slo_grammar import LATENCIES
from autotune.speculation_counts import speculation_metrics
from autotune.workload.rows import mean_rate
from engine.config import EngineConfig
from engine.step_record import StepRecord

STATISTICS = ("mean", "p50", "p90", "p95", "p99")
RESAMPLES = 1000
# Values of the resamples that are laid out at once.
_TOGETHER = 1 << 17
_MIN_RESAMPLES = 200
# Beyond this many values drawn in all, fewer resamples are taken.
_BOOTSTRAP_WORK = 400_000_000

Floats = npt.NDArray[np.float64]


def compute_metrics(
    records: Sequence[RequestRecord],
    slo: Slo | None,
    *,
    duration: float | None = None,
    config: EngineConfig | Mapping[str, Any],
    load_delivered: bool,
    load_note: str | None,
    steps: Sequence[StepRecord] = (),
    seed: int = 0,
    resamples: int = RESAMPLES,
    engine: Mapping[str, Any] | None = None,
    speculation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The metrics of one measurement, keyed as in `bench --json`; None where undefined.

    Latency statistics are over finished requests, as other tools report them. What the SLO is
    held against stands in `slo_statistics`: the same statistics with every request that did not
    finish counted as infinitely late (None there means infinite or unmeasured). Statistics that
    the SLO names join the usual ones.

    Args:
        records: one a request; times in seconds since the load began.
        slo: decides goodput; without one goodput and attainment are None.
        duration: seconds that rates are divided by; by default until the last token.
        config: what was measured; of a server what is known of it.
        load_delivered: whether the generator sent what it was asked to send, when asked.
        load_note: what to say about that.
        steps: the engine's own records of the same time.
        seed: of the bootstrap.
        resamples: of the bootstrap; 0 gives the latencies no intervals.
        engine: what the steps come to, where they were added up and not kept.
        speculation: what they say of it, where it is known in another way.
    """
    finished = [record for record in records if record.completed]
    if duration is None:
        duration = _last_event(records)
    count = {
        outcome: sum(record.outcome == outcome for record in records)
        for outcome in ("failed", "refused", "timed_out")
    }
    output_tokens = sum(record.output_tokens for record in finished)
    within = None if slo is None else [record for record in records if slo.request_meets(record)]
    good = None if within is None else len(within)
    low, high = wilson_interval(good, len(records)) if good is not None else (None, None)
    statistics = _statistics(slo)
    metrics: dict[str, Any] = {
        metric: _latency(metric, finished, statistics[metric], (seed, index), resamples)
        for index, metric in enumerate(LATENCIES)
    }
    metrics |= {
        "output_tokens_per_s": _per_second(output_tokens, duration),
        "requests_per_s": _per_second(len(finished), duration),
        "goodput_requests_per_s": None if good is None else _per_second(good, duration),
        "goodput_tokens_per_s": None
        if within is None
        else _per_second(sum(record.output_tokens for record in within), duration),
        "slo_attainment": good / len(records) if good is not None and records else None,
        "completed": len(finished),
        **count,
        "duration_s": duration,
        "offered_rate": mean_rate([record.intended_send for record in records]),
        "error_rate": sum(count.values()) / len(records) if records else None,
        "load_delivered": load_delivered,
        "load_note": load_note,
        "config": config.to_dict() if isinstance(config, EngineConfig) else dict(config),
        "engine": _engine(steps) if engine is None else dict(engine),
        "speculation": speculation_metrics(steps, config)
        if speculation is None and isinstance(config, EngineConfig)
        else speculation,
        "slo_statistics": _slo_statistics(records, slo),
        "intervals": {
            "slo_attainment": None if low is None else [low, high],
            "goodput_requests_per_s": None
            if low is None or high is None or not duration
            else [bound * len(records) / duration for bound in (low, high)],
        },
    }
    return metrics


def latencies(metric: str, records: Sequence[RequestRecord]) -> tuple[Floats, npt.NDArray[Any]]:
    """All values of a latency in seconds, and for each the index of its request in `records`.

    TTFT, TPOT and E2E have at most one value a request; ITL has one for each gap in its stream,
    pooled over requests. Tokens that arrive together, as drafted ones do, are one chunk, and gaps
    are between chunks, as in vLLM: gaps of 0 would hide how long a reader waits.
    """
    if metric == "itl":
        gaps = [np.diff(np.unique(np.asarray(r.token_times, dtype=np.float64))) for r in records]
        owners = np.repeat(np.arange(len(records)), [len(g) for g in gaps])
        return (np.concatenate(gaps) if gaps else np.empty(0)), owners
    pairs = [
        (value, index)
        for index, record in enumerate(records)
        if (value := getattr(record, metric)) is not None
    ]
    values = np.array([value for value, _ in pairs], dtype=np.float64)
    return values, np.array([index for _, index in pairs], dtype=np.int64)


def bootstrap_intervals(
    values: Floats,
    owners: npt.NDArray[Any],
    statistics: Sequence[str],
    seed: int | Sequence[int],
    resamples: int = RESAMPLES,
) -> dict[str, list[float] | None]:
    """95% intervals of statistics by the percentile bootstrap (Efron 1979), seeded.

    Requests are drawn with replacement, and with each all of its values: gaps of one request
    depend on each other, so that drawing gaps alone would make ITL look more certain than it is.
    None with fewer than two requests, or without resamples.
    """
    _, owners = np.unique(owners, return_inverse=True)
    requests = int(owners.max()) + 1 if owners.size else 0
    if requests < 2 or not resamples:
        return dict.fromkeys(statistics)
    order = np.argsort(values, kind="stable")
    values, owners = values[order], owners[order]
    resamples = max(min(_MIN_RESAMPLES, resamples), min(resamples, _BOOTSTRAP_WORK // values.size))
    quantiles = np.array([float(name[1:]) / 100 for name in statistics if name != "mean"])
    rng = np.random.default_rng(seed)
    together = max(1, _TOGETHER // max(values.size, requests))
    drawn = np.concatenate(
        [
            _resampled(rng, min(together, resamples - done), requests, values, owners, quantiles)
            for done in range(0, resamples, together)
        ]
    )
    tails = [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2]
    bounds = np.percentile(drawn, tails, axis=0)
    column = {"mean": 0}
    column |= {
        name: index for index, name in enumerate((n for n in statistics if n != "mean"), start=1)
    }
    return {name: [float(bound) for bound in bounds[:, column[name]]] for name in statistics}


def _resampled(
    rng: np.random.Generator,
    count: int,
    requests: int,
    values: Floats,
    owners: npt.NDArray[Any],
    quantiles: Floats,
) -> Floats:
    """Mean and quantiles of `count` resamples, a row each, of sorted values."""
    rows = np.arange(count)[:, None]
    picks = rng.integers(requests, size=(count, requests))
    times = np.bincount((picks + rows * requests).ravel(), minlength=count * requests)
    times = times.reshape(count, requests)
    sums = np.bincount(owners, weights=values, minlength=requests)
    # Each value stands in a resample as often as its request; the sorted resamples themselves are
    # never laid out.
    ends = np.cumsum(np.take(times, owners, axis=1), axis=1)
    sizes = ends[:, -1:].copy()
    rank = (sizes - 1) * quantiles
    low = np.floor(rank).astype(np.int64)
    # The rows one behind the other ascend as one, so that one search finds places in all.
    apart = rows * (int(sizes.max()) + 1)
    ends += apart
    ascending = ends.ravel()

    def at(places: npt.NDArray[np.int64]) -> Floats:
        found = np.searchsorted(ascending, places + apart, side="right")
        chosen: Floats = values[found - rows * values.size]
        return chosen

    below = at(low)
    above = at(np.minimum(low + 1, sizes - 1))
    means = (times @ sums)[:, None] / sizes
    return np.concatenate([means, below + (above - below) * (rank - low)], axis=1)


def _statistics(slo: Slo | None) -> dict[str, tuple[str, ...]]:
    """Which statistics each latency gets: the usual, and what the SLO names."""
    named = [(limit.metric, limit.statistic) for limit in slo.limits] if slo else []
    return {
        metric: (
            *STATISTICS,
            *(s for m, s in named if m == metric and s is not None and s not in STATISTICS),
        )
        for metric in LATENCIES
    }


def _latency(
    metric: str,
    finished: Sequence[RequestRecord],
    statistics: Sequence[str],
    seed: Sequence[int],
    resamples: int,
) -> dict[str, Any]:
    values, owners = latencies(metric, finished)
    result: dict[str, Any] = {name: statistic_of(values, name) for name in statistics}
    result["intervals"] = bootstrap_intervals(values, owners, statistics, seed, resamples)
    return result


def _slo_statistics(records: Sequence[RequestRecord], slo: Slo | None) -> dict[str, float | None]:
    """The statistics that the SLO limits, with unfinished requests infinitely late.

    An unfinished request counts as one infinite TTFT, TPOT and E2E, and as the infinite gaps that
    the answer it was asked for would have had.
    """
    result: dict[str, float | None] = {}
    finished = [record for record in records if record.completed]
    missed = [record for record in records if not record.completed]
    for limit in slo.limits if slo else ():
        if limit.statistic is None:
            continue
        values, _ = latencies(limit.metric, finished)
        late = len(missed)
        if limit.metric == "itl":
            late = sum(max(1, record.asked_output_tokens - 1) for record in missed)
        value = statistic_of(np.append(values, np.full(late, np.inf)), limit.statistic)
        finite = value is not None and math.isfinite(value)
        result[f"{limit.statistic}({limit.metric})"] = value if finite else None
    return result


def _engine(steps: Sequence[StepRecord]) -> dict[str, Any]:
    """What the engine's steps say: `mean_batch` in sequences, shares of the steps' time."""
    total = sum(step.seconds for step in steps)
    hits = sum(step.prefix_hit_tokens for step in steps)
    prompts = hits + sum(step.prefill_tokens for step in steps)
    sequences = sum(step.prefill_sequences + step.decode_sequences for step in steps)
    return {
        "steps": len(steps),
        "preemptions": sum(step.preemptions for step in steps),
        # Tokens found in the cache over tokens that would have been computed without it.
        "prefix_hit_rate": hits / prompts if prompts else None,
        "kv_blocks_total": steps[-1].blocks_total if steps else None,
        "kv_peak_usage": max(
            (step.blocks_used / step.blocks_total for step in steps if step.blocks_total),
            default=None,
        ),
        "mean_batch": sequences / len(steps) if steps else None,
        "host_share": sum(step.host_seconds for step in steps) / total if total > 0 else None,
        "device_share": sum(step.device_seconds for step in steps) / total if total > 0 else None,
    }


def _last_event(records: Sequence[RequestRecord]) -> float:
    """Seconds from the load's beginning to the last token, or the last send."""
    return max((max(record.token_times, default=record.send) for record in records), default=0.0)


def _per_second(amount: float, duration: float | None) -> float | None:
    return amount / duration if duration else None
