"""How many tokens a request will yet get, as far as its limit and others' outputs tell."""

from __future__ import annotations

from engine.request import FinishReason, Request

# Requests that ended after which a new one moves the mean by as much as this share.
_MEMORY = 1.0 / 32.0


class OutputLengths:
    """Learns from requests that ended of their own."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def note(self, request: Request) -> None:
        """A request left."""
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            length = request.num_output_tokens
            mean = self._mean
            self._mean = float(length) if mean is None else mean + _MEMORY * (length - mean)

    def expected(self, request: Request) -> float:
        """Tokens that a running request will yet get: at most up to its limit.

        One that is longer than others on the mean is taken to end as far behind it as those began.
        """
        left = max(0, request.max_total_tokens - len(request.token_ids))
        if self._mean is None:
            return float(left)
        beyond = self._mean - request.num_output_tokens
        return min(float(left), beyond if beyond > 0 else self._mean)
