"""Traces of drafts from the chunks in which answers came."""

from __future__ import annotations

import random

from autotune.predict.chunk_traces import chunk_traces, tree_traces
from autotune.records import RequestRecord


def record(name: str, chunks: list[int]) -> RequestRecord:
    times = tuple(float(at) for at, size in enumerate(chunks) for _ in range(size))
    return RequestRecord(name, 0.0, 0.0, times, 5, len(times), len(times), "finished")


def test_a_chunk_tells_which_tokens_were_right() -> None:
    """The prompt's token; two right and one wrong; none right; four right, drafted to the end."""
    (trace,) = chunk_traces([record("a", [1, 3, 1, 5, 1, 1])], drafted=4).values()
    # Tokens 1 and 2 were right, 3 and 4 wrong, 5 to 8 right, 10 wrong; 9 and 11 nobody drafted.
    assert trace.right[1:5] == (2, 1, 0, 0)
    assert trace.right[8] >= 1
    assert trace.right[5] == trace.right[8] + 3
    assert trace.right[10] == 0


def test_a_chunk_of_a_tree_tells_how_deep_it_went() -> None:
    unfinished = RequestRecord("b", 0.0, 0.0, (0.0, 1.0), 5, 9, 2, "timeout")
    traces = tree_traces([record("a", [1, 3, 1, 2]), unfinished])
    assert set(traces) == {"a"}
    assert traces["a"].right == (0, 2, 2, 2, 0, 1, 1)


def test_what_was_drafted_along_a_text_comes_out_again() -> None:
    """Chunks of made-up drafts tell in how many places these were right, and how long they were."""
    rng = random.Random(4)
    records, truth = [], []
    for number in range(40):
        outcomes = [rng.random() < 0.3 + 0.6 * (number % 2) for _ in range(200)]
        chunks, place = [1], 1
        while place < len(outcomes):
            most = min(5, len(outcomes) - place - 1)
            right = 0
            while right < most and outcomes[place + right]:
                right += 1
            chunks.append(right + 1)
            place += right + 1
        records.append(record(str(number), chunks))
        truth.append(sum(outcomes) / len(outcomes))
    found = chunk_traces(records, drafted=5)
    for name, share in zip(found, truth, strict=True):
        told = sum(right > 0 for right in found[name].right) / 200
        assert abs(told - share) < 0.08


def test_requests_without_an_answer_tell_nothing() -> None:
    failed = RequestRecord("a", 0.0, 0.0, (), 5, 0, 9, "failed", "why")
    assert chunk_traces([failed], drafted=4) == {}
