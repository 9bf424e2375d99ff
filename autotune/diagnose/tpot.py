"""What the time between tokens is made of."""

from __future__ import annotations

from autotune.diagnose.cause import Cause, Causes
from autotune.diagnose.drafts import draft_causes
from autotune.diagnose.parts import parts_of
from autotune.diagnose.sentences import joined, percent, seconds
from autotune.diagnose.thresholds import LOSS
from autotune.diagnose.work import (
    communication_causes,
    decode_causes,
    host_cause,
    overhead_causes,
    throttled_part,
    throttling_cause,
)
from autotune.profiling.schema import Profile


def tpot_causes(profile: Profile) -> Causes:
    """Causes of TPOT: a decode step's reads and arithmetic, and what comes between such steps."""
    parts = parts_of(profile, "tpot")
    if parts is None:
        return Causes(unjudged=["where the time between tokens goes"])
    slowed = throttled_part(profile)
    launches = _launches(profile, parts)
    host = parts.get("host", 0.0) + launches
    parts["other"] = parts.get("other", 0.0) - launches
    throttling = throttling_cause(profile, "tpot", slowed * (1 - host))
    parts = {n: v if n == "host" else v * (1 - slowed) for n, v in parts.items()}
    found = decode_causes(profile, "tpot", parts)
    found.append(_interference(profile, parts.get("interference", 0.0)))
    found += draft_causes(profile, "tpot", parts)
    found.append(host_cause(profile, "tpot", host))
    found += overhead_causes(profile, "tpot", parts["other"])
    found += communication_causes(profile, "tpot", parts.get("communication", 0.0))
    found.append(_preempted(profile, parts.get("preempted", 0.0)))
    if throttling is not None:
        found.append(throttling)
    return Causes(found)


def _launches(profile: Profile, parts: dict[str, float]) -> float:
    """Unexplained time of decodes that neither reads nor computes: a GPU that waits for launches.

    With CUDA graphs the host launches a step at once, so that it is something else.
    """
    config = profile.engine_config or {}
    decode = profile.phase("decode")
    if config.get("cuda_graphs") is not False or decode is None or decode.bound != "overhead":
        return 0.0
    on_gpu = (profile.hardware or {}).get("device") == "cuda" or config.get("device") == "cuda"
    return parts.get("other", 0.0) if on_gpu else 0.0


def _interference(profile: Profile, share: float) -> Cause:
    mixed, decode = profile.phase("mixed"), profile.phase("decode")
    longest = None if profile.traffic.input_tokens is None else profile.traffic.input_tokens.max
    slower = None
    if mixed is not None and decode is not None:
        slower = (
            f"a step with prompts in it takes {seconds(mixed.step_p50)}, one without "
            f"{seconds(decode.step_p50)}"
        )
    return Cause(
        "prefill_interference",
        share,
        LOSS,
        joined(
            f"{percent(share)} of the time between tokens is waiting while the prompts of others "
            "are computed in the same steps",
            slower,
        ),
        {
            "phases.mixed.step_p95": None if mixed is None else mixed.step_p95,
            "phases.mixed.step_p50": None if mixed is None else mixed.step_p50,
            "phases.decode.step_p50": None if decode is None else decode.step_p50,
            "traffic.input_tokens.max": longest,
        },
    )


def _preempted(profile: Profile, share: float) -> Cause:
    kv = profile.kv
    return Cause(
        "kv_capacity",
        share,
        LOSS,
        joined(
            f"{percent(share)} of the time between tokens is lost where the KV cache was full and "
            "a request had to give its blocks up, wait and be computed again",
            None if not kv.preemptions else f"that happened {kv.preemptions} times",
        ),
        {
            "kv.preemptions": kv.preemptions,
            "kv.preempted_share": kv.preempted_share,
            "kv.recomputed_share": kv.recomputed_share,
            "kv.occupancy_peak": kv.occupancy_peak,
        },
    )
