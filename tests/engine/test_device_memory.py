"""The memory that is left for a KV cache, on a device that only counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.device_memory import MemoryUse, graph_bytes, measure_use
from engine.errors import EnvironmentLacks
from engine.forward_pass import ForwardPass
from engine.graph_sizes import most_sequences
from engine.models.decoder import Decoder
from engine.runner import ModelRunner
from tests.engine.fake_capture import FakeCapture
from tests.engine.tiny_models import make_tiny

GIB = 1 << 30


class FakeMemory:
    """A device of 80 GiB; `held` is in use by tensors, `outside` by the driver and others."""

    def __init__(self, held: int = 16 * GIB, outside: int = 2 * GIB) -> None:
        self.held = held
        self.cached = 0
        self.outside = outside
        self.highest = 0

    def use(self, num_bytes: int) -> None:
        """Take memory and give it back to the allocator's cache."""
        self.cached = max(self.cached, num_bytes)
        self.highest = max(self.highest, self.held + self.cached)

    def settle(self) -> None:
        self.cached = 0
        self.highest = self.held

    def reserved(self) -> int:
        return self.held + self.cached

    def peak(self) -> int:
        return self.highest

    def free_and_total(self) -> tuple[int, int]:
        return 80 * GIB - self.held - self.cached - self.outside, 80 * GIB


class Held:
    """Graphs that take a pool for the largest, and some of the driver's memory each."""

    def __init__(self, memory: FakeMemory, count: int) -> None:
        self.memory, self.num_bytes = memory, GIB // 2 + (count - 1) * 10_000_000
        memory.held += self.num_bytes

    def __del__(self) -> None:
        self.memory.held -= self.num_bytes


def test_what_is_left_beside_everything() -> None:
    memory = FakeMemory()
    memory.use(7 * GIB)  # of before: nothing to do with what is measured
    use = measure_use(memory, lambda: memory.use(3 * GIB), lambda count: Held(memory, count), 35)
    assert use == MemoryUse(80 * GIB, 18 * GIB, 3 * GIB, GIB // 2 + 34 * 10_000_000)
    assert memory.held == 16 * GIB  # the probed graphs are gone
    left = int(80 * GIB * 0.9) - 18 * GIB - 3 * GIB - GIB // 2 - 34 * 10_000_000
    assert use.cache_budget(0.9) == left
    assert use.cache_budget(0.2) < 0
    plain = measure_use(memory, lambda: memory.use(GIB), None, 0)
    assert plain == MemoryUse(80 * GIB, 18 * GIB, GIB, 0)


@pytest.mark.parametrize(
    ("first", "few", "num_few", "num_graphs", "expected"),
    [
        (100, 130, 4, 4, 130),
        (100, 130, 4, 34, 100 + 33 * 10),
        (100, 131, 4, 2, 111),  # rounded up
        (100, 100, 1, 1, 100),
        (100, 90, 4, 10, 100),  # others gave memory back meanwhile
        (-5, -7, 4, 10, 0),
    ],
)
def test_graphs_from_a_few(
    first: int, few: int, num_few: int, num_graphs: int, expected: int
) -> None:
    assert graph_bytes(first, few, num_few, num_graphs) == expected


class Recorder:
    """A decoder that notes how large its steps are."""

    def __init__(self, decoder: Decoder, memory: FakeMemory) -> None:
        self.tokens: list[int] = []
        self.rows: list[int] = []
        forward, logits = decoder.forward, decoder.logits

        def noted_forward(token_ids: Tensor, *others: object) -> Tensor:
            self.tokens.append(len(token_ids))
            memory.use(2 * GIB)
            return forward(token_ids, *others)  # type: ignore[arg-type]

        def noted_logits(hidden: Tensor) -> Tensor:
            self.rows.append(len(hidden))
            return logits(hidden)

        decoder.forward = noted_forward  # type: ignore[method-assign, assignment]
        decoder.logits = noted_logits  # type: ignore[method-assign]


def test_the_largest_step_is_run(tmp_path: Path) -> None:
    decoder = make_tiny("llama", tmp_path).decoder(torch.float32)
    memory = FakeMemory()
    recorder = Recorder(decoder, memory)
    forward = ForwardPass(decoder, FakeCapture, memory)
    config = EngineConfig(max_num_batched_tokens=300, max_num_seqs=20, gpu_memory_utilization=0.5)
    sampled: list[int] = []

    def sample(logits: Tensor) -> None:
        sampled.append(len(logits))
        memory.use(5 * GIB)

    budget = forward.cache_budget(config, 64, sample)
    assert (recorder.tokens, recorder.rows, sampled) == ([300], [256], [256])
    assert budget == 40 * GIB - 18 * GIB - 5 * GIB
    assert forward.cache_budget(config.replace(kv_cache_memory_bytes=5), 64) == 5


def test_sequences_to_be_ready_for() -> None:
    assert most_sequences(EngineConfig(max_num_seqs=4)) == 256
    assert most_sequences(EngineConfig(max_num_seqs=4, max_num_batched_tokens=100)) == 100
    assert most_sequences(EngineConfig(max_num_seqs=700)) == 700


def test_a_step_that_does_not_fit_is_told(tmp_path: Path) -> None:
    decoder = make_tiny("llama", tmp_path).decoder(torch.float32)

    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("fake")

    decoder.forward = full  # type: ignore[method-assign, assignment]
    with pytest.raises(EnvironmentLacks, match="max_num_batched_tokens=64 tokens and 64 seq"):
        ForwardPass(decoder, None, FakeMemory()).cache_budget(
            EngineConfig(max_num_batched_tokens=64, max_num_seqs=4), 64
        )


def test_which_changes_need_a_new_measurement(tmp_path: Path) -> None:
    decoder = make_tiny("llama", tmp_path).decoder(torch.float32)
    config = EngineConfig(max_num_batched_tokens=300, max_num_seqs=20)
    runner = ModelRunner(decoder, config, 64, forward=ForwardPass(decoder, None, FakeMemory()))
    for change, outgrown in [
        ({"max_num_batched_tokens": 301}, True),
        ({"max_num_batched_tokens": 100}, False),
        ({"max_num_seqs": 250}, False),
        ({"max_num_seqs": 260}, True),
        ({"max_num_seqs": 260, "kv_cache_memory_bytes": 1 << 20}, False),
    ]:
        assert runner.outgrown_by(config.replace(**change)) is outgrown
    on_a_cpu = ModelRunner(decoder, config.replace(kv_cache_memory_bytes=1 << 20), 64)
    assert not on_a_cpu.outgrown_by(config.replace(max_num_seqs=260))
