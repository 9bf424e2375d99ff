"""Before the first trial: the folder, the model, the space, the traffic, and `run.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from autotune.calibration import CALIBRATION_REQUESTS, offered_rate, sustained_rate
from autotune.calibration_text import write_calibration_text
from autotune.errors import BadInput, EnvironmentMissing
from autotune.hardware.detect import describe_hardware
from autotune.hardware.versions import library_versions
from autotune.model_info import ModelInfo, read_model_info, with_default_model
from autotune.quality import check_measurable, forget_reference
from autotune.records import SCHEMA_VERSION, RunFolder, TrialRecord, utc_now
from autotune.search.configuration import Configuration, Space
from autotune.search.methods_offered import Offer, offer_for
from autotune.search.options import TuneOptions
from autotune.search.schedule import Schedule, plan_schedule
from autotune.search.sizes_offered import sizes_offered
from autotune.search.space import SearchSpace, load_space
from autotune.search.windows import write_windows
from autotune.speculative_models import check_speculative_models, methods_with_models
from autotune.traffic import Traffic, load_traffic
from engine.checkpoints.model_folder import open_model_folder
from engine.config import EngineConfig
from engine.models.registry import decoder_spec
from engine.quantize.method_table import METHODS

# Records of a long run with many requests; far less is needed as a rule.
MIN_FREE_BYTES = 200 * 1024 * 1024
# Loads of one capacity trial.
CAPACITY_PROBES = 5


class Preparation(Protocol):
    """What any search works with, of the bundled engine or of another; see `Prepared`."""

    run: dict[str, Any]
    notes: list[str]
    num_windows: int

    @property
    def options(self) -> TuneOptions:
        """What was asked for."""
        ...

    @property
    def model(self) -> ModelInfo:
        """Facts of the model."""
        ...

    @property
    def base(self) -> Configuration:
        """The default."""
        ...

    @property
    def space(self) -> Space[Any]:
        """Where to look."""
        ...

    @property
    def schedule(self) -> Schedule:
        """Shares of the budget."""
        ...

    @property
    def traffic(self) -> Traffic | None:
        """The workload; None where the windows are on disk."""
        ...


@dataclass(slots=True)
class Prepared:
    """What a search works with; `run` is the content of `run.json`.

    `traffic` is None where a resumed run has its windows on disk already. `offer` is what a search
    may choose on this machine, whatever the space holds of it.
    """

    run: dict[str, Any]
    options: TuneOptions
    model: ModelInfo
    base: EngineConfig
    space: SearchSpace
    offer: Offer
    schedule: Schedule
    traffic: Traffic | None
    notes: list[str] = field(default_factory=list)
    num_windows: int = 1

    @property
    def advising_s(self) -> float:
        """Seconds that an earlier process took for advice and forecasts, if one did."""
        told = (self.run.get(name) or {} for name in ("advice", "forecasts"))
        return sum(float(part.get("seconds", 0.0)) for part in told)


@contextmanager
def open_folder(path: Path, *, resume: bool) -> Iterator[RunFolder]:
    """The run folder, held by this process alone while the search lasts.

    Raises:
        BadInput: a new run's folder exists and is not empty, a resumed run's does not exist, or
            another process is working in it.
        EnvironmentMissing: the disk is full, or the folder cannot be written.
    """
    folder = RunFolder(path)
    if resume and not folder.run_json.exists():
        raise BadInput(f"{path} holds no run to resume: run.json is missing")
    if not resume and path.exists() and not _is_free(path):
        raise BadInput(
            f"output folder {path} exists and is not empty: choose another with -o, or go on with "
            f"the run in it with --resume {path}"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
        handle = os.open(path / ".busy", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise EnvironmentMissing(f"output folder {path} cannot be used: {error}") from error
    ours = False
    try:
        if free < MIN_FREE_BYTES:
            raise EnvironmentMissing(
                f"{path} has {free / 2**20:.0f} MiB of disk space left; a run needs "
                f"{MIN_FREE_BYTES / 2**20:.0f} MiB: free some, or choose another folder with -o"
            )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"another process is working in {path}: wait for it to end") from None
        ours = True
        yield folder
    finally:
        os.close(handle)
        if ours and not folder.run_json.exists():
            # Nothing began: leave no folder behind that the next try would stumble over.
            with contextlib.suppress(OSError):
                (path / ".busy").unlink()
                path.rmdir()


def prepare(folder: RunFolder, options: TuneOptions | None, command: Sequence[str]) -> Prepared:
    """Check everything that can be wrong before anything is measured, and write `run.json`.

    With `options` None the run in `folder` is taken up as its `run.json` describes it.

    Raises:
        BadInput: bad options, workload or space; a model that changed since the run began.
        engine.errors.EngineError: the model or the config cannot be used.
    """
    run = read_search_run(folder) if options is None else None
    if run is not None:
        options = TuneOptions.from_json(run["options"])
    assert options is not None
    options.parsed_slo  # noqa: B018 - raises now what would otherwise be found after a trial
    options.parsed_objective  # noqa: B018
    # A resumed run is what its run.json says: relative paths and files that it began with may be
    # elsewhere now, and a space file may have changed.
    base = (
        with_default_model(EngineConfig.from_mapping(options.default_knobs))
        if run is None
        else EngineConfig.from_mapping(run["engine_config"])
    )
    hardware = describe_hardware(base.device)
    base = base.replace(device=hardware["device"])
    model = read_model_info(base)
    if run is not None and run["model"]["fingerprint"] != model.fingerprint:
        raise BadInput(
            f"the model in {base.model} changed since this run began: start a new run, or put the "
            "model back"
        )
    if model.quantization is not None and base.quantization != "none":
        raise BadInput(
            f"--quantization {base.quantization} was asked for, but {base.model} is already "
            f"quantized ({model.quantization}): leave it out, or give the unquantized model"
        )
    check_measurable(options.parsed_slo, base)
    notes: list[str] = []
    offer = offer_for(hardware, quantized=model.quantization is not None)
    spec = decoder_spec(open_model_folder(base.model))
    offer = offer.also("tensor_parallel_size", sizes_offered(hardware, spec))
    offer = offer.also("speculative_method", methods_with_models(base))
    if run is None:
        space_file = Path(options.space_file) if options.space_file else None
        space = load_space(hardware["device"], options.narrowing, space_file, offer).nearest(base)
        notes = offer.notes_on(base)
    else:
        space = SearchSpace({name: tuple(v) for name, v in run["search_space"].items()})
    probes = CAPACITY_PROBES if options.objective == "capacity" else 1
    drafting = {base.speculative_method, *space.values.get("speculative_method", ())}
    check_speculative_models(base, drafting, spec)
    traffic_options = options.traffic
    schedule = plan_schedule(
        options.budget_s,
        run["schedule"]["window_s"] if run else traffic_options.duration_s,
        probes,
        options.rounds,
        options.finalists,
    )
    traffic = None
    if run is None or not run["workload"]:
        traffic = load_traffic(traffic_options, model, base, options.seed)
        base = _with_calibration_text(folder, base, space, traffic, notes)
    prepared = Prepared(run or {}, options, model, base, space, offer, schedule, traffic, notes)
    if run is None:
        prepared.run = new_run(prepared, hardware, command)
        folder.write_json(folder.run_json, prepared.run)
    else:
        prepared.notes = list(run.get("notes", ()))
        prepared.num_windows = run.get("num_windows", 1)
        if run["status"] == "interrupted":
            run["status"] = "running"
            folder.write_json(folder.run_json, run)
    return prepared


def _with_calibration_text(
    folder: RunFolder, base: EngineConfig, space: SearchSpace, traffic: Traffic, notes: list[str]
) -> EngineConfig:
    """The config with the workload's texts to calibrate on, if a method may need them."""
    methods = {base.quantization, *space.values.get("quantization", ())}
    if base.calibration is not None or not any(METHODS[name].calibrated for name in methods):
        return base
    path = write_calibration_text(folder.path, traffic.texts)
    if path is None:
        return base
    notes.append(f"calibrated quantization reads the workload's own prompts, in {path.name}")
    return base.replace(calibration=str(path))


