"""Whether the weights and the KV cache have the room that they need."""

from __future__ import annotations

from autotune.diagnose.cause import Cause, Causes
from autotune.diagnose.sentences import joined, number, percent, size
from autotune.diagnose.thresholds import CACHE_FULL, LOSS, MIN_SHARE, TRAIT
from autotune.diagnose.waiting import blocked_share
from autotune.profiling.schema import Profile


def memory_causes(profile: Profile) -> Causes:
    """Causes of want of memory: a model that does not fit, a cache that is too small."""
    found = [cause for cause in (_weights(profile), _cache(profile)) if cause is not None]
    unjudged: list[str] = []
    if profile.kv.occupancy_peak is None and not found:
        unjudged.append("whether the KV cache is large enough")
    return Causes(found, unjudged)


def _weights(profile: Profile) -> Cause | None:
    memory = (profile.hardware or {}).get("memory_bytes")
    if profile.model is None or not isinstance(memory, int | float) or memory <= 0:
        return None
    need = profile.model.resident_bytes
    ranks = (profile.engine_config or {}).get("tensor_parallel_size") or 1
    # Ranks on a processor share its memory; each on a GPU has its own.
    if (profile.hardware or {}).get("device") == "cuda":
        memory = memory * ranks
    if need < memory:
        return None
    return Cause(
        "model_does_not_fit",
        1.0,
        LOSS,
        f"The model's weights take {size(need)} and the device has {size(memory)}: they do not "
        "fit, before any room for keys and values.",
        {
            "model.resident_bytes": need,
            "model.weight_bits": profile.model.weight_bits,
            "hardware.memory_bytes": memory,
        },
    )


def _cache(profile: Profile) -> Cause | None:
    kv, asked = profile.kv, profile.traffic.requests
    peak = kv.occupancy_peak or 0.0
    refused = (kv.refused_for_size or 0) / asked if asked else 0.0
    blocked, preempted = blocked_share(profile), kv.preempted_share or 0.0
    if kv.preempted_share is None and kv.preemptions and asked:
        preempted = min(1.0, kv.preemptions / asked)  # each of another request, at most
    # A full cache is well used as long as nobody waits for it.
    pressed = max(blocked, preempted, refused) >= MIN_SHARE or bool(kv.refused_for_size)
    if not pressed and peak < CACHE_FULL:
        return None
    share = min(1.0, max(peak, blocked, preempted, refused))
    return Cause(
        "kv_capacity",
        share,
        LOSS if pressed else TRAIT,
        joined(
            f"Up to {percent(peak)} of the KV cache is taken"
            if kv.occupancy_peak is not None
            else "The KV cache is too small for this traffic",
            None
            if kv.seats is None
            else f"it holds about {number(kv.seats)} requests of this length at once",
            f"requests wait for room in {percent(blocked)} of the steps' time"
            if kv.blocked_share
            else None,
            f"{kv.preemptions} times a request had to give its blocks up and start again"
            if kv.preemptions
            else None,
            f"{kv.refused_for_size} were refused as too long for the whole of it"
            if kv.refused_for_size
            else None,
        ),
        {
            "kv.occupancy_peak": kv.occupancy_peak,
            "kv.blocked_share": kv.blocked_share,
            "kv.preemptions": kv.preemptions,
            "kv.preempted_share": kv.preempted_share,
            "kv.refused_for_size": kv.refused_for_size,
            "kv.fragmentation": kv.fragmentation,
            "kv.total_bytes": kv.total_bytes,
            "kv.seats": kv.seats,
        },
    )
