"""What the engine's time goes to, for the tokens that it yields and for what they cost."""

from __future__ import annotations

from typing import Literal

from autotune.diagnose.cause import Cause, Causes
from autotune.diagnose.drafts import draft_causes
from autotune.diagnose.parts import DECODE_PARTS, parts_of, total
from autotune.diagnose.sentences import joined, number, percent
from autotune.diagnose.thresholds import IDLE, LONG_TAIL, LOSS, WORK
from autotune.diagnose.waiting import blocked_share, saturated, seats_possible
from autotune.diagnose.work import (
    TIME_OF,
    communication_causes,
    decode_causes,
    host_cause,
    overhead_causes,
    prefill_causes,
    throttled_part,
    throttling_cause,
)
from autotune.profiling.schema import Profile

# Parts of wall time that a step takes however many sequences it serves.
_PER_STEP = ("weights", "host", "communication", "other")


def throughput_causes(profile: Profile) -> Causes:
    """Causes that keep tokens per second down."""
    return _causes(profile, "throughput")


def cost_causes(profile: Profile) -> Causes:
    """Causes that keep the price per token up: an hour costs the same, whatever it yields.

    They are those of throughput, and beside them idle time, which is paid for, and work for
    answers that come too late to count.
    """
    causes = _causes(profile, "cost")
    late = _too_late(profile)
    if late is not None:
        causes.found.append(late)
    return causes


def _causes(profile: Profile, metric: Literal["throughput", "cost"]) -> Causes:
    parts = parts_of(profile, "throughput")
    if parts is None:
        what = "where the engine's time goes" if metric == "throughput" else "what the cost buys"
        return Causes(unjudged=[what])
    slowed = throttled_part(profile)
    host, idle = parts.get("host", 0.0), parts.get("idle", 0.0)
    throttling = throttling_cause(profile, metric, slowed * (1 - host - idle))
    parts = {n: v if n in ("host", "idle") else v * (1 - slowed) for n, v in parts.items()}
    found: list[Cause] = [_idle(profile, metric, idle)]
    # What larger batches would save is taken out of what the steps read, not counted twice.
    for cause in _small_batches(profile, metric, parts):
        found.append(cause)
        _take(parts, cause.share)
    tail = _long_outputs(profile, metric, parts)
    if tail is not None:
        found.append(tail)
        _take(parts, tail.share, DECODE_PARTS)
    found += prefill_causes(profile, metric, parts)
    found += decode_causes(profile, metric, parts)
    found += draft_causes(profile, metric, parts)
    found.append(host_cause(profile, metric, parts.get("host", 0.0)))
    found += overhead_causes(profile, metric, parts.get("other", 0.0))
    found += communication_causes(profile, metric, parts.get("communication", 0.0))
    found.append(_recomputed(profile, metric, parts.get("preempted", 0.0)))
    if throttling is not None:
        found.append(throttling)
    return Causes(found)


def _take(parts: dict[str, float], share: float, names: tuple[str, ...] = _PER_STEP) -> None:
    """Take a share out of components, from each in proportion."""
    have = total(parts, names)
    if have > 0:
        left = max(0.0, 1 - share / have)
        parts.update({name: parts[name] * left for name in names if name in parts})


