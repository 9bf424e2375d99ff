"""Points of a space that are worth a thought, and a first thought: what arithmetic says of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.predict.cost_model import CostDraw
from autotune.predict.step_cost import StepWork
from autotune.search.forecast import load_limits
from autotune.search.methods_offered import speed_class
from autotune.search.objective import Objective
from autotune.search.rough_drafts import RoughDrafts, decode_seconds
from autotune.search.space import SearchSpace
from autotune.slo import Slo
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape
from engine.errors import ConfigError
from engine.quantize.method_table import METHODS

# Knobs whose every combination is thought of, as far as there is room; what the others bring is
# tried at the best of these, and at points that are drawn.
STRONG_KNOBS = (
    "tensor_parallel_size",
    "quantization",
    "kv_cache_dtype",
    "max_num_seqs",
    "max_num_batched_tokens",
    "speculative_method",
)

# How much more a missed limit counts than the objective does.
LIMIT_POWER = 3.0

Point = Mapping[str, Any]


def candidate_points(
    space: SearchSpace, base: EngineConfig, methods: Sequence[str], most: int, seed: int
) -> list[dict[str, Any]]:
    """Points to think of: all if there are at most `most`, else combinations and drawn ones.

    Of the quantizations only `methods` are there. What the engine refuses is left out.
    """
    values = dict(space.values)
    if "quantization" in values:
        values["quantization"] = tuple(m for m in values["quantization"] if m in methods)
    start = space.point_of(base)
    assert start is not None, "the space is widened by the default first"
    rng = random.Random(seed)
    seen: set[str] = set()
    points: list[dict[str, Any]] = []

    def think_of(point: Point) -> None:
        normalised = space.normalised(point, base)
        key = _key(normalised)
        if key not in seen:
            seen.add(key)
            if _accepted(space, base, normalised):
                points.append(normalised)

    if SearchSpace(values).size <= most:
        for combination in _product(values):
            think_of(combination)
        return points
    strong = {n: v for n, v in values.items() if n in STRONG_KNOBS}
    if SearchSpace(strong).size <= most:
        for combination in _product(strong):
            think_of({**start, **combination})
    else:  # some of these, and as many of the others
        for _ in range(most // 2):
            think_of({**start, **_drawn(strong, rng)})
    for _ in range(4 * most):
        if len(points) >= most:
            break
        think_of(_drawn(values, rng))
    return points


def neighbours(
    space: SearchSpace, base: EngineConfig, point: Point, methods: Sequence[str]
) -> list[dict[str, Any]]:
    """Points that differ in one knob: of numbers the next ones, of choices all."""
    found: dict[str, dict[str, Any]] = {}
    for name, values in space.values.items():
        choices: Sequence[Any] = values
        if space.is_ordinal(name):
            place = values.index(point[name])
            choices = values[max(0, place - 1) : place + 2]
        elif name == "quantization":
            choices = [v for v in values if v in methods]
        for value in choices:
            other = space.normalised({**point, name: value}, base)
            if other[name] != point[name] and _accepted(space, base, other):
                found[_key(other)] = other
    return list(found.values())


def fastest_methods(values: Sequence[str], default: str, hopeless: Sequence[str] = ()) -> list[str]:
    """One quantization of each speed class, as those of a class differ in quality alone.

    The default's own if it is one, else one without calibration; those that broke the limits on
    the quality, `hopeless`, hand over to the next of their class.
    """
    by_class: dict[tuple[int, str], str] = {}

    def order(name: str) -> tuple[bool, bool, int]:
        return name != default, METHODS[name].calibrated, list(values).index(name)

    for name in sorted((v for v in values if v in METHODS and v not in hopeless), key=order):
        by_class.setdefault(speed_class(name), name)
    return [name for name in values if name in by_class.values()]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a load asks for: requests and their mean lengths in tokens, and their rate a second.

    `rate` is None where all are there at once, or as many as can be served.
    """

    requests: int
    input_tokens: float
    output_tokens: float
    rate: float | None

    @classmethod
    def of(cls, requests: Sequence[LoadRequest], rate: float | None) -> Demand:
        """The demand of a window, at its rate."""
        count = max(1, len(requests))
        inputs = sum(len(r.token_ids) for r in requests) / count
        return cls(count, inputs, sum(r.output_tokens for r in requests) / count, rate)


