"""A real model that verifies drafts of somebody who knows the answer, and lies now and then."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from engine.batch import Batch, BatchResult
from engine.config import EngineConfig
from engine.llm import LLM, GenerateOutput
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from engine.speculate.draft import Draft
from engine.step_record import StepRecord
from tests.engine.tiny_llama import make_tiny_llama
from tests.engine.tiny_models import VOCABULARY, TinyModel


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


class Informed:
    """Drafts what will come, up to a lie; in a tree the truth is a branch among others."""

    def __init__(self, outputs: dict[str, list[int]], seed: int, *, trees: bool) -> None:
        self.outputs = outputs
        self.chance = random.Random(seed)
        self.trees = trees

    def prepare(self, running: Sequence[Request], config: EngineConfig) -> float:
        for request in running:
            request.draft = None
            if request.num_pending_tokens == 1 and self.chance.random() < 0.8:
                future = self.outputs[request.request_id][request.num_output_tokens :]
                request.draft = self.tree(future) if self.trees else self.chain(future)
        return 0.0

    def chain(self, future: list[int]) -> Draft:
        chain = future[: self.chance.randint(1, 9)] or [0]
        if self.chance.random() < 0.5:
            wrong = self.chance.randrange(len(chain))
            chain[wrong] = (chain[wrong] + 1) % VOCABULARY
        return Draft(chain)

    def tree(self, future: list[int]) -> Draft:
        """The true path, with other branches at random places before and behind its tokens."""
        tokens: list[int] = []
        parents: list[int] = []
        newest = -1
        for true in future[: self.chance.randint(1, 6)]:
            siblings = [(true + 1 + i) % VOCABULARY for i in range(self.chance.randint(0, 2))]
            siblings.insert(self.chance.randint(0, len(siblings)), true)
            parent = newest
            for token in siblings:
                tokens.append(token)
                parents.append(parent)
                if token == true:
                    newest = len(tokens) - 1
                elif self.chance.random() < 0.5:  # a guess at what follows the wrong one
                    tokens.append(self.chance.randrange(VOCABULARY))
                    parents.append(len(tokens) - 2)
        return Draft(tokens or [0], parents or [-1])

    def observe(self, batch: Batch, result: BatchResult) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass


def generate(
    tiny: TinyModel,
    prompts: list[list[int]],
    sampling: SamplingParams,
    speculator: Informed | None = None,
    **knobs: object,
) -> tuple[list[GenerateOutput], list[StepRecord]]:
    llm: LLM = tiny.llm(block_size=8, **knobs)
    records: list[StepRecord] = []
    llm.engine.on_step = records.append
    runner = llm.engine.executor
    assert isinstance(runner, ModelRunner)
    runner._drafting.speculator = speculator  # type: ignore[assignment]
    outputs = llm.generate(prompts, sampling)
    llm.engine.scheduler.check_integrity()
    assert llm.engine.pool.num_used == 0
    return outputs, records


def prompts_of(seed: int, count: int = 12) -> list[list[int]]:
    chance = random.Random(seed)
    stem = [chance.randrange(VOCABULARY) for _ in range(20)]
    return [
        stem[: chance.randint(0, 20)]
        + [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 30))]
        for _ in range(count)
    ]


GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "seed": 5}
PENALISED = {
    "temperature": 0.7,
    "seed": 9,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "min_tokens": 20,
    "stop_token_ids": list(range(10)),
}
ENGINES: dict[str, dict[str, object]] = {
    "plain": {},
    "crowded": {"kv_cache_memory_bytes": 18 * 8 * 768, "max_num_seqs": 8, "max_model_len": 128},
    "chunks": {"max_num_batched_tokens": 17, "max_num_seqs": 9},
    "int8": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "fp8 cache": {"kv_cache_dtype": "fp8", "enable_prefix_caching": False},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("choice", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seed", "penalties"])
def test_outputs_are_those_without_drafts(
    tiny: TinyModel, engine: str, trees: bool, choice: dict[str, object]
) -> None:
    knobs = ENGINES[engine]
    # What rounding to 8 bits turns a last bit into may change a token: these prompts are known.
    quantized = "quantization" in knobs or "kv_cache_dtype" in knobs
    seed = 3 if quantized else int(torch.randint(1 << 30, ()).item())
    prompts = prompts_of(seed)
    sampling = SamplingParams(max_tokens=40, logprobs=2, **choice)  # type: ignore[arg-type]
    expected, _ = generate(tiny, prompts, sampling, **knobs)
    informed = Informed(
        {str(i): list(o.outputs[0].token_ids) for i, o in enumerate(expected)},
        seed,
        trees=trees,
    )
    outputs, records = generate(tiny, prompts, sampling, informed, **knobs)
    for output, wanted in zip(outputs, expected, strict=True):
        ours, theirs = output.outputs[0], wanted.outputs[0]
        assert ours.token_ids == theirs.token_ids
        assert ours.finish_reason == theirs.finish_reason
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=0.1 if quantized else 1e-3)
    accepted = sum(record.accepted_tokens for record in records)
    assert sum(record.drafted_tokens for record in records) > accepted > 40
    if engine == "crowded":
        assert sum(record.preemptions for record in records) > 0


def test_ranks_move_accepted_branches_alike(tiny: TinyModel) -> None:
    prompts = prompts_of(1, count=4)
    sampling = SamplingParams(max_tokens=24, temperature=0.0)
    expected, _ = generate(tiny, prompts, sampling)
    informed = Informed(
        {str(i): list(o.outputs[0].token_ids) for i, o in enumerate(expected)}, 1, trees=True
    )
    outputs, records = generate(tiny, prompts, sampling, informed, tensor_parallel_size=2)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert sum(record.accepted_tokens for record in records) > 20
