"""Folders of runs and profiles serve as calibrations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotune.errors import BadInput
from autotune.predict.calibration_source import load_calibration
from autotune.predict.step_cost import StepWork
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.file import write_profile
from autotune.profiling.schema import Profile
from autotune.profiling.speculation_schema import AcceptancePosition, Speculation
from autotune.records import SCHEMA_VERSION, RunFolder
from engine.config import EngineConfig
from tests.autotune.predict.calibrated_loads import MACHINE
from tests.autotune.predict.played_profile import cost, profiled, requests


def _write(path: Path, profile: Profile, evidence: LoadEvidence) -> None:
    folder = RunFolder(path)
    folder.write_part(0, evidence.requests, evidence.steps)
    run = {"schema_version": SCHEMA_VERSION, "versions": {"autotune": "0.7.0"}}
    folder.run_json.write_text(json.dumps(run))
    write_profile(folder.profile_json, profile)


def test_a_profile_calibrates(tmp_path: Path) -> None:
    profile, evidence = profiled(requests(80, 3.0), scale=1.1, max_num_seqs=32)
    _write(tmp_path, profile.model_copy(update={"ceilings": MACHINE.ceilings}), evidence)
    found = load_calibration(tmp_path)
    assert found.engine_version == "0.7.0"
    assert profile.engine_config is not None
    config = EngineConfig.from_mapping(profile.engine_config)
    work = StepWork(8, 0, 8, 8, 800, 0, 0)
    draw = found.middle(config)
    expected = 1.1 * cost(config).device_seconds(work)
    assert draw.pace.mean * draw.cost.device_seconds(work) == pytest.approx(expected, rel=0.05)
    shape = found.cache(config)
    assert shape is not None
    assert shape.num_blocks == 4096


def test_a_profiles_dry_run_tells_of_lookups(tmp_path: Path) -> None:
    profile, evidence = profiled(requests(80, 3.0), max_num_seqs=32)
    dry_run = Speculation(
        num_requests=80,
        min_ngram=2,
        max_ngram=4,
        tokens_per_step={1: 1.3},
        hit_share=0.4,
        hit_run=3.0,
        positions=[
            AcceptancePosition(position=1, drafted=100, accepted=80),
            AcceptancePosition(position=2, drafted=100, accepted=60),
        ],
    )
    told = {"ceilings": MACHINE.ceilings, "speculation": dry_run}
    _write(tmp_path, profile.model_copy(update=told), evidence)
    found = load_calibration(tmp_path)
    config = EngineConfig(max_num_seqs=32, speculative_method="ngram")
    drafts = found.middle(config).drafts
    assert drafts is not None
    assert drafts.acceptance == pytest.approx((0.8, 0.75))
    assert (drafts.share, drafts.run) == (0.4, 3.0)
    assert found.middle(config.replace(prompt_lookup_max=5)).drafts is None


def test_a_profile_without_what_is_needed_says_what_is_missing(tmp_path: Path) -> None:
    profile, evidence = profiled(requests(20, 3.0))
    _write(tmp_path, profile, evidence)  # no ceilings
    with pytest.raises(BadInput, match="no probes of the machine"):
        load_calibration(tmp_path)
    served = profile.model_copy(update={"ceilings": MACHINE.ceilings, "engine_config": None})
    write_profile(tmp_path / "profile.json", served)
    with pytest.raises(BadInput, match="does not say what was served"):
        load_calibration(tmp_path)


def test_too_few_steps_are_told(tmp_path: Path) -> None:
    profile, evidence = profiled(requests(20, 3.0))
    few = LoadEvidence(evidence.requests, evidence.steps[:4])
    _write(tmp_path, profile.model_copy(update={"ceilings": MACHINE.ceilings}), few)
    with pytest.raises(BadInput, match="at least 8 steps; has 4"):
        load_calibration(tmp_path)
    with pytest.raises(BadInput, match="does not exist"):
        load_calibration(tmp_path / "nothing")
