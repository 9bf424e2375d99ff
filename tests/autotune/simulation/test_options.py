"""Questions that contradict themselves are refused before anything is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotune.errors import BadInput
from autotune.simulation.fleet import Fleet
from autotune.simulation.options import SimulateOptions
from autotune.traffic_options import TrafficOptions


def options(**more: Any) -> SimulateOptions:
    return SimulateOptions(**{"knobs": {}, "traffic": TrafficOptions(), "slo": "ttft<1s", **more})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"router": "x"}, "unknown router 'x'"),
        ({"replicas": 0}, "number of replicas must be between 1 and"),
        ({"replicas": 2, "disaggregate": (1, 1)}, "--replicas and --disaggregate contradict"),
        ({"recalibrate": True, "calibration": Path("x")}, "--calibration and --recalibrate"),
        ({"recalibrate": True, "gpu": "h100"}, "--recalibrate and --gpu contradict"),
        ({"calibration": Path("x"), "gpu": "h100"}, "--calibration and --gpu contradict"),
        ({"acceptance": (0.5, 1.5)}, "a chance lies between 0 and 1"),
        ({"draft_s": 1.0}, "goes with --speculative-acceptance"),
        (
            {"acceptance": (0.5,), "knobs": {"speculative_method": "none"}},
            "--speculative-method none contradict each other",
        ),
        ({"disaggregate": (1, 1), "transfer_bytes_per_s": 0.0}, "bandwidth must be above 0"),
    ],
)
def test_contradictions(more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        options(**more)


def test_chances_alone_ask_for_as_many_drafts_in_every_step() -> None:
    assert options().drafts is None
    assert options(seed=3).served_knobs == {}
    alone = options(acceptance=(0.9, 0.5), draft_s=0.001, knobs={"max_num_seqs": 4})
    assert alone.served_knobs == {
        "max_num_seqs": 4,
        "speculative_method": "ngram",
        "num_speculative_tokens": 2,
        "speculative_adaptive": False,
    }
    assert alone.drafts is not None
    assert alone.drafts.tokens_per_step(8) == pytest.approx(1 + 0.9 + 0.45)
    assert alone.drafts.cost.seconds(3, 2) == 0.001
    more = options(acceptance=(0.9,), knobs={"speculative_method": "suffix"})
    assert more.served_knobs == {"speculative_method": "suffix"}
    fewer = options(acceptance=(0.9, 0.5), knobs={"num_speculative_tokens": 1})
    assert fewer.served_knobs["num_speculative_tokens"] == 1


def test_the_fleet_that_is_asked_for() -> None:
    assert options().fleet(1.0) == Fleet()
    assert options(replicas=3, router="prefix-aware").fleet(1.0) == Fleet(3, "prefix_aware")
    split = options(disaggregate=(2, 1)).fleet(1e4).disaggregation
    assert split is not None
    assert (split.prefill_replicas, split.decode_replicas) == (2, 1)
    assert split.link_seconds(25) == pytest.approx(1e-5)  # 25 tokens of 10 kB over 25 GB/s
