"""Logits of every family are transformers', through the paged cache and in any chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import SamplingParams
from tests.engine.tiny_models import CASES, VOCABULARY, TinyModel, make_tiny, paged_logits

LENGTH = 40
CHUNKS = [[40], [13, 1, 1, 20, 5]]
# One case of each family is also decoded token by token, and run in bfloat16.
FAMILIES = {family: case for case, (family, _) in reversed(CASES.items())}


def tokens() -> list[int]:
    return torch.randint(VOCABULARY, (LENGTH,)).tolist()


@pytest.fixture(scope="module", params=list(CASES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param), seed=3)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for float32 rounding, on logits that mean something."""
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-4)


def test_logits_in_float32(tiny: TinyModel) -> None:
    decoder = tiny.decoder()
    prompt = tokens()
    expected = tiny.logits(prompt)
    for chunks in CHUNKS:
        assert_same(paged_logits(decoder, prompt, chunks), expected)


@pytest.mark.parametrize("case", FAMILIES.values())
def test_logits_token_by_token(case: str, tmp_path: Path) -> None:
    tiny = make_tiny(case, tmp_path, seed=4)
    prompt = tokens()
    assert_same(paged_logits(tiny.decoder(), prompt, [1] * LENGTH), tiny.logits(prompt))


@pytest.mark.parametrize("case", FAMILIES.values())
def test_logits_in_bfloat16(case: str, tmp_path: Path) -> None:
    """About as far from the float32 model with the same weights as transformers is."""
    tiny = make_tiny(case, tmp_path, seed=5, dtype=torch.bfloat16)
    prompt = tokens()
    theirs = tiny.logits(prompt)
    tiny.model.float()
    exact = tiny.logits(prompt)
    ours = paged_logits(tiny.decoder(torch.bfloat16), prompt, CHUNKS[1])
    assert (ours - exact).norm() <= 2.0 * (theirs - exact).norm() + 1e-3


# Two kinds of layers, one window for all, experts everywhere, experts in some layers and a window.
ENGINES = ["gemma3", "phi3", "mixtral", "qwen3_moe_sparse"]


@pytest.mark.parametrize("case", ENGINES)
def test_greedy_tokens_of_whole_engines(case: str, tmp_path: Path) -> None:
    """A batch with a tight budget of tokens: chunks and decodes of all requests are mixed."""
    tiny = make_tiny(case, tmp_path, seed=6)
    prompts = [torch.randint(VOCABULARY, (n,)).tolist() for n in (3, 37, 20, 1)]
    llm = tiny.llm(max_num_batched_tokens=16, max_num_seqs=8, block_size=8)
    sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    compared = 0
    for prompt, output in zip(prompts, llm.generate(prompts, sampling), strict=True):
        expected = tiny.greedy(prompt, 16)
        certain = tiny.certain(prompt, expected)
        assert output.outputs[0].token_ids[:certain] == expected[:certain]
        compared += certain
    assert compared > 30  # else ties would have hidden what this is to show