def read_search_run(folder: RunFolder) -> dict[str, Any]:
    """The `run.json` of a run that can be resumed.

    Raises:
        BadInput: the folder holds no run, or the result of another command.
    """
    run = folder.read_run()
    if "options" not in run:
        raise BadInput(
            f"{folder.path} holds the result of autotune {run.get('kind', 'something else')}, not "
            "a run of autotune run: there is nothing to resume"
        )
    return run


def offer_traffic(
    folder: RunFolder,
    prepared: Preparation,
    *,
    saturated: TrialRecord | None,
    final: bool = False,
) -> None:
    """Put the windows of the traffic on disk; the `final` ones also into `run.json`.

    `saturated` is the calibration, where the offered rate is a share of what it sustained.

    Raises:
        BadInput: the calibration failed, so the default config cannot serve this traffic at all.
    """
    options, schedule, traffic = prepared.options, prepared.schedule, prepared.traffic
    assert traffic is not None
    if not final:
        write_windows(folder, [traffic.burst(CALIBRATION_REQUESTS)])
        return
    rate = options.traffic.rate
    notes: list[str] = []
    if saturated is not None:
        records = folder.read_requests(saturated.number)
        duration = saturated.metrics["duration_s"] if saturated.metrics else 0.0
        sustained = sustained_rate(records, duration)
        if not sustained:
            raise BadInput(
                "the default configuration served no request of the calibration: "
                f"{saturated.reason or 'none finished in time'}; give --rate, shorter lengths "
                "(--scale-lengths) or another default"
            )
        rate, note = offered_rate(options.traffic, sustained)
        notes.append(note)
    offered = traffic.windows(rate, schedule.window_s, count=1 + options.rounds)
    write_windows(folder, offered.windows)
    prepared.num_windows = len(offered.windows)
    prepared.notes = [*prepared.notes, *notes, *offered.notes]
    prepared.run["workload"] = offered.description
    prepared.run["num_windows"] = prepared.num_windows
    prepared.run["notes"] = prepared.notes
    folder.write_json(folder.run_json, prepared.run)


