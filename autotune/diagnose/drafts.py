"""What drafts cost where they are not accepted, against what they yield."""

from __future__ import annotations

from autotune.diagnose.cause import Cause
from autotune.diagnose.sentences import joined, number, percent
from autotune.diagnose.thresholds import LOSS, WORK
from autotune.diagnose.work import TIME_OF
from autotune.profiling.schema import Profile


def draft_causes(profile: Profile, metric: str, parts: dict[str, float]) -> list[Cause]:
    """Drafting, and verifying what is rejected then: time that yields no token of its own.

    It is a loss where tokens would come faster without any drafts, else the price of coming faster.
    """
    found = profile.measured_speculation
    if found is None or not found.drafted_tokens:
        return []
    drafting, verification = parts.get("drafting", 0.0), parts.get("verification", 0.0)
    rejected = 1 - found.accepted_tokens / found.drafted_tokens
    share = drafting + verification * rejected
    if share <= 0:
        return []
    tokens = found.tokens_per_step.value
    pays = _pays(profile, tokens)
    return [
        Cause(
            "speculation_overhead",
            share,
            WORK if pays else LOSS,
            joined(
                f"{percent(share)} of {TIME_OF[metric]} goes to drafting tokens and to verifying "
                f"those that are rejected, {percent(rejected)} of them",
                f"with {number(tokens)} tokens a step that is more than it costs"
                if pays
                else f"{number(tokens)} tokens a step are too few for what they cost: without "
                "drafts this load would be served faster",
            ),
            {
                "measured_speculation.tokens_per_step.value": tokens,
                "measured_speculation.drafted_tokens": found.drafted_tokens,
                "measured_speculation.accepted_tokens": found.accepted_tokens,
                "measured_speculation.hit_share": found.hit_share,
                "measured_speculation.draft_time_share": found.draft_time_share,
                f"breakdowns.{metric}.drafting": drafting,
                f"breakdowns.{metric}.verification": verification,
            },
        )
    ]


def _pays(profile: Profile, tokens: float) -> bool:
    """Whether a token takes less time than a step would without its drafts; taken so if unknown."""
    tpot = profile.breakdown("tpot")
    if tpot is None:
        return True
    without = 1 - tpot.parts.get("drafting", 0.0) - tpot.parts.get("verification", 0.0)
    return tokens * without > 1
