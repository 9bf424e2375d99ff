"""How many draft tokens pay at a load, and when speculation begins to hurt.

Leviathan et al. 2023 (arXiv 2211.17192), Theorem 3.8: with `tau` tokens a step, `k` drafts at `c`
of a step each, the speed-up is tau / (k c + 1), if checking k + 1 positions costs one step. That
holds while memory bounds the step; beyond `critical` rows its cost grows with the rows, so that

    speed-up = tau / (k c + step(B (1 + k h)) / step(B)),   step(rows) = max(1, rows / critical)

with B sequences a step and h the share of steps at which anything was drafted. It falls below 1 at
high load: vLLM measured slowdowns of 1.4 to 1.8 there (blog, 2024-10-17).
"""

from __future__ import annotations

from dataclasses import dataclass

from autotune.advise.facts import Facts


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """Draft tokens that pay most, what they yield, and the speed-up of decode steps."""

    drafts: int
    tokens_per_step: float
    hit_share: float
    speedup: float


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens a step yields at an acceptance rate: (1 - a^(k+1)) / (1 - a), Leviathan Eq. 1."""
    if acceptance >= 1:
        return float(drafts + 1)
    return float((1 - acceptance ** (drafts + 1)) / (1 - acceptance))


def speculative_speedup(
    tokens_per_step: float,
    drafts: float,
    *,
    batch: float,
    critical: float,
    draft_cost: float = 0.0,
) -> float:
    """Speed-up of decode steps; `draft_cost` is a draft token's time over that of a step.

    `drafts` are those of a mean step, `batch` the sequences of a step, `critical` the rows beyond
    which a step's time grows with them.
    """
    now = max(1.0, batch / critical)
    then = max(1.0, batch * (1 + drafts) / critical)
    return tokens_per_step / (drafts * draft_cost + then / now)


def drafts_for_load(facts: Facts) -> DraftPlan | None:
    """The best number of n-gram drafts at the profile's batch; None: nothing is known.

    Where the ridge was not measured, the number of the most tokens a step is taken.
    """
    dry_run = facts.profile.speculation
    if dry_run is None or not dry_run.tokens_per_step:
        return None
    batch, critical = facts.number("decode_batch"), facts.number("critical_batch")
    plans = []
    for drafts, tokens in sorted(dry_run.tokens_per_step.items()):
        speedup = tokens
        if batch is not None and critical is not None:
            mean_drafts = drafts * dry_run.hit_share
            speedup = speculative_speedup(tokens, mean_drafts, batch=batch, critical=critical)
        plans.append(DraftPlan(drafts, tokens, dry_run.hit_share, speedup))
    return max(plans, key=lambda plan: plan.speedup)
