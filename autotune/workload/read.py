"""Reading a workload file, whatever its format."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Literal

from autotune.errors import BadInput
from autotune.workload.arrivals import GRID_NOTE, find_grid
from autotune.workload.azure import read_azure
from autotune.workload.burstgpt import read_burstgpt
from autotune.workload.conversations import read_custom, read_openai_batch, read_sharegpt
from autotune.workload.detect import FORMATS, detect_format
from autotune.workload.fields import cut
from autotune.workload.rows import Workload, WorkloadRow
from autotune.workload.source import Source
from autotune.workload.timed_trace import read_mooncake, read_timed_trace

# What `vllm bench` takes for a custom data set without output lengths.
DEFAULT_OUTPUT_TOKENS = 256


def read_workload(
    path: str | Path,
    format: str | None = None,  # noqa: A002 - the field's name for it
    *,
    time_unit: Literal["s", "ms"] | None = None,
    block_tokens: int | None = None,
    default_output_tokens: int = DEFAULT_OUTPUT_TOKENS,
    max_rows: int | None = None,
) -> Workload:
    """Read a workload; rows are sorted by arrival and begin at 0 seconds.

    Args:
        path: a file; see `autotune.workload.detect.FORMATS`.
        format: one of these names; by default recognised from the content.
        time_unit: unit of a timed trace's timestamps; seconds by default.
        block_tokens: tokens that one of a timed trace's hash_ids stands for; by default inferred.
        default_output_tokens: output length of prompts that come without one.
        max_rows: read no more than so many requests.

    Raises:
        BadInput: the file cannot be read, or a row is wrong; file, line and field are told.
    """
    source = Source(Path(path))
    source.check()
    name = format.lower().replace("-", "_") if format else detect_format(source)
    counts: Counter[str] = Counter()
    unit = 1e-3 if time_unit == "ms" else 1.0
    rows: Iterable[WorkloadRow]
    match name:
        case "azure":
            rows = read_azure(source, counts)
        case "mooncake":
            rows = read_mooncake(source, counts)
        case "burstgpt":
            rows = read_burstgpt(source, counts)
        case "sharegpt":
            rows = read_sharegpt(source, counts)
        case "custom":
            rows = read_custom(source, counts, default_output_tokens)
        case "timed_trace":
            rows = read_timed_trace(source, counts, unit, block_tokens)
        case "openai_batch":
            rows = read_openai_batch(source, counts, default_output_tokens)
        case _:
            raise BadInput(f"{format!r} is not a workload format; known are {', '.join(FORMATS)}")
    ordered, notes = _in_order(list(cut(rows, max_rows)), counts)
    if not ordered:
        detail = "".join(f"; {note}" for note in notes)
        raise BadInput(f"{path} holds no requests{detail}")
    if name == "timed_trace" and time_unit is None:
        notes.append("timestamps were read as seconds")
    estimated = sum(row.prompt is not None for row in ordered)
    if estimated:
        notes.append(f"lengths of {estimated} texts are estimates until they are tokenised")
    grid = find_grid([row.arrival_s for row in ordered])
    if grid is not None:
        notes.append(
            f"{GRID_NOTE} of {grid:.3g} s, so each grid point is a burst that the "
            "service did not see; spreading them is advised"
        )
    return Workload(tuple(ordered), str(path), name, tuple(notes))


def _in_order(rows: list[WorkloadRow], counts: Counter[str]) -> tuple[list[WorkloadRow], list[str]]:
    notes = [f"{count} {what}" for what, count in counts.items()]
    backwards = sum(b.arrival_s < a.arrival_s for a, b in pairwise(rows))
    if backwards:
        notes.append(f"timestamps ran backwards {backwards} times; the rows were sorted")
        rows = sorted(rows, key=lambda row: row.arrival_s)
    first = rows[0].arrival_s if rows else 0.0
    if first != 0.0:
        rows = [dataclasses.replace(row, arrival_s=row.arrival_s - first) for row in rows]
    return rows, notes
