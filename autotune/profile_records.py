"""A finished run's records, profiled and diagnosed: `autotune profile --from`."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.errors import BadInput
from autotune.hardware.detect import describe_hardware
from autotune.output_folder import claim_output
from autotune.profile_outcome import ProfileOutcome, concluded, keep_outcome, keep_records
from autotune.profile_run import Say, calibrated, loaded_for_calibration
from autotune.profiling.build import build_profile
from autotune.profiling.evidence import read_evidence
from autotune.profiling.file import read_profile, write_profile
from autotune.profiling.machine import MachineCalibration
from autotune.profiling.model_facts import model_facts
from autotune.profiling.schema import ModelFacts, Profile, Source
from autotune.records import RunFolder, TrialRecord, utc_now
from autotune.slo import parse_slo
from engine.config import EngineConfig
from engine.errors import EngineError

# Knobs under which a part of a step takes another time; others choose among what was probed.
_MEASURED_UNDER = ("dtype", "num_threads", "tensor_parallel_size")


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The measurement to read: its number, configuration and metrics, and notes on the choice."""

    trial: int
    config: EngineConfig
    metrics: dict[str, Any] | None
    notes: list[str]


def profile_records(
    path: Path,
    *,
    trial: int | None = None,
    slo: str | None = None,
    price: float | None = None,
    calibrate: bool = False,
    output: Path | None = None,
    command: Sequence[str] = (),
    say: Say = lambda _: None,
    stop: threading.Event | None = None,
) -> ProfileOutcome:
    """Profile one measurement of a run folder; the load itself is not run again.

    Args:
        path: folder of a run, a bench or a profile, finished or not.
        trial: its number; by default the first measurement of the default config.
        slo: limits that findings are weighed by; by default the run's own.
        price: of the machine, USD per hour; by default the run's own.
        calibrate: measure this machine, if the folder does not tell its limits already; the run
            must be of a machine like this.
        output: folder for the profile and a copy of the records. Without one they are written into
            `path`, if it has no profile yet.
        command: for `run.json`.
        say: told what is going on, for a progress line.
        stop: set it to give up the calibration.

    Raises:
        BadInput: no run, no such trial, one without records, or another machine.
        engine.errors.EngineError: `calibrate`, and the model cannot be loaded here.
    """
    folder = RunFolder(path)
    run = folder.read_run()
    chosen = _choose(folder, run, trial)
    config = chosen.config
    limits = slo or _text(run.get("slo")) or _text(_part(run, "options").get("slo"))
    parsed = None if limits is None else parse_slo(limits)
    if price is None:
        price = run.get("price") or _part(run, "options").get("price")
    say("reading the records")
    evidence = read_evidence(folder, chosen.trial)
    if not evidence.requests:
        raise BadInput(
            f"{path} holds no records of trial {chosen.trial}: its requests.parquet is missing or "
            "holds other trials"
        )
    with claim_output(output):
        facts, partial = _facts(config)
        known, problem = _known_profile(folder, stays=output is None)
        partial += problem
        machine, problem = _known_machine(known, config)
        partial += problem
        if calibrate and machine is None:
            machine, problem = _calibrate(config, run, say, stop or threading.Event())
            partial += problem
        notes = chosen.notes
        if machine is None and not calibrate and not problem:
            notes = [*notes, "this run does not tell its machine's limits: --calibrate measures it"]
        built = build_profile(
            evidence,
            config,
            source=Source(kind="records", where=str(path), trial=chosen.trial),
            metrics=chosen.metrics,
            model=facts,
            hardware=_part(run, "hardware") or None,
            slo=None if parsed is None else str(parsed),
            price=price,
            machine=machine,
            # Samples of the same load; they are kept nowhere else.
            gpu=known.gpu if known is not None and known.source.trial == chosen.trial else None,
            created_at=utc_now(),
            notes=notes,
        )
        outcome = concluded(
            built,
            partial,
            evidence=evidence,
            config=config,
            model=_part(run, "model"),
            workload=_part(run, "workload"),
            versions=_part(run, "versions"),
        )
        if output is not None:
            keep_records(RunFolder(output), evidence)
            keep_outcome(RunFolder(output), outcome, command)
        elif not folder.profile_json.exists():
            write_profile(folder.profile_json, outcome.profile)
            folder.write_json(folder.diagnosis_json, outcome.diagnosis.to_json())
    return outcome


