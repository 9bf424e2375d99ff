"""A request, how its tokens are to be chosen, and where it stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from engine.block_tables import BlockTables
from engine.errors import ConfigError
from engine.speculate.draft import Draft

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from engine.token_counts import TokenCounts


class RequestState(StrEnum):
    """Where a request stands; FINISHED is final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request left the engine."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen; names and meanings are vLLM's.

    Args:
        max_tokens: most tokens to generate; None means up to the model's limit.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities sum to at least top_p.
        min_p: keep tokens at least min_p times as likely as the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of every token of the
            prompt and the output so far (Keskar et al. 2019, CTRL); 1 is none.
        presence_penalty: subtracted once from the logits of tokens already generated.
        frequency_penalty: subtracted once per occurrence from the logits of tokens generated.
        seed: makes this request's choices reproducible, whatever runs beside it.
        stop: texts that end the output; they are not part of it.
        stop_token_ids: tokens that end the output; they are part of its token ids.
        ignore_eos: go on after the model's end token.
        min_tokens: no end token and no stop before so many tokens.
        logprobs: report the log-probability of each chosen token and of so many likeliest ones;
            None reports none.

    Raises:
        ConfigError: a value is out of bounds.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        # A frozen dataclass still accepts a list or a lone string from a caller; make it a tuple.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        bounds: tuple[tuple[str, float | None, float, float], ...] = (
            ("max_tokens", self.max_tokens, 1, math.inf),
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_k", self.top_k, -1, math.inf),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 1e-6, 100.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("seed", self.seed, -math.inf, math.inf),
            ("min_tokens", self.min_tokens, 0, math.inf),
            ("logprobs", self.logprobs, 0, 100),
        )
        for name, value, low, high in bounds:
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name}={value!r} must lie in [{low}, {high}]")
        if self.top_p == 0.0:
            raise ConfigError("top_p=0 keeps no token; it must be above 0")
        if any(not text for text in self.stop):
            raise ConfigError("stop must not contain an empty text")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken without chance."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, before temperature and filters.

    `top` maps the likeliest token ids to their log-probabilities, likeliest first.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(slots=True, eq=False)
class Request:
    """One request and its progress.

    `token_ids` holds the prompt followed by the output. The first `num_computed_tokens` of them
    have their keys and values in the blocks of `tables`; the rest are still to be computed.
    After a preemption nothing is computed and the whole of `token_ids` is computed again.

    `num_cached_tokens` are the prompt tokens that prefix caching spared when the request was first
    admitted; `max_total_tokens` ends it; `rank` is its place in the scheduler's order. `refusal`
    says in one sentence why it was refused or given up. `first_scheduled` is when it first got a
    seat among the running requests. The keys and values of the first `num_received_tokens` tokens
    come from another engine, which computed the prompt: they take blocks, but no computing, unless
    the request is preempted. `draft` is what the next step verifies beside the last token, as far
    as there is room. Prefixes are shared with requests of the same `cache_salt` alone.

    Times are seconds on the engine's clock.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    arrival: float
    priority: int = 0
    num_prompt_tokens: int = field(init=False)
    state: RequestState = RequestState.WAITING
    finish_reason: FinishReason | None = None
    refusal: str | None = None
    tables: BlockTables = field(default_factory=BlockTables)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    max_total_tokens: int = 0
    rank: tuple[int, int] = (0, 0)
    first_scheduled: float | None = None
    num_received_tokens: int = 0
    draft: Draft | None = None
    cache_salt: bytes = b""
    _counts: TokenCounts | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    def counted_tokens(
        self, drafted: Sequence[int] = ()
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The distinct tokens, and how often each is in the output with `drafted` behind it.

        Both [distinct]; not to be changed. Takes what the tokens since the last call take.
        """
        if self._counts is None:
            from engine.token_counts import TokenCounts  # NumPy: scheduling does without

            self._counts = TokenCounts(self.num_prompt_tokens)
        self._counts.read(self.token_ids)
        return self._counts.with_drafted(drafted)

    def copied(self) -> Request:
        """The same prompt, output and sampling, to go on differently; nothing of it is computed."""
        copy = Request(self.request_id, list(self.token_ids), self.sampling, self.arrival)
        copy.num_prompt_tokens = self.num_prompt_tokens
        copy._counts = None if self._counts is None else self._counts.copied()
        return copy

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the output so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.token_ids) - self.num_computed_tokens
