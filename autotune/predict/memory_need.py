"""Memory that serving the profiled traffic takes, and what a change makes of it."""

from __future__ import annotations

from collections.abc import Mapping

from autotune.predict.cache_after import Served
from autotune.predict.change import Factor, Term
from autotune.predict.gain import Basis, PredictedGain
from autotune.profiling.schema import Profile

# Sizes follow from shapes; what is not told by them (buffers, the libraries) stays as it is.
_SPREAD = 1.05


def memory_gain(
    profile: Profile,
    base: Served,
    changed: Served | None,
    factors: Mapping[Term, Factor],
    basis: Basis = "replay",
) -> tuple[PredictedGain, ...]:
    """Bytes of weights and of the keys and values of the traffic's peak, before over after.

    Empty where the cache's use was not measured.
    """
    kv = profile.kv
    if changed is None or kv.blocks_total is None or kv.block_size is None:
        return ()
    peak = 1.0 if kv.occupancy_peak is None else kv.occupancy_peak
    tokens = peak * kv.blocks_total * kv.block_size

    def need(served: Served, resident: float, capacity: float) -> float:
        weights = served.model.resident_bytes * resident + served.draft_bytes
        a_token = served.model.kv_bytes_per_token
        if served.draft is not None:
            a_token += served.draft.kv_bytes_per_token
        return weights + tokens * a_token / capacity

    resident = factors.get("resident_weights")
    capacity = factors.get("kv_capacity")
    before = need(base, 1.0, 1.0)
    value = before / need(
        changed, resident.value if resident else 1.0, capacity.value if capacity else 1.0
    )
    low = before / need(
        changed, resident.high if resident else 1.0, capacity.low if capacity else 1.0
    )
    high = before / need(
        changed, resident.low if resident else 1.0, capacity.high if capacity else 1.0
    )
    return (PredictedGain("memory", value, low / _SPREAD, high * _SPREAD, basis),)
