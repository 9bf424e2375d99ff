"""Writing YAML line by line, so that every value can have its comment."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

WIDTH = 96


def comment(text: str, *, indent: str = "", width: int = WIDTH) -> list[str]:
    """Comment lines; nothing in the text can end the comment early."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return textwrap.wrap(
        words,
        width=width,
        initial_indent="# ",
        subsequent_indent=f"# {indent}",
        break_long_words=False,
        break_on_hyphens=False,
    )


def setting(key: str, value: Any) -> str:
    """One line `key: value` that reads back as the same value."""
    text = yaml.safe_dump({key: value}, width=float("inf"), allow_unicode=False)
    return str(text).rstrip("\n")
