"""Finished runs read again: which trial, what of the machine is known, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from autotune import profile_records as module
from autotune.embedded import TARGET
from autotune.errors import BadInput
from autotune.hardware.detect import describe_hardware
from autotune.profile_records import profile_records
from autotune.profiling.file import read_profile, write_profile
from autotune.profiling.machine import MachineCalibration
from autotune.profiling.schema import (
    AttentionProbe,
    Ceilings,
    Gpu,
    GpuSample,
    LinearProbe,
    Probes,
)
from autotune.records import SCHEMA_VERSION, RequestRecord, RunFolder, TrialRecord
from engine.config import EngineConfig
from engine.step_record import StepRecord

CONFIG = EngineConfig(model=str(TARGET), device="cpu")
MACHINE = MachineCalibration(
    Ceilings(
        bandwidth=2e10,
        working_set_bandwidth=4e10,
        matmul={"bfloat16": 1e12},
        compute_dtype="bfloat16",
        ridge=25.0,
    ),
    Probes(
        linears=[
            LinearProbe(method="none", rows=[1, 64], layers_s=[1e-3, 2e-3], head_s=[1e-4, 2e-4])
        ],
        attention=[
            AttentionProbe(
                kv_cache_dtype="auto",
                sequences=[1, 1, 8, 8],
                contexts=[64, 256, 64, 256],
                seconds=[1e-4, 2e-4, 4e-4, 9e-4],
                chunk_tokens=[16, 64],
                chunk_contexts=[16, 64],
                chunk_seconds=[1e-4, 3e-4],
            )
        ],
    ),
)


def requests(trial: int, count: int = 30) -> list[RequestRecord]:
    return [
        RequestRecord(
            f"{trial}-{i:02}", 0.1 * i, 0.1 * i, (0.1 * i + 0.05, 0.1 * i + 0.06), 8, 2, 2,
            "finished", first_scheduled=0.1 * i + 0.01,
        )
        for i in range(count)
    ]  # fmt: skip


def steps(count: int = 60) -> list[StepRecord]:
    return [
        StepRecord(
            start=0.05 * i, prefill_tokens=0 if i % 2 else 8, prefill_sequences=1 - i % 2,
            decode_sequences=i % 2, kv_tokens_read=9, device_seconds=0.01, host_seconds=0.001,
            scheduler_seconds=0.0005, queue_length=0, running=1, blocks_used=1, blocks_cached=0,
            blocks_total=100, preemptions=0, prefix_hit_tokens=0, drafted_tokens=0,
            accepted_tokens=0, prefill_kv_tokens_read=0 if i % 2 else 8,
            prefill_pairs=0 if i % 2 else 36, sampled_sequences=1, used_tokens=9,
        )
        for i in range(count)
    ]  # fmt: skip


def metrics(ttft: float) -> dict[str, Any]:
    values = dict.fromkeys(("mean", "p50", "p90", "p95", "p99"), ttft)
    return dict.fromkeys(("ttft", "tpot", "itl", "e2e"), values) | {
        "duration_s": 3.0, "output_tokens_per_s": 20.0, "requests_per_s": 10.0,
        "completed": 30, "failed": 0, "slo_attainment": 1.0, "load_delivered": True,
    }  # fmt: skip


def trial(number: int, source: str, **changed: Any) -> TrialRecord:
    values: dict[str, Any] = {
        "kind": "search",
        "config": CONFIG.replace(max_num_seqs=8 * (1 + number)).to_dict(),
        "outcome": "ok",
        "metrics": metrics(0.1 * (number + 1)),
    }
    return TrialRecord(
        number=number,
        source=source,
        seconds=3.0,
        started_at="2026-01-01T00:00:00+00:00",
        **{**values, **changed},
    )


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """A search: a calibration, the default, a crash, a better one, and a proof."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for record in (
        trial(0, "default", kind="calibration"),
        trial(1, "default"),
        trial(2, "sampler", outcome="crash", reason="boom", metrics=None),
        trial(3, "sampler"),
        trial(4, "default", kind="proof"),
    ):
        folder.append_trial(record)
        if record.metrics is not None:
            folder.write_part(record.number, requests(record.number), steps())
    folder.merge_parts()
    folder.write_json(
        folder.run_json,
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "run",
            "engine_config": CONFIG.to_dict(),
            "hardware": describe_hardware("cpu"),
            "options": {"slo": "ttft<300ms", "price": 1.5},
            "workload": {"format": "preset"},
            "result": {"winner_trials": [3]},
        },
    )
    return folder.path


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """What `autotune bench -o` leaves."""
    folder = RunFolder(tmp_path / "bench")
    folder.path.mkdir()
    folder.write_part(0, requests(0), steps())
    folder.merge_parts()
    folder.write_json(folder.path / "bench.json", metrics(0.25))
    folder.write_json(
        folder.run_json,
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "bench",
            "engine_config": CONFIG.to_dict(),
            "slo": "ttft<500ms",
            "hardware": describe_hardware("cpu"),
            "notes": ["of the bench"],
        },
    )
    return folder.path


