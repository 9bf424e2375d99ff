"""Traces of lengths and block hashes: vLLM's timed trace, and Mooncake's, one JSON object a line.

Both have `timestamp`, `input_length`, `output_length` and `hash_ids`. Mooncake's timestamps are
milliseconds and its blocks 512 tokens; vLLM's timed trace has seconds and, as published by
Alibaba, blocks of 16. Equal ids mean that the block and everything before it are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from autotune.workload.fields import Fields
from autotune.workload.rows import WorkloadRow
from autotune.workload.source import Source

MOONCAKE_BLOCK_TOKENS = 512
TIMED_TRACE_BLOCK_TOKENS = 16
_KNOWN_BLOCKS = (16, 512, 32, 64, 128, 256, 1024)
_SAMPLE_ROWS = 64


def read_timed_trace(
    source: Source, notes: Counter[str], unit: float = 1.0, block_tokens: int | None = None
) -> Iterator[WorkloadRow]:
    """The rows of a timed trace; `unit` is the length of a timestamp's 1 in seconds.

    Without `block_tokens` the block length is the one of the usual that fits the first rows.
    """
    rows = source.json_lines()
    head = list(islice(rows, _SAMPLE_ROWS))
    if block_tokens is None:
        block_tokens = infer_block_tokens(head) or TIMED_TRACE_BLOCK_TOKENS
    for fields in chain(head, rows):
        arrival = fields.seconds("timestamp", unit)
        input_tokens = fields.tokens("input_length")
        output = fields.tokens("output_length", minimum=0)
        ids = fields.ids("hash_ids") if "hash_ids" in fields else ()
        blocks = -(-input_tokens // block_tokens)
        if len(ids) > blocks:
            fields.fail(
                "hash_ids",
                f"has {len(ids)} blocks of {block_tokens} tokens, but input_length "
                f"{input_tokens} has at most {blocks}",
            )
        if output == 0:
            notes["rows with output_length 0 were left out"] += 1
            continue
        yield WorkloadRow(
            arrival,
            input_tokens,
            output,
            prefix_ids=ids or None,
            prefix_block_tokens=block_tokens if ids else None,
            session_id=fields.label("session_id"),
        )


def read_mooncake(source: Source, notes: Counter[str]) -> Iterator[WorkloadRow]:
    """The rows of a Mooncake trace."""
    return read_timed_trace(source, notes, unit=1e-3, block_tokens=MOONCAKE_BLOCK_TOKENS)


def infer_block_tokens(rows: Sequence[Fields]) -> int | None:
    """The block length with which most rows have as many ids as blocks; None if none has.

    Most, not all: one bad row must be refused by its name, not change what the others mean.
    """
    pairs = [
        (row.values.get("input_length"), len(row.values["hash_ids"]))
        for row in rows
        if isinstance(row.values.get("hash_ids"), list)
    ]
    fits = {
        block: sum(type(length) is int and -(-length // block) == ids for length, ids in pairs)
        for block in _KNOWN_BLOCKS
    }
    best = max(fits, key=lambda block: fits[block])
    return best if fits[best] * 2 > len(pairs) else None
