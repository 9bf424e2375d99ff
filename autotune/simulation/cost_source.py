"""Where the costs of steps come from: a calibration that is there, one made here, a data sheet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autotune.errors import BadInput
from autotune.hardware.catalogue import load_catalogue
from autotune.hardware.detect import describe_hardware
from autotune.hardware.versions import library_versions
from autotune.model_info import ModelInfo, read_model_info, with_default_model
from autotune.planning.catalogue_model import CatalogueModel
from autotune.planning.memory import longest_served, memory_plan
from autotune.planning.methods_run import why_not
from autotune.planning.read_shape import read_shape
from autotune.predict.calibration import Calibration
from autotune.predict.calibration_source import load_calibration
from autotune.predict.cost_model import CostModel
from autotune.predict.served import served
from autotune.simulation.kept_calibration import calibrated_here
from autotune.simulation.options import SimulateOptions
from autotune.simulation.simulate import DoesNotFit, cache_of
from engine.config import EngineConfig
from engine.engine import CacheShape

Say = Callable[[str], None]
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class CostSource:
    """Costs, and what they are of; `told` is for people and `--json`.

    `config` names model and device. `kv_bytes_per_token` are of all layers and ranks.
    """

    model: CostModel
    info: ModelInfo
    config: EngineConfig
    kv_bytes_per_token: float
    told: dict[str, Any]
    notes: tuple[str, ...] = ()

    def cache(self) -> CacheShape:
        """The KV cache of the config.

        Raises:
            DoesNotFit: it does not hold the longest sequence.
        """
        return cache_of(self.model, self.config)


def cost_source(options: SimulateOptions, say: Say, stop: threading.Event) -> CostSource:
    """Find out what steps cost.

    Args:
        options: what was asked for.
        say: told what is going on.
        stop: set it to give up a calibration.

    Raises:
        BadInput: no such GPU or calibration, or one of another model.
        DoesNotFit: the model does not fit the GPU.
        Interrupted: `stop` was set.
        engine.errors.EngineError: the model or the config cannot be used.
    """
    if options.gpu is not None:
        return _of_data_sheet(options, options.gpu)
    config = with_default_model(
        EngineConfig.from_mapping({**options.served_knobs, "seed": options.seed})
    )
    info = read_model_info(config)
    version = str(library_versions()["autotune"])
    if options.calibration is not None:
        say("reading the calibration")
        known = load_calibration(options.calibration)
        # What it was measured on need not be this machine: then the question is about the former.
        calibration = known.checked(version, info.fingerprint, None)
        config = config.replace(device=known.config.device)
        where = str(options.calibration)
        return _of_calibration(calibration, config, info, where, "read")
    hardware = describe_hardware(config.device)
    config = config.replace(device=hardware["device"])
    kept = calibrated_here(config, info, hardware, version, options.recalibrate, say, stop)
    how = "measured" if kept.is_new else "kept"
    return _of_calibration(kept.calibration, config, info, str(kept.path), how)


def _of_calibration(
    calibration: Calibration, config: EngineConfig, info: ModelInfo, where: str, how: str
) -> CostSource:
    facts = served(config, None, calibration.model)
    assert facts is not None
    told = {
        "kind": "calibration",
        "where": where,
        "hardware": calibration.hardware.get("name"),
        "engine_version": calibration.engine_version,
        "created_at": calibration.created_at,
        "step_error": calibration.median_error,
    }
    notes: tuple[str, ...] = ()
    if how == "measured":
        notes = (f"this machine was calibrated with this model; it is kept as {where}",)
    elif how == "kept":
        notes = (
            f"costs are of the calibration of {calibration.created_at}, kept as {where}; "
            "--recalibrate measures again",
        )
    return CostSource(
        calibration,
        info,
        config,
        facts.model.kv_bytes_per_token,
        told,
        (*notes, *calibration.warnings),
    )


def _of_data_sheet(options: SimulateOptions, name: str) -> CostSource:
    gpu = load_catalogue().find(name)
    config = EngineConfig.from_mapping(
        {**options.served_knobs, "seed": options.seed, "device": "cuda"}
    )
    config = with_default_model(config)
    shape = read_shape(config.model)
    reason = why_not(gpu, config.quantization) or shape.obstacle(config.tensor_parallel_size)
    if reason is not None:
        raise BadInput(f"{gpu.name} cannot serve this: {reason}")
    plan = memory_plan(shape, gpu, config)
    if not plan.fits:
        missing = plan.shortfall_bytes / _GIB
        raise DoesNotFit(
            f"{shape.name} does not fit {_gpus(gpu.name, config)}: {missing:.3g} GiB are missing "
            f"on each for one sequence of {plan.max_model_len} tokens; use more GPUs "
            "(--tensor-parallel-size), a quantization, or a lower --max-model-len"
        )
    info = ModelInfo(
        path=config.model,
        name=shape.name,
        architecture=shape.architecture,
        parameters=shape.num_parameters,
        vocab_size=shape.vocab_size,
        max_model_len=longest_served(shape, config),
        fingerprint="",
    )
    ranks = config.tensor_parallel_size
    told = {
        "kind": "data_sheet",
        "where": gpu.name,
        "hardware": gpu.title,
        "engine_version": None,
        "created_at": None,
        "step_error": None,
    }
    notes = (
        f"costs are of the data sheet of {_gpus(gpu.title, config)} and of what such GPUs achieve; "
        "a calibration on one of them (autotune profile there) would narrow the bounds",
        *shape.notes,
    )
    return CostSource(
        CatalogueModel(shape, gpu),
        info,
        config,
        float(ranks * shape.kv_bytes_per_token(config.kv_cache_dtype, ranks)),
        told,
        notes,
    )


def _gpus(name: str, config: EngineConfig) -> str:
    count = config.tensor_parallel_size
    return name if count == 1 else f"{count} x {name}"
