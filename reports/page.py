"""A page from a template: autoescaped, under a policy that admits its own style and script only."""

from __future__ import annotations

import base64
import hashlib
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from autotune.records import write_atomically
from reports.formatting import significant

# Characters without a shape that a name from outside may hold: controls, and those that turn the
# direction of the text after them, by which a name could reverse the digits of a verdict.
_INVISIBLE = dict.fromkeys(
    [
        *(*range(9), 11, 12, *range(14, 32), *range(127, 160)),
        *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),
    ]
)


def render_page(template: str, **content: object) -> str:
    """The whole page, without characters that have no shape.

    Raises:
        jinja2.UndefinedError: the template asks for what `content` lacks.
    """
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(significant=significant)
    style, script = _asset("style.css"), _asset("script.js")
    page = environment.get_template(template).render(
        style=Markup(style),  # noqa: S704  our own file
        script=Markup(script),  # noqa: S704  our own file
        style_hash=_hash(style),
        script_hash=_hash(script),
        **content,
    )
    return page.translate(_INVISIBLE)


def write_page(path: Path, page: str) -> Path:
    """Write a page whole or not at all; returns its path."""
    # Lone surrogates, which JSON strings may hold, have no UTF-8: they become question marks.
    write_atomically(path, page.encode("utf-8", "replace"))
    return path


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _asset(name: str) -> str:
    return files("reports").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The source expression by which the page's policy admits a text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
