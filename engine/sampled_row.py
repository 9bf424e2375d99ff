"""Where tokens are chosen: after a request's last one, and after each drafted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.batch import ScheduledSequence
from engine.request import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class DraftedRow:
    """A request as it would be after some of its drafted tokens.

    What the sampler reads of a `Request` reads the same here. `drafted` are the drafted tokens up
    to this place, at least one.
    """

    request: Request
    drafted: Sequence[int]

    @property
    def request_id(self) -> str:
        """The request's."""
        return self.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        """The request's."""
        return self.request.sampling

    @property
    def token_ids(self) -> list[int]:
        """Prompt, output, and what was drafted."""
        return [*self.request.token_ids, *self.drafted]

    @property
    def output_token_ids(self) -> list[int]:
        """Output, and what was drafted."""
        return [*self.request.output_token_ids, *self.drafted]

    def counted_tokens(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `Request.counted_tokens`; what was drafted is output."""
        return self.request.counted_tokens(self.drafted)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the output and the draft."""
        return self.request.num_output_tokens + len(self.drafted)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, the output and the draft."""
        return self.request.num_tokens + len(self.drafted)


SampledRow: TypeAlias = Request | DraftedRow


def sampled_rows(sequences: Sequence[ScheduledSequence]) -> list[SampledRow]:
    """The rows of a step's logits: of each sequence that samples, and of its drafted tokens."""
    rows: list[SampledRow] = []
    for sequence in sequences:
        if not sequence.samples:
            continue
        request, draft = sequence.request, sequence.draft
        rows.append(request)
        if draft is None:
            continue
        token_ids = draft.token_ids
        for i in range(len(token_ids)):
            drafted = token_ids[: i + 1]
            if draft.parents is not None:
                drafted = [token_ids[j] for j in draft.path(i)]
            rows.append(DraftedRow(request, drafted))
    return rows
