"""The deployment files of a run: which there are, and writing them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.calibration_text import with_text_at_hand
from autotune.deploy.evidence import Evidence
from autotune.deploy.measured_engine import MeasuredEngine
from autotune.deploy.measured_facts import measured_facts
from autotune.deploy.target import BUNDLED, Deployment, Exported, Target
from autotune.deploy.targets import find_target
from autotune.errors import BadInput
from autotune.records import RunFolder, write_atomically
from engine.config import EngineConfig
from engine.errors import ConfigError

# What a run leaves without being asked, each as its main file alone.
WITH_EVERY_RUN = (BUNDLED, "vllm")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What a person may say of an export; see `Deployment`."""

    engine: str | None = None
    model: str | None = None
    max_replicas: int = 4


def write_deploy(
    folder: RunFolder, config: EngineConfig, *, evidence: Mapping[str, Any]
) -> list[Path]:
    """Write what every run leaves into its folder's `deploy/`: the main file of each target.

    Arguments:
        folder: the run's folder.
        config: the configuration to deploy.
        evidence: the content of `run.json`, its result included.
    """
    config = with_text_at_hand(config, folder.path)
    paths = []
    for name in WITH_EVERY_RUN:
        exported = export_config(find_target(name), config, evidence)
        main = next(iter(exported.files))
        write_atomically(folder.deploy / main, exported.files[main].encode())
        paths.append(folder.deploy / main)
    return paths


def export_config(
    target: Target,
    config: EngineConfig,
    run: Mapping[str, Any],
    options: ExportOptions | None = None,
) -> Exported:
    """The files of one target; nothing is written.

    Arguments:
        target: what to export to.
        config: the configuration to deploy.
        run: the content of `run.json`, its result included.
        options: what a person said of it.

    Raises:
        BadInput: the platform cannot run that engine, or cannot be made from this run.
    """
    options = options or ExportOptions()
    own = MeasuredEngine.of(run)
    if own is not None and not target.carries:
        raise BadInput(
            f"this was measured on {own.table.title} itself, and deploy/ of the run has its files; "
            f"only runs of the bundled engine are translated, as --to {target.name} would"
        )
    if options.engine is not None and options.engine not in target.carries:
        can = f"it can run {', '.join(target.carries)}" if target.carries else "it is an engine"
        raise BadInput(f"--engine {options.engine} does not go with --to {target.name}: {can}")
    evidence = Evidence.from_run(run)
    deployment = Deployment(
        config=config,
        evidence=evidence,
        run=run,
        measured=measured_facts(config, run),
        engine=options.engine,
        model=options.model,
        max_replicas=options.max_replicas,
    )
    return target.write(deployment)


def write_exported(exported: Exported, directory: Path) -> list[Path]:
    """Write a target's files into a directory, scripts as executables; returns their paths."""
    paths = []
    for name, text in exported.files.items():
        path = directory / name
        write_atomically(path, text.encode())
        if name.endswith(".sh"):
            path.chmod(0o755)
        paths.append(path)
    return paths


def winner_of(run: Mapping[str, Any], source: Path) -> EngineConfig:
    """The configuration that a finished run chose; of another engine, as far as it is the same.

    Arguments:
        run: the content of `run.json`.
        source: the run's folder, for messages.

    Raises:
        BadInput: it is no run, or one without a result, or with one that cannot be read.
    """
    if (kind := run.get("kind", "run")) != "run":
        raise BadInput(f"{source} is of autotune {kind}, which chooses no winner; export a run's")
    result = run.get("result")
    if not result:
        raise BadInput(
            f"{source} has no result yet (status {run.get('status', 'unknown')}); finish it with "
            f"autotune run --resume {shlex.quote(str(source))}"
        )
    own = MeasuredEngine.of(run)
    if own is not None:
        return own.as_bundled()
    try:
        return with_text_at_hand(EngineConfig.from_mapping(result["winner_config"]), source)
    except (KeyError, TypeError, ConfigError) as error:
        raise BadInput(f"{source / 'run.json'}: the winner's config is unreadable: {error}") from (
            error
        )
