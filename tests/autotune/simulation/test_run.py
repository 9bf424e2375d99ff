"""A simulation from options: costs of a file, of this machine or of a data sheet."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import BadInput, Interrupted
from autotune.hardware.versions import library_versions
from autotune.predict.calibration import Calibration
from autotune.predict.calibration_file import read_calibration, write_calibration
from autotune.simulation import kept_calibration
from autotune.simulation.fleet import Fleet
from autotune.simulation.interval import Interval
from autotune.simulation.options import SimulateOptions
from autotune.simulation.run import SimulateOutcome, run_simulation, save
from autotune.simulation.simulate import DoesNotFit
from autotune.traffic_options import TrafficOptions
from tests.autotune.planning.known_models import LLAMA_3_8B
from tests.autotune.predict.calibrated_loads import CONFIG, calibrated, swept
from tests.engine.tiny_models import make_tiny


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Of the embedded model."""
    return calibrated(swept(CONFIG))


@pytest.fixture
def file(tmp_path: Path, calibration: Calibration) -> Path:
    path = tmp_path / "calibration.json"
    write_calibration(path, calibration)
    return path


def run(**more: Any) -> SimulateOutcome:
    traffic = {"source": "chat", "rate": 3.0, "duration_s": 8.0, **more.pop("traffic", {})}
    return run_simulation(
        SimulateOptions(
            **{
                "knobs": {"max_num_seqs": 16},
                "traffic": TrafficOptions(**traffic),
                "slo": "ttft<2s,tpot<1s",
                "draws": 4,
                **more,
            }
        )
    )


def test_a_calibration_that_is_named_is_read(file: Path) -> None:
    outcome = run(calibration=file)
    assert outcome.costs["kind"] == "calibration"
    assert outcome.costs["where"] == str(file)
    assert outcome.config.device == "cpu"
    assert outcome.config.max_num_seqs == 16
    assert outcome.model["name"] == "embedded"
    assert outcome.simulated.metrics["completed"].value == 24
    # It is of release 1.0 of the engine, and says so.
    assert any("is of release 1.0" in note for note in outcome.notes)


def test_the_same_question_has_the_same_answer(file: Path) -> None:
    texts = [json.dumps(run(calibration=file, seed=s).to_json()) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_a_trace_is_what_it_is(file: Path, tmp_path: Path) -> None:
    """Of a preset each play has its own requests; those of a file are given."""
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 200 * i, "input_length": 30 + i, "output_length": 20, "hash_ids": [i]}
        for i in range(20)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    outcome = run(calibration=file, traffic={"source": str(trace), "rate": None, "requests": 20})
    completed = outcome.simulated.metrics["completed"]
    assert completed == Interval(20.0, 20.0, 20.0)
    assert not any("proof" in note for note in outcome.notes)


def test_the_rate_is_found_by_simulation(file: Path) -> None:
    one = run(calibration=file, traffic={"rate": None, "load_factor": 0.5})
    two = run(calibration=file, traffic={"rate": None, "load_factor": 0.5}, replicas=2)
    assert any("0.5 times the" in note and "simulated" in note for note in one.notes)
    rates = [o.simulated.metrics["offered_rate"].value for o in (one, two)]
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.35)


def test_fleets_and_drafts_reach_the_simulation(file: Path) -> None:
    outcome = run(calibration=file, disaggregate=(2, 1), router="least-loaded")
    assert outcome.fleet.engines == 3
    split = outcome.fleet.disaggregation
    assert split is not None
    assert split.kv_bytes_per_token > 1000
    told = outcome.to_json()["fleet"]
    assert told == {
        "engines": 3,
        "router": "least_loaded",
        "prefill_replicas": 2,
        "decode_replicas": 1,
    }
    slow, fast = run(calibration=file), run(calibration=file, acceptance=(0.9, 0.9))
    assert slow.fleet == Fleet()
    tpots = [o.simulated.metrics["tpot"]["mean"].value for o in (slow, fast)]
    assert tpots[1] < 0.7 * tpots[0]


def test_speculation_is_simulated_where_its_chances_are_told(file: Path) -> None:
    knobs = {"max_num_seqs": 16, "speculative_method": "ngram"}
    with pytest.raises(BadInput, match="chances of their tokens by --speculative-acceptance"):
        run(calibration=file, knobs=knobs)
    outcome = run(calibration=file, knobs=knobs, acceptance=(0.9, 0.8))
    assert outcome.config.speculative_adaptive
    told = outcome.to_json()["speculation"]
    assert told["acceptance"]["1"]["value"] == pytest.approx(0.9, abs=0.05)
    assert told["acceptance"]["3"] is None
    low, value, high = (told["tokens_per_step"][name] for name in ("low", "value", "high"))
    assert 1.0 < low <= value <= high < 1 + 0.9 + 0.72 + 0.2


def test_an_unknown_method_is_a_sentence(file: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot be simulated: .*nf4"):
        run(calibration=file, knobs={"quantization": "nf4"})


def test_another_model_is_refused(file: Path, tmp_path: Path) -> None:
    content = json.loads(file.read_text())
    content["model"]["fingerprint"] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="of another model"):
        run(calibration=file)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"calibration_version": 99}'])
