"""A load on a fleet in virtual time, at one guess of what steps cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.metrics import compute_metrics
from autotune.predict.cost_model import CostDraw
from autotune.predict.decoding import PLAIN, Decoding
from autotune.predict.drafting import DraftProfile
from autotune.predict.step_totals import StepTotals
from autotune.records import RequestRecord
from autotune.simulation.drafts_told import drafts_together, drafts_told
from autotune.simulation.fleet import ONE, Disaggregation, Fleet, Router
from autotune.simulation.replica import Replica
from autotune.simulation.routing import VirtualRouting
from autotune.slo import Slo
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape

# Seeds of engines lie so far apart that those of two loads never meet.
_SEEDS = 10_007
# First tokens that prefill engines make up: above every vocabulary, so that no prompt has them.
_MADE_UP = 1 << 40


@dataclass(frozen=True, slots=True)
class Played:
    """What a load would measure; times are seconds since it began.

    `records` are in the order of arrival. `duration` is when the last engine was done. `totals` are
    of each engine, those that compute prompts first. `replicas` tells by record which engine it
    left last, counted from 0; with disaggregation those that decode are counted after the others,
    of which there are `prompt_engines`.
    """

    records: list[RequestRecord]
    duration: float
    totals: tuple[StepTotals, ...]
    replicas: tuple[int, ...]
    prompt_engines: int

    def metrics(self, slo: Slo | None, config: EngineConfig) -> dict[str, Any]:
        """The metrics by the keys of `bench --json`, without intervals; see `compute_metrics`."""
        found = compute_metrics(
            self.records,
            slo,
            duration=self.duration,
            config=config,
            load_delivered=True,
            load_note=None,
            resamples=0,
        )
        del found["intervals"]
        for latency in ("ttft", "tpot", "itl", "e2e"):
            del found[latency]["intervals"]
        found["engine"] = fleet_totals(self.totals).to_metrics()
        # What decoding engines have of prompts spares nobody computing them.
        asked = fleet_totals(self.totals[: self.prompt_engines]).to_metrics()
        found["engine"]["prefix_hit_rate"] = asked["prefix_hit_rate"]
        found["speculation"] = drafts_told(fleet_totals(self.totals).drafts, config)
        return found


def fleet_totals(totals: Sequence[StepTotals]) -> StepTotals:
    """What the steps of all engines come to; `peak_blocks` as if all were as full as the fullest.

    Blocks are those of the whole fleet.
    """
    if len(totals) == 1:
        return totals[0]
    blocks = sum(t.blocks_total for t in totals)
    share = max((t.peak_blocks / t.blocks_total for t in totals if t.blocks_total), default=0.0)
    summed = {
        field.name: sum(getattr(t, field.name) for t in totals)
        for field in dataclasses.fields(StepTotals)
        if field.name != "drafts"
    }
    summed |= {"peak_blocks": round(share * blocks), "blocks_total": blocks}
    return StepTotals(**summed, drafts=drafts_together([t.drafts for t in totals]))


def play(
    requests: Sequence[LoadRequest],
    config: EngineConfig,
    draw: CostDraw,
    cache: CacheShape,
    *,
    drain_limit: float,
    fleet: Fleet = ONE,
    decoding: Decoding = PLAIN,
    drafts: DraftProfile | None = None,
    outputs: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> Played:
    """Offer requests to a fleet; with one engine it is what `autotune.predict.replay` does.

    Requests that are unfinished `drain_limit` seconds after the last arrival are recorded as timed
    out. The same arguments give the same result, to the last bit.

    Args:
        requests: what to send, in any order; ids must differ.
        config: the knobs, of every engine.
        draw: what steps cost, and the times between them.
        cache: the KV cache of each engine.
        drain_limit: in seconds.
        fleet: the engines and their router.
        decoding: how decodes differ from one token a sequence and step.
        drafts: how drafts fare, where the config has a `speculative_method`; by default as the
            draw says.
        outputs: the tokens that requests get, by id; made up for others. A prompt that goes on from
            an earlier answer finds it in a cache only if the answer is the same.
        seed: of what speculation accepts.

    Raises:
        ValueError: two requests have one id.
        autotune.predict.drafting.UnknownDrafts: the config drafts, and nothing is known of it.
    """
    if len({request.request_id for request in requests}) < len(requests):
        raise ValueError("request ids of a load must differ")
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    delay = draw.times.arrival
    deadline = ordered[-1].arrival_s + delay + drain_limit if ordered else drain_limit
    split = fleet.disaggregation
    if drafts is not None:
        draw = dataclasses.replace(draw, drafts=drafts)
    stage = _Stage(config, draw, cache, deadline, drain_limit, seed)
    if split is None:
        arrivals = [_Arrival(r, r.arrival_s + delay) for r in ordered]
        served = stage.serve(arrivals, fleet.replicas, fleet.router, decoding, outputs)
        records = [served.records[r.request_id] for r in ordered]
        return _played(records, served, [], [served.places[r.request_id] for r in ordered])
    return _play_disaggregated(ordered, stage, split, fleet.router, decoding, outputs or {}, delay)


@dataclass(frozen=True, slots=True)
class _Arrival:
    load: LoadRequest
    due: float
    received_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Served:
    """Records and places by request; the engines."""

    records: dict[str, RequestRecord]
    places: dict[str, int]
    replicas: list[Replica]


@dataclass(frozen=True, slots=True)
class _Stage:
    """Engines that requests pass through, all at once or prompts and decodes apart."""

    config: EngineConfig
    draw: CostDraw
    cache: CacheShape
    deadline: float
    drain_limit: float
    seed: int

    def serve(
        self,
        arrivals: Sequence[_Arrival],
        count: int,
        router: Router,
        decoding: Decoding,
        outputs: Mapping[str, Sequence[int]] | None,
        *,
        prompts: bool = True,
    ) -> _Served:
        """Send everyone to one of `count` engines, and run these until the deadline."""
        draw = self.draw
        replicas = [
            Replica(
                self.config,
                draw.cost,
                self.cache,
                times=draw.times,
                pace=draw.pace,
                decoding=decoding,
                drafts=draw.drafts,
                outputs=outputs,
                seed=self.seed * _SEEDS + place,
            )
            for place in range(count)
        ]
        routing = VirtualRouting(router, replicas, prompts=prompts)
        places: dict[str, int] = {}
        for arrival in arrivals:
            place = places[arrival.load.request_id] = routing.choose(arrival.load, arrival.due)
            replicas[place].send(arrival.load, arrival.due, received_tokens=arrival.received_tokens)
        records: dict[str, RequestRecord] = {}
        for replica in replicas:
            replica.run(math.nextafter(self.deadline, math.inf))
            replica.give_up(f"not finished {self.drain_limit:g} s after the last arrival")
            records.update((record.request_id, record) for record in replica.take_records())
        return _Served(records, places, replicas)


def _played(
    records: list[RequestRecord],
    first: _Served,
    decoding: Sequence[Replica],
    places: Sequence[int],
) -> Played:
    replicas = [*first.replicas, *decoding]
    duration = max(replica.now for replica in replicas)
    totals = tuple(replica.totals for replica in replicas)
    return Played(records, duration, totals, tuple(places), len(first.replicas))


def _play_disaggregated(
    ordered: Sequence[LoadRequest],
    stage: _Stage,
    split: Disaggregation,
    router: Router,
    decoding: Decoding,
    outputs: Mapping[str, Sequence[int]],
    delay: float,
) -> Played:
    prompts = [
        _Arrival(dataclasses.replace(r, output_tokens=1), r.arrival_s + delay) for r in ordered
    ]
    first = stage.serve(prompts, split.prefill_replicas, router, PLAIN, outputs)
    decodes = _transferred(ordered, first, split, outputs)
    rest = {request_id: tokens[1:] for request_id, tokens in outputs.items()}
    # Who decodes brings a prompt along: no cache need be looked for, and one that filled a step is
    # not refused for its first token.
    decoding_config = stage.config.replace(enable_chunked_prefill=True)
    second = dataclasses.replace(stage, config=decoding_config).serve(
        [arrival for arrival in decodes if arrival.due <= stage.deadline],
        split.decode_replicas,
        "round_robin" if router == "round_robin" else "least_loaded",
        decoding,
        rest,
        prompts=False,
    )
    late = {arrival.load.request_id for arrival in decodes if arrival.due > stage.deadline}
    records, places = [], []
    for request in ordered:
        key = request.request_id
        begun, ended = first.records[key], second.records.get(key)
        reason = f"not finished {stage.drain_limit:g} s after the last arrival"
        records.append(_joined(request, begun, ended, reason if key in late else None))
        on_decode = key in second.places
        places.append(
            split.prefill_replicas + second.places[key] if on_decode else first.places[key]
        )
    return _played(records, first, second.replicas, places)


def _transferred(
    ordered: Sequence[LoadRequest],
    first: _Served,
    split: Disaggregation,
    outputs: Mapping[str, Sequence[int]],
) -> list[_Arrival]:
    """What arrives at the engines that decode, in order: prompts with their first token."""
    begun = [
        (first.records[r.request_id].token_times[0], index, r)
        for index, r in enumerate(ordered)
        if r.output_tokens > 1 and first.records[r.request_id].completed
    ]
    free = [0.0] * split.prefill_replicas
    arrivals = []
    for at, index, request in sorted(begun, key=lambda item: item[:2]):
        place = first.places[request.request_id]
        length = len(request.token_ids)
        free[place] = max(free[place], at) + split.link_seconds(length)
        known = outputs.get(request.request_id)
        token = known[0] if known else _MADE_UP + index
        load = dataclasses.replace(
            request,
            token_ids=(*request.token_ids, token),
            output_tokens=request.output_tokens - 1,
        )
        arrivals.append(_Arrival(load, free[place] + split.transfer_latency_s, length))
    return sorted(arrivals, key=lambda arrival: arrival.due)


def _joined(
    request: LoadRequest, begun: RequestRecord, ended: RequestRecord | None, late: str | None
) -> RequestRecord:
    """The record of a request whose prompt and decodes ran on two engines."""
    asked = request.output_tokens
    if ended is None:
        if late is None:
            return dataclasses.replace(begun, asked_output_tokens=asked)
        return dataclasses.replace(
            begun, asked_output_tokens=asked, outcome="timed_out", reason=late
        )
    times = begun.token_times + ended.token_times
    return dataclasses.replace(
        begun,
        token_times=times,
        output_tokens=len(times),
        asked_output_tokens=asked,
        outcome=ended.outcome,
        reason=ended.reason,
        preemptions=begun.preemptions + ended.preemptions,
    )
