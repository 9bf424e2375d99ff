"""Records for tests: made by hand, or by the real engine in virtual time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from autotune.predict.replay import replay
from autotune.predict.step_cost import TERMS, StepWork
from autotune.predict.step_times import DecodeLine
from autotune.profiling.evidence import LoadEvidence, prompts_of
from autotune.profiling.schema import ModelFacts
from autotune.records import RequestRecord
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape
from engine.step_record import StepRecord

MODEL = ModelFacts(
    name="test",
    parameters=1000,
    matmul_parameters=600,
    head_parameters=200,
    weight_bytes=1600,
    resident_bytes=2000,
    kv_bytes_per_token=32.0,
    attention_features=24,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    hidden_size=8,
    vocab_size=25,
    max_model_len=512,
    weight_bits=16,
    dtype="bfloat16",
    head_bytes=400,
    kv_block_bytes=128.0,
)


def step(start: float = 0.0, device: float = 1.0, host: float = 0.0, **values: Any) -> StepRecord:
    """A step of nothing but what is given."""
    names = [f.name for f in dataclasses.fields(StepRecord)]
    given: dict[str, Any] = dict.fromkeys(names, 0)
    given |= {"blocks_total": 100, "communication_seconds": 0.0}
    given |= {"drafted_by_depth": (), "accepted_by_depth": ()}
    given |= {"start": start, "device_seconds": device, "host_seconds": host} | values
    return StepRecord(**given)


def request(request_id: str = "0", **values: Any) -> RequestRecord:
    """A finished request of ten prompt tokens and as many tokens as it has times."""
    times = tuple(values.pop("token_times", (1.0, 2.0)))
    given: dict[str, Any] = {
        "request_id": request_id,
        "intended_send": 0.0,
        "send": values.get("intended_send", 0.0),
        "token_times": times,
        "input_tokens": 10,
        "output_tokens": len(times),
        "asked_output_tokens": len(times),
        "outcome": "finished",
    }
    return RequestRecord(**(given | values))


@dataclasses.dataclass(frozen=True)
class LinearCost:
    """A step's cost with known terms: seconds a step, a row, a decode's cached token, a pair."""

    step: float = 1e-3
    row: float = 2e-5
    kv_token: float = 1e-7
    pair: float = 1e-8
    overhead: float = 1e-4
    host: float = 2e-4

    def terms(self, work: StepWork) -> dict[str, float]:
        return dict.fromkeys(TERMS, 0.0) | {
            "weights": self.step,
            "linear_compute": self.row * work.rows,
            "kv_reads": self.kv_token * work.decode_kv_tokens,
            "prefill_attention": self.pair * work.prefill_pairs,
            "overhead": self.overhead,
        }

    def device_seconds(self, work: StepWork) -> float:
        return sum(self.terms(work).values())

    def host_seconds(self, work: StepWork) -> float:
        return self.host

    def decode_line(self, sequences: int) -> DecodeLine:
        works = [StepWork(sequences, 0, sequences, sequences, seen, 0, 0) for seen in (0, 1000)]
        seconds = tuple(self.device_seconds(work) + self.host for work in works)
        return DecodeLine((0.0, 1000.0), seconds)


def poisson(
    rate: float,
    count: int,
    seed: int,
    *,
    inputs: tuple[int, int] = (20, 200),
    outputs: tuple[int, int] = (2, 60),
    shared: int = 0,
) -> list[LoadRequest]:
    """Requests with gaps of an exponential law; `shared` first tokens are the same in all."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count)) - 1 / rate
    prefix = rng.integers(0, 1000, shared).tolist()
    return [
        LoadRequest(
            f"{i:05d}",
            max(0.0, float(at)),
            (*prefix, *rng.integers(0, 1000, int(rng.integers(*inputs))).tolist()),
            int(rng.integers(*outputs)),
        )
        for i, at in enumerate(arrivals)
    ]


def served(
    requests: Sequence[LoadRequest],
    cost: LinearCost,
    *,
    num_blocks: int = 4096,
    drain_limit: float = 1e4,
    **knobs: Any,
) -> tuple[LoadEvidence, EngineConfig]:
    """What the real engine records of a load whose steps cost so much."""
    config = EngineConfig(model="test", **knobs)
    done = replay(
        requests,
        config,
        cost,
        CacheShape(num_blocks, 4096),
        drain_limit=drain_limit,
        keep_steps=True,
    )
    rng = np.random.default_rng(0)
    records = [
        dataclasses.replace(r, output_token_ids=tuple(rng.integers(0, 9, r.output_tokens).tolist()))
        for r in done.records
    ]
    return LoadEvidence(records, done.steps, prompts_of(requests), True), config
