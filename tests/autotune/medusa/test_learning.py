"""The loop in which heads learn: how long, how fast, in which order."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from autotune.medusa.learning import BATCH, learn
from autotune.medusa.samples import Samples
from engine.models.decoder import Decoder
from engine.speculate.medusa_learning import LearningHeads
from tests.engine.tiny_models import make_tiny


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return make_tiny("llama", tmp_path_factory.mktemp("model")).decoder()


def samples(decoder: Decoder, count: int = 60) -> Samples:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(count, decoder.spec.hidden_size, generator=generator)
    return Samples(
        states, torch.randint(0, decoder.spec.vocab_size, (count, 2), generator=generator)
    )


def test_heads_learn_for_as_long_as_asked(decoder: Decoder) -> None:
    heads, told = LearningHeads(decoder, 2, 1), []
    steps = learn(
        heads,
        samples(decoder),
        0,
        done=lambda step: step / 150,
        on_step=lambda step, losses: told.append((step, sum(losses))),
    )
    assert steps == 150
    assert [step for step, _ in told] == list(range(1, 151))
    assert told[-1][1] < 0.7 * told[0][1]


def test_the_same_seed_learns_the_same(decoder: Decoder) -> None:
    many = samples(decoder, 2 * BATCH)

    def learned(seed: int) -> torch.Tensor:
        heads = LearningHeads(decoder, 2, 1)
        learn(heads, many, seed, done=lambda step: step / 5)
        return heads.weights[0].detach()

    assert torch.equal(learned(0), learned(0))
    assert not torch.equal(learned(0), learned(1))


def test_each_place_once_before_any_again(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.medusa.learning.BATCH", 16)
    heads, some = LearningHeads(decoder, 2, 1), samples(decoder, 40)
    seen: list[torch.Tensor] = []
    losses = heads.losses

    def remember(states: torch.Tensor, targets: torch.Tensor, missing: int) -> torch.Tensor:
        seen.append(states)
        return losses(states, targets, missing)

    monkeypatch.setattr(heads, "losses", remember)
    learn(heads, some, 0, done=lambda step: step / 6)
    assert [len(states) for states in seen] == [16, 16, 8] * 2
    for epoch in (seen[:3], seen[3:]):
        found = {tuple(row.tolist()) for row in torch.cat(epoch)}
        assert found == {tuple(row.tolist()) for row in some.states}


def test_the_rate_falls_to_nothing(decoder: Decoder) -> None:
    heads = LearningHeads(decoder, 2, 1)
    moved, last = [], heads.weights[0].detach().clone()

    def on_step(_step: int, _losses: list[float]) -> None:
        nonlocal last
        now = heads.weights[0].detach().clone()
        moved.append(float((now - last).abs().max()))
        last = now

    learn(heads, samples(decoder), 0, done=lambda step: step / 100, on_step=on_step)
    assert max(moved[-3:]) < 0.1 * max(moved)


def test_it_stops_when_told(decoder: Decoder) -> None:
    stop = threading.Event()
    steps = learn(
        LearningHeads(decoder, 2, 1),
        samples(decoder),
        0,
        done=lambda _: 0.0,
        on_step=lambda step, _: stop.set() if step == 4 else None,
        stop=stop,
    )
    assert steps == 4


def test_the_model_is_left_as_it_is(decoder: Decoder, tmp_path: Path) -> None:
    fresh = make_tiny("llama", tmp_path).decoder()
    heads = LearningHeads(decoder, 2, 1, own_output=True)
    learn(heads, samples(decoder), 0, done=lambda step: step / 10)
    states = torch.randn(4, decoder.spec.hidden_size)
    assert torch.equal(decoder.logits(states), fresh.logits(states))