def _small_batches(profile: Profile, metric: str, parts: dict[str, float]) -> list[Cause]:
    """Steps that serve fewer sequences than wait, by what keeps the others out.

    If `running` sequences share a step that could serve `more`, then 1 - running/more of what a
    step takes anyway is lost, for the part of the time in which others were kept out.
    """
    q, kv = profile.queueing, profile.kv
    running, queued = q.running_mean, q.queue_mean
    if running is None or queued is None or running <= 0:
        return []
    fixed = total(parts, _PER_STEP)
    of = TIME_OF[metric]
    causes: list[Cause] = []
    limit = (profile.engine_config or {}).get("max_num_seqs")
    room = seats_possible(profile)
    if room is not None and q.at_seat_limit_share:
        share = fixed * q.at_seat_limit_share * _lost(running, min(room, running + queued))
        causes.append(
            Cause(
                "low_batch",
                share,
                LOSS,
                f"{percent(share)} of {of} would be saved if steps served those who wait: a step "
                f"serves at most {limit} sequences, where it could serve about {room:.0f} at "
                "little more cost.",
                {
                    "queueing.at_seat_limit_share": q.at_seat_limit_share,
                    "queueing.running_mean": running,
                    "queueing.queue_mean": queued,
                    "engine_config.max_num_seqs": limit if isinstance(limit, int) else None,
                    "sequences_possible": room,
                },
            )
        )
    if q.barrier_share:
        seats = float(limit) if isinstance(limit, int) else running + queued
        share = fixed * q.barrier_share * _lost(running, min(seats, running + queued))
        causes.append(
            Cause(
                "static_batching",
                share,
                LOSS,
                f"{percent(share)} of {of} goes to steps with empty seats while requests wait: a "
                "new batch begins only when the longest answer of the last one has ended.",
                {
                    "queueing.barrier_share": q.barrier_share,
                    "queueing.running_mean": running,
                    "queueing.queue_mean": queued,
                },
            )
        )
    blocked = blocked_share(profile)
    if blocked:
        share = fixed * blocked * _lost(running, running + queued)
        causes.append(
            Cause(
                "kv_capacity",
                share,
                LOSS,
                joined(
                    f"{percent(share)} of {of} would be saved if steps served those who wait for "
                    "room in the KV cache",
                    None
                    if kv.seats is None
                    else f"it holds about {number(kv.seats)} requests of this length at once",
                ),
                {
                    "kv.blocked_share": kv.blocked_share,
                    "kv.seats": kv.seats,
                    "kv.occupancy_mean": kv.occupancy_mean,
                    "queueing.running_mean": running,
                    "queueing.queue_mean": queued,
                },
            )
        )
    return causes


def _lost(running: float, possible: float) -> float:
    return max(0.0, 1 - running / possible) if possible > 0 else 0.0


def _long_outputs(profile: Profile, metric: str, parts: dict[str, float]) -> Cause | None:
    top = profile.traffic.top_output_share
    if top is None or top < LONG_TAIL:
        return None
    # Were all answers alike, a tenth of them would have a tenth of the tokens.
    share = total(parts, DECODE_PARTS) * (top - 0.1) / 0.9
    lengths = profile.traffic.output_tokens
    return Cause(
        "long_outputs",
        share,
        LOSS,
        joined(
            f"{percent(share)} of {TIME_OF[metric]} goes to a few very long answers: the longest "
            f"tenth of them has {percent(top)} of all tokens",
            None
            if lengths is None
            else f"the median answer has {number(lengths.p50)} tokens, the longest "
            f"{number(lengths.max)}",
        ),
        {
            "traffic.top_output_share": top,
            "traffic.output_tokens.p50": None if lengths is None else lengths.p50,
            "traffic.output_tokens.max": None if lengths is None else lengths.max,
        },
    )


def _idle(profile: Profile, metric: str, share: float) -> Cause:
    rate = profile.traffic.rate
    arrives = None if rate is None else f"{number(rate)} requests a second arrive"
    paid = metric == "cost"
    return Cause(
        "low_load",
        share,
        WORK if paid else IDLE,
        joined(
            f"{percent(share)} of the time the engine has nothing to do, and is paid for"
            if paid
            else f"{percent(share)} of the time the engine has nothing to do: it could serve more, "
            "so its throughput is that of the arrivals",
            arrives,
        ),
        {
            "queueing.busy_share": profile.queueing.busy_share,
            "queueing.utilisation": profile.queueing.utilisation,
            "traffic.rate": rate,
        },
    )


def _recomputed(profile: Profile, metric: str, share: float) -> Cause:
    kv = profile.kv
    return Cause(
        "kv_capacity",
        share,
        LOSS,
        joined(
            f"{percent(share)} of {TIME_OF[metric]} goes to computing again what was given up "
            "when the KV cache was full",
            None if not kv.preemptions else f"that happened {kv.preemptions} times",
        ),
        {"kv.preemptions": kv.preemptions, "kv.recomputed_share": kv.recomputed_share},
    )


def _too_late(profile: Profile) -> Cause | None:
    """Work for answers that miss the SLO, which nobody pays for; while more arrives than fits."""
    attained = (profile.metrics or {}).get("slo_attainment")
    if not isinstance(attained, int | float) or not saturated(profile):
        return None
    share = 1.0 - float(attained)
    return Cause(
        "queue_saturation",
        share,
        LOSS,
        f"{percent(share)} of the requests miss the SLO while more arrives than can be served in "
        "time, so that what is spent on them buys nothing.",
        {
            "metrics.slo_attainment": float(attained),
            "queueing.utilisation": profile.queueing.utilisation,
        },
    )
