"""Fits to steps whose true cost is known, with the noise and the disturbances of a machine."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from autotune.predict.apply import NotPredictable, apply_change
from autotune.predict.change import Change, Factor
from autotune.predict.fit import (
    fit_step_cost,
    linear_probe,
    probed_cost,
    step_cost,
)
from autotune.predict.fit_lines import LEAST_FACTOR
from autotune.predict.step_cost import Coefficients, StepCost, StepWork
from autotune.profiling.machine import MachineCalibration, stand_in
from autotune.profiling.model_facts import model_facts
from autotune.profiling.schema import AttentionProbe, Ceilings, LinearProbe, Probes
from engine.config import EngineConfig
from engine.step_record import StepRecord

ROWS = [1, 8, 64, 512, 2048]
CONFIG = EngineConfig()
MODEL = model_facts(CONFIG)


def _linear(method: str, read: float, row: float) -> LinearProbe:
    layers = [max(read, row * rows) for rows in ROWS]
    head = [max(read / 8, row / 8 * rows) for rows in ROWS]
    return LinearProbe(method=method, rows=ROWS, layers_s=layers, head_s=head)


def _attention(dtype: str, token: float) -> AttentionProbe:
    points = [(s, c) for s in (1, 8, 64) for c in (16, 256, 2048)]
    chunks = [(16, 16), (64, 64), (256, 256), (16, 256), (256, 2048)]
    return AttentionProbe(
        kv_cache_dtype=dtype,
        sequences=[s for s, _ in points],
        contexts=[c for _, c in points],
        seconds=[2e-5 + token * s * c for s, c in points],
        chunk_tokens=[new for new, _ in chunks],
        chunk_contexts=[context for _, context in chunks],
        chunk_seconds=[
            token / 10 * (n * c - n * (n - 1) / 2) + 2 * token * c + 1e-7 * n for n, c in chunks
        ],
    )


PROBES = Probes(
    linears=[_linear("none", 5e-4, 1e-5), _linear("int8", 3e-4, 7e-6)],
    attention=[_attention("auto", 1e-7), _attention("int8", 6e-8)],
)
CEILINGS = Ceilings(
    bandwidth=4e10,
    working_set_bandwidth=6e10,
    matmul={"bfloat16": 2e12},
    compute_dtype="bfloat16",
    ridge=2e12 / 6e10,
)
MACHINE = MachineCalibration(CEILINGS, PROBES)
TRUTH = Coefficients(
    linear=1.1,
    head=0.95,
    decode_attention=1.15,
    prefill_attention=1.05,
    row=2e-6,
    sequence=8e-6,
    base=4e-4,
    host_row=5e-7,
    host_sequence=6e-6,
    host_base=1.2e-4,
)


def _true_cost(method: str = "none", cache: str = "auto") -> StepCost:
    return dataclasses.replace(probed_cost(PROBES, method, cache), coefficients=TRUTH)


def _steps(
    count: int,
    seed: int,
    *,
    noise: float = 0.0,
    disturbed: float = 0.0,
    prompts: bool = True,
    truth: Coefficients = TRUTH,
) -> list[StepRecord]:
    """Steps of a varied load; `disturbed` of them take up to ten times as long."""
    rng = random.Random(seed)
    cost = dataclasses.replace(_true_cost(), coefficients=truth)
    steps = []
    for number in range(count):
        decodes = rng.randint(1, 40)
        new = rng.choice([0, 0, 16, 100, 300]) if prompts else 0
        context = rng.randint(20, 600)
        kv = decodes * context
        work = StepWork(
            rows=decodes + new,
            prefill_sequences=int(new > 0),
            decode_sequences=decodes,
            sampled=decodes + int(new > 0),
            decode_kv_tokens=kv,
            prefill_kv_tokens=new,
            prefill_pairs=new * (new + 1) // 2,
        )
        slower = rng.lognormvariate(0, noise)
        if rng.random() < disturbed:
            slower *= rng.uniform(1.5, 10)
        steps.append(
            StepRecord(
                start=float(number),
                prefill_tokens=new,
                prefill_sequences=work.prefill_sequences,
                decode_sequences=decodes,
                kv_tokens_read=kv + new,
                device_seconds=cost.device_seconds(work) * slower,
                host_seconds=cost.host_seconds(work) * rng.lognormvariate(0, noise),
                scheduler_seconds=0.0,
                queue_length=0,
                running=decodes,
                blocks_used=0,
                blocks_cached=0,
                blocks_total=100,
                preemptions=0,
                prefix_hit_tokens=0,
                drafted_tokens=0,
                accepted_tokens=0,
                prefill_kv_tokens_read=new,
                prefill_pairs=work.prefill_pairs,
                sampled_sequences=work.sampled,
            )
        )
    return steps


def _error(cost: StepCost, seed: int = 99) -> float:
    """Median relative error over other steps of the true cost."""
    truth = _true_cost()
    works = [StepWork.of(step) for step in _steps(200, seed)]
    return float(
        np.median([abs(cost.device_seconds(w) / truth.device_seconds(w) - 1) for w in works])
    )


def test_the_probes_chunks_give_the_cost_of_prompts_back() -> None:
    cost = probed_cost(PROBES, "none", "auto").prefill_attention
    assert cost.pair == pytest.approx(1e-8, rel=1e-6)
    assert cost.kv_token == pytest.approx(2e-7, rel=1e-6)
    assert cost.token == pytest.approx(1e-7, rel=1e-6)


def test_noisy_steps_are_told_within_their_noise() -> None:
    cost, fit = fit_step_cost(_steps(600, 1, noise=0.05), MODEL, CONFIG, MACHINE)
    assert fit.steps == 600
    # The median of |N(0, 0.05)| is 0.034; the fit adds little.
    assert 0.025 < fit.median_error < 0.045
    assert fit.p90_error == pytest.approx(0.082, rel=0.3)
    assert _error(cost) < 0.02


def test_hosts_time_is_fitted_beside() -> None:
    cost, _ = fit_step_cost(_steps(600, 2, noise=0.05), MODEL, CONFIG, MACHINE)
    truth = _true_cost()
    for work in (StepWork.of(step) for step in _steps(20, 3)):
        assert cost.host_seconds(work) == pytest.approx(truth.host_seconds(work), rel=0.05)


def test_steps_that_were_disturbed_do_not_count() -> None:
    steps = _steps(600, 4, noise=0.05, disturbed=0.25)
    cost, _ = fit_step_cost(steps, MODEL, CONFIG, MACHINE)
    assert _error(cost) < 0.06


def test_layers_whose_probe_was_disturbed_are_not_taken_for_nothing() -> None:
    # Something else ran while they were probed: in the steps they take a twentieth.
    truth = dataclasses.replace(TRUTH, linear=0.05)
    steps = _steps(600, 12, noise=0.05, truth=truth)
    found = fit_step_cost(steps, MODEL, CONFIG, MACHINE)[0].coefficients
    factors = (found.linear, found.head, found.decode_attention, found.prefill_attention)
    assert min(factors) == found.linear == LEAST_FACTOR


def test_few_steps_of_one_kind_are_filled_up_by_the_probes() -> None:
    # Eight decodes alone say nothing of prompts and of what the head takes.
    steps = _steps(8, 5, noise=0.02, prompts=False)
    cost, _ = fit_step_cost(steps, MODEL, CONFIG, MACHINE)
    found = cost.coefficients
    assert 0.7 < found.linear < 1.4
    assert found.prefill_attention == pytest.approx(1.0, abs=0.01)
    assert _error(cost) < 0.25


def test_fewer_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 8 steps; has 7"):
        fit_step_cost(_steps(7, 6), MODEL, CONFIG, MACHINE)


def test_long_loads_are_fitted_to_a_part_of_their_steps() -> None:
    steps = _steps(50, 7, noise=0.05) * 200
    _, fit = fit_step_cost(steps, MODEL, CONFIG, MACHINE)
    assert fit.steps == 4000


def test_time_in_collectives_is_told_apart() -> None:
    steps = [
        dataclasses.replace(
            step,
            device_seconds=step.device_seconds + 1e-4 + 3e-6 * work.rows,
            communication_seconds=1e-4 + 3e-6 * work.rows,
        )
        for step in _steps(300, 8, noise=0.02)
        for work in [StepWork.of(step)]
    ]
    cost, _ = fit_step_cost(steps, MODEL, CONFIG, MACHINE)
    work = StepWork(200, 1, 20, 21, 4000, 180, 16290)
    terms = cost.terms(work)
    assert terms["communication"] == pytest.approx(1e-4 + 6e-4, rel=0.05)
    assert sum(terms.values()) == pytest.approx(_true_cost().device_seconds(work) + 7e-4, rel=0.05)


def test_a_profile_keeps_all_that_the_cost_needs() -> None:
    cost, fit = fit_step_cost(_steps(100, 9, noise=0.05), MODEL, CONFIG, MACHINE)
    again = step_cost(type(fit).model_validate_json(fit.model_dump_json()), PROBES, CONFIG)
    assert again == cost


def test_another_method_and_cache_exchange_what_the_probes_measured() -> None:
    cost, _ = fit_step_cost(_steps(600, 10, noise=0.03), MODEL, CONFIG, MACHINE)
    change = Change(knobs={"quantization": "int8", "kv_cache_dtype": "int8"})
    changed = apply_change(cost, change, MODEL, CONFIG, PROBES)
    truth = _true_cost("int8", "int8")
    base = _true_cost()
    for step in _steps(30, 11):
        work = StepWork.of(step)
        predicted = changed.device_seconds(work) / cost.device_seconds(work)
        actual = truth.device_seconds(work) / base.device_seconds(work)
        assert actual < 0.95
        assert predicted == pytest.approx(actual, rel=0.06)


def test_calibrated_methods_are_told_by_those_whose_kernels_they_share() -> None:
    assert [stand_in(name) for name in ("smoothquant", "gptq", "awq", "nf4")] == [
        *("int8", "int4", "int4", "nf4")
    ]
    assert linear_probe(PROBES, "smoothquant") is linear_probe(PROBES, "int8")
    assert linear_probe(PROBES, "gptq") is None
    change = Change(knobs={"quantization": "smoothquant"})
    same = Change(knobs={"quantization": "int8"})
    cost = _true_cost()
    assert apply_change(cost, change, MODEL, CONFIG, PROBES) == apply_change(
        cost, same, MODEL, CONFIG, PROBES
    )


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"quantization": "nf4"}, "quantization=nf4"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"num_threads": 1}, "num_threads"),
    ],
)
def test_what_was_not_measured_is_not_predicted(knobs: dict[str, object], named: str) -> None:
    with pytest.raises(NotPredictable, match=named):
        apply_change(_true_cost(), Change(knobs=knobs), MODEL, CONFIG, PROBES)


def test_knobs_of_the_scheduler_change_no_steps_cost() -> None:
    cost = _true_cost()
    change = Change(
        knobs={"max_num_seqs": 7, "quantization": "none", "enable_prefix_caching": False}
    )
    assert apply_change(cost, change, MODEL, CONFIG, PROBES) == cost


def test_factors_scale_their_terms_and_replace_what_a_knob_does() -> None:
    cost = _true_cost()
    work = StepWork(30, 0, 30, 30, 15000, 0, 0)
    third = Factor(1 / 3, 0.3, 0.4)
    changed = apply_change(
        cost,
        Change(knobs={"kv_cache_dtype": "int8"}, factors={"kv_reads": third, "rate": third}),
        MODEL,
        CONFIG,
        PROBES,
    )
    before, after = cost.terms(work), changed.terms(work)
    assert after["kv_reads"] == pytest.approx(before["kv_reads"] / 3)
    assert {k: v for k, v in after.items() if k != "kv_reads"} == {
        k: v for k, v in before.items() if k != "kv_reads"
    }