def test_default_trial_of_a_search_is_read_and_others_are_named(search: Path) -> None:
    outcome = profile_records(search)
    profile = outcome.profile
    assert (profile.source.kind, profile.source.trial) == ("records", 1)
    assert profile.engine_config is not None
    assert profile.engine_config["max_num_seqs"] == 16
    assert profile.metrics is not None
    assert profile.metrics["ttft"]["p95"] == pytest.approx(0.2)
    assert profile.price == 1.5
    assert "300ms" in str(profile.slo).replace(" ", "")
    assert profile.notes[0] == (
        "read was trial 1, the default config; --trial chooses another, for instance 3 of the "
        "winner"
    )


def test_trial_that_is_asked_for_is_read(search: Path) -> None:
    outcome = profile_records(search, trial=3, slo="ttft<1s", price=9.0)
    assert outcome.profile.source.trial == 3
    assert outcome.config is not None
    assert outcome.config.max_num_seqs == 32
    assert outcome.evidence is not None
    assert {r.request_id[0] for r in outcome.evidence.requests} == {"3"}
    assert outcome.profile.price == 9.0


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (2, "--trial 2 measured nothing: crash, boom"),
        (9, "has no such trial; measured were 0, 1, 3, 4"),
    ],
)
def test_trial_that_cannot_be_read_is_refused(search: Path, number: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        profile_records(search, trial=number)


def test_records_that_are_gone_are_told(search: Path) -> None:
    (search / "requests.parquet").unlink()
    with pytest.raises(BadInput, match=r"no records of trial 1.*requests\.parquet"):
        profile_records(search)


def test_folder_of_a_bench_is_read_with_its_metrics_and_notes(bench: Path) -> None:
    profile = profile_records(bench).profile
    assert profile.source.trial == 0
    assert profile.metrics is not None
    assert profile.metrics["ttft"]["p50"] == 0.25
    assert profile.notes[0] == "of the bench"
    assert profile.traffic.requests == 30
    with pytest.raises(BadInput, match="holds one measurement, trial 0"):
        profile_records(bench, trial=1)


def test_profile_joins_the_records_and_replaces_no_other(bench: Path) -> None:
    first = profile_records(bench)
    assert read_profile(bench) == first.profile
    second = profile_records(bench, slo="ttft<1s")
    assert second.profile.slo != first.profile.slo
    assert read_profile(bench) == first.profile


def test_output_folder_is_whole_and_can_be_read_again(bench: Path, tmp_path: Path) -> None:
    outcome = profile_records(bench, output=tmp_path / "copy")
    assert not (bench / "profile.json").exists()
    again = profile_records(tmp_path / "copy")
    assert again.profile.phases == outcome.profile.phases
    assert again.profile.traffic == outcome.profile.traffic
    assert again.profile.metrics == outcome.profile.metrics


def test_without_a_calibration_shares_of_the_ceilings_are_told_unknown(bench: Path) -> None:
    profile = profile_records(bench).profile
    assert profile.ceilings is None
    assert profile.probes is None
    assert any("not calibrated" in text for text in profile.partial)
    assert any("--calibrate measures it" in text for text in profile.notes)


def test_machine_and_samples_that_the_folder_knows_are_used_again(bench: Path) -> None:
    known = profile_records(bench).profile
    gpu = Gpu(samples=[GpuSample(at_s=0.0, index=0, power_watts=300.0)], interval_s=0.1)
    write_profile(
        bench / "profile.json",
        known.model_copy(
            update={"ceilings": MACHINE.ceilings, "probes": MACHINE.probes, "gpu": gpu}
        ),
    )
    profile = profile_records(bench).profile
    assert profile.ceilings == MACHINE.ceilings
    assert profile.probes == MACHINE.probes
    assert profile.gpu == gpu


def test_limits_that_were_measured_with_other_threads_are_not_used(search: Path) -> None:
    profile_records(search)
    known = read_profile(search)
    calibrated = {"ceilings": MACHINE.ceilings, "probes": MACHINE.probes}
    write_profile(search / "profile.json", known.model_copy(update=calibrated))
    assert profile_records(search, trial=3).profile.ceilings == MACHINE.ceilings
    other = {**(known.engine_config or {}), "num_threads": 7}
    update = {**calibrated, "engine_config": other}
    write_profile(search / "profile.json", known.model_copy(update=update))
    profile = profile_records(search, trial=3).profile
    assert profile.ceilings is profile.probes is None
    assert any("measured with num_threads=7, and this trial had" in t for t in profile.partial)
    assert not any("--calibrate measures it" in text for text in profile.notes)


def test_profile_of_another_version_is_left_alone_and_named(bench: Path, tmp_path: Path) -> None:
    known = profile_records(bench).profile
    old = known.model_copy(update={"profile_version": 0, "ceilings": MACHINE.ceilings})
    write_profile(bench / "profile.json", old)
    before = (bench / "profile.json").read_bytes()
    profile = profile_records(bench).profile
    assert profile.ceilings is None
    (told,) = [text for text in profile.partial if "earlier profile" in text]
    assert "has profile version 0" in told
    assert "stays as it is, and -o keeps this one" in told
    assert (bench / "profile.json").read_bytes() == before
    kept = profile_records(bench, output=tmp_path / "new").profile
    (told,) = [text for text in kept.partial if "earlier profile" in text]
    assert "stays as it is" not in told
    assert read_profile(tmp_path / "new") == kept


def test_calibration_measures_this_machine_for_the_runs_model(
    bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[EngineConfig] = []

    def calibrated(loaded: Any, config: EngineConfig, *_: Any) -> tuple[Any, list[str]]:
        asked.append(config)
        return MACHINE, ["roughly"]

    monkeypatch.setattr(module, "calibrated", calibrated)
    profile = profile_records(bench, calibrate=True).profile
    assert profile.probes == MACHINE.probes
    assert "roughly" in profile.partial
    assert asked == [CONFIG]


def test_calibration_on_another_machine_is_refused(bench: Path) -> None:
    folder = RunFolder(bench)
    run = folder.read_run()
    folder.write_json(folder.run_json, {**run, "hardware": {"name": "Another Machine"}})
    with pytest.raises(BadInput, match="was measured on Another Machine, and this is"):
        profile_records(bench, calibrate=True)
    assert profile_records(bench).profile.hardware == {"name": "Another Machine"}


def test_model_that_is_not_here_leaves_the_times(bench: Path) -> None:
    folder = RunFolder(bench)
    run = folder.read_run()
    config = {**run["engine_config"], "model": "/nowhere/at/all"}
    folder.write_json(folder.run_json, {**run, "engine_config": config})
    profile = profile_records(bench).profile
    assert profile.model is None
    assert profile.phases
    assert any("the model is not here" in text for text in profile.partial)


def test_config_of_another_release_is_refused(bench: Path) -> None:
    folder = RunFolder(bench)
    run = folder.read_run()
    folder.write_json(folder.run_json, {**run, "engine_config": {"no_such_knob": 1}})
    with pytest.raises(BadInput, match=r"config of another release.*no_such_knob"):
        profile_records(bench)


def test_records_of_an_earlier_release_still_give_a_profile(bench: Path) -> None:
    folder = RunFolder(bench)
    early = [dataclasses.replace(r, first_scheduled=None) for r in requests(0)]
    folder.requests_parquet.unlink()
    folder.steps_parquet.unlink()
    folder.write_part(0, early, steps())
    folder.merge_parts()
    profile = profile_records(bench).profile
    assert profile.traffic.requests == 30
    assert profile.queueing.wait is None
