"""Fields of a `config.json`, read with their types checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from engine.errors import ModelError

_REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """A mapping read from `source`; each getter names field and file in what it raises.

    A field that is null counts as absent, as Hugging Face writes unset fields so.
    """

    values: dict[str, Any]
    source: str

    def integer(self, name: str, default: int = _REQUIRED, most: int | None = None) -> int:
        """A positive integer, not above `most`.

        Raises:
            ModelError: absent without a default, not a positive integer, or too large.
        """
        value = self._get(name, default)
        if type(value) is not int or value < 1:
            raise ModelError(f"{self.source}: {name} must be a positive integer, got {value!r}")
        if most is not None and value > most:
            raise ModelError(f"{self.source}: {name} must be at most {most}, got {value}")
        return value

    def number(self, name: str, default: float = _REQUIRED) -> float:
        """A positive finite number.

        Raises:
            ModelError: absent without a default, or not a positive finite number.
        """
        value = self._get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise ModelError(f"{self.source}: {name} must be a positive number, got {value!r}")
        return float(value)

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

    def mapping(self, name: str) -> ConfigFields | None:
        """A nested object; None if absent or empty.

        Raises:
            ModelError: not an object.
        """
        value = self.values.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise ModelError(f"{self.source}: {name} must be an object, got {value!r}")
        return ConfigFields(value, f"{self.source}: {name}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ModelError(f"{self.source}: {name} is missing")
        return default
