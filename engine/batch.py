"""What one step executes, what comes back, and the seam between schedule and execution.

`Engine` drives the scheduler with a `ModelRunner`; a simulator drives the same scheduler with a
cost model and a virtual clock. Both are an `Executor`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from engine.config import EngineConfig
from engine.request import Request, TokenLogprobs
from engine.speculate.draft import Draft


@dataclass(slots=True)
class ScheduledSequence:
    """The part of one request that a step computes.

    The step computes `num_tokens` tokens of `request.token_ids` from position `start` on. If
    `samples`, the last of them is the request's last token and the next token is chosen.

    The tokens of `draft`, if there is one, come behind that last token and are among the
    `num_tokens`; they are verified: the next token is chosen after each of them.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    draft: Draft | None = None

    @property
    def num_drafted(self) -> int:
        """Drafted tokens that are verified."""
        return 0 if self.draft is None else len(self.draft)

    @property
    def known(self) -> int:
        """Tokens of the request, from its first, that the step saw or knew to be cached."""
        return self.start + self.num_tokens - self.num_drafted

    @property
    def end(self) -> int:
        """Tokens whose keys and values are in the cache after the step, drafted ones included."""
        return self.start + self.num_tokens


@dataclass(slots=True)
class Batch:
    """One step: `num_decodes` sequences that decode, then prompt chunks.

    A decode has its last token, and the tokens drafted to follow it; all decodes sample.
    """

    sequences: list[ScheduledSequence]
    num_decodes: int
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum([s.num_tokens for s in self.sequences])  # a list: twice as fast

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of the step that are of prompt chunks."""
        return sum([s.num_tokens for s in self.sequences[self.num_decodes :]])

    @property
    def num_drafted_tokens(self) -> int:
        """Drafted tokens that the step verifies."""
        return sum([s.num_drafted for s in self.sequences[: self.num_decodes]])


@dataclass(slots=True)
class BatchResult:
    """What a step produced.

    `tokens[i]` are the tokens chosen for `batch.sequences[i]`: none if it did not sample, one as a
    rule; where drafted tokens were verified, those accepted and one more. The keys and values of
    the accepted ones lie behind the last token's. `logprobs[i]` stands beside it where they were
    asked for.

    `device_seconds` is the time of the model's forward pass and sampling; `host_seconds` that of
    preparing its inputs. `communication_seconds` is the part of the former that went to
    collectives among ranks, and `waiting_seconds` the part of that beyond what these take among
    idle ranks; None where it is not measured.
    """

    tokens: list[list[int]]
    device_seconds: float
    host_seconds: float = 0.0
    logprobs: list[list[TokenLogprobs] | None] = field(default_factory=list)
    communication_seconds: float | None = 0.0
    waiting_seconds: float | None = 0.0


def chunk_size(config: EngineConfig, pending: int, budget: int) -> int:
    """Tokens of a prompt to compute in a step that has `budget` left; `pending` are left of it."""
    num_tokens = max(0, min(pending, budget))
    threshold = config.long_prefill_token_threshold
    if threshold and config.enable_chunked_prefill:
        return min(num_tokens, threshold)
    return num_tokens


class Executor(Protocol):
    """Executes batches: on a device, or in a model of time."""

    def execute(self, batch: Batch) -> BatchResult:
        """Run one step; the batch is not changed."""
        ...


class InFlight(Protocol):
    """A step on its way."""

    def wait(self) -> BatchResult:
        """Wait for the result; may be called again if it was interrupted."""
        ...


class PipelinedExecutor(Executor, Protocol):
    """An executor that need not be waited for, so that the engine works meanwhile.

    `pipelined` says whether it is to be used so.
    """

    pipelined: bool

    def launch(self, batch: Batch) -> InFlight:
        """Begin a step, when the one before has been waited for; the batch is not changed."""
        ...
