"""The child's order of work: quantize with word of it, score, and offer a load only if allowed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotune.profiling.machine import MachineCalibration
from autotune.profiling.schema import Ceilings, Probes
from autotune.records import RunFolder
from autotune.search import trial_process as module
from autotune.search.messages import (
    QUANTIZING,
    BrokeGuard,
    Failed,
    MeasureCommand,
    Measured,
    ProbeCommand,
    Probed,
    Progress,
    decode,
    encode,
)
from engine.config import EngineConfig
from engine.errors import EngineError


def command(quantization: str, *, guarded: bool) -> MeasureCommand:
    return MeasureCommand(
        trial=1,
        config=EngineConfig(model="m", quantization=quantization).to_dict(),
        window=0,
        rate_factor=1.0,
        drain_limit=1.0,
        seed=0,
        slo="ttft<1s,kl<0.02",
        guarded=guarded,
    )


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order; the divergence is 0.5 for int4 and 0 for others."""
    done: list[str] = []

    def load(config: EngineConfig, on_layer: Callable[[int, int], None]) -> Any:
        done.append("load")
        if config.quantization == "gptq":
            on_layer(1, 2)
            on_layer(2, 2)
        engine = SimpleNamespace(clear_prefix_cache=lambda: None)
        told = [] if config.calibration is None else [f"calibrated on {config.calibration}"]
        return SimpleNamespace(
            engine=lambda _: engine,
            notes=["served in floats", *told],
            failure=EngineError("rank 1 died") if config.tensor_parallel_size > 1 else None,
            close=lambda: done.append("close"),
        )

    class Meter:
        def __init__(self, _: Path) -> None:
            pass

        def measure(self, _: Any, config: EngineConfig, *, load_reference: bool) -> dict[str, Any]:
            done.append("score")
            kl = 0.5 if config.quantization == "int4" else 0.0
            return {"variant": config.quantization, "quality_loss": 0.0, "kl": kl} | {
                "top1_agreement": 1.0
            }

    def measure(*_: Any, **__: Any) -> Any:
        done.append("measure")
        return SimpleNamespace(metrics={"completed": 3}, records=[], steps=[])

    monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setattr(module, "QualityMeter", Meter)
    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "run_load", lambda *_, **__: done.append("warm-up"))
    monkeypatch.setattr(module, "at_rate", lambda *_: [])
    monkeypatch.setattr(module.WindowReader, "window", lambda *_: [])
    return done


def answers(tmp_path: Path, *commands: MeasureCommand | ProbeCommand) -> list[Any]:
    replies = io.BytesIO()
    process = module.TrialProcess(RunFolder(tmp_path), replies)
    process.serve(io.BytesIO(b"".join(encode(c) for c in commands)))
    return [decode(line) for line in replies.getvalue().splitlines()]


def test_the_quality_is_measured_before_the_load(tmp_path: Path, steps: list[str]) -> None:
    reply = answers(tmp_path, command("int8", guarded=True))[-1]
    assert steps == ["load", "score", "warm-up", "measure"]
    assert isinstance(reply, Measured)
    assert reply.metrics["kl"] == 0.0
    assert reply.metrics["quality"]["variant"] == "int8"


def test_a_broken_guard_costs_no_load(tmp_path: Path, steps: list[str]) -> None:
    reply = answers(tmp_path, command("int4", guarded=True))[-1]
    assert steps == ["load", "score"]
    assert isinstance(reply, BrokeGuard)
    assert reply.quality is not None
    assert reply.quality["kl"] == 0.5


def test_the_default_is_offered_its_load_whatever_its_quality(
    tmp_path: Path, steps: list[str]
) -> None:
    reply = answers(tmp_path, command("int4", guarded=False))[-1]
    assert steps[-1] == "measure"
    assert isinstance(reply, Measured)
    assert reply.metrics["kl"] == 0.5


def test_what_the_model_is_served_as_is_told(tmp_path: Path, steps: list[str]) -> None:
    assert answers(tmp_path, command("int8", guarded=True))[-1].notes == ["served in floats"]


def test_the_calibration_text_is_found_where_the_run_was_moved(
    tmp_path: Path, steps: list[str]
) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("text")
    asked = command("gptq", guarded=False)
    asked.config["calibration"] = str(tmp_path / "earlier" / "calibration.txt")
    assert answers(tmp_path, asked)[-1].notes[-1] == f"calibrated on {text}"
    # A file of another name is the user's own: nothing takes its place.
    asked.config["calibration"] = str(tmp_path / "earlier" / "mine.txt")
    assert answers(tmp_path, asked)[-1].notes[-1].endswith("mine.txt")


