"""Reading the JSON files of a model folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from engine.errors import ModelError


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ModelError: the file cannot be read, is not JSON, or does not hold an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text: byte {error.start} is invalid") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is the former
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def finite_number(value: object) -> float | None:
    """`value` as a float if it is a finite number; None for all else, true and false included."""
    if type(value) not in (int, float):
        return None
    assert isinstance(value, int | float)
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
