"""The pieces of the workload that the search measures with, as they lie in the run folder.

Window 0 is what the search sees. The proof uses the windows after it, which no trial was chosen by,
so that the winner is not merely the one that suited a particular stretch of traffic.
"""

from __future__ import annotations

from pathlib import Path

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


class WindowReader:
    """The windows on disk as they are now: the calibration's are replaced by the search's.

    Args:
        folder: the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._read: tuple[int, int] | None = None
        self._windows: list[list[LoadRequest]] = []

    def window(self, index: int) -> list[LoadRequest]:
        """One window, in order of arrival."""
        status = _path(self._folder).stat()
        # Each writing makes a new file, hence another inode.
        written = (status.st_ino, status.st_mtime_ns)
        if written != self._read:
            self._windows, self._read = read_windows(self._folder), written
        return self._windows[index]


def write_windows(folder: RunFolder, windows: list[list[LoadRequest]]) -> None:
    """Put the windows on disk, so that the run does not depend on the workload file any more."""
    rows = [
        {"window": index, **{name: getattr(request, name) for name in _FIELDS}}
        for index, window in enumerate(windows)
        for request in window
    ]
    path = _path(folder)
    temporary = path.with_name(".workload.parquet.part")
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), temporary, compression="zstd")
    temporary.replace(path)


def read_windows(folder: RunFolder) -> list[list[LoadRequest]]:
    """The windows that `write_windows` wrote, each in order of arrival."""
    windows: list[list[LoadRequest]] = []
    for row in pq.read_table(_path(folder)).to_pylist():
        while len(windows) <= row["window"]:
            windows.append([])
        windows[row["window"]].append(LoadRequest(**{name: row[name] for name in _FIELDS}))
    return windows


def _path(folder: RunFolder) -> Path:
    return folder.path / "workload.parquet"
