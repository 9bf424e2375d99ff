"""The deployment files of a run: which there are, and writing them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.calibration_text import with_text_at_hand
from autotune.deploy.engine_yaml import render_engine_yaml
from autotune.deploy.evidence import Evidence
from autotune.deploy.serving_engine import load_serving_engine, serving_engines
from autotune.deploy.serving_yaml import render_serving_yaml
from autotune.errors import BadInput
from autotune.records import RunFolder, write_atomically
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError

BUNDLED = "engine"


def targets() -> list[str]:
    """What a configuration can be exported to: the bundled engine, then the others."""
    return [BUNDLED, *serving_engines()]


def write_deploy(
    folder: RunFolder, config: EngineConfig, *, evidence: Mapping[str, Any]
) -> list[Path]:
    """Write a configuration for every target into the run folder's `deploy/`.

    Arguments:
        folder: the run's folder.
        config: the configuration to deploy.
        evidence: the content of `run.json`, its result included.
    """
    config = with_text_at_hand(config, folder.path)
    return [write_target(name, folder.deploy, config, evidence) for name in targets()]


def file_name(target: str) -> str:
    """The name of the file that a target reads.

    Raises:
        BadInput: there is no such target.
    """
    if target == BUNDLED:
        return "engine.yaml"
    if target not in serving_engines():
        raise BadInput(f"cannot export to {target!r}; known are {', '.join(targets())}")
    return load_serving_engine(target).file


def write_target(
    target: str, directory: Path, config: EngineConfig, run: Mapping[str, Any]
) -> Path:
    """Write a configuration for one target into a directory; returns the file's path.

    Raises:
        BadInput: there is no such target.
    """
    path = directory / file_name(target)
    evidence = Evidence.from_run(run)
    if target == BUNDLED:
        text = render_engine_yaml(config, evidence)
    else:
        measured = _measured(config, evidence)
        text = render_serving_yaml(load_serving_engine(target), config, evidence, measured)
    write_atomically(path, text.encode())
    return path


def winner_of(run: Mapping[str, Any], source: Path) -> EngineConfig:
    """The configuration that a finished run chose.

    Arguments:
        run: the content of `run.json`.
        source: the run's folder, for messages.

    Raises:
        BadInput: the run has no result, or one that this release cannot read.
    """
    result = run.get("result")
    if not result:
        raise BadInput(
            f"{source} has no result yet (status {run.get('status', 'unknown')}); finish it with "
            "autotune run --resume"
        )
    try:
        return with_text_at_hand(EngineConfig.from_mapping(result["winner_config"]), source)
    except (KeyError, TypeError, ConfigError) as error:
        raise BadInput(f"{source / 'run.json'}: the winner's config is unreadable: {error}") from (
            error
        )


def _measured(config: EngineConfig, evidence: Evidence) -> dict[str, int]:
    """What unset knobs came to: the model's length limit, the bytes of the KV cache.

    Empty where the model's folder is not here any more.
    """
    from engine.checkpoints.model_folder import open_model_folder
    from engine.kv_cache import cache_bytes
    from engine.loading import resolve_dtype, resolve_max_model_len
    from engine.models.registry import decoder_spec

    try:
        spec = decoder_spec(open_model_folder(config.model))
    except EngineError:
        return {}
    measured = {"max_model_len": spec.max_position}
    blocks = (evidence.bench.get("engine") or {}).get("kv_blocks_total")
    if blocks:
        length = resolve_max_model_len(config, spec)
        measured["kv_cache_memory_bytes"] = cache_bytes(
            config, spec, resolve_dtype(config, spec), length, int(blocks)
        )
    return measured
