"""Windows on disk, and a process that reads them while they are replaced."""

from __future__ import annotations

from pathlib import Path

from autotune.records import RunFolder
from autotune.search.windows import WindowReader, read_windows, write_windows
from autotune.workload.materialise import LoadRequest


def window(first: int, size: int = 3) -> list[LoadRequest]:
    return [
        LoadRequest(f"{i}", 0.5 * i, (first + i, 7), 4, "s" if i else None) for i in range(size)
    ]


def test_windows_come_back_as_they_were(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_windows(folder, [window(10), window(20, 1)])
    read = read_windows(folder)
    assert [[(r.arrival_s, tuple(r.token_ids), r.session_id) for r in w] for w in read] == [
        [(r.arrival_s, r.token_ids, r.session_id) for r in w] for w in (window(10), window(20, 1))
    ]


def test_reader_sees_the_windows_that_replaced_those_it_had_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_windows(folder, [window(10)])
    reader = WindowReader(folder)
    assert reader.window(0)[0].token_ids[0] == 10
    write_windows(folder, [window(30), window(40)])
    assert reader.window(0)[0].token_ids[0] == 30
    assert reader.window(1)[0].token_ids[0] == 40
