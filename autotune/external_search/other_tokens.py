"""The same load in other tokens, of which no prefix cache knows anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from autotune.workload.materialise import LoadRequest


def in_other_tokens(requests: Sequence[LoadRequest]) -> list[LoadRequest]:
    """The same lengths and equal beginnings, in other tokens out of the same vocabulary."""
    known = sorted({token for r in requests for token in r.token_ids})
    half = len(known) // 2
    other = dict(zip(known, [*known[half:], *known[:half]], strict=True))
    return [
        dataclasses.replace(r, token_ids=tuple(other[token] for token in r.token_ids))
        for r in requests
    ]
