"""Requests that have not left, and the outputs that wait to be handed out."""

from __future__ import annotations

from engine.batch import Batch, BatchResult
from engine.output import Detokenizer, RequestOutput
from engine.request import FinishReason, Request
from engine.scheduler import Scheduler


class Outbox:
    """Makes the outputs of steps, and sees to it that each request leaves once.

    Args:
        scheduler: told of requests that a stop text finished.
        detokenizer: makes text of tokens; None leaves texts empty.
    """

    def __init__(self, scheduler: Scheduler, detokenizer: Detokenizer | None) -> None:
        self._scheduler = scheduler
        self._detokenizer = detokenizer
        self._ready: list[RequestOutput] = []
        self._leaving: list[str] = []  # whose last output is ready
        self.unfinished: dict[str, Request] = {}

    def __bool__(self) -> bool:
        """Whether outputs wait."""
        return bool(self._ready)

    @property
    def finds_stops(self) -> bool:
        """Whether stop texts can be found."""
        return self._detokenizer is not None

    def begin(self, request: Request) -> None:
        """A request was let in."""
        if self._detokenizer is not None:
            self._detokenizer.add(request)

    def refuse(self, request: Request) -> None:
        """A request was not let in."""
        self._leave(request, "")

    def depart(self, request: Request) -> None:
        """A request was taken out."""
        self._leave(request, "" if self._detokenizer is None else self._detokenizer.finish(request))

    def take(self) -> list[RequestOutput]:
        """Hand out what waits; requests whose last output is among it have left."""
        outputs, self._ready = self._ready, []
        for request_id in self._leaving:
            del self.unfinished[request_id]
        self._leaving.clear()
        return outputs

    def collect(self, batch: Batch, result: BatchResult, having_stops: bool | None = None) -> None:
        """Make the outputs of a step's requests, after `Scheduler.update`.

        `having_stops` is for those with stop texts, or those without, alone: one that meets its
        stop text must not be scheduled again, the others can wait until the next step is launched.
        """
        detokenizer = self._detokenizer
        logprobs = result.logprobs
        ready = self._ready
        aborted = FinishReason.ABORT
        for i, sequence in enumerate(batch.sequences):
            if not sequence.samples:
                continue
            request = sequence.request
            if having_stops is not None and bool(request.sampling.stop) is not having_stops:
                continue
            reason = request.finish_reason
            if reason is aborted:  # it left while the step was on its way
                continue
            # A sequence that sampled had all its tokens computed: those after them are new.
            known = sequence.known
            tokens = request.token_ids[known:]
            text = ""
            if detokenizer is not None:
                text, tokens = self._text(detokenizer, request, tokens, known)
                reason = request.finish_reason
            chosen = logprobs[i] if logprobs else None
            if chosen is not None:
                chosen = chosen[: len(tokens)]
            if reason is not None:
                self._leaving.append(request.request_id)
            ready.append(RequestOutput(request, tokens, text, reason, chosen))

    def _leave(self, request: Request, text: str) -> None:
        self._leaving.append(request.request_id)
        self._ready.append(RequestOutput(request, [], text, request.finish_reason))

    def _text(
        self, detokenizer: Detokenizer, request: Request, tokens: list[int], end: int
    ) -> tuple[str, list[int]]:
        """The new text, and the new tokens up to a stop text; finishes the request at one."""
        ended_by_token = request.finish_reason is FinishReason.STOP
        delta = detokenizer.append(request, tokens[:-1] if ended_by_token else tokens)
        if delta.stop_at is not None:
            tokens = tokens[: delta.stop_at]
            del request.token_ids[end + delta.stop_at :]
            if not self._scheduler.finish(request, FinishReason.STOP):
                request.finish_reason = FinishReason.STOP  # the step's tokens had ended it too
        if request.finish_reason is None:
            return delta.text, tokens
        return delta.text + detokenizer.finish(request), tokens
