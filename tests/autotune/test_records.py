import dataclasses
import json
import math
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotune.errors import BadInput
from autotune.records import (
    SCHEMA_VERSION,
    LimitResult,
    RequestRecord,
    RunFolder,
    TrialRecord,
    write_atomically,
)
from engine.step_record import StepRecord


def request(index: int, *times: float, **changes: object) -> RequestRecord:
    values: dict[str, object] = {
        "request_id": f"r{index}",
        "intended_send": index * 0.5,
        "send": index * 0.5 + 0.001,
        "token_times": times,
        "input_tokens": 7,
        "output_tokens": len(times),
        "asked_output_tokens": 9,
        "outcome": "finished",
    }
    return RequestRecord(**{**values, **changes})  # type: ignore[arg-type]


def step(start: float) -> StepRecord:
    values = {name: index for index, name in enumerate(StepRecord.__dataclass_fields__)}
    seconds = {"start": start, "device_seconds": 0.25, "host_seconds": 0.125}
    depths = {"drafted_by_depth": (5, 3, 3), "accepted_by_depth": (4, 1, 0)}
    seconds |= {"scheduler_seconds": 0.0625, "draft_seconds": 0.03125}
    return StepRecord(**{**values, **seconds, **depths})  # type: ignore[arg-type]


def trial(number: int, **changes: object) -> TrialRecord:
    values: dict[str, object] = {
        "number": number,
        "kind": "search",
        "source": "default",
        "config": {"max_num_seqs": 8, "quantization": "none"},
        "outcome": "ok",
        "seconds": 1.5,
        "started_at": "2026-01-01T00:00:00+00:00",
        "metrics": {"ttft": {"p95": 0.1}, "note": "é\u2028漢"},
        "slo": [LimitResult("ttft<1s", 0.1, 1.0, True, -0.9)],
        "slo_met": True,
        "objective": 3.25,
    }
    return TrialRecord(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_latencies_of_a_request() -> None:
    record = request(2, 1.5, 1.75, 2.5)
    assert (record.ttft, record.e2e, record.tpot) == (0.5, 1.5, 0.5)
    assert record.completed
    single = request(0, 0.25)
    assert (single.ttft, single.e2e, single.tpot) == (0.25, 0.25, None)
    nothing = request(0, outcome="refused", reason="too long")
    assert (nothing.ttft, nothing.e2e, nothing.tpot) == (None, None, None)
    assert not nothing.completed


def test_a_trial_survives_its_line() -> None:
    for record in (trial(3), trial(0, metrics=None, slo=[], objective=None, reason="oom")):
        line = record.to_json()
        assert "\n" not in line
        assert TrialRecord.from_json(line) == record
    with pytest.raises(ValueError):
        trial(1, objective=math.nan).to_json()


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "3", "{}", '{"number": 1}', '{"slo": 3}', '{"slo": [1]}', "null"]
)
def test_what_is_no_trial_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        TrialRecord.from_json(line)


def test_trials_are_read_in_the_order_in_which_they_ended(folder: RunFolder) -> None:
    assert folder.read_trials() == []
    for number in (2, 0, 1):
        folder.append_trial(trial(number))
    assert [record.number for record in folder.read_trials()] == [2, 0, 1]
    assert folder.read_trials()[1] == trial(0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 10_000))
def test_a_torn_last_line_costs_only_itself(folder: RunFolder, cut: int) -> None:
    folder.trials_jsonl.unlink(missing_ok=True)
    for number in range(3):
        folder.append_trial(trial(number))
    content = folder.trials_jsonl.read_bytes()
    first_two = content.index(b"\n", content.index(b"\n") + 1) + 1
    at = first_two + cut % (len(content) - first_two)
    folder.trials_jsonl.write_bytes(content[:at])
    whole = at == len(content) - 1  # only the line's end is missing
    assert [t.number for t in folder.read_trials()] == [0, 1] + [2] * whole
    folder.append_trial(trial(7))
    assert [t.number for t in folder.read_trials()] == [0, 1] + [2] * whole + [7]


def test_bytes_that_are_no_text_cost_only_their_line(folder: RunFolder) -> None:
    folder.append_trial(trial(0))
    with folder.trials_jsonl.open("ab") as file:
        file.write(b"\xff\xfe\x00\n")
    folder.append_trial(trial(1))
    assert [t.number for t in folder.read_trials()] == [0, 1]


