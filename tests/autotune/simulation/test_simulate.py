"""Bounds and chances from many plays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import BadInput
from autotune.metrics import compute_metrics
from autotune.predict.replay import replay
from autotune.simulation.fleet import Disaggregation, Fleet
from autotune.simulation.interval import Interval
from autotune.simulation.simulate import DoesNotFit, Simulated, simulate
from autotune.slo import parse_slo
from tests.autotune.simulation.fake_model import FakeCost, FakeModel, config, load

SLO = parse_slo("ttft<200ms,p50(tpot)<20ms")


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def of(simulated: Simulated, metric: str, statistic: str) -> Interval:
    interval = simulated.metrics[metric][statistic]
    assert isinstance(interval, Interval)
    return interval


def test_values_are_those_of_the_likeliest_cost() -> None:
    requests = load(60, 20.0, seed=1)
    model, knobs = FakeModel(), config(max_num_seqs=8)
    simulated = simulate(model, knobs, requests, slo=SLO)
    cache = model.cache(knobs)
    assert cache is not None
    played = replay(requests, knobs, model.cost, cache, drain_limit=30.0)
    expected = compute_metrics(
        played.records,
        SLO,
        duration=played.duration,
        config=knobs,
        load_delivered=True,
        load_note=None,
        resamples=0,
    )
    for metric in ("ttft", "tpot", "itl", "e2e"):
        for statistic in ("mean", "p50", "p90", "p95", "p99"):
            interval = of(simulated, metric, statistic)
            assert interval.value == expected[metric][statistic]
            assert interval.low < interval.value < interval.high
    assert simulated.metrics["completed"] == Interval(60.0, 60.0, 60.0)
    assert simulated.metrics["load_delivered"] is True
    assert simulated.metrics["config"] == knobs.to_dict()


def test_bounds_are_those_of_the_cost() -> None:
    """A token a step, alone: what a step takes is what is uncertain."""
    requests = load(5, 0.01, seed=2, output=(20, 20))
    simulated = simulate(FakeModel(spread=0.2), config(), requests, slo=SLO, draws=400)
    tpot = of(simulated, "tpot", "mean")
    assert tpot.value == pytest.approx(0.01)
    assert tpot.low == pytest.approx(0.01 * 0.82, rel=0.01)
    assert tpot.high == pytest.approx(0.01 * 1.18, rel=0.01)


def test_the_chance_is_the_share_of_the_draws() -> None:
    requests = load(5, 0.01, seed=3, output=(20, 20))

    def chance(slo: str) -> Simulated:
        return simulate(FakeModel(), config(), requests, slo=parse_slo(slo), draws=200)

    assert chance("tpot<11ms").p_meets_slo == pytest.approx(0.75, abs=0.08)
    assert chance("tpot<20ms").p_meets_slo == 1.0
    never = chance("tpot<20ms,ttft<1ms")
    assert never.p_meets_slo == 0.0
    assert not never.slo_met
    assert [limit.p_met for limit in never.limits] == [1.0, 0.0]
    expected = never.limits[1].expected
    assert expected is not None
    assert expected.value == pytest.approx(0.01)
    assert 0.007 < expected.low < expected.value < expected.high < 0.013


def test_traffic_has_chances_too() -> None:
    """With a cost that is certain, bounds tell what other arrivals would make of it."""
    certain = FakeModel(FakeCost(0.02), spread=0.0)
    seen: list[int] = []

    def traffic(number: int) -> Any:
        seen.append(number)
        return load(80, 30.0, seed=number)

    knobs = config(max_num_seqs=4)
    same = simulate(certain, knobs, load(80, 30.0, seed=0), slo=SLO)
    varied = simulate(certain, knobs, traffic, slo=SLO)
    assert seen == list(range(21))
    ttft = of(same, "ttft", "p99")
    assert ttft.low == ttft.high
    ttft = of(varied, "ttft", "p99")
    assert ttft.low < ttft.value < ttft.high


def test_what_never_finishes_is_infinitely_late() -> None:
    requests = load(20, 100.0, seed=4, output=(400, 400))
    simulated = simulate(FakeModel(), config(max_num_seqs=1), requests, slo=SLO, drain_limit=5.0)
    assert simulated.p_meets_slo == 0.0
    document = simulated.to_json()
    json.dumps(document, allow_nan=False)
    assert document["slo_statistics"]["p95(ttft)"] is None
    assert document["timed_out"]["value"] > 10


def test_nothing_finishes_at_all() -> None:
    requests = load(5, 100.0, seed=5, output=(400, 400))
    simulated = simulate(FakeModel(), config(), requests, slo=SLO, drain_limit=0.1)
    assert simulated.metrics["ttft"]["p95"] is None
    assert simulated.limits[0].expected is None
    json.dumps(simulated.to_json(), allow_nan=False)


def test_answers_of_one_token_meet_limits_on_gaps() -> None:
    """In some draws of the traffic nobody has a second token: then there is no gap to be long."""

    def traffic(number: int) -> Any:
        length = 1 if number % 3 == 2 else 10
        return load(5, 1.0, seed=number, output=(length, length))

    simulated = simulate(FakeModel(), config(), traffic, slo=parse_slo("tpot<20ms"), draws=9)
    assert simulated.p_meets_slo == 1.0
    expected = simulated.limits[0].expected
    assert expected is not None
    assert expected.high < 0.013
    never = simulate(
        FakeModel(), config(), load(5, 1.0, seed=1, output=(1, 1)), slo=parse_slo("tpot<20ms")
    )
    assert never.limits[0].expected is None
    assert never.p_meets_slo == 1.0


def test_quality_is_not_simulated() -> None:
    requests = load(5, 10.0, seed=6)
    slo = parse_slo("ttft<10s,quality_loss<1%")
    simulated = simulate(FakeModel(), config(), requests, slo=slo, draws=3)
    assert simulated.p_meets_slo == 1.0
    assert simulated.notes == ["not simulated, and left out: quality_loss<1%"]
    only = simulate(FakeModel(), config(), requests, slo=parse_slo("quality_loss<1%"), draws=3)
    assert only.p_meets_slo is None


@pytest.mark.parametrize("draws", [0, -1, 10**7])
def test_draws_have_a_range(draws: int) -> None:
    with pytest.raises(BadInput, match="number of draws must be between 1 and"):
        simulate(FakeModel(), config(), load(5, 1.0, seed=7), slo=SLO, draws=draws)


def test_one_draw_is_enough() -> None:
    simulated = simulate(FakeModel(), config(), load(5, 1.0, seed=7), slo=SLO, draws=1)
    assert simulated.p_meets_slo in (0.0, 1.0)


def test_bad_loads_and_caches_are_refused() -> None:
    with pytest.raises(BadInput, match="no requests"):
        simulate(FakeModel(), config(), [], slo=SLO)
    with pytest.raises(DoesNotFit, match="does not hold the longest sequence"):
        simulate(FakeModel(blocks=None), config(), load(5, 1.0, seed=8), slo=SLO)


def test_it_can_be_stopped() -> None:
    class Stop(Exception):
        pass

    def stop(number: int, total: int) -> None:
        assert total == 21
        if number == 3:
            raise Stop

    with pytest.raises(Stop):
        simulate(FakeModel(), config(), load(5, 1.0, seed=9), slo=SLO, before_play=stop)


def document(seed: int = 5) -> str:
    """A simulation of all that is random, as text."""
    split = Disaggregation(2, 1, 1e8, 0.001, 1e3)
    texts = []
    for fleet in (Fleet(3, "prefix_aware"), Fleet(1, "least_loaded", split)):
        simulated = simulate(
            FakeModel(FakeCost(0.004, row=1e-4, seen=1e-7)),
            config(max_num_seqs=8),
            load(60, 50.0, seed=3, prefixes=4),
            slo=SLO,
            fleet=fleet,
            seed=seed,
            draws=4,
        )
        texts.append(json.dumps(simulated.to_json()))
    return "\n".join(texts)


def test_the_same_seed_gives_the_same_bytes_in_any_process() -> None:
    assert document(5) != document(6)
    code = "from tests.autotune.simulation.test_simulate import document; print(document())"
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).resolve().parents[3],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == document()


def test_every_number_has_bounds() -> None:
    simulated = simulate(FakeModel(), config(), load(40, 20.0, seed=10), slo=SLO)
    told = {k: v for k, v in simulated.metrics.items() if k not in ("config", "load_note")}
    for path, value in leaves(told):
        if path != "load_delivered":
            assert value is None or isinstance(value, Interval), path
            assert value is None or value.low <= value.value <= value.high, path
