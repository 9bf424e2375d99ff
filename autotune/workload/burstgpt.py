"""BurstGPT traces: `Timestamp` in seconds, `Request tokens`, `Response tokens`, maybe sessions.

Rows with no response tokens are failed requests. Releases before 1.2 have no `Session ID`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from autotune.workload.rows import WorkloadRow
from autotune.workload.source import Source


def read_burstgpt(source: Source, notes: Counter[str]) -> Iterator[WorkloadRow]:
    """The rows of a BurstGPT file whose request was answered."""
    for fields in source.csv_rows():
        arrival = fields.seconds("Timestamp")
        output = fields.tokens("Response tokens", minimum=0)
        if output == 0:
            notes["rows with 0 response tokens were left out: failed requests"] += 1
            continue
        yield WorkloadRow(
            arrival,
            fields.tokens("Request tokens"),
            output,
            session_id=fields.label("Session ID"),
        )
