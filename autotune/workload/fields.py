"""One row as it stands in a file: each field read with its type and range, or refused by name."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from autotune.errors import BadInput

# No model reads more; a larger number is a fault in the file, and would exhaust memory later.
MAX_TOKENS = 10_000_000
# About 30,000 years: beyond any clock, in seconds or in milliseconds since 1970.
MAX_SECONDS = 1e12

_DECIMAL = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*")
_SHOWN_CHARACTERS = 40


class Fields:
    """The fields of one row. `textual` rows, as in CSV, hold numbers as texts."""

    def __init__(
        self, path: str, line: int, values: Mapping[str, Any], textual: bool = False
    ) -> None:
        self.path = path
        self.line = line
        self.values = values
        self.textual = textual

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def fail(self, name: str, problem: str) -> NoReturn:
        """Refuse the row because of one field.

        Raises:
            BadInput: always; it names file, line and field.
        """
        raise BadInput(f"{self.path}, line {self.line}: {name} {problem}")

    def tokens(self, name: str, minimum: int = 1) -> int:
        """A number of tokens from `minimum` to `MAX_TOKENS`."""
        wanted = f"a whole number of tokens from {minimum} to {MAX_TOKENS}"
        number = self._number(name, wanted)
        if not number.is_integer() or not minimum <= number <= MAX_TOKENS:
            self.fail(name, f"is {self._shown(name)}; it must be {wanted}")
        return int(number)

    def seconds(self, name: str, unit: float = 1.0) -> float:
        """A time given in `unit` seconds, as seconds; it may be negative."""
        wanted = "a number of seconds" if unit == 1.0 else f"a number, in units of {unit:g} s"
        seconds = self._number(name, wanted) * unit
        if not abs(seconds) <= MAX_SECONDS:
            self.fail(name, f"is {self._shown(name)}; it must be {wanted}")
        return seconds

    def text(self, name: str) -> str:
        """A text that is not empty."""
        value = self.values.get(name)
        if not isinstance(value, str) or not value:
            self.fail(name, f"is {self._shown(name)}; it must be a text")
        return encodable(value)

    def label(self, name: str) -> str | None:
        """A text or a whole number that names something, as text; None if it is not there."""
        value = self.values.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            self.fail(name, f"is {self._shown(name)}; it must be a text or a whole number")
        return encodable(str(value))

    def ids(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers or texts that name blocks; texts become stable numbers."""
        values = self.array(name)
        if any(isinstance(v, bool) or not isinstance(v, (int, str)) for v in values):
            self.fail(name, "must hold whole numbers or texts only")
        return tuple(v if isinstance(v, int) else _stable_id(v) for v in values)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A list of token ids that is not empty."""
        values = self.array(name)
        if not values or any(type(v) is not int or not 0 <= v < 2**31 for v in values):
            self.fail(name, "must hold at least one token id, whole numbers from 0")
        return tuple(values)

    def array(self, name: str) -> list[Any]:
        """A JSON array."""
        value = self.values.get(name)
        if not isinstance(value, list):
            self.fail(name, f"is {self._shown(name)}; it must be an array")
        return value

    def object(self, name: str) -> Fields:
        """A JSON object, as fields of the same line."""
        value = self.values.get(name)
        if not isinstance(value, dict):
            self.fail(name, f"is {self._shown(name)}; it must be an object")
        return Fields(self.path, self.line, value)

    def first_of(self, names: Sequence[str]) -> str | None:
        """The first of the names that the row has."""
        return next((name for name in names if name in self), None)

    def _number(self, name: str, wanted: str) -> float:
        value = self.values.get(name)
        if self.textual and isinstance(value, str) and _DECIMAL.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(name, f"is {self._shown(name)}; it must be {wanted}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.fail(name, f"is {self._shown(name)}; it must be {wanted}")
        return number

    def _shown(self, name: str) -> str:
        if name not in self.values:
            return "missing"
        value = self.values[name]
        # A JSON number may have more digits than Python is willing to print.
        huge = isinstance(value, int) and abs(value) >= 1 << 200
        text = "huge" if huge else repr(value)
        return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def encodable(text: str) -> str:
    """The text with halves of surrogate pairs, which JSON allows and UTF-8 does not, as `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def cut(rows: Iterable[Any], limit: int | None) -> Iterable[Any]:
    """The first `limit` of the rows; all of them if it is None."""
    if limit is None:
        yield from rows
        return
    for count, row in enumerate(rows, start=1):
        yield row
        if count == limit:
            return


def _stable_id(text: str) -> int:
    # Not hash(): that differs from process to process, and with it every prefix.
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
