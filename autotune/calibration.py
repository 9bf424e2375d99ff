"""How fast a configuration works requests off when all are there at once.

The offered rate of a measurement is a share of it where no rate is given.
"""

from __future__ import annotations

from collections.abc import Sequence

from autotune.records import RequestRecord
from autotune.traffic_options import DEFAULT_LOAD_FACTOR, TrafficOptions

# Requests that the calibration offers at once, and the longest that it takes, in seconds.
CALIBRATION_REQUESTS = 256
CALIBRATION_LIMIT_S = 20.0


def sustained_rate(records: Sequence[RequestRecord], duration: float) -> float:
    """Requests per second that were worked off in `duration` seconds.

    A request that was cut off counts by the share of its output that was there: leaving out what
    a full batch was in the middle of would make a short calibration find far too low a rate.
    """
    if duration <= 0:
        return 0.0
    worked_off = sum(
        1.0 if r.completed else min(1.0, r.output_tokens / max(1, r.asked_output_tokens))
        for r in records
    )
    return worked_off / duration


def offered_rate(
    traffic: TrafficOptions, sustained: float, by: str = "the default configuration"
) -> tuple[float, str]:
    """The rate to offer, in requests per second, and a note that says where it comes from."""
    factor = traffic.load_factor or DEFAULT_LOAD_FACTOR
    rate = factor * sustained
    return rate, (
        f"offered rate {rate:.3g} requests/s: {factor:g} times the {sustained:.3g} that "
        f"{by} sustained with all requests offered at once"
    )
