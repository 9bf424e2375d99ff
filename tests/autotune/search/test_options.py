from __future__ import annotations

import json
import math

import pytest

from autotune.errors import BadInput
from autotune.search.options import TuneOptions
from autotune.traffic_options import TrafficOptions


@pytest.mark.parametrize("rate", [None, 2.5, math.inf])
def test_options_survive_run_json(rate: float | None) -> None:
    options = TuneOptions(
        traffic=TrafficOptions(rate=rate, requests=8), trials=3, narrowing={"block_size": [16]}
    )
    written = json.loads(json.dumps(options.to_json(), allow_nan=False))
    assert TuneOptions.from_json(written) == options


@pytest.mark.parametrize("values", [{}, {"traffic": {"rate": "fast"}}, {"traffic": {"rat": 1}}])
def test_broken_options_are_bad_input(values: dict[str, object]) -> None:
    with pytest.raises(BadInput, match=r"run\.json"):
        TuneOptions.from_json(values)


def test_a_capacity_has_no_infinite_rate_to_begin_with() -> None:
    with pytest.raises(BadInput, match="--rate inf"):
        TuneOptions(objective="capacity", traffic=TrafficOptions(rate=math.inf))


@pytest.mark.parametrize("field", ["load_factor", "length_factor", "duration_s", "burstiness"])
def test_only_the_rate_may_be_infinite(field: str) -> None:
    with pytest.raises(BadInput, match="finite"):
        TrafficOptions(**{field: math.inf})  # type: ignore[arg-type]


def test_a_single_value_to_try_is_the_defaults() -> None:
    narrowing = {"max_num_seqs": [8], "block_size": [16, 32], "no_such_knob": [1]}
    options = TuneOptions(config={"block_size": 64, "max_num_seqs": 4}, narrowing=narrowing)
    # What is no knob is refused with the search space.
    assert options.default_knobs == {"block_size": 64, "max_num_seqs": 8}
