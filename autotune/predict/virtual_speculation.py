"""Speculation in virtual time: the engine's own choice of how much to draft, at costs as told.

Between two steps the same `Speculator` decides that does in an engine. Its clock is what drafting
is said to take; its proposer is right as often as is known of the real one.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from autotune.predict.drafting import DraftProfile
from autotune.predict.step_cost import StepWork
from autotune.predict.virtual_drafts import Tokens, VirtualChains, VirtualProposer, verified
from engine.batch import Batch
from engine.config import EngineConfig
from engine.speculate.draft import MOST_DRAFTED
from engine.speculate.draft_lengths import DraftLengths
from engine.speculate.speculator import Speculator

# Cached tokens of a sequence at which an engine measures what its steps cost.
CONTEXT = 256


class Cost(Protocol):
    """What a step costs."""

    def device_seconds(self, work: StepWork) -> float:
        """Seconds on the device."""
        ...

    def host_seconds(self, work: StepWork) -> float:
        """Seconds on the host during which the device idles."""
        ...


class VirtualCosts:
    """What an engine measures of its steps: `engine.speculate.draft_lengths.LearningCosts`."""

    def __init__(self, cost: Cost, profile: DraftProfile) -> None:
        self._cost = cost
        self._profile = profile

    def verify_seconds(self, num_sequences: int, num_tokens: int) -> float:
        """Of a step that decodes some sequences, with `num_tokens` tokens in all."""
        drafted = num_tokens - num_sequences
        work = StepWork.of_decodes(num_sequences, num_sequences * CONTEXT, drafted)
        work = self._profile.verified(work)
        return self._cost.device_seconds(work) + self._cost.host_seconds(work)

    def draft_seconds(self, num_sequences: int, num_drafted: int) -> float:
        """Of drafting up to `num_drafted` tokens for each of some sequences."""
        return self._profile.seconds(num_sequences, num_drafted)

    def catch_up_seconds(self, num_tokens: int) -> float:
        """Of computing so many tokens that a draft model lacks."""
        return self._profile.cost.prompt_token * num_tokens

    def learn_verify(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """Nothing is to be learned of what is known."""

    def learn_draft(self, num_sequences: int, num_drafted: int, seconds: float) -> None:
        """Nothing is to be learned of what is known."""


class VirtualSpeculation(Speculator):
    """A `Speculator` of one engine in virtual time.

    Args:
        config: the engine's.
        profile: how drafts fare.
        cost: seconds of a step.
        tokens: what requests generate.
        seed: of chances.
    """

    def __init__(
        self, config: EngineConfig, profile: DraftProfile, cost: Cost, tokens: Tokens, seed: int
    ) -> None:
        if config.speculative_adaptive:
            profile = dataclasses.replace(profile, cost=profile.cost.plus(profile.choosing))
        if profile.heads is not None:  # trees are drafted token by token
            profile = dataclasses.replace(profile, breadth=1.0, deepest=MOST_DRAFTED)
        made_by = VirtualChains if config.speculative_method == "draft_model" else VirtualProposer
        proposer = made_by(profile, tokens, seed)
        lengths = DraftLengths(
            VirtualCosts(cost, profile),
            costs_device=profile.costs_device,
            lacking=proposer.lacking if profile.cost.prompt_token else None,
        )
        super().__init__(proposer, lengths, proposer.clock)
        self.profile = profile
        self._tokens = tokens

    def yielded(self, batch: Batch) -> list[list[int]]:
        """The tokens that each sequence of a step gets."""
        tokens = self._tokens
        rows: list[list[int]] = []
        for sequence in batch.sequences:
            request = sequence.request
            if sequence.draft is not None:
                rows.append(verified(sequence, tokens))
            elif sequence.samples:
                rows.append(list(tokens(request, request.num_output_tokens, 1)))
            else:
                rows.append([])
        return rows
