"""Usage in a stream: in every chunk, in a last one, or not at all."""

from __future__ import annotations

from engine.output import RequestOutput
from engine.server.request_fields import StreamOptions
from engine.server.sse import Envelope, event
from engine.server.usage import Usage


class StreamUsage:
    """Tells usage where a client asked for it.

    Args:
        usage: counts.
        options: what the client asked for.
    """

    def __init__(self, usage: Usage, options: StreamOptions | None) -> None:
        self._usage = usage
        self._at_end = options is not None and bool(options.include_usage)
        # As in vLLM, the second needs the first.
        self._everywhere = self._at_end and bool(options and options.continuous_usage_stats)

    def count(self, choice: int, output: RequestOutput) -> None:
        """Take an output in."""
        self._usage.count(choice, output)

    def member(self) -> str:
        """What a chunk with choices has of it, to follow its other members."""
        if self._everywhere:
            return f',"usage":{self._usage.json()}'
        return ',"usage":null' if self._at_end else ""

    def last(self, envelope: Envelope) -> bytes:
        """The chunk that ends the stream, without choices; empty if it was not asked for."""
        if not self._at_end:
            return b""
        return event(envelope.wrap("", f',"usage":{self._usage.json()}'))
