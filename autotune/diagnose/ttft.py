"""What the time to the first token is made of."""

from __future__ import annotations

from autotune.diagnose.cause import Cause, Causes
from autotune.diagnose.parts import parts_of, total
from autotune.diagnose.sentences import percent
from autotune.diagnose.thresholds import LOSS
from autotune.diagnose.waiting import waiting_causes
from autotune.diagnose.work import (
    communication_causes,
    host_cause,
    overhead_causes,
    prefill_causes,
    throttled_part,
    throttling_cause,
)
from autotune.profiling.schema import Profile


def ttft_causes(profile: Profile) -> Causes:
    """Causes of TTFT: waiting and why, the prompt's own work, and what stands around it."""
    parts = parts_of(profile, "ttft")
    refused = _refused(profile)
    if parts is None:
        return Causes([refused] if refused else [], ["where the time to the first token goes"])
    slowed = throttled_part(profile)
    # Waiting is for the device as well, so that slower clocks lengthen all but the host's part.
    host = parts.get("host", 0.0)
    throttling = throttling_cause(profile, "ttft", slowed * (1 - host))
    parts = {n: v if n == "host" else v * (1 - slowed) for n, v in parts.items()}
    # Others' decodes in the steps with the prompt delay it as others' prompts do.
    others = total(parts, ("interference", "linear_compute", "kv_reads"))
    found = waiting_causes(profile, parts.get("queue", 0.0), others)
    found += prefill_causes(profile, "ttft", parts)
    found.append(host_cause(profile, "ttft", host))
    found += overhead_causes(profile, "ttft", parts.get("other", 0.0))
    found += communication_causes(profile, "ttft", parts.get("communication", 0.0))
    found.append(_preempted(profile, parts.get("preempted", 0.0)))
    found += [cause for cause in (refused, throttling) if cause]
    return Causes(found)


def _preempted(profile: Profile, share: float) -> Cause:
    return Cause(
        "kv_capacity",
        share,
        LOSS,
        f"{percent(share)} of the time to the first token is lost to requests that had to give "
        "their blocks up and start again.",
        {"kv.preemptions": profile.kv.preemptions, "kv.recomputed_share": _recomputed(profile)},
    )


def _refused(profile: Profile) -> Cause | None:
    refused, asked = profile.kv.refused_for_size, profile.traffic.requests
    if not refused or not asked:
        return None
    share = min(1.0, refused / asked)
    return Cause(
        "kv_capacity",
        share,
        LOSS,
        f"{refused} of {asked} requests never got a first token: they need more room than the "
        "whole KV cache has.",
        {"kv.refused_for_size": refused, "kv.blocks_total": profile.kv.blocks_total},
    )


def _recomputed(profile: Profile) -> float | None:
    return profile.kv.recomputed_share
