"""Calibrations of this machine, kept in the user's cache: one for each model, machine and release.

A calibration takes up to a minute, and holds until one of these changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.errors import BadInput, EnvironmentMissing, Interrupted
from autotune.model_info import ModelInfo
from autotune.predict.calibration import Calibration
from autotune.predict.calibration_file import read_calibration, write_calibration
from engine.config import EngineConfig

Say = Callable[[str], None]
# Seconds that a calibration may take.
BUDGET_S = 60.0
# Knobs that a step's cost hangs on in a way that no calibration tells of others.
_MEASURED_UNDER = ("dtype", "num_threads", "cuda_graphs")
# Knobs of the asked config that a calibration is made under; the others are the engine's own.
_CALIBRATED_UNDER = (
    *_MEASURED_UNDER,
    "model",
    "tokenizer",
    "device",
    "tensor_parallel_size",
    "quantization",
    "kv_cache_dtype",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "seed",
)
# Sequences that steps are measured with are no longer than so many tokens.
_LONGEST = 4096


@dataclass(frozen=True, slots=True)
class Kept:
    """A calibration and its file; whether it was measured just now."""

    calibration: Calibration
    path: Path
    is_new: bool


def calibrated_here(
    config: EngineConfig,
    info: ModelInfo,
    hardware: Mapping[str, Any],
    version: str,
    again: bool,
    say: Say,
    stop: threading.Event,
) -> Kept:
    """The kept calibration of this machine, or a new one, which is then kept.

    Args:
        config: what is to be predicted; names model and device.
        info: the model.
        hardware: as of `autotune.hardware.detect.describe_hardware`.
        version: of the engine.
        again: measure though there is one.
        say: told what is going on.
        stop: set it to give up.

    Raises:
        Interrupted: `stop` was set.
        EnvironmentMissing: the cache cannot be written to.
        engine.errors.EngineError: the model cannot be loaded.
    """
    path = kept_path(config, info, hardware, version)
    if not again and path.exists():
        try:
            known = read_calibration(path).checked(version, info.fingerprint, hardware)
            return Kept(known, path, is_new=False)
        except BadInput:
            say("calibrating: what was kept cannot be read any more")
    calibration = _measured(config, info, hardware, say, stop)
    try:
        write_calibration(path, calibration)
    except OSError as error:
        raise EnvironmentMissing(
            f"the calibration cannot be kept as {path}: {error}; set XDG_CACHE_HOME to a folder "
            "that can be written to"
        ) from error
    return Kept(calibration, path, is_new=True)


def kept_path(
    config: EngineConfig, info: ModelInfo, hardware: Mapping[str, Any], version: str
) -> Path:
    """Where the calibration of a model on a machine is kept."""
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(cache) if cache else Path.home() / ".cache") / "autotune" / "calibrations"
    told = [
        version,
        *(hardware.get(name) for name in ("device", "name", "cores", "memory_bytes")),
        *(getattr(config, name) for name in _MEASURED_UNDER),
    ]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return folder / f"{info.fingerprint[:16]}-{digest[:16]}.json"


def _measured(
    config: EngineConfig,
    info: ModelInfo,
    hardware: Mapping[str, Any],
    say: Say,
    stop: threading.Event,
) -> Calibration:
    """Measure this machine, by the default limits on batches, so that it tells of all."""
    from autotune.loaded_engines import LoadedEngines
    from autotune.predict.calibration_run import calibrate
    from autotune.profiling.model_facts import model_facts
    from autotune.search.methods_offered import offer_for

    default = EngineConfig.from_mapping(
        {
            **{name: getattr(config, name) for name in _CALIBRATED_UNDER},
            "max_model_len": min(info.max_model_len, _LONGEST),
        }
    )
    offer = offer_for(hardware, quantized=info.quantization is not None).values
    engines = LoadedEngines(keep=False)
    say("loading the model")
    try:
        return calibrate(
            default,
            model_facts(default),
            engines,
            hardware=dict(hardware),
            methods=[str(method) for method in offer["quantization"]],
            cache_dtypes=[str(dtype) for dtype in offer["kv_cache_dtype"]],
            budget_s=BUDGET_S,
            say=_unless_stopped(say, stop),
            stop=stop,
        )
    finally:
        engines.close()


def _unless_stopped(say: Say, stop: threading.Event) -> Say:
    """Parts that do not look at the event tell what they are at, and end there."""

    def tell(text: str) -> None:
        if stop.is_set():
            raise Interrupted("The calibration was stopped; nothing is kept of it.")
        say(f"calibrating, up to {BUDGET_S:.0f} s: {text}")

    return tell
