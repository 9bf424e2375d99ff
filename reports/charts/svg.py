"""Inline SVG elements, escaped, with the numbers short enough to keep a report small."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape


def element(tag: str, *children: Markup | str, **attributes: object) -> Markup:
    """One element; text children and attribute values are escaped, None attributes left out.

    A trailing underscore is dropped from attribute names and others become hyphens, so that
    `class_` and `data_tip` can be written as keywords.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if not children:
        return Markup(f"<{tag}{written}/>")  # noqa: S704  values are escaped above
    inner = "".join(str(escape(child)) for child in children)
    return Markup(f"<{tag}{written}>{inner}</{tag}>")  # noqa: S704  children are escaped above


def group(children: Iterable[Markup], **attributes: object) -> Markup:
    """A `g` element around the children."""
    return element("g", Markup("").join(children), **attributes)


def path(points: Iterable[tuple[float, float]], *, stepped: bool = False) -> str:
    """The `d` of a polyline through the points; `stepped` holds each y until the next x."""
    out: list[str] = []
    for x, y in points:
        if not out:
            out.append(f"M{_value(x)} {_value(y)}")
        elif stepped:
            out.append(f"H{_value(x)}V{_value(y)}")
        else:
            out.append(f"L{_value(x)} {_value(y)}")
    return "".join(out)


def _value(value: object) -> str:
    """A tenth of a pixel is finer than any screen shows; everything else is escaped text."""
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return str(escape(value))
