"""What a plan rests on: the figures of the GPUs with their sources, and what was left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.charts.growth_bars import growth_asked
from reports.estimate import Estimate, read_estimate
from reports.formatting import (
    MISSING,
    knob_value,
    mapping,
    number,
    percent,
    sequence,
    significant,
    size,
)
from reports.plan.evidence import Option, Plan
from reports.plan.money import dollar_range, dollars, prefixed

_URL = re.compile(r"https?://[^\s<>\"']{1,400}\Z")
# An address without its scheme: a host with a dot, and a path.
_HOST = re.compile(r"[a-z0-9-]+(?:\.[a-z0-9-]+)+/[^\s<>\"'@;,]{1,400}\Z")
_MOST_NAMED = 6
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_UNFIT = "does not fit in the memory"
_ARITHMETIC = "judged by arithmetic alone: others were likelier to be the choice"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a figure is from; `url` is empty unless it is an address of the web."""

    text: str
    where: str
    url: str
    date: str
    basis: str


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a GPU."""

    name: str
    value: str
    source: Source


@dataclass(frozen=True, slots=True)
class Sheet:
    """What was assumed of one GPU."""

    title: str
    figures: Sequence[Figure]
    notes: Sequence[str]


def sheets(plan: Plan) -> list[Sheet]:
    """The GPUs of the plan in the order of their catalogue, each with its price first."""
    found = []
    for name, item in mapping(plan.raw.get("catalogue")).items():
        gpu = mapping(item)
        figures = [*_price(gpu), *_figures(gpu), *_efficiency(gpu)]
        notes = [str(note) for note in sequence(gpu.get("notes")) if note]
        if figures:
            found.append(Sheet(str(gpu.get("title") or name), figures, notes))
    return found


def assumed(plan: Plan) -> list[str]:
    """The assumptions that are sentences."""
    return [str(text) for text in sequence(plan.raw.get("assumptions")) if text]


def not_simulated(plan: Plan) -> list[tuple[str, str]]:
    """(what, why) of all that was left out: by the plan's list, and by the options themselves."""
    found = []
    for item in sequence(plan.raw.get("not_simulated")):
        entry = mapping(item)
        what, why = (str(entry.get(key) or "") for key in ("what", "why"))
        found.append((what, why) if entry else (str(item), ""))
    groups: dict[str, list[tuple[Option, str]]] = {}
    for option in plan.options:
        if option.simulated and option.fits:
            continue
        why = str(option.raw.get("reason") or _ARITHMETIC) if option.fits else _UNFIT
        # Reasons that differ in their numbers only are told once.
        groups.setdefault(_NUMBER.sub("#", why), []).append((option, why))
    for group in groups.values():
        found.append((_names([option for option, _ in group]), _joined([why for _, why in group])))
    return found


def _names(options: Sequence[Option]) -> str:
    names = [option.one for option in options]
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _joined(reasons: Sequence[str]) -> str:
    """One sentence of several that differ in their numbers: each number, or its range."""
    numbers = [_NUMBER.findall(reason) for reason in reasons]
    told = iter(
        column[0]
        if len(set(column)) == 1
        else f"{min(column, key=float)} to {max(column, key=float)}"
        for column in zip(*numbers, strict=True)
    )
    return _NUMBER.sub(lambda _: next(told), reasons[0])


def asked_facts(plan: Plan) -> list[tuple[str, str]]:
    """What was asked of the plan."""
    request = plan.request
    workload = mapping(request.get("workload"))
    rate = number(request.get("rate"))
    headroom = number(request.get("headroom"))
    prices = ", ".join(f"{k}={_told(v)}" for k, v in mapping(request.get("prices")).items())
    facts = [
        ("Rate", MISSING if rate is None else f"{significant(rate, 6)} requests/s"),
        ("Promise", str(request.get("slo") or ", ".join(x.text for x in plan.limits))),
        ("Chance asked for", percent(plan.threshold)),
        ("GPUs", ", ".join(str(name) for name in sequence(request.get("gpus")))),
        ("Headroom for bursts", percent(headroom)),
        ("Spare replicas", significant(number(request.get("spares")))),
        ("Router", str(request.get("router") or "").replace("_", " ")),
        ("Calibration", str(request.get("calibration") or "")),
        ("Growth", growth_asked(plan)),
        ("Ranked by", str(request.get("objective") or "")),
        ("Prices given", prices),
        ("Workload", str(workload.get("source") or "")),
        ("Requests of the workload", significant(number(workload.get("requests")), 6)),
        ("Shared prefix", percent(number(workload.get("prefix_share")))),
        ("Draws", significant(number(request.get("draws")))),
        ("Seed", significant(number(request.get("seed")), 12)),
    ]
    return [(name, value) for name, value in facts if value not in ("", MISSING)]


