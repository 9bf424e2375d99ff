"""Speculation that a technique tells of, and what is known of the drafts themselves."""

from __future__ import annotations

from autotune.predict.change import Change, Term
from autotune.predict.draft_knowledge import DraftKnowledge
from autotune.predict.virtual_speculation import Cost
from engine.config import EngineConfig
from engine.errors import EngineError

_KNOBS = ("speculative_method", "speculative_model", "num_speculative_tokens")
_TOLD: tuple[Term, ...] = ("tokens_per_step", "verify_tokens", "step_overhead")


def as_played(
    change: Change, config: EngineConfig, knowledge: DraftKnowledge, cost: Cost
) -> Change:
    """The change as it is to be played on an engine with `config`.

    What drafts yield is known better from the traffic's tokens, or from a load that drafted, than
    by the factors of a technique; where neither is known, its factors stand for its knobs.
    """
    if not any(term in change.factors for term in _TOLD):
        return change
    try:
        known = knowledge.profile(config.replace(**change.knobs), cost)
    except EngineError:  # a knob that the engine refuses, for instance for want of a model
        known = None
    if known is None:
        knobs = {name: value for name, value in change.knobs.items() if name not in _KNOBS}
        return Change(knobs, change.factors)
    factors = {term: factor for term, factor in change.factors.items() if term not in _TOLD}
    return Change(change.knobs, factors)
