"""How a draft model's tokens are chosen, and how likely each seems to be accepted.

Requests that choose without chance, or by a seed of their own, get drafts of the likeliest tokens,
which are accepted where the model chooses the same. The others' are drawn from what the draft
model's logits become by the request's own parameters, and that distribution is kept: rejection
sampling needs it (Leviathan et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.request import Request
from engine.sampling_penalties import logit_changes
from engine.speculate.draft import Draft
from engine.uniform import DRAFTING, request_seed, stream_seed, uniforms
from kernels import sampling
from kernels.sampling import DrawParameters


@dataclass(slots=True)
class Chain:
    """A draft as it grows, one token a step.

    `request` is the one that is drafted for, or a copy with the drafted tokens behind its own where
    penalties look at them; it has `start` tokens without them. `seed` is None where the likeliest
    token is taken.
    """

    request: Request
    start: int
    seed: int | None
    penalised: bool
    token_ids: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    drawn_from: list[Tensor] = field(default_factory=list)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the likeliest token is taken as the model has it."""
        return self.seed is None and not self.penalised

    def append(self, token: int, share: float, drawn_from: Tensor | None = None) -> None:
        """Add a token that has `share` of the distribution, [vocabulary], that it is drawn from.

        The likeliest token is right about as often as its share says. A drawn one is accepted with
        min(1, p / q): about half the time where its share is small, and always where it has all; a
        straight line between the two fitted the embedded pair.
        """
        if drawn_from is not None:
            share = (1.0 + share) / 2.0
        self.token_ids.append(token)
        self.chances.append(share * self.chances[-1] if self.chances else share)
        if drawn_from is not None:
            self.drawn_from.append(drawn_from)
        if self.penalised:
            self.request.token_ids.append(token)

    def draft(self) -> Draft:
        """The chain as it is."""
        probabilities = torch.stack(self.drawn_from) if self.drawn_from else None
        return Draft(self.token_ids, None, probabilities, self.chances)


@dataclass(frozen=True, slots=True)
class Choice:
    """One token for each row and its share of what it was chosen from, on the logits' device.

    tokens int64 [S], shares float32 [S]; drawn_from float32 [S, vocabulary], None where all rows
    take the likeliest.
    """

    tokens: Tensor
    shares: Tensor
    drawn_from: Tensor | None = None


class DraftChooser:
    """Chooses drafted tokens; `seed` is the engine's."""

    def __init__(self, seed: int, eos_token_ids: Sequence[int]) -> None:
        self.seed = seed
        self._eos = tuple(eos_token_ids)

    def chain(self, request: Request) -> Chain:
        """An empty chain for a request."""
        params = request.sampling
        seed = None
        if params.temperature > 0.0 and params.seed is None:
            # Of its own: what is drafted must tell nothing of the numbers that accept it.
            seed = stream_seed(request_seed(None, self.seed, request.request_id), DRAFTING)
        penalised = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
            or params.min_tokens > request.num_output_tokens
        )
        if penalised:
            request = request.copied()
        return Chain(request, len(request.token_ids), seed, penalised)

    def choose(self, logits: Tensor, chains: Sequence[Chain], index: int) -> Choice:
        """Token `index` of each chain; logits [S, vocabulary], which may be changed.

        Tokens before it may still be on the device alone, unless a chain is penalised.
        """
        if any(chain.penalised for chain in chains):
            logits = self._penalised(logits, chains)
        if all(chain.seed is None for chain in chains):
            return Choice(*sampling.likeliest_shares(logits))
        parameters = _parameters(chains, index)
        drawn_from = sampling.probabilities(logits, parameters)
        # A distribution of one token gives it whatever the number is.
        chance = torch.tensor(parameters.uniform, dtype=torch.float64).to(logits.device)
        tokens = sampling.draw_from(drawn_from, chance)
        shares = drawn_from.gather(1, tokens.unsqueeze(1)).squeeze(1)
        if any(chain.seed is None for chain in chains):
            sure, sure_shares = sampling.likeliest_shares(logits)
            drawn = torch.tensor([chain.seed is not None for chain in chains])
            drawn = drawn.to(logits.device)
            tokens = torch.where(drawn, tokens, sure)
            shares = torch.where(drawn, shares, sure_shares)
        return Choice(tokens, shares, drawn_from)

    def _penalised(self, logits: Tensor, chains: Sequence[Chain]) -> Tensor:
        changes = logit_changes([chain.request for chain in chains], logits.shape[1], self._eos)
        if changes is None:
            return logits
        logits = logits.float().contiguous()
        arrays = (changes.places, changes.factors, changes.amounts)
        sampling.change_logits(logits, *(torch.from_numpy(a).to(logits.device) for a in arrays))
        return logits


def _parameters(chains: Sequence[Chain], index: int) -> DrawParameters:
    params = [chain.request.sampling for chain in chains]
    return DrawParameters(
        [0.0 if c.seed is None else p.temperature for c, p in zip(chains, params, strict=True)],
        [p.top_k for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        uniforms(
            [chain.seed or 0 for chain in chains], [chain.start + index for chain in chains]
        ).tolist(),
    )
