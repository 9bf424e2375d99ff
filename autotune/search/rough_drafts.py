"""A first thought about drafts: how many a decode has, what it yields, and what the step takes."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.predict.drafting import DraftProfile
from autotune.predict.step_cost import StepWork
from autotune.predict.virtual_speculation import Cost
from engine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Depth:
    """Drafts of at most `tokens` tokens: how many a decode has and what it yields, on the mean."""

    tokens: int
    drafted: float
    yielded: float


NO_DRAFTS = Depth(0, 0.0, 1.0)


class RoughDrafts:
    """Remembers what drafts come to, as many points of a space draft alike."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, bool], tuple[DraftProfile, list[Depth]]] = {}

    def depths(self, config: EngineConfig, profile: DraftProfile | None) -> list[Depth]:
        """What a config drafts; where the number adapts to the load, what it may choose among.

        `profile` is how its drafts fare, None where it drafts nothing.
        """
        if profile is None or config.speculative_method == "none":
            return [NO_DRAFTS]
        most, adaptive = config.num_speculative_tokens, config.speculative_adaptive
        key = id(profile), most, adaptive
        if key not in self._known:  # the profile is kept, so that its id remains its own
            shorter = [2**i for i in range(most.bit_length()) if 2**i < most] if adaptive else []
            found = [_depth(profile, tokens) for tokens in (*shorter, most)]
            self._known[key] = profile, [NO_DRAFTS, *found] if adaptive else found
        return self._known[key][1]


def decode_seconds(
    cost: Cost, sequences: int, seen: int, depth: Depth, profile: DraftProfile | None
) -> float:
    """Seconds of a step that decodes sequences that see `seen` tokens together, with drafts."""
    work = StepWork.of_decodes(sequences, seen, sequences * depth.drafted)
    drafting = 0.0
    if profile is not None and depth.tokens:
        work = profile.verified(work)
        drafting = profile.seconds(sequences, min(depth.tokens, profile.deepest))
    return cost.device_seconds(work) + cost.host_seconds(work) + drafting


def _depth(profile: DraftProfile, tokens: int) -> Depth:
    asked = min(tokens, profile.deepest)
    if profile.traces:
        lengths = [right for trace in profile.traces.values() for right in trace.right]
        share = sum(right >= 0 for right in lengths) / max(1, len(lengths))
    else:
        share = profile.share
    return Depth(tokens, share * asked, profile.tokens_per_step(tokens))
