"""Which knobs matter: the share of the objective's variation that each explains."""

from __future__ import annotations

from reports.charts.figure import Figure
from reports.charts.plot import Axis, Plot
from reports.evidence import Evidence
from reports.formatting import mapping, number, percent


def knob_importances(evidence: Evidence) -> Figure | None:
    """A bar a knob, the most important first; None where they were not determined."""
    shares = {
        str(knob): share
        for knob, value in mapping(evidence.result.get("importances")).items()
        if (share := number(value)) is not None
    }
    if not shares:
        return None
    ranked = sorted(shares.items(), key=lambda item: (-item[1], item[0]))[:20]
    top = max(max(shares.values()), 1e-9)
    rows = len(ranked)
    names = [(rows - 1 - i, knob) for i, (knob, _) in enumerate(ranked)]
    plot = Plot(
        Axis("share of the objective's variation", 0.0, top * 1.12, text=percent),
        Axis("", -0.6, rows - 0.4, ticks=names, grid=False),
        width=720,
        height=64 + 26 * rows,
        left=230,
        top=8,
    )
    for index, (knob, share) in enumerate(ranked):
        row = rows - 1 - index
        plot.bar((0.0, row - 0.3), (share, row + 0.3), "s-winner", f"{knob}: {percent(share)}")
        plot.text(plot.x(share) + 6, plot.y(row) + 4, percent(share), "value")
    return Figure(
        id="importances",
        title="Which knobs matter",
        caption=(
            "Share of the variation of the objective that each knob explains over all search "
            "trials; an estimate, good for ranking."
        ),
        drawings=[plot.render()],
        columns=["Knob", "Share"],
        rows=[[knob, percent(share)] for knob, share in ranked],
        layout="narrow",
    )