def _choose(folder: RunFolder, run: Mapping[str, Any], number: int | None) -> _Chosen:
    trials = folder.read_trials()
    if not trials:
        if number not in (None, 0):
            raise BadInput(f"--trial {number}: {folder.path} holds one measurement, trial 0")
        notes = [text for text in run.get("notes") or () if isinstance(text, str)]
        return _Chosen(0, _config(folder, run.get("engine_config")), _only_metrics(folder), notes)
    measured = [t for t in trials if t.metrics is not None]
    if number is None:
        searched = [t for t in measured if t.kind == "search"] or measured
        if not searched:
            raise BadInput(f"no trial of {folder.path} was measured; there is nothing to profile")
        default = [t for t in searched if t.source == "default"] or searched
        return _of_trial(folder, default[0], _which(run, default[0]))
    found = [t for t in trials if t.number == number]
    if not found:
        numbers = ", ".join(str(t.number) for t in measured)
        raise BadInput(
            f"--trial {number}: {folder.path} has no such trial; measured were {numbers}"
        )
    if found[0].metrics is None:
        raise BadInput(
            f"--trial {number} measured nothing: {found[0].outcome}"
            + (f", {found[0].reason}" if found[0].reason else "")
        )
    return _of_trial(folder, found[0], [])


def _of_trial(folder: RunFolder, trial: TrialRecord, notes: list[str]) -> _Chosen:
    return _Chosen(trial.number, _config(folder, trial.config), trial.metrics, notes)


def _which(run: Mapping[str, Any], trial: TrialRecord) -> list[str]:
    what = "the default config" if trial.source == "default" else trial.source
    winners = _part(run, "result").get("winner_trials") or ()
    others = [n for n in winners if n != trial.number]
    tail = f", for instance {others[0]} of the winner" if others else ""
    return [f"read was trial {trial.number}, {what}; --trial chooses another{tail}"]


def _config(folder: RunFolder, values: object) -> EngineConfig:
    try:
        return EngineConfig.from_mapping(values if isinstance(values, dict) else {})
    except EngineError as error:
        raise BadInput(f"{folder.path} holds a config of another release: {error}") from error


def _only_metrics(folder: RunFolder) -> dict[str, Any] | None:
    """What `bench` or `profile` measured; of a profile that was not finished `run.json` tells."""
    for path, key in (
        (folder.path / "bench.json", None),
        (folder.profile_json, "metrics"),
        (folder.run_json, "metrics"),
    ):
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(path.read_text(encoding="utf-8"))
            metrics = content if key is None else content.get(key)
            if isinstance(metrics, dict):
                return metrics
    return None


def _facts(config: EngineConfig) -> tuple[ModelFacts | None, list[str]]:
    try:
        return model_facts(config), []
    except EngineError as error:
        return None, [f"operations and bytes are not known, as the model is not here: {error}"]


def _known_profile(folder: RunFolder, *, stays: bool) -> tuple[Profile | None, list[str]]:
    """An earlier profile of this folder, or why one that is there is of no use.

    `stays`: whether the new one would belong where the earlier is.
    """
    if not folder.profile_json.exists():
        return None, []
    try:
        return read_profile(folder.profile_json), []
    except BadInput as error:
        lost = f"what an earlier profile of this folder told of its machine is not used ({error})"
        return None, [f"{lost}; it stays as it is, and -o keeps this one" if stays else lost]


def _known_machine(
    known: Profile | None, config: EngineConfig
) -> tuple[MachineCalibration | None, list[str]]:
    """What it measured of the machine, or why that says nothing of this config."""
    if known is None or known.ceilings is None or known.probes is None:
        return None, []
    measured = known.engine_config or {}
    for name in _MEASURED_UNDER:
        had, has = measured.get(name), getattr(config, name)
        if name in measured and had != has:
            return None, [
                f"the machine's limits that an earlier profile of this folder tells are not used: "
                f"they were measured with {name}={had}, and this trial had {has}"
            ]
    return MachineCalibration(known.ceilings, known.probes), []


def _calibrate(
    config: EngineConfig, run: Mapping[str, Any], say: Say, stop: threading.Event
) -> tuple[MachineCalibration | None, list[str]]:
    hardware = describe_hardware(config.device)
    measured_on = _part(run, "hardware").get("name")
    if measured_on is not None and measured_on != hardware["name"]:
        raise BadInput(
            f"--calibrate: the run was measured on {measured_on}, and this is {hardware['name']}: "
            "the limits of one say nothing of the other; leave --calibrate out"
        )
    with loaded_for_calibration(config, say) as loaded:
        return calibrated(loaded, config, model_facts(config), hardware, say, stop)


def _part(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = run.get(name)
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
