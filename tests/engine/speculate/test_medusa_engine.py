"""Engines that draft by Medusa heads say what they say without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import SamplingParams
from engine.errors import ModelError
from engine.loading import resolve_device
from engine.speculate.medusa_heads import HeadWeights, MedusaWeights, ResidualLayer
from engine.speculate.medusa_learning import LearningHeads
from engine.speculate.medusa_states import hidden_states
from engine.speculate.medusa_writing import write_medusa
from engine.step_record import StepRecord
from tests.engine.tiny_models import TinyModel, make_tiny

NUM_HEADS = 3
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


def prompts(count: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 128, (5 + 3 * i,), generator=generator).tolist() for i in range(count)]


def make_heads(tiny: TinyModel, folder: Path) -> Path:
    """Heads that have seen what the model says to half of the prompts: right there, else not."""
    decoder = tiny.decoder()
    seen = prompts()[::2]
    outputs = tiny.llm().generate(seen, GREEDY)
    sequences = [p + o.outputs[0].token_ids for p, o in zip(seen, outputs, strict=True)]
    states = torch.cat([own[:-2] for own in hidden_states(decoder, sequences)])
    targets = torch.cat(
        [
            torch.tensor([*sequence, *[-1] * NUM_HEADS]).unfold(0, NUM_HEADS, 1)[2 : len(sequence)]
            for sequence in sequences
        ]
    )
    heads = LearningHeads(decoder, NUM_HEADS, 1)
    optimizer = torch.optim.Adam(heads.parameters(), lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        heads.losses(states, targets, -1).sum().backward()
        optimizer.step()
    folder.mkdir()
    write_medusa(folder, heads.snapshot(), decoder.spec, "tiny", {})
    return folder


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def heads(tiny: TinyModel) -> Path:
    return make_heads(tiny, tiny.folder / "heads")


def generate(
    tiny: TinyModel, params: Any, **knobs: Any
) -> tuple[list[list[int]], list[StepRecord]]:
    llm, records = tiny.llm(max_num_seqs=4, **knobs), []
    llm.engine.on_step = records.append
    outputs = llm.generate(prompts(), params)
    return [output.outputs[0].token_ids for output in outputs], records


def drafting(heads: Path, tokens: int = 10) -> dict[str, Any]:
    return {
        "speculative_method": "medusa",
        "speculative_model": str(heads),
        "num_speculative_tokens": tokens,
        "speculative_adaptive": False,
    }


@pytest.mark.parametrize("tokens", [1, 10])
def test_greedy_outputs_are_the_same_in_fewer_steps(
    tiny: TinyModel, heads: Path, tokens: int
) -> None:
    plain, before = generate(tiny, GREEDY)
    drafted, after = generate(tiny, GREEDY, **drafting(heads, tokens))
    for prompt, one, other in zip(prompts(), plain, drafted, strict=True):
        certain = tiny.certain(prompt, one)
        assert one[:certain] == other[:certain]
    accepted = sum(record.accepted_tokens for record in after)
    assert 0.2 * sum(map(len, drafted)) < accepted < sum(r.drafted_tokens for r in after)
    assert len(after) < len(before)


def test_seeded_outputs_are_the_same(tiny: TinyModel, heads: Path) -> None:
    params = [
        SamplingParams(temperature=0.7, top_p=0.9, seed=i, max_tokens=24, ignore_eos=True)
        for i in range(len(prompts()))
    ]
    plain, _ = generate(tiny, params)
    drafted, records = generate(tiny, params, **drafting(heads))
    assert sum(record.drafted_tokens for record in records) > 0
    # Rounding may turn a draw that falls on the edge between two tokens, and what follows it.
    assert sum(one == other for one, other in zip(plain, drafted, strict=True)) >= len(plain) - 1


def test_it_goes_with_quantized_weights_and_caches(tiny: TinyModel, heads: Path) -> None:
    knobs = {"quantization": "int8", "kv_cache_dtype": "int8"}
    drafted, records = generate(tiny, GREEDY, **drafting(heads), **knobs)
    assert all(len(output) == 40 for output in drafted)
    assert sum(record.accepted_tokens for record in records) > 0


def test_heads_that_do_not_fit_are_refused_at_the_start(tiny: TinyModel, tmp_path: Path) -> None:
    knobs = drafting(tmp_path)
    with pytest.raises(ModelError, match="holds no Medusa heads"):
        tiny.llm(**knobs)
    spec = tiny.decoder().spec
    layer = ResidualLayer(torch.zeros(spec.hidden_size + 1, spec.hidden_size + 1))
    write_medusa(tmp_path, MedusaWeights((HeadWeights((layer,)),)), spec, "tiny", {})
    with pytest.raises(ModelError, match=rf"hidden size of {spec.hidden_size + 1}"):
        tiny.llm(**knobs)
    assert resolve_device(tiny.llm().config).type == "cpu"  # without them it loads
