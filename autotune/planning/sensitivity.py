"""What the options come to when the rate, the lengths or the prices are others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from autotune.planning.estimate import Estimate
from autotune.planning.growth import Growth
from autotune.planning.option import HOURS_PER_MONTH, Option
from autotune.slo import Slo

_RATES = (0.5, 1.5, 2.0)
# Prompts and answers, as factors.
_LENGTHS = (("prompts x 1.5", 1.5, 1.0), ("answers x 1.5", 1.0, 1.5), ("answers x 0.5", 1.0, 0.5))
SHOWN = 8


def sensitivity(
    options: Sequence[Option], slo: Slo, probability: float, max_model_len: int
) -> list[dict[str, Any]]:
    """Replicas and cost of the best options under other rates, lengths and prices.

    The capacity of a replica stays what it is under another rate. Under other lengths it is scaled
    as arithmetic scales it.
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
        told = []
        for index, option in shown:
            assert option.known is not None
            other = _with_lengths(option.known, prompts, answers, max_model_len, slo)
            told.append(_told(index, option, _replicas(other, option.design_rate, probability)))
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
    known: Estimate, prompts: float, answers: float, max_model_len: int, slo: Slo
) -> Estimate:
    """The same for other lengths, its capacities scaled as those of arithmetic change."""
    sample = known.replica.sample.scaled(prompts, answers, max_model_len)
    candidate = known.candidate
    table = candidate.table(known.model.middle(candidate.config), sample)
    replica = candidate.replica(table, sample, known.replica.variation)
    ratio = replica.capacity(slo.limits) / known.capacity if known.capacity else 0.0
    return dataclasses.replace(
        known,
        replica=replica,
        capacity=known.capacity * ratio,
        drawn=tuple(c * ratio for c in known.drawn),
    )


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
