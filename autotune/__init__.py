"""The product: workload, load, search, proof, deployment, and plans for what is to be bought."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotune.planning.options import PlanOptions
    from autotune.planning.plan import plan
    from autotune.profile_run import profile
    from autotune.search.options import TuneOptions
    from autotune.search.tune import tune

__all__ = ["PlanOptions", "TuneOptions", "plan", "profile", "tune"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: these bring torch along, which the command line's help must not.
    if name == "plan":
        from autotune.planning.plan import plan

        return plan
    if name == "PlanOptions":
        from autotune.planning.options import PlanOptions

        return PlanOptions
    if name == "profile":
        from autotune.profile_run import profile

        return profile
    if name == "tune":
        from autotune.search.tune import tune

        return tune
    if name == "TuneOptions":
        from autotune.search.options import TuneOptions

        return TuneOptions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
