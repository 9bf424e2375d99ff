"""A load on the real engine, profiled: what is measured, kept, and said where something lacks."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune import profile_run
from autotune.errors import BadInput, Interrupted
from autotune.profile_outcome import ProfileOutcome
from autotune.profile_records import profile_records
from autotune.profile_run import profile
from autotune.profiling.evidence import read_evidence
from autotune.profiling.file import read_profile
from autotune.profiling.gpu_sampler import GpuSampler
from autotune.profiling.trace_steps import TraceSteps
from autotune.records import RunFolder
from autotune.slo import parse_slo
from autotune.traffic_options import TrafficOptions
from engine.errors import EnvironmentLacks
from tests.autotune.profiling.test_gpu_sampler import FakeNvml

KNOBS = {"device": "cpu", "num_threads": 1, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 26}
# Short prompts and answers: what is tested is what becomes of the records, not the model's speed.
TRAFFIC = TrafficOptions(rate=30.0, length_factor=0.03, duration_s=1.0)
SLO = "ttft<200ms,tpot<100ms"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProfileOutcome, Path, list[str]]:
    """One whole profile, its folder, and what was said meanwhile."""
    path = tmp_path_factory.mktemp("profile") / "out"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_run, "CALIBRATION_BUDGET_S", 0.5)
        outcome = profile(
            {**KNOBS, "seed": 3},
            TRAFFIC,
            slo=SLO,
            price=2.0,
            trace=TraceSteps(2, 4),
            output=path,
            command=["autotune", "profile"],
            say=said.append,
        )
    return outcome, path, said


def test_profile_tells_of_the_load_and_the_machine(
    done: tuple[ProfileOutcome, Path, list[str]],
) -> None:
    found = done[0].profile
    assert found.source.kind == "run"
    assert found.traffic.requests == found.traffic.completed == 30
    assert found.metrics is not None
    assert found.metrics["completed"] == 30
    assert found.slo is not None
    assert str(parse_slo(found.slo)) == str(parse_slo(SLO))
    assert sum(phase.share for phase in found.phases) == pytest.approx(1.0)
    assert found.model is not None
    assert found.ceilings is not None
    assert found.ceilings.ridge > 0
    assert found.probes is not None
    assert found.step_fit is not None
    assert found.gpu is None, "there is no GPU in this load"
    for breakdown in found.breakdowns:
        assert sum(breakdown.parts.values()) == pytest.approx(1.0)
    assert not done[0].interrupted


def test_folder_holds_what_the_outcome_tells(
    done: tuple[ProfileOutcome, Path, list[str]],
) -> None:
    outcome, path, _ = done
    folder = RunFolder(path)
    assert read_profile(path) == outcome.profile
    assert json.loads(folder.diagnosis_json.read_text()) == json.loads(
        json.dumps(outcome.diagnosis.to_json())
    )
    run = folder.read_run()
    assert (run["kind"], run["status"], run["seeds"]) == ("profile", "done", {"seed": 3})
    assert run["command"] == ["autotune", "profile"]
    assert run["engine_config"]["max_num_seqs"] == 8
    assert run["price"] == 2.0
    assert not folder.parts.exists()


def test_records_on_disk_are_the_evidence_again(
    done: tuple[ProfileOutcome, Path, list[str]],
) -> None:
    outcome, path, _ = done
    assert outcome.evidence is not None
    again = read_evidence(RunFolder(path), 0)
    assert list(again.requests) == list(outcome.evidence.requests)
    assert list(again.steps) == list(outcome.evidence.steps)
    assert again.prompts == outcome.evidence.prompts
    assert again.synthetic_prompts is outcome.evidence.synthetic_prompts is True


def test_trace_is_beside_the_profile_and_did_not_enter_it(
    done: tuple[ProfileOutcome, Path, list[str]],
) -> None:
    outcome, path, _ = done
    assert outcome.trace == path / "trace.json"
    events = json.loads(outcome.trace.read_text())["traceEvents"]
    assert {e["name"] for e in events if str(e.get("name")).startswith("step ")} == {
        *("step 2", "step 3", "step 4")
    }
    assert outcome.evidence is not None
    assert len(outcome.evidence.requests) == 30
    assert RunFolder(path).read_run()["trace"] == "trace.json"


def test_progress_names_each_stage_in_turn(
    done: tuple[ProfileOutcome, Path, list[str]],
) -> None:
    stages = list(dict.fromkeys(text.partition(":")[0] for text in done[2]))
    assert stages[:2] == ["loading the model", "measuring"]
    assert stages[-2:] == ["tracing", "reading the records"]
    assert any("linear layers" in stage for stage in stages)


def quick(**changed: Any) -> ProfileOutcome:
    return profile(KNOBS, TRAFFIC, **{"slo": SLO, "calibrate": False, **changed})


def test_interrupted_load_keeps_what_was_measured_and_says_so(tmp_path: Path) -> None:
    stop = threading.Event()

    def say(text: str) -> None:
        if text.startswith("measuring: ") and not text.startswith("measuring: 0/"):
            stop.set()

    path = tmp_path / "out"
    outcome = quick(calibrate=True, output=path, say=say, stop=stop, trace=TraceSteps(0, 1))
    assert outcome.interrupted
    assert any("was interrupted" in text for text in outcome.profile.partial)
    assert any(text.startswith("no trace was written") for text in outcome.profile.partial)
    assert outcome.profile.probes is None
    assert RunFolder(path).read_run()["status"] == "interrupted"
    assert RunFolder(path).read_requests(0)
    assert read_profile(path) == outcome.profile


def test_interrupted_before_the_load_leaves_no_folder(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        quick(output=tmp_path / "deep" / "out", stop=stop)
    assert not list(tmp_path.iterdir())


def test_folder_in_use_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("keep")
    monkeypatch.setattr(profile_run, "prepare_load", None)  # would fail if it were called
    with pytest.raises(BadInput, match="exists and is not empty"):
        quick(output=tmp_path)
    assert (tmp_path / "mine").read_text() == "keep"


@pytest.mark.parametrize(
    "error", [EnvironmentLacks("no room for it"), torch.OutOfMemoryError("no room for it\nmore")]
)
def test_machine_that_cannot_be_measured_leaves_the_rest(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(profile_run, "calibrate_machine", fail)
    outcome = quick(calibrate=True)
    assert "the machine's limits were not measured: no room for it" in outcome.profile.partial
    assert outcome.profile.phases
    assert not outcome.interrupted


def test_load_outlives_a_fault_in_what_follows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(profile_run, "calibrate_machine", fail)
    with pytest.raises(ZeroDivisionError):
        quick(calibrate=True, output=tmp_path / "out", price=3.0)
    assert RunFolder(tmp_path / "out").read_run()["status"] == "unfinished"
    found = profile_records(tmp_path / "out").profile
    assert found.traffic.completed == 30
    assert found.metrics is not None
    assert found.metrics["completed"] == 30
    assert found.price == 3.0


def test_interrupt_ends_the_calibration_between_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def calibrate(*_: Any, say: Any, **__: Any) -> None:
        stop.set()
        say("the next part")
        raise AssertionError("went on")

    monkeypatch.setattr(profile_run, "calibrate_machine", calibrate)
    outcome = quick(calibrate=True, stop=stop)
    assert outcome.interrupted
    assert any("limits were not measured" in text for text in outcome.profile.partial)
    assert outcome.profile.traffic.completed == 30


def test_gpus_are_sampled_from_the_beginning_of_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(reasons=(0x4,))
    sampler = GpuSampler(["GPU-aaaa"], interval_s=0.01, nvml=nvml)
    monkeypatch.setattr(profile_run, "_sampler", lambda _: sampler)
    gpu = quick().profile.gpu
    assert gpu is not None
    assert gpu.throttled_share == 1.0
    # Times count from the first arrival: the load is made ready a moment before.
    assert -1.0 < gpu.samples[0].at_s < 0.5
    assert gpu.samples[-1].at_s > 0.8
    assert nvml.open == 0


def test_absent_nvml_is_a_sentence_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = GpuSampler(["GPU-aaaa"], nvml=FakeNvml(broken=("nvmlInit",)))
    monkeypatch.setattr(profile_run, "_sampler", lambda _: sampler)
    found = quick().profile
    assert found.gpu is None
    (lack,) = [text for text in found.partial if "not sampled" in text]
    assert "nvmlInit is not supported" in lack


def test_trace_beyond_the_load_does_not_cost_the_profile(tmp_path: Path) -> None:
    outcome = quick(output=tmp_path / "out", trace=TraceSteps(900, 910))
    assert outcome.trace is None
    assert any("begins after the load's last step" in text for text in outcome.profile.partial)
    assert not (tmp_path / "out" / "trace.json").exists()


def test_profile_is_offered_by_the_package() -> None:
    import autotune

    assert autotune.profile is profile


def test_a_load_that_drafts_tells_what_was_accepted_as_its_answers_do(tmp_path: Path) -> None:
    drafting = {"speculative_method": "ngram", "speculative_adaptive": False}
    traffic = TrafficOptions(rate=30.0, length_factor=0.1, duration_s=1.0)
    path = tmp_path / "out"
    outcome = profile({**KNOBS, **drafting}, traffic, slo=SLO, calibrate=False, output=path)
    found = outcome.profile.measured_speculation
    assert found is not None
    steps, requests = RunFolder(path).read_steps(0), RunFolder(path).read_requests(0)
    assert found.decodes == sum(step.decode_sequences for step in steps)
    # Every token but a request's first is a decode's own or an accepted one.
    answered = sum(request.output_tokens - 1 for request in requests)
    assert found.decodes + found.accepted_tokens == answered
    assert found.accepted_tokens == sum(position.accepted for position in found.positions) > 0
    assert found.drafted_tokens == sum(position.drafted for position in found.positions)
    # Tokens of one step come at one moment.
    moments = sum(len(set(request.token_times)) - 1 for request in requests)
    assert found.tokens_per_step.value == pytest.approx(answered / moments)
    assert all(step.draft_seconds <= step.host_seconds for step in steps)
    assert found.draft_seconds == pytest.approx(sum(step.draft_seconds for step in steps))
    # The dry run goes by the same rule along the same tokens.
    dry_run = outcome.profile.speculation
    assert dry_run is not None
    assert dry_run.tokens_per_step[4] == pytest.approx(found.tokens_per_step.value)
    metrics = outcome.profile.metrics
    assert metrics is not None
    assert metrics["speculation"]["drafted_tokens"] == found.drafted_tokens
    again = profile_records(path).profile
    assert again.measured_speculation == found
