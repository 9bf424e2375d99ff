"""A draft model that is divided among ranks drafts as a whole one does."""

from __future__ import annotations

import queue
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.packed_step import StepHeader
from engine.parallel import GroupRanks
from engine.request import Request, SamplingParams
from engine.speculate.draft import Draft
from engine.speculate.draft_model import DraftModel
from tests.engine.rank_threads import load_shard, on_ranks
from tests.engine.tiny_models import TinyModel, make_tiny

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
