"""How many of which GPU, at what price, for a traffic and a promise.

Everything that fits is judged by arithmetic, in milliseconds each. What may be the best, and the
best of each GPU, is simulated on the engine's own scheduler; the rest keeps its arithmetic, which
what was simulated corrects, and says so.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.errors import Interrupted
from autotune.hardware.catalogue import Gpu, load_catalogue
from autotune.hardware.prices import parse_prices, price_of
from autotune.planning.binding import find_bindings
from autotune.planning.candidates import Candidate, candidates, choices
from autotune.planning.cost_source import CostSource, read_cost_source
from autotune.planning.estimate import Arithmetic
from autotune.planning.latencies import (
    arithmetic_latencies,
    limit_rows,
    simulated_latencies,
    usual_latencies,
)
from autotune.planning.model_shape import ModelShape
from autotune.planning.option import Option
from autotune.planning.options import Objective, PlanOptions
from autotune.planning.plan_json import plan_payload
from autotune.planning.plan_notes import notes_on
from autotune.planning.planned_traffic import PlannedTraffic, plan_traffic
from autotune.planning.ranking import frontier, ranked, score, set_break_even
from autotune.planning.read_shape import read_shape
from autotune.planning.sensitivity import growth_rows, sensitivity
from autotune.planning.shortcomings import below_floor, nearest, why_never
from autotune.planning.simulator import SEARCHES, Simulator, blended
from autotune.planning.would_fit import what_would_fit
from autotune.slo import Slo, parse_slo
from autotune.slo_grammar import LATENCIES

# What may be simulated, in requests with few others in the batch: about so many fit into seconds.
WORK = 34_000.0
# Drawn costs at which an option's load is simulated.
CONFIRMED = 4
# Arithmetic may understate a capacity by so much before an option is left unsimulated for its cost.
_DOUBT = 1.25
_LEAST_LENGTH = 512
_HOWEVER_MANY = 100_000
_JUDGED = (*LATENCIES, "goodput", "error_rate")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a plan found; `options` are ranked, the best first."""

    request: PlanOptions
    shape: ModelShape
    slo: Slo
    rate: float
    max_model_len: int
    options: tuple[Option, ...]
    frontier: tuple[int, ...]
    growth: tuple[dict[str, Any], ...]
    sensitivity: tuple[dict[str, Any], ...]
    gpus: tuple[Gpu, ...]
    workload: dict[str, Any]
    would_fit: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def slo_met(self) -> bool:
        """Whether any option meets the SLO with the asked probability."""
        return any(option.feasible for option in self.options)

    def to_json(self) -> dict[str, Any]:
        """By the keys of `plan --json`."""
        return plan_payload(self)


