"""Where the cost of steps comes from: data sheets, tightened by what a user measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from autotune.errors import BadInput
from autotune.hardware.catalogue import Gpu, load_catalogue
from autotune.hardware.efficiency import efficiency_of
from autotune.hardware.versions import library_versions
from autotune.planning.catalogue_model import CatalogueModel
from autotune.planning.measured_factors import MeasuredFactors, measured_factors
from autotune.planning.model_shape import ModelShape
from autotune.predict.apply import NotPredictable
from autotune.predict.calibration import Calibration
from autotune.predict.calibration_source import load_calibration
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


def read_cost_source(shape: ModelShape, calibration: Path | None) -> CostSource:
    """The cost of a model by the catalogue, and by a calibration where it was made on such a GPU.

    Raises:
        BadInput: the calibration cannot be read, is of no GPU of the catalogue, or tells nothing.
    """
    measured: Calibration | None = None
    notes: list[str] = []
    name = None
    if calibration is not None:
        version = str(library_versions()["autotune"])
        measured = load_calibration(calibration).checked(version, None, None)
        name = _calibrated_gpu(measured, calibration)
        notes = [
            f"costs on {name} are by the calibration {calibration} of {measured.model.name}, made "
            f"on {measured.hardware.get('name')}",
            *measured.warnings,
        ]
    made: dict[str, CostModel] = {}

    def by_sheet(gpu: Gpu) -> CostModel:
        if gpu.name not in made:
            made[gpu.name] = CatalogueModel(shape, gpu, measured=_factors(gpu))
        return made[gpu.name]

    def scaled(gpu: Gpu) -> CostModel:
        return CatalogueModel(shape, gpu)

    def _factors(gpu: Gpu) -> MeasuredFactors | None:
        if measured is None or gpu.name != name:
            return None
        try:
            return measured_factors(measured, shape, gpu, efficiency_of(gpu))
        except NotPredictable as error:
            raise BadInput(f"{calibration} tells nothing of its own steps: {error}") from None

    return CostSource(by_sheet, scaled, notes)


def _calibrated_gpu(calibration: Calibration, path: Path) -> str:
    """The catalogue's name of the GPU that a calibration was made on."""
    driver_name = calibration.hardware.get("name")
    on_gpu = calibration.hardware.get("device") == "cuda"
    gpu = load_catalogue().of_driver(str(driver_name)) if on_gpu else None
    if gpu is None:
        raise BadInput(
            f"{path} was calibrated on {driver_name}, which is no GPU of the catalogue: a plan "
            "takes a calibration that was made on one of the GPUs it is for"
        )
    return gpu.name
