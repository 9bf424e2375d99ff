"""A chart as the page shows it: drawings, caption, legend and the same numbers as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup

from reports.charts.plot import shape_at
from reports.charts.svg import element

Layout = Literal["wide", "pairs", "small", "narrow"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One chart. `columns` and `rows` hold what it shows, for those who cannot see it.

    `layout` says how the drawings lie on the page: one wide, in pairs, small multiples, or one
    narrow.
    """

    id: str
    title: str
    caption: str
    drawings: Sequence[Markup]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    layout: Layout = "wide"
    legend: Sequence[tuple[Markup, str]] = field(default_factory=tuple)


def line_key(series: str, label: str) -> tuple[Markup, str]:
    """A legend entry for a line."""
    return _swatch(element("path", d="M1 7H27", class_=f"line {series}")), label


def mark_key(shape: str, series: str, label: str) -> tuple[Markup, str]:
    """A legend entry for a point mark."""
    return _swatch(shape_at(14.0, 7.0, shape, f"mark {series}")), label


def _swatch(drawing: Markup) -> Markup:
    return element("svg", drawing, viewBox="0 0 28 14", class_="swatch", aria_hidden="true")
