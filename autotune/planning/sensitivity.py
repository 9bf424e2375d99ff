"""What the options come to when the rate, the lengths or the prices are others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from autotune.planning.estimate import Arithmetic, Estimate
from autotune.planning.growth import Growth
from autotune.planning.option import HOURS_PER_MONTH, Option

_RATES = (0.5, 1.5, 2.0)
# Prompts and answers, as factors.
_LENGTHS = (("prompts x 1.5", 1.5, 1.0), ("answers x 1.5", 1.0, 1.5), ("answers x 0.5", 1.0, 0.5))
SHOWN = 8


def sensitivity(
    options: Sequence[Option], arithmetic: Arithmetic, probability: float, length: int
) -> list[dict[str, Any]]:
    """Replicas and cost of the best options under other rates, lengths and prices.

    The capacity of a replica stays what it is under another rate. Under other lengths it is scaled
    as arithmetic scales it. `length` is the longest sequence in tokens.
    """
    shown = _shown(options)
    rows: list[dict[str, Any]] = []
    for factor in _RATES:
        told = [
            _told(index, option, _replicas(option.known, option.design_rate * factor, probability))
            for index, option in shown
        ]
        rows.append(_row(f"rate x {factor:g}", "rate", factor, told))
    for change, prompts, answers in _LENGTHS:
        scaled = _with_lengths([o.known for _, o in shown], arithmetic, prompts, answers, length)
        told = [
            _told(index, option, _replicas(other, option.design_rate, probability))
            for (index, option), other in zip(shown, scaled, strict=True)
        ]
        rows.append(_row(change, "lengths", max(prompts, answers, key=_far), told))
    rows += [_prices(shown, high=False), _prices(shown, high=True)]
    return rows


def growth_rows(
    options: Sequence[Option], growth: Growth, rate: float, headroom: float, probability: float
) -> list[dict[str, Any]]:
    """What the best options come to as the rate grows."""
    rows = []
    for month in growth.marks():
        then = growth.rate_after(rate, month)
        told = []
        for index, option in _shown(options):
            needed = _replicas(option.known, then * (1 + headroom), probability)
            usd = None if needed is None else option.usd_for(needed)
            told.append(
                {
                    "index": index,
                    "replicas": None if needed is None else needed + option.spares,
                    "usd_per_month": None if usd is None else usd * HOURS_PER_MONTH,
                }
            )
        rows.append({"month": month, "rate": then, "options": told})
    return rows


def _shown(options: Sequence[Option]) -> list[tuple[int, Option]]:
    return [(i, o) for i, o in enumerate(options) if o.feasible][:SHOWN]


def _replicas(known: Estimate | None, rate: float, probability: float) -> int | None:
    return None if known is None else known.replicas(rate, probability)


def _with_lengths(
    known: Sequence[Estimate | None],
    arithmetic: Arithmetic,
    prompts: float,
    answers: float,
    length: int,
) -> list[Estimate | None]:
    """The same for other lengths, their capacities scaled as those of arithmetic change."""
    some = [estimate for estimate in known if estimate is not None]
    if not some:
        return [None] * len(known)
    other = Arithmetic(
        arithmetic.sample.scaled(prompts, answers, length),
        arithmetic.slo,
        arithmetic.rate,
        arithmetic.burstiness,
    )
    variation = np.array([float(estimate.replica.variation[0]) for estimate in some])
    rows = [(e.candidate, e.model.middle(e.candidate.config)) for e in some]
    capacities = other.replicas(rows).with_variation(variation).capacity(other.slo.limits)
    scaled = {
        id(estimate): dataclasses.replace(
            estimate,
            capacity=capacity,
            drawn=tuple(c * capacity / estimate.capacity for c in estimate.drawn),
        )
        for estimate, capacity in zip(some, capacities.tolist(), strict=True)
    }
    return [None if estimate is None else scaled[id(estimate)] for estimate in known]


def _prices(shown: Sequence[tuple[int, Option]], *, high: bool) -> dict[str, Any]:
    told = []
    for index, option in shown:
        usd = None
        if option.price is not None and option.gpus is not None:
            usd = option.gpus * (option.price.high if high else option.price.low)
        told.append({"index": index, "replicas": option.bought, "usd_per_hour": usd})
    end = "dearest" if high else "cheapest"
    return _row(f"prices of the {end} listings", "price", None, told)


def _told(index: int, option: Option, needed: int | None) -> dict[str, Any]:
    return {
        "index": index,
        "replicas": None if needed is None else needed + option.spares,
        "usd_per_hour": None if needed is None else option.usd_for(needed),
    }


def _row(
    change: str, kind: str, factor: float | None, told: list[dict[str, Any]]
) -> dict[str, Any]:
    return {"change": change, "kind": kind, "factor": factor, "options": told}


def _far(factor: float) -> float:
    return max(factor, 1 / factor)
