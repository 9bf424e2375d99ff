"""What heads learn from: windows of text, what the model writes on, and what follows each state."""

from __future__ import annotations

import threading

import pytest
import torch

from autotune.errors import BadInput, Interrupted
from autotune.medusa.samples import NO_TARGET, Passage, cut_windows, take_samples, write_on
from engine.config import EngineConfig
from engine.loading import LoadedModel, load_model
from tests.engine.tiny_models import make_tiny

CONFIG = {"max_model_len": 32, "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 22}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = tmp_path_factory.mktemp("model")
    make_tiny("llama", folder)
    return EngineConfig(model=str(folder), **CONFIG)


@pytest.fixture(scope="module")
def loaded(config: EngineConfig) -> LoadedModel:
    return load_model(config)


def windows(count: int, length: int = 32) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 128, (count, length), generator=generator).tolist()


def test_windows_cover_the_texts_once() -> None:
    texts = [list(range(100)), list(range(100, 204)), [500]]
    learned, held_out = cut_windows(texts, 10, 10**6, seed=0)
    tokens = sorted(token for window in learned + held_out for token in window)
    # The rest of 4 tokens is too short for a window, and the text of one token too.
    assert tokens == list(range(200))
    assert len(held_out) == 2
    again = cut_windows(texts, 10, 10**6, seed=0)
    assert again == (learned, held_out)
    assert cut_windows(texts, 10, 10**6, seed=1) != again
    fewer = cut_windows(texts, 10, 100, seed=0)
    assert len(fewer[0]) + len(fewer[1]) == 10


def test_too_little_text() -> None:
    with pytest.raises(BadInput, match=r"the text has 34 tokens, too few .* at least 40"):
        cut_windows([list(range(34))], 10, 10**6, seed=0)


def test_the_model_writes_on_as_it_serves(loaded: LoadedModel, config: EngineConfig) -> None:
    engine = loaded.engine(config)
    counts: list[int] = []
    passages = write_on(engine, windows(3), 100, 0, on_tokens=counts.append)
    written = sum(len(passage.token_ids) - passage.first - 1 for passage in passages)
    assert written == counts[-1] == 7 * 16  # the first multiple of half a window from 100 on
    assert not engine.has_unfinished
    decoder = loaded.runner.decoder
    beginnings = {tuple(window[:8]) for window in windows(3)}
    for passage in passages:
        assert tuple(passage.token_ids[:8]) in beginnings
        # Greedy: each token written is the likeliest after those before it.
        samples = take_samples(decoder, [passage], 1)
        likeliest = decoder.logits(samples.states).argmax(-1)[1:]
        assert torch.equal(likeliest, samples.targets[:-1, 0])
    starts = {tuple(passage.token_ids[: passage.first + 1]) for passage in passages}
    assert len(starts) > 3  # a window's second turn is of another length


def test_what_was_begun_is_kept_when_it_is_enough(
    loaded: LoadedModel, config: EngineConfig
) -> None:
    engine = loaded.engine(config)
    steps = iter(range(100))
    passages = write_on(engine, windows(3), 1000, 0, enough=lambda: next(steps) == 5)
    assert len(passages) == 4
    assert {len(p.token_ids) - p.first - 1 for p in passages} == {5}
    assert not engine.has_unfinished


def test_writing_can_be_interrupted(loaded: LoadedModel, config: EngineConfig) -> None:
    engine, stop = loaded.engine(config), threading.Event()
    with pytest.raises(Interrupted, match="while the model wrote"):
        write_on(engine, windows(3), 1000, 0, on_tokens=lambda _: stop.set(), stop=stop)
    assert not engine.has_unfinished


def test_targets_are_the_tokens_two_and_more_places_on(loaded: LoadedModel) -> None:
    decoder = loaded.runner.decoder
    token_ids = [7, 8, 9, 10, 11, 12]
    samples = take_samples(decoder, [Passage(token_ids, 1), Passage([1, 2], 0)], 3)
    none = NO_TARGET
    assert samples.targets.tolist() == [[10, 11, 12], [11, 12, none], [12, none, none]]
    whole = take_samples(decoder, [Passage(token_ids)], 3)
    assert whole.targets.tolist()[0] == [9, 10, 11]
    torch.testing.assert_close(whole.states[1:], samples.states)
    assert len(whole) == 4
    empty = take_samples(decoder, [Passage([1, 2], 0)], 3)
    assert (len(empty), empty.targets.shape) == (0, (0, 3))
