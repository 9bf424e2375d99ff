"""Nested YAML whose values carry comments above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from autotune.deploy.yaml_text import WIDTH, comment

_STEP = "  "


@dataclass(frozen=True, slots=True)
class Noted:
    """A value with the comments that stand above it."""

    value: Any
    notes: tuple[str, ...] = ()


def noted(value: Any, *notes: str | None) -> Noted:
    """A value with comments; those that are None are left out."""
    return Noted(value, tuple(note for note in notes if note))


def document(content: Mapping[str, Any], *, head: Sequence[str] = ()) -> str:
    """One YAML document; `head` are comments at its top.

    Mappings and lists may hold `Noted` values at any depth. Text of several lines is written as a
    literal block. Read back, it equals the content without its comments.
    """
    lines = [line for text in head for line in (comment(text, indent="  ") if text else [""])]
    return "\n".join([*lines, *_mapping(content, "")]) + "\n"


def documents(*texts: str) -> str:
    """Several documents in one file."""
    return "---\n".join(texts)


def plain(content: Any) -> Any:
    """The content without its comments."""
    if isinstance(content, Noted):
        return plain(content.value)
    if isinstance(content, Mapping):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [plain(item) for item in content]
    return content


def _mapping(content: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key, item in content.items():
        value, notes = (item.value, item.notes) if isinstance(item, Noted) else (item, ())
        lines += _comments(notes, indent)
        lines += _entry(f"{indent}{_scalar(key)}:", value, indent + _STEP)
    return lines


def _entry(start: str, value: Any, indent: str) -> list[str]:
    """A value behind `key:` or `-`; what does not fit on that line is indented by `indent`."""
    if isinstance(value, Mapping) and value:
        return [start, *_mapping(value, indent)]
    if isinstance(value, list) and value:
        return [start, *_items(value, indent)]
    if isinstance(value, str) and _is_block(value):
        keep = "" if value.endswith("\n") else "-"
        body = [f"{indent}{line}" if line else "" for line in value.rstrip("\n").split("\n")]
        return [f"{start} |{keep}", *body]
    return [f"{start} {_scalar(value)}"]


def _is_block(text: str) -> bool:
    """Whether text can stand as a literal block: several plain lines, the first not indented."""
    lines = text.removesuffix("\n").split("\n")
    plain_lines = all(line.isprintable() for line in lines)
    return len(lines) > 1 and plain_lines and lines[0][:1].strip() != "" and lines[-1] != ""


def _items(items: list[Any], indent: str) -> list[str]:
    lines = []
    for item in items:
        value, notes = (item.value, item.notes) if isinstance(item, Noted) else (item, ())
        lines += _comments(notes, indent)
        if isinstance(value, Mapping) and value:
            inner = _mapping(value, indent + _STEP)
            # The dash stands before the first key; comments of that key go above it.
            first = next(i for i, line in enumerate(inner) if not line.lstrip().startswith("#"))
            lines += [indent + line.strip() for line in inner[:first]]
            lines.append(f"{indent}- {inner[first].strip()}")
            lines += inner[first + 1 :]
        else:
            lines += _entry(f"{indent}-", value, indent + _STEP)
    return lines


def _comments(notes: Sequence[str], indent: str) -> list[str]:
    return [
        f"{indent}{line}"
        for note in notes
        for line in comment(note, indent="  ", width=_width(indent))
    ]


def _width(indent: str) -> int:
    return max(40, WIDTH - len(indent))


def _scalar(value: Any) -> str:
    """One value on one line, quoted where YAML would take it for something else."""
    if value in ({}, []) and not isinstance(value, (int, float)):
        return str(yaml.safe_dump(value, default_flow_style=True)).strip()
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.safe_dump(value, width=float("inf"), default_flow_style=True, default_style=style)
    return str(text).removesuffix("\n").removesuffix("\n...")
