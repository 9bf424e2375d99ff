"""Bottlenecks that are made for real: the engine runs with something slow, small or too much.

Each injection says which bottleneck must be named first, and in which metric. They are run by the
tests and by `benchmarks/diagnosis.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotune.diagnose.finding import Bottleneck, Metric
from autotune.embedded import TARGET
from autotune.hardware.detect import describe_hardware
from autotune.load.open_loop import run_load
from autotune.metrics import compute_metrics
from autotune.profiling.build import build_profile
from autotune.profiling.evidence import LoadEvidence, prompts_of
from autotune.profiling.gpu_sampler import GpuSampler
from autotune.profiling.model_facts import model_facts
from autotune.profiling.schema import Profile, Source
from autotune.search.options import DEFAULT_SLO
from autotune.slo import parse_slo
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import LoadedModel, load_model
from tests.autotune.diagnose.fake_nvml import HotGpu
from tests.autotune.diagnose.slowed import Law, SlowedExecutor
from tests.autotune.diagnose.traffic import Traffic, at_once, clumps

CREATED_AT = "2026-01-01T00:00:00+00:00"


@dataclass(frozen=True, slots=True)
class Injection:
    """One bottleneck: what is made slow (`law`), small (`knobs`) or much (`requests`).

    `metric` is where it must be named first. `blocks` leaves so many blocks of cache, of 16 tokens,
    and sequences as long as all of them; `memory_share` a machine with that share of the memory
    that the weights take.
    """

    name: str
    bottleneck: Bottleneck
    metric: Metric
    requests: Callable[[Traffic], Traffic]
    law: Law = field(default_factory=Law)
    knobs: Mapping[str, Any] = field(default_factory=dict)
    blocks: int | None = None
    memory_share: float | None = None
    hot_gpu: bool = False


def _shared_prefix(t: Traffic) -> Traffic:
    return t.add(t.steady(24, 3.0), 208, 2, prefix=t.tokens(192))


def _long_among_decodes(t: Traffic) -> Traffic:
    return t.add(at_once(22), 8, 100).add([0.1 + 0.16 * i for i in range(12)], 320, 1)


def _uneven(t: Traffic) -> Traffic:
    arrivals = t.steady(50, 2.0)
    return t.add(arrivals[::2], 8, 4).add(arrivals[1::2], 8, 40)


INJECTIONS: tuple[Injection, ...] = (
    Injection(
        "slow arithmetic",
        "prefill_compute",
        "ttft",
        lambda t: t.add(t.steady(24, 3.6), 320, 3),
        law=Law(row=150e-6),
    ),
    Injection(
        "slow weights under short prompts",
        "prefill_bandwidth",
        "ttft",
        lambda t: t.add(t.steady(24, 3.0), 8, 2),
        law=Law(weights=20e-3),
    ),
    Injection(
        "slow weights",
        "decode_weights",
        "tpot",
        lambda t: t.add(t.steady(24, 2.4), 8, 16),
        law=Law(weights=12e-3),
    ),
    Injection(
        "slow keys and values",
        "decode_kv",
        "tpot",
        lambda t: t.add(at_once(24), 100, 40),
        law=Law(kv_token=10e-6),
    ),
    Injection(
        "slow arithmetic of full batches",
        "decode_compute",
        "tpot",
        lambda t: t.add(at_once(24), 4, 50),
        law=Law(row=0.6e-3),
    ),
    Injection(
        "slow host",
        "host_bound",
        "tpot",
        lambda t: t.add(t.steady(24, 2.4), 8, 16),
        law=Law(host=10e-3),
    ),
    Injection(
        "many small operations",
        "step_overhead",
        "tpot",
        lambda t: t.add(t.steady(24, 2.4), 8, 16),
        law=Law(overhead=10e-3),
    ),
    Injection(
        "small cache",
        "kv_capacity",
        "ttft",
        lambda t: t.add(t.steady(40, 1.6), 100, 30),
        blocks=40,
    ),
    Injection(
        "cache smaller than some requests",
        "kv_capacity",
        "memory",
        lambda t: t.add(t.steady(24, 2.0), 60, 8).add(t.steady(12, 2.0), 400, 8),
        blocks=20,
    ),
    Injection(
        "more than can be served",
        "queue_saturation",
        "ttft",
        lambda t: t.add(t.steady(96, 1.2), 100, 4),
        law=Law(row=200e-6),
    ),
    Injection(
        "bursts",
        "queue_bursts",
        "ttft",
        lambda t: t.add(clumps((0.0, 0.9, 1.8, 2.7), 12), 100, 3),
        law=Law(row=100e-6),
    ),
    Injection(
        "two seats",
        "low_batch",
        "ttft",
        lambda t: t.add(t.steady(32, 1.0), 8, 14),
        knobs={"max_num_seqs": 2},
    ),
    Injection(
        "two seats, for throughput",
        "low_batch",
        "throughput",
        lambda t: t.add(at_once(24), 8, 16),
        knobs={"max_num_seqs": 2},
    ),
    Injection(
        "static batches",
        "static_batching",
        "ttft",
        _uneven,
        knobs={"batching_mode": "static", "max_num_seqs": 64},
    ),
    Injection(
        "no prefix cache",
        "poor_prefix_reuse",
        "ttft",
        _shared_prefix,
        law=Law(row=240e-6),
        knobs={"enable_prefix_caching": False},
    ),
    Injection(
        "long prompts among decodes",
        "prefill_interference",
        "tpot",
        _long_among_decodes,
        law=Law(row=400e-6),
    ),
    Injection(
        "a few long answers",
        "long_outputs",
        "throughput",
        lambda t: t.add(t.steady(45, 1.0), 8, 4).add((0.3, 0.5, 0.7), 8, 200),
    ),
    Injection(
        "a hot GPU",
        "throttling",
        "tpot",
        lambda t: t.add(t.steady(24, 1.2), 8, 16),
        hot_gpu=True,
    ),
    Injection(
        "weights beyond the memory",
        "model_does_not_fit",
        "memory",
        lambda t: t.add(t.steady(24, 1.0), 8, 4),
        memory_share=0.5,
    ),
    Injection(
        "hardly any load",
        "low_load",
        "cost",
        lambda t: t.add(t.steady(22, 2.5), 8, 3),
    ),
)

# Of two ranks; what is slow is told to the functions of `two_ranks`.
SLOW_LINKS = Injection(
    "slow links between ranks",
    "communication",
    "tpot",
    lambda t: t.add(at_once(22), 8, 24),
)
SLOW_RANK = Injection(
    "one slow rank",
    "load_imbalance",
    "tpot",
    lambda t: t.add(at_once(22), 8, 24),
)
LINK_SECONDS = 6e-3

# Nothing is wrong with this one: a third of the time in use, every limit met by far.
HEALTHY = Injection(
    "healthy",
    "low_load",
    "cost",
    lambda t: t.add(t.steady(24, 2.4), 48, 4),
)


class Harness:
    """A loaded model on which injections are run one after another.

    It must be faster than the laws: on a CPU without bf16 the embedded draft is, its target not.
    """

    def __init__(self, model: Path = TARGET, **knobs: Any) -> None:
        # One thread: two would wait for each other whenever something else runs on this machine.
        plain = EngineConfig(model=str(model), device="cpu", max_model_len=2048, num_threads=1)
        self._block_bytes = int(plain.block_size * model_facts(plain).kv_bytes_per_token)
        self.base = plain.replace(kv_cache_memory_bytes=2048 * self._block_bytes, **knobs)
        self.loaded: LoadedModel = load_model(self.base)
        self.engine: Engine = self.loaded.engine(self.base)
        run_load(self.engine, Traffic().add(at_once(4), 64, 4).requests)

    def close(self) -> None:
        """End the other ranks."""
        self.loaded.close()

    def profile(
        self, injection: Injection, around: AbstractContextManager[Any] | None = None
    ) -> Profile:
        """Run an injection and profile it; `around` is entered while the load runs."""
        engine = self.engine
        knobs = {name: getattr(self.base, name) for name in _CHANGED} | dict(injection.knobs)
        if injection.blocks is not None:
            knobs["kv_cache_memory_bytes"] = injection.blocks * self._block_bytes
            knobs["max_model_len"] = injection.blocks * self.base.block_size
        config = engine.reconfigure(**knobs)
        engine.clear_prefix_cache()
        engine.executor = SlowedExecutor(self.loaded.runner, injection.law)
        requests: list[LoadRequest] = injection.requests(Traffic(seed=1)).requests
        sampler = GpuSampler(nvml=HotGpu()) if injection.hot_gpu else None
        slo = parse_slo(DEFAULT_SLO)
        with sampler or nullcontext(), around or nullcontext():
            load = run_load(engine, requests, slo=slo, drain_limit=20.0)
        metrics = compute_metrics(
            load.records,
            slo,
            duration=load.duration,
            config=config,
            load_delivered=load.delivered,
            load_note=load.note,
            steps=load.steps,
        )
        model = model_facts(config)
        hardware = describe_hardware("cpu")
        if injection.memory_share is not None:
            hardware["memory_bytes"] = int(injection.memory_share * model.weight_bytes)
        return build_profile(
            LoadEvidence(load.records, load.steps, prompts_of(requests), True),
            config,
            source=Source(kind="run"),
            metrics=metrics,
            model=model,
            hardware=hardware,
            slo=DEFAULT_SLO,
            price=None,
            machine=injection.law.calibration(model),
            gpu=None if sampler is None else sampler.result(),
            created_at=CREATED_AT,
        )


_CHANGED = (
    "max_model_len",
    "kv_cache_memory_bytes",
    "max_num_seqs",
    "batching_mode",
    "enable_prefix_caching",
)
