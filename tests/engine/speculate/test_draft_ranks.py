"""A draft model that is divided among ranks drafts as a whole one does."""

from __future__ import annotations

import queue
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.packed_step import StepHeader
from engine.parallel import GroupRanks
from engine.request import Request, SamplingParams
from engine.speculate.draft import Draft
from engine.speculate.draft_model import DraftModel
from engine.step_record import StepRecord
from tests.engine.rank_threads import load_shard, on_ranks
from tests.engine.tiny_models import TinyModel, make_tiny

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SEEDED = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=12)
SAMPLINGS = (SamplingParams(temperature=0.0), SamplingParams(temperature=0.8, top_p=0.9))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny("llama", tmp_path_factory.mktemp("draft") / "tiny")


def life(model: DraftModel) -> list[list[int]]:
    """What is drafted for two requests that go on for a while."""
    rng = random.Random(2)
    requests = [
        Request(str(i), [rng.randrange(128) for _ in range(20 + 9 * i)], params, 0.0)
        for i, params in enumerate(SAMPLINGS)
    ]
    drafted: list[list[int]] = []
    for turn in range(8):
        drafts: list[Draft | None] = model.propose(requests, [4, 1 + turn % 3])
        for request, draft in zip(requests, drafts, strict=True):
            assert draft is not None
            drafted.append(list(draft.token_ids))
            request.token_ids += [*draft.token_ids[: turn % 4], rng.randrange(128)]
        if turn == 4:
            model.forget(requests[0])
    return drafted


def test_two_ranks(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(device="cpu", block_size=8, max_num_batched_tokens=16, max_num_seqs=8)
    expected = life(DraftModel(tiny.decoder(), config, 96, 40))
    steps: queue.Queue[Any] = queue.Queue()

    def tell(ranks: GroupRanks, header: StepHeader, words: torch.Tensor, draft: bool) -> None:
        if ranks.rank == 0:
            assert draft
            steps.put((header, words.clone()))

    monkeypatch.setattr(GroupRanks, "step", tell)

    def work(ranks: GroupRanks) -> list[list[int]]:
        torch.set_num_threads(1)
        model = DraftModel(load_shard(tiny.folder, ranks), config, 96, 40)
        if ranks.rank == 0:
            drafted = life(model)
            steps.put(None)
            return drafted
        while (step := steps.get()) is not None:
            model.follow(*step)
        return []

    drafted, nothing = on_ranks(2, tmp_path / "meeting", work)
    assert drafted == expected
    assert nothing == []


def test_two_processes_speculate_as_one_serves(tiny: TinyModel, tmp_path: Path) -> None:
    """One pair of processes, for starting one takes seconds."""
    smaller = make_tiny("qwen3", tmp_path / "smaller", num_hidden_layers=1)
    prompts = [[5, 4, 3, 2, 1], list(range(40)), [7] * 11]
    llm = tiny.llm(
        tensor_parallel_size=2,
        speculative_method="draft_model",
        speculative_model=str(tiny.folder),
        speculative_adaptive=False,
        num_speculative_tokens=2,
    )
    whole = tiny.llm()
    steps: list[StepRecord] = []
    llm.engine.on_step = steps.append

    def check(least: int, most: int) -> None:
        """What is drafted is accepted by so much, and changes nothing."""
        steps.clear()
        for params in (GREEDY, SEEDED):
            outputs = [
                [out.outputs[0].token_ids for out in each.generate(prompts, params)]
                for each in (llm, whole)
            ]
            assert outputs[0] == outputs[1]
        drafted = sum(step.drafted_tokens for step in steps)
        assert least <= sum(step.accepted_tokens for step in steps) * 100 / max(drafted, 1) <= most

    try:
        check(30, 100)  # the model drafts for itself
        llm.engine.reconfigure(speculative_model=str(smaller.folder), block_size=8)
        check(0, 30)
        other = make_tiny("llama", tmp_path / "other", vocab_size=130)
        with pytest.raises(ConfigError, match="has 130 tokens"):
            llm.engine.reconfigure(speculative_model=str(other.folder))
        check(0, 30)
        llm.engine.reconfigure(speculative_method="none")
        check(0, 0)
    finally:
        llm.close()
