"""Which logits penalties and `min_tokens` change, as lists of places and amounts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.sampled_row import SampledRow


@dataclass(frozen=True, slots=True)
class LogitChanges:
    """Changes of single logits, as `kernels.sampling.change_logits` takes them.

    places int64 [E] into the flat [S, vocabulary], distinct; factors, amounts float32 [E].
    """

    places: NDArray[np.int64]
    factors: NDArray[np.float32]
    amounts: NDArray[np.float32]


def logit_changes(
    requests: Sequence[SampledRow], vocabulary: int, eos_token_ids: Sequence[int]
) -> LogitChanges | None:
    """What `SamplingParams` says of each row's logits; None if nothing is to change.

    Order as in vLLM: repetition first, then frequency and presence, then `min_tokens`, which
    forbids end and stop tokens.
    """
    changed = [row for row, request in enumerate(requests) if _changes(request)]
    rows = [_changes_of_row(row, requests[row], vocabulary, eos_token_ids) for row in changed]
    if not rows:
        return None
    return LogitChanges(
        np.concatenate([r.places for r in rows]),
        np.concatenate([r.factors for r in rows]),
        np.concatenate([r.amounts for r in rows]),
    )


def _changes(request: SampledRow) -> bool:
    p = request.sampling
    return (
        p.repetition_penalty != 1.0
        or p.presence_penalty != 0.0
        or p.frequency_penalty != 0.0
        or (p.min_tokens > 0 and request.num_output_tokens < p.min_tokens)
    )


def _changes_of_row(
    row: int, request: SampledRow, vocabulary: int, eos_token_ids: Sequence[int]
) -> LogitChanges:
    p = request.sampling
    tokens, counts = request.counted_tokens()
    if p.repetition_penalty == 1.0:
        told = counts > 0
        tokens, counts = tokens[told], counts[told]
    factors = np.full(len(tokens), p.repetition_penalty, dtype=np.float32)
    amounts = np.float32(p.frequency_penalty) * counts
    amounts += np.float32(p.presence_penalty) * (counts > 0)
    ends = _forbidden(request, vocabulary, eos_token_ids)
    if len(ends):
        amounts[np.isin(tokens, ends)] = np.inf
        ends = ends[~np.isin(ends, tokens)]
        tokens = np.concatenate([tokens, ends])
        factors = np.concatenate([factors, np.ones(len(ends), dtype=np.float32)])
        amounts = np.concatenate([amounts, np.full(len(ends), np.inf, dtype=np.float32)])
    return LogitChanges(tokens + row * vocabulary, factors, amounts)


def _forbidden(
    request: SampledRow, vocabulary: int, eos_token_ids: Sequence[int]
) -> NDArray[np.int64]:
    """End and stop tokens of a request that is below its `min_tokens`."""
    p = request.sampling
    if request.num_output_tokens >= p.min_tokens:
        return np.empty(0, dtype=np.int64)
    ends = {*p.stop_token_ids, *(() if p.ignore_eos else eos_token_ids)}
    return np.array(sorted(t for t in ends if 0 <= t < vocabulary), dtype=np.int64)
