"""The roofline: what the device can do at each intensity, and where each phase stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reports.charts.figure import Figure, mark_key
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.formatting import MISSING, mapping, number, percent, sequence, significant

PHASE_MARKS = {"prefill": "triangle", "mixed": "diamond", "decode": "circle"}
_MARGIN = 4.0  # how far the drawing goes beyond ridge and phases, as a factor


def roofline(profile: Mapping[str, Any]) -> Figure | None:
    """Williams, Waterman, Patterson 2009; None without measured ceilings or counted phases."""
    ceilings = mapping(profile.get("ceilings"))
    bandwidth = number(ceilings.get("working_set_bandwidth"))
    memory = number(ceilings.get("bandwidth"))
    if memory is not None and memory <= 0:
        memory = None  # of a damaged file
    dtype = str(ceilings.get("compute_dtype"))
    rate = number(mapping(ceilings.get("matmul")).get(dtype))
    phases = [p for p in map(_phase, sequence(profile.get("phases"))) if p is not None]
    if not bandwidth or not rate or bandwidth <= 0 or rate <= 0 or not phases:
        return None
    ridge = rate / bandwidth
    intensities = [p[1] for p in phases]
    low, high = min(*intensities, ridge) / _MARGIN, max(*intensities, ridge) * _MARGIN
    rates = [p[2] for p in phases]
    bottom, top, _ = domain([*rates, rate * 1.6, low * (memory or bandwidth)], log=True)
    plot = Plot(
        Axis("intensity, operations per byte moved (log)", low, high, True),
        Axis("operations per second (log)", bottom, top, True, count=4, text=_rate),
        width=720,
        height=400,
        left=108,
    )
    if memory and memory < 0.9 * bandwidth:
        plot.line(_roof(low, high, memory, rate), "s-limit")
    plot.line(_roof(low, high, bandwidth, rate), "s-default")
    plot.text(
        plot.right,
        plot.y(rate) - 7,
        f"{dtype} ceiling {_rate(rate)}",
        "label s-default",
        anchor="end",
    )
    plot.vertical(ridge, f"ridge {significant(ridge)}", "s-limit")
    for name, intensity, reached, tip in phases:
        plot.mark(intensity, reached, PHASE_MARKS[name], "s-winner", tip, size=7)
        plot.text(plot.x(intensity) + 11, plot.y(reached) + 4, name, "label")
    lines = (
        f"The dashed roof is what was measured here: {_bytes(bandwidth)} for a buffer as large as "
        f"the weights, {_rate(rate)} in {dtype}."
    )
    if memory and memory < 0.9 * bandwidth:
        lines += f" The dotted one is main memory's, {_bytes(memory)}: the weights fit a cache."
    return Figure(
        id="roofline",
        title="Roofline",
        caption=(
            f"{lines} Left of the ridge a phase waits for memory, right of it for arithmetic; how "
            "far it lies below the roof is overhead."
        ),
        drawings=[plot.render()],
        columns=[
            "Phase",
            "Operations per byte",
            "Operations/s",
            "Of the matmul ceiling (MFU)",
            "Of the bandwidth (MBU)",
        ],
        rows=[_row(item) for item in map(mapping, sequence(profile.get("phases")))],
        layout="narrow",
        legend=[mark_key(PHASE_MARKS[p[0]], "s-winner", p[0]) for p in phases],
    )


def _phase(value: object) -> tuple[str, float, float, str] | None:
    """(name, intensity, operations per second, tooltip) of a phase that was counted."""
    phase = mapping(value)
    name = str(phase.get("name"))
    intensity, flops = number(phase.get("intensity")), number(phase.get("flops"))
    seconds = number(phase.get("device_seconds"))
    if name not in PHASE_MARKS or not intensity or not flops or not seconds:
        return None
    if min(intensity, flops, seconds) <= 0:
        return None
    reached = flops / seconds
    tip = f"{name}: {significant(intensity)} operations per byte, {_rate(reached)}"
    return name, intensity, reached, tip


def _roof(low: float, high: float, bandwidth: float, rate: float) -> list[tuple[float, float]]:
    ridge = min(max(rate / bandwidth, low), high)
    return [(low, low * bandwidth), (ridge, min(ridge * bandwidth, rate)), (high, rate)]


def _row(phase: Mapping[str, Any]) -> list[str]:
    flops, seconds = number(phase.get("flops")), number(phase.get("device_seconds"))
    reached = flops / seconds if flops is not None and seconds else None
    return [
        str(phase.get("name")),
        significant(number(phase.get("intensity"))),
        MISSING if reached is None else _rate(reached),
        percent(number(phase.get("mfu"))),
        percent(number(phase.get("mbu"))),
    ]


def _rate(value: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{significant(value / size)} {unit}FLOP/s"
    return f"{significant(value)} FLOP/s"


def _bytes(value: float) -> str:
    return f"{significant(value / 1e9)} GB/s"
