"""Greedy tokens are transformers', whatever the schedule (fp32)."""

from __future__ import annotations

import pytest
import torch

from engine import LLM, SamplingParams
from tests.engine.tiny_llama import VARIANTS, VOCABULARY, TinyLlama, make_tiny_llama

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", params=list(VARIANTS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return make_tiny_llama(tmp_path_factory.mktemp("model"), **VARIANTS[request.param])


def prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def test_greedy_tokens_are_transformers(tiny: TinyLlama) -> None:
    llm = LLM(str(tiny.folder), device="cpu", max_model_len=96, block_size=8)
    batch = prompts(1, [3, 20, 33, 1, 17])
    for prompt, output in zip(batch, llm.generate(batch, GREEDY), strict=True):
        assert output.outputs[0].token_ids == tiny.greedy(prompt, 24)
