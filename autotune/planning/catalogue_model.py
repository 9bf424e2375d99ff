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

# A guess by how many were drawn, the seed and its place; None for the middle.
_Which = tuple[int, int, int] | None


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
        # Batch limits change what a cost rests on in nothing: its tables are made once.
        self._costs: dict[tuple[_Which, int, str, str, str], CatalogueCost] = {}
        self._drawn: dict[tuple[int, int], list[Guess]] = {}

    def middle(self, config: EngineConfig) -> CostDraw:
        """The likeliest cost under a config."""
        return self._draw(config, self._middle(), None)

    def draws(self, config: EngineConfig, count: int, seed: int) -> Sequence[CostDraw]:
        """Costs that may be so, alike for the same seed whatever the config."""
        guesses = self._guesses(count, seed)
        return [self._draw(config, g, (count, seed, place)) for place, g in enumerate(guesses)]

    def cost(self, config: EngineConfig) -> CatalogueCost:
        """The likeliest cost, with its terms."""
        return self._cost(config, self._middle(), None)

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

    def _cost(self, config: EngineConfig, guess: Guess, which: _Which) -> CatalogueCost:
        shape, ranks = served_shape(self.shape, config), config.tensor_parallel_size
        key = (which, ranks, config.quantization, config.kv_cache_dtype, shape.dtype)
        known = self._costs.get(key)
        rates = known.parts.rates if known else guess.rates(self.gpu, shape.dtype, ranks)
        cost = CatalogueCost(shape, config, rates, known)
        return self._costs.setdefault(key, cost) if known is None else cost

    def _draw(self, config: EngineConfig, guess: Guess, which: _Which) -> CostDraw:
        return CostDraw(self._cost(config, guess, which), LoadTimes(arrival=guess.arrival))
