"""The traffic of a measurement as requests that can be offered again, also changed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from autotune.profiling.evidence import LoadEvidence
from autotune.records import RequestRecord
from autotune.workload.materialise import LoadRequest


def recorded_requests(evidence: LoadEvidence) -> list[LoadRequest]:
    """The requests that were sent, at their intended times.

    Prompts that were not kept are made up: each begins with as many tokens of an earlier one as it
    found in the cache, and is unlike all others beyond.
    """
    made_up = _made_up(evidence.requests)
    return [
        LoadRequest(
            record.request_id,
            record.intended_send,
            evidence.prompts.get(record.request_id) or prompt,
            record.asked_output_tokens,
            record.session_id,
        )
        for record, prompt in zip(evidence.requests, made_up, strict=True)
    ]


def recorded_outputs(evidence: LoadEvidence) -> dict[str, tuple[int, ...]]:
    """The tokens that requests got, by id, as far as they are known.

    Only where prompts are known: one that goes on from an answer finds it in the cache.
    """
    if not evidence.prompts:
        return {}
    return {r.request_id: r.output_token_ids for r in evidence.requests if r.output_token_ids}


def recorded_drain_limit(evidence: LoadEvidence) -> float | None:
    """Seconds after the last arrival at which the load gave up; None if nothing was given up."""
    if not any(record.outcome == "timed_out" for record in evidence.requests):
        return None
    ends = [step.start + step.seconds for step in evidence.steps]
    last = max(record.intended_send for record in evidence.requests)
    return max(ends) - last if ends and max(ends) > last else None


def changed_traffic(
    requests: Sequence[LoadRequest],
    *,
    rate: float = 1.0,
    input_tokens: float = 1.0,
    output_tokens: float = 1.0,
    share: float = 1.0,
) -> list[LoadRequest]:
    """The same traffic at `rate` times its rate, with lengths times their factors.

    Shortened prompts lose their ends, lengthened ones get tokens that no other has. Of the requests
    `share` are kept, evenly spread.
    """
    kept = [
        request
        for index, request in enumerate(requests)
        if int((index + 1) * share + 1e-9) > int(index * share + 1e-9)
    ]
    fresh = _FreshTokens()
    return [
        dataclasses.replace(
            request,
            arrival_s=request.arrival_s / rate,
            token_ids=_resized(request.token_ids, input_tokens, fresh),
            output_tokens=max(1, round(request.output_tokens * output_tokens)),
        )
        for request in kept
    ]


def jittered(requests: Sequence[LoadRequest], most_s: float, seed: int) -> list[LoadRequest]:
    """The same requests, each up to `most_s` seconds later."""
    rng = random.Random(seed)
    return [
        dataclasses.replace(request, arrival_s=request.arrival_s + rng.uniform(0.0, most_s))
        for request in requests
    ]


def leading_requests(
    requests: Sequence[LoadRequest], most_tokens: int, at_least: int
) -> list[LoadRequest]:
    """The first requests, as many as have `most_tokens` tokens of work, and `at_least` of them.

    A token of a prompt counts as a sixteenth of an output token, as it is played so much faster.
    """
    taken: list[LoadRequest] = []
    tokens = 0.0
    for request in sorted(requests, key=lambda r: r.arrival_s):
        tokens += request.output_tokens + len(request.token_ids) / 16
        if tokens > most_tokens and len(taken) >= at_least:
            break
        taken.append(request)
    return taken


class _FreshTokens:
    """Token ids that nobody else has."""

    def __init__(self) -> None:
        self._next = 1 << 24  # above every vocabulary

    def take(self, count: int) -> tuple[int, ...]:
        """So many of them."""
        self._next += count
        return tuple(range(self._next - count, self._next))


def _resized(tokens: tuple[int, ...], factor: float, fresh: _FreshTokens) -> tuple[int, ...]:
    length = max(1, round(len(tokens) * factor))
    return tokens[:length] + fresh.take(max(0, length - len(tokens)))


def _made_up(records: Sequence[RequestRecord]) -> list[tuple[int, ...]]:
    fresh = _FreshTokens()
    prompts: list[tuple[int, ...]] = []
    last_of_session: dict[str | None, tuple[int, ...]] = {}
    for record in records:
        prefix: tuple[int, ...] = ()
        if record.cached_tokens:
            known = last_of_session.get(record.session_id, ())
            if record.session_id is None or len(known) < record.cached_tokens:
                known = _latest_of_length(prompts, record.cached_tokens)
            prefix = known[: record.cached_tokens]
        prompt = prefix + fresh.take(max(1, record.input_tokens) - len(prefix))
        prompts.append(prompt)
        last_of_session[record.session_id] = prompt
    return prompts


def _latest_of_length(prompts: Sequence[tuple[int, ...]], length: int) -> tuple[int, ...]:
    return next((p for p in reversed(prompts) if len(p) >= length), ())
