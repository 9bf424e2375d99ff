"""The whole examination that `autotune doctor` shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from autotune.hardware import checkup
from autotune.hardware.ceilings import Ceilings, measure_ceilings
from autotune.hardware.checkup import Check
from autotune.hardware.detect import describe_hardware
from autotune.hardware.gpu import read_gpus
from autotune.hardware.versions import library_versions
from autotune.search.methods_offered import methods_by_speed

SECONDS_EACH = 0.6


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that was found; `checks` are the rows for a person.

    `ceilings` is None where torch, which measures them, cannot be used.
    """

    hardware: dict[str, Any]
    versions: dict[str, str | None]
    checks: list[Check]
    ceilings: Ceilings | None

    @property
    def engine_can_run(self) -> bool:
        """Whether the bundled engine can run here."""
        return not any(check.fatal for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "engine_can_run": self.engine_can_run,
            "hardware": self.hardware,
            "versions": self.versions,
            "quantization": methods_by_speed(self.hardware),
            "limits": None if self.ceilings is None else self.ceilings.to_json(),
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }


def examine(step: Callable[[str], None]) -> Findings:
    """Look at everything; takes some seconds.

    Arguments:
        step: told what is looked at, before it is.
    """
    step("Reading the hardware")
    readings = read_gpus()
    hardware = describe_hardware(readings=readings)
    step("Importing the libraries")
    checks = [checkup.check_python(), *checkup.check_libraries()]
    checks += [
        checkup.check_processor(hardware),
        checkup.check_load(hardware),
        checkup.check_memory(hardware),
        checkup.check_disk(Path.cwd()),
        *checkup.check_gpus(readings, _cuda_available()),
        checkup.check_embedded_model(Path(str(files("autotune").joinpath("embedded", "target")))),
    ]
    step("Loading the native kernels")
    checks += [checkup.check_native_kernels(), *checkup.check_triton_kernels()]
    ceilings = None
    if not any(check.fatal for check in checks):
        ceilings = measure_ceilings(hardware["device"], SECONDS_EACH, step)
    return Findings(hardware, library_versions(), checks, ceilings)


def _cuda_available() -> bool | None:
    try:
        import torch

        return bool(torch.cuda.is_available())
    except Exception:  # told by the check of the library
        return None
