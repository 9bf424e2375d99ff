import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from autotune.workload.read import read_workload
from autotune.workload.source import Source

Write = Callable[[str | bytes], Path]


def test_sharegpt_streams_across_chunks(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = [
        {"from": "human", "value": 'quotes " and ] and , in a text, é 漢'},
        {"from": "gpt", "value": "{ [ é"},
    ]
    elements = [{"id": str(i), "conversations": conversation} for i in range(50)]
    path = write(json.dumps(elements, ensure_ascii=False))
    whole = read_workload(path).rows
    for size in (1, 7, 1000):
        monkeypatch.setattr("autotune.workload.source._CHUNK_BYTES", size)
        assert read_workload(path).rows == whole
    assert len(whole) == 50
    lines = "\n".join(json.dumps(element) for element in elements)
    assert read_workload(write(lines)).rows == whole


def test_a_long_array_is_never_in_memory_as_a_whole(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(json.dumps([{"conversations": [], "filler": "x" * 200}] * 5000))
    monkeypatch.setattr("autotune.workload.source._CHUNK_BYTES", 4096)
    elements = Source(path).json_elements()
    next(elements)
    tracemalloc.start()
    try:
        count = sum(1 for _ in elements)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 4999
    assert peak < 100_000 < path.stat().st_size // 10


def test_halves_of_surrogate_pairs_become_encodable(write: Write) -> None:
    text = (
        '{"prompt": "a\\ud800b", "completion": "\\udc00", "session_id": "\\ud800"}\n'
        '{"conversations": [{"from": "human", "value": "\\ud800"}, '
        '{"from": "gpt", "value": "\\ud800"}]}\n'
    )
    custom, sharegpt = text.splitlines()
    (row,) = read_workload(write(custom)).rows
    assert (row.prompt, row.completion, row.session_id) == ("a?b", "?", "?")
    (row,) = read_workload(write(sharegpt)).rows
    assert (row.prompt, row.completion) == ("?", "?")
