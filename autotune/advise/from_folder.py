"""Advice on what lies on disk: a run, a bench or a profile, finished or not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autotune.advise.advice import AdviceList
from autotune.advise.advise import advise
from autotune.advise.commands import traffic_arguments
from autotune.diagnose.diagnose import diagnose
from autotune.diagnose.finding import Diagnosis
from autotune.errors import BadInput
from autotune.predict.predictor import predictor_for
from autotune.profiling.evidence import LoadEvidence, read_evidence
from autotune.profiling.file import PROFILE_NAME, read_profile
from autotune.profiling.schema import Profile
from autotune.records import RunFolder
from autotune.search.options import DEFAULT_SLO
from autotune.slo import parse_slo

# Seconds that predictions may take, about.
PREDICTION_S = 20.0

Advised = tuple[Profile, Diagnosis, AdviceList]


def advise_folder(
    path: Path,
    *,
    slo: str | None = None,
    price: float | None = None,
    trial: int | None = None,
    calibrate: bool = False,
    seed: int = 0,
    budget_s: float = PREDICTION_S,
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> Advised:
    """Advise on a folder's measurement, or on a `profile.json`.

    Args:
        path: a run folder, or a profile file. A folder without a profile is profiled from its
            records.
        slo: the promise; by default the profile's own, else what `run` assumes.
        price: of the machine, USD per hour; by default the profile's own.
        trial: which measurement of a run; by default the one that was profiled, else the first of
            the default config.
        calibrate: measure this machine, where the folder does not tell its limits; without them
            predictions are rough.
        seed: of what predictions draw.
        budget_s: seconds that predictions may take, about.
        say: told what is going on.
        stop: set it to give up the calibration.

    Raises:
        BadInput: nothing there that can be advised on, or a profile of another version.
        engine.errors.EngineError: `calibrate`, and the model cannot be loaded here.
    """
    profile, evidence = _profile_of(path, slo, price, trial, calibrate, say, stop)
    changes = {"slo": slo or profile.slo or DEFAULT_SLO, "price": price or profile.price}
    profile = profile.model_copy(update=changes)
    folder = path if path.is_dir() else path.parent
    workload = traffic_arguments(_command(folder))
    return advised(profile, evidence, seed=seed, budget_s=budget_s, workload=workload, say=say)


def advised(
    profile: Profile,
    evidence: LoadEvidence | None,
    *,
    seed: int = 0,
    budget_s: float = PREDICTION_S,
    workload: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Advised:
    """Diagnose a profile and advise on it; its `slo` is the promise."""
    slo = parse_slo(profile.slo or DEFAULT_SLO)
    say("diagnosing")
    diagnosis = diagnose(profile)
    say("predicting")
    predictor = predictor_for(profile, evidence, slo, seed=seed, budget_s=budget_s)
    advice = advise(profile, diagnosis, predictor, slo=slo, workload=workload)
    return profile, diagnosis, advice


def _profile_of(
    path: Path,
    slo: str | None,
    price: float | None,
    trial: int | None,
    calibrate: bool,
    say: Callable[[str], None],
    stop: threading.Event | None,
) -> tuple[Profile, LoadEvidence | None]:
    if not path.exists():
        raise BadInput(f"{path} does not exist: name a run folder or a {PROFILE_NAME}")
    folder = RunFolder(path if path.is_dir() else path.parent)
    known = path if path.is_file() else folder.profile_json
    if known.exists():
        profile = read_profile(known)
        same = trial is None or profile.source.trial == trial
        if same and not (calibrate and profile.probes is None):
            return profile, _evidence(folder, profile)
        if path.is_file():
            raise BadInput(
                f"{path} is of trial {profile.source.trial}: name the run folder to choose another"
            )
    # A load is not needed, but the module that runs one is: it imports torch.
    from autotune.profile_records import profile_records

    outcome = profile_records(
        folder.path,
        trial=trial,
        slo=slo,
        price=price,
        calibrate=calibrate,
        say=say,
        stop=stop,
    )
    return outcome.profile, outcome.evidence


def _evidence(folder: RunFolder, profile: Profile) -> LoadEvidence | None:
    """The records that a profile was made of, if they lie beside it."""
    if profile.source.kind == "metrics" or not folder.run_json.exists():
        return None
    evidence = read_evidence(folder, profile.source.trial or 0)
    # Records of another load than the profile's would predict another thing.
    return evidence if len(evidence.requests) == profile.traffic.requests else None


def _command(folder: Path) -> list[str]:
    """The command that made a run folder; empty where that is not told."""
    try:
        run: dict[str, Any] = RunFolder(folder).read_run()
    except BadInput:
        return []
    command = run.get("command")
    return [str(part) for part in command] if isinstance(command, list) else []
