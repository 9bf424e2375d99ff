"""A report read as a browser would: its elements, its text, and what it would run or fetch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "br", "hr", "img", "input", "link", "base"}
# Content of these is no markup, so that "<" in it opens nothing.
RAW = {"script", "style"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element] = field(default_factory=list)
    content: list[str | Element] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        wanted = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()}
        found = []
        for child in self.children:
            if child.tag == tag and wanted.items() <= child.attributes.items():
                found.append(child)
            found += child.all(tag, **attributes)
        return found

    def one(self, tag: str, **attributes: str) -> Element:
        found = self.all(tag, **attributes)
        assert len(found) == 1, f"{len(found)} of {tag} {attributes}"
        return found[0]

    def with_class(self, name: str) -> list[Element]:
        found = []
        for child in self.children:
            if name in child.attributes.get("class", "").split():
                found.append(child)
            found += child.with_class(name)
        return found

    @property
    def text(self) -> str:
        """Its own text and that of its elements; scripts and styles show none elsewhere."""
        return "".join(
            part if isinstance(part, str) else "" if part.tag in RAW else part.text
            for part in self.content
        )

    @property
    def words(self) -> str:
        """All text in it, with single spaces."""
        return " ".join(self.text.split())


class Page(HTMLParser):
    """Parses strictly: every element that is opened must be closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.root = Element("document", {})
        self._open = self.root
        self.feed(html)
        self.close()
        assert self._open is self.root, f"<{self._open.tag}> is never closed"

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute: {names}"
        element = Element(tag, {k: v or "" for k, v in attrs}, self._open)
        self._open.children.append(element)
        self._open.content.append(element)
        if tag not in VOID:
            self._open = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.tag == tag, f"</{tag}> closes <{self._open.tag}>"
        assert self._open.parent is not None
        self._open = self._open.parent

    def handle_data(self, data: str) -> None:
        self._open.content.append(data)

    @property
    def elements(self) -> list[Element]:
        def walk(element: Element) -> list[Element]:
            return [element, *(e for child in element.children for e in walk(child))]

        return walk(self.root)

    @property
    def verdict(self) -> Element:
        return self.root.one("section", id="verdict")

    @property
    def badge(self) -> str:
        return self.verdict.with_class("badge")[0].words

    @property
    def headline(self) -> str:
        return self.verdict.one("h1").words

    def figure(self, id_: str) -> Element:
        return self.root.one("figure", aria_labelledby=f"caption-{id_}")

    def embedded_run(self) -> dict[str, Any]:
        return dict(json.loads(self.root.one("script", id="run-data").text))
