"""From all points of a space to those worth believing something of: arithmetic, then simulation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.search.candidates import candidate_points, neighbours
from autotune.search.space import SearchSpace
from engine.config import EngineConfig

# Points that are thought of; all where the space has no more.
MOST_CONSIDERED = 4096
# Part of the simulations that goes to the best by arithmetic, whatever they are; the next parts are
# shared evenly among weights and batch sizes, and among ways to speculate, as arithmetic may err on
# one of these as a whole.
BEST_SHARE = 0.4
EVEN_SHARES: Mapping[tuple[str, ...], float] = {
    ("quantization", "kv_cache_dtype", "max_num_seqs"): 0.25,
    ("speculative_method", "num_speculative_tokens"): 0.1,
}
# With what is left, one knob at a time is moved of the best, as long as these are among so many.
STARTS = 3

Point = Mapping[str, Any]
Worth = Callable[[Point], float | None]


@dataclass(frozen=True, slots=True)
class Screened:
    """Points that were simulated, the worthiest first, and how many were considered.

    `unknown` of the considered ones cannot be simulated.
    """

    points: tuple[Point, ...]
    considered: int
    unknown: int


def screen(
    space: SearchSpace,
    base: EngineConfig,
    methods: Sequence[str],
    rough: Worth,
    simulated: Worth,
    most: int,
    seed: int,
    until: float = math.inf,
) -> Screened:
    """Simulate up to `most` points of the space, the promising and some of every sort.

    Args:
        space: where to look.
        base: the default config, whose point is among those simulated.
        methods: quantizations to think of.
        rough: worth by arithmetic; None where nothing is known.
        simulated: worth by simulation; None where it cannot be told.
        most: simulations.
        seed: of what is drawn.
        until: nothing more is simulated once `time.monotonic` says so.
    """
    points: list[Point] = list(candidate_points(space, base, methods, MOST_CONSIDERED, seed))
    start: Point = space.point_of(base) or {}
    ordered: list[tuple[float, int, int]] = []
    for place, point in enumerate(points):
        worth = rough(point)
        if worth is not None:
            changes = sum(point[name] != start.get(name) for name in point)
            ordered.append((-worth, changes, place))
    ordered.sort()  # of what arithmetic takes for equal, the nearest to the default
    ranking = [points[place] for _, _, place in ordered]
    best = int(most * BEST_SHARE) if len(ranking) > most else len(ranking)
    first = [start, *ranking[:best]]
    even = [
        point
        for knobs, share in EVEN_SHARES.items()
        for point in _evenly(ranking[best:], knobs, int(most * share))
    ]
    worths: dict[str, tuple[float, Point]] = {}
    tried: set[str] = set()

    def simulate(point: Point) -> None:
        key = str(sorted(point.items()))
        if key in tried or len(tried) >= most or time.monotonic() > until:
            return
        tried.add(key)
        worth = simulated(point)
        if worth is not None:
            worths[key] = worth, point

    for point in (*first, *even):
        simulate(point)
    moved: set[str] = set()
    while len(tried) < most and time.monotonic() < until:
        leaders = sorted(worths.items(), key=lambda entry: -entry[1][0])[:STARTS]
        leader = next((entry for entry in leaders if entry[0] not in moved), None)
        if leader is None:
            break
        moved.add(leader[0])
        for other in neighbours(space, base, leader[1][1], methods):
            simulate(other)
    ranked = sorted(worths.values(), key=lambda entry: -entry[0])
    return Screened(tuple(point for _, point in ranked), len(points), len(points) - len(ranking))


def _evenly(ranking: Sequence[Point], knobs: Sequence[str], count: int) -> list[Point]:
    """Of each sort the best, then of each the next."""
    sorts: dict[tuple[Any, ...], list[Point]] = {}
    for point in ranking:
        sorts.setdefault(tuple(point.get(name) for name in knobs), []).append(point)
    taken: list[Point] = []
    depth = 0
    while len(taken) < count and any(len(points) > depth for points in sorts.values()):
        taken += [points[depth] for points in sorts.values() if len(points) > depth]
        depth += 1
    return taken[:count]