def test_quantizing_is_told_layer_by_layer(tmp_path: Path, steps: list[str]) -> None:
    told = answers(tmp_path, command("gptq", guarded=True))
    assert Progress(QUANTIZING, 1, 2) in told
    assert told.index(Progress(QUANTIZING, 2, 2)) < told.index(
        Progress("scoring the held-out text")
    )


def test_probes_use_the_model_that_is_loaded(
    tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def calibrate(
        model: Any, config: EngineConfig, facts: str, *offered: Any, budget_s: float, say: Any
    ) -> MachineCalibration:
        seen.update(facts=facts, offered=offered, budget_s=budget_s, notes=model.notes)
        say("measuring attention")
        ceilings = Ceilings(
            bandwidth=2e10,
            working_set_bandwidth=1e11,
            matmul={"bfloat16": 1e12},
            compute_dtype="bfloat16",
            ridge=10.0,
        )
        return MachineCalibration(ceilings, Probes(seconds=1.5))

    monkeypatch.setattr(module, "calibrate_machine", calibrate)
    monkeypatch.setattr(module, "model_facts", lambda config: f"facts of {config.model}")
    loaded = command("int8", guarded=False)
    probe = ProbeCommand(loaded.config, ["none", "int8"], ["auto"], 2.5)
    told = answers(tmp_path, loaded, probe)
    assert steps.count("load") == 1
    assert told[-2] == Progress("measuring attention")
    assert isinstance(told[-1], Probed)
    assert Ceilings.model_validate(told[-1].ceilings).ridge == 10.0
    assert Probes.model_validate(told[-1].probes).seconds == 1.5
    assert seen == {
        "facts": "facts of m",
        "offered": (["none", "int8"], ["auto"]),
        "budget_s": 2.5,
        "notes": ["served in floats"],
    }


def test_probes_that_fail_leave_the_model_loaded(
    tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrate(*_: Any, **__: Any) -> Any:
        raise ValueError("must have at least two data points")

    monkeypatch.setattr(module, "calibrate_machine", calibrate)
    monkeypatch.setattr(module, "model_facts", lambda _: None)
    loaded = command("int8", guarded=False)
    told = answers(tmp_path, ProbeCommand(loaded.config, ["none"], ["auto"], 2.5), loaded)
    assert Failed("crash", "ValueError: must have at least two data points") in told
    assert isinstance(told[-1], Measured)
    assert steps.count("load") == 1


def test_a_rank_that_dies_in_a_trial_is_a_crash(
    tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: Any, **__: Any) -> Any:
        raise EngineError("rank 1 of 2 was killed")

    monkeypatch.setattr(module, "measure", lose)
    for size, reason in ((1, "rejected"), (2, "crash")):
        asked = command("int8", guarded=False)
        asked.config["tensor_parallel_size"] = size
        assert answers(tmp_path, asked)[-1] == Failed(reason, "rank 1 of 2 was killed")
    assert steps[-1] == "close"


def test_a_model_that_lost_a_rank_is_loaded_again(tmp_path: Path, steps: list[str]) -> None:
    asked = command("int8", guarded=False)
    again = command("int8", guarded=False)
    answers(tmp_path, asked, again)
    assert steps.count("load") == 1
    steps.clear()
    for lost in (asked, again):
        lost.config["tensor_parallel_size"] = 2
    answers(tmp_path, asked, again)
    assert [step for step in steps if step in ("load", "close")] == ["load", "close", "load"]


@pytest.mark.parametrize("lost", [False, True])
def test_a_process_that_lost_its_gpu_ends_instead_of_failing_every_trial(
    tmp_path: Path,
    steps: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lost: bool,
) -> None:
    def fault(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def end(status: int) -> Any:
        raise SystemExit(status)

    monkeypatch.setattr(module, "measure", fault)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fault if lost else lambda: None)
    monkeypatch.setattr(module.os, "_exit", end)
    asked = command("int8", guarded=False)
    if not lost:
        reason = "CUDA error: an illegal memory access was encountered"
        assert answers(tmp_path, asked)[-1] == Failed("crash", reason)
        return
    with pytest.raises(SystemExit):
        answers(tmp_path, asked)
    assert steps[-1] == "close"
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("CUDA error: an illegal memory access was encountered")
