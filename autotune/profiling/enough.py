"""How much evidence a statement needs, and the sentence that says it is not there."""

from __future__ import annotations

# A phase of fewer steps is a coincidence of when prompts came; a statistic of fewer requests has
# no 95th percentile.
LEAST_STEPS = 20
LEAST_REQUESTS = 20
# Why nothing is known of the wait before a request ran.
NOT_TOLD = "no record says when a request first ran, which those of an earlier release lack"


def lacking(what: str, unit: str, least: int, have: int) -> str:
    """Why something is missing from a profile: "… needs at least N requests; has M"."""
    return f"{what} needs at least {least} {unit}; has {have}"