def rough_worth(
    demand: Demand,
    config: EngineConfig,
    draw: CostDraw,
    cache: CacheShape,
    slo: Slo,
    objective: Objective,
    drafts: RoughDrafts,
) -> float:
    """A rough objective, more being better, the less the more rough latencies miss their limits.

    With B sequences decoding, a step takes T(B) for each token that it yields one of them, and each
    token of an answer waits for its share of the prompts' steps; below saturation B follows from
    the rate (Little). Of numbers of drafts that adapt to the load the best is taken.
    """
    cost, pace = draw.cost, draw.pace.mean
    longest = demand.input_tokens + demand.output_tokens
    room = cache.num_blocks * config.block_size / max(1.0, longest)
    seats = max(1, int(min(config.max_num_seqs, demand.requests, room)))
    chunk = max(1, config.max_num_batched_tokens - seats)
    if config.long_prefill_token_threshold:
        chunk = min(chunk, config.long_prefill_token_threshold)
    prompt = pace * _prompt_seconds(demand.input_tokens, chunk, cost)

    depths = drafts.depths(config, draw.drafts)

    def step(sequences: float) -> float:
        count = max(1, round(sequences))
        seen = int(count * (demand.input_tokens + demand.output_tokens / 2))
        seconds = (
            (decode_seconds(cost, count, seen, depth, draw.drafts), depth.yielded)
            for depth in depths
        )
        return min((pace * s + draw.times.gap_of(count)) / yielded for s, yielded in seconds)

    outputs = max(1.0, demand.output_tokens)
    full = seats / (outputs * step(seats) + seats * prompt)  # requests a second at most
    rate = full if demand.rate is None else min(demand.rate, full)
    busy = float(seats)
    if demand.rate is not None and demand.rate < full:
        busy = 1.0
        for _ in range(12):
            busy = min(float(seats), rate * outputs * step(busy) / max(0.05, 1 - rate * prompt))
    tpot = step(busy) + rate * prompt * step(busy) / max(0.05, 1 - rate * prompt)
    ttft = prompt if demand.rate is None else prompt / max(0.05, 1 - 0.95 * rate / full)
    latencies = {"tpot": tpot, "itl": tpot, "ttft": ttft, "e2e": ttft + outputs * tpot}
    missed = 1.0
    for limit in load_limits(slo):
        # With all at once what waits is the load's, not the configuration's.
        if limit.metric in latencies and not (limit.metric != "tpot" and demand.rate is None):
            missed = max(missed, latencies[limit.metric] / limit.bound)
    if objective.name == "latency":
        worst = [latencies[x.metric] / x.bound for x in load_limits(slo) if x.metric in latencies]
        return -max(worst, default=latencies["e2e"])
    return float(rate * outputs / missed**LIMIT_POWER)


def _prompt_seconds(tokens: float, chunk: int, cost: Any) -> float:
    """Seconds that a prompt adds to the steps that compute it."""
    whole, done, seconds = max(1, round(tokens)), 0, 0.0
    # Chunks in the middle are alike: a few tell of all.
    chunks = -(-whole // chunk)
    for index in {0, chunks // 2, chunks - 1}:
        done = index * chunk
        work = StepWork.of_prompt(min(whole, done + chunk), done)
        seconds += cost.device_seconds(work) + cost.host_seconds(work)
    return seconds * chunks / len({0, chunks // 2, chunks - 1})


def _drawn(values: Mapping[str, Sequence[Any]], rng: random.Random) -> dict[str, Any]:
    return {name: rng.choice(choices) for name, choices in values.items()}


def _product(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def _accepted(space: SearchSpace, base: EngineConfig, point: Point) -> bool:
    try:
        space.config_of(point, base)
    except ConfigError:
        return False
    return True


def _key(point: Point) -> str:
    return str(sorted(point.items()))
