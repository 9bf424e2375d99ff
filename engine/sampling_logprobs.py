"""Log-probabilities of chosen tokens: computed on the device, made into records on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.request import TokenLogprobs
from engine.sampled_row import SampledRow


@dataclass(frozen=True, slots=True)
class WantedLogprobs:
    """Rows that report log-probabilities, and of how many of the likeliest tokens each."""

    rows: list[int]
    widths: list[int]

    @classmethod
    def of(cls, requests: Sequence[SampledRow]) -> WantedLogprobs:
        """What the requests ask for."""
        widths = [r.sampling.logprobs for r in requests]
        rows = [i for i, width in enumerate(widths) if width is not None]
        return cls(rows, [width for width in widths if width is not None])

    def compute(self, raw: Tensor, tokens: Tensor, rows: Tensor | None) -> list[Tensor]:
        """Of the chosen tokens and of the likeliest, under the logits as the model gave them.

        raw [S, vocabulary]; tokens int64 [S]; rows: `self.rows` on the device, None where that is
        all of them. Returns float32 [R], float32 [R, widest] and int64 [R, widest].
        """
        if rows is not None:
            raw, tokens = raw[rows], tokens[rows]
        logprobs = torch.log_softmax(raw.float(), dim=-1)
        chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        values, indices = logprobs.topk(min(max(self.widths), raw.shape[1]), dim=-1)
        return [chosen, values, indices]

    def records(
        self, token_ids: Sequence[int], computed: Sequence[Tensor]
    ) -> list[TokenLogprobs | None]:
        """One entry a row, None for those that asked for none; `computed` is on the host."""
        chosen, values, indices = (x.tolist() for x in computed)
        out: list[TokenLogprobs | None] = [None] * len(token_ids)
        for i, (row, width) in enumerate(zip(self.rows, self.widths, strict=True)):
            top = dict(zip(indices[i][:width], values[i][:width], strict=True))
            out[row] = TokenLogprobs(token_ids[row], chosen[i], top)
        return out
