"""What one replica bore when it was measured: the number that platforms scale by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from autotune.deploy.evidence import Evidence
from autotune.plain_number import plain_number


@dataclass(frozen=True, slots=True)
class ReplicaCapacity:
    """The load that one replica bore.

    `requests_per_s` arrived and were answered; `in_flight` is how many of these were inside at once
    on average, running or waiting; `output_tokens_per_s` came out. `met` says whether the SLO held;
    if not, only answers within its limits are counted. `basis` is the sentence that says where the
    numbers are from.
    """

    requests_per_s: float
    in_flight: float
    output_tokens_per_s: float
    met: bool
    basis: str


def replica_capacity(evidence: Evidence) -> ReplicaCapacity | None:
    """The capacity of one replica by the winner's measurement; None where there is none.

    Requests in flight are those of Little's law: arrivals per second times the mean seconds that a
    request stays (J. D. C. Little, "A Proof for the Queuing Formula L = λW", 1961).
    """
    bench = evidence.bench
    rate, stay = _number(bench.get("requests_per_s")), _number((bench.get("e2e") or {}).get("mean"))
    tokens = _number(bench.get("output_tokens_per_s"))
    if rate is None or stay is None or tokens is None:
        return None
    share = _number(bench.get("slo_attainment"))
    found = _number(bench.get("capacity_requests_per_s"))
    if found is not None:
        met, requests = True, found
        bore = plain_number(found)
        basis = f"{bore} requests/s is the highest rate at which one replica met the SLO"
    elif evidence.slo_met is False:
        met, requests = False, _number(bench.get("goodput_requests_per_s")) or rate
        arrived = _number(bench.get("offered_rate")) or rate
        basis = (
            f"one replica did not meet the SLO when {plain_number(arrived)} requests/s arrived; "
            f"{plain_number(requests)} requests/s were answered within the limits"
        )
    else:
        met, requests = True, rate
        basis = (
            f"one replica bore {plain_number(rate)} requests/s and met the SLO; it may bear more"
        )
        if evidence.slo_met is None:
            basis = f"one replica answered {plain_number(rate)} requests/s"
    if share is not None:
        basis += f" ({share:.1%} of the requests within every limit)"
    in_flight = requests * stay
    counted = "requests" if met else "of these"
    basis += (
        f"; {plain_number(in_flight)} {counted} were in flight on average, "
        f"{plain_number(tokens, 4)} tokens/s came out"
    )
    if evidence.trials:
        basis += f"; trials {', '.join(map(str, evidence.trials))}"
    return ReplicaCapacity(requests, in_flight, tokens, met, basis)


def _number(value: Any) -> float | None:
    """A positive finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 < value < math.inf else None
