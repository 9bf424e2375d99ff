"""Where the time of a metric goes, completed from what else the profile knows."""

from __future__ import annotations

from autotune.profiling.schema import Phase, Profile

PREFILL_PARTS = ("prefill_linear", "prefill_attention")
DECODE_PARTS = ("weights", "linear_compute", "kv_reads")


def parts_of(profile: Profile, metric: str) -> dict[str, float] | None:
    """Shares of a metric's time by component, as `Breakdown.parts`; None if nothing is known.

    Where the profile has no breakdown, TTFT is split into waiting and the rest (a server's
    endpoint tells that much), and the rest of it counted as the prompt's own work. Where no cost
    of a step was fitted, unexplained device time of decodes is split by what their arithmetic
    says.
    """
    breakdown = profile.breakdown(metric)
    if breakdown is None:
        wait = profile.queueing.wait_share
        if metric != "ttft" or wait is None:
            return None
        return {"queue": wait, "prefill_linear": 1 - wait}
    parts = dict(breakdown.parts)
    if profile.step_fit is None and metric != "ttft":
        _split_unexplained(parts, profile.phase("decode"), _ridge(profile))
    return parts


def _split_unexplained(parts: dict[str, float], decode: Phase | None, ridge: float | None) -> None:
    """Divide `other` among what a decode step reads, or give it to its arithmetic."""
    if decode is None or any(parts.get(name) for name in DECODE_PARTS):
        return
    if decode.weight_bytes is None or decode.kv_bytes is None:
        return
    other = parts.pop("other", 0.0)
    if ridge is not None and decode.intensity is not None and decode.intensity > ridge:
        parts["linear_compute"] = other
        return
    read = decode.weight_bytes + decode.kv_bytes
    if read <= 0:
        parts["other"] = other
        return
    parts["weights"] = other * decode.weight_bytes / read
    parts["kv_reads"] = other * decode.kv_bytes / read


def total(parts: dict[str, float], names: tuple[str, ...]) -> float:
    """The sum of some components."""
    return sum(parts.get(name, 0.0) for name in names)


def _ridge(profile: Profile) -> float | None:
    return None if profile.ceilings is None else profile.ceilings.ridge
