"""Operations and bytes of the phases, by hand and counted token by token."""

from __future__ import annotations

import pytest

from autotune.profiling.phases import experts_touched, phases, step_work
from autotune.profiling.schema import Ceilings
from autotune.profiling.step_columns import StepColumns
from tests.autotune.profiling.loads import MODEL, LinearCost, poisson, served, step

CEILINGS = Ceilings(
    bandwidth=1e4,
    working_set_bandwidth=2e4,
    matmul={"bfloat16": 1e6, "int8": 4e6},
    compute_dtype="bfloat16",
    ridge=50.0,
)


def test_a_decode_step_reads_all_weights_and_its_context() -> None:
    # Four decodes with 10 + 20 + 30 + 40 cached tokens.
    columns = StepColumns.of([step(decode_sequences=4, kv_tokens_read=100, sampled_sequences=4)])
    work = step_work(columns, MODEL)
    assert work.flops[0] == 2 * 600 * 4 + 2 * 200 * 4 + 4 * 24 * 100
    assert work.weight_bytes[0] == 1600
    assert work.kv_bytes[0] == 3200


def test_a_drafted_token_is_computed_sampled_and_sees_its_context() -> None:
    # Two decodes that see 50 tokens each; three drafted tokens between them.
    columns = StepColumns.of(
        [step(decode_sequences=2, kv_tokens_read=100, sampled_sequences=2, drafted_tokens=3)]
    )
    work = step_work(columns, MODEL)
    assert columns.rows.tolist() == [5]
    assert work.flops[0] == 2 * 600 * 5 + 2 * 200 * 5 + 4 * 24 * 50 * 5
    # Weights and cache are read once for all of them.
    assert (work.weight_bytes[0], work.kv_bytes[0]) == (1600, 3200)


def test_a_prompt_chunk_computes_half_a_square_and_no_head_before_its_end() -> None:
    # 8 tokens after 4 cached ones, not the last of the prompt: token p sees p + 1 keys.
    pairs = sum(range(5, 13))
    columns = StepColumns.of(
        [
            step(
                prefill_tokens=8,
                prefill_sequences=1,
                kv_tokens_read=12,
                prefill_kv_tokens_read=12,
                prefill_pairs=pairs,
            )
        ]
    )
    work = step_work(columns, MODEL)
    assert work.flops[0] == 2 * 600 * 8 + 4 * 24 * pairs
    assert work.weight_bytes[0] == 1200  # without the head
    assert work.kv_bytes[0] == 12 * 32


def test_counts_of_a_real_schedule_are_those_of_every_token_by_itself() -> None:
    """Each computed token is a row that sees its position's keys, in whatever step it falls."""
    requests = poisson(200, 60, seed=3)
    evidence, _ = served(
        requests,
        LinearCost(),
        max_num_batched_tokens=128,
        max_num_seqs=32,
        enable_prefix_caching=False,
    )
    work = step_work(StepColumns.of(evidence.steps), MODEL)
    rows = pairs = sampled = 0
    for record in evidence.requests:
        # The token generated last is never computed.
        total = record.input_tokens + record.output_tokens - 1
        rows += total
        pairs += total * (total + 1) // 2
        sampled += record.output_tokens
    assert work.flops.sum() == pytest.approx(
        2 * 600 * rows + 2 * 200 * sampled + 4 * 24 * pairs, rel=1e-12
    )


def test_experts_that_a_batch_touches_follow_the_chance_of_missing_each() -> None:
    model = MODEL.model_copy(update={"num_experts": 4, "experts_per_token": 1, "expert_bytes": 800})
    columns = StepColumns.of(
        [step(decode_sequences=n, sampled_sequences=n, kv_tokens_read=n) for n in (1, 2, 1000)]
    )
    assert experts_touched(columns.rows, model).tolist() == pytest.approx([0.25, 7 / 16, 1.0])
    read = step_work(columns, model).weight_bytes
    assert read.tolist() == pytest.approx([800 + 200, 800 + 350, 1600])


def test_utilisation_is_time_at_the_ceilings_over_device_time() -> None:
    records = [
        step(i, 0.5, 0.1, decode_sequences=4, kv_tokens_read=100, sampled_sequences=4)
        for i in range(20)
    ]
    (decode,), partial = phases(StepColumns.of(records), MODEL, CEILINGS)
    flops = 2 * 600 * 4 + 2 * 200 * 4 + 4 * 24 * 100
    assert not partial
    assert decode.name == "decode"
    assert decode.mfu == pytest.approx(flops / (0.5 * 1e6))
    assert decode.mbu == pytest.approx((1600 / 2e4 + 3200 / 1e4) / 0.5)
    assert decode.intensity == pytest.approx(flops / 4800)
    assert decode.bound == "bandwidth"
    assert decode.seconds == pytest.approx(12.0)
    assert decode.host_seconds == pytest.approx(2.0)
    assert decode.share == pytest.approx(1.0)
    # Fewer keys and values than weights stay as near as these.
    short = [
        step(i, 0.5, 0.1, decode_sequences=4, kv_tokens_read=40, sampled_sequences=4)
        for i in range(20)
    ]
    (nearer,), _ = phases(StepColumns.of(short), MODEL, CEILINGS)
    assert nearer.mbu == pytest.approx((1600 + 1280) / 2e4 / 0.5)
    # Two GPUs could have done twice as much in that time.
    (shared,), _ = phases(StepColumns.of(records), MODEL, CEILINGS, devices=2)
    assert shared.mbu is not None
    assert decode.mbu is not None
    assert shared.mbu == pytest.approx(decode.mbu / 2)


def test_a_phase_far_from_both_ceilings_is_bound_by_overhead() -> None:
    records = [
        step(i * 100, 100.0, decode_sequences=1, kv_tokens_read=1, sampled_sequences=1)
        for i in range(20)
    ]
    (decode,), _ = phases(StepColumns.of(records), MODEL, CEILINGS)
    assert decode.bound == "overhead"


def test_a_phase_of_few_steps_says_so_and_has_no_arithmetic() -> None:
    records = [step(i, decode_sequences=1, sampled_sequences=1) for i in range(19)]
    (decode,), partial = phases(StepColumns.of(records), MODEL, CEILINGS)
    assert decode.steps == 19
    assert decode.flops is decode.mfu is decode.mbu is decode.bound is None
    assert partial == ["the arithmetic of the decode phase needs at least 20 steps; has 19"]


def test_steps_of_an_earlier_release_have_no_arithmetic() -> None:
    records = [step(i, decode_sequences=3, kv_tokens_read=30) for i in range(30)]
    (decode,), partial = phases(StepColumns.of(records), MODEL, CEILINGS)
    assert decode.flops is None
    assert any("earlier release" in sentence for sentence in partial)


def test_kinds_of_steps_part_the_time_among_them() -> None:
    evidence, _ = served(poisson(100, 80, seed=1), LinearCost())
    found, _ = phases(StepColumns.of(evidence.steps), MODEL, None)
    assert sum(phase.share for phase in found) == pytest.approx(1.0)
    assert sum(phase.steps for phase in found) == len(evidence.steps)
    assert sum(phase.sampled for phase in found) == sum(r.output_tokens for r in evidence.requests)
    assert all(phase.mfu is None for phase in found)
