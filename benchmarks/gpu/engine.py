"""The whole engine on a model of Llama 3.1 8B's shape: steps against their floors."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu import model
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.timing import Bench
from engine import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.decoder import Decoder
from engine.step_record import StepRecord

METHODS = ("none", "int4", "fp8")
STEPS = 40
DECODES = ((1, 256), (8, 1024), (64, 1024), (128, 1024))
PROMPT = 8192


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One load on the engine: seconds of a step, by the wall and on the device, and its floor.

    `parts` says what the floor is made of, and where the rest of the step went.
    """

    name: str
    shape: dict[str, Any]
    seconds: float
    device_seconds: float
    floor: float
    parts: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "shape": self.shape,
            "seconds_a_step": self.seconds,
            "device_seconds_a_step": self.device_seconds,
            "floor_seconds": self.floor,
            "times_the_floor": self.seconds / self.floor,
            "parts": self.parts,
        }

    def line(self) -> str:
        """For reading along."""
        shape = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return (
            f"{self.name:28s} {shape:52s} {self.seconds * 1e3:9.2f} ms "
            f"{self.seconds / self.floor:5.2f} times its floor ({self.floor * 1e3:.2f} ms)"
        )


class Loaded:
    """A decoder with random weights and an engine on it."""

    def __init__(self, bench: Bench, quantization: str, **knobs: Any) -> None:
        tiny = bench.rehearsal
        self.vocabulary = (model.TINY if tiny else model.LLAMA_8B)["vocab_size"]
        spec = model.spec_of(model.TINY if tiny else model.LLAMA_8B)
        self.decoder: Decoder = model.random_decoder(spec, bench.device, quantization)
        config = EngineConfig(
            device=bench.device.type,
            max_num_batched_tokens=64 if tiny else PROMPT,
            max_num_seqs=8 if tiny else 256,
            enable_prefix_caching=False,
            **(knobs | ({"kv_cache_memory_bytes": 1 << 20} if tiny else {})),
        )
        self.records: list[StepRecord] = []
        length = spec.max_position
        self.engine: Engine = model.start_engine(self.decoder, config, length, self.records)

    def add(self, count: int, tokens: int, output: int) -> None:
        """Requests of random tokens."""
        sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        prompts = torch.randint(self.vocabulary, (count, tokens)).tolist()
        for index, prompt in enumerate(prompts):
            self.engine.add(f"{index}", prompt, sampling)

    def run(self) -> None:
        """Step until nothing is left."""
        while self.engine.has_unfinished:
            self.engine.step()


def decode_rows(bench: Bench, ceilings: Ceilings, quantization: str) -> Iterator[EngineRow]:
    """Decode steps of equally long sequences; the floor is weights and KV over the bandwidth."""
    loaded = Loaded(bench, quantization)
    spec = loaded.decoder.spec
    steps = 4 if bench.rehearsal else STEPS
    for batch, context in ((2, 16),) if bench.rehearsal else DECODES:
        if bench.is_late:
            return
        loaded.add(batch, context - steps // 2, steps + 8)
        loaded.records.clear()
        loaded.run()
        full = [r for r in loaded.records if r.decode_sequences == batch and not r.prefill_tokens]
        full = full[2:]
        gaps = [after.start - before.start for before, after in itertools.pairwise(full)]
        per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2
        weights = model.read_bytes(loaded.decoder) / ceilings.copy_bandwidth
        kv = batch * context * per_token / ceilings.copy_bandwidth
        seconds = statistics.median(gaps)
        device = statistics.median(r.device_seconds for r in full)
        yield EngineRow(
            f"decode step, {quantization}",
            {"batch": batch, "context": context},
            seconds,
            device,
            weights + kv,
            {
                "weights": weights,
                "kv": kv,
                "device_above_floor": device - weights - kv,
                "device_idle": seconds - device,
            },
        )


def prefill_row(bench: Bench, ceilings: Ceilings) -> EngineRow:
    """One long prompt in one step; the floor is its operations over the matmul rate."""
    loaded = Loaded(bench, "none")
    spec = loaded.decoder.spec
    tokens = 32 if bench.rehearsal else PROMPT
    for _ in range(2 if bench.rehearsal else 4):
        loaded.add(1, tokens, 1)
        loaded.run()
    records = [r for r in loaded.records if r.prefill_tokens == tokens][1:]
    matrices = sum(
        sum(w.shape[0] * w.shape[1] for w in linears(la)) for la in loaded.decoder.layers
    )
    products = 2 * matrices * tokens
    attention = 2 * spec.num_layers * spec.num_heads * spec.head_dim * tokens**2
    rate = ceilings.matmul["bfloat16"]
    return EngineRow(
        "prefill step",
        {"tokens": tokens},
        statistics.median(r.seconds for r in records),
        statistics.median(r.device_seconds for r in records),
        (products + attention) / rate,
        {"linears": products / rate, "attention": attention / rate},
    )


def linears(layer: Any) -> list[Any]:
    """The linear layers of a block without experts."""
    return [layer.qkv, layer.output, layer.mlp.gate_up, layer.mlp.down]
