"""What a user asks of a search; kept in `run.json`, so that a run can be resumed from it alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from autotune.errors import BadInput
from autotune.search.objective import Objective, ObjectiveName
from autotune.slo import Slo, parse_slo
from autotune.speculative_models import with_speculative_model
from autotune.traffic_options import TrafficOptions
from engine.config import KNOBS

DEFAULT_SLO = "ttft<200ms,tpot<100ms"
DEFAULT_BUDGET_S = 240.0
SamplerName = Literal["simulator", "tpe", "random"]
SAMPLERS: tuple[SamplerName, ...] = ("simulator", "tpe", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """Options of `tune`; times in seconds.

    Args:
        config: knobs that differ from the engine's defaults, the model among them. This config is
            the default that every gain is over.
        traffic: the workload and its scaling.
        slo: the promise, in the grammar of `autotune.slo`.
        objective: what is maximised or minimised within the SLO.
        price: USD per hour of this machine, for the cost objective.
        budget_s: wall-clock time of the whole run; None if `trials` bounds it alone.
        trials: most search trials, the default included; None if `budget_s` bounds them alone.
        finalists: configurations that are measured again against the default.
        rounds: measurements of each in the proof.
        confidence: of the gain's interval.
        narrowing: values to try by knob, in place of the search space's.
        space_file: a user's search space; None takes the one of the device.
        seed: drives everything random.
        advice: whether the default's trial is profiled, and the search begins with what follows.
        sampler: what chooses the trials: `simulator` measures what simulated trials promise, `tpe`
            and `random` are Optuna's; without what a simulation needs, `tpe` takes its place.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    traffic: TrafficOptions = field(default_factory=TrafficOptions)
    slo: str = DEFAULT_SLO
    objective: ObjectiveName = "goodput"
    price: float | None = None
    budget_s: float | None = DEFAULT_BUDGET_S
    trials: int | None = None
    finalists: int = 2
    rounds: int = 5
    confidence: float = 0.95
    narrowing: Mapping[str, list[Any]] = field(default_factory=dict)
    space_file: str | None = None
    seed: int = 0
    advice: bool = True
    sampler: SamplerName = "simulator"

    def __post_init__(self) -> None:
        if self.budget_s is None and self.trials is None:
            raise BadInput("a search needs an end: give --budget (for instance 10m) or --trials")
        if self.budget_s is not None and not self.budget_s > 0:
            raise BadInput(f"--budget must be above 0, got {self.budget_s:g} s")
        if self.trials is not None and self.trials < 1:
            raise BadInput(f"--trials must be at least 1 (the default config), got {self.trials}")
        if self.finalists < 1:
            raise BadInput(f"--finalists must be at least 1, got {self.finalists}")
        if self.rounds < 2:
            raise BadInput(f"--rounds must be at least 2 to give an interval, got {self.rounds}")
        if self.sampler not in SAMPLERS:
            raise BadInput(f"sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        if self.objective == "capacity" and self.traffic.rate == math.inf:
            raise BadInput(
                "--objective capacity looks for a rate, so --rate inf contradicts it: leave --rate "
                "out, or give a finite rate to begin with"
            )
        if not 0.5 < self.confidence < 1:
            raise BadInput(f"--confidence must lie between 0.5 and 1, got {self.confidence}")

    @property
    def default_knobs(self) -> dict[str, Any]:
        """Knobs of the default: those of `config`, and what a single value to try fixes.

        A speculative method gets the model that is known for it, where none is named.
        """
        fixed = {
            name: values[0]
            for name, values in self.narrowing.items()
            if name in KNOBS and len(values) == 1
        }
        return with_speculative_model({**self.config, **fixed})

    @property
    def parsed_slo(self) -> Slo:
        """The SLO.

        Raises:
            SloError: it cannot be understood.
        """
        return parse_slo(self.slo)

    @property
    def parsed_objective(self) -> Objective:
        """The objective.

        Raises:
            BadInput: it is unknown, or lacks its price.
        """
        return Objective(self.objective, self.price)

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes the same options."""
        values = dataclasses.asdict(self)
        rate = self.traffic.rate
        # JSON has no infinity; `--rate inf` is told as it is written.
        values["traffic"]["rate"] = "inf" if rate == math.inf else rate
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TuneOptions:
        """Options as `to_json` wrote them.

        Raises:
            BadInput: they are not such options.
        """
        try:
            rate = values["traffic"]["rate"]
            rate = None if rate is None else float(rate)
            traffic = TrafficOptions(**{**values["traffic"], "rate": rate})
            # A run of an earlier release goes on as it began: without advice and forecasts.
            earlier = {"advice": False, "sampler": "tpe"}
            return cls(**{**earlier, **values, "traffic": traffic})
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"run.json holds no usable options: {error}") from error