def test_a_broken_calibration_is_a_sentence(tmp_path: Path, content: str) -> None:
    broken = tmp_path / "calibration.json"
    broken.write_text(content)
    with pytest.raises(BadInput, match=r"calibration\.json"):
        run(calibration=broken)


def test_a_folder_without_a_calibration_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds neither"):
        run(calibration=tmp_path)
    with pytest.raises(BadInput, match="does not exist"):
        run(calibration=tmp_path / "nothing")


class Measured:
    """In place of a minute's measurement: a known calibration, and how often it was asked for."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.times = 0

    def __call__(self, *_: Any) -> Calibration:
        self.times += 1
        return self.calibration


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibration: Calibration) -> Measured:
    import dataclasses

    from autotune.hardware.detect import describe_hardware

    mine = dataclasses.replace(
        calibration,
        hardware=describe_hardware("cpu"),
        engine_version=str(library_versions()["autotune"]),
    )
    found = Measured(mine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_calibration, "_measured", found)
    return found


def test_this_machine_is_calibrated_once(measured: Measured, tmp_path: Path) -> None:
    first = run(knobs={"device": "cpu"})
    assert measured.times == 1
    kept = Path(first.costs["where"])
    assert kept.is_relative_to(tmp_path / "cache" / "autotune" / "calibrations")
    assert any("was calibrated" in note and str(kept) in note for note in first.notes)
    second = run(knobs={"device": "cpu", "max_num_seqs": 4})
    assert measured.times == 1
    assert second.costs["where"] == str(kept)
    assert any("--recalibrate measures again" in note for note in second.notes)
    run(knobs={"device": "cpu"}, recalibrate=True)
    assert measured.times == 2


def test_a_real_calibration_is_made_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the engine, with a model so small that it takes a moment."""
    make_tiny("llama", tmp_path / "tiny")
    # Another cache altogether would have the engine's kernels compiled anew.
    monkeypatch.setattr(kept_calibration, "kept_path", lambda *_: tmp_path / "kept.json")
    monkeypatch.setattr(kept_calibration, "BUDGET_S", 1.0)
    knobs = {"device": "cpu", "model": str(tmp_path / "tiny"), "max_num_seqs": 4}
    outcome = run(knobs=knobs)
    kept = Path(outcome.costs["where"])
    assert read_calibration(kept).config.max_num_seqs > 4  # it tells of other limits too
    assert outcome.costs["step_error"] > 0
    assert run(knobs=knobs).to_json()["ttft"] == outcome.to_json()["ttft"]


def test_other_threads_are_another_calibration(measured: Measured) -> None:
    first = run(knobs={"device": "cpu"})
    second = run(knobs={"device": "cpu", "num_threads": 1})
    assert measured.times == 2
    assert first.costs["where"] != second.costs["where"]


def test_a_kept_calibration_that_broke_is_measured_again(measured: Measured) -> None:
    kept = Path(run(knobs={"device": "cpu"}).costs["where"])
    kept.write_text("{")
    run(knobs={"device": "cpu"})
    assert measured.times == 2
    assert json.loads(kept.read_text())


def test_costs_of_a_data_sheet_need_a_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    knobs = {"model": str(tmp_path)}
    outcome = run(gpu="h100", knobs=knobs)
    assert outcome.costs["kind"] == "data_sheet"
    assert outcome.costs["where"] == "h100-sxm"
    assert 0.002 < outcome.simulated.metrics["tpot"]["mean"].value < 0.05
    with pytest.raises(BadInput, match="unknown GPU 'h10'"):
        run(gpu="h10", knobs=knobs)
    with pytest.raises(DoesNotFit, match=r"does not fit t4.*GiB are missing on each"):
        run(gpu="t4", knobs=knobs)
    odd = LLAMA_3_8B | {"hidden_size": 2560, "num_attention_heads": 20, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    with pytest.raises(BadInput, match="8 GPUs do not divide the model's 20 attention heads"):
        run(gpu="h100", knobs={**knobs, "tensor_parallel_size": 8})


def test_it_can_be_stopped(file: Path) -> None:
    stop = threading.Event()
    stop.set()
    options = SimulateOptions(
        knobs={},
        traffic=TrafficOptions(rate=3.0, duration_s=5.0),
        slo="ttft<1s",
        calibration=file,
    )
    with pytest.raises(Interrupted, match="before the simulation was done"):
        run_simulation(options, stop=stop)


def test_what_is_saved_is_what_is_printed(file: Path, tmp_path: Path) -> None:
    outcome = run(calibration=file)
    folder = tmp_path / "out"
    folder.mkdir()
    save(outcome, folder, ["autotune", "simulate"])
    assert json.loads((folder / "simulation.json").read_text()) == outcome.to_json()
    told = json.loads((folder / "run.json").read_text())
    assert (told["kind"], told["status"]) == ("simulate", "done")
    assert told["engine_config"]["max_num_seqs"] == 16
