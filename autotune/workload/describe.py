"""A workload in a few numbers, for the record of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autotune.workload.rows import Workload


@dataclass(slots=True)
class _Block:
    """A block that some prompt had, after the blocks that lead to it; and how much of it."""

    tokens: int = 0
    following: dict[tuple[int, int], _Block] = field(default_factory=dict)


def describe(workload: Workload, scaling: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `run.json` says of a workload; lengths in tokens, times in seconds.

    `scaling` says what the user asked for (`rate`, `lengths`, `slice`); the notes say what was
    done.
    """
    rows = workload.rows
    return {
        "source": workload.source,
        "format": workload.format,
        "requests": len(rows),
        "duration_s": workload.duration_s,
        "rate": workload.rate,
        "scaling": {
            "rate": None,
            "lengths": None,
            "slice": None,
            **(scaling or {}),
            "notes": list(workload.notes),
        },
        "input_tokens": _lengths([row.input_tokens for row in rows]),
        "output_tokens": _lengths([row.output_tokens for row in rows]),
        "prefix_share": prefix_share(workload),
        "fingerprint": fingerprint(workload),
    }


def prefix_share(workload: Workload) -> float:
    """Share of all prompt tokens that an earlier prompt began with: the most a cache could save.

    Counted along `prefix_ids` in the order of arrival, with a cache that forgets nothing; recorded
    texts and token ids are not compared.
    """
    root = _Block()
    shared = total = 0
    for row in workload.rows:
        total += row.input_tokens
        block, left = root, row.input_tokens
        for prefix_id in row.prefix_ids or ():
            size = row.prefix_block_tokens or 0
            tokens = min(size, left)
            block = block.following.setdefault((prefix_id, size), _Block())
            # The last block of an earlier prompt may have been a partial one.
            shared += min(block.tokens, tokens)
            block.tokens = max(block.tokens, tokens)
            left -= tokens
    return shared / total if total else 0.0


def fingerprint(workload: Workload) -> str:
    """SHA-256 of everything that decides what is sent; notes and names do not count."""
    digest = hashlib.sha256()
    for row in workload.rows:
        content = (
            row.arrival_s,
            row.input_tokens,
            row.output_tokens,
            row.prompt,
            row.token_ids,
            row.prefix_ids,
            row.prefix_block_tokens,
        )
        digest.update(repr(content).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _lengths(tokens: list[int]) -> dict[str, float | None]:
    if not tokens:
        return dict.fromkeys(("mean", "p50", "p95", "max"))
    p50, p95 = np.percentile(tokens, [50, 95])
    return {
        "mean": float(np.mean(tokens)),
        "p50": float(p50),
        "p95": float(p95),
        "max": int(max(tokens)),
    }
