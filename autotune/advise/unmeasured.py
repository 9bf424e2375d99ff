"""A profile of what cannot be run: a model that exceeds the memory, known by its shapes alone."""

from __future__ import annotations

from autotune.hardware.detect import describe_hardware
from autotune.model_info import with_default_model
from autotune.profiling.model_facts import model_facts
from autotune.profiling.schema import Profile, Source, Traffic
from autotune.records import utc_now
from engine.config import EngineConfig


def profile_if_too_large(
    config: EngineConfig, *, slo: str | None = None, price: float | None = None
) -> Profile | None:
    """The profile of a model whose weights alone exceed the device's memory; None if they do not.

    Nothing is loaded. Ranks on GPUs have a memory each, ranks on a processor share one.

    Raises:
        engine.errors.EngineError: no such model, or one that cannot be read.
    """
    config = with_default_model(config)
    hardware = describe_hardware(config.device)
    config = config.replace(device=hardware["device"])
    facts = model_facts(config)
    devices = config.tensor_parallel_size if hardware["device"] == "cuda" else 1
    memory = hardware["memory_bytes"] * devices
    if facts.resident_bytes < memory:
        return None
    return Profile(
        created_at=utc_now(),
        source=Source(kind="run"),
        engine_config=config.to_dict(),
        hardware=hardware,
        slo=slo,
        price=price,
        model=facts,
        traffic=Traffic.none(),
        partial=[
            f"{facts.name} was not run: its weights take {facts.resident_bytes / 2**30:.3g} GiB "
            f"and the device has {memory / 2**30:.3g} GiB, so that this is arithmetic alone"
        ],
    )
