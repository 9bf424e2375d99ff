"""Heads that learn: where they begin, what their loss is, and that they come to know a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.models.decoder import Decoder
from engine.speculate.medusa_heads import MedusaHeads
from engine.speculate.medusa_learning import LearningHeads
from engine.speculate.medusa_states import hidden_states
from tests.engine.tiny_models import make_tiny

MISSING = -1


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return make_tiny("llama", tmp_path_factory.mktemp("model")).decoder()


def test_states_are_what_each_sequence_alone_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.speculate.medusa_states._TOKENS_AT_ONCE", 40)
    tiny = make_tiny("gemma2", tmp_path)
    own = tiny.decoder()
    sequences = [torch.randint(0, 128, (n,)).tolist() for n in (17, 2, 30, 64, 9)]
    found = list(hidden_states(own, sequences))
    assert [len(states) for states in found] == [17, 2, 30, 64, 9]
    for sequence, states in zip(sequences, found, strict=True):
        expected = tiny.logits(sequence)
        torch.testing.assert_close(own.logits(states), expected, rtol=1e-3, atol=1e-3)
    assert not found[0].is_inference()


@pytest.mark.parametrize("own", [False, True])
def test_heads_begin_as_the_models_own_output(decoder: Decoder, own: bool) -> None:
    heads = LearningHeads(decoder, 3, 2, own_output=own)
    states = torch.randn(5, decoder.spec.hidden_size)
    expected = decoder.logits(states).expand(3, 5, -1)
    torch.testing.assert_close(heads.logits(states), expected, rtol=1e-4, atol=1e-4)


def test_soft_caps_are_those_of_the_model(tmp_path: Path) -> None:
    decoder = make_tiny("gemma2", tmp_path).decoder()
    states = torch.randn(4, decoder.spec.hidden_size)
    heads = LearningHeads(decoder, 1, 1)
    torch.testing.assert_close(heads.logits(states)[0], decoder.logits(states))


def test_losses_are_cross_entropies_of_what_is_there(decoder: Decoder) -> None:
    heads = LearningHeads(decoder, 3, 1)
    states = torch.randn(6, decoder.spec.hidden_size)
    targets = torch.randint(0, decoder.spec.vocab_size, (6, 3))
    targets[4:, 1] = MISSING
    targets[:, 2] = MISSING
    losses = heads.losses(states, targets, MISSING)
    scores = decoder.logits(states).double()
    for head, count in ((0, 6), (1, 4)):
        expected = F.cross_entropy(scores[:count], targets[:count, head])
        assert losses[head].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses[2].item() == 0.0


@pytest.mark.parametrize("own", [False, True])
def test_heads_learn_and_are_laid_out_as_they_learned(decoder: Decoder, own: bool) -> None:
    torch.manual_seed(0)
    states = torch.randn(24, decoder.spec.hidden_size)
    targets = torch.randint(0, decoder.spec.vocab_size, (24, 2))
    before = decoder.final_norm.clone()
    heads = LearningHeads(decoder, 2, 1, own_output=own)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    first = heads.losses(states, targets, MISSING)
    for _ in range(60):
        optimizer.zero_grad()
        heads.losses(states, targets, MISSING).sum().backward()
        optimizer.step()
    last = heads.losses(states, targets, MISSING)
    assert bool((last < 0.5 * first).all())
    assert torch.equal(decoder.final_norm, before)
    weights = heads.snapshot(((2.0,), (3.0,)))
    assert weights.calibration == ((2.0,), (3.0,))
    laid_out = MedusaHeads(weights, torch.float32, decoder.device, decoder.head)
    with torch.no_grad():
        expected = heads.logits(states).transpose(0, 1)
    torch.testing.assert_close(laid_out.logits(states), expected, rtol=1e-4, atol=1e-4)
