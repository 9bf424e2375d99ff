"""Traffic on an engine in virtual time: what is predicted schedules as what is measured."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from autotune.predict.decoding import PLAIN, Decoding
from autotune.predict.drafting import DraftProfile
from autotune.predict.load_times import NO_TIMES, LoadTimes
from autotune.predict.pace import STEADY, Pace
from autotune.predict.step_cost import StepWork
from autotune.predict.step_totals import StepTotals
from autotune.predict.virtual_engine import Cost, VirtualEngine
from autotune.records import RequestRecord
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape
from engine.step_record import StepRecord


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a load would measure; times are seconds since it began, as those of a real load.

    `steps` are empty unless they were asked for; `totals` tell what they come to in any case.
    """

    records: list[RequestRecord]
    steps: list[StepRecord]
    duration: float
    totals: StepTotals


def replay(
    requests: Sequence[LoadRequest],
    config: EngineConfig,
    cost: Cost,
    cache: CacheShape,
    *,
    drain_limit: float,
    outputs: Mapping[str, Sequence[int]] | None = None,
    times: LoadTimes = NO_TIMES,
    pace: Pace = STEADY,
    decoding: Decoding = PLAIN,
    drafts: DraftProfile | None = None,
    keep_steps: bool = False,
    seed: int = 0,
) -> Replayed:
    """Offer requests to an engine whose steps take what `cost` says.

    A request that arrives during a step is seen at the next, as in a real load. Requests that are
    unfinished `drain_limit` seconds after the last arrival are recorded as timed out.

    Args:
        requests: what to send; ids must differ.
        config: the knobs.
        cost: seconds of a step.
        cache: the KV cache.
        drain_limit: in seconds.
        outputs: the tokens that requests got when they were measured, by id: a prompt that goes on
            from an earlier answer finds it in the cache only if the answer is the same.
        times: what whoever sends requests and steps the engine takes between.
        pace: how much slower than their cost steps are, and when.
        decoding: what speculation elsewhere or disaggregation change.
        drafts: how drafts fare, where the config has a `speculative_method`.
        keep_steps: whether to record the steps, which takes time: they are played one by one.
        seed: of what speculation accepts.

    Raises:
        ValueError: two requests have one id.
        autotune.predict.drafting.UnknownDrafts: the config drafts, and nothing is known of it.
    """
    if len({request.request_id for request in requests}) < len(requests):
        raise ValueError("request ids of a load must differ")
    steps: list[StepRecord] = []
    engine = VirtualEngine(
        config,
        cost,
        cache,
        times=times,
        pace=pace,
        decoding=decoding,
        drafts=drafts,
        outputs=outputs,
        on_step=steps.append if keep_steps else None,
        seed=seed,
    )
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    arrivals = [request.arrival_s + times.arrival for request in ordered]
    if decoding.prompt_share < 1:
        arrivals = _after_prompts(ordered, arrivals, cost, 1 - decoding.prompt_share)
    with _no_search_for_cycles():
        for request, due in zip(ordered, arrivals, strict=True):
            engine.run(due)
            engine.send(request, due)
        last = arrivals[-1] if arrivals else 0.0
        engine.run(math.nextafter(last + drain_limit, math.inf))
        engine.give_up(f"not finished {drain_limit:g} s after the last arrival")
    by_id = {record.request_id: record for record in engine.take_records()}
    records = [by_id[request.request_id] for request in ordered]
    return Replayed(records, steps, engine.now, engine.totals)


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Pause Python's search for unused cycles of objects; simulations make many objects, no cycle.

    It takes a tenth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _after_prompts(
    requests: Sequence[LoadRequest], arrivals: Sequence[float], cost: Cost, share: float
) -> list[float]:
    """Arrivals as they are after a device of prompts, which takes one after another."""
    free, after = 0.0, []
    for request, arrival in zip(requests, arrivals, strict=True):
        work = StepWork.of_prompt(len(request.token_ids))
        free = max(free, arrival) + share * cost.device_seconds(work)
        after.append(free)
    return after


__all__ = ["Cost", "Decoding", "Replayed", "replay"]
