"""What a fleet may be."""

from __future__ import annotations

import math

import pytest

from autotune.errors import BadInput
from autotune.simulation.fleet import (
    Disaggregation,
    Fleet,
    check_router,
    parse_disaggregation,
)


@pytest.mark.parametrize("name", ["prefix_aware", "prefix-aware", " Prefix-Aware "])
def test_routers_are_found_by_either_spelling(name: str) -> None:
    assert check_router(name) == "prefix_aware"


def test_an_unknown_router_is_told_its_nearest() -> None:
    with pytest.raises(BadInput, match="unknown router 'least-load': did you mean least_loaded"):
        check_router("least-load")
    with pytest.raises(BadInput, match="there are round_robin, least_loaded, prefix_aware"):
        check_router("xyz")


def test_disaggregation_is_two_numbers() -> None:
    assert parse_disaggregation("2:1") == (2, 1)
    for text in ("2", "2:", ":1", "0:1", "1:0", "a:b", "1:2:3", "-1:2", "1.5:1", "²:1"):
        with pytest.raises(BadInput, match=r"--disaggregate .* write for instance 2:1"):
            parse_disaggregation(text)


@pytest.mark.parametrize("replicas", [0, -1, 10**6])
def test_replicas_have_a_range(replicas: int) -> None:
    with pytest.raises(BadInput, match="number of replicas must be between 1 and"):
        Fleet(replicas)


def test_a_transfer_needs_a_link() -> None:
    for bandwidth in (0.0, -1.0, math.nan):
        with pytest.raises(BadInput, match="bandwidth must be above 0"):
            Disaggregation(1, 1, bandwidth, 0.0, 1.0)
    with pytest.raises(BadInput, match="latency must be at least 0"):
        Disaggregation(1, 1, 1.0, -1.0, 1.0)
    with pytest.raises(BadInput, match="prefill replicas"):
        Disaggregation(0, 1, 1.0, 0.0, 1.0)


def test_replicas_and_disaggregation_contradict_each_other() -> None:
    split = Disaggregation(2, 1, 1e9, 0.0, 1.0)
    assert Fleet(1, "least_loaded", split).engines == 3
    with pytest.raises(BadInput, match="leave the number of replicas out"):
        Fleet(2, "least_loaded", split)
