"""Before the first trial of another engine: the engine, its flags, the traffic, and `run.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotune.errors import BadInput
from autotune.external.engine import ExternalEngine, find_engine, running_engine
from autotune.external.flags import problems_of
from autotune.external.table import DEVICES, Device, Value, load_table
from autotune.external_search.options import ExternalOptions
from autotune.external_search.space import (
    FlagConfig,
    FlagSpace,
    default_config,
    fixed_values,
    load_flag_space,
)
from autotune.hardware.detect import describe_hardware
from autotune.load.endpoint import api_key_of, server_url
from autotune.model_info import ModelInfo, read_model_info
from autotune.records import RunFolder
from autotune.search.prepare import CAPACITY_PROBES, new_run, read_search_run
from autotune.search.schedule import Schedule, plan_schedule
from autotune.traffic import Traffic, load_traffic
from engine.config import EngineConfig
from engine.errors import EngineError

# What starting an engine takes, until the first start has told.
START_GUESS_S = 60.0


@dataclass(slots=True)
class PreparedExternal:
    """What a search over another engine's flags works with; `run` is the content of `run.json`.

    `traffic` is None where a resumed run has its windows on disk already.
    """

    run: dict[str, Any]
    options: ExternalOptions
    engine: ExternalEngine
    model: ModelInfo
    base: FlagConfig
    space: FlagSpace
    schedule: Schedule
    traffic: Traffic | None
    notes: list[str] = field(default_factory=list)
    num_windows: int = 1


def prepare_external(
    folder: RunFolder, options: ExternalOptions | None, command: Sequence[str]
) -> PreparedExternal:
    """Check everything that can be wrong before anything is measured, and write `run.json`.

    With `options` None the run in `folder` is taken up as its `run.json` describes it.

    Raises:
        BadInput: bad options, workload, space or fixed values.
        EnvironmentMissing: the engine's program is not there.
    """
    run = read_search_run(folder) if options is None else None
    if run is not None:
        options = kept_options(run, folder)
    assert options is not None
    options.parsed_objective  # noqa: B018 - raises now what would otherwise be found after a trial
    engine, notes = engine_of(options)
    model = model_shape(options)
    if run is not None and run["model"]["fingerprint"] != model.fingerprint:
        raise BadInput(
            f"the model in {options.shape_folder} changed since this run began: start a new run, "
            "or put the model back"
        )
    if run is not None and run["engine"]["version"] != engine.version:
        raise BadInput(
            f"this run began with {engine.table.title} {run['engine']['version']} and finds "
            f"{engine.version}: start a new run, or put the release back"
        )
    table, device = engine.table, engine.device
    if run is None:
        space = load_flag_space(
            table,
            device,
            options.narrowing,
            Path(options.space_file) if options.space_file else None,
            fixed=engine.fixed,
            lossy=options.lossy,
        )
        base = default_config(table, device, engine.fixed, list(space.values))
    else:
        space = FlagSpace(table, device, {n: tuple(v) for n, v in run["search_space"].items()})
        base = FlagConfig(run["engine_config"])
    if problems := problems_of(table, base.given(table, device), device):
        raise BadInput(f"{table.title} would refuse the values given: {'; '.join(problems)}")
    if not space.values:
        raise BadInput(f"nothing of {table.title} is left to search: every knob has one value")
    traffic_options = options.traffic
    schedule = plan_schedule(
        options.budget_s,
        run["schedule"]["window_s"] if run else traffic_options.duration_s,
        CAPACITY_PROBES if options.objective == "capacity" else 1,
        options.rounds,
        options.finalists,
        START_GUESS_S,
    )
    traffic = None
    if run is None or not run["workload"]:
        limit = base.values.get(table.length.knob)
        if isinstance(limit, int):
            model = dataclasses.replace(model, max_model_len=min(model.max_model_len, limit))
        shape = EngineConfig(model=options.shape_folder)
        traffic = load_traffic(traffic_options, model, shape, options.seed)
    prepared = PreparedExternal(
        run or {}, options, engine, model, base, space, schedule, traffic, notes
    )
    if run is None:
        # The hardware as it is here; an engine that a command starts elsewhere is named as such.
        prepared.run = new_run(
            prepared, describe_hardware(device if _has(device) else "cpu"), command
        )
        prepared.run["engine"] = _told(engine)
        prepared.run["versions"] |= {table.engine: engine.version}
        folder.write_json(folder.run_json, prepared.run)
    else:
        prepared.notes = list(run.get("notes", ()))
        prepared.num_windows = run.get("num_windows", 1)
        if run["status"] == "interrupted":
            run["status"] = "running"
            folder.write_json(folder.run_json, run)
    return prepared


def model_shape(options: ExternalOptions) -> ModelInfo:
    """What must be known of the model: vocabulary and longest context, by its config.

    Other engines serve architectures that the bundled one does not, so that config.json alone is
    read where the bundled engine refuses it.

    Raises:
        BadInput: there is no folder with a config that tells them.
    """
    folder = options.shape_folder
    try:
        return read_model_info(EngineConfig(model=folder))
    except (EngineError, OSError) as error:
        known = _plain_config(Path(folder))
        if known is None:
            raise BadInput(
                f"the vocabulary and longest context of {folder} cannot be read ({error}): give "
                "--tokenizer FOLDER with the model's config.json and tokenizer"
            ) from None
        return known


def _plain_config(folder: Path) -> ModelInfo | None:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = {**raw, **(raw.get("text_config") or {})}
        vocabulary, limit = int(text["vocab_size"]), int(text["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    names = raw.get("architectures") or [raw.get("model_type", "unknown")]
    path = folder.resolve()
    return ModelInfo(
        path=str(path),
        name=path.name,
        architecture=str(names[0]),
        parameters=0,
        vocab_size=vocabulary,
        max_model_len=limit,
        fingerprint="",
    )


def engine_of(options: ExternalOptions) -> tuple[ExternalEngine, list[str]]:
    """The engine, and notes on its release.

    Raises:
        BadInput: no such engine, or fixed values that it would refuse.
        EnvironmentMissing: its program is not there or does not run.
    """
    table = load_table(options.engine)
    fixed = fixed_values(table, options.fixed, options.narrowing)
    device = _device(options.device)
    key = api_key_of(options.api_key_env)
    if options.url is not None:
        engine = running_engine(
            options.engine,
            server_url(options.url),
            options.restart_command,
            model=options.model or options.shape_folder,
            device=device or ("cuda" if _has("cuda") else "cpu"),
            served_name=options.served_name or "",
            fixed=fixed,
            start_limit_s=options.start_limit_s,
            api_key=key,
        )
    else:
        engine = find_engine(
            options.engine,
            options.model,
            program=options.engine_path,
            device=device,
            served_name=options.served_name,
            fixed=fixed,
            extra_arguments=options.engine_arguments,
            start_limit_s=options.start_limit_s,
            api_key=key,
        )
    note = engine.version_note()
    notes = [] if note is None else [note]
    return engine, notes


def kept_options(run: Mapping[str, Any], folder: RunFolder) -> ExternalOptions:
    """The options of a run, from its `run.json`.

    Raises:
        BadInput: it is a run of the bundled engine.
    """
    if "engine" not in run:
        raise BadInput(f"{folder.path} holds a run of the bundled engine")
    options = ExternalOptions.from_json(run["options"])
    assert isinstance(options, ExternalOptions)
    return options


def _device(given: str | None) -> Device | None:
    if given in (None, "auto"):
        return None
    for device in DEVICES:
        if given == device:
            return device
    raise BadInput(f"--device {given!r} is not one of auto, {', '.join(DEVICES)}")


def _has(device: str) -> bool:
    from autotune.hardware.gpu import read_gpus

    return device == "cpu" or bool(read_gpus().gpus)


def _told(engine: ExternalEngine) -> dict[str, Any]:
    """What `run.json` says of the engine."""
    fixed: dict[str, Value] = dict(engine.fixed)
    return {
        "name": engine.table.engine,
        "title": engine.table.title,
        "version": engine.version,
        "checked": list(engine.table.version.checked),
        "program": list(engine.program),
        "device": engine.device,
        "model": engine.model,
        "served_name": engine.served_name,
        "fixed": fixed,
        "extra_arguments": list(engine.extra_arguments),
        "url": engine.url,
        "restart_command": list(engine.restart_command),
    }
