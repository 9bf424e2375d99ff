"""Knobs that do something only while another knob has certain values.

A search leaves them where the default has them while they are idle, so that no two of its points
are the same engine; an export says of them that they need no key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import KNOBS, MODEL_METHODS

_DRAFTING = tuple(m for m in KNOBS["speculative_method"].choices or () if m != "none")
_LOOKING_UP = tuple(method for method in _DRAFTING if method not in MODEL_METHODS)


@dataclass(frozen=True, slots=True)
class Governed:
    """What decides whether a knob does anything: another knob, at one of these values."""

    by: str
    among: tuple[Any, ...]


GOVERNED: Mapping[str, Governed] = {
    "speculative_model": Governed("speculative_method", tuple(MODEL_METHODS)),
    "num_speculative_tokens": Governed("speculative_method", _DRAFTING),
    "speculative_adaptive": Governed("speculative_method", _DRAFTING),
    "prompt_lookup_min": Governed("speculative_method", _LOOKING_UP),
    "prompt_lookup_max": Governed("speculative_method", _LOOKING_UP),
    "prompt_lookup_window": Governed("speculative_method", _LOOKING_UP),
}


def idle_because(knob: str, values: Mapping[str, Any]) -> str | None:
    """Why a knob does nothing beside these values of others; None if it may do something.

    A governing knob that is not among the values has its default.
    """
    governed = GOVERNED.get(knob)
    if governed is None:
        return None
    value = values.get(governed.by, KNOBS[governed.by].default)
    return None if value in governed.among else f"has no effect while {governed.by} is {value}"
