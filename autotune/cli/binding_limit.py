"""Which limit binds, in words."""

from __future__ import annotations


def binding_limit(limit: str, ratio: float | None) -> str:
    """One line, as `ttft<200ms binds: missed, at 1.4 times the limit`.

    `ratio` is measured over bound, or bound over measured where more is better: above 1 is missed,
    None if too few requests finished to measure it.
    """
    if ratio is None:
        return f"{limit} binds: missed, too few requests finished to say by how much"
    state = "missed" if ratio > 1 else "met"
    if ">" in limit and ratio > 0:
        ratio = 1 / ratio
    return f"{limit} binds: {state}, at {_plain(ratio)} times the limit"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