def test_parts_are_read_before_and_after_they_are_joined(folder: RunFolder) -> None:
    requests = {
        0: [request(1, 0.75, 1.25), request(0, 0.5, session_id="s", cached_tokens=4)],
        1: [],
        12: [request(0, outcome="timed_out", reason="late"), request(1, 1.0, preemptions=2)],
    }
    steps = {0: [step(0.5), step(0.25)], 1: [], 12: [step(1.0)]}
    for number in requests:
        folder.write_part(number, requests[number], steps[number])

    def check() -> None:
        for number, wanted in requests.items():
            assert folder.read_requests(number) == sorted(wanted, key=lambda r: r.intended_send)
            assert folder.read_steps(number) == sorted(steps[number], key=lambda s: s.start)
        assert folder.read_requests(5) == []

    check()
    folder.merge_parts()
    check()
    assert not folder.parts.exists()
    folder.merge_parts()
    requests[13], steps[13] = [request(4, 3.0)], [step(2.0)]
    folder.write_part(13, requests[13], steps[13])
    check()
    folder.merge_parts()
    check()


def test_steps_of_an_earlier_release_are_read_alone_and_beside_newer_ones(
    folder: RunFolder,
) -> None:
    new = dataclasses.replace(step(1.0), communication_seconds=None, drafted_by_depth=())
    folder.write_part(0, [], [step(0.0)])
    folder.merge_parts()
    later = ["drafted_by_depth", "accepted_by_depth", "draft_seconds", "used_tokens"]
    table = pq.read_table(folder.steps_parquet).drop_columns([*later, "waiting_seconds"])
    pq.write_table(table, folder.steps_parquet)
    old = dataclasses.replace(
        step(0.0),
        drafted_by_depth=(),
        accepted_by_depth=(),
        draft_seconds=0.0,
        used_tokens=0,
        waiting_seconds=0.0,
    )
    assert folder.read_steps(0) == [old]
    folder.write_part(1, [], [new])
    folder.merge_parts()
    assert folder.read_steps(1) == [new]
    # What was never measured is told apart from what is 0 only where a record may say so.
    assert folder.read_steps(0) == [dataclasses.replace(old, waiting_seconds=None)]


def test_a_crash_while_joining_doubles_and_loses_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        folder.write_part(number, [request(number, 2.0)], [step(float(number))])
    (folder.parts / ".00003.requests.parquet.part").write_bytes(b"half a fi")
    unlink = Path.unlink
    removed = 0

    def crash(path: Path, missing_ok: bool = False) -> None:
        nonlocal removed
        removed += 1
        if removed == 2:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", crash)
    with pytest.raises(KeyboardInterrupt):
        folder.merge_parts()
    monkeypatch.undo()
    for number in range(3):
        assert folder.read_requests(number) == [request(number, 2.0)]
    folder.merge_parts()
    assert not folder.parts.exists()
    for number in range(3):
        assert folder.read_requests(number) == [request(number, 2.0)]
        assert folder.read_steps(number) == [step(float(number))]


def test_a_part_is_written_whole_or_not_at_all(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_part(0, [request(0, 1.0)], [])

    def full(table: object, path: Path, **options: object) -> None:
        path.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write_part(0, [request(0, 9.0)], [])
    assert folder.read_requests(0) == [request(0, 1.0)]
    assert not [path for path in folder.parts.iterdir() if path.name.startswith(".")]


def test_run_json(folder: RunFolder) -> None:
    with pytest.raises(BadInput, match=r"holds no run: run\.json is missing"):
        folder.read_run()
    run = {"schema_version": SCHEMA_VERSION, "slo": "ttft<1s", "text": "é"}
    folder.write_json(folder.run_json, run)
    assert folder.read_run() == run
    for content, told in (
        ("{", "cannot be read"),
        ("[]", "schema version None"),
        ('{"schema_version": 99}', "schema version 99; this release reads 1"),
        ("\udcff", "cannot be read"),
    ):
        folder.run_json.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(BadInput, match=told):
            folder.read_run()
    with pytest.raises(ValueError):
        folder.write_json(folder.run_json, {"x": math.inf})


def test_write_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    assert path.stat().st_mode & 0o777 == 0o644

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"two")
    assert path.read_bytes() == b"one"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_json_is_for_any_reader(folder: RunFolder) -> None:
    folder.append_trial(trial(0))
    raw = json.loads(folder.trials_jsonl.read_text())
    assert raw["slo"][0] == {
        "limit": "ttft<1s",
        "measured": 0.1,
        "bound": 1.0,
        "met": True,
        "violation": -0.9,
    }
