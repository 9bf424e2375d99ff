"""The product: workload, load, search, proof, deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotune.profile_run import profile
    from autotune.search.options import TuneOptions
    from autotune.search.tune import tune

__all__ = ["TuneOptions", "profile", "tune"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: these bring torch along, which the command line's help must not.
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
