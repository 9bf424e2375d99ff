"""Which steps of a load to trace; told without torch, so that the command line is quick."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autotune.errors import BadInput

# Past the first prompts, and few enough that the file opens at once.
DEFAULT_STEPS = "20:30"
_MOST = 1000


@dataclass(frozen=True, slots=True)
class TraceSteps:
    """Steps `first` to `last` of a load, both included, counted from 0."""

    first: int
    last: int

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and self.first <= step <= self.last

    def __str__(self) -> str:
        return f"{self.first}:{self.last + 1}"


def parse_trace_steps(text: str) -> TraceSteps:
    """Steps written as `20:30`: from step 20 up to, and without, step 30.

    Raises:
        BadInput: it is no such range, an empty one, or one of more steps than a viewer opens.
    """
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise BadInput(
            f"--trace-steps {text!r} is no range of steps: write for instance 20:30, from step 20 "
            "up to step 30"
        )
    first, end = int(match[1]), int(match[2])
    if end <= first:
        raise BadInput(f"--trace-steps {text!r} holds no step: the second must be above the first")
    if end - first > _MOST:
        raise BadInput(
            f"--trace-steps {text!r} holds {end - first} steps; at most {_MOST} can be traced: "
            f"write for instance {first}:{first + 10}"
        )
    return TraceSteps(first, end - 1)