def conclude(
    folder: RunFolder, run: dict[str, Any], status: str, result: dict[str, Any] | None
) -> None:
    """Write the outcome into `run.json` and join the trials' records."""
    run["status"] = status
    run["finished_at"] = utc_now()
    run["result"] = result
    if status == "done":
        folder.merge_parts()
        forget_reference(folder.path)
        folder.write_json(folder.lock, _lock(run))
    # Last: a run that was killed before this line is not done, and concludes when it is resumed.
    folder.write_json(folder.run_json, run)


def _is_free(path: Path) -> bool:
    """Whether a new run may use a folder: it is empty but for what a killed beginning left."""
    return path.is_dir() and all(
        entry.name == ".busy" or entry.name.startswith(".run.json.") for entry in path.iterdir()
    )


def new_run(
    prepared: Preparation, hardware: dict[str, Any], command: Sequence[str]
) -> dict[str, Any]:
    """The `run.json` of a run that begins."""
    options, objective = prepared.options, prepared.options.parsed_objective
    return {
        "schema_version": SCHEMA_VERSION,
        "command": list(command),
        "started_at": utc_now(),
        "finished_at": None,
        "status": "running",
        "model": prepared.model.to_json(),
        "engine_config": prepared.base.to_dict(),
        "options": options.to_json(),
        "schedule": dataclasses.asdict(prepared.schedule),
        "workload": None,
        "slo": str(options.parsed_slo),
        "objective": objective.name,
        "objective_unit": objective.unit(options.parsed_slo),
        "direction": objective.direction,
        "budget_s": options.budget_s,
        "max_trials": options.trials,
        "search_space": {name: list(values) for name, values in prepared.space.values.items()},
        "hardware": hardware,
        "versions": library_versions(),
        "seeds": {"seed": options.seed},
        "result": None,
    }


def _lock(run: dict[str, Any]) -> dict[str, Any]:
    """What the decision rests on; a later re-tuning compares itself with this."""
    result = run["result"] or {}
    return {
        "schema_version": SCHEMA_VERSION,
        "decided_at": run["finished_at"],
        "model": {name: run["model"][name] for name in ("name", "architecture", "fingerprint")},
        "workload": run["workload"]["fingerprint"],
        "slo": run["slo"],
        "objective": run["objective"],
        "hardware": {name: run["hardware"][name] for name in ("device", "name", "cores")},
        "versions": run["versions"],
        "seed": run["seeds"]["seed"],
        "winner_config": result.get("winner_config"),
        "gain": result.get("gain"),
        "slo_met": result.get("slo_met"),
    }
