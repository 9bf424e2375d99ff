from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from autotune.external.table import load_table
from autotune.external_search.choose import Chooser
from autotune.external_search.space import FlagConfig, default_config, load_flag_space, point_key
from autotune.records import TrialRecord
from autotune.search.forecast import OBJECTIVE
from autotune.search.objective import Objective
from autotune.slo import parse_slo

VLLM = load_table("vllm")
SPACE = load_flag_space(VLLM, "cpu", {})
BASE = default_config(VLLM, "cpu", {}, list(SPACE.values))
SLO = parse_slo("ttft<1s")
OBJECTIVE_OF = Objective("throughput")


def simulated(config: FlagConfig) -> Mapping[str, float]:
    """Best with 32 sequences; what it does not know of changes nothing."""
    seqs = config.values["max_num_seqs"]
    assert isinstance(seqs, int)
    return {OBJECTIVE: 100.0 * math.exp(-0.1 * abs(math.log2(seqs / 32))), "limit ttft<1s": 0.2}


def truth(values: Mapping[str, Any]) -> float:
    """As simulated, a fifth slower, and a half faster without compilation."""
    eager = 1.5 if values["enforce_eager"] else 1.0
    return 0.8 * eager * simulated(FlagConfig(values))[OBJECTIVE]


def record(number: int, point: Mapping[str, Any]) -> TrialRecord:
    values = SPACE.config_of(point, BASE).to_dict()
    crashed = values["block_size"] == 32
    metrics = {"output_tokens_per_s": truth(values), "slo_statistics": {}, "ttft": {}}
    return TrialRecord(
        number=number,
        kind="search",
        source="",
        config=values,
        outcome="crash" if crashed else "ok",
        seconds=1.0,
        started_at="",
        metrics=None if crashed else metrics | {"slo_statistics": {"p95(ttft)": 0.1}},
        objective=None if crashed else truth(values),
    )


def search(count: int) -> list[TrialRecord]:
    chooser = Chooser(SPACE, BASE, SLO, OBJECTIVE_OF, 3, simulated, ["max_num_seqs"])
    start = SPACE.point_in({}, BASE)
    assert start is not None
    records = [record(0, start)]
    seen = {point_key(start)}
    while len(records) < count:
        choice = chooser.choose(records, lambda p: point_key(p) in seen)
        assert choice is not None
        assert choice.forecast is not None
        seen.add(point_key(choice.point))
        records.append(record(len(records), choice.point))
    return records


def test_what_is_simulated_comes_first_and_the_rest_is_learned() -> None:
    records = search(12)
    # Few trials of a space of hundreds of thousands: the simulated optimum at once, nearly.
    early = [r.config["max_num_seqs"] for r in records[1:4]]
    assert any(seqs in (16, 32, 64) for seqs in early)
    best = max((r.objective or 0.0, r.number) for r in records)[1]
    assert records[best].config["enforce_eager"] is True
    assert records[best].config["max_num_seqs"] in (16, 32, 64)


def test_the_same_trials_are_followed_by_the_same_choice() -> None:
    assert [r.config for r in search(6)] == [r.config for r in search(6)]


def test_without_simulation_trials_alone_tell() -> None:
    chooser = Chooser(SPACE, BASE, SLO, OBJECTIVE_OF, 3, lambda _: None)
    start = SPACE.point_in({}, BASE)
    assert start is not None
    choice = chooser.choose([record(0, start)], lambda p: p == start)
    assert choice is not None
    assert choice.forecast is None


def test_forecasts_learn_what_the_simulation_is_off_by() -> None:
    records = search(8)
    chooser = Chooser(SPACE, BASE, SLO, OBJECTIVE_OF, 3, simulated, ["max_num_seqs"])
    start = SPACE.point_in({}, BASE)
    assert start is not None
    point = {**start, "max_num_seqs": 64, "watermark": 0.02}
    forecast = chooser.forecast(records, point)
    assert forecast is not None
    assert forecast.objective is not None
    assert forecast.objective.low < truth(SPACE.config_of(point, BASE).to_dict())
    assert forecast.objective.low <= forecast.objective.value <= forecast.objective.high


def test_what_a_simulation_takes_for_the_same_is_not_measured_twice() -> None:
    played = ["max_num_seqs", "watermark"]
    chooser = Chooser(SPACE, BASE, SLO, OBJECTIVE_OF, 3, simulated, played)
    start = SPACE.point_in({}, BASE)
    assert start is not None
    records = [record(0, start)]
    for number in range(1, 6):
        choice = chooser.choose(records, lambda p: False)
        assert choice is not None
        # Of the watermark the simulation sees nothing.
        for known in records:
            others = {n for n in start if choice.point[n] != known.config[n]}
            assert others != {"watermark"}
        records.append(record(number, choice.point))
