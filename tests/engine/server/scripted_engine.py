"""An engine whose requests' outputs are written down beforehand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.output import RequestOutput
from engine.request import FinishReason, Request, SamplingParams


def output(
    text: str, *token_ids: int, reason: FinishReason | None = None, cached: int = 0
) -> RequestOutput:
    """What a step brought."""
    request = Request("scripted", [0], SamplingParams(), 0.0)
    request.num_cached_tokens = cached
    return RequestOutput(request, list(token_ids), text, reason)


@dataclass
class ScriptedStream:
    """Plays a script; an exception in it is raised, and None waits for ever."""

    script: list[RequestOutput | Exception | None]
    aborted: int = 0

    def __aiter__(self) -> ScriptedStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self.script:
            raise StopAsyncIteration
        item = self.script.pop(0)
        await asyncio.sleep(0)
        if item is None:
            await asyncio.Event().wait()
            raise AssertionError("nothing sets that event")
        if isinstance(item, Exception):
            raise item
        return item

    def abort(self) -> None:
        self.aborted += 1


@dataclass
class ScriptedEngine:
    """Hands out the scripts in order; an exception in their place is raised by `submit`."""

    scripts: list[list[RequestOutput | Exception | None] | Exception]
    refuses: Exception | None = None
    streams: list[ScriptedStream] = field(default_factory=list)
    submitted: list[tuple[list[int], SamplingParams, int]] = field(default_factory=list)
    salts: list[str | None] = field(default_factory=list)

    def admit(self, count: int = 1) -> None:
        assert count > 0
        if self.refuses is not None:
            raise self.refuses

    def submit(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> ScriptedStream:
        script = self.scripts[len(self.submitted)]
        self.submitted.append((list(token_ids), sampling, priority))
        self.salts.append(cache_salt)
        if isinstance(script, Exception):
            raise script
        stream = ScriptedStream(list(script))
        self.streams.append(stream)
        return stream
