"""What the page says of speculative decoding: who drafted, what was accepted, what it was worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.estimate import Estimate, read_estimate
from reports.evidence import Evidence
from reports.formatting import (
    MISSING,
    mapping,
    number,
    percent,
    sequence,
    significant,
)

METHOD = "speculative_method"
# Knobs that say how is drafted.
DRAFT_KNOBS = (
    METHOD,
    "speculative_model",
    "num_speculative_tokens",
    "speculative_adaptive",
    "prompt_lookup_min",
    "prompt_lookup_max",
    "prompt_lookup_window",
)


@dataclass(frozen=True, slots=True)
class Position:
    """Acceptance of the tokens at one place of the drafts, from 1, with its interval.

    How many were drafted and accepted is not known of simulated ones.
    """

    position: int
    share: Estimate
    drafted: float | None = None
    accepted: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What drafts were worth while so many sequences decoded in a step."""

    sequences: float
    num_tokens: float
    tokens_per_step: float
    measured: Estimate | None
    predicted: Estimate | None
    steps: float | None


@dataclass(frozen=True, slots=True)
class Drafts:
    """Drafts of one configuration under its load, or those of the dry run (`measured` is False).

    `facts` is the section of the records that they come from, `how` the method and its knobs.
    """

    label: str
    how: str
    measured: bool
    facts: Mapping[str, Any]
    positions: Sequence[Position]
    loads: Sequence[Load]


def how_drafted(config: Mapping[str, Any]) -> str:
    """The method with the most tokens it drafts, in words; empty where no config tells."""
    method = config.get(METHOD)
    if not isinstance(method, str):
        return ""
    if method == "none":
        return "none"
    most = number(config.get("num_speculative_tokens"))
    text = method.replace("_", " ")
    if most is not None:
        text += f", {most:.0f}"
    return text if config.get("speculative_adaptive") is not False else f"{text} always"


def read_drafts(evidence: Evidence) -> list[Drafts]:
    """Whoever drafted: the sides of the comparison, the profile's load, and its dry run."""
    found = []
    profile = mapping(evidence.profile.get("measured_speculation"))
    for side in evidence.sides:
        facts = mapping(side.bench.get("speculation"))
        if evidence.is_single and profile:
            facts = profile  # the same load, and what was predicted of it
        if facts:
            found.append(_drafts(side.label, how_drafted(side.config), True, facts))
    if profile and not evidence.is_single:
        config = mapping(evidence.profile.get("engine_config"))
        found.append(_drafts("profile", how_drafted(config), True, profile))
    dry_run = mapping(evidence.profile.get("speculation"))
    if mapping(dry_run.get("tokens_per_step")):
        found.append(_drafts("dry run", "prompt lookup", False, dry_run))
    return found


def simulated_drafts(run: Mapping[str, Any], simulation: Mapping[str, Any]) -> list[Drafts]:
    """Those of a simulation, if it drafted; the intervals are of its draws."""
    facts = mapping(simulation.get("speculation"))
    if not facts:
        return []
    positions = [
        Position(int(place), share)
        for place, value in mapping(facts.get("acceptance")).items()
        if place.isdecimal() and (share := read_estimate(value)) is not None
    ]
    how = how_drafted(mapping(run.get("engine_config")))
    return [Drafts("simulated", how, True, facts, positions, ())]


def drafts_table(drafts: Sequence[Drafts]) -> tuple[list[str], list[list[str]]]:
    """What was drafted, a column for each that drafted: (columns, rows)."""
    measured = [item for item in drafts if item.measured]
    quantities: Sequence[tuple[str, Callable[[Drafts], str]]] = (
        ("Method", lambda item: item.how or MISSING),
        ("Tokens a step", lambda item: _estimate(item.facts.get("tokens_per_step"))),
        ("Tokens a step, by request", lambda item: _by_request(item.facts)),
        ("Decodes with a draft", lambda item: _estimate(item.facts.get("hit_share"), percent)),
        ("Drafted tokens of a decode", lambda item: _estimate(item.facts.get("verified_tokens"))),
        ("Drafted tokens", lambda item: _plain(item.facts.get("drafted_tokens"))),
        ("Accepted tokens", lambda item: _plain(item.facts.get("accepted_tokens"))),
        (
            "Drafting, of step time",
            lambda item: _estimate(item.facts.get("draft_time_share"), percent),
        ),
    )
    rows = []
    for title, write in quantities:
        cells = [write(item) for item in measured]
        if any(cell != MISSING for cell in cells):
            rows.append([title, *cells])
    return ["Quantity", *(item.label for item in measured)], rows


def dry_run_facts(profile: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Tokens a step that n-gram drafts would have got, by their number."""
    dry_run = mapping(profile.get("speculation"))
    facts = [
        (f"Tokens a step with {k} drafts", significant(number(value)))
        for k, value in mapping(dry_run.get("tokens_per_step")).items()
    ]
    share = number(dry_run.get("hit_share"))
    if facts and share is not None:
        facts.append(("Steps at which a draft is found", percent(share)))
    if facts and dry_run.get("synthetic_prompts") is True:
        facts.append(("Prompts", "synthesised: says little of real text"))
    return facts


def _drafts(label: str, how: str, measured: bool, facts: Mapping[str, Any]) -> Drafts:
    positions = [_position(mapping(item)) for item in sequence(facts.get("positions"))]
    loads = [_load(mapping(item)) for item in sequence(facts.get("loads"))]
    return Drafts(
        label,
        how,
        measured,
        facts,
        [position for position in positions if position is not None],
        [load for load in loads if load is not None],
    )


def _position(item: Mapping[str, Any]) -> Position | None:
    place, drafted, accepted = (number(item.get(k)) for k in ("position", "drafted", "accepted"))
    if place is None or not drafted or accepted is None:
        return None
    share = read_estimate(item.get("share")) or read_estimate(accepted / drafted)
    return None if share is None else Position(int(place), share, drafted, accepted)


def _load(item: Mapping[str, Any]) -> Load | None:
    sequences, drafted = number(item.get("sequences")), number(item.get("num_tokens"))
    tokens = number(item.get("tokens_per_step"))
    if sequences is None or sequences < 1 or drafted is None or tokens is None:
        return None
    return Load(
        sequences,
        drafted,
        tokens,
        read_estimate(item.get("measured")),
        read_estimate(item.get("predicted")),
        number(item.get("steps")) or None,
    )


def _estimate(value: object, write: Callable[[float | None], str] = significant) -> str:
    estimate = read_estimate(value)
    return MISSING if estimate is None else estimate.written(write, "%")


def _by_request(facts: Mapping[str, Any]) -> str:
    spread = read_estimate(facts.get("tokens_per_step_by_request"))
    if spread is None:
        return MISSING
    return f"{significant(spread.low)} to {significant(spread.high)} for 80% of them"


def _plain(value: object) -> str:
    return significant(number(value))
