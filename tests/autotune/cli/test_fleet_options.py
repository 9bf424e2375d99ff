"""Links, times and chances as they are typed."""

from __future__ import annotations

import pytest

from autotune.cli.fleet_options import parse_bandwidth, parse_chances, parse_short_time
from autotune.errors import BadInput


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("25GB/s", 25e9),
        ("25 GB/s", 25e9),
        ("200Gbit/s", 25e9),
        ("200Gbps", 25e9),
        ("1GiB/s", 2**30),
        ("64kB/s", 64e3),
        (".5TB/s", 5e11),
        ("100B/s", 100.0),
    ],
)
def test_bandwidths(text: str, bytes_per_s: float) -> None:
    assert parse_bandwidth(text, "--link") == pytest.approx(bytes_per_s)


@pytest.mark.parametrize(
    "text", ["25", "25GB", "fast", "-1GB/s", "", "1iB/s", "25 G B/s", "1e3B/s"]
)
def test_no_bandwidths(text: str) -> None:
    with pytest.raises(BadInput, match=r"--link .* is not a bandwidth"):
        parse_bandwidth(text, "--link")


def test_a_link_that_carries_nothing_is_none() -> None:
    with pytest.raises(BadInput, match="must be above 0"):
        parse_bandwidth("0GB/s", "--link")


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0.0), ("500us", 5e-4), ("2ms", 2e-3), ("0.1s", 0.1), ("0ms", 0.0)]
)
def test_short_times(text: str, seconds: float) -> None:
    assert parse_short_time(text, "--latency") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["1", "ms", "-1ms", "1m", "1 hour", ""])
def test_no_short_times(text: str) -> None:
    with pytest.raises(BadInput, match=r"--latency .* is not a time"):
        parse_short_time(text, "--latency")


def test_chances() -> None:
    assert parse_chances("0.8, 0.6,0", "--accept") == (0.8, 0.6, 0.0)
    for text in ("", "0.8,", "1.1", "-0.1", "x", "nan"):
        with pytest.raises(BadInput, match=r"--accept .* is not a chance between 0 and 1"):
            parse_chances(text, "--accept")
