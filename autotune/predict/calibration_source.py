"""A calibration from what is on disk: its own file, or the folder of a run or a profile."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from autotune.errors import BadInput
from autotune.predict.calibration import Calibration, fit_calibration
from autotune.predict.calibration_file import CALIBRATION_NAME, read_calibration
from autotune.predict.calibration_sample import CalibrationLoad
from autotune.predict.draft_knowledge import DraftKnowledge
from autotune.profiling.evidence import LoadEvidence, read_evidence
from autotune.profiling.file import PROFILE_NAME, read_profile
from autotune.profiling.machine import MachineCalibration
from autotune.records import RunFolder
from engine.config import EngineConfig
from engine.errors import EngineError

# Beside the load that was profiled, so many further trials of a run are read.
MOST_TRIALS = 12


def load_calibration(path: Path) -> Calibration:
    """What `--calibration` names: a calibration's file, or a folder with one or with a profile.

    Raises:
        BadInput: it is neither, or what it holds tells nothing of the cost of steps.
    """
    if path.is_dir() and not (path / CALIBRATION_NAME).exists():
        if (path / PROFILE_NAME).exists():
            return calibration_of_profile(path)
        raise BadInput(
            f"{path} holds neither {CALIBRATION_NAME} nor {PROFILE_NAME}: name the folder of "
            "autotune run or autotune profile, or a file that autotune simulate wrote"
        )
    return read_calibration(path)


def calibration_of_profile(path: Path) -> Calibration:
    """Calibrate by the records and probes of a run or a profile.

    Raises:
        BadInput: the folder's profile has no probes or no steps.
    """
    profile = read_profile(path)
    folder = RunFolder(path)
    if profile.probes is None or profile.ceilings is None or profile.model is None:
        raise BadInput(
            f"{path / PROFILE_NAME} holds no probes of the machine: make it with autotune profile "
            "on the model itself"
        )
    if profile.engine_config is None:
        raise BadInput(f"{path / PROFILE_NAME} does not say what was served")
    run = folder.read_run()
    profiled = profile.source.trial or 0
    loads = [_load(folder, profiled, profile.engine_config)]
    others = [
        trial
        for trial in folder.read_trials()
        if trial.outcome == "ok" and trial.number != profiled
    ]
    loads += [_load(folder, trial.number, dict(trial.config)) for trial in others[:MOST_TRIALS]]
    versions = run.get("versions")
    version = versions.get("autotune") if isinstance(versions, dict) else None
    told = [(loads[0].config, read_evidence(folder, profiled))]
    told += [(load.config, LoadEvidence(load.requests, load.steps)) for load in loads[1:]]
    try:
        calibration = fit_calibration(
            [load for load in loads if load.steps],
            MachineCalibration(profile.ceilings, profile.probes),
            profile.model,
            hardware=profile.hardware or {},
            engine_version=str(version or "unknown"),
            created_at=profile.created_at,
        )
    except ValueError as error:
        raise BadInput(f"{path} tells nothing of the cost of steps: {error}") from None
    drafts = DraftKnowledge.of(told)
    if profile.speculation is not None:
        drafts = drafts.with_dry_run(profile.speculation)
    return dataclasses.replace(calibration, drafts=drafts)


def _load(folder: RunFolder, trial: int, config: dict[str, Any]) -> CalibrationLoad:
    try:
        known = EngineConfig.from_mapping(config)
    except EngineError as error:
        raise BadInput(
            f"{folder.path}: the config of trial {trial} is not valid: {error}"
        ) from None
    return CalibrationLoad(known, folder.read_steps(trial), folder.read_requests(trial))
