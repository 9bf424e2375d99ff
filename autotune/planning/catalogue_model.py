"""What a model's steps cost on a GPU that nobody here has, and how far that may be off."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from autotune.hardware.catalogue import Gpu
from autotune.hardware.efficiency import Efficiency, efficiency_of
from autotune.planning.catalogue_cost import CatalogueCost
from autotune.planning.device_rates import Guess
from autotune.planning.measured_factors import MeasuredFactors
from autotune.planning.memory import MemoryPlan, memory_plan, served_shape
from autotune.planning.model_shape import ModelShape
from autotune.predict.cost_model import CostDraw
from autotune.predict.load_times import LoadTimes
from engine.config import EngineConfig
from engine.engine import CacheShape


class CatalogueModel:
    """A `autotune.predict.cost_model.CostModel` of a model's sizes and a GPU's data sheet.

    Draws are guesses at the GPU's efficiency; those of one seed and place are the same for every
    model and config on that GPU, and its generation's GPUs have like ones.

    Args:
        shape: the model.
        gpu: the data sheet.
        efficiency: what is achieved of it; None for the installed factors of the GPU.
        measured: what a calibration on such a GPU says of these factors.

    Raises:
        autotune.errors.BadInput: there are no factors of the GPU's generation.
    """

    def __init__(
        self,
        shape: ModelShape,
        gpu: Gpu,
        efficiency: Efficiency | None = None,
        measured: MeasuredFactors | None = None,
    ) -> None:
        self.shape = shape
        self.gpu = gpu
        self.efficiency = efficiency_of(gpu) if efficiency is None else efficiency
        self._measured = measured
        self._drawn: dict[tuple[int, int], list[Guess]] = {}

    def middle(self, config: EngineConfig) -> CostDraw:
        """The likeliest cost under a config."""
        return self._draw(config, self._middle())

    def draws(self, config: EngineConfig, count: int, seed: int) -> Sequence[CostDraw]:
        """Costs that may be so, alike for the same seed whatever the config."""
        return [self._draw(config, guess) for guess in self._guesses(count, seed)]

    def cost(self, config: EngineConfig) -> CatalogueCost:
        """The likeliest cost, with its terms."""
        return self._cost(config, self._middle())

    def memory(self, config: EngineConfig) -> MemoryPlan:
        """Where the memory of each GPU goes."""
        return memory_plan(self.shape, self.gpu, config)

    def cache(self, config: EngineConfig) -> CacheShape | None:
        """The KV cache under a config; None if it does not hold the longest sequence."""
        return self.memory(config).cache

    def _middle(self) -> Guess:
        if self._measured is not None:
            return self._measured.middle(self.efficiency)
        return Guess.middle(self.efficiency)

    def _guesses(self, count: int, seed: int) -> list[Guess]:
        if (count, seed) not in self._drawn:
            alike = zlib.crc32(self.gpu.generation.encode())
            self._drawn[count, seed] = [
                self._guess(np.random.default_rng((seed, alike, place))) for place in range(count)
            ]
        return self._drawn[count, seed]

    def _guess(self, rng: np.random.Generator) -> Guess:
        if self._measured is not None:
            return self._measured.drawn(self.efficiency, rng)
        return Guess.drawn(self.efficiency, rng)

    def _cost(self, config: EngineConfig, guess: Guess) -> CatalogueCost:
        shape = served_shape(self.shape, config)
        rates = guess.rates(self.gpu, shape.dtype, config.tensor_parallel_size)
        return CatalogueCost(shape, config, rates)

    def _draw(self, config: EngineConfig, guess: Guess) -> CostDraw:
        return CostDraw(self._cost(config, guess), LoadTimes(arrival=guess.arrival))
