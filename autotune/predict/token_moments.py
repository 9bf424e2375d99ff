"""When requests in virtual time get their tokens, told by the steps in which they get them.

A request that decodes gets a token in every step, so that the step it began with and the one that
it left by tell all; the moments are looked up when it leaves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autotune.records import Outcome, RequestRecord
from autotune.workload.materialise import LoadRequest
from engine.request import Request


@dataclass(slots=True, eq=False)
class Progress:
    """Where a request stands: in which steps it got its tokens.

    `opened` is the step since which it got one in every step, -1 while it gets none; what lies
    before a preemption is in `segments`.
    """

    load: LoadRequest
    request: Request
    opened: int = -1
    preemptions: int = 0
    segments: tuple[tuple[int, int], ...] = ()
    stamps: list[float] | None = None  # where steps yield several tokens


class TokenMoments:
    """The unfinished requests of an engine, and when they got their tokens.

    `ends` are those of all steps, in seconds; `num_open` requests get a token in every step;
    `unfinished` has them by id, in the order in which they entered.
    """

    __slots__ = ("ends", "num_open", "unfinished")

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.num_open = 0
        self.unfinished: dict[str, Progress] = {}

    def enter(self, load: LoadRequest, request: Request) -> None:
        """Take in a request."""
        self.unfinished[load.request_id] = Progress(load, request)

    def requests(self) -> list[Request]:
        """Those unfinished."""
        return [progress.request for progress in self.unfinished.values()]

    def open_from(self, index: int, sampled: Iterable[Request]) -> None:
        """Note who gets the first of a row of tokens in the step of this number."""
        for request in sampled:
            progress = self.unfinished[request.request_id]
            if progress.opened < 0:
                progress.opened = index
                progress.preemptions = request.num_preemptions
                self.num_open += 1

    def close_preempted(self) -> None:
        """Note who was preempted before the next step."""
        for progress in self.unfinished.values():
            opened = progress.opened
            if opened >= 0 and progress.request.num_preemptions != progress.preemptions:
                progress.segments += ((opened, len(self.ends)),)
                progress.opened = -1
                self.num_open -= 1

    def stamp(self, request: Request, count: int) -> None:
        """Note that a request got so many tokens by the last step; instead of `open_from`."""
        progress = self.unfinished[request.request_id]
        if progress.stamps is None:
            progress.stamps = []
        progress.stamps.extend(self.ends[-1:] * count)

    def leave(self, request: Request, outcome: Outcome, reason: str | None) -> RequestRecord:
        """Take out a request."""
        progress = self.unfinished.pop(request.request_id)
        ends, opened = self.ends, progress.opened
        if opened >= 0:
            self.num_open -= 1
        if opened >= 0 and not progress.segments:
            times = tuple(ends[opened:])
        else:
            segments = (
                (*progress.segments, (opened, len(ends))) if opened >= 0 else progress.segments
            )
            times = tuple(end for first, last in segments for end in ends[first:last])
        return record_of(
            progress.load, request, times or tuple(progress.stamps or ()), outcome, reason
        )


def record_of(
    load: LoadRequest,
    request: Request,
    times: tuple[float, ...],
    outcome: Outcome,
    reason: str | None,
) -> RequestRecord:
    """The record of a request that got its tokens at `times`, in seconds."""
    return RequestRecord(
        request_id=load.request_id,
        intended_send=load.arrival_s,
        send=load.arrival_s,
        token_times=times,
        input_tokens=len(load.token_ids),
        output_tokens=len(times),
        asked_output_tokens=load.output_tokens,
        outcome=outcome,
        reason=reason,
        cached_tokens=request.num_cached_tokens,
        preemptions=request.num_preemptions,
        session_id=load.session_id,
        first_scheduled=request.first_scheduled,
    )
