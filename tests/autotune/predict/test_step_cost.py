"""The cost of a step against its formulas, computed apart on random work."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from autotune.predict.curves import Curve, Surface
from autotune.predict.step_cost import (
    TERMS,
    Coefficients,
    CostFactors,
    PrefillAttention,
    StepCost,
    StepWork,
)
from engine.block_groups import BlockGroup
from engine.config import EngineConfig
from engine.engine import CacheShape, Engine
from engine.request import SamplingParams
from engine.step_record import StepRecord
from tests.engine.fake_executor import FakeExecutor

READ, ROW = 4e-3, 5e-5
ROWS = [1, 8, 64, 80, 512, 2048]


def _affine(base: float, slope: float) -> Curve:
    return Curve.of(ROWS, [base + slope * rows for rows in ROWS])


def _cost(factors: CostFactors | None = None) -> StepCost:
    points = [(s, c, 1e-4 + 2e-7 * s * c) for s in (1, 4, 64) for c in (16, 128, 1024)]
    return StepCost(
        layers=_affine(READ, ROW),
        head=_affine(READ / 10, ROW / 10),
        decode_attention=Surface.of(points),
        prefill_attention=PrefillAttention(pair=1e-8, kv_token=1e-7, token=1e-6),
        coefficients=Coefficients(
            1.1, 0.9, 1.2, 0.8, 1e-6, 2e-6, 3e-4, 1e-7, 5e-5, 4e-6, 7e-6, 2e-4, 3e-5, 6e-5
        ),
        factors=factors or CostFactors(),
    )


def _work(rng: random.Random) -> StepWork:
    decodes, chunks = rng.randint(0, 64), rng.randint(0, 4)
    new = sum(rng.randint(1, 400) for _ in range(chunks))
    return StepWork(
        rows=decodes + new,
        prefill_sequences=chunks,
        decode_sequences=decodes,
        sampled=decodes + rng.randint(0, chunks),
        decode_kv_tokens=decodes * rng.randint(10, 900),
        prefill_kv_tokens=new * 2,
        prefill_pairs=new * 150,
    )


def test_a_step_costs_the_sum_of_its_parts() -> None:
    rng, cost = random.Random(1), _cost()
    for _ in range(50):
        work = _work(rng)
        new = work.rows - work.decode_sequences
        expected = 3e-4 + 5e-5 + 1e-6 * work.rows + 2e-6 * work.sequences + 1e-7 * work.rows
        expected += 3e-5 * work.prefill_sequences
        if work.rows:
            expected += 1.1 * (READ + ROW * work.rows)
        if work.sampled:
            expected += 0.9 * (READ / 10 + ROW / 10 * work.sampled)
        if work.decode_sequences:
            expected += 1.2 * (1e-4 + 2e-7 * work.decode_kv_tokens)
        if work.prefill_sequences:
            chunk = 1e-8 * work.prefill_pairs + 1e-7 * work.prefill_kv_tokens + 1e-6 * new
            expected += 0.8 * chunk
        assert cost.device_seconds(work) == pytest.approx(expected, rel=1e-9)
        host = 4e-6 * work.rows + 7e-6 * work.sequences + 2e-4 + 6e-5 * work.prefill_sequences
        assert cost.host_seconds(work) == pytest.approx(host, rel=1e-12)


@pytest.mark.parametrize(
    "factors",
    [
        CostFactors(),
        CostFactors(weight_reads=0.5, linear_compute=0.7, kv_reads=0.3),
        CostFactors(attention_compute=2.0, communication=0.0, device=0.5, step_overhead=0.2),
    ],
)
def test_the_terms_sum_to_the_devices_time(factors: CostFactors) -> None:
    rng, cost = random.Random(2), _cost(factors)
    for _ in range(50):
        work = _work(rng)
        terms = cost.terms(work)
        assert tuple(terms) == TERMS
        assert all(seconds >= 0 for seconds in terms.values())
        assert sum(terms.values()) == pytest.approx(cost.device_seconds(work), rel=1e-9)


def test_few_rows_wait_for_the_weights_and_many_for_arithmetic() -> None:
    terms = _cost().terms(StepWork(1, 0, 1, 1, 100, 0, 0))
    assert terms["weights"] > 50 * terms["linear_compute"]
    terms = _cost().terms(StepWork(2048, 1, 0, 1, 0, 2048, 2048 * 1024))
    assert terms["linear_compute"] > 50 * terms["weights"]
    assert terms["kv_reads"] == 0


def test_only_attention_that_grows_with_the_context_is_reading_it() -> None:
    cost, shorter = _cost(), _cost(CostFactors(kv_reads=0.25))
    for sequences, context in ((1, 20), (3, 500), (64, 1000), (80, 4000)):
        work = StepWork(sequences, 0, sequences, sequences, sequences * context, 0, 0)
        reading = 1.2 * 2e-7 * sequences * context
        terms = cost.terms(work)
        assert terms["kv_reads"] == pytest.approx(reading, rel=1e-6)
        of_steps = 3e-4 + 1e-6 * sequences + 2e-6 * sequences
        assert terms["overhead"] == pytest.approx(1.2e-4 + of_steps, rel=1e-6)
        saved = cost.device_seconds(work) - shorter.device_seconds(work)
        assert saved == pytest.approx(0.75 * reading, rel=1e-6)


def test_attention_measured_at_one_context_is_all_reading_and_never_below_zero() -> None:
    assert Surface.of([(2, 100, 1e-3)]).split(2, 400) == (0.0, pytest.approx(2e-3))
    falling = Surface.of([(1, 10, 2.0), (1, 20, 1.0)])
    assert falling.split(1, 15) == (1.5, 0.0)


def test_a_saving_counts_only_where_its_resource_is_what_is_waited_for() -> None:
    decode = StepWork(1, 0, 1, 0, 0, 0, 0)
    prompt = StepWork(2048, 1, 0, 0, 0, 0, 0)
    half_reads = _cost(CostFactors(weight_reads=0.5))
    layers = 1.1 * (READ + ROW)
    saved = _cost().device_seconds(decode) - half_reads.device_seconds(decode)
    assert saved == pytest.approx(layers / 2, rel=0.01)
    before, after = _cost().device_seconds(prompt), half_reads.device_seconds(prompt)
    assert after == pytest.approx(before, rel=0.01)


def test_what_is_hidden_behind_reading_costs_when_reading_is_halved() -> None:
    # At the ridge both take equally long: halving one of them leaves the other.
    curve = Curve.of([1, 100, 10000], [1.0, 1.0, 100.0])
    assert curve.arithmetic == pytest.approx(0.01)
    joined = (0.5**3 + 1) ** (1 / 3) / 2 ** (1 / 3)
    assert curve.scaled(100, 0.5, 1.0) == pytest.approx(joined)
    assert curve.scaled(100, 1.0, 1.0) == 1.0


def test_a_curve_is_straight_between_its_points_and_goes_on_beyond_them() -> None:
    curve = Curve.of([100, 1, 10], [11.0, 2.0, 2.0])
    assert [curve.at(rows) for rows in (0, 1, 5, 10, 55, 100, 200)] == pytest.approx(
        [0.0, 2.0, 2.0, 2.0, 6.5, 11.0, 21.0]
    )
    with pytest.raises(ValueError, match="rows above 0"):
        Curve.of([0, 1], [1.0, 1.0])


def test_a_surface_tells_sequences_and_contexts_between_its_points() -> None:
    surface = Surface.of([(n, c, 1.0 + 2 * n + 0.5 * n * c) for n in (1, 2, 8) for c in (10, 90)])
    for n, context in ((1, 10), (2, 50), (5, 33), (8, 90), (16, 40), (4, 200)):
        expected = 1.0 + 2 * n + 0.5 * n * context
        assert surface.at(n, n * context) == pytest.approx(expected), (n, context)
    assert surface.at(0, 0) == 0.0


def test_counts_with_one_context_are_left_out_where_others_tell_more() -> None:
    surface = Surface.of([(1, 10, 1.0), (1, 20, 2.0), (2, 10, 50.0)])
    assert surface.sequences == (1.0,)
    assert surface.at(2, 40) == pytest.approx(4.0)


def test_verifying_drafts_computes_more_rows_and_reads_the_same_context() -> None:
    work = StepWork(10, 1, 4, 5, 400, 6, 21)
    verified = work.verifying(3.0)
    assert (verified.rows, verified.sampled) == (18, 13)
    assert verified.decode_kv_tokens == 400


@pytest.mark.parametrize("windows", [(0,), (0, 16)])
def test_a_batch_has_the_work_that_its_record_tells(windows: tuple[int, ...]) -> None:
    groups = tuple(BlockGroup(window, (layer,)) for layer, window in enumerate(windows))
    config = EngineConfig(max_num_batched_tokens=24, max_num_seqs=4, block_size=8)
    executor = FakeExecutor(64, 8, windows=windows)
    records: list[StepRecord] = []
    works: list[StepWork] = []
    run = executor.execute

    def execute(batch):  # type: ignore[no-untyped-def]
        works.append(StepWork.of_batch(batch, groups))
        return run(batch)

    executor.execute = execute  # type: ignore[method-assign]
    engine = Engine(config, executor, CacheShape(64, 100, groups), on_step=records.append)
    rng = random.Random(3)
    for number in range(6):
        prompt = [rng.randrange(40) for _ in range(rng.randint(3, 60))]
        engine.add(str(number), prompt, SamplingParams(max_tokens=5, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    assert len(works) == len(records) > 10
    assert works == [StepWork.of(record) for record in records]
    assert any(work.prefill_pairs for work in works)
    assert any(work.decode_kv_tokens for work in works)


def test_a_whole_prompt_has_the_pairs_of_a_triangle() -> None:
    work = StepWork.of_prompt(100, cached=60)
    assert work.prefill_pairs == sum(range(61, 101))
    assert (work.rows, work.sampled, work.prefill_kv_tokens) == (40, 1, 100)
    assert math.isclose(StepWork.of_prompt(7).prefill_pairs, 28)


def test_drafted_tokens_pay_their_rows_and_their_pairs() -> None:
    cost = dataclasses.replace(_cost(), coefficients=Coefficients())
    plain, verified = StepWork.of_decodes(4, 2000), StepWork.of_decodes(4, 2000, 12)
    more = cost.layers.at(16) - cost.layers.at(4) + cost.head.at(16) - cost.head.at(4)
    more += cost.prefill_attention.pair * 12 * 500
    assert cost.prefill_attention.pair > 0
    taken = cost.device_seconds(verified) - cost.device_seconds(plain)
    assert taken == pytest.approx(more)
    assert sum(cost.terms(verified).values()) == pytest.approx(cost.device_seconds(verified))
    assert verified.prompt_tokens == 0
