"""What is known of a proposer's drafts on some traffic: how many are right, and what they take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autotune.predict.apply import NotPredictable
from autotune.predict.step_cost import StepWork
from autotune.predict.virtual_heads import Heads
from engine.config import EngineConfig
from engine.speculate.draft import MOST_DRAFTED

# How far off, as a logit, chances are that were measured on other requests of the same traffic.
MEASURED_ERROR = 0.1
# As the logarithm of a factor: what drafting takes another time.
COST_ERROR = 0.1


@dataclass(frozen=True, slots=True)
class DraftCost:
    """Seconds that drafting adds to a step with decodes, on the host.

    `base` whenever anybody is drafted for, `sequence` for each who is, `depth` for each token of
    the longest draft and `depth_sequence` more of it for each sequence; `prompt_token` for each
    token of a request that the proposer has yet to compute itself. Of looking up, where depths cost
    nothing, `depth` is what choosing among what was found takes.
    """

    base: float = 0.0
    sequence: float = 0.0
    depth: float = 0.0
    depth_sequence: float = 0.0
    prompt_token: float = 0.0

    def seconds(self, sequences: int, depth: int, prompt_tokens: int = 0) -> float:
        """Of drafting up to `depth` tokens for each of some sequences."""
        if not sequences:
            return 0.0
        a_depth = self.depth + self.depth_sequence * sequences
        fixed = self.base + self.sequence * sequences
        return fixed + a_depth * depth + self.prompt_token * prompt_tokens

    def plus(self, other: DraftCost) -> DraftCost:
        """Both together."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return DraftCost(*(one + two for one, two in pairs))

    def scaled(self, factor: float) -> DraftCost:
        """All so many times as long."""
        return DraftCost(*(factor * seconds for seconds in dataclasses.astuple(self)))


# Looking up in a text that is at hand; measured on two Xeon cores.
LOOKUP_COST = DraftCost(base=4e-5, sequence=2e-5, depth=1e-4)
# Choosing what is worth drafting with a model and verifying; measured on two Zen 3 cores.
CHOOSING_COST = DraftCost(base=1.5e-4, sequence=5e-5)


@dataclass(frozen=True, slots=True)
class Trace:
    """What a request's drafts would have been, by the number of tokens generated before.

    `right[i]` tokens of a draft after i generated ones agree with what came, -1 where nothing was
    drafted; `chances[i]` is what the proposer itself said of it, () where it says nothing. There is
    a draft after none where the last token of a prompt is computed alone.
    """

    right: tuple[int, ...]
    chances: tuple[tuple[float, ...], ...] = ()

    def place(self, generated: int) -> int:
        """Where to look after so many tokens; of those beyond the end, earlier ones tell."""
        count = len(self.right)
        if generated < count:
            return generated
        return 1 + (generated - 1) % (count - 1) if count > 1 else 0


