"""A decoder's captured steps against its eager ones, through the Triton kernels."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import Batch, ScheduledSequence
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.forward_pass import ForwardPass
from engine.graph_sizes import decode_shapes
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from engine.speculate.draft import Draft
from engine.step_inputs import StepInputs
from kernels.triton import runtime
from tests.engine.fake_capture import FakeCapture
from tests.engine.tiny_models import BLOCK, make_tiny
from tests.kernels.triton.interpreter import repaired

CPU = torch.device("cpu")
LENGTH = 64


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, not interpreted")
    with repaired(), runtime.interpreting():
        yield


def config_of(**knobs: object) -> EngineConfig:
    small = {"block_size": BLOCK, "max_num_seqs": 4, "max_num_batched_tokens": 4}
    return EngineConfig.from_mapping({**small, "kv_cache_memory_bytes": 1 << 18, **knobs})


def test_a_padded_captured_step_says_what_the_eager_one_says(tmp_path: Path) -> None:
    """Two groups of layers, one with windows, over an int8 cache, for several steps."""
    kinds: dict[str, Any] = {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    decoder = make_tiny("qwen3_window", tmp_path, **kinds).decoder(torch.float32)
    config = config_of(kv_cache_dtype="int8")
    capture = FakeCapture()
    captured = ModelRunner(decoder, config, LENGTH, forward=ForwardPass(decoder, lambda: capture))
    eager = ModelRunner(decoder, config, LENGTH, forward=ForwardPass(decoder))
    assert (captured.notes, capture.captured) == ([], 3)  # of 1, 2 and 4 sequences
    for layer in captured.cache.layers:
        assert not layer.keys.any()
        assert not layer.values.any()
    rng = random.Random(5)
    greedy = SamplingParams(temperature=0.0, logprobs=3)
    requests = []
    for i in range(3):
        tables = BlockTables([[1 + 12 * i + 6 * g + j for j in range(6)] for g in range(2)])
        prompt = [rng.randrange(100) for _ in range(3)]
        requests.append(Request(str(i), prompt, greedy, 0.0, tables=tables))
    prefill = Batch([ScheduledSequence(r, 0, 3, True) for r in requests], 0)
    first, other = captured.execute(prefill), eager.execute(prefill)
    assert first.tokens == other.tokens
    for r, tokens in zip(requests, first.tokens, strict=True):
        r.token_ids += tokens
    assert capture.replayed == 0
    for step in range(2):
        present = requests[: 3 - 2 * step]
        batch = Batch(
            [ScheduledSequence(r, len(r.token_ids) - 1, 1, True) for r in present], len(present)
        )
        ours, theirs = captured.execute(batch), eager.execute(batch)
        assert capture.replayed == step + 1
        assert ours.tokens == theirs.tokens
        for our, their in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert our is not None
            assert their is not None
            # Sums may round otherwise in other batches, and a cached value with them.
            assert our[0].top == pytest.approx(their[0].top, abs=2e-3)
        for r, tokens in zip(present, ours.tokens, strict=True):
            r.token_ids += tokens
    for ours_layer, theirs_layer in zip(captured.cache.layers, eager.cache.layers, strict=True):
        steps = ours_layer.keys.int() - theirs_layer.keys.int()
        assert steps.abs().max() <= 1
        assert ours_layer.keys.any()


@pytest.mark.parametrize("trees", [False, True])
def test_captured_verification_says_what_the_eager_one_says(tmp_path: Path, trees: bool) -> None:
    """Drafts of different lengths, fewer than the captured shape has room for, and none."""
    decoder = make_tiny("llama", tmp_path, num_hidden_layers=1).decoder(torch.float32)
    drafting = {"speculative_method": "ngram", "num_speculative_tokens": 3}
    if trees:
        drafting |= {"speculative_method": "medusa", "speculative_model": "heads"}
    config = config_of(max_num_batched_tokens=16, **drafting)
    shapes = set(decode_shapes(config))
    capture = FakeCapture(rehearses=False)
    captured, eager = ForwardPass(decoder, lambda: capture), ForwardPass(decoder)
    inputs = [StepInputs(BLOCK, LENGTH, CPU) for _ in range(2)]
    for forward in (captured, eager):
        forward.allocate(config, LENGTH, 40)
    assert capture.captured == len(shapes)
    rng = random.Random(7)
    sampling = SamplingParams(temperature=0.0)
    requests = []
    for i in range(3):
        tables = BlockTables([[1 + 6 * i + j for j in range(6)]])
        prompt = [rng.randrange(100) for _ in range(9 + 4 * i)]
        requests.append(Request(str(i), prompt, sampling, 0.0, tables=tables))
    prefill = Batch([ScheduledSequence(r, 0, len(r.token_ids) - 1, False) for r in requests], 0)
    with torch.inference_mode():
        for forward, made in zip((captured, eager), inputs, strict=True):
            header, buffer = made.pack(prefill)
            assert forward.run(header, buffer) is None
        for lengths in ((2, 0, 1), (3, 3), (1,), (0, 0, 3)):
            parents = [-1, -1, 0] if trees else None
            sequences = []
            for request, length in zip(requests, lengths, strict=False):
                draft = None
                if length:
                    tokens = [rng.randrange(100) for _ in range(3)]
                    draft = Draft(tokens, parents).first(length)
                start = len(request.token_ids) - 1
                sequences.append(ScheduledSequence(request, start, 1 + length, True, draft))
            sequences.sort(key=lambda s: s.num_drafted > 0)
            batch = Batch(sequences, len(sequences))
            shape = captured.shape_for(batch)
            assert shape in shapes
            assert shape.new_tokens >= 1 + max(lengths)
            before = capture.replayed
            header, buffer = inputs[0].pack(batch, shape)
            ours = captured.run(header, buffer)
            assert capture.replayed == before + 1
            theirs = eager.run(*inputs[1].pack(batch))
            assert ours is not None
            assert theirs is not None
            count = batch.num_tokens
            torch.testing.assert_close(ours.logits[:count], theirs.logits)
            torch.testing.assert_close(ours.hidden[:count], theirs.hidden)
            assert ours.likeliest is not None
            assert torch.equal(ours.likeliest[:count], theirs.logits.argmax(-1))
    for ours_layer, theirs_layer in zip(captured.cache.layers, eager.cache.layers, strict=True):
        torch.testing.assert_close(ours_layer.keys, theirs_layer.keys)


def test_what_has_no_kernel_runs_without_graphs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_tiny("llama", tmp_path).decoder(torch.float32)

    class NoAttention:
        @staticmethod
        def write_kv(*_: object) -> bool:
            return True

        @staticmethod
        def paged_attention(*_: object) -> None:
            return None

    monkeypatch.setattr("engine.forward_pass.backend_for", lambda _: NoAttention)
    capture = FakeCapture()
    runner = ModelRunner(
        decoder, config_of(), LENGTH, forward=ForwardPass(decoder, lambda: capture)
    )
    assert capture.rehearsed == 0
    assert runner.notes == [
        "decode steps run without CUDA graphs: no kernel for attention with heads of 16"
    ]
    assert runner.forward.most_captured == 0


def test_the_knob_turns_graphs_off(tmp_path: Path) -> None:
    decoder = make_tiny("llama", tmp_path).decoder(torch.float32)
    capture = FakeCapture()
    forward = ForwardPass(decoder, lambda: capture)
    runner = ModelRunner(decoder, config_of(cuda_graphs=False), LENGTH, forward=forward)
    assert (capture.rehearsed, runner.notes, forward.most_captured) == (0, [], 0)


class OnDevice(FakeCapture):
    """A graph that is kept by CUDA, not by what was captured."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        super().capture(step)
        return lambda: None


def test_a_runner_that_is_dropped_gives_its_memory_back_at_once(tmp_path: Path) -> None:
    """A cycle would hold the KV cache until Python looks for cycles, and the next model fails."""
    decoder = make_tiny("llama", tmp_path).decoder(torch.float32)
    forward = ForwardPass(decoder, OnDevice)
    runner = ModelRunner(decoder, config_of(), LENGTH, forward=forward)
    assert forward.most_captured
    held = [weakref.ref(x) for x in (forward, forward.cache.layers[0].keys, forward._graphs)]
    gc.disable()
    try:
        del runner, forward
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()


def test_graphs_can_be_given_back_alone(tmp_path: Path) -> None:
    decoder = make_tiny("llama", tmp_path).decoder(torch.float32)
    runner = ModelRunner(decoder, config_of(), LENGTH, forward=ForwardPass(decoder, FakeCapture))
    runner.forward.release_graphs()
    assert runner.forward.most_captured == 0
    runner.warmup()
