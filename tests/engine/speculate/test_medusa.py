"""The proposer of Medusa heads: whose states it has, and how much it may draft."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine.batch import ScheduledSequence
from engine.request import Request, SamplingParams
from engine.speculate.draft import Draft
from engine.speculate.hidden_states import HiddenStates
from engine.speculate.medusa import Medusa
from engine.speculate.medusa_heads import MedusaHeads, MedusaWeights
from engine.speculate.medusa_tree import MOST_RANKS
from tests.engine.speculate.test_medusa_heads import CPU, HIDDEN, random_heads, reference


def with_states(count: int) -> tuple[list[Request], HiddenStates, torch.Tensor]:
    """Requests of which all but the second have a hidden state."""
    requests = [Request(str(i), [1, 2, 3], SamplingParams(), 0.0) for i in range(count)]
    hidden, states = torch.randn(count, HIDDEN), HiddenStates()
    # The step had all but the newest of their tokens; the second was in no step.
    sequences = [
        ScheduledSequence(
            request if row != 1 else Request("other", [1], SamplingParams(), 0.0), 1, 1, True
        )
        for row, request in enumerate(requests)
    ]
    states.begin(sequences, hidden)
    return requests, states, hidden


def proposer(weights: MedusaWeights, states: HiddenStates, *, branches: bool = True) -> Medusa:
    return Medusa(MedusaHeads(weights, torch.float32, CPU), states, branches=branches)


def test_drafts_are_trees_of_the_requests_own_states() -> None:
    weights = random_heads(3, 1)
    requests, states, hidden = with_states(4)
    drafts = proposer(weights, states).propose(requests, [6, 6, 0, 3])
    assert [draft is not None for draft in drafts] == [True, False, False, True]
    probabilities = reference(weights, hidden).softmax(-1)
    for row in (0, 3):
        draft = drafts[row]
        assert draft is not None
        assert len(draft) == (6 if row == 0 else 3)
        assert draft.probabilities is None
        assert draft.chances is not None
        for index, chance in enumerate(draft.chances):
            path = [draft.token_ids[node] for node in draft.path(index)]
            product = np.prod([float(probabilities[row, h, t]) for h, t in enumerate(path)])
            assert chance == pytest.approx(product, rel=1e-3)
        assert draft.token_ids[0] == int(probabilities[row, 0].argmax())


def test_nobody_asked_and_nobody_known() -> None:
    requests, states, _ = with_states(3)
    medusa = proposer(random_heads(2, 1), states)
    assert medusa.propose(requests, [0, 5, 0]) == [None] * 3
    requests[0].token_ids.append(4)  # its newest token came from elsewhere
    assert medusa.propose(requests[:2], [5, 5]) == [None, None]
    assert medusa.propose([], []) == []
    medusa.forget(requests[0])


def test_without_branches_drafts_are_the_likeliest_chain() -> None:
    weights = random_heads(3, 1)
    requests, states, hidden = with_states(1)
    (draft,) = proposer(weights, states, branches=False).propose(requests, [20])
    assert draft is not None
    assert draft.parents is None
    assert list(draft.token_ids) == reference(weights, hidden)[0].argmax(-1).tolist()


def test_what_was_measured_of_the_heads_decides_what_is_drafted() -> None:
    heads = random_heads(2, 1).heads
    requests, states, _ = with_states(1)

    def chances(calibration: Sequence[Sequence[float]]) -> list[float]:
        table = tuple(tuple(row) for row in calibration)
        weights = MedusaWeights(heads, calibration=table)
        (draft,) = proposer(weights, states).propose(requests, [12])
        assert draft is not None
        assert draft.chances is not None
        return list(draft.chances)

    plain = chances(())
    np.testing.assert_allclose(chances([[1.0], [1.0]]), plain)
    # The second head is never right: only the first one's guesses are drafted with a chance.
    lone = chances([[0.5] * MOST_RANKS, [0.0]])
    assert sum(chance > 0 for chance in lone) == MOST_RANKS
    assert lone[0] == pytest.approx(plain[0] / 2)


def test_states_of_what_was_accepted() -> None:
    """A prompt, a decode, and one of whose three drafted tokens the first and third were taken."""
    names = ("prompt", "plain", "drafted", "unfinished")
    requests = {name: Request(name, [1, 2, 3], SamplingParams(), 0.0) for name in names}
    draft = Draft([7, 8, 9], [-1, -1, 0])
    sequences = [
        ScheduledSequence(requests["plain"], 2, 1, True),
        ScheduledSequence(requests["drafted"], 2, 4, True, draft),
        ScheduledSequence(requests["prompt"], 0, 3, True),
        ScheduledSequence(requests["unfinished"], 0, 2, False),
    ]
    hidden, states = torch.randn(6, HIDDEN), HiddenStates()
    assert states.of([requests["plain"]])[1] == []
    states.begin(sequences, hidden)
    states.accept(requests["drafted"], 3, 2)
    for name, tokens in (("plain", [4]), ("drafted", [7, 9, 5]), ("prompt", [6])):
        requests[name].token_ids += tokens
    found, present = states.of(
        [requests[name] for name in ("drafted", "unfinished", "plain", "prompt")]
    )
    assert present == [0, 2, 3]
    assert torch.equal(found, hidden[[4, 0, 5]])
    states.begin(sequences[:1], hidden)  # the next step was without the others
    assert states.of([requests["drafted"]])[1] == []