@dataclass(frozen=True)
class DraftProfile:
    """How drafts fare on a traffic.

    Args:
        acceptance: the chance of each drafted token, by its depth, once those before it were
            accepted; deeper ones are as the last.
        share: of the decodes that are drafted for, those for which something is found.
        run: how many decodes of a request in a row find something, on the mean; None where finding
            does not hang on the decode before.
        cost: what drafting takes.
        costs_device: whether it takes the model's device; see `engine.speculate.proposer.Proposer`.
        deepest: drafts go no deeper, whatever is asked.
        breadth: tokens that are verified at each depth, on the mean; above 1 of a tree.
        heads: those whose guesses become trees, which are made as an engine does, whatever
            `breadth`.
        choosing: what choosing takes beside `cost`, where lengths are adaptive.
        knows: whether the proposer tells the chance of each token, which then differs from one to
            the next: of those that it is sure of more are verified.
        traces: by request id, what is known token by token; requests that are not among them go the
            way of others that are. Where there are traces, chances are of no account but for how
            sure a proposer is of its tokens.
        error: how far off the chances may be, as a standard deviation of their logits.
    """

    acceptance: tuple[float, ...] = (1.0,)
    share: float = 1.0
    run: float | None = None
    cost: DraftCost = LOOKUP_COST
    costs_device: bool = False
    deepest: int = MOST_DRAFTED
    breadth: float = 1.0
    heads: Heads | None = None
    choosing: DraftCost = DraftCost()
    knows: bool = False
    traces: Mapping[str, Trace] = dataclasses.field(default_factory=dict)
    error: float = 0.0

    def __post_init__(self) -> None:
        chances = (*self.acceptance, self.share)
        if not self.acceptance or not all(0 <= chance <= 1 for chance in chances):
            raise ValueError(f"chances of drafts must lie between 0 and 1, got {chances}")

    def chance(self, depth: int) -> float:
        """Of the token `depth` places behind the first drafted, once those before were accepted."""
        return self.acceptance[min(depth, len(self.acceptance) - 1)]

    def seconds(self, sequences: int, depth: int, prompt_tokens: int = 0) -> float:
        """What drafting up to `depth` tokens for each of some sequences takes."""
        if not self.costs_device:
            depth = min(depth, 1)
        elif self.heads is not None:
            depth = min(depth, len(self.heads))
        return self.cost.seconds(sequences, depth, prompt_tokens)

    def verified(self, work: StepWork) -> StepWork:
        """The work of a step whose drafts are told by their depths."""
        more = (self.breadth - 1.0) * work.drafted
        if not more:
            return work
        return work._replace(
            rows=work.rows + more, sampled=work.sampled + more, drafted=work.drafted + more
        )

    def tokens_per_step(self, drafted: int) -> float:
        """What a decode yields on the mean that is drafted `drafted` tokens where it can be."""
        if self.traces and self.heads is None:
            found = [r for trace in self.traces.values() for r in trace.right]
            return 1 + sum(max(0, min(r, drafted)) for r in found) / max(1, len(found))
        survives, total = 1.0, 0.0
        for depth in range(min(drafted, self.deepest)):
            survives *= self.chance(depth)
            total += survives
        return 1 + self.share * total

    def drawn(self, seed: Sequence[int]) -> DraftProfile:
        """The same as it may be, given its `error`; alike for the same seed."""
        chances = np.random.default_rng((*seed, 7))
        shift, found, cost = chances.standard_normal(3)
        if not self.error:
            return self
        traces = self.traces
        if traces:  # another such traffic has more of some requests, and less of others
            names = list(traces)
            picks = chances.integers(len(names), size=len(names))
            traces = {
                name: traces[names[pick]] for name, pick in zip(names, picks.tolist(), strict=True)
            }
        heads = self.heads
        means = tuple(_shifted(p, self.error * shift) for p in (heads.means if heads else ()))
        return dataclasses.replace(
            self,
            acceptance=tuple(_shifted(p, self.error * shift) for p in self.acceptance),
            share=_shifted(self.share, self.error * found),
            heads=None if heads is None else dataclasses.replace(heads, means=means),
            cost=self.cost.scaled(math.exp(COST_ERROR * cost)),
            traces=traces,
        )


def given_profile(acceptance: Sequence[float], seconds: float) -> DraftProfile:
    """Drafts as a user tells them: the chance of each depth, and what drafting adds to a step."""
    return DraftProfile(
        tuple(acceptance),
        cost=DraftCost(base=seconds),
        costs_device=seconds > 0,
        deepest=len(acceptance),
    )


class UnknownDrafts(NotPredictable):
    """A config drafts, and nothing is known of how its drafts fare."""


def check_drafts(config: EngineConfig, drafts: DraftProfile | None) -> DraftProfile | None:
    """What is known of the drafts that a config asks for; None if it asks for none.

    Raises:
        UnknownDrafts: nothing is known.
    """
    method = config.speculative_method
    if method == "none":
        return None
    if drafts is None:
        raise UnknownDrafts(
            f"nothing is known of the drafts of speculative_method={method} on this traffic"
        )
    return drafts


def _shifted(chance: float, logit: float) -> float:
    if chance <= 0.0 or chance >= 1.0:
        return chance
    return 1.0 / (1.0 + (1.0 / chance - 1.0) * math.exp(-logit))
