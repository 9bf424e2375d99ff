"""Where the cost of steps comes from: data sheets, tightened by what a user measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from autotune.errors import BadInput
from autotune.hardware.catalogue import Catalogue, Gpu
from autotune.hardware.efficiency import efficiency_of
from autotune.planning.catalogue_model import CatalogueModel
from autotune.planning.measured_factors import MeasuredFactors, measured_factors
from autotune.planning.model_shape import ModelShape
from autotune.predict.apply import NotPredictable
from autotune.predict.cost_model import CostModel


@dataclass(frozen=True, slots=True)
class CostSource:
    """Costs of one model by GPU.

    `model_of` gives what is known of a GPU. `scaled` gives the cost on a GPU with other figures,
    for what binds; by the data sheet alone.
    """

    model_of: Callable[[Gpu], CostModel]
    scaled: Callable[[Gpu], CostModel]
    notes: list[str] = field(default_factory=list)


def read_cost_source(
    shape: ModelShape, catalogue: Catalogue, asked: list[Gpu], calibration: Path | None
) -> CostSource:
    """The cost of a model by the catalogue, and by a calibration where it was made on such a GPU.

    Args:
        shape: the model.
        catalogue: where the calibrated GPU is looked for by the name that its driver told.
        asked: the GPUs that are planned for.
        calibration: its file, or the folder of a run or a profile.

    Raises:
        BadInput: the calibration cannot be read, or was not made on a GPU of the catalogue.
    """
    made: dict[str, CostModel] = {}
    notes: list[str] = []
    measured: dict[str, MeasuredFactors] = {}
    if calibration is not None:
        gpu, factors, told = _measured(shape, catalogue, calibration)
        measured[gpu.name] = factors
        notes += told
        if gpu.name not in {one.name for one in asked}:
            notes.append(
                f"the calibration was made on {gpu.name}, which is not among --gpus: it narrows "
                "nothing here"
            )

    def known(gpu: Gpu) -> CostModel:
        if gpu.name not in made:
            made[gpu.name] = CatalogueModel(shape, gpu, measured=measured.get(gpu.name))
        return made[gpu.name]

    def scaled(gpu: Gpu) -> CostModel:
        return CatalogueModel(shape, gpu)

    return CostSource(known, scaled, notes)


def _measured(
    shape: ModelShape, catalogue: Catalogue, path: Path
) -> tuple[Gpu, MeasuredFactors, list[str]]:
    from importlib.metadata import version

    from autotune.predict.calibration_source import load_calibration

    found = load_calibration(path).checked(version("inference-autotune"), None, None)
    name = found.hardware.get("name")
    gpu = catalogue.of_driver(str(name)) if found.hardware.get("device") == "cuda" else None
    if gpu is None:
        raise BadInput(
            f"--calibration {path}: it was made on {name or 'an unknown device'}, which is no GPU "
            "of the catalogue; a plan takes one that was made on one of the GPUs"
        )
    try:
        factors = measured_factors(found, shape, gpu, efficiency_of(gpu))
    except NotPredictable as error:
        raise BadInput(f"--calibration {path}: {error}") from None
    told = f"steps on {gpu.name} cost what {path} measured on one"
    if found.created_at:
        told += f" ({found.created_at[:10]})"
    return gpu, factors, [told, *found.warnings]
