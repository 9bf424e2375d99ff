"""Fields of a `config.json`, read with their types checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from engine.errors import ModelError

_REQUIRED: Any = object()
# Beyond it no tensor has a size, and Python's integers no longer become floats.
_LARGEST = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """A mapping read from `source`; each getter names field and file in what it raises.

    A field that is null counts as absent, as Hugging Face writes unset fields so; only the getters
    that end in `_or_off` tell the two apart. `seen` collects the fields that were asked for, so
    that what a family does not know can be told from what it does.
    """

    values: dict[str, Any]
    source: str
    seen: set[str] = field(default_factory=set, compare=False)

    def integer(self, name: str, default: int = _REQUIRED, most: int | None = None) -> int:
        """A positive integer, not above `most` (by default what 64 bits hold).

        Raises:
            ModelError: absent without a default, not a positive integer, or too large.
        """
        value = self._get(name, default)
        if type(value) is not int or value < 1:
            raise ModelError(f"{self.source}: {name} must be a positive integer, got {value!r}")
        most = _LARGEST if most is None else most
        if value > most:
            shown = value if value <= _LARGEST else "more than 64 bits hold"
            raise ModelError(f"{self.source}: {name} must be at most {most}, got {shown}")
        return value

    def number(self, name: str, default: float = _REQUIRED) -> float:
        """A positive finite number.

        Raises:
            ModelError: absent without a default, or not a positive finite number.
        """
        value = self._get(name, default)
        if not _is_number(value) or value <= 0:
            raise ModelError(f"{self.source}: {name} must be a positive number, got {value!r}")
        return float(value)

    def integer_or_off(self, name: str, default: int) -> int:
        """A positive integer; `default` if absent; 0 if null.

        Raises:
            ModelError: neither.
        """
        return 0 if self._is_null(name) else self.integer(name, default)

    def number_or_off(self, name: str, default: float) -> float:
        """A positive finite number; `default` if absent; 0 if null or 0.

        Raises:
            ModelError: neither.
        """
        if self._is_null(name) or self.values.get(name, default) == 0:
            return 0.0
        return self.number(name, default)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false.

        Raises:
            ModelError: neither.
        """
        value = self._get(name, default)
        if type(value) is not bool:
            raise ModelError(f"{self.source}: {name} must be true or false, got {value!r}")
        return value

    def text(self, name: str, default: str) -> str:
        """A text.

        Raises:
            ModelError: not a text.
        """
        value = self._get(name, default)
        if not isinstance(value, str):
            raise ModelError(f"{self.source}: {name} must be a text, got {value!r}")
        return value

    def texts(self, name: str, count: int, allowed: tuple[str, ...]) -> tuple[str, ...] | None:
        """`count` texts, each one of `allowed`; None if absent.

        Raises:
            ModelError: not a list, of another length, or with another text.
        """
        value = self._get(name, None)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            raise ModelError(f"{self.source}: {name} must be a list of {count} texts")
        for text in value:
            if text not in allowed:
                raise ModelError(
                    f"{self.source}: {name} holds {text!r}, which is not supported; "
                    f"{' and '.join(allowed)} are"
                )
        return tuple(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """`count` positive finite numbers.

        Raises:
            ModelError: absent, not a list, of another length, or with something else in it.
        """
        value = self._get(name, _REQUIRED)
        if not isinstance(value, list) or len(value) != count:
            raise ModelError(f"{self.source}: {name} must be a list of {count} numbers")
        if not all(_is_number(v) and v > 0 for v in value):
            raise ModelError(f"{self.source}: {name} must hold positive numbers only")
        return tuple(float(v) for v in value)

    def indices(self, name: str) -> frozenset[int]:
        """A list of integers from 0 on, as a set; empty if absent.

        Raises:
            ModelError: not such a list.
        """
        value = self._get(name, [])
        if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
            raise ModelError(f"{self.source}: {name} must be a list of indices, got {value!r}")
        return frozenset(value)

    def mapping(self, name: str) -> ConfigFields | None:
        """A nested object; None if absent or empty.

        Raises:
            ModelError: not an object.
        """
        value = self._get(name, None)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise ModelError(f"{self.source}: {name} must be an object, got {value!r}")
        return ConfigFields(value, f"{self.source}: {name}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def _get(self, name: str, default: Any) -> Any:
        self.seen.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ModelError(f"{self.source}: {name} is missing")
        return default

    def _is_null(self, name: str) -> bool:
        self.seen.add(name)
        return name in self.values and self.values[name] is None


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= _LARGEST
    return type(value) is float and math.isfinite(value)
