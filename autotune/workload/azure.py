"""Azure LLM inference traces, 2023 and 2024: `TIMESTAMP,ContextTokens,GeneratedTokens`.

Timestamps are dates with up to nine fractional digits (2023 has seven, one more than
`datetime` reads) and, in 2024, an offset from UTC. There are no prompts and no sessions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from autotune.workload.fields import Fields
from autotune.workload.rows import WorkloadRow
from autotune.workload.source import Source

_TIMESTAMP = re.compile(
    r"\s*([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?"
    r"\s*(?:Z|([+-])([0-9]{2}):?([0-9]{2}))?\s*"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def read_azure(source: Source, notes: Counter[str]) -> Iterator[WorkloadRow]:
    """The rows of an Azure trace; arrivals count from its first row."""
    origin: int | None = None
    for fields in source.csv_rows():
        time = _nanoseconds(fields)
        origin = time if origin is None else origin
        output = fields.tokens("GeneratedTokens", minimum=0)
        row_input = fields.tokens("ContextTokens")
        if output == 0:
            notes["rows without output tokens were left out"] += 1
            continue
        yield WorkloadRow((time - origin) / 1e9, row_input, output)


def _nanoseconds(fields: Fields) -> int:
    """The timestamp in whole nanoseconds: a float of seconds since 1970 would lose digits."""
    text = fields.values.get("TIMESTAMP", "")
    found = _TIMESTAMP.fullmatch(text)
    wanted = "it must be a date such as 2023-11-16 18:17:03.9799600"
    if found is None:
        fields.fail("TIMESTAMP", f"is {text[:60]!r}; {wanted}")
    date, clock, fraction, sign, hours, minutes = found.groups()
    try:
        moment = datetime.fromisoformat(f"{date}T{clock}+00:00")
    except ValueError as error:
        fields.fail("TIMESTAMP", f"is {text[:60]!r} ({error}); {wanted}")
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    since = moment - _EPOCH - (-offset if sign == "-" else offset)
    return (since.days * 86400 + since.seconds) * 10**9 + int((fraction or "0").ljust(9, "0"))
