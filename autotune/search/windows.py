"""The pieces of the workload that the search measures with, as they lie in the run folder.

Window 0 is what the search sees. The proof uses the windows after it, which no trial was chosen by,
so that the winner is not merely the one that suited a particular stretch of traffic.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from autotune.records import RunFolder
from autotune.workload.materialise import LoadRequest

_SCHEMA = pa.schema(
    [
        ("window", pa.int32()),
        ("request_id", pa.string()),
        ("arrival_s", pa.float64()),
        ("token_ids", pa.list_(pa.int32())),
        ("output_tokens", pa.int32()),
        ("session_id", pa.string()),
    ]
)
_FIELDS = tuple(name for name in _SCHEMA.names if name != "window")


def write_windows(folder: RunFolder, windows: list[list[LoadRequest]]) -> None:
    """Put the windows on disk, so that the run does not depend on the workload file any more."""
    rows = [
        {"window": index, **{name: getattr(request, name) for name in _FIELDS}}
        for index, window in enumerate(windows)
        for request in window
    ]
    path = folder.path / "workload.parquet"
    temporary = path.with_name(".workload.parquet.part")
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), temporary, compression="zstd")
    temporary.replace(path)


def read_windows(folder: RunFolder) -> list[list[LoadRequest]]:
    """The windows that `write_windows` wrote, each in order of arrival."""
    windows: list[list[LoadRequest]] = []
    for row in pq.read_table(folder.path / "workload.parquet").to_pylist():
        while len(windows) <= row["window"]:
            windows.append([])
        windows[row["window"]].append(LoadRequest(**{name: row[name] for name in _FIELDS}))
    return windows
