"""What the workload asked for: prompt lengths, output lengths, arrivals over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from reports.charts.figure import Figure
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.evidence import Evidence
from reports.formatting import significant

_BINS = 24


def workload_histograms(evidence: Evidence) -> Figure | None:
    """Three histograms from the requests of one side; None where no request was recorded."""
    side = next((s for s in evidence.sides if s.requests), None)
    if side is None:
        return None
    prompts = [float(r.input_tokens) for r in side.requests]
    outputs = [float(r.asked_output_tokens) for r in side.requests]
    arrivals = [max(r.intended_send, 0.0) for r in side.requests]
    drawings, rows = [], []
    for title, values, unit in (
        ("Prompt length", prompts, "tokens"),
        ("Output length asked for", outputs, "tokens"),
        ("Arrivals", arrivals, "s after the start"),
    ):
        drawing, bins = _histogram(title, values, unit, arrivals=values is arrivals)
        drawings.append(drawing)
        rows += [[title, f"{significant(a)}–{significant(b)} {unit}", str(n)] for a, b, n in bins]
    return Figure(
        id="workload-shape",
        title="Shape of the workload",
        caption=(
            f"Requests of the measured rounds of the {side.label}, finished or not: "
            f"{len(side.requests)} in all."
        ),
        drawings=drawings,
        columns=["Quantity", "Range", "Requests"],
        rows=rows,
        layout="small",
    )


def _histogram(
    title: str, values: Sequence[float], unit: str, *, arrivals: bool
) -> tuple[Markup, list[tuple[float, float, int]]]:
    low, high, log = domain(values, zero=arrivals, log=False if arrivals else None)
    low = max(low, 0.0)
    edges = np.geomspace(low, high, _BINS + 1) if log else np.linspace(low, high, _BINS + 1)
    counts, edges = np.histogram(np.clip(values, low, high), edges)
    top = max(int(counts.max()), 1)
    plot = Plot(
        Axis(f"{unit}, log scale" if log else unit, low, high, log, count=4),
        Axis("requests", 0.0, top * 1.08, count=4 if top >= 4 else top),
        width=330,
        height=210,
        left=50,
        title=title,
    )
    bins = []
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            a, b, n = float(left), float(right), int(count)
            tip = f"{significant(a)}–{significant(b)} {unit}: {n} of {len(values)} requests"
            plot.bar((a, 0.0), (b, float(n)), "s-winner", tip)
            bins.append((a, b, n))
    return plot.render(), bins
