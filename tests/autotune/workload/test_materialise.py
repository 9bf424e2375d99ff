import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from autotune.errors import BadInput
from autotune.workload import Workload, WorkloadRow, make_preset, materialise, tokenise
from autotune.workload.describe import describe, fingerprint, prefix_share


class Letters:
    """One token a letter."""

    def encode(self, text: str) -> Sequence[int]:
        return [ord(letter) - ord("a") for letter in text if letter.isalpha()]


def make(*rows: WorkloadRow) -> Workload:
    return Workload(rows, "test", "custom")


def test_lengths_ids_and_times_are_the_rows() -> None:
    workload = make_preset("chat", 50, 3.0, seed=1)
    requests = materialise(workload, 512, 0, special_ids={0, 1, 511})
    assert len({request.request_id for request in requests}) == 50
    for request, row in zip(requests, workload.rows, strict=True):
        assert len(request.token_ids) == row.input_tokens
        assert request.output_tokens == row.output_tokens
        assert request.arrival_s == row.arrival_s
    used = {token for request in requests for token in request.token_ids}
    assert used == set(range(2, 511))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def test_equal_prefix_ids_give_equal_prefixes_and_others_do_not() -> None:
    rng = np.random.default_rng()
    rows = [
        WorkloadRow(
            0.0,
            int(rng.integers(1, 120)),
            1,
            prefix_ids=tuple(rng.integers(0, 2, rng.integers(0, 6)).tolist()) or None,
            prefix_block_tokens=20,
        )
        for _ in range(30)
    ]
    requests = materialise(make(*rows), 50_000, 3)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows[:i]):
            equal_ids = _common_prefix(a.prefix_ids or (), b.prefix_ids or ())
            equal = min(equal_ids * 20, a.input_tokens, b.input_tokens)
            got = _common_prefix(requests[i].token_ids, requests[j].token_ids)
            # Random tokens agree now and then: one in 50,000.
            assert equal <= got <= equal + 2


def test_a_partial_block_begins_as_the_whole_one() -> None:
    short = WorkloadRow(0.0, 25, 1, prefix_ids=(1, 2), prefix_block_tokens=20)
    long = WorkloadRow(0.0, 90, 1, prefix_ids=(1, 2, 3), prefix_block_tokens=20)
    a, b = materialise(make(short, long), 1000, 0)
    assert b.token_ids[:25] == a.token_ids


