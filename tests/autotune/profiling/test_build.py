"""Whole profiles of loads on the real engine in virtual time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from autotune.profiling.build import build_profile
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.file import read_profile, write_profile
from autotune.profiling.machine import MachineCalibration
from autotune.profiling.schema import (
    AttentionProbe,
    Ceilings,
    Gpu,
    LinearProbe,
    Probes,
    Profile,
    Source,
)
from engine.config import EngineConfig
from tests.autotune.profiling.loads import MODEL, LinearCost, poisson, request, served, step

CEILINGS = Ceilings(
    bandwidth=1e7,
    working_set_bandwidth=2e7,
    matmul={"bfloat16": 1e9},
    compute_dtype="bfloat16",
    ridge=50.0,
)
ROWS = [1, 8, 64, 512, 4096]
COST = LinearCost()
SEQUENCES = [1, 1, 64, 64]
CONTEXTS = [16, 512, 16, 512]
# A machine on which linear layers cost what `COST` says of them.
MACHINE = MachineCalibration(
    CEILINGS,
    Probes(
        linears=[
            LinearProbe(
                method="none",
                rows=ROWS,
                layers_s=[COST.step + COST.row * rows for rows in ROWS],
                head_s=[1e-9 * rows for rows in ROWS],
            )
        ],
        attention=[
            AttentionProbe(
                kv_cache_dtype="auto",
                sequences=SEQUENCES,
                contexts=CONTEXTS,
                seconds=[COST.kv_token * n * c for n, c in zip(SEQUENCES, CONTEXTS, strict=True)],
            )
        ],
    ),
)


def profile(evidence: LoadEvidence, config: EngineConfig, **more: Any) -> Profile:
    return build_profile(
        evidence,
        config,
        source=Source(kind="run"),
        metrics=None,
        model=MODEL,
        created_at="2026-01-01T00:00:00+00:00",
        **more,
    )


def test_a_profile_says_everything_and_survives_the_disk(tmp_path: Path) -> None:
    evidence, config = served(poisson(100, 200, seed=1, shared=32), COST)
    found = profile(evidence, config, machine=MACHINE, slo="ttft<1s", price=2.5, notes=["a note"])
    assert found.partial == []
    assert found.notes == ["a note"]
    assert (found.slo, found.price) == ("ttft<1s", 2.5)
    assert {phase.name for phase in found.phases} == {"prefill", "decode", "mixed"}
    assert all(phase.mfu is not None for phase in found.phases if phase.steps >= 20)
    assert {b.metric for b in found.breakdowns} == {"ttft", "tpot", "throughput"}
    assert found.step_fit is not None
    assert found.host is not None
    assert found.imbalance is not None
    assert found.speculation is not None
    assert found.kv.attainable_hit_rate is not None
    assert found.queueing.utilisation is not None
    assert found.communication is None
    assert found.series
    path = tmp_path / "profile.json"
    write_profile(path, found)
    assert read_profile(path) == found


def test_the_fitted_cost_puts_time_where_it_belongs() -> None:
    evidence, config = served(poisson(100, 200, seed=1), COST)
    found = profile(evidence, config, machine=MACHINE).breakdown("throughput")
    assert found is not None
    seconds = {name: share * found.seconds for name, share in found.parts.items()}
    steps = evidence.steps
    rows = sum(s.prefill_tokens + s.decode_sequences for s in steps)
    linear = COST.step * len(steps) + COST.row * rows
    assert seconds["host"] == pytest.approx(COST.host * len(steps))
    assert seconds["weights"] + seconds["prefill_linear"] + seconds[
        "linear_compute"
    ] == pytest.approx(linear, rel=0.1)
    # Most steps are decodes of few rows, whose time is that of reading.
    assert seconds["weights"] > 0.5 * linear


def test_without_a_calibrated_machine_shares_of_ceilings_are_unknown() -> None:
    evidence, config = served(poisson(100, 100, seed=1), COST)
    found = profile(evidence, config)
    assert any("was not calibrated" in sentence for sentence in found.partial)
    decode = found.phase("decode")
    assert decode is not None
    assert decode.flops
    assert decode.mfu is decode.mbu is decode.bound is None
    assert found.step_fit is found.probes is found.ceilings is None
    tpot = found.breakdown("tpot")
    assert tpot is not None
    assert tpot.parts["weights"] == 0.0
    assert tpot.parts["other"] > 0.3


def test_the_same_records_make_the_same_profile() -> None:
    evidence, config = served(poisson(50, 60, seed=1), COST)
    first = profile(evidence, config, machine=MACHINE)
    assert first == profile(evidence, config, machine=MACHINE)


def test_a_load_without_steps_or_requests_still_has_a_profile() -> None:
    config = EngineConfig(model="test")
    nothing = profile(LoadEvidence([], []), config)
    assert nothing.traffic.requests == 0
    assert any("no step was recorded" in sentence for sentence in nothing.partial)
    refused = [
        request(str(i), token_times=(), outcome="refused", reason="x", intended_send=float(i))
        for i in range(30)
    ]
    found = profile(LoadEvidence(refused, []), config)
    assert found.traffic.refused == 30
    idle = profile(LoadEvidence([], [step(decode_sequences=1)]), config)
    assert idle.phases[0].steps == 1


def test_too_few_steps_for_a_cost_are_said_and_explained_by_their_counts() -> None:
    evidence, config = served(poisson(50, 2, seed=1, outputs=(3, 4)), COST)
    found = profile(evidence, config, machine=MACHINE)
    assert found.step_fit is None
    assert any("needs at least" in s and "steps" in s for s in found.partial)
    assert found.breakdown("throughput") is not None


def test_records_of_an_earlier_release_give_what_they_can() -> None:
    evidence, config = served(poisson(100, 60, seed=1), COST)
    old = LoadEvidence(
        [
            dataclasses.replace(r, first_scheduled=None, output_token_ids=())
            for r in evidence.requests
        ],
        [
            dataclasses.replace(
                s, prefill_kv_tokens_read=0, prefill_pairs=0, sampled_sequences=0, used_tokens=0
            )
            for s in evidence.steps
        ],
    )
    found = profile(old, config, machine=MACHINE)
    assert found.breakdown("ttft") is None
    assert found.breakdown("tpot") is not None
    assert all(p.flops is None for p in found.phases)
    assert found.kv.fragmentation is None
    assert found.speculation is None
    assert len([s for s in found.partial if "earlier release" in s]) == 3


def test_a_gpu_that_was_not_sampled_is_told_and_a_processor_lacks_none() -> None:
    evidence, config = served(poisson(100, 60, seed=1), COST)
    gpu = {"hardware": {"device": "cuda"}}
    lack = "power, clocks and memory of the GPU were not sampled"
    assert lack in profile(evidence, config, machine=MACHINE, **gpu).partial
    told = profile(evidence, config, machine=MACHINE, gpu_problem="no NVML", **gpu).partial
    assert f"{lack}: no NVML" in told
    sampled = Gpu(samples=[], interval_s=0.1)
    assert not profile(evidence, config, machine=MACHINE, gpu=sampled, **gpu).partial
    assert not profile(evidence, config, machine=MACHINE, hardware={"device": "cpu"}).partial


def test_ranks_on_gpus_add_their_ceilings() -> None:
    evidence, config = served(poisson(100, 100, seed=1), COST)
    two = config.replace(tensor_parallel_size=2)
    alone = profile(evidence, two, machine=MACHINE, hardware={"device": "cpu"})
    spread = profile(evidence, two, machine=MACHINE, hardware={"device": "cuda"})
    before, after = alone.phase("decode"), spread.phase("decode")
    assert before is not None
    assert after is not None
    assert before.mbu is not None
    assert after.mbu == pytest.approx(before.mbu / 2)
    assert spread.communication is not None
    assert spread.communication.ranks == 2
