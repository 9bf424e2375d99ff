"""Waiting: how much, why, and whether the server keeps up with what arrives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit  # of scipy.stats the import takes a second

from autotune.predict.step_cost import StepWork
from autotune.profiling.counted_cost import CostOfSteps
from autotune.profiling.enough import LEAST_REQUESTS, LEAST_STEPS, NOT_TOLD, lacking
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.kv_cache import seats
from autotune.profiling.schema import Queueing
from autotune.profiling.step_columns import Floats, StepColumns
from autotune.profiling.traffic import spread
from autotune.records import RequestRecord
from engine.config import EngineConfig

# The first part of a load fills an empty engine, which is no trend.
_FILLING = 0.2
_BATCHES = 10
_SAMPLES_A_BATCH = 20
_CONFIDENCE = 0.95
# Growth of fewer of the arrivals than this would be 1 too many in 20, and is taken for none.
_NEGLIGIBLE = 0.05
# Below it what grows is the number of long answers under way, not a queue.
_CLEARLY_SUSTAINED = 0.8
_JUST_SUSTAINED = 0.99
_SAMPLED_STEPS = 2000


class Growth(NamedTuple):
    """The trend of requests in the system, requests/s, with the bounds of its 90% interval."""

    per_s: float
    low: float
    high: float


def queueing(
    evidence: LoadEvidence, steps: StepColumns, config: EngineConfig, cost: CostOfSteps | None
) -> tuple[Queueing, list[str]]:
    """The queue of a load, and what could not be told of it."""
    requests = evidence.requests
    if not len(steps) or not requests:
        return Queueing(), []
    partial: list[str] = []
    first, last = requests[0].intended_send, max(r.intended_send for r in requests)
    span = last - first
    rate = (len(requests) - 1) / span if span > 0 else None
    waited = [
        (r.first_scheduled - r.intended_send, r.ttft)
        for r in requests
        if r.first_scheduled is not None
    ]
    wait = wait_share = None
    if len(waited) >= LEAST_REQUESTS:
        wait = spread([w for w, _ in waited])
        answered = [(w, t) for w, t in waited if t is not None]
        total = sum(t for _, t in answered)
        wait_share = sum(w for w, _ in answered) / total if total > 0 else None
    elif any(r.first_scheduled is not None for r in requests):
        partial.append(lacking("the wait for a seat", "requests", LEAST_REQUESTS, len(waited)))
    else:
        partial.append(f"the wait for a seat is unknown: {NOT_TOLD}")
    growth = stable = utilisation = busy = None
    if rate is None:
        partial.append(
            "utilisation and stability have no meaning: all requests were offered at once"
        )
    elif len(requests) < LEAST_REQUESTS:
        partial.append(lacking("a verdict on the queue", "requests", LEAST_REQUESTS, len(requests)))
    else:
        busy = _busy_share(steps, first, last)
        growth = growth_of(requests, first, last)
        work = None if cost is None else service_seconds(requests, steps, config, cost)
        offered = None if work is None else rate * work * _slowness(evidence, cost)
        stable = _is_stable(growth, rate, offered, steps, first, last)
        utilisation = _utilisation(offered, stable, requests, rate, first)
    waiting = steps.queue > 0
    continuous = config.batching_mode == "continuous"
    full = steps.running >= config.max_num_seqs
    spent = steps.rows >= config.max_num_batched_tokens
    return (
        Queueing(
            busy_share=busy,
            utilisation=utilisation,
            wait=wait,
            wait_share=wait_share,
            queue_mean=_over_wall(steps, steps.queue),
            queue_max=int(steps.queue.max()),
            running_mean=_over_wall(steps, steps.running),
            running_max=int(steps.running.max()),
            at_seat_limit_share=steps.share_of_time(waiting & full),
            at_token_budget_share=steps.share_of_time(waiting & spent & ~full),
            barrier_share=0.0 if continuous else steps.share_of_time(waiting & ~full),
            growth_per_s=None if growth is None else growth.per_s,
            stable=stable,
        ),
        partial,
    )


def growth_of(requests: Sequence[RequestRecord], first: float, last: float) -> Growth | None:
    """The trend of requests that have come and not left, between the first and last arrival.

    A line through the means of stretches of equal length, which are nearly independent where they
    are longer than a request's stay (batch means, as for simulations: Law and Kelton). Refused
    requests were never in. None without any time.
    """
    begin = first + _FILLING * (last - first)
    if last <= begin:
        return None
    served = [r for r in requests if r.outcome != "refused"]
    arrived = np.sort([r.intended_send for r in served])
    left = np.sort([r.token_times[-1] for r in served if r.completed])
    count = _BATCHES * _SAMPLES_A_BATCH
    at = begin + (np.arange(count) + 0.5) * (last - begin) / count
    inside = np.searchsorted(arrived, at, side="right") - np.searchsorted(left, at, side="right")
    means = inside.reshape(_BATCHES, _SAMPLES_A_BATCH).mean(axis=1)
    times = at.reshape(_BATCHES, -1).mean(axis=1)
    times, means = times - times.mean(), means - means.mean()
    squares = float(times @ times)
    slope = float(times @ means) / squares
    # Least squares: the slope's variance is that of what is left over that of the times.
    left_over = means - slope * times
    error = math.sqrt(float(left_over @ left_over) / (_BATCHES - 2) / squares)
    margin = error * float(stdtrit(_BATCHES - 2, _CONFIDENCE))
    return Growth(slope, slope - margin, slope + margin)


def service_seconds(
    requests: Sequence[RequestRecord],
    steps: StepColumns,
    config: EngineConfig,
    cost: CostOfSteps,
) -> float | None:
    """Seconds of the engine that a mean request takes when every seat is taken.

    Its prompt in steps full of prompts, and its part of as many decode steps as its answer has
    further tokens, or of fewer where drafts were accepted. The reciprocal is the rate that the
    engine sustains, whatever the latency. None without an answer.
    """
    served = [r for r in requests if r.output_tokens]
    if not served:
        return None
    new = np.array([r.input_tokens - r.cached_tokens for r in served], dtype=np.float64)
    known = np.array([r.cached_tokens for r in served], dtype=np.float64)
    outputs = np.array([r.output_tokens for r in served], dtype=np.float64)
    prompts = max(1.0, config.max_num_batched_tokens / max(1.0, float(new.mean())))
    prompts = min(prompts, float(config.max_num_seqs))
    prefill = StepWork(
        rows=prompts * float(new.mean()),
        prefill_sequences=max(1, round(prompts)),
        decode_sequences=0,
        sampled=prompts,
        decode_kv_tokens=0.0,
        prefill_kv_tokens=prompts * float((new + known).mean()),
        prefill_pairs=prompts * float((new * known + new * (new + 1) / 2).mean()),
    )
    held = seats(requests, int(steps.blocks_total[-1]), config.block_size)
    batch = float(min(config.max_num_seqs, config.max_num_batched_tokens))
    batch = max(1.0, batch if held is None else min(batch, held))
    inputs = new + known
    context = float((inputs * outputs + outputs**2 / 2).sum() / outputs.sum())
    decode = StepWork(
        rows=batch,
        prefill_sequences=0,
        decode_sequences=max(1, round(batch)),
        sampled=batch,
        decode_kv_tokens=batch * context,
        prefill_kv_tokens=0.0,
        prefill_pairs=0.0,
    )
    drafts = _drafts_when_full(steps, batch)
    decoding = _seconds(cost, decode.verifying(1 + drafts.drafted)) + drafts.seconds * batch
    further = float((outputs - 1).mean()) / (1 + drafts.accepted)
    return _seconds(cost, prefill) / prompts + further * decoding / batch


class _Drafts(NamedTuple):
    """Of a decode on the mean: tokens drafted and accepted, and the seconds of drafting."""

    drafted: float
    accepted: float
    seconds: float


def _drafts_when_full(steps: StepColumns, batch: float) -> _Drafts:
    """What was drafted while about as many decoded as can; of too few such steps, in all of them.

    An engine that is full may draft less than one that is not.
    """
    full = steps.decodes >= batch / 2
    if int(full.sum()) < LEAST_STEPS:
        full = steps.decodes > 0
    decodes = float(steps.decodes[full].sum())
    if not decodes:
        return _Drafts(0.0, 0.0, 0.0)
    columns = (steps.drafted, steps.accepted, steps.drafting)
    return _Drafts(*(float(column[full].sum()) / decodes for column in columns))


def _slowness(evidence: LoadEvidence, cost: CostOfSteps | None) -> float:
    """How many times as long the load's steps took as their cost says, of a sample of them.

    Something else may use the machine while a load runs, which probes alone do not tell.
    """
    sample = evidence.steps[:: max(1, len(evidence.steps) // _SAMPLED_STEPS)]
    expected = sum(_seconds(cost, StepWork.of(step)) for step in sample) if cost else 0.0
    taken = sum(step.seconds - step.draft_seconds for step in sample)
    return taken / expected if expected > 0 else 1.0


def _seconds(cost: CostOfSteps, work: StepWork) -> float:
    return cost.device_seconds(work) + cost.host_seconds(work)


def _is_stable(
    growth: Growth | None,
    rate: float,
    offered: float | None,
    steps: StepColumns,
    first: float,
    last: float,
) -> bool | None:
    if growth is None:
        return None
    if growth.low <= 0 or growth.per_s <= _NEGLIGIBLE * rate:
        return True
    # Answers that take longer than the load lasts pile up in an engine with room for them.
    inside = (steps.start >= first) & (steps.start <= last)
    queued = bool((steps.queue[inside] > 0).mean() > _NEGLIGIBLE) if inside.any() else False
    return offered is not None and offered < _CLEARLY_SUSTAINED and not queued


def _utilisation(
    offered: float | None,
    stable: bool | None,
    requests: Sequence[RequestRecord],
    rate: float,
    first: float,
) -> float | None:
    """The estimate from costs, held against what was seen: 1 and above where the queue grew."""
    if stable is None:
        return offered
    if stable:
        return None if offered is None else min(offered, _JUST_SUSTAINED)
    # While more waits than is served, what is served is all that can be, to the last of it.
    ends = [r.token_times[-1] for r in requests if r.completed]
    seen = rate * (max(ends) - first) / len(ends) if ends else None
    return max(1.0, seen or offered or 0.0)


def _busy_share(steps: StepColumns, first: float, last: float) -> float:
    """Steps' time within the arrivals' span, over the span."""
    inside = np.minimum(steps.end, last) - np.maximum(steps.start, first)
    return min(1.0, float(np.maximum(0.0, inside).sum()) / (last - first))


def _over_wall(steps: StepColumns, values: Floats) -> float | None:
    """The mean over wall time from the first step to the last; between steps nobody is there."""
    wall = float(steps.end[-1] - steps.start[0])
    lengths: npt.NDArray[np.float64] = steps.end - steps.start
    return float(lengths @ values) / wall if wall > 0 else None