def plan(
    options: PlanOptions,
    *,
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> Plan:
    """Answer how many of which GPU a traffic takes.

    Args:
        options: the question.
        say: told what is going on, for a progress line.
        stop: set it to end early.

    Raises:
        BadInput: an unknown GPU, a bad workload, SLO, price or calibration.
        Interrupted: `stop` was set.
        engine.errors.ModelError: the model's config cannot be used.
    """
    slo = parse_slo(options.slo)
    say("reading the model, the catalogue and the workload")
    catalogue = load_catalogue(options.catalogue)
    gpus = list({(gpu := catalogue.find(name)).name: gpu for name in options.gpus}.values())
    overrides = parse_prices(options.prices, catalogue)
    shape = read_shape(options.model)
    traffic = plan_traffic(
        options.traffic,
        Path(options.model).expanduser(),
        min(shape.max_position, options.max_model_len or shape.max_position),
        sticky=options.router == "prefix_aware",
        seed=options.seed,
    )
    length = options.max_model_len or _rounded(traffic.longest)
    length = min(length, shape.max_position)
    costs = read_cost_source(shape, catalogue, gpus, options.calibration)
    planner = _Planner(options, shape, slo, traffic, length, costs, say, stop)
    for gpu in gpus:
        planner.prices[gpu.name] = price_of(gpu, overrides)
    found = planner.judge(gpus)
    order = ranked(found, options.objective)
    set_break_even(order)
    fitting = [option.candidate for option in order if option.fits]
    would: list[str] = []
    if not fitting:
        would = what_would_fit(shape, gpus, catalogue, length, traffic.sample)
    elif not any(option.feasible for option in order):
        would = [planner.unreachable] if planner.unreachable else []
        would = (
            would
            or below_floor(shape, fitting, slo, traffic.sample)
            or nearest(shape, order, planner.judged.limits, traffic.sample, options.probability)
        )
    growth = []
    if options.growth is not None:
        growth = growth_rows(
            order, options.growth, traffic.rate, options.headroom, options.probability
        )
    return Plan(
        request=options,
        shape=shape,
        slo=slo,
        rate=traffic.rate,
        max_model_len=length,
        options=tuple(order),
        frontier=tuple(frontier(order)),
        growth=tuple(growth),
        sensitivity=tuple(sensitivity(order, planner.arithmetic, options.probability, length)),
        gpus=tuple(gpus),
        workload=traffic.describe(),
        would_fit=tuple(would),
        notes=tuple(dict.fromkeys(planner.notes)),
    )


class _Planner:
    """The state of one plan."""

    def __init__(
        self,
        options: PlanOptions,
        shape: ModelShape,
        slo: Slo,
        traffic: PlannedTraffic,
        max_model_len: int,
        costs: CostSource,
        say: Callable[[str], None],
        stop: threading.Event | None,
    ) -> None:
        self.options = options
        self.shape = shape
        self.traffic = traffic.cut(max_model_len)
        self.length = max_model_len
        self.costs = costs
        self.prices: dict[str, Any] = {}
        self.judged = Slo(tuple(limit for limit in slo.limits if limit.metric in _JUDGED))
        self.design_rate = traffic.rate * (1 + options.headroom)
        self.arithmetic = Arithmetic(
            self.traffic.sample, self.judged, self.design_rate, self.traffic.burstiness
        )
        self.simulator = Simulator(
            self.traffic, self.judged, self.design_rate, options.draws, options.seed
        )
        self.notes = notes_on(options, shape, slo, self.traffic, max_model_len)
        self.notes += costs.notes
        self.unreachable = _unreachable(slo, traffic)
        self._say = say
        self._stop = stop

    def judge(self, gpus: Sequence[Gpu]) -> list[Option]:
        """Every choice, judged."""
        options = self.options
        found, notes = choices(
            self.shape, gpus, options.tp_sizes, options.methods, options.kv_cache_dtype
        )
        self.notes += notes
        self._say(f"arithmetic of {len(found)} options")
        limits = [candidates(self.shape, c, self.length, self.traffic.sample) for c in found]
        judged = [self._option(under[0]) for under in limits]
        fitting = [(o, under) for o, under in zip(judged, limits, strict=True) if o.fits]
        models = [self.costs.model_of(option.candidate.choice.gpu) for option, _ in fitting]
        known = self.arithmetic.estimates([under for _, under in fitting], models)
        self._check_stop()
        self.arithmetic.draw(
            [e for e in known if e.capacity > 0], self.options.draws, self.options.seed
        )
        for (option, _), estimate in zip(fitting, known, strict=True):
            option.candidate, option.known = estimate.candidate, estimate
            self._count(option)
        self._simulate(judged)
        self._correct_others(judged)
        self._bind(judged)
        for option in judged:
            self._finish(option)
        return judged

    def _option(self, candidate: Candidate) -> Option:
        option = Option(
            candidate,
            self.prices[candidate.choice.gpu.name],
            spares=self.options.spares,
            rate=self.traffic.rate,
            design_rate=self.design_rate,
            mean_output=self.traffic.mean_output,
        )
        if candidate.cache is None:
            option.constraint = _too_large(candidate)
            missing = candidate.memory.shortfall_bytes / 1e9
            option.reason = (
                f"does not fit: {missing:.3g} GB are missing on each GPU for one sequence of "
                f"{self.length} tokens"
            )
        return option

    def _bind(self, options: Sequence[Option]) -> None:
        """What binds each option that has a capacity."""
        some = [(o, o.known) for o in options if o.known is not None and o.known.capacity > 0]
        bindings = find_bindings(
            [known for _, known in some], self.judged.limits, self.arithmetic, self.costs.scaled
        )
        for (option, _), binding in zip(some, bindings, strict=True):
            option.constraint, option.binding = binding.constraint, binding.to_json()

    def _count(self, option: Option) -> None:
        """Replicas, and the chance of meeting the SLO with them, as far as is known by now."""
        known = option.known
        assert known is not None
        option.needed = None
        option.probability = 0.0
        if known.capacity <= 0:
            return
        option.needed = known.replicas(self.design_rate, self.options.probability)
        if option.needed is None:
            option.probability = known.chance(self.design_rate, _HOWEVER_MANY)
            return
        option.probability = known.chance(self.design_rate, option.needed)

    def _simulate(self, options: Sequence[Option]) -> None:
        """Simulate the best of each GPU, then whatever may still be better than the best."""
        left = WORK
        best = math.inf
        objective = self.options.objective
        hopeful = [o for o in options if o.known is not None and o.needed is not None]
        hopeful.sort(key=lambda o: (self._expected(o, objective), o.candidate.choice.label))
        leaders = list({o.candidate.choice.gpu.name: o for o in reversed(hopeful)}.values())[::-1]
        for option in [*leaders, *(o for o in hopeful if o not in leaders)]:
            self._check_stop()
            known = option.known
            assert known is not None
            expected = self._expected(option, objective)
            if option not in leaders and expected / _DOUBT >= best:
                option.reason = _screened(option, objective, best)
                continue
            work = self.simulator.work(known) * (SEARCHES + CONFIRMED)
            if work > left and math.isfinite(best):
                option.reason = "not simulated: more promising options took what a plan simulates"
                continue
            left -= work
            self._say(f"simulating {option.candidate.choice.label}")
            self._simulate_one(option)
            if self._is_feasible(option):
                best = min(best, self._expected(option, objective))

    def _simulate_one(self, option: Option) -> None:
        known = option.known
        assert known is not None
        self.simulator.correct(known)
        self._count(option)
        needed = option.needed
        for more in (1, 2, 0):
            if needed is None:
                return
            trials = self.simulator.confirm(known, needed, CONFIRMED)
            option.needed = needed
            option.probability = blended(known, self.design_rate, needed, trials)
            option.metrics = simulated_latencies(trials)
            option.limits = limit_rows(self.judged, trials)
            if option.probability >= self.options.probability:
                return
            needed = max(needed + more, math.ceil(needed * (1 + more / 20)))

    def _correct_others(self, options: Sequence[Option]) -> None:
        """Correct what was not simulated by what simulation found of the others."""
        simulated = [o.known for o in options if o.known is not None and o.known.simulated]
        if not simulated:
            return
        logs = [math.log(known.correction) for known in simulated]
        middle = statistics.median(logs)
        # Few were compared: their own spread alone would claim too much.
        spread = math.hypot(statistics.pstdev(logs), 0.3 / math.sqrt(len(logs) + 1))
        for option in options:
            known = option.known
            if known is None or known.simulated or known.capacity <= 0:
                continue
            known.correction, known.spread = math.exp(middle), max(0.08, spread)
            self._count(option)
        self.notes.append(
            f"arithmetic was corrected by a factor of {math.exp(middle):.2f} on the rate that a "
            f"replica carries, the median of {len(logs)} simulated options"
        )

    def _finish(self, option: Option) -> None:
        known = option.known
        if known is None:
            return
        option.feasible = self._is_feasible(option)
        if known.capacity <= 0 or option.needed is None:
            option.reason = why_never(self.shape, option, self.judged.limits, self.traffic.sample)
            option.constraint = "latency"
            return
        if option.metrics is None:
            option.metrics = arithmetic_latencies(known, self.design_rate / option.needed)
        option.normal = usual_latencies(known, self.traffic.rate / (option.needed + option.spares))
        sustained = known.sustained(option.needed, self.options.probability)
        option.sustained = max(self.traffic.rate, sustained / (1 + self.options.headroom))
        if self.options.growth is not None:
            option.months = self.options.growth.months_until(self.traffic.rate, option.sustained)
        if self.unreachable is not None:
            option.probability, option.reason = 0.0, self.unreachable
        elif not option.feasible:
            option.reason = (
                f"the chance of meeting the SLO is {option.probability or 0.0:.0%}, where "
                f"{self.options.probability:.0%} is asked"
            )

    def _is_feasible(self, option: Option) -> bool:
        return (
            option.needed is not None
            and (option.probability or 0.0) >= self.options.probability
            and self.unreachable is None
        )

    def _expected(self, option: Option, objective: Objective) -> float:
        if objective == "latency" and option.metrics is None and option.known is not None:
            assert option.needed is not None
            return float(option.known.at(self.design_rate / option.needed).e2e.mean())
        return score(option, objective)

    def _check_stop(self) -> None:
        if self._stop is not None and self._stop.is_set():
            raise Interrupted("The plan was stopped.")


def _screened(option: Option, objective: Objective, best: float) -> str:
    expected = score(option, objective)
    unit = {"cost": "USD/h", "power": "W", "gpus": "GPUs", "latency": "s"}[objective]
    return (
        f"not simulated: about {expected:.4g} {unit} by arithmetic, where the best simulated so "
        f"far takes {best:.4g}"
    )


def _too_large(candidate: Candidate) -> str:
    memory = candidate.memory
    return "weights" if memory.parts["weights"] > 0.8 * memory.total else "kv_cache"


def _unreachable(slo: Slo, traffic: PlannedTraffic) -> str | None:
    """A limit on the throughput that the traffic itself stays below."""
    offered = traffic.rate * traffic.mean_output
    for limit in slo.limits:
        if limit.metric == "throughput" and not limit.met_by(offered):
            return (
                f"{limit.text} cannot be met by any number of GPUs: the traffic itself asks for "
                f"{offered:.4g} output tokens/s"
            )
    return None


def _rounded(longest: int) -> int:
    """A longest sequence with which a person would start an engine."""
    return int(max(_LEAST_LENGTH, 1 << (longest - 1).bit_length()))
