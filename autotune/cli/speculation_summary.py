"""What speculation came to, and what it would come to, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotune.profiling.schema import Profile, SpeculativeLoad

# Deeper positions are in the JSON; a line is read at a glance.
_MOST_POSITIONS = 5


def speculation_sentence(found: Mapping[str, Any]) -> str:
    """Tokens a step, drafted tokens and acceptance by position, each with its interval.

    `found` has the keys of `autotune bench --json` under `speculation`.
    """
    drafted = found["drafted_tokens"]
    if not drafted:
        return "nothing was drafted"
    parts = [
        f"{_bounded(found['tokens_per_step'], '{:.3g}')} tokens a step",
        f"{drafted:,} drafted for {found['hit_share']:.0%} of decodes, "
        f"{found['accepted_tokens'] / drafted:.0%} accepted",
        f"by position {', '.join(_positions(found['positions']))}",
    ]
    return "; ".join(parts)


def speculation_lines(profile: Profile) -> Iterator[str]:
    """What a profile says: what was measured, what lookups would have drafted, and their worth."""
    measured, dry_run = profile.measured_speculation, profile.speculation
    if measured is not None:
        yield f"{measured.method}: {speculation_sentence(measured.model_dump())}"
        if measured.draft_seconds:
            yield f"drafting takes {measured.draft_time_share:.1%} of step time"
        gains = [text for load in measured.loads if (text := _gain(load))]
        if gains:
            yield f"decoding is faster by {'; '.join(gains)}"
    if dry_run is None or not dry_run.tokens_per_step:
        return
    best = max(dry_run.tokens_per_step, key=lambda k: dry_run.tokens_per_step[k])
    text = (
        f"n-gram drafts of {best} would yield {dry_run.tokens_per_step[best]:.3g} tokens a step; "
        f"{dry_run.hit_share:.0%} of steps find one"
    )
    if dry_run.synthetic_prompts:
        text += " (prompts are made up from lengths, so this says little)"
    yield text
    forecast = _forecast(dry_run.loads)
    if forecast and measured is None:
        yield forecast


def _gain(load: SpeculativeLoad) -> str:
    """What was gained at a load, as measured, and predicted where that is not known."""
    found, how = (load.measured, "") if load.measured else (load.predicted, " predicted")
    if found is None:
        return ""
    error = f" ({found.low:.3g} to {found.high:.3g})"
    plural = "" if load.sequences == 1 else "s"
    return f"{found.value:.3g}x{error}{how} with {load.sequences:.3g} sequence{plural}"


def _forecast(loads: Sequence[SpeculativeLoad]) -> str:
    """What the dry run promises for the lightest load, and from which on it promises nothing."""
    first = loads[0].predicted if loads else None
    if first is None or not loads[0].num_tokens:
        return ""
    text = f"with 1 sequence that would decode {first.value:.3g}x as fast"
    heavy = next((load for load in loads if not load.num_tokens), None)
    if heavy is not None:
        return f"{text}; from {heavy.sequences:.0f} sequences on no draft pays"
    return f"{text}, with {loads[-1].sequences:.0f} {_speedup(loads[-1])}"


def _speedup(load: SpeculativeLoad) -> str:
    return "-" if load.predicted is None else f"{load.predicted.value:.3g}x"


def _positions(positions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Those at the front, as far as anybody drafted."""
    reached = [position for position in positions if position.get("share")]
    for position in reached[:_MOST_POSITIONS]:
        yield _bounded(position["share"], "{:.0%}")
    if len(reached) > _MOST_POSITIONS:
        yield "..."


def _bounded(estimate: Mapping[str, float], pattern: str) -> str:
    value, low, high = (pattern.format(estimate[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
