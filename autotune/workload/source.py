"""The text of a workload file: streamed, checked, and with every fault located."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from autotune.errors import BadInput
from autotune.workload.fields import Fields

_CHUNK_BYTES = 1 << 20
_MAX_ELEMENT_CHARACTERS = 1 << 26
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}


class Source:
    """A workload file; every method streams, so that files larger than memory can be read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def fail(self, line: int, problem: str) -> NoReturn:
        """Refuse the file because of one line.

        Raises:
            BadInput: always.
        """
        raise BadInput(f"{self.path}, line {line}: {problem}")

    def check(self) -> None:
        """Refuse what cannot be a text file.

        Raises:
            BadInput: missing, unreadable, a folder, empty, compressed or UTF-16.
        """
        try:
            with self.path.open("rb") as file:
                head = file.read(4)
        except IsADirectoryError:
            raise BadInput(
                f"{self.path} is a folder; a workload is a CSV, JSON or JSONL file"
            ) from None
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"the workload {str(self.path)!r} cannot be read: {reason}") from error
        if not head:
            raise BadInput(f"{self.path} is empty; it must hold at least one request")
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                raise BadInput(f"{self.path} is compressed with {name}; unpack it first")
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise BadInput(f"{self.path} is encoded in UTF-16; it must be UTF-8")

    def lines(self) -> Iterator[tuple[int, str]]:
        """Each line's number from 1 and its text without the line end; blank lines too.

        Raises:
            BadInput: a line is not UTF-8 or holds NUL bytes.
        """
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                if b"\0" in raw:
                    self.fail(number, "holds a NUL byte")
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError:
                    self.fail(number, "is not UTF-8 text")
                yield number, text.rstrip("\r\n")

    def csv_rows(self) -> Iterator[Fields]:
        """The rows of a CSV file whose first line names the columns.

        Raises:
            BadInput: a row has more or fewer fields than the header, or cannot be parsed.
        """
        reader = csv.reader((text for _, text in self.lines()), strict=True)
        header: list[str] | None = None
        try:
            for values in reader:
                if not values:
                    continue
                if header is None:
                    header = [name.strip() for name in values]
                    continue
                if len(values) != len(header):
                    self.fail(
                        reader.line_num,
                        f"has {len(values)} fields; it must have {len(header)}: "
                        + ",".join(header),
                    )
                yield Fields(
                    str(self.path), reader.line_num, dict(zip(header, values, strict=True)), True
                )
        except csv.Error as error:
            self.fail(reader.line_num, f"is not valid CSV: {error}")

    def json_lines(self) -> Iterator[Fields]:
        """The objects of a JSONL file, one a line.

        Raises:
            BadInput: a line is not a JSON object.
        """
        for number, text in self.lines():
            if text.strip():
                yield self.json_object(number, text)

    def json_object(self, number: int, text: str) -> Fields:
        """One line of a JSONL file."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.fail(number, f"is not valid JSON ({_reason(error)}); it must be one JSON object")
        if not isinstance(value, dict):
            self.fail(number, f"holds {_kind(value)}; it must hold one JSON object")
        return Fields(str(self.path), number, value)

    def json_elements(self) -> Iterator[Fields]:
        """The objects of a file that is one JSON array, or of a JSONL file.

        Raises:
            BadInput: the array is torn or holds something else than objects.
        """
        if self.first_character() == "[":
            yield from self._array()
        else:
            yield from self.json_lines()

    def first_character(self) -> str:
        """The first character that is not whitespace; empty if there is none."""
        for text in self._chunks():
            if stripped := text.lstrip():
                return stripped[0]
        return ""

    def _array(self) -> Iterator[Fields]:
        decoder = json.JSONDecoder()
        chunks = self._chunks()
        buffer, position, line = "", 0, 1
        allowed = "["  # the characters that may come next; none after the array's end
        while True:
            while position < len(buffer) and buffer[position] in " \t\r\n":
                line += buffer[position] == "\n"
                position += 1
            if position == len(buffer):
                buffer, position = next(chunks, ""), 0
                if buffer:
                    continue
                if allowed:
                    self.fail(line, "the JSON array is cut off; it must end with ]")
                return
            character = buffer[position]
            if character not in allowed:
                wanted = " or ".join(allowed) or "nothing more"
                self.fail(line, f"has {character!r} where the JSON array must have {wanted}")
            if character == "{":
                if position > _CHUNK_BYTES // 2:
                    buffer, position = buffer[position:], 0
                value, end, buffer = self._element(decoder, buffer, position, chunks, line)
                yield Fields(str(self.path), line, value)
                line += buffer.count("\n", position, end)
                position, allowed = end, ",]"
            else:
                position += 1
                allowed = {"[": "{]", ",": "{", "]": ""}[character]

    def _element(
        self, decoder: json.JSONDecoder, buffer: str, start: int, chunks: Iterator[str], line: int
    ) -> tuple[dict[str, Any], int, str]:
        """Decode the object at `start`, reading on while it is incomplete."""
        while True:
            try:
                value, end = decoder.raw_decode(buffer, start)
                return value, end, buffer
            except (ValueError, RecursionError) as error:
                # An unfinished element looks like a broken one. Reading as much again as there is
                # keeps the number of attempts logarithmic.
                wanted, parts = len(buffer) - start, []
                while wanted > 0 and (part := next(chunks, "")):
                    parts.append(part)
                    wanted -= len(part)
                if not parts or len(buffer) - start > _MAX_ELEMENT_CHARACTERS:
                    at = getattr(error, "pos", start)
                    self.fail(
                        line + buffer.count("\n", start, at),
                        f"is not valid JSON ({_reason(error)}); is the file cut off?",
                    )
                buffer = buffer + "".join(parts)

    def _chunks(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        line = 1
        with self.path.open("rb") as file:
            while raw := file.read(_CHUNK_BYTES):
                if b"\0" in raw:
                    at = raw.index(b"\0")
                    self.fail(
                        line + raw.count(b"\n", 0, at),
                        "holds a NUL byte; it must be plain UTF-8 text",
                    )
                try:
                    text = decoder.decode(raw)
                except UnicodeDecodeError as error:
                    self.fail(line + raw.count(b"\n", 0, error.start), "is not UTF-8 text")
                line += raw.count(b"\n")
                if text:
                    yield text
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            self.fail(line, "ends within a UTF-8 character; is the file cut off?")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else "a number is too long"


def _kind(value: object) -> str:
    names = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
