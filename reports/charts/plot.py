"""A plot area with axes, and the marks that every chart is drawn with.

Colours and line styles are classes of the style sheet, so that one drawing serves the light, the
dark and the printed page. What a mark means is told by its shape as well as by its colour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reports.charts.scale import Scale
from reports.charts.svg import element, group, path
from reports.formatting import significant

Tick = tuple[float, str]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its title with the unit, its domain, and its ticks (round values if None)."""

    title: str
    low: float
    high: float
    log: bool = False
    ticks: Sequence[Tick] | None = None
    count: int = 5
    grid: bool = True
    text: Callable[[float], str] = significant


class Plot:
    """A drawing of `width` by `height` pixels; marks are added in data coordinates."""

    def __init__(
        self,
        x: Axis,
        y: Axis,
        *,
        width: float = 460.0,
        height: float = 260.0,
        left: float = 58.0,
        bottom: float = 44.0,
        top: float = 24.0,
        right: float = 16.0,
        title: str | None = None,
    ) -> None:
        self.width, self.height = width, height
        self.left, self.right = left, width - right
        self.top, self.bottom = top, height - bottom
        self.x = Scale(x.low, x.high, self.left, self.right, x.log)
        self.y = Scale(y.low, y.high, self.bottom, self.top, y.log)
        self._frame = [*self._y_axis(y), *self._x_axis(x)]
        if title is not None:
            self._frame.append(element("text", title, x=self.left, y=13.0, class_="panel-title"))
        self._marks: list[Markup] = []

    def line(
        self, points: Iterable[tuple[float, float]], series: str, *, stepped: bool = False
    ) -> None:
        """A line through the points in the colour and dash of a series."""
        d = path(((self.x(x), self.y(y)) for x, y in points), stepped=stepped)
        self._marks.append(element("path", d=d, class_=f"line {series}"))

    def mark(
        self, x: float, y: float, shape: str, series: str, tip: str, *, size: float = 4.5
    ) -> None:
        """A point mark (`circle`, `triangle`, `cross`, `square`, `diamond`) with a tooltip."""
        self._marks.append(
            shape_at(self.x(x), self.y(y), shape, f"mark {series}", tip=tip, size=size)
        )

    def bar(
        self, low: tuple[float, float], high: tuple[float, float], series: str, tip: str
    ) -> None:
        """A filled rectangle between two opposite corners."""
        x0, x1 = sorted((self.x(low[0]), self.x(high[0])))
        y0, y1 = sorted((self.y(low[1]), self.y(high[1])))
        self._marks.append(
            element(
                "rect",
                x=x0,
                y=y0,
                width=max(x1 - x0, 0.5),
                height=max(y1 - y0, 0.5),
                class_=f"bar {series}",
                data_tip=tip,
            )
        )

    def vertical(self, x: float, label: str, series: str, *, above: bool = False) -> None:
        """A line across the plot at `x`; its label stands at the foot, or above the plot."""
        pixel = self.x(x)
        # A label that would leave the plot on the right is written on the other side.
        before = pixel > self.left + 0.7 * (self.right - self.left)
        d = path([(pixel, self.top), (pixel, self.bottom)])
        self._marks.append(element("path", d=d, class_=f"line {series}"))
        self._marks.append(
            element(
                "text",
                label,
                x=pixel + (-5.0 if before else 5.0),
                y=self.top - 6.0 if above else self.bottom - 8.0,
                class_=f"label {series}",
                text_anchor="end" if before else None,
            )
        )

    def horizontal(self, y: float, label: str, series: str) -> None:
        """A line across the plot at `y`, with a label at its right end."""
        pixel = self.y(y)
        d = path([(self.left, pixel), (self.right, pixel)])
        self._marks.append(element("path", d=d, class_=f"line {series}"))
        self.text(self.right, pixel - 5.0, label, f"label {series}", anchor="end")

    def text(self, x: float, y: float, text: str, class_: str, *, anchor: str = "start") -> None:
        """Text at a pixel position."""
        self._marks.append(element("text", text, x=x, y=y, class_=class_, text_anchor=anchor))

    def render(self) -> Markup:
        """The finished `svg` element; the figure around it carries the accessible name."""
        return element(
            "svg",
            group(self._frame),
            group(self._marks),
            viewBox=f"0 0 {self.width:g} {self.height:g}",
            class_="plot",
            aria_hidden="true",
            focusable="false",
        )

    def _y_axis(self, axis: Axis) -> list[Markup]:
        out = []
        for value, label in _labelled(axis, self.y):
            at = self.y(value)
            if axis.grid:
                d = path([(self.left, at), (self.right, at)])
                out.append(element("path", d=d, class_="grid"))
            out.append(
                element("text", label, x=self.left - 7, y=at + 4, class_="tick", text_anchor="end")
            )
        middle = (self.top + self.bottom) / 2
        if axis.title:
            out.append(
                element(
                    "text",
                    axis.title,
                    x=0.0,
                    y=0.0,
                    transform=f"translate(12 {middle:.0f}) rotate(-90)",
                    class_="axis-title",
                    text_anchor="middle",
                )
            )
        return out

    def _x_axis(self, axis: Axis) -> list[Markup]:
        base = element(
            "path", d=path([(self.left, self.bottom), (self.right, self.bottom)]), class_="axis"
        )
        out = [base]
        for value, label in _labelled(axis, self.x):
            at = self.x(value)
            out.append(
                element("path", d=path([(at, self.bottom), (at, self.bottom + 4)]), class_="axis")
            )
            out.append(
                element(
                    "text", label, x=at, y=self.bottom + 17, class_="tick", text_anchor="middle"
                )
            )
        out.append(
            element(
                "text",
                axis.title,
                x=(self.left + self.right) / 2,
                y=self.bottom + 36,
                class_="axis-title",
                text_anchor="middle",
            )
        )
        return out


def shape_at(
    x: float, y: float, shape: str, class_: str, *, tip: str | None = None, size: float = 4.5
) -> Markup:
    """A mark at pixel (x, y); also the swatch of a legend."""
    if shape == "circle":
        return element("circle", cx=x, cy=y, r=size, class_=class_, data_tip=tip)
    s, q = size * 1.1, size * 0.88
    outlines = {
        "triangle": [(x, y - s * 1.1), (x + s, y + s * 0.8), (x - s, y + s * 0.8)],
        "square": [(x - q, y - q), (x + q, y - q), (x + q, y + q), (x - q, y + q)],
        "diamond": [(x, y - s * 1.2), (x + s * 1.2, y), (x, y + s * 1.2), (x - s * 1.2, y)],
    }
    if shape == "cross":
        d = path([(x - s, y - s), (x + s, y + s)]) + path([(x - s, y + s), (x + s, y - s)])
    else:
        d = path(outlines[shape]) + "Z"
    return element("path", d=d, class_=class_, data_tip=tip)


def _labelled(axis: Axis, scale: Scale) -> Sequence[Tick]:
    if axis.ticks is not None:
        return axis.ticks
    return [(value, axis.text(value)) for value in scale.ticks(axis.count)]
