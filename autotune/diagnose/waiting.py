"""Why requests wait: for blocks, for a batch to end, for seats, or for more than can be served."""

from __future__ import annotations

from autotune.diagnose.cause import Cause, Evidence
from autotune.diagnose.sentences import joined, number, percent, seconds
from autotune.diagnose.thresholds import (
    BATCH_HEADROOM,
    BURSTY_CV,
    BURSTY_DISPERSION,
    CACHE_FULL,
    FEW_SEATS,
    LOSS,
    SATURATED,
)
from autotune.profiling.schema import Profile


def waiting_causes(profile: Profile, queued: float, interference: float) -> list[Cause]:
    """Divide the waiting of TTFT among its reasons.

    The queue's part is divided as the steps' time is in which requests waited: for blocks, for the
    end of a static batch, and for seats or tokens. What is left, and others' prompts in the same
    steps, come from the arrivals: more than can be served, or at once.

    Args:
        profile: the profile.
        queued: the part of TTFT before the first seat.
        interference: the part in which others were computed beside and before the own prompt.
    """
    q = profile.queueing
    blocked = blocked_share(profile)
    barrier = q.barrier_share or 0.0
    seats = q.at_seat_limit_share or 0.0
    tokens = q.at_token_budget_share or 0.0
    waited = blocked + barrier + seats + tokens
    by = {
        name: queued * part / waited if waited > 0 else 0.0
        for name, part in (("blocked", blocked), ("barrier", barrier), ("seats", seats))
    }
    causes = [_blocked(profile, by["blocked"]), _barrier(profile, by["barrier"])]
    left = queued - by["blocked"] - by["barrier"]
    room = seats_possible(profile)
    if room is not None and by["seats"] > 0:
        causes.append(_few_seats(profile, by["seats"], room))
        left -= by["seats"]
    causes.append(_arrivals(profile, max(0.0, left), interference))
    return causes


def blocked_share(profile: Profile) -> float:
    """The part of the steps' time in which requests waited for blocks.

    Where no step tells it, as of a watched server, a queue before a full cache waits for blocks.
    """
    kv = profile.kv
    if kv.blocked_share is not None:
        return kv.blocked_share
    full = (kv.occupancy_mean or 0.0) >= CACHE_FULL or (
        bool(kv.preemptions) and (kv.occupancy_peak or 0.0) >= CACHE_FULL
    )
    return 1.0 if full and profile.queueing.queue_mean else 0.0


def seats_possible(profile: Profile) -> float | None:
    """Sequences that a step could serve at little more cost, where the seats' limit is far below.

    That is as many as the cache holds, up to the rows at which arithmetic takes over from reading
    the weights: ridge * bytes a weight / 2, as a weight of b bytes is used for two operations a
    row. None where the limit of the seats is not what keeps batches small.
    """
    limit = (profile.engine_config or {}).get("max_num_seqs")
    if not isinstance(limit, int):
        return None
    possible = []
    if profile.kv.seats is not None:
        possible.append(profile.kv.seats)
    if profile.ceilings is not None and profile.model is not None:
        bytes_each = profile.model.weight_bits / 8
        possible.append(profile.ceilings.ridge * bytes_each / 2)
    else:
        # Without a measured ridge only what is small on any device is called so.
        possible.append(FEW_SEATS)
    least = min(possible)
    return least if limit <= BATCH_HEADROOM * least else None


def saturated(profile: Profile) -> bool:
    """Whether about as much arrives as can be served, or more."""
    q = profile.queueing
    if q.utilisation is not None:
        return q.utilisation >= SATURATED
    return q.stable is False


def bursty(profile: Profile) -> bool:
    """Whether arrivals come in clumps, beyond what independent users make."""
    traffic = profile.traffic
    return (traffic.arrival_cv or 0.0) >= BURSTY_CV and (
        traffic.dispersion is None or traffic.dispersion >= BURSTY_DISPERSION
    )