def test_the_same_in_every_process_and_not_for_another_seed() -> None:
    workload = make_preset("rag", 5, 1.0)
    here = materialise(workload, 3000, 7)
    code = (
        "import hashlib\n"
        "from autotune.workload import make_preset, materialise\n"
        "r = materialise(make_preset('rag', 5, 1.0), 3000, 7)\n"
        "print(hashlib.sha256(repr(r).encode()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    there = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == hashlib.sha256(repr(here).encode()).hexdigest()
    assert materialise(workload, 3000, 8) != here


def test_texts_are_tokenised() -> None:
    workload = make(
        WorkloadRow(0.0, 99, 99, prompt="abc", completion="deadbeef"),
        WorkloadRow(1.0, 99, 7, prompt="zz"),
        WorkloadRow(2.0, 3, 4),
    )
    counted = tokenise(workload, Letters())
    assert [(row.input_tokens, row.output_tokens) for row in counted.rows] == [
        (3, 8),
        (2, 7),
        (3, 4),
    ]
    assert counted.rows[0].token_ids == (0, 1, 2)
    assert "2 texts were tokenised" in counted.notes[0]
    assert tokenise(counted, Letters()) is counted
    requests = materialise(workload, 26, 0, Letters())
    assert requests[1].token_ids == (25, 25)
    assert requests == materialise(counted, 26, 0)
    with pytest.raises(BadInput, match="request 0 of the workload is a text"):
        materialise(workload, 26, 0)
    with pytest.raises(BadInput, match="has no tokens"):
        materialise(make(WorkloadRow(0.0, 1, 1, prompt="...")), 26, 0, Letters())


def test_recorded_token_ids_must_be_in_the_vocabulary() -> None:
    workload = make(WorkloadRow(0.0, 2, 1, token_ids=(4, 9)))
    assert materialise(workload, 10, 0)[0].token_ids == (4, 9)
    with pytest.raises(BadInput, match="token id 9; the model's vocabulary ends at 8"):
        materialise(workload, 9, 0)
    with pytest.raises(BadInput, match="too few ordinary tokens"):
        materialise(workload, 10, 0, special_ids=range(9))


def test_long_rows_are_clipped() -> None:
    requests = materialise(make_preset("summarize", 40, 1.0), 100, 0, max_model_len=128)
    assert all(len(r.token_ids) + r.output_tokens <= 128 for r in requests)
    assert any(len(r.token_ids) + r.output_tokens == 128 for r in requests)


def test_huge_and_negative_prefix_ids() -> None:
    rows = [
        WorkloadRow(0.0, 8, 1, prefix_ids=(10**40, -5), prefix_block_tokens=4),
        WorkloadRow(0.0, 8, 1, prefix_ids=(10**40, 5), prefix_block_tokens=4),
    ]
    a, b = materialise(make(*rows), 10_000, 0)
    assert _common_prefix(a.token_ids, b.token_ids) == 4


def test_describe() -> None:
    rows = (
        WorkloadRow(0.0, 20, 5, prefix_ids=(1, 2), prefix_block_tokens=8),
        WorkloadRow(1.0, 10, 5, prefix_ids=(1, 2), prefix_block_tokens=8),
        # The same block after another one is no prefix in common.
        WorkloadRow(4.0, 30, 20, prefix_ids=(2, 1), prefix_block_tokens=8),
        WorkloadRow(6.0, 40, 10),
    )
    got = describe(make(*rows), {"rate": 2.0})
    assert got["requests"] == 4
    assert got["duration_s"] == 6.0
    assert got["rate"] == 0.5
    assert got["scaling"] == {"rate": 2.0, "lengths": None, "slice": None, "notes": []}
    assert got["input_tokens"] == {"mean": 25.0, "p50": 25.0, "p95": pytest.approx(38.5), "max": 40}
    assert got["output_tokens"]["max"] == 20
    assert got["prefix_share"] == 10 / 100
    empty = describe(make())
    assert empty["input_tokens"]["mean"] is None
    assert empty["prefix_share"] == 0.0


def test_a_partial_block_does_not_hide_the_whole_one_before_it() -> None:
    whole, partial = (
        WorkloadRow(0.0, tokens, 1, prefix_ids=(1,), prefix_block_tokens=16) for tokens in (16, 4)
    )
    assert prefix_share(make(whole, partial, whole)) == (4 + 16) / 36
    assert prefix_share(make(partial, whole, whole)) == (4 + 16) / 36


def test_the_fingerprint_is_of_what_is_sent() -> None:
    row = WorkloadRow(0.0, 20, 5)
    same = Workload((row,), "elsewhere", "azure", ("a note",))
    assert fingerprint(make(row)) == fingerprint(same)
    others = [
        WorkloadRow(0.1, 20, 5),
        WorkloadRow(0.0, 21, 5),
        WorkloadRow(0.0, 20, 6),
        WorkloadRow(0.0, 20, 5, prompt="x"),
        WorkloadRow(0.0, 20, 5, prefix_ids=(1,), prefix_block_tokens=4),
        WorkloadRow(0.0, 20, 5, token_ids=(1,)),
    ]
    prints = {fingerprint(make(other)) for other in [row, *others]}
    assert len(prints) == 7


def test_prefix_share_agrees_with_comparing_the_tokens() -> None:
    workload = make_preset("agent", 30, 1.0, seed=2)
    requests = materialise(workload, 60_000, 0)
    shared = 0
    for index, request in enumerate(requests):
        shared += max(
            (_common_prefix(request.token_ids, other.token_ids) for other in requests[:index]),
            default=0,
        )
    total = sum(len(request.token_ids) for request in requests)
    # Random tokens agree by chance now and then.
    assert prefix_share(workload) == pytest.approx(shared / total, abs=1e-3)
