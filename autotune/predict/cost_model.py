"""What predictions ask of whoever knows the cost of steps: a calibration, or a data sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from autotune.predict.drafting import DraftProfile
from autotune.predict.load_times import NO_TIMES, LoadTimes
from autotune.predict.pace import STEADY, Pace
from autotune.predict.virtual_engine import Cost
from engine.config import EngineConfig
from engine.engine import CacheShape


@dataclass(frozen=True, slots=True)
class CostDraw:
    """One guess at what is not known: the cost of steps, the times between them, their pace.

    `drafts` is how those of the config's `speculative_method` fare, None where it has none.
    """

    cost: Cost
    times: LoadTimes = NO_TIMES
    pace: Pace = STEADY
    drafts: DraftProfile | None = None


class CostModel(Protocol):
    """What the steps of a model's configurations cost, and how far that may be off."""

    def middle(self, config: EngineConfig) -> CostDraw:
        """The likeliest cost under a config.

        Raises:
            autotune.predict.apply.NotPredictable: nothing is known of a knob's effect.
        """
        ...

    def draws(self, config: EngineConfig, count: int, seed: int) -> Sequence[CostDraw]:
        """Costs drawn from what may be so, alike for the same seed whatever the config.

        What one config's draw has too slow, another's of the same place has as well, as far as they
        share a cause: a comparison of two configs is to be made draw by draw.

        Raises:
            autotune.predict.apply.NotPredictable: nothing is known of a knob's effect.
        """
        ...

    def cache(self, config: EngineConfig) -> CacheShape | None:
        """The KV cache under a config; None if it does not hold the longest sequence."""
        ...