def _queue_evidence(profile: Profile) -> Evidence:
    q, traffic = profile.queueing, profile.traffic
    return {
        "queueing.wait_share": q.wait_share,
        "queueing.wait.p95": None if q.wait is None else q.wait.p95,
        "queueing.utilisation": q.utilisation,
        "queueing.growth_per_s": q.growth_per_s,
        "queueing.queue_mean": q.queue_mean,
        "traffic.rate": traffic.rate,
        "traffic.arrival_cv": traffic.arrival_cv,
        "traffic.dispersion": traffic.dispersion,
    }


def _arrivals(profile: Profile, queued: float, interference: float) -> Cause:
    q, traffic = profile.queueing, profile.traffic
    share = queued + interference
    evidence = _queue_evidence(profile)
    wait = None if q.wait is None else f"a request waits {seconds(q.wait.mean)} on average"
    if saturated(profile):
        return Cause(
            "queue_saturation",
            share,
            LOSS,
            joined(
                f"{percent(share)} of the time to the first token is waiting, because about as "
                "much arrives as can be served, or more",
                None
                if q.utilisation is None
                else f"{number(q.utilisation)} times what the engine sustains arrives",
                None
                if q.growth_per_s is None or q.growth_per_s <= 0 or q.stable is not False
                else f"the queue grows by {number(q.growth_per_s)} requests a second",
                wait,
            ),
            evidence,
        )
    if bursty(profile):
        return Cause(
            "queue_bursts",
            share,
            LOSS,
            joined(
                f"{percent(share)} of the time to the first token is waiting for others that came "
                "at the same moment: the engine keeps up with the mean load, and not with its "
                "bursts",
                None
                if traffic.dispersion is None
                else f"arrivals vary {number(traffic.dispersion)} times as much as those of "
                "independent users",
                wait,
            ),
            evidence,
        )
    if interference >= queued:
        return Cause(
            "prefill_interference",
            share,
            LOSS,
            joined(
                f"{percent(share)} of the time to the first token goes to what others ask for, "
                "computed before and beside a request's own prompt",
                wait,
            ),
            evidence,
        )
    # Neither too much nor in clumps: waiting that grows with the load as 1/(1 - utilisation).
    load = q.utilisation if q.utilisation is not None else q.busy_share
    return Cause(
        "queue_saturation",
        share,
        LOSS * min(1.0, load if load is not None else 1.0),
        joined(
            f"{percent(share)} of the time to the first token is waiting for steps that others "
            "have begun",
            None
            if q.busy_share is None
            else f"a step is under way {percent(q.busy_share)} of the time",
            wait,
        ),
        evidence,
    )


def _blocked(profile: Profile, share: float) -> Cause:
    kv = profile.kv
    return Cause(
        "kv_capacity",
        share,
        LOSS,
        joined(
            f"{percent(share)} of the time to the first token is waiting for room in the KV cache",
            None
            if kv.occupancy_peak is None
            else f"up to {percent(kv.occupancy_peak)} of its blocks are taken",
            None if not kv.preemptions else f"{kv.preemptions} times a request had to start again",
        ),
        {
            "kv.blocked_share": kv.blocked_share,
            "kv.occupancy_mean": kv.occupancy_mean,
            "kv.occupancy_peak": kv.occupancy_peak,
            "kv.preemptions": kv.preemptions,
            "kv.seats": kv.seats,
        },
    )


def _barrier(profile: Profile, share: float) -> Cause:
    return Cause(
        "static_batching",
        share,
        LOSS,
        f"{percent(share)} of the time to the first token is waiting for a whole batch to end "
        "although seats are free: the next requests are let in only when the last of the batch "
        "has its answer.",
        {
            "queueing.barrier_share": profile.queueing.barrier_share,
            "engine_config.batching_mode": str((profile.engine_config or {}).get("batching_mode")),
        },
    )


def _few_seats(profile: Profile, share: float, room: float) -> Cause:
    limit = (profile.engine_config or {}).get("max_num_seqs")
    return Cause(
        "low_batch",
        share,
        LOSS,
        f"{percent(share)} of the time to the first token is waiting for a seat: a step serves at "
        f"most {limit} sequences, where it could serve about {room:.0f} at little more cost.",
        {
            "queueing.at_seat_limit_share": profile.queueing.at_seat_limit_share,
            "engine_config.max_num_seqs": limit if isinstance(limit, int) else None,
            "sequences_possible": room,
        },
    )
