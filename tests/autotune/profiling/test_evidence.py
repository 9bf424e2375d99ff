"""The records of a load and its prompts, as a run folder holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotune.errors import BadInput
from autotune.profiling.evidence import read_evidence, synthetic_prompts
from autotune.records import SCHEMA_VERSION, RunFolder, TrialRecord
from autotune.search.windows import write_windows
from autotune.workload.materialise import LoadRequest
from tests.autotune.profiling.loads import request, step


def window(first: int, lengths: list[int]) -> list[LoadRequest]:
    """Requests of such prompt lengths, whose tokens begin with `first`."""
    return [LoadRequest(str(i), float(i), (first,) * n, 2) for i, n in enumerate(lengths)]


def trial(number: int, kind: Any, round_: int = 0) -> TrialRecord:
    return TrialRecord(
        number=number,
        kind=kind,
        source="",
        config={},
        outcome="ok",
        seconds=1.0,
        started_at="",
        round=round_,
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.write_json(
        folder.run_json, {"schema_version": SCHEMA_VERSION, "workload": {"format": "preset"}}
    )
    return folder


def put(folder: RunFolder, number: int, lengths: list[int]) -> None:
    records = [
        request(str(i), intended_send=float(i), send=float(i), input_tokens=n)
        for i, n in enumerate(lengths)
    ]
    folder.write_part(number, records, [step(0.0, 1.0), step(1.0, 2.0)])


def test_each_trial_has_the_window_that_it_was_offered(folder: RunFolder) -> None:
    write_windows(folder, [window(w, [3, 4 + w]) for w in range(3)])
    for number, kind, round_, w in (
        (0, "search", 0, 0),
        (1, "proof", 0, 1),
        (2, "proof", 1, 2),
        (3, "proof", 2, 1),
    ):
        folder.append_trial(trial(number, kind, round_))
        put(folder, number, [3, 4 + w])
        found = read_evidence(folder, number)
        assert found.prompts == {"0": (w,) * 3, "1": (w,) * (4 + w)}
        assert [s.start for s in found.steps] == [0.0, 1.0]
        assert found.synthetic_prompts is True


def test_the_calibrations_window_is_gone(folder: RunFolder) -> None:
    write_windows(folder, [window(0, [3])])
    folder.append_trial(trial(0, "calibration"))
    put(folder, 0, [3])
    assert read_evidence(folder, 0).prompts == {}


def test_a_window_of_other_lengths_is_not_this_trials(folder: RunFolder) -> None:
    write_windows(folder, [window(0, [3, 4])])
    put(folder, 0, [3, 5])
    assert read_evidence(folder, 0).prompts == {}


def test_requests_that_were_not_sent_leave_their_prompts_out(folder: RunFolder) -> None:
    write_windows(folder, [window(0, [3, 4])])
    put(folder, 0, [3])
    assert read_evidence(folder, 0).prompts == {"0": (0, 0, 0)}


@pytest.mark.parametrize("content", [None, b"", b"not a table"])
def test_without_windows_or_with_damaged_ones_records_are_still_read(
    folder: RunFolder, content: bytes | None
) -> None:
    if content is not None:
        (folder.path / "workload.parquet").write_bytes(content)
    put(folder, 0, [3])
    found = read_evidence(folder, 0)
    assert found.prompts == {}
    assert len(found.requests) == 1


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no run"):
        read_evidence(RunFolder(tmp_path), 0)


@pytest.mark.parametrize(
    ("workload", "made_up"),
    [
        ({"format": "preset"}, True),
        ({"format": "azure"}, True),
        ({"format": "sharegpt"}, False),
        ({"format": "custom"}, False),
        ({}, None),
        (None, None),
    ],
)
def test_traces_of_lengths_have_made_up_prompts(workload: Any, made_up: bool | None) -> None:
    assert synthetic_prompts(workload) is made_up
