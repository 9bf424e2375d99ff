"""Knobs that cannot matter under a profile's traffic, each with the reason.

A search need not spend trials on them. The rules are cautious: a knob is named only where none of
the values that a search would try could have changed what was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autotune.profiling.schema import Profile
from autotune.search.space import load_space

# Fewer requests prove nothing about the traffic.
MIN_REQUESTS = 20
# Shares of a metric's time, of prompt tokens: what is below cannot be told from noise.
NEGLIGIBLE = 0.01
# A cache that was never fuller than this has room for what another configuration keeps in it.
ROOMY = 0.7

_Values = Mapping[str, tuple[Any, ...]]


def irrelevant_knobs(profile: Profile, *, load_fixed: bool = True) -> dict[str, str]:
    """Knobs that cannot matter, with one sentence each on why.

    Args:
        profile: of the default configuration under the traffic that will be offered.
        load_fixed: false where the search offers other loads than the profile's, as one for the
            highest rate does; queues and the cache then say nothing of what is to come.
    """
    if profile.traffic.completed < MIN_REQUESTS or profile.source.kind == "metrics":
        return {}
    device = str((profile.hardware or {}).get("device") or "cpu")
    values = load_space(device, {}).values
    found = {}
    for knob, (needs_load, rule) in _RULES.items():
        if knob in values and (load_fixed or not needs_load):
            reason = rule(profile, values)
            if reason is not None:
                found[knob] = reason
    return found


def _prefix_caching(profile: Profile, values: _Values) -> str | None:
    del values
    attainable = profile.kv.attainable_hit_rate
    if attainable is None or attainable >= NEGLIGIBLE:
        return None
    return f"only {attainable:.1%} of the prompt tokens repeat an earlier prefix"


def _long_prefill(profile: Profile, values: _Values) -> str | None:
    lengths = profile.traffic.input_tokens
    least = min(v for v in values["long_prefill_token_threshold"] if v > 0)
    if lengths is None or lengths.max > least:
        return None
    return f"no prompt is longer than {lengths.max:.0f} tokens"


def _seats(profile: Profile, values: _Values) -> str | None:
    most = _most_at_once(profile)
    if most is None or most > min(values["max_num_seqs"]):
        return None
    return f"never more than {most} requests were there at once"


def _token_budget(profile: Profile, values: _Values) -> str | None:
    most, lengths = _most_at_once(profile), profile.traffic.input_tokens
    if most is None or lengths is None:
        return None
    if most * lengths.max > min(values["max_num_batched_tokens"]):
        return None
    return f"all requests that were there at once had {most * lengths.max:.0f} tokens at most"


def _policy(profile: Profile, values: _Values) -> str | None:
    del values
    longest = profile.queueing.queue_max
    return None if longest is None or longest > 1 else "never did two requests wait at once"


def _watermark(profile: Profile, values: _Values) -> str | None:
    del values
    return _roomy(profile)


def _cache_dtype(profile: Profile, values: _Values) -> str | None:
    del values
    return _roomy(profile) if _light_attention(profile) else None


def _block_size(profile: Profile, values: _Values) -> str | None:
    attainable = profile.kv.attainable_hit_rate
    if attainable is None or attainable >= NEGLIGIBLE:
        return None
    return _cache_dtype(profile, values)


def _memory_share(profile: Profile, values: _Values) -> str | None:
    del values
    kv = profile.kv
    if (kv.attainable_hit_rate or 0.0) - (kv.hit_rate or 0.0) >= NEGLIGIBLE:
        return None
    return _roomy(profile)


def _graphs(profile: Profile, values: _Values) -> str | None:
    del values
    on = (profile.engine_config or {}).get("cuda_graphs")
    return _roomy(profile) if on else None


def _roomy(profile: Profile) -> str | None:
    """Why the cache's size cannot matter; None if it may."""
    kv = profile.kv
    if kv.occupancy_peak is None or kv.occupancy_peak > ROOMY:
        return None
    if kv.preemptions or kv.refused_for_size:
        return None
    return f"the KV cache was never more than {kv.occupancy_peak:.0%} full"


def _light_attention(profile: Profile) -> bool:
    """Whether attention takes a negligible part of every metric's time."""
    known = [
        profile.breakdown(metric)
        for metric in ("ttft", "tpot", "throughput")
        if profile.breakdown(metric) is not None
    ]
    return bool(known) and all(
        breakdown is not None
        and breakdown.parts.get("kv_reads", 0.0) + breakdown.parts.get("prefill_attention", 0.0)
        < NEGLIGIBLE
        for breakdown in known
    )


def _most_at_once(profile: Profile) -> int | None:
    running, queue = profile.queueing.running_max, profile.queueing.queue_max
    return None if running is None or queue is None else running + queue


# By knob: whether the reason holds only at the profile's own load, and the reason.
_RULES: Mapping[str, tuple[bool, Callable[[Profile, _Values], str | None]]] = {
    "enable_prefix_caching": (False, _prefix_caching),
    "long_prefill_token_threshold": (False, _long_prefill),
    "max_num_seqs": (True, _seats),
    "max_num_batched_tokens": (True, _token_budget),
    "scheduling_policy": (True, _policy),
    "watermark": (True, _watermark),
    "kv_cache_dtype": (True, _cache_dtype),
    "block_size": (True, _block_size),
    "gpu_memory_utilization": (True, _memory_share),
    "cuda_graphs": (True, _graphs),
}
