"""Drafted tokens that were drawn by chance: which are accepted is drawn too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import ScheduledSequence
from engine.sampled_row import SampledRow
from engine.sampler import Sampler
from engine.speculate.draft import Draft
from engine.speculate.rejection import accept_drawn


def settle_drawn(
    sampler: Sampler,
    sequences: Sequence[ScheduledSequence],
    rows: Sequence[SampledRow],
    logits: Tensor,
) -> dict[int, int] | None:
    """The tokens of rows that rejection sampling chooses, by row; None if nothing was drawn.

    logits [rows, vocabulary] are not changed. Of a draft's rows those up to the first token that is
    not the drafted one are told; the others matter to nobody.
    """
    first_rows: list[int] = []
    drafts: list[tuple[Draft, int]] = []
    picked: list[int] = []
    seeds: list[int] = []
    positions: list[int] = []
    row = 0
    for sequence in sequences:
        if not sequence.samples:
            continue
        draft = sequence.draft
        if draft is not None and draft.probabilities is not None:
            first_rows.append(row)
            drafts.append((draft, len(picked)))
            picked += range(row, row + 1 + len(draft))
            seeds.append(sampler.request_seed(sequence.request))
            positions.append(sequence.request.num_tokens)
        row += 1 + sequence.num_drafted
    if not drafts:
        return None
    some = logits
    if len(picked) < len(logits):
        some = logits[torch.tensor(picked, device=logits.device)]
    probabilities = sampler.probabilities(some, [rows[i] for i in picked])
    accepted = accept_drawn(probabilities, drafts, seeds, positions)
    return {
        first + place: token
        for first, tokens in zip(first_rows, accepted, strict=True)
        for place, token in enumerate(tokens)
    }
