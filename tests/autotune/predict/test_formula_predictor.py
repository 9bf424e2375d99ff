"""Gains by the profile's shares."""

from __future__ import annotations

from typing import Any

import pytest

from autotune.predict.change import Change, Factor, Term
from autotune.predict.formula_predictor import COMPONENT_TERMS, FormulaPredictor
from autotune.predict.gain import PredictedGain
from autotune.predict.predictor import predictor_for
from autotune.profiling.schema import Breakdown, Profile, Queueing, Source, Spread, Traffic
from autotune.slo import parse_slo

TTFT = {"queue": 0.5, "prefill_linear": 0.4, "host": 0.1}
TPOT = {"weights": 0.6, "kv_reads": 0.2, "host": 0.2}
WALL = {"weights": 0.3, "kv_reads": 0.1, "prefill_linear": 0.2, "host": 0.1, "idle": 0.3}


def profile(utilisation: float | None = 0.5) -> Profile:
    spread = Spread(mean=11.0, p50=11.0, p95=11.0, p99=11.0, max=11.0)
    latency = {"mean": 0.1, "p50": 0.1, "p95": 0.2, "intervals": None}
    return Profile(
        created_at="2026-01-01T00:00:00+00:00",
        source=Source(kind="metrics", server="vllm"),
        traffic=Traffic(
            requests=9,
            completed=9,
            refused=0,
            failed=0,
            timed_out=0,
            duration_s=9.0,
            rate=1.0,
            input_tokens=spread,
            output_tokens=spread,
        ),
        metrics={"ttft": latency, "tpot": latency, "e2e": latency, "slo_statistics": {}},
        queueing=Queueing(utilisation=utilisation),
        breakdowns=[
            Breakdown(metric="ttft", seconds=0.1, parts=TTFT),
            Breakdown(metric="tpot", seconds=0.01, parts=TPOT),
            Breakdown(metric="throughput", seconds=9.0, parts=WALL),
        ],
    )


def factors(**values: float) -> Change:
    return Change({}, {name: Factor(v, v, v) for name, v in values.items()})  # type: ignore[misc]


def gains(change: Change, **options: Any) -> dict[str, PredictedGain]:
    return {g.metric: g for g in FormulaPredictor(profile(**options), None).gains(change)}


def test_a_part_that_halves_helps_by_its_share() -> None:
    found = gains(factors(weight_reads=0.5))
    assert found["tpot"].value == pytest.approx(1 / 0.7)
    # Of the wall time without idling: 0.7 before, 0.55 after.
    assert found["throughput"].value == pytest.approx(0.7 / 0.55)
    assert found["tpot"].basis == "formula"
    assert found["tpot"].low < found["tpot"].value < found["tpot"].high


def test_a_shorter_service_shortens_the_queue_more_than_in_proportion() -> None:
    faster = gains(factors(device=0.5, host=0.5))
    assert faster["throughput"].value == pytest.approx(2.0)
    # rho 0.5 -> 0.25: rho / (1 - rho) goes from 1 to 1/3, times half the service.
    assert faster["ttft"].value == pytest.approx(1 / (0.5 / 6 + 0.25))


def test_above_saturation_the_queue_goes_with_the_excess() -> None:
    found = gains(factors(rate=0.75), utilisation=2.0)
    assert found["ttft"].value == pytest.approx(1 / (0.5 + 0.5 * (1 - 1 / 1.5) / 0.5))


def test_speculation_divides_decodes_among_its_tokens() -> None:
    found = gains(factors(tokens_per_step=2.0))
    assert found["tpot"].value == pytest.approx(2.0)
    assert found["throughput"].value == pytest.approx(0.7 / 0.45)


def test_e2e_is_one_first_token_and_the_rest() -> None:
    found = gains(factors(weight_reads=0.5, rate=1.0))
    ttft, tpot = 0.1 / found["ttft"].value, 0.01 * 0.7
    assert found["e2e"].value == pytest.approx((0.1 + 10 * 0.01) / (ttft + 10 * tpot))


def test_cost_is_throughput_over_price() -> None:
    found = gains(factors(device=0.5, price=1.5))
    assert found["cost"].value == pytest.approx(found["throughput"].value / 1.5)


def test_uncertain_factors_widen_the_interval() -> None:
    sure = gains(factors(weight_reads=0.5))["tpot"]
    unsure = gains(Change({}, {"weight_reads": Factor(0.5, 0.25, 0.9)}))["tpot"]
    assert unsure.low < sure.low < sure.high < unsure.high


def test_knobs_without_known_effect_have_no_gain() -> None:
    assert gains(Change({"max_num_seqs": 4})) == {}


def test_metrics_are_divided_by_their_gains() -> None:
    predictor = FormulaPredictor(profile(), parse_slo("tpot<1s"))
    found = predictor.metrics(factors(weight_reads=0.5))
    assert found is not None
    assert found["tpot"]["p95"] == pytest.approx(0.2 * 0.7)
    slower = predictor.metrics(rate_factor=1.5)
    assert slower is not None
    assert slower["ttft"]["p95"] > 0.2
    assert predictor.metrics(rate_factor=None) is None


def test_it_stands_in_where_steps_were_not_recorded() -> None:
    assert predictor_for(profile(), None, None, seed=0, budget_s=1.0).basis == "formula"


def test_every_term_of_a_component_is_a_known_one() -> None:
    known = set(Term.__args__)  # type: ignore[attr-defined]
    assert {term for terms in COMPONENT_TERMS.values() for term in terms} <= known