def asked_lengths(plan: Plan) -> list[list[str]]:
    """Token lengths: a row for prompts and one for outputs."""
    workload = mapping(plan.request.get("workload"))
    rows = []
    for key, title in (("input_tokens", "Prompt"), ("output_tokens", "Output")):
        lengths = mapping(workload.get(key))
        if lengths:
            texts = [significant(number(lengths.get(k))) for k in ("mean", "p50", "p95", "max")]
            rows.append([title, *texts])
    return rows


def model_facts(plan: Plan) -> list[tuple[str, str]]:
    """What was read of the model."""
    facts = []
    for key, value in plan.model.items():
        amount = number(value)
        name = key.replace("_", " ")
        if amount is not None and key in ("parameters", "active_parameters"):
            facts.append(
                (name, prefixed(amount, "").replace("G", "billion").replace("M", "million"))
            )
        elif value not in (None, "", [], {}) and not isinstance(value, (dict, list)):
            facts.append((name, knob_value(key, value)))
    return facts


def _price(gpu: Mapping[str, Any]) -> list[Figure]:
    price = mapping(gpu.get("price"))
    estimate = read_estimate({**price, "value": price.get("usd_per_hour")})
    if estimate is None:
        return []
    between = dollar_range(estimate)
    text = dollars(estimate.value) + (f" ({between})" if between else "")
    return [Figure("price of an hour", text, _source({**price, "title": price.get("where")}))]


def _figures(gpu: Mapping[str, Any]) -> list[Figure]:
    """The data sheet, each figure with the source that the catalogue names for it."""
    sources = mapping(gpu.get("sources"))
    link = mapping(gpu.get("link"))
    rates = mapping(gpu.get("operations_per_s"))
    watts, joined = number(gpu.get("tdp_watts")), number(link.get("gpus"))
    sent = prefixed(number(link.get("bytes_per_s")), "B/s")
    told = [
        ("memory", "memory", size(number(gpu.get("memory_bytes")))),
        ("memory bandwidth", "bandwidth", _rate(gpu.get("bandwidth_bytes_per_s"), "B/s")),
        *((f"dense {name} rate", "rates", _rate(rate, "op/s")) for name, rate in rates.items()),
        (
            f"link, {link.get('name')}" if link.get("name") else "link",
            "link",
            sent if joined is None or sent == MISSING else f"{sent} one way, {joined:g} GPUs",
        ),
        ("power", "power", MISSING if watts is None else f"{significant(watts)} W"),
    ]
    return [
        Figure(name, text, _source(sources.get(key))) for name, key, text in told if text != MISSING
    ]


def _efficiency(gpu: Mapping[str, Any]) -> list[Figure]:
    """What of the data sheet was taken to be reached, with its 90% interval."""
    basis = mapping(gpu.get("efficiency_basis"))
    source = _source({"title": basis.get("basis"), "date": basis.get("date")})
    figures = []
    for name, value in mapping(gpu.get("efficiency")).items():
        estimate = read_estimate(value)
        if estimate is not None:
            text, unit = _unit_of(str(name))
            named = text if unit == "s" else f"reached: {text}"
            figures.append(Figure(named, _written(estimate, unit), source))
    return figures


def _rate(value: object, unit: str) -> str:
    return prefixed(number(value), unit)


def _unit_of(name: str) -> tuple[str, str]:
    """A factor's name in words, and what it is written in: its name tells times from shares."""
    is_time = any(part in name for part in ("latency", "overhead", "seconds"))
    words = re.sub(r" (\d+)$", r", \1 bits", name.replace("_", " "))
    return words, "s" if is_time else "share"


def _written(estimate: Estimate, unit: str) -> str:
    if unit == "s":
        return estimate.times(1e6).written(significant) + " µs"
    if unit == "share":
        return estimate.written(lambda v: percent(v, 2), "%")
    return estimate.written(significant)


def _source(source: object) -> Source:
    """A source as the catalogue tells it: its title, where it is found, and when it was read."""
    entry = mapping(source)
    where = str(entry.get("where") or "")
    url = where if _URL.match(where) else f"https://{where}" if _HOST.match(where) else ""
    title = str(entry.get("title") or where or MISSING)
    return Source(
        title,
        "" if where == title else where,
        url,
        str(entry.get("date") or ""),
        str(entry.get("basis") or ""),
    )


def _told(value: object) -> str:
    amount = number(value)
    return str(value) if amount is None else significant(amount)
